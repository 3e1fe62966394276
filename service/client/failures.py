"""How a call failed: gRPC's error -> status, message, when to try again -> the error of `service.errors`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from service.errors import (
    DETAILS,
    PUSHBACK,
    DeadlineExceeded,
    ServiceError,
    Unavailable,
    Unimplemented,
    error_from_status,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

# gRPC has one status for "no server there" and "the server says that it is unavailable"; only its words differ.
_NEVER_SENT = ("failed to connect", "errors resolving", "DNS resolution failed")
_NOT_REACHED = (*_NEVER_SENT, "Socket closed", "Connection reset", "recvmsg:")

# And one for "too much at once" and "too large for ever".
_TOO_LARGE = "message larger than max"

# What gRPC itself says of a method that a server has not.
_NO_METHOD = "Method not found!"

# What gRPC itself says when the caller's time is over; a server has more to say.
_TIME_IS_OVER = "Deadline Exceeded"


@dataclass(frozen=True)
class Failure:
    """How one attempt ended.

    Attributes:
        pushback_s: seconds after which the server wants the next one; None if it does not say, negative for never.
    """

    status: grpc.StatusCode
    message: str
    pushback_s: float | None

    def may_be_repeated(self, *, harmless: bool) -> bool:
        """Return whether another attempt may help.

        Args:
            harmless: whether it does no harm if this one has arrived.
        """
        if self.pushback_s is not None and self.pushback_s < 0:
            return False
        if self.status is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _TOO_LARGE not in self.message
        if self.status is grpc.StatusCode.UNAVAILABLE:
            # A server that says when to try again has done nothing yet.
            return harmless or self.pushback_s is not None or self.message.startswith(_NEVER_SENT)
        # Not cancelled by us: by a server that ends.
        return harmless and self.status is grpc.StatusCode.CANCELLED


def failure_of(error: grpc.RpcError) -> Failure:
    """Return how a call failed."""
    # The stubs' errors are calls, too: that is where status, message and metadata are.
    call: Any = error
    metadata = dict(call.trailing_metadata() or ())
    return Failure(status=call.code(), message=call.details() or "", pushback_s=pushback_s(metadata))


def pushback_s(metadata: Mapping[str, str | bytes]) -> float | None:
    """Return after how many seconds a server wants the next attempt.

    Args:
        metadata: trailing metadata of a call that failed.

    Returns:
        None if the server does not say; negative if it wants none: it says so, or what it says is no number (gRPC
        proposal A6).
    """
    if (said := metadata.get(PUSHBACK)) is not None:
        text = str(said)
        return int(text) / 1000 if text.isascii() and text.isdigit() and len(text) < 10 else -math.inf
    details = metadata.get(DETAILS)
    return _retry_info(details) if isinstance(details, bytes) else None


def _retry_info(details: bytes) -> float | None:
    # Needed by errors that say so alone.
    from google.rpc.error_details_pb2 import RetryInfo  # noqa: PLC0415
    from google.rpc.status_pb2 import Status  # noqa: PLC0415

    info = RetryInfo()
    try:
        for each in Status.FromString(details).details:
            if each.Unpack(info):
                return float(max(0, info.retry_delay.seconds + info.retry_delay.nanos / 1e9))
    except DecodeError:
        # What cannot be read says nothing; the status itself is told.
        return None
    return None


def as_error(failure: Failure, *, server: str, timeout_s: float) -> ServiceError:
    """Return the error that a failure stands for.

    Args:
        failure: of the last attempt.
        server: where the call went.
        timeout_s: seconds that it had.
    """
    status, message = failure.status, failure.message
    if status is grpc.StatusCode.UNAVAILABLE and message.startswith(_NOT_REACHED):
        if "handshake failed" in message:
            # From "Ssl handshake failed" on; before it stand addresses and times.
            reason = message[message.index("handshake failed") - 4 :].split("; ")[0]
            return Unavailable(f"{server}: no TLS connection: {reason}; check the certificates of both sides")
        return Unavailable(f"cannot reach {server}; is `tenet serve` running there?")
    if status is grpc.StatusCode.CANCELLED:
        # Not by us: a server that ends drops what comes in its last moment, or outlasts its grace period.
        return Unavailable(f"{server} dropped the call, as a server that shuts down may; try again")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED and message == _TIME_IS_OVER:
        return DeadlineExceeded(f"{server} did not answer within {timeout_s:g} s")
    if status is grpc.StatusCode.UNIMPLEMENTED and message == _NO_METHOD:
        return Unimplemented(
            f"{server} does not serve this method; has it a port for operators (server.admin_port), or is it another "
            "kind of server?"
        )
    after = failure.pushback_s
    return error_from_status(status, message, retry_after_s=None if after is None or after < 0 else after)
