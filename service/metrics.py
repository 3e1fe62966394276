"""Metrics: the page that Prometheus reads.

collectors --at each request, in its thread--> families --text | OpenMetrics, as asked--> http://host:port/metrics
"""

from __future__ import annotations

import errno
import re
import socket
import threading
from contextlib import contextmanager
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from prometheus_client.registry import Collector

    from service import settings

# Triton's counters lack the ending `_total` that OpenMetrics wants of one, so there they are of an unknown type. The
# older text has no such rule: Triton's own page calls them counters, and some readers drop what has no type.
_UNTYPED = re.compile(rb"^(# TYPE nv_\w+) untyped$", re.MULTILINE)

# Seconds after which a reader that says nothing loses its thread.
_PATIENCE_S = 30
# Seconds after which the end is noticed at the latest, which so long holds up the server's.
_POLL_S = 0.05


@contextmanager
def page(chosen: settings.Metrics, *collectors: Collector) -> Iterator[int]:
    """Serve the page while the block runs; yields its port.

    Args:
        chosen: where; its port is not None.
        collectors: what is read, in other threads than this one, beside the process's own CPU, memory and files.

    Raises:
        OSError: the address cannot be listened on.
    """
    assert chosen.port is not None, "without a port there is no page"
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    for of_the_process in (ProcessCollector, PlatformCollector, GCCollector):
        of_the_process(registry=registry)
    server = _listening(chosen.host, chosen.port, registry)
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingWSGIServer):
    """Prometheus's own, but that the host's name is not looked up, which can take seconds."""

    def server_bind(self) -> None:
        """Listen."""
        TCPServer.server_bind(self)
        host, self.server_port, *_ = self.server_address
        self.server_name = str(host)
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base names it
        """Log nothing: the page is read again and again."""


def _listening(host: str, port: int, registry: CollectorRegistry) -> _Server:
    app = _typed(make_wsgi_app(registry, disable_compression=True))
    try:
        return make_server(host, port, app, _Server6 if ":" in host else _Server, _Handler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} on {host} is in use; choose another as metrics.port") from None
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose a metrics.host of this machine"
        ) from None


def _typed(untyped: WSGIApplication) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        return [_UNTYPED.sub(rb"\1 counter", part) for part in untyped(environ, start_response)]

    return app
