"""The gRPC server: what it is made of, where it listens, how it ends.

bind --> load models --> register services, health, reflection --> start --signal--> NOT_SERVING --> drain --> end
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos.inference import open_inference_pb2, open_inference_pb2_grpc
from service.errors import ErrorInterceptor
from service.inference.health import HealthServicer
from service.inference.models import Models
from service.inference.servicer import InferenceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
    from pathlib import Path
    from typing import Any

    from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

    from service import settings as settings_module
    from service.settings import Settings

    Handler = grpc.RpcMethodHandler[Any, Any]

_MEBIBYTE = 1 << 20

# Seconds without a call after which none is taken to be on its way: many times what the event loop needs for one.
_QUIET_S = 0.05
# Seconds that callers who do not heed the health service may go on.
_LONGEST_QUIET_S = 1.0


@dataclass(frozen=True)
class Service:
    """A gRPC service to serve.

    Attributes:
        descriptor: its name, and its file for reflection.
        add_to: adds it to a server.
        end: ends its streams, which would otherwise hold up the shutdown for the whole grace period.
    """

    descriptor: ServiceDescriptor
    add_to: Callable[[grpc.aio.Server], None]
    end: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Serving:
    """A server that answers: where, and what it serves."""

    host: str
    port: int
    models: tuple[str, ...]

    @property
    def address(self) -> str:
        """HOST:PORT, as clients take it."""
        return _address(self.host, self.port)


async def serve(
    repository: str | Path,
    settings: Settings,
    *,
    on_ready: Callable[[Serving], None] | None = None,
    services: Sequence[Service] = (),
) -> None:
    """Serve a repository until SIGTERM or SIGINT; then finish what is in flight and return.

    A second signal ends the process at once. Must run in the main thread.

    Args:
        repository: the model repository: a folder, or a URL that `open_repository` takes.
        settings: where and how.
        on_ready: is called once, when the server answers.
        services: what to serve beside inference, health and reflection.

    Raises:
        FileNotFoundError: there is no such repository.
        OSError: the address cannot be listened on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with running(repository, settings, services=services) as serving:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if on_ready is not None:
            on_ready(serving)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@asynccontextmanager
async def running(
    repository: str | Path, settings: Settings, *, services: Sequence[Service] = ()
) -> AsyncIterator[Serving]:
    """Serve a repository while the block runs; raises what `serve` does."""
    _check_address(settings.server)
    models, health, arrivals = Models(), HealthServicer(), _Arrivals()
    try:
        await models.load(repository, settings)
        every = (*_own_services(models, health), *services)
        server = grpc.aio.server(interceptors=[arrivals, ErrorInterceptor()], options=_options(settings.server))
        _register(server, every)
        port = _bind(server, settings.server)
        await health.set(models.health | dict.fromkeys(_names(every), True) | {"": models.ready})
        await server.start()
        try:
            yield Serving(settings.server.host, port, tuple(models.served))
        finally:
            models.retiring = True
            await health.stop()
            for service in services:
                service.end()
            await _drain(server, models, arrivals, grace_s=settings.server.shutdown_grace_s)
    finally:
        await models.close()


async def _drain(server: grpc.aio.Server, models: Models, arrivals: _Arrivals, *, grace_s: float) -> None:
    """Answer what has been sent, refuse what still comes, and stop, within the grace period.

    `stop` alone drops the calls that have reached the machine and not yet a handler; their callers are told
    CANCELLED, as if they had done it themselves. So first all of those are let in; then the models refuse more
    with UNAVAILABLE.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + grace_s
    await arrivals.quiet(before=end)
    await asyncio.wait({asyncio.create_task(models.drain())}, timeout=max(0, end - loop.time()))
    await arrivals.quiet(before=end)
    await server.stop(max(0, end - loop.time()))


class _Arrivals(grpc.aio.ServerInterceptor):
    """Knows when the last call came."""

    def __init__(self) -> None:
        self._last = 0.0  # the event loop's time, seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        self._last = asyncio.get_running_loop().time()
        return await continuation(handler_call_details)

    async def quiet(self, *, before: float) -> None:
        """Return when no call has come for a moment; at the time `before`, or after a second, at the latest."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while (now := loop.time()) < min(before, began + _LONGEST_QUIET_S):
            if now >= max(self._last, began) + _QUIET_S:
                return
            await asyncio.sleep(_QUIET_S / 5)


def _own_services(models: Models, health: HealthServicer) -> tuple[Service, ...]:
    inference = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    add_inference = open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
    add_health = health_pb2_grpc.add_HealthServicer_to_server
    return (
        Service(inference, partial(add_inference, InferenceServicer(models))),
        Service(health_pb2.DESCRIPTOR.services_by_name["Health"], partial(add_health, health)),
    )


def _register(server: grpc.aio.Server, services: Iterable[Service]) -> None:
    """Add the services, and reflection over all of them and itself."""
    descriptors = [reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]]
    for service in services:
        service.add_to(server)
        descriptors.append(service.descriptor)
    # The descriptors come from two pools (docs/adr/0006), and reflection answers from one.
    pool, seen = DescriptorPool(), set[str]()
    for descriptor in descriptors:
        _add_file(pool, descriptor.file, seen)
    names = [descriptor.full_name for descriptor in descriptors]
    reflection.enable_server_reflection(names, server, pool=pool)


def _add_file(pool: DescriptorPool, file: FileDescriptor, seen: set[str]) -> None:
    if file.name in seen:
        return
    seen.add(file.name)
    for dependency in file.dependencies:
        _add_file(pool, dependency, seen)
    pool.AddSerializedFile(file.serialized_pb)


def _names(services: Iterable[Service]) -> list[str]:
    return [service.descriptor.full_name for service in services]


def _options(server: settings_module.Server) -> list[tuple[str, int]]:
    size = server.max_message_mib * _MEBIBYTE
    return [
        # Two servers on one port would each get some of the requests; the second is to be told instead.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
    ]


def _check_address(where: settings_module.Server) -> None:
    """Listen for a moment, before anything is loaded: gRPC itself says why it cannot bind on stderr alone.

    Raises:
        OSError: the port is in use, or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    try:
        socket.create_server((where.host, where.port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _port_in_use(where) from None
        address = _address(where.host, where.port)
        raise OSError(f"cannot listen on {address}: {error.strerror}; choose a host and port of this machine") from None


def _bind(server: grpc.aio.Server, where: settings_module.Server) -> int:
    """Listen, and return the port."""
    try:
        return server.add_insecure_port(_address(where.host, where.port))
    except RuntimeError:
        # It was free when it was checked.
        raise _port_in_use(where) from None


def _port_in_use(where: settings_module.Server) -> OSError:
    return OSError(f"port {where.port} on {where.host} is in use; choose another with --port")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
