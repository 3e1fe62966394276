"""Calls: what is known about each call while it is served, and who is told when it ends.

    boundary --begin--> Call (a context variable) <--describe, ran-- inference, batching
                          |--> every line of the log, which so has the request id
    boundary --end------> a line of the log for the call, if asked; a span, if traced

What costs time, such as the request id, is found out only when somebody wants it.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import grpc

from service.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    class Context(Protocol):
        """What is asked of gRPC's own."""

        def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
            """Return what the caller sent beside the request."""


REQUEST_ID = "x-request-id"

# Characters of a caller's request id that are kept: more than any identifier has, too few to flood a log.
_LONGEST_REQUEST_ID = 128
_MILLISECOND_NS = 1_000_000

logger = logging.getLogger(__name__)


class Span(Protocol):
    """What a tracer keeps of one call."""

    def ran(self, *, waited_ns: int, ran_ns: int, batch: int) -> None:
        """Say that the engine has just answered a request: nanoseconds, and images of the engine's call."""
        ...

    def end(self, call: Call, status: grpc.StatusCode) -> None:
        """End it."""
        ...


class Call:
    """One call of a method.

    Attributes:
        method: /package.Service/Method.
        model, version: what it asks; empty where it asks nothing of a model, or that is not known yet.
        images: how many it brought; a stream, which is one call, in all its requests. What else is known of it is known
            of the request that came last, and its status is the stream's: errors within are answers.
        batch: images of the engine's call that answered it, its own among them; 0 before.
        waited_ns, ran_ns: nanoseconds in the queue, and in the engine's call.
        span: None where the call is not traced.
        told: whether anybody is told of it when it ends.
        trace_id: of its trace, in hexadecimal; empty where it has none.
    """

    __slots__ = (
        "_context",
        "_error",
        "_request_id",
        "batch",
        "began_ns",
        "images",
        "method",
        "model",
        "ran_ns",
        "span",
        "told",
        "trace_id",
        "version",
        "waited_ns",
    )

    def __init__(self, method: str, context: Context) -> None:
        self.method = method
        self.began_ns = time.perf_counter_ns()
        self.model = ""
        self.version = ""
        self.images = 0
        self.batch = 0
        self.waited_ns = 0
        self.ran_ns = 0
        self.span: Span | None = None
        self.told = False
        self.trace_id = ""
        self._request_id = ""
        self._context: Context | None = context
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether it has been answered."""
        return self._context is None

    @property
    def request_id(self) -> str:
        """The caller's `x-request-id`, else the request's own id, else one that is made up now."""
        sent = self.metadata().get(REQUEST_ID, "")
        if isinstance(sent, str) and sent:
            return sent[:_LONGEST_REQUEST_ID]
        if not self._request_id:
            self._request_id = uuid.uuid4().hex
        return self._request_id

    def metadata(self) -> dict[str, str | bytes]:
        """Return what the caller sent beside the request; the last of several values of a key."""
        return dict(self._context.invocation_metadata() or ()) if self._context is not None else {}

    def describe(self, *, model: str, version: str, request_id: str = "") -> None:
        """Say what the request asks; the empty request id is none."""
        self.model = model
        self.version = version
        if request_id:
            self._request_id = request_id[:_LONGEST_REQUEST_ID]

    def ran(self, *, waited_ns: int, ran_ns: int, batch: int) -> None:
        """Say that the engine has just answered: nanoseconds in the queue and in its call, and images of that call."""
        self.waited_ns = waited_ns
        self.ran_ns = ran_ns
        self.batch = batch
        if self.span is not None:
            self.span.ran(waited_ns=waited_ns, ran_ns=ran_ns, batch=batch)

    def fail(self, error: BaseException) -> None:
        """Say why there is no answer."""
        self._error = error

    def status(self) -> grpc.StatusCode:
        """Return what the caller is told; while what ended the call is raised, it need not have been said."""
        error = self._error or sys.exception()
        if error is None:
            return grpc.StatusCode.OK
        if isinstance(error, ServiceError):
            return error.status
        # Cancelled, or a stream that its reader closed: neither is an Exception, or the work of anybody here.
        return grpc.StatusCode.INTERNAL if isinstance(error, Exception) else grpc.StatusCode.CANCELLED

    def fields(self) -> dict[str, str]:
        """Return what each line of the log says about it."""
        known = {
            "request_id": self.request_id,
            "model": self.model,
            "version": self.version,
            "trace_id": self.trace_id,
        }
        return {name: value for name, value in known.items() if value}

    def end(self) -> None:
        """Let go of the connection; whoever still runs in this context is no longer part of the call."""
        self._context = None


class Tracer(Protocol):
    """What makes spans of calls."""

    def begin(self, call: Call) -> Span | None:
        """Return the span of a call that begins now, None where it is not traced."""
        ...


class Calls:
    """Begins and ends calls.

    Args:
        log: whether each call is a line of the log.
        tracer: what makes spans; None where nothing is traced.
    """

    __slots__ = ("_log", "_tracer")

    def __init__(self, *, log: bool = False, tracer: Tracer | None = None) -> None:
        self._log = log
        self._tracer = tracer

    def begin(self, method: str, context: Context) -> Call:
        """Return a call that begins now, the current one of the task that this runs in."""
        call = Call(method, context)
        _current.set(call)
        if self._tracer is not None:
            call.span = self._tracer.begin(call)
        call.told = self._log or call.span is not None
        return call

    def end(self, call: Call) -> None:
        """End a call: in a `finally`, after `fail` where an error became a status."""
        if call.told:
            self._tell(call, call.status())
        call.end()

    def _tell(self, call: Call, status: grpc.StatusCode) -> None:
        if self._log:
            numbers = _numbers(call)
            logger.info("%s %s", call.method, status.name, extra={"fields": {"status": status.name, **numbers}})
        if call.span is not None:
            call.span.end(call, status)


def current() -> Call | None:
    """Return the call that is being served in this context, if any."""
    call = _current.get()
    return None if call is None or call.ended else call


def told() -> Call | None:
    """Return the call that is being served in this context, if it is worth saying what happens to it."""
    call = _current.get()
    return None if call is None or call.ended or not call.told else call


def _numbers(call: Call) -> Mapping[str, float]:
    numbers: dict[str, float] = {"ms": _milliseconds(time.perf_counter_ns() - call.began_ns)}
    if call.images:
        numbers["images"] = call.images
    if call.batch:
        numbers |= {
            "batch": call.batch,
            "queue_ms": _milliseconds(call.waited_ns),
            "compute_ms": _milliseconds(call.ran_ns),
        }
    return numbers


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / _MILLISECOND_NS, 3)


_current: ContextVar[Call | None] = ContextVar("call", default=None)
