"""Dynamic batching: many callers, few calls of the engine.

submit --> queue, by priority, bounded --> whatever waits when an instance is free: one batch --> engine --> each caller
   └--> refused: full, or cannot be in time  └--> expired: waited too long, or cannot be in time any more

Greedy: a batch waits for more only if it has been given a delay.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic_ns
from typing import TYPE_CHECKING, Literal, Protocol

from service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from service.inference.instances import SECOND_NS, Instances
from service.inference.queues import NEVER, ClosedBy, Queue, Waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.engines.base import Inputs, Logits
    from service.errors import ServiceError
    from service.inference.instances import Batch, Run
    from service.settings import Batching

# Why a request never ran.
Rejection = Literal["queue_full", "queue_timeout", "deadline", "cancelled", "closed"]

# Seconds: uvloop's timers know whole milliseconds only; with less, one that came early would come again and again.
_SHORTEST_TIMER_S = 0.001

# Seconds after which to try a full queue again: bounds, and what is said before any batch has been timed.
_SHORTEST_RETRY_S, _LONGEST_RETRY_S, _UNKNOWN_RETRY_S = 0.001, 30.0, 0.1


@dataclass(frozen=True, slots=True)
class Execution:
    """One call of an engine."""

    images: int
    requests: int
    # How long each of the requests was in the queue.
    waited_ns: Sequence[int]
    # Putting the batch together, the engine itself, and taking its answers apart.
    input_ns: int
    infer_ns: int
    output_ns: int
    closed_by: ClosedBy
    failed: bool


class Observer(Protocol):
    """Who is told what became of requests; called in the event loop."""

    def executed(self, execution: Execution) -> None:
        """Count one call of an engine, whether it answered or failed."""

    def rejected(self, reason: Rejection) -> None:
        """Count one request that never ran."""


class Batcher:
    """Shares the instances of one engine among callers; must be made where an event loop runs.

    Args:
        instances: what runs a batch, each on a thread of its own.
        name: what errors and threads are named for.
        max_batch: images that a batch, and so a request, may have; `settings.max_batch_size` is not looked at.
        settings: how requests share calls.
        observer: who is told what became of them.
    """

    def __init__(
        self, instances: Sequence[Run], *, name: str, max_batch: int, settings: Batching, observer: Observer
    ) -> None:
        self._name = name
        self._max_batch = max_batch
        self._observer = observer
        self._levels = settings.priority_levels
        self._usual_level = settings.usual_priority - 1
        self._timeout_ns = round((settings.default_timeout_ms or 0) * 1e6)
        self._own_timeouts = settings.allow_timeout_override
        self._full = Unavailable if settings.full_queue == "UNAVAILABLE" else ResourceExhausted
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = NEVER
        self._pace_ns = 0.0
        self._delay_s = settings.max_queue_delay_ms / 1000
        self._closed = False
        self._instances = Instances(
            instances,
            name=name,
            max_batch=max_batch,
            queue=Queue(levels=settings.priority_levels, bound=settings.max_queue_size),
            delay_ns=round(settings.max_queue_delay_ms * 1e6),
            preferred=frozenset(settings.preferred_batch_sizes),
            answered=self._answer,
            late=self._reject,
        )

    async def submit(
        self, images: Inputs, *, priority: int = 0, timeout_s: float | None = None, deadline: float | None = None
    ) -> Logits:
        """Return the answers to 1 to `max_batch` images, as the engine takes them.

        A caller that is cancelled while it waits costs no call.

        Args:
            images: (N, ...).
            priority: 1 is taken first; 0, and what is above the levels that there are, is the default priority.
            timeout_s: how long to wait in the queue at most, where the settings let requests say so.
            deadline: when the caller wants the answer, in the event loop's time.

        Returns:
            (N, classes); it may share memory with the answers to other callers.

        Raises:
            ResourceExhausted: the queue is full (Unavailable, if the settings say so).
            DeadlineExceeded: it has waited as long as it may, or there can be no answer by its deadline.
            Unavailable: the batcher is closed.
            Exception: what the engine raised for the batch that these images were in.
        """
        waiting = Waiting(images, self._loop.create_future(), level=self._level(priority), arrived_ns=monotonic_ns())
        assert 1 <= waiting.size <= self._max_batch, "the servicer checks sizes"
        if deadline is not None or timeout_s or self._timeout_ns:
            self._limit(waiting, timeout_s=timeout_s, deadline=deadline)
        if self._closed or not self._instances.enter(waiting):
            raise self._refusal(waiting)
        if waiting.start_by_ns < self._timer_ns:
            self._set_timer(waiting.start_by_ns)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._forget(waiting)
            raise

    @property
    def waiting(self) -> int:
        """Requests that wait to be taken; may be read by any thread."""
        return self._instances.total

    async def close(self) -> None:
        """Take no more; return when everything that was taken has been answered."""
        self._closed = True
        await self._instances.close()
        if self._timer is not None:
            self._timer.cancel()

    def _level(self, priority: int) -> int:
        return priority - 1 if 1 <= priority <= self._levels else self._usual_level

    def _limit(self, waiting: Waiting, *, timeout_s: float | None, deadline: float | None) -> None:
        """Say until when a request may be started; raise if there can be no answer by its deadline."""
        timeout_ns = round(timeout_s * SECOND_NS) if timeout_s and self._own_timeouts else self._timeout_ns
        if timeout_ns:
            waiting.start_by_ns = waiting.arrived_ns + timeout_ns
        if deadline is None or self._closed:
            return
        left_ns = round((deadline - self._loop.time()) * SECOND_NS)
        wait_ns, run_ns = self._instances.expected_ns(waiting)
        if wait_ns + run_ns >= left_ns:
            self._observer.rejected("deadline")
            raise DeadlineExceeded(
                f"{self._name}: an answer takes {_ms(wait_ns + run_ns)} now and the deadline is in {_ms(left_ns)}; "
                "give it more time, or try again later"
            )
        start_by_ns = waiting.arrived_ns + left_ns - run_ns
        if start_by_ns < waiting.start_by_ns:
            waiting.start_by_ns = start_by_ns
            waiting.too_late = "deadline"

    def _refusal(self, waiting: Waiting) -> ServiceError:
        if self._closed:
            self._observer.rejected("closed")
            return Unavailable(f"{self._name}: the server is shutting down; try again, or elsewhere")
        self._observer.rejected("queue_full")
        count = self._instances.waiting(waiting.level)
        return self._full(
            f"{self._name}: the queue is full, requests waiting: {count}; "
            "try again later, or raise batching.max_queue_size",
            retry_after_s=self._half_drained_s(count),
        )

    def _half_drained_s(self, count: int) -> float:
        """Return when half of the requests that wait will have been answered, at the rate that was measured.

        Half, so that who comes back then finds a place, and an engine that has not run dry.
        """
        if not self._pace_ns:
            return _UNKNOWN_RETRY_S
        half_s = count * self._pace_ns / len(self._instances) / 2 / SECOND_NS
        # Requests that wait for more to fill their batch leave no place before.
        return min(max(half_s, self._delay_s / 2, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _forget(self, waiting: Waiting) -> None:
        """Give a cancelled caller's place in the queue to the next at once."""
        self._instances.leave(waiting)
        if waiting.answer.cancelled() and not waiting.taken:
            self._observer.rejected("cancelled")

    def _set_timer(self, at_ns: int) -> None:
        """Set the one timer of all requests: it is rarely needed, and one for each would cost each."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ns = at_ns
        left_s = (at_ns - monotonic_ns()) / SECOND_NS
        self._timer = self._loop.call_later(max(left_s, _SHORTEST_TIMER_S), self._expire)

    def _expire(self) -> None:
        late, next_ns = self._instances.expire()
        self._timer, self._timer_ns = None, NEVER
        if next_ns < NEVER:
            self._set_timer(next_ns)
        self._reject(late)

    def _reject(self, late: list[Waiting]) -> None:
        now_ns = monotonic_ns()
        for waiting in late:
            if waiting.answer.done():
                continue
            limit = "timeout allows" if waiting.too_late == "queue_timeout" else "deadline allows"
            waiting.answer.set_exception(
                DeadlineExceeded(
                    f"{self._name}: waited {_ms(now_ns - waiting.arrived_ns)} in the queue, all that its {limit}; "
                    "give it more time, or try again later"
                )
            )
            self._observer.rejected(waiting.too_late)

    def _answer(self, batch: Batch) -> None:
        """Answer all callers of a batch at once, then count it."""
        # Not left in the batch: that is in the error's traceback, and the two would keep each other's memory.
        error, batch.error = batch.error, None
        if error is None:
            for waiting, answer in zip(batch.requests, batch.answers, strict=True):
                if waiting.call is not None:
                    waiting.call.ran(
                        waited_ns=batch.taken_ns - waiting.arrived_ns,
                        ran_ns=batch.input_ns + batch.infer_ns + batch.output_ns,
                        batch=batch.images,
                    )
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)
        else:
            for waiting in batch.requests:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
        count = len(batch.requests)
        pace_ns = (batch.input_ns + batch.infer_ns + batch.output_ns) / count
        self._pace_ns = (self._pace_ns + pace_ns) / 2 if self._pace_ns else pace_ns
        self._observer.executed(
            Execution(
                images=batch.images,
                requests=count,
                waited_ns=[batch.taken_ns - waiting.arrived_ns for waiting in batch.requests],
                input_ns=batch.input_ns,
                infer_ns=batch.infer_ns,
                output_ns=batch.output_ns,
                closed_by=batch.closed_by,
                failed=error is not None,
            )
        )


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.1f} ms"
