"""Tracing: OpenTelemetry spans of calls, sent to a collector by OTLP.

    call --traced? (the caller's traceparent, else the ratio)--> span --its requests' time in the queue and the
    engine--> children --end--> queue --in batches, by a thread--> collector

OpenTelemetry is an extra, imported when tracing starts; without an endpoint nothing of it is.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import grpc

from service.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanContext

    from service import settings
    from service.calls import Call

# The name under which a collector shows the server, unless OTEL_SERVICE_NAME says another.
_SERVICE = "tenet"
# Seconds that sending a batch of spans may take, and that the end of the server may so be held up.
_EXPORT_TIMEOUT_S = 3.0

_PARENT, _STATE = "traceparent", "tracestate"

# What OpenTelemetry counts as the server's own failure; others are the caller's affair.
# https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class Switch(Protocol):
    """Which calls are traced; it is asked at each call, and so may change."""

    @property
    def enabled(self) -> bool:
        """Whether any is, the callers' own traces among them."""
        ...

    @property
    def ratio(self) -> float:
        """The share of calls, 0 to 1, that are traced where the caller has not decided."""
        ...


def start(chosen: settings.Tracing, switch: Switch) -> Tracer | None:
    """Return what traces calls, None where there is no endpoint.

    Args:
        chosen: the endpoint; `sample_ratio` is the switch's affair.
        switch: which calls are traced.

    Raises:
        ModuleNotFoundError: OpenTelemetry is not installed.
        ValueError: the endpoint is none.
    """
    if chosen.endpoint is None:
        return None
    endpoint = _checked(chosen.endpoint)
    try:
        return Tracer(_provider(endpoint), switch)
    except ModuleNotFoundError:
        raise ModuleNotFoundError('tracing.endpoint needs OpenTelemetry; pip install "tenet[tracing]"') from None


class Tracer:
    """Makes a span of each call that is to be traced; `start` makes it."""

    def __init__(self, provider: TracerProvider, switch: Switch) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415 - an extra

        self._provider = provider
        self._tracer = provider.get_tracer("tenet", VERSION)
        self._propagator = TraceContextTextMapPropagator()
        self._switch = switch

    def begin(self, call: Call) -> CallSpan | None:
        """Return the span of a call that begins now, None where it is not traced; the call learns its trace's id."""
        if not self._switch.enabled:
            return None
        parent = self._parent(call)
        if parent is None and random.random() >= self._switch.ratio:  # noqa: S311 - no secret
            return None
        return self._begin(call, parent)

    async def close(self) -> None:
        """Send what has not been sent, for some seconds at most."""
        await asyncio.to_thread(self._provider.shutdown)

    def _parent(self, call: Call) -> Context | None:
        """Return the caller's own trace, None where it has none, or none that can be read."""
        sent = call.metadata()
        if _PARENT not in sent:
            return None
        carrier = {key: value for key in (_PARENT, _STATE) if isinstance(value := sent.get(key), str)}
        return self._propagator.extract(carrier) or None

    def _begin(self, call: Call, parent: Context | None) -> CallSpan | None:
        from opentelemetry.context import Context  # noqa: PLC0415 - an extra
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - an extra

        service, _, method = call.method.strip("/").rpartition("/")
        span = self._tracer.start_span(
            f"{service}/{method}",
            # An empty context is no parent; None would be whatever is current here.
            context=parent or Context(),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        call.trace_id = _hexadecimal(span.get_span_context())
        return CallSpan(self, span) if span.is_recording() else None

    def child(self, parent: Span, name: str, *, begin_ns: int, end_ns: int, batch: int) -> None:
        """Make a span of what has ended; nanoseconds since the epoch."""
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - an extra

        within = set_span_in_context(parent)
        span = self._tracer.start_span(
            name, context=within, start_time=begin_ns, attributes={"tenet.batch_size": batch}
        )
        span.end(end_ns)


class CallSpan:
    """The span of one call, and those of what its requests waited for."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    def ran(self, *, waited_ns: int, ran_ns: int, batch: int) -> None:
        """Say that the engine has just answered a request: nanoseconds, and images of the engine's call."""
        now = time.time_ns()
        self._tracer.child(self._span, "queue", begin_ns=now - ran_ns - waited_ns, end_ns=now - ran_ns, batch=batch)
        self._tracer.child(self._span, "compute", begin_ns=now - ran_ns, end_ns=now, batch=batch)

    def end(self, call: Call, status: grpc.StatusCode) -> None:
        """End it, with what is known of the call; an error is the server's own failure."""
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - an extra

        number: int = status.value[0]
        known: dict[str, str | int | float] = {
            "tenet.request_id": call.request_id,
            "tenet.model": call.model,
            "tenet.version": call.version,
            "tenet.images": call.images,
            "tenet.batch_size": call.batch,
        }
        self._span.set_attributes({name: value for name, value in known.items() if value})
        self._span.set_attribute("rpc.grpc.status_code", number)
        if call.batch:
            self._span.set_attribute("tenet.queue_seconds", call.waited_ns / 1e9)
            self._span.set_attribute("tenet.compute_seconds", call.ran_ns / 1e9)
        if status in _ERRORS:
            self._span.set_status(Status(StatusCode.ERROR, status.name))
        self._span.end()


def _checked(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"tracing.endpoint: expected http://HOST:PORT or https://HOST:PORT, got {endpoint!r}")
    return endpoint


def _provider(endpoint: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased  # noqa: PLC0415 - an extra

    name = os.environ.get("OTEL_SERVICE_NAME", _SERVICE)
    resource = Resource.create({"service.name": name, "service.version": VERSION, "process.pid": os.getpid()})
    # Whether a call without a parent is traced has been decided before the SDK is asked.
    provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)))
    return provider


def _hexadecimal(context: SpanContext) -> str:
    return f"{context.trace_id:032x}"
