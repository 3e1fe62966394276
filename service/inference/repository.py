"""MLServer's dialect of the repository: the same three calls, in a service of their own."""

# ruff: noqa: ARG002, N802 - the protocol names methods and arguments

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from protos.inference import model_repository_pb2 as pb
from protos.inference import model_repository_pb2_grpc
from service.inference import model_control

if TYPE_CHECKING:
    import grpc

    from service.inference.models import Models

    Context = grpc.aio.ServicerContext[Any, Any]


class RepositoryServicer(model_repository_pb2_grpc.ModelRepositoryServiceServicer):
    """Serves `inference.model_repository.ModelRepositoryService`.

    As at MLServer, whose clients may name a repository, its name means nothing: there is one.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """List every version, its state, and why it is not ready."""
        response = pb.RepositoryIndexResponse()
        for entry in await model_control.index(self._models, ready=request.ready):
            response.models.add(
                name=entry.name, version=str(entry.version or ""), state=entry.state, reason=entry.reason
            )
        return response

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model, or load it again; answer when it answers."""
        await model_control.load(self._models, request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Take a model out of service; what it is busy with is finished."""
        await model_control.unload(self._models, request.model_name)
        return pb.RepositoryModelUnloadResponse()
