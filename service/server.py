"""The gRPC server: what it is made of, where it listens, how it ends.

check ports --> load models --> services: inference, repository, health, reflection, others --> boundary --> fronts
signal --> NOT_SERVING --> drain delay --> drain --> end
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from protos.inference import (
    model_repository_pb2,
    model_repository_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
)
from service import auth, fronts, memory, metrics, reflection, tls, tracing
from service.auth import Authenticator, role_of
from service.calls import Calls
from service.inference.families import Families
from service.inference.health import HealthServicer
from service.inference.models import Models
from service.inference.repository import RepositoryServicer
from service.inference.servicer import DESERIALISERS, InferenceServicer
from service.inference.trace_settings import TraceSettings
from service.reflection import ReflectionServicer
from service.rpc import Boundary, Handlers

_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_REPOSITORY = model_repository_pb2.DESCRIPTOR.services_by_name["ModelRepositoryService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
# Those whose health is told by name.
_SERVICES = (_INFERENCE.full_name, _REPOSITORY.full_name, _HEALTH.full_name)

# Seconds without a call after which what was freed is given back: until then the next request gets it.
_IDLE_S = 10.0
# Seconds within which a signal that comes twice to one of several processes was sent once.
_ECHO_S = 1.0

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    import grpc
    from google.protobuf.descriptor import ServiceDescriptor

    from service.rpc import Method
    from service.settings import Settings


@dataclass(frozen=True)
class Service:
    """A gRPC service to serve.

    Attributes:
        descriptor: its name, and its file for reflection.
        add_to: adds it to a server.
        end: ends its streams, which would otherwise hold up the shutdown for the whole grace period.
        parsers: what parses requests in place of protobuf, by the method's name.
    """

    descriptor: ServiceDescriptor
    add_to: Callable[[Handlers], None]
    end: Callable[[], None] = lambda: None
    parsers: Mapping[str, Callable[[bytes], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Serving:
    """A server that answers: where, and what it serves.

    Attributes:
        admin_port: of the services that have a port of their own, None without one.
        metrics_port: of Prometheus's page, None without one.
    """

    host: str
    port: int
    models: tuple[str, ...]
    admin_port: int | None = None
    metrics_port: int | None = None

    @property
    def address(self) -> str:
        """HOST:PORT, as clients take it."""
        return fronts.address(self.host, self.port)

    @property
    def admin_address(self) -> str:
        """HOST:PORT of repository, settings and audits."""
        return self.address if self.admin_port is None else fronts.address(self.host, self.admin_port)


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
        services: what to serve beside inference, the repository, health and reflection.

    Raises:
        FileNotFoundError: there is no such repository, or no such certificate.
        OSError: the address cannot be listened on.
        ModuleNotFoundError: the settings want a package that is not installed.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with running(repository, settings, services=services) as serving:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if on_ready is not None:
            on_ready(serving)
        await stop.wait()

        def heed_the_second() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)

        # Ctrl-C and systemd signal every process of a group, and the parent passes its own on: those are one signal.
        if settings.server.processes > 1:
            loop.call_later(_ECHO_S, heed_the_second)
        else:
            heed_the_second()


@asynccontextmanager
async def running(
    repository: str | Path, settings: Settings, *, services: Sequence[Service] = ()
) -> AsyncIterator[Serving]:
    """Serve a repository while the block runs; raises what `serve` does."""
    where = settings.server
    if settings.tls is not None:
        tls.server_credentials(settings.tls)  # what is wrong with them is said before models are loaded
    authenticator = Authenticator(settings.auth)
    for line in auth.concerns(settings):
        logger.warning("%s", line)
    for port in (where.port, where.admin_port):
        if port is not None and where.processes == 1:
            fronts.check_address(where.host, port)
    async with AsyncExitStack() as ends:
        models, switch = Models(repository, settings), TraceSettings(settings.tracing)
        ends.push_async_callback(models.close)
        tracer = tracing.start(settings.tracing, switch)
        if tracer is not None:
            ends.push_async_callback(tracer.close)
        page = _page(settings, models, ends)
        await models.start()
        servicer = InferenceServicer(models, settings, tracing=switch)
        ends.callback(servicer.close)
        health = HealthServicer(models, services=[*_SERVICES, *(each.descriptor.full_name for each in services)])
        calls = Calls(log=settings.logging.calls, tracer=tracer)
        boundary = Boundary(
            authenticator, calls, max_calls=where.max_concurrent_calls, max_bytes=where.max_in_flight_mib << 20
        )
        every = (*_own_services(models, servicer, health), *services)
        servers, ports = _listening(_methods(every, boundary), settings)
        for server in servers:
            await server.start()
        tidying = asyncio.create_task(_tidy(boundary))
        ends.callback(tidying.cancel)
        try:
            port, admin_port = ports[0], ports[1] if len(ports) > 1 else None
            yield Serving(where.host, port, tuple(models.served), admin_port=admin_port, metrics_port=page)
        finally:
            models.retiring = True
            await health.stop()
            await asyncio.sleep(where.drain_delay_s)
            for service in services:
                service.end()
            await _drain(servers, models, boundary, grace_s=where.shutdown_grace_s)


def _page(settings: Settings, models: Models, ends: AsyncExitStack) -> int | None:
    """Serve Prometheus's page until the end, if it is asked for; return its port."""
    if settings.metrics.port is None:
        return None
    return ends.enter_context(metrics.page(settings.metrics, Families(models.ledger, index=models.index)))


def _listening(methods: Sequence[Method], settings: Settings) -> tuple[list[grpc.aio.Server], list[int]]:
    """Return servers that listen, and their ports: one for all methods, or one for callers and one for operators."""
    where = settings.server
    groups, ports = [methods], [where.port]
    if where.admin_port is not None:
        groups = [[each for each in methods if not _operates(each.path)], methods]
        ports.append(where.admin_port)
    servers = [fronts.front(group, where) for group in groups]
    # Credentials serve one port; a second one would be refused.
    return servers, [
        fronts.listen(server, where.host, port, None if settings.tls is None else tls.server_credentials(settings.tls))
        for server, port in zip(servers, ports, strict=True)
    ]


def _operates(path: str) -> bool:
    """Return whether a method is for those who operate the server: repository, logging, tracing, audits."""
    return role_of(path) in {"admin", "audit"} or path.endswith("/RepositoryIndex")


async def _drain(
    servers: Sequence[grpc.aio.Server],
    models: Models,
    boundary: Boundary,
    *,
    grace_s: float,
) -> None:
    """Answer what has been sent, refuse what still comes, and stop, within the grace period.

    `stop` alone drops the calls that have reached the machine and not yet a handler; their callers are told
    CANCELLED, as if they had done it themselves. So first all of those are let in; then the models refuse more
    with UNAVAILABLE.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + grace_s
    await boundary.quiet(before=end)
    boundary.end_streams()
    await asyncio.wait({asyncio.create_task(models.drain())}, timeout=max(0, end - loop.time()))
    await boundary.quiet(before=end)
    await asyncio.gather(*(server.stop(max(0, end - loop.time())) for server in servers))


def _own_services(models: Models, servicer: InferenceServicer, health: HealthServicer) -> tuple[Service, ...]:
    return (
        Service(
            _INFERENCE,
            partial(open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, servicer),
            parsers=DESERIALISERS,
        ),
        Service(
            _REPOSITORY,
            partial(model_repository_pb2_grpc.add_ModelRepositoryServiceServicer_to_server, RepositoryServicer(models)),
        ),
        Service(
            _HEALTH,
            partial(health_pb2_grpc.add_HealthServicer_to_server, health),
        ),
    )


def _methods(services: Sequence[Service], boundary: Boundary) -> list[Method]:
    """Return every method of the services, and of reflection over them, behind the boundary."""
    described = ReflectionServicer([service.descriptor for service in services])
    add_reflection = partial(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, described)
    methods = []
    for service in (*services, Service(reflection.DESCRIPTOR, add_reflection)):
        handlers = Handlers()
        service.add_to(handlers)
        for path, handler in handlers.by_path.items():
            if not _is_served(handler):
                continue
            parse = service.parsers.get(path.rpartition("/")[2], handler.request_deserializer)
            methods.append(boundary.around(path, handler, parse))
    return methods


def _is_served(handler: grpc.RpcMethodHandler[Any, Any]) -> bool:
    """Return whether a servicer has a method, and not only its generated base: a later protocol may have more."""
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in behaviours)


async def _tidy(boundary: Boundary) -> None:
    """Give memory back to the system once the server has been idle for a while after it was busy."""
    tidy = True
    while True:
        await asyncio.sleep(_IDLE_S)
        idle = boundary.idle_s >= _IDLE_S
        if idle and not tidy:
            await asyncio.to_thread(memory.give_back)
        tidy = idle
