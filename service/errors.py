"""The errors that cross the wire, each with its gRPC status; the one place where they become statuses and back.

ServiceError               INTERNAL             ours, and not foreseen
├── InvalidArgument        INVALID_ARGUMENT     the caller's: the request can never work
├── NotFound               NOT_FOUND            the caller's: what it names is not here
├── AlreadyExists          ALREADY_EXISTS       the caller's: what it would make is here already
├── FailedPrecondition     FAILED_PRECONDITION  the caller's: not in this state of things
├── Unauthenticated        UNAUTHENTICATED      the caller's: who it is cannot be told
├── PermissionDenied       PERMISSION_DENIED    the caller's: it may not do this
├── ResourceExhausted      RESOURCE_EXHAUSTED   nobody's: too much at once; later it may work
├── Unavailable            UNAVAILABLE          nobody's: the server is gone, going or not there yet
├── DeadlineExceeded       DEADLINE_EXCEEDED    nobody's: no answer in the caller's time
├── Cancelled              CANCELLED            nobody's: the caller went away
└── Unimplemented          UNIMPLEMENTED        ours, foreseen: this server does not do that

servicer --raises--> rpc: abort --status, message, when to try again--> client --raises--> the same class
"""

# ruff: noqa: N818 - the classes have the names of their statuses

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Metadata = tuple[tuple[str, str | bytes], ...]

# How a status says when to try again: gRPC's own key, which its retries heed, and the details that Google's
# libraries read (google.rpc.RetryInfo).
PUSHBACK = "grpc-retry-pushback-ms"
DETAILS = "grpc-status-details-bin"

_INTERNAL_MESSAGE = "internal error; the server's log has the details"

# UTF-8 bytes of a message. Statuses travel as a header, percent-encoded to three times this in the worst case,
# and peers refuse headers above 8 KiB: a message that quotes a long input must not become a broken stream.
_LONGEST_MESSAGE = 2000

logger = logging.getLogger(__name__)


class ServiceError(Exception):
    """Something went wrong on the server's side that neither side foresaw; the server's log says more.

    Attributes:
        retry_after_s: seconds after which to try again; None where nobody can say.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InvalidArgument(ServiceError):
    """The caller is at fault: the request can never work, whatever the state of the server."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(ServiceError):
    """The caller is at fault: it names something that is not here; the message lists what is."""

    status = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ServiceError):
    """The caller is at fault: what it would make is here already."""

    status = grpc.StatusCode.ALREADY_EXISTS


class Unauthenticated(ServiceError):
    """The caller is at fault: it does not say who it is, or not so that it can be believed."""

    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServiceError):
    """The caller is at fault: it is known, and may not do this; the message names the role that may."""

    status = grpc.StatusCode.PERMISSION_DENIED


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


class Cancelled(ServiceError):
    """Nobody is at fault: the caller went away before there was an answer."""

    status = grpc.StatusCode.CANCELLED


class Unimplemented(ServiceError):
    """The server is at fault, knowingly: the protocol has this, and this server does not do it."""

    status = grpc.StatusCode.UNIMPLEMENTED


def error_from_status(status: grpc.StatusCode, message: str, *, retry_after_s: float | None = None) -> ServiceError:
    """Return the error that a status stands for; a `ServiceError` itself where the tree has no class for it."""
    classes = {kind.status: kind for kind in ServiceError.__subclasses__()}
    return classes.get(status, ServiceError)(message, retry_after_s=retry_after_s)


async def abort(context: Context, error: Exception, method: str) -> NoReturn:
    """End a call with the status of an error; anything but a `ServiceError` is logged, and told as INTERNAL alone."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status, message = told(error, method)
    await context.abort(status, message, trailing_metadata=_sendable(context, _when(error, message)))


def told(error: Exception, method: str) -> tuple[grpc.StatusCode, str]:
    """Return what a caller is told of an error; log the error where that is not all of it."""
    if isinstance(error, ServiceError):
        return error.status, _shortened(str(error))
    logger.error("%s failed", method, exc_info=error)
    return grpc.StatusCode.INTERNAL, _INTERNAL_MESSAGE


def _sendable(context: Context, metadata: Metadata) -> Metadata:
    """Leave out what the native core refuses, whose call would then never end; RetryInfo says the same."""
    if type(context).__module__.startswith("pygrpc_native"):
        return tuple((key, value) for key, value in metadata if not key.startswith("grpc-retry-"))
    return metadata


def _when(error: Exception, message: str) -> tuple[tuple[str, str | bytes], ...]:
    """Return the metadata that says when to try again."""
    if not isinstance(error, ServiceError) or error.retry_after_s is None:
        return ()
    # Needed by errors that say so alone.
    from google.protobuf.any_pb2 import Any as Packed  # noqa: PLC0415
    from google.protobuf.duration_pb2 import Duration  # noqa: PLC0415
    from google.rpc.error_details_pb2 import RetryInfo  # noqa: PLC0415
    from google.rpc.status_pb2 import Status  # noqa: PLC0415

    milliseconds = max(1, round(1000 * error.retry_after_s))
    delay = Duration()
    delay.FromMilliseconds(milliseconds)
    packed = Packed()
    packed.Pack(RetryInfo(retry_delay=delay))
    details = Status(code=error.status.value[0], message=message, details=[packed])
    return ((PUSHBACK, str(milliseconds)), (DETAILS, details.SerializeToString()))


def _shortened(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= _LONGEST_MESSAGE:
        return message
    return encoded[:_LONGEST_MESSAGE].decode(errors="ignore") + "…"
