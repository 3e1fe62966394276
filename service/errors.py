"""The errors that cross the wire, each with its gRPC status; the one place where they become statuses and back.

ServiceError               INTERNAL             ours, and not foreseen
├── InvalidArgument        INVALID_ARGUMENT     the caller's: the request can never work
├── NotFound               NOT_FOUND            the caller's: what it names is not here
├── FailedPrecondition     FAILED_PRECONDITION  the caller's: not in this state of things
├── ResourceExhausted      RESOURCE_EXHAUSTED   nobody's: too much at once; later it may work
├── Unavailable            UNAVAILABLE          nobody's: the server is gone, going or not there yet
├── DeadlineExceeded       DEADLINE_EXCEEDED    nobody's: no answer in the caller's time
└── Unimplemented          UNIMPLEMENTED        ours, foreseen: this server does not do that

servicer --raises--> ErrorInterceptor --status, message--> client --raises--> the same class
"""

# ruff: noqa: N818 - the classes have the names of their statuses

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

_INTERNAL_MESSAGE = "internal error; the server's log has the details"

# UTF-8 bytes of a message. Statuses travel as a header, percent-encoded to three times this in the worst case,
# and peers refuse headers above 8 KiB: a message that quotes a long input must not become a broken stream.
_LONGEST_MESSAGE = 2000

logger = logging.getLogger(__name__)


class ServiceError(Exception):
    """Something went wrong on the server's side that neither side foresaw; the server's log says more."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL


class InvalidArgument(ServiceError):
    """The caller is at fault: the request can never work, whatever the state of the server."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(ServiceError):
    """The caller is at fault: it names something that is not here; the message lists what is."""

    status = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(ServiceError):
    """The caller is at fault: the request is sound, but not in the present state of what it names."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(ServiceError):
    """Nobody is at fault: more was asked at once than the server takes; try again later, with fewer at a time."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ServiceError):
    """Nobody is at fault: the server cannot be reached, or is shutting down; try again, or elsewhere."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ServiceError):
    """Nobody is at fault: no answer came in the time that the caller gave."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Unimplemented(ServiceError):
    """The server is at fault, knowingly: the protocol has this, and this server does not do it."""

    status = grpc.StatusCode.UNIMPLEMENTED


def error_from_status(status: grpc.StatusCode, message: str) -> ServiceError:
    """Return the error that a status stands for; a `ServiceError` itself where the tree has no class for it."""
    classes = {kind.status: kind for kind in ServiceError.__subclasses__()}
    return classes.get(status, ServiceError)(message)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into statuses; anything but a `ServiceError` is logged and told as INTERNAL alone.

    Handlers are coroutines; those that stream their response are async generators. Handlers of streamed requests
    pass through untouched.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        wire = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            streaming = _streaming(handler.unary_stream, handler_call_details.method)
            return grpc.unary_stream_rpc_method_handler(streaming, *wire)
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, handler_call_details.method), *wire)


def _unary(behaviour: Any, method: str) -> Any:
    assert inspect.iscoroutinefunction(behaviour), f"{method}: expected a coroutine function"

    async def handle(request: object, context: Context) -> object:
        try:
            return await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - the boundary: nothing may leave but a status
            await _abort(context, error, method)

    return handle


def _streaming(behaviour: Any, method: str) -> Any:
    assert inspect.isasyncgenfunction(behaviour), f"{method}: expected an async generator function"

    async def handle(request: object, context: Context) -> AsyncIterator[object]:
        try:
            async for response in behaviour(request, context):
                yield response
        except Exception as error:  # noqa: BLE001 - as above
            await _abort(context, error, method)

    return handle


async def _abort(context: Context, error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, ServiceError):
        await context.abort(error.status, _shortened(str(error)))
    logger.error("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, _INTERNAL_MESSAGE)


def _shortened(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= _LONGEST_MESSAGE:
        return message
    return encoded[:_LONGEST_MESSAGE].decode(errors="ignore") + "…"
