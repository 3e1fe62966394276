"""The gRPC cores that can carry the services, and how they listen.

methods, from bytes to bytes --front--> a server that is not started --listen--> its port
"""

from __future__ import annotations

import errno
import importlib.util
import socket
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import grpc

from service.rpc import Method

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service import settings as settings_module

_MEBIBYTE = 1 << 20


def front(methods: Iterable[Method], settings: settings_module.Server) -> grpc.aio.Server:
    """Return a server of these methods, which listens nowhere yet.

    Raises:
        ModuleNotFoundError: the native core is not installed.
    """
    server: grpc.aio.Server = _native(settings) if settings.front == "native" else _grpc(settings)
    by_service: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = defaultdict(dict)
    for method in methods:
        _, service, name = method.path.split("/")
        by_service[service][name] = _handler(method)
    for service, handlers in by_service.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        if settings.front == "native":
            # Others it would hand to a server of grpcio behind it. grpc.aio itself waits, at each call, for one more
            # future per method that is registered so: a tenth of a call's time.
            server.add_registered_method_handlers(service, handlers)
    return server


def check_address(host: str, port: int) -> None:
    """Listen for a moment, before anything is loaded: gRPC itself says why it cannot bind on stderr alone.

    Raises:
        OSError: the port is in use, or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _port_in_use(host, port) from None
        raise OSError(
            f"cannot listen on {address(host, port)}: {error.strerror}; choose a host and port of this machine"
        ) from None


def listen(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Listen, and return the port; raises OSError if it is in use."""
    where = address(host, port)
    try:
        if credentials is None:
            return server.add_insecure_port(where)
        return server.add_secure_port(where, credentials)
    except RuntimeError:
        # It was free when it was checked.
        raise _port_in_use(host, port) from None


def address(host: str, port: int) -> str:
    """Return HOST:PORT, as clients take it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _grpc(settings: settings_module.Server) -> grpc.aio.Server:
    options = _options(settings)
    # Two servers on one port would each get some of the requests: only the processes of one server may.
    options.append(("grpc.so_reuseport", int(settings.processes > 1)))
    if settings.max_connections is not None:
        options.append(("grpc.max_allowed_incoming_connections", settings.max_connections))
    if settings.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age_s)))
        options.append(("grpc.max_connection_age_grace_ms", round(1000 * settings.shutdown_grace_s)))
    return grpc.aio.server(options=options)


def _native(settings: settings_module.Server) -> grpc.aio.Server:
    if importlib.util.find_spec("pygrpc_native") is None:
        raise ModuleNotFoundError('server.front = "native" needs pygrpc-native; pip install "tenet[native]"')
    import pygrpc_native.aio  # noqa: PLC0415 - an extra

    server: grpc.aio.Server = pygrpc_native.aio.server(options=_options(settings))
    return server


def _options(settings: settings_module.Server) -> list[tuple[str, int]]:
    size = settings.max_message_mib * _MEBIBYTE
    return [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        ("grpc.max_concurrent_streams", settings.max_calls_per_connection),
    ]


def _handler(method: Method) -> grpc.RpcMethodHandler[Any, Any]:
    if not method.response_streaming:
        return grpc.unary_unary_rpc_method_handler(method.behaviour)
    if method.request_streaming:
        return grpc.stream_stream_rpc_method_handler(method.behaviour)
    return grpc.unary_stream_rpc_method_handler(method.behaviour)


def _port_in_use(host: str, port: int) -> OSError:
    return OSError(f"port {port} on {host} is in use; choose another with --port")
