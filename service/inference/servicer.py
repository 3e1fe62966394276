"""The Open Inference Protocol's core six: protobuf in, protobuf out, the models behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from protos.inference import open_inference_pb2 as pb
from protos.inference import open_inference_pb2_grpc
from service.errors import NotFound
from service.inference import tensors
from service.version import VERSION

if TYPE_CHECKING:
    import grpc

    from export.manifest import Manifest, TensorSpec
    from service.inference.models import Models

    Context = grpc.aio.ServicerContext[Any, Any]

# The field's names for what runs a file.
_PLATFORMS = {"model.onnx": "onnxruntime_onnx", "model.plan": "tensorrt_plan"}


class InferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves the models; every error is one of `service.errors`, made a status by its interceptor."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Answer: who can answer is live."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Answer whether every model that should be served is served."""
        return pb.ServerReadyResponse(ready=self._models.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Answer whether a model, or a version of it, answers; an unknown one does not, which is no error."""
        try:
            self._models.find(request.name, request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._models.retiring)

    async def ServerMetadata(
        self,
        request: pb.ServerMetadataRequest,
        context: Context,
    ) -> pb.ServerMetadataResponse:
        """Answer who this is."""
        return pb.ServerMetadataResponse(name="tenet", version=VERSION)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Describe a model; `properties` tells its engine from every other."""
        version = self._models.find(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=map(str, self._models.versions(request.name)),
            platform=_PLATFORMS[version.manifest.file],
            inputs=[_tensor_metadata(version.input)],
            outputs=[_tensor_metadata(version.output)],
            properties=_properties(version.manifest, max_batch=version.max_batch),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Answer one inference, in the form (raw or typed) in which it was asked."""
        version = self._models.find(request.model_name, request.model_version)
        tensors.check_request_parameters(request)
        wanted = tensors.requested_outputs(request, [version.output])
        inputs = tensors.decode_inputs(request, [version.input], max_batch=version.max_batch)
        answers = await version.infer(inputs[version.input.name])
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=str(version.manifest.version), id=request.id
        )
        typed = tensors.is_typed(request)
        tensors.encode_outputs(response, {version.output.name: answers}, wanted, typed=typed)
        return response


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _properties(manifest: Manifest, *, max_batch: int) -> dict[str, str]:
    return {
        "version": str(manifest.version),
        "sha256": manifest.sha256,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "output": manifest.output,
        "max_batch_size": str(max_batch),
        "class_names": json.dumps(manifest.class_names),
    }
