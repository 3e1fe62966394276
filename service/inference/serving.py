"""One version that answers.

images --response cache--> answer
       --not there--> batcher --> engines --> logits --> cache, caller
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from time import perf_counter_ns
from typing import TYPE_CHECKING

from service.inference.batching import Batcher
from service.inference.response_cache import ResponseCache
from service.inference.retirement import Retirement
from service.inference.warm_up import largest_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.engines.base import Engine, Inputs, Logits
    from export.manifest import Manifest, TensorSpec
    from service.inference.statistics import Statistics
    from service.settings import Settings


class _Backend:
    """A batcher and the engines behind it: what outlives the version while the last requests are answered."""

    def __init__(self, batcher: Batcher, engines: Sequence[Engine]) -> None:
        self._batcher = batcher
        self._engines = engines

    async def drain(self) -> None:
        """Refuse more, and answer what waits."""
        await self._batcher.close()

    async def close(self) -> None:
        """Drain, then free the engines."""
        await self.drain()
        engines, self._engines = self._engines, ()
        await asyncio.to_thread(close_all, engines)


class ServedVersion:
    """One version that answers; it does so as long as somebody holds it, though it may have been taken out.

    Attributes:
        manifest: what it is.
        input: the tensor that it takes.
        output: the tensor that it answers with.
        max_batch: images that one request may have.
        settings: those of its model.
        statistics: what it has done.
    """

    __slots__ = (
        "__weakref__",
        "_backend",
        "_batcher",
        "_cache",
        "input",
        "manifest",
        "max_batch",
        "output",
        "settings",
        "statistics",
    )

    def __init__(self, engines: Sequence[Engine], *, settings: Settings, statistics: Statistics) -> None:
        manifest = engines[0].manifest
        self.manifest: Manifest = manifest
        self.input: TensorSpec = manifest.inputs[0]
        self.output: TensorSpec = manifest.outputs[0]
        self.max_batch = largest_batch(manifest, settings.batching.max_batch_size)
        self.settings = settings
        self.statistics = statistics
        self._cache = ResponseCache(settings.cache) if settings.cache.enabled else None
        self._batcher = Batcher(
            engines, name=str(self), max_batch=self.max_batch, settings=settings.batching, observer=statistics
        )
        statistics.watch(self._batcher)
        self._backend = _Backend(self._batcher, engines)

    def __str__(self) -> str:
        return f"{self.manifest.model}@{self.manifest.version}"

    async def infer(
        self, inputs: Inputs, *, priority: int = 0, timeout_s: float | None = None, deadline: float | None = None
    ) -> Logits:
        """Return the answers to 1 to `max_batch` images, as the engine takes them; not to be written to.

        Args:
            inputs: as the manifest says.
            priority: 1 is first; 0 is the default one.
            timeout_s: seconds that the request may wait in the queue.
            deadline: when the caller no longer waits, in the event loop's time.

        Raises:
            ServiceError: as `Batcher.submit`.
        """
        if self._cache is None:
            return await self._batcher.submit(inputs, priority=priority, timeout_s=timeout_s, deadline=deadline)
        began = perf_counter_ns()
        key = self._cache.key(inputs)
        known = self._cache.get(key)
        looked_up = perf_counter_ns()
        if known is not None:
            self.statistics.cache_hit(looked_up - began)
            return known
        answers = await self._batcher.submit(inputs, priority=priority, timeout_s=timeout_s, deadline=deadline)
        put = perf_counter_ns()
        self._cache.put(key, answers)
        self.statistics.cache_miss(looked_up - began + perf_counter_ns() - put)
        return answers

    def retire(self) -> Retirement:
        """Return what ends it once nobody holds it any more."""
        return Retirement(self, self._backend)

    async def drain(self) -> None:
        """Refuse more, and answer what waits."""
        await self._backend.drain()

    async def close(self) -> None:
        """Drain, then free the engines, whoever holds it."""
        await self._backend.close()


def close_all(engines: Sequence[Engine]) -> None:
    """Free engines, each whatever becomes of the others."""
    with ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.close)
