"""Dynamic batching over the fake engine: few calls, each caller its own answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from export.engines.base import Images, Logits
from service.errors import ResourceExhausted, Unavailable
from service.inference.batching import Batcher

MAX_BATCH = 8
_SECONDS = 10.0  # far more than anything here takes


class Doubler:
    """Answers each image with twice its first pixel; waits for its gate, fails on negative pixels."""

    def __init__(self, *, shut: bool = False) -> None:
        self.batches: list[int] = []
        self.threads: set[str] = set()
        self.entered = threading.Event()
        self.gate = threading.Event()
        if not shut:
            self.gate.set()

    def __call__(self, images: Images) -> Logits:
        self.batches.append(len(images))
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(_SECONDS)
        if images.min() < 0:
            raise ArithmeticError("negative")
        return 2 * images[:, :, 0, 0]

    async def wait_until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, _SECONDS)


@asynccontextmanager
async def batching(
    *engines: Callable[[Images], Logits], max_queue: int = 1024, max_delay_s: float = 0.0
) -> AsyncIterator[Batcher]:
    batcher = Batcher(engines, name="model@1", max_batch=MAX_BATCH, max_queue=max_queue, max_delay_s=max_delay_s)
    try:
        yield batcher
    finally:
        await batcher.close()


def images_of(*values: float) -> Images:
    return np.array(values, np.float32).reshape(-1, 1, 1, 1)


def submitted(batcher: Batcher, *values: float) -> asyncio.Task[Logits]:
    return asyncio.create_task(batcher.submit(images_of(*values)))


async def test_what_waits_while_the_engine_works_is_one_batch() -> None:
    engine = Doubler(shut=True)
    async with batching(engine) as batcher:
        tasks = [submitted(batcher, 0)]
        await engine.wait_until_entered()
        tasks += [submitted(batcher, value) for value in range(1, 8)]
        await asyncio.sleep(0)
        engine.gate.set()
        answers = await asyncio.gather(*tasks)
    assert engine.batches == [1, 7]
    assert [answer.item() for answer in answers] == [0, 2, 4, 6, 8, 10, 12, 14]


async def test_a_batch_never_exceeds_its_size_nor_parts_a_request() -> None:
    engine = Doubler(shut=True)
    async with batching(engine) as batcher:
        tasks = [submitted(batcher, 0)]
        await engine.wait_until_entered()
        tasks += [submitted(batcher, *range(size)) for size in (5, 3, 4, 5, 8, 1)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(*tasks)
    assert engine.batches == [1, 8, 4, 5, 8, 1]


@hypothesis_settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, MAX_BATCH), min_size=1, max_size=40), instances=st.integers(1, 3))
def test_everybody_gets_their_own_answer(sizes: list[int], instances: int) -> None:
    starts = np.cumsum([0, *sizes[:-1]])
    requests = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    engines = [Doubler() for _ in range(instances)]

    async def answers() -> list[Logits]:
        async with batching(*engines) as batcher:
            return await asyncio.gather(*(batcher.submit(images_of(*values)) for values in requests))

    for values, answer in zip(requests, asyncio.run(answers()), strict=True):
        np.testing.assert_array_equal(answer[:, 0], 2 * values)
    batches = [size for engine in engines for size in engine.batches]
    assert sum(batches) == sum(sizes)
    assert max(batches) <= MAX_BATCH


async def test_a_full_queue_refuses_at_once_and_keeps_the_others() -> None:
    engine = Doubler(shut=True)
    async with batching(engine, max_queue=2) as batcher:
        running = submitted(batcher, 0)
        await engine.wait_until_entered()
        waiting = [submitted(batcher, 1), submitted(batcher, 2)]
        await asyncio.sleep(0)
        with pytest.raises(
            ResourceExhausted, match=r"model@1: the queue is full, requests waiting: 2; try again later"
        ):
            await batcher.submit(images_of(3))
        engine.gate.set()
        assert [answer.item() for answer in await asyncio.gather(running, *waiting)] == [0, 2, 4]


async def test_a_cancelled_request_never_runs_and_frees_its_place() -> None:
    engine = Doubler(shut=True)
    async with batching(engine, max_queue=1) as batcher:
        running = submitted(batcher, 0)
        await engine.wait_until_entered()
        cancelled = submitted(batcher, 1)
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        successor = submitted(batcher, 2)
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await successor).item() == 4
        await running
    assert engine.batches == [1, 1]


async def test_cancelling_what_runs_leaves_its_neighbours_alone() -> None:
    engine = Doubler(shut=True)
    async with batching(engine) as batcher:
        cancelled = submitted(batcher, 0)
        await engine.wait_until_entered()
        cancelled.cancel()
        other = submitted(batcher, 1)
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await other).item() == 2
    assert cancelled.cancelled()


async def test_an_engines_error_reaches_the_callers_of_that_batch_only() -> None:
    engine = Doubler(shut=True)
    async with batching(engine) as batcher:
        first = submitted(batcher, 0)
        await engine.wait_until_entered()
        failing = [submitted(batcher, -1, *range(3)), submitted(batcher, *range(4))]
        later = submitted(batcher, 5)
        await asyncio.sleep(0)
        engine.gate.set()
        results = await asyncio.gather(first, *failing, later, return_exceptions=True)
    assert engine.batches == [1, 8, 1]
    assert [type(result) for result in results] == [np.ndarray, ArithmeticError, ArithmeticError, np.ndarray]


async def test_instances_run_at_once_on_threads_of_their_own() -> None:
    engines = [Doubler(shut=True), Doubler(shut=True)]
    async with batching(*engines) as batcher:
        tasks = [submitted(batcher, *range(MAX_BATCH)), submitted(batcher, *range(MAX_BATCH))]
        for engine in engines:
            await engine.wait_until_entered()
        for engine in engines:
            engine.gate.set()
        await asyncio.gather(*tasks)
    threads = engines[0].threads | engines[1].threads
    assert len(threads) == 2
    assert all(name.startswith("model@1") for name in threads)


async def test_closing_answers_what_was_taken_and_takes_no_more() -> None:
    engine = Doubler(shut=True)
    async with batching(engine) as batcher:
        tasks = [submitted(batcher, 0)]
        await engine.wait_until_entered()
        tasks.append(submitted(batcher, 1))
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="shutting down"):
            await batcher.submit(images_of(2))
        engine.gate.set()
        await closing
        assert [task.result().item() for task in tasks] == [0, 2]


async def test_a_delay_gathers_what_comes_within_it() -> None:
    engine = Doubler()
    async with batching(engine, max_delay_s=_SECONDS) as batcher:
        tasks = [submitted(batcher, value) for value in range(MAX_BATCH - 1)]
        await asyncio.sleep(0.05)
        assert engine.batches == []
        # The last place is taken: the batch goes long before its delay is over.
        tasks.append(submitted(batcher, 9))
        await asyncio.gather(*tasks)
    assert engine.batches == [MAX_BATCH]


async def test_a_delay_ends() -> None:
    engine = Doubler()
    async with batching(engine, max_delay_s=0.05) as batcher:
        assert (await batcher.submit(images_of(1))).item() == 2
    assert engine.batches == [1]


async def test_closing_does_not_wait_for_a_delay() -> None:
    engine = Doubler()
    async with batching(engine, max_delay_s=3600) as batcher:
        task = submitted(batcher, 1)
        await asyncio.sleep(0.01)
    assert task.result().item() == 2
