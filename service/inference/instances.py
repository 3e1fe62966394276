"""The instances of one engine, each on a thread of its own, and the queue that they share.

enter --queue--> an instance that is free takes what waits --Batch: join, run, split--> answered, in the event loop
        └--> leave, expire: without having run   └--> came too late ------------------> late, in the event loop

An instance takes its next batch itself, without asking the event loop, so that the engine works while the answers to
the last batch are sent.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic_ns
from typing import TYPE_CHECKING

import numpy as np

from export.engines.base import Inputs, Logits
from service.inference.durations import Durations
from service.inference.queues import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from service.inference.queues import ClosedBy, Queue, Waiting

Run = Callable[[Inputs], Logits]

SECOND_NS = 1_000_000_000

# Nanoseconds without a finished batch after which estimates of a free engine are not believed: or one slow batch, if
# every request after it were refused for it, would never be followed by another measurement.
_DOUBT_NS = SECOND_NS

# Nanoseconds that a batch is expected to take from which on free instances share it; below, waking another thread and
# calling another engine cost more than they win.
_WORTH_SHARING_NS = 500_000


class Batch:
    """Requests that one call of an engine answers."""

    __slots__ = ("answers", "closed_by", "error", "images", "infer_ns", "input_ns", "output_ns", "requests", "taken_ns")

    def __init__(self, requests: list[Waiting], *, closed_by: ClosedBy, taken_ns: int) -> None:
        self.requests = requests
        self.closed_by = closed_by
        self.taken_ns = taken_ns
        self.images = sum([waiting.size for waiting in requests])
        self.answers: Sequence[Logits] = ()
        self.error: Exception | None = None
        self.input_ns = self.infer_ns = self.output_ns = 0

    def run(self, run: Run) -> None:
        """Run the requests as one batch: sets `answers`, in the order of the requests, or `error`; and the times."""
        try:
            self._run(run)
        except BaseException as error:  # noqa: BLE001 - it belongs to these callers; the thread and the others go on
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                self.error = error
            else:  # raised in a coroutine, these end it, or the event loop
                self.error = RuntimeError(f"the engine raised {error!r}")

    def _run(self, run: Run) -> None:
        requests = self.requests
        start = monotonic_ns()
        inputs = requests[0].images if len(requests) == 1 else np.concatenate([each.images for each in requests])
        joined = monotonic_ns()
        self.input_ns = joined - start
        try:
            logits = run(inputs)
        finally:
            ran = monotonic_ns()
            self.infer_ns = ran - joined
        assert len(logits) == self.images, "an engine answers every image"
        self.answers = [logits] if len(requests) == 1 else _split(logits, requests)
        self.output_ns = monotonic_ns() - ran


def _split(logits: Logits, requests: list[Waiting]) -> list[Logits]:
    answers, start = [], 0
    for waiting in requests:
        end = start + waiting.size
        answers.append(logits[start:end])
        start = end
    return answers


class _Instance:
    """One thread's own: what it runs, and where it sleeps."""

    __slots__ = ("busy_until_ns", "ended", "enough", "run", "running", "tokens", "until_ns")

    def __init__(self, run: Run, *, ended: asyncio.Future[None]) -> None:
        self.run = run
        self.ended = ended
        # While a batch runs: when it is expected to be over.
        self.running = False
        self.busy_until_ns = 0
        # While a batch fills: the images that are enough, and until when it may wait for them.
        self.enough = 0
        self.until_ns = NEVER
        self.tokens: SimpleQueue[None] = SimpleQueue()

    def wake(self) -> None:
        self.tokens.put(None)

    def sleep(self) -> None:
        timeout_s = None if self.until_ns == NEVER else max(0, self.until_ns - monotonic_ns()) / SECOND_NS
        with suppress(Empty):
            self.tokens.get(timeout=timeout_s)


class Instances:
    """Runs what is in a queue; must be made where an event loop runs.

    Args:
        runs: what runs a batch, one for each thread.
        name: what threads are named for.
        max_batch: images that a batch may have.
        queue: what waits; nobody else's from now on.
        delay_ns: how long a batch waits to be filled.
        preferred: sizes at which it does not wait for more.
        answered: called in the event loop with each batch that has been run.
        late: called in the event loop with requests that were not run because they came too late.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        name: str,
        max_batch: int,
        queue: Queue,
        delay_ns: int,
        preferred: Set[int],
        answered: Callable[[Batch], None],
        late: Callable[[list[Waiting]], None],
    ) -> None:
        self._max_batch = max_batch
        self._delay_ns = delay_ns
        self._preferred = preferred
        self._answered = answered
        self._late = late
        self._loop = asyncio.get_running_loop()
        self._durations = Durations(max_batch)
        # What follows is shared by all threads, under the lock.
        self._lock = threading.Lock()
        self._queue = queue
        self._closed = False
        self._finished_ns = 0
        self._asleep: list[_Instance] = []
        self._filling: _Instance | None = None
        self._instances = [_Instance(run, ended=self._loop.create_future()) for run in runs]
        self._threads: list[threading.Thread] = []
        for number, instance in enumerate(self._instances):
            # Daemons: instances that nobody closed must not keep a process from ending.
            thread = threading.Thread(target=self._work, args=[instance], name=f"{name}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def __len__(self) -> int:
        return len(self._instances)

    def waiting(self, level: int) -> int:
        """Return how many requests wait in a level of the queue."""
        return self._queue.waiting(level)

    @property
    def total(self) -> int:
        """Requests that wait to be taken; may be read by any thread."""
        return self._queue.total

    def enter(self, waiting: Waiting) -> bool:
        """Put a request into the queue; False if there is no place."""
        with self._lock:
            if not self._queue.push(waiting):
                return False
            instance = self._needed(waiting)
        if instance is not None:
            instance.wake()
        return True

    def leave(self, waiting: Waiting) -> None:
        """Take a request out of the queue, if it is there still."""
        with self._lock:
            self._queue.remove(waiting)

    def expire(self) -> tuple[list[Waiting], int]:
        """Take what came too late out of the queue; return it, and when the next request will be too late."""
        with self._lock:
            return self._queue.expire(monotonic_ns()), self._queue.next_expiry_ns()

    def expected_ns(self, waiting: Waiting) -> tuple[int, int]:
        """Return how long a request would wait, and then run, if it entered now and nothing overtook it.

        Both are 0 as long as nothing is known.
        """
        now_ns = waiting.arrived_ns
        with self._lock:
            ahead = self._queue.ahead(waiting.level)
            busy_ns = min([each.busy_until_ns for each in self._instances])
            if not busy_ns and now_ns - self._finished_ns > _DOUBT_NS:
                return 0, 0
        before, place = divmod(ahead + waiting.size - 1, self._max_batch)
        rounds = before // len(self._instances)
        wait_ns = max(0, busy_ns - now_ns) + (rounds and rounds * self._durations.of(self._max_batch))
        return wait_ns, self._durations.certain(max(place + 1, waiting.size), since_ns=now_ns - _DOUBT_NS)

    async def close(self) -> None:
        """Return when everything in the queue has been run, and the threads have ended."""
        with self._lock:
            self._closed = True
        for instance in self._instances:
            instance.wake()
        await asyncio.gather(*(each.ended for each in self._instances))
        for thread in self._threads:
            # It has nothing left to do but to end.
            thread.join()

    def _needed(self, waiting: Waiting) -> _Instance | None:
        """Return the instance that is to wake for a request that has just entered."""
        filling = self._filling
        if filling is None:
            return self._asleep.pop() if self._asleep else None
        if self._queue.images < filling.enough and waiting.fill_until_ns(self._delay_ns) >= filling.until_ns:
            return None
        self._filling = None
        return filling

    # In the threads.

    def _work(self, instance: _Instance) -> None:
        while self._serve(instance):
            pass
        self._loop.call_soon_threadsafe(instance.ended.set_result, None)

    def _serve(self, instance: _Instance) -> bool:
        """Run one batch when there is one; False if there will be none."""
        batch = self._next(instance)
        if batch is None:
            return False
        batch.run(instance.run)
        if batch.error is None:
            self._durations.measured(batch.images, batch.input_ns + batch.infer_ns + batch.output_ns)
        self._loop.call_soon_threadsafe(self._answered, batch)
        return True

    def _next(self, instance: _Instance) -> Batch | None:
        """Sleep until there is a batch; None if there will be none."""
        if instance.running:
            with self._lock:
                instance.running = False
                instance.busy_until_ns = 0
                self._finished_ns = monotonic_ns()
        while True:
            with self._lock:
                self._rouse(instance)
                batch = self._take(instance)
                if batch is None and self._closed and not self._queue.images:
                    return None
                other = self._next_awake() if batch else None
            if other is not None:
                other.wake()
            if batch is not None:
                return batch
            instance.sleep()

    def _next_awake(self) -> _Instance | None:
        """Return who is to look at what a batch has left in the queue: who waited for it to fill, or anybody."""
        filling, self._filling = self._filling, None
        if filling is not None:
            return filling
        return self._asleep.pop() if self._queue.images and self._asleep else None

    def _rouse(self, instance: _Instance) -> None:
        """Strike an instance off who sleeps: it may have woken by itself."""
        if instance in self._asleep:
            self._asleep.remove(instance)
        if self._filling is instance:
            self._filling = None

    def _take(self, instance: _Instance) -> Batch | None:
        """Take a batch, or register the instance as asleep."""
        while self._queue.images:
            now_ns = monotonic_ns()
            enough, why = self._enough(instance, now_ns)
            if not enough:
                break
            requests, late, closed_by = self._queue.take(self._max_batch, enough=enough, now_ns=now_ns)
            if late:
                self._loop.call_soon_threadsafe(self._late, late)
            if requests:
                batch = Batch(requests, closed_by=why or closed_by, taken_ns=now_ns)
                instance.running = True
                instance.busy_until_ns = now_ns + self._durations.of(batch.images)
                return batch
        self._fall_asleep(instance)
        return None

    def _enough(self, instance: _Instance, now_ns: int) -> tuple[int, ClosedBy | None]:
        """Return how many images to take, and why if that is known already; 0 if it is better to wait for more."""
        if not self._delay_ns or self._closed:
            return self._share(), None
        size, why = self._queue.fitting(self._max_batch, preferred=self._preferred)
        if why is not None:
            return size, why
        instance.until_ns = self._queue.fill_until_ns(self._delay_ns)
        return (size, "delay") if instance.until_ns <= now_ns else (0, None)

    def _share(self) -> int:
        """Return how many images are one free instance's share: together they are done sooner than one alone."""
        if self._durations.of(min(self._queue.images, self._max_batch)) < _WORTH_SHARING_NS:
            return self._max_batch
        free = sum([not each.running for each in self._instances])
        return min(-(-self._queue.images // free), self._max_batch)

    def _fall_asleep(self, instance: _Instance) -> None:
        if self._queue.images and self._filling is None:
            self._filling = instance
            larger = (size for size in self._preferred if self._queue.images < size < self._max_batch)
            instance.enough = min(larger, default=self._max_batch)
        else:
            self._asleep.append(instance)
            instance.until_ns = NEVER
