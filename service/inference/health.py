"""The standard health service: `grpc.health.v1.Health`, Check and Watch.

models, server --set--> statuses --Check: once, Watch: at every change--> load balancers, kubelets
"""

# ruff: noqa: N802 - the protocol names its methods

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from service.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

_Status = pb.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The health of the server ("") and of each name that it has been told of.

    Unlike the servicer of grpcio-health-checking it ends its watches at shutdown: there they would stay, and hold
    the server until its grace period is over.
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._stopping = False
        self._changed = asyncio.Condition()

    async def set(self, serving: dict[str, bool]) -> None:
        """Set whether each of these names is served."""
        async with self._changed:
            self._serving |= serving
            self._changed.notify_all()

    async def stop(self) -> None:
        """Say of everything that it is not served, and end all watches."""
        async with self._changed:
            self._stopping = True
            self._changed.notify_all()

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:  # noqa: ARG002
        """Answer the health of one name; NOT_FOUND if it is not known."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            known = ", ".join(repr(name) for name in sorted(self._serving))
            raise NotFound(f"service {request.service!r}: expected one of {known}")
        return pb.HealthCheckResponse(status=status)

    async def Watch(
        self,
        request: pb.HealthCheckRequest,
        context: Context,  # noqa: ARG002
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """Stream the health of one name: now, and whenever it changes."""
        told = None
        while not (self._stopping and self._status(request.service) == told):
            if (status := self._status(request.service)) != told:
                yield pb.HealthCheckResponse(status=status)
            told = status
            async with self._changed:
                while not self._stopping and self._status(request.service) == told:
                    await self._changed.wait()

    def _status(self, name: str) -> pb.HealthCheckResponse.ServingStatus:
        if name not in self._serving:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._serving[name] and not self._stopping else _Status.NOT_SERVING
