"""When a call that failed is made again.

an attempt fails --> what the server says (push-back) | back-off --seconds--> the next attempt
                 --> not safe, out of attempts or out of time --raises--> the error of `service.errors`

gRPC's own retries, by service config, were tried and are not used: they heed `grpc-retry-pushback-ms`, but not
RetryInfo, and give up on requests above 256 KiB, as a few images are, without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from service.client import failures

if TYPE_CHECKING:
    import grpc
    import numpy as np

# How much longer than the back-off, or shorter, a wait may be: callers that failed together come back one by one.
_JITTER = 0.5
# How much longer than asked: never earlier than the server wants, and not all at once.
_PUSHBACK_JITTER = 0.1


@dataclass(frozen=True)
class Retries:
    """How often, and after which time, a call that failed is made again.

    Only what is safe is repeated: calls that were refused for too much load (RESOURCE_EXHAUSTED), and calls whose
    server was not there or went away (UNAVAILABLE); of the latter, those that would do something twice only if they
    never arrived. A server that says when to try again is heeded, one that says never, too. No attempt, and no wait,
    goes beyond the call's timeout.

    Attributes:
        attempts: how often a call is made at most; 1 never repeats.
        initial_s: seconds before the second attempt, give or take half.
        multiplier: by how much each wait is longer than the one before.
        max_s: seconds that a wait has at most, unless the server asks for more.
    """

    attempts: int = 4
    initial_s: float = 0.1
    max_s: float = 5.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"retries.attempts: expected 1 or more, got {self.attempts}; 1 never repeats a call")
        if not 0 <= self.initial_s <= self.max_s < math.inf:
            raise ValueError(
                f"retries: expected 0 <= initial_s <= max_s, got initial_s {self.initial_s:g} and max_s {self.max_s:g}"
            )
        if not 1 <= self.multiplier < math.inf:
            raise ValueError(f"retries.multiplier: expected 1 or more, got {self.multiplier:g}")

    def backoff_s(self, made: int) -> float:
        """Return the seconds to wait, before jitter, after so many attempts."""
        # A power of large numbers overflows; the limit was reached long before.
        exponent = min(made - 1, 64)
        return float(min(self.initial_s * self.multiplier**exponent, self.max_s))


# Four attempts within a second: long enough for a full queue, short enough for a person who mistyped an address.
DEFAULT_RETRIES = Retries()
NO_RETRIES = Retries(attempts=1)


class Attempts:
    """The attempts of one call."""

    def __init__(
        self, retries: Retries, *, server: str, timeout_s: float, repeatable: bool, generator: np.random.Generator
    ) -> None:
        """Begin the call's time.

        Args:
            retries: how often it may be made.
            server: where it goes, for errors.
            timeout_s: seconds that all attempts may take together.
            repeatable: whether a second one does no harm if the first has arrived.
            generator: of the jitter.
        """
        self._retries = retries
        self._server = server
        self._timeout_s = timeout_s
        self._repeatable = repeatable
        self._generator = generator
        self._deadline = monotonic() + timeout_s
        self._made = 0
        self._ended_s: float | None = None

    @property
    def left_s(self) -> float:
        """Seconds that the next attempt may take."""
        return self._deadline - monotonic()

    def ended(self) -> None:
        """Say that an attempt that nobody waits for has ended; in any thread."""
        self._ended_s = monotonic()

    def looked_at(self) -> None:
        """Say that the caller wants its outcome now: the time since it ended was the caller's, not the call's."""
        if self._ended_s is not None:
            self._deadline += monotonic() - self._ended_s

    def wait_s(self, error: grpc.RpcError) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            ServiceError: there is none; the error that the last one ended with.
        """
        self._made += 1
        failure = failures.failure_of(error)
        wait = self._wait(failure)
        if wait is None or wait >= self.left_s:
            raise failures.as_error(failure, server=self._server, timeout_s=self._timeout_s) from error
        return wait

    def _wait(self, failure: failures.Failure) -> float | None:
        if self._made >= self._retries.attempts or not failure.may_be_repeated(harmless=self._repeatable):
            return None
        if failure.pushback_s is not None:
            return failure.pushback_s * float(self._generator.uniform(1, 1 + _PUSHBACK_JITTER))
        return self._retries.backoff_s(self._made) * float(self._generator.uniform(1 - _JITTER, 1 + _JITTER))
