"""The standard health service: `grpc.health.v1.Health`, Check and Watch.

models change --changed--> watches wake --models' health now--> Watch: what differs    Check: once --> load balancers
"""

# ruff: noqa: N802 - the protocol names its methods

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from service.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    import grpc

    from service.inference.models import Models

    Context = grpc.aio.ServicerContext[Any, Any]

_Status = pb.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The health of the server (""), of each model and of each service, as it is when it is asked or changes.

    Unlike the servicer of grpcio-health-checking it ends its watches at shutdown: there they would stay, and hold
    the server until its grace period is over.
    """

    def __init__(self, models: Models, *, services: Iterable[str] = ()) -> None:
        self._models = models
        self._services = frozenset(services)
        self._stopping = False
        # Set, and replaced, at each change.
        self._change = asyncio.Event()
        models.on_change = self.changed

    def changed(self) -> None:
        """Have every watch look again; must be called in the event loop."""
        self._change.set()
        self._change = asyncio.Event()

    async def stop(self) -> None:
        """Say of everything that it is not served, and end all watches."""
        self._stopping = True
        self.changed()

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:  # noqa: ARG002
        """Answer the health of one name; NOT_FOUND if it is not known."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            known = ", ".join(map(repr, sorted({"", *self._services, *self._models.health})))
            raise NotFound(f"service {request.service!r}: expected one of {known}")
        return pb.HealthCheckResponse(status=status)

    async def Watch(
        self,
        request: pb.HealthCheckRequest,
        context: Context,  # noqa: ARG002
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """Stream the health of one name: now, and whenever it changes."""
        told = None
        while True:
            change, stopping = self._change, self._stopping
            if (status := self._status(request.service)) != told:
                told = status
                yield pb.HealthCheckResponse(status=status)
            if stopping:
                return
            await change.wait()

    def _status(self, name: str) -> pb.HealthCheckResponse.ServingStatus:
        if not name:
            serving: bool | None = self._models.ready
        else:
            serving = self._models.health.get(name, True if name in self._services else None)
        if serving is None:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if serving and not self._stopping else _Status.NOT_SERVING
