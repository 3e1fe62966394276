"""Dynamic batching: many callers, few calls of the engine.

    submit --bounded queue--> worker: as many as fit --one batch, own thread--> engine --split--> each caller

One worker an instance. A worker takes whatever waits when its engine is free (greedy); it waits for more only if
it has been given a delay.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.engines.base import Inputs, Logits
from service.errors import ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

Run = Callable[[Inputs], Logits]


@dataclass(frozen=True, eq=False)
class _Waiting:
    images: Inputs
    answer: asyncio.Future[Logits]
    arrived: float  # the event loop's time, seconds


class Batcher:
    """Shares the instances of one engine among callers; must be made where an event loop runs."""

    def __init__(
        self, instances: Sequence[Run], *, name: str, max_batch: int, max_queue: int, max_delay_s: float = 0.0
    ) -> None:
        self._name = name
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_delay_s = max_delay_s
        self._queue: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._threads = ThreadPoolExecutor(len(instances), thread_name_prefix=name)
        self._workers = [asyncio.create_task(self._work(run)) for run in instances]

    async def submit(self, images: Inputs) -> Logits:
        """Return the answers to 1 to `max_batch` images, as the engine takes them.

        A caller that is cancelled while it waits costs no call.

        Raises:
            ResourceExhausted: the queue is full.
            Unavailable: the batcher is closed.
            Exception: what the engine raised for the batch that these images were in.
        """
        assert 1 <= len(images) <= self._max_batch, "the servicer checks sizes"
        if self._closed:
            raise Unavailable(f"{self._name}: the server is shutting down; try again, or elsewhere")
        if len(self._queue) >= self._max_queue:
            raise ResourceExhausted(
                f"{self._name}: the queue is full, requests waiting: {len(self._queue)}; "
                "try again later, or raise batching.max_queue_size"
            )
        loop = asyncio.get_running_loop()
        waiting = _Waiting(images, loop.create_future(), loop.time())
        self._queue.append(waiting)
        self._changed.set()
        try:
            return await waiting.answer
        finally:
            self._forget(waiting)

    async def close(self) -> None:
        """Take no more; return when everything that was taken has been answered."""
        self._closed = True
        self._changed.set()
        await asyncio.gather(*self._workers)
        self._threads.shutdown()

    def _forget(self, waiting: _Waiting) -> None:
        """Give a cancelled caller's place in the queue to the next at once."""
        if waiting.answer.cancelled() and waiting in self._queue:
            self._queue.remove(waiting)

    async def _work(self, run: Run) -> None:
        loop = asyncio.get_running_loop()
        while await self._something_waits():
            await self._fill()
            if not (batch := self._take()):
                continue
            try:
                answers = await loop.run_in_executor(self._threads, _run, run, [each.images for each in batch])
            except Exception as error:  # noqa: BLE001 - it belongs to these callers; the others go on
                _fail(batch, error)
            else:
                _answer(batch, answers)

    async def _something_waits(self) -> bool:
        """Wait for a request; False when there will be none."""
        while not self._queue:
            if self._closed:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    async def _fill(self) -> None:
        """Wait until a batch is full or the oldest request has waited for `max_delay_s`."""
        if not self._max_delay_s:
            return
        loop = asyncio.get_running_loop()
        while not self._closed and 0 < sum(len(each.images) for each in self._queue) < self._max_batch:
            left = self._queue[0].arrived + self._max_delay_s - loop.time()
            if left <= 0:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """Take the oldest requests that fit into one batch together."""
        batch: list[_Waiting] = []
        room = self._max_batch
        while self._queue and len(self._queue[0].images) <= room:
            waiting = self._queue.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
                room -= len(waiting.images)
        return batch


def _run(run: Run, parts: list[Inputs]) -> list[Logits]:
    """Run the parts as one batch; in a thread, so that copying does not hold the event loop."""
    logits = run(parts[0] if len(parts) == 1 else np.concatenate(parts))
    ends = np.cumsum([len(part) for part in parts])
    assert len(logits) == ends[-1], "an engine answers every image"
    return np.split(logits, ends[:-1])


def _answer(batch: list[_Waiting], answers: list[Logits]) -> None:
    for waiting, answer in zip(batch, answers, strict=True):
        if not waiting.answer.done():
            waiting.answer.set_result(answer)


def _fail(batch: list[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
