"""Dynamic batching over the fake engine: few calls, each caller its own answer."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from export.engines.base import Images, Logits
from service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from service.inference.batching import Batcher, Execution, Rejection
from service.settings import Batching

MAX_BATCH = 8
_SECONDS = 10.0  # far more than anything here takes


class Doubler:
    """Answers each image with twice its first pixel; waits for its gate, fails on negative pixels."""

    def __init__(self, *, shut: bool = False) -> None:
        self.batches: list[int] = []
        self.ran: list[float] = []
        self.threads: set[str] = set()
        self.entered = threading.Event()
        self.gate = threading.Event()
        if not shut:
            self.gate.set()

    def __call__(self, images: Images) -> Logits:
        self.batches.append(len(images))
        self.ran += images[:, 0, 0, 0].tolist()
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(_SECONDS)
        if images.min() < 0:
            raise ArithmeticError("negative")
        return 2 * images[:, :, 0, 0]

    async def wait_until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, _SECONDS)


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.executions: list[Execution] = []
        self.rejections: list[Rejection] = []

    def executed(self, execution: Execution) -> None:
        self.executions.append(execution)

    def rejected(self, reason: Rejection) -> None:
        self.rejections.append(reason)

    @property
    def closed_by(self) -> list[str]:
        return [execution.closed_by for execution in self.executions]


@asynccontextmanager
async def batching(
    *engines: Callable[[Images], Logits], observer: Recorder | None = None, settings: Batching | None = None
) -> AsyncIterator[Batcher]:
    batcher = Batcher(
        engines,
        name="model@1",
        max_batch=MAX_BATCH,
        settings=settings or Batching(),
        observer=observer or Recorder(),
    )
    try:
        yield batcher
    finally:
        for engine in engines:
            if isinstance(engine, Doubler):
                engine.gate.set()
        await batcher.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the event loop submit everything before another thread sees any of it, however busy the machine is."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def images_of(*values: float) -> Images:
    return np.array(values, np.float32).reshape(-1, 1, 1, 1)


def submitted(
    batcher: Batcher,
    *values: float,
    priority: int = 0,
    timeout_s: float | None = None,
    deadline: float | None = None,
) -> asyncio.Task[Logits]:
    request = batcher.submit(images_of(*values), priority=priority, timeout_s=timeout_s, deadline=deadline)
    return asyncio.create_task(request)


def in_seconds(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


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
    async with batching(engine, settings=Batching(max_queue_size=2)) as batcher:
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
    async with batching(engine, settings=Batching(max_queue_size=1)) as batcher:
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
        assert not any(thread.name.startswith("model@1") for thread in threading.enumerate() if thread.is_alive())


async def test_closing_twice_is_closing_once() -> None:
    engine = Doubler()
    async with batching(engine) as batcher:
        await batcher.submit(images_of(1))
        await asyncio.gather(batcher.close(), batcher.close())
    assert engine.batches == [1]


async def test_a_burst_is_shared_out_among_free_instances() -> None:
    engine = Doubler()

    def slow(images: Images) -> Logits:
        time.sleep(0.05)
        return engine(images)

    async with batching(slow, slow) as batcher:
        # How long the engine takes has to be known before sharing can be worth it.
        await batcher.submit(images_of(0))
        with uninterrupted():
            await asyncio.gather(*(submitted(batcher, value) for value in range(6)))
    assert engine.batches == [1, 3, 3]


async def test_one_instance_takes_all_of_what_takes_no_time() -> None:
    engine = Doubler()
    async with batching(engine, engine) as batcher:
        with uninterrupted():
            await asyncio.gather(*(submitted(batcher, value) for value in range(6)))
    assert engine.batches == [6]


async def test_what_an_engine_raises_never_ends_its_thread() -> None:
    errors: list[BaseException] = [StopIteration(), SystemExit(3), KeyError("x")]

    def failing(images: Images) -> Logits:
        if errors:
            raise errors.pop()
        return images[:, :, 0, 0]

    async with batching(failing) as batcher:
        with pytest.raises(KeyError):
            await batcher.submit(images_of(1))
        # Raised in a coroutine it would end the server.
        with pytest.raises(RuntimeError, match="SystemExit"):
            await batcher.submit(images_of(1))
        with pytest.raises(RuntimeError, match="StopIteration"):
            await batcher.submit(images_of(1))
        assert (await batcher.submit(images_of(7))).item() == 7


async def test_an_engine_that_answers_too_few_images_fails_its_batch() -> None:
    async with batching(lambda images: images[:1, :, 0, 0]) as batcher:
        with pytest.raises(AssertionError, match="answers every image"):
            await batcher.submit(images_of(1, 2))
        assert (await batcher.submit(images_of(3))).item() == 3


# Delays and preferred sizes.

_FOR_EVER_MS = 3_600_000.0


async def test_a_delay_gathers_what_comes_within_it() -> None:
    engine, observer = Doubler(), Recorder()
    settings = Batching(max_queue_delay_ms=_FOR_EVER_MS)
    async with batching(engine, observer=observer, settings=settings) as batcher:
        # The last place is taken: the batch goes long before its delay is over.
        await asyncio.gather(*(submitted(batcher, value) for value in range(MAX_BATCH)))
    assert engine.batches == [MAX_BATCH]
    assert observer.closed_by == ["full"]


async def test_a_delay_ends() -> None:
    engine, observer = Doubler(), Recorder()
    async with batching(engine, observer=observer, settings=Batching(max_queue_delay_ms=50)) as batcher:
        assert (await batcher.submit(images_of(1))).item() == 2
    assert observer.closed_by == ["delay"]
    assert observer.executions[0].waited_ns[0] >= 50_000_000


async def test_a_preferred_size_ends_a_delay() -> None:
    engine, observer = Doubler(), Recorder()
    settings = Batching(max_queue_delay_ms=_FOR_EVER_MS, preferred_batch_sizes=(2, 4))
    async with batching(engine, observer=observer, settings=settings) as batcher:
        await asyncio.gather(submitted(batcher, 1), submitted(batcher, 2))
        await asyncio.gather(submitted(batcher, 1, 2, 3), submitted(batcher, 4))
    assert engine.batches == [2, 4]
    assert observer.closed_by == ["preferred", "preferred"]


async def test_a_request_that_does_not_fit_ends_the_delay_of_the_others() -> None:
    engine, observer = Doubler(), Recorder()
    settings = Batching(max_queue_delay_ms=_FOR_EVER_MS)
    async with batching(engine, observer=observer, settings=settings) as batcher:
        first = submitted(batcher, 1, 2, 3, 4, 5)
        second = submitted(batcher, 1, 2, 3, 4)
        assert len(await first) == 5
        assert not second.done()
        await batcher.close()
        assert len(await second) == 4
    assert observer.closed_by == ["next", "idle"]


async def test_closing_does_not_wait_for_a_delay() -> None:
    engine = Doubler()
    async with batching(engine, settings=Batching(max_queue_delay_ms=_FOR_EVER_MS)) as batcher:
        task = submitted(batcher, 1)
        await asyncio.sleep(0)
    assert task.result().item() == 2


async def test_a_delay_does_not_cost_a_request_its_timeout_or_deadline() -> None:
    engine = Doubler()
    async with batching(engine, settings=Batching(max_queue_delay_ms=_FOR_EVER_MS)) as batcher:
        assert (await batcher.submit(images_of(1), timeout_s=0.3)).item() == 2
        first = submitted(batcher, 2)
        assert (await batcher.submit(images_of(3), deadline=in_seconds(0.3))).item() == 6
        assert (await first).item() == 4


# Priorities.


@hypothesis_settings(deadline=None, max_examples=30)
@given(requests=st.lists(st.tuples(st.integers(0, 5), st.integers(1, MAX_BATCH)), max_size=30))
def test_requests_run_by_priority_then_by_arrival(requests: list[tuple[int, int]]) -> None:
    engine = Doubler(shut=True)

    async def run() -> None:
        async with batching(engine, settings=Batching(priority_levels=3, default_priority=2)) as batcher:
            tasks = [submitted(batcher, -0.0)]
            await engine.wait_until_entered()
            for number, (priority, size) in enumerate(requests, start=1):
                tasks.append(submitted(batcher, *[number] * size, priority=priority))
            await asyncio.sleep(0)
            engine.gate.set()
            await asyncio.gather(*tasks)

    asyncio.run(run())
    # 0 and what is above the levels have the default priority.
    in_order = sorted(enumerate(requests, start=1), key=lambda each: each[1][0] if 1 <= each[1][0] <= 3 else 2)
    assert engine.ran == [0.0] + [number for number, (_, size) in in_order for _ in range(size)]
    assert max(engine.batches) <= MAX_BATCH


async def test_a_full_level_leaves_the_others_open() -> None:
    engine, observer = Doubler(shut=True), Recorder()
    settings = Batching(priority_levels=2, max_queue_size=1)
    async with batching(engine, observer=observer, settings=settings) as batcher:
        tasks = [submitted(batcher, 0)]
        await engine.wait_until_entered()
        tasks += [submitted(batcher, 1), submitted(batcher, 2, priority=1)]
        await asyncio.sleep(0)
        for priority in (0, 1, 2):
            with pytest.raises(ResourceExhausted, match="requests waiting: 1"):
                await batcher.submit(images_of(3), priority=priority)
        engine.gate.set()
        await asyncio.gather(*tasks)
    assert engine.ran == [0, 2, 1]
    assert observer.rejections == ["queue_full"] * 3


# Refusals.


async def test_a_full_queue_is_unavailable_where_the_settings_say_so() -> None:
    engine = Doubler(shut=True)
    async with batching(engine, settings=Batching(max_queue_size=1, full_queue="UNAVAILABLE")) as batcher:
        tasks = [submitted(batcher, 0)]
        await engine.wait_until_entered()
        tasks.append(submitted(batcher, 1))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the queue is full") as refused:
            await batcher.submit(images_of(2))
        # Nothing has been measured, and still there is a time.
        assert refused.value.retry_after_s
        engine.gate.set()
        await asyncio.gather(*tasks)


async def test_when_to_try_again_follows_from_the_time_that_requests_take() -> None:
    entered, gate = threading.Event(), threading.Event()
    gate.set()

    def slow(images: Images) -> Logits:
        entered.set()
        assert gate.wait(_SECONDS)
        time.sleep(0.1)
        return images[:, :, 0, 0]

    async with batching(slow, settings=Batching(max_queue_size=4)) as batcher:
        await batcher.submit(images_of(0))
        gate.clear()
        entered.clear()
        tasks = [submitted(batcher, 0)]
        assert await asyncio.to_thread(entered.wait, _SECONDS)
        tasks += [submitted(batcher, value) for value in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted) as refused:
            await batcher.submit(images_of(5))
        # Four wait, each has taken 0.1 s so far: half of them are through after 0.2 s, or more on a busy machine.
        assert refused.value.retry_after_s is not None
        assert 0.19 < refused.value.retry_after_s < 2
        gate.set()
        await asyncio.gather(*tasks)


async def test_a_queue_timeout_fires_at_its_time_though_no_instance_is_free() -> None:
    engine, observer = Doubler(shut=True), Recorder()
    async with batching(engine, observer=observer, settings=Batching(max_queue_size=2)) as batcher:
        running = submitted(batcher, 0)
        await engine.wait_until_entered()
        patient = submitted(batcher, 1)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"model@1: waited .* ms in the queue, all that its timeout allows"):
            await batcher.submit(images_of(2), timeout_s=0.05)
        assert 0.05 <= time.monotonic() - began < 5
        # Its place is free again, and it never runs.
        successor = submitted(batcher, 3)
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(running, patient, successor)
    assert engine.ran == [0, 1, 3]
    assert observer.rejections == ["queue_timeout"]


async def test_timeouts_fire_in_their_own_order() -> None:
    engine = Doubler(shut=True)
    async with batching(engine) as batcher:
        running = submitted(batcher, 0)
        await engine.wait_until_entered()
        waiting = {seconds: submitted(batcher, 1, timeout_s=seconds) for seconds in (0.15, 0.05, 0.1)}
        fired: list[float] = []

        def note(seconds: float, _: asyncio.Task[Logits]) -> None:
            fired.append(seconds)

        for seconds, task in waiting.items():
            task.add_done_callback(partial(note, seconds))
        await asyncio.wait(waiting.values(), timeout=_SECONDS)
        assert fired == [0.05, 0.1, 0.15]
        assert all(isinstance(task.exception(), DeadlineExceeded) for task in waiting.values())
        engine.gate.set()
        await running
    assert engine.ran == [0]


@pytest.mark.parametrize(("override", "fires"), [(True, {0.05}), (False, {0.05, 3600.0})])
async def test_requests_set_their_own_timeouts_only_where_they_may(*, override: bool, fires: set[float]) -> None:
    engine = Doubler(shut=True)
    settings = Batching(default_timeout_ms=100, allow_timeout_override=override)
    async with batching(engine, settings=settings) as batcher:
        running = submitted(batcher, 0, timeout_s=3600)
        await engine.wait_until_entered()
        tasks = {seconds: submitted(batcher, 1, timeout_s=seconds) for seconds in (0.05, 3600.0)}
        usual = submitted(batcher, 1)
        with pytest.raises(DeadlineExceeded):
            await usual
        engine.gate.set()
        await asyncio.wait([running, *tasks.values()], timeout=_SECONDS)
        assert {seconds for seconds, task in tasks.items() if task.exception() is not None} == fires


async def test_a_deadline_that_passes_in_the_queue_is_told_at_its_time_and_the_request_never_runs() -> None:
    engine, observer = Doubler(shut=True), Recorder()
    async with batching(engine, observer=observer) as batcher:
        running = submitted(batcher, 0)
        await engine.wait_until_entered()
        with pytest.raises(DeadlineExceeded, match="all that its deadline allows"):
            await batcher.submit(images_of(1), deadline=in_seconds(0.05))
        engine.gate.set()
        await running
    assert engine.ran == [0]
    assert observer.rejections == ["deadline"]


async def test_a_deadline_in_the_past_is_refused_at_once() -> None:
    engine = Doubler()
    async with batching(engine) as batcher:
        with pytest.raises(DeadlineExceeded, match=r"the deadline is in -.* ms"):
            await batcher.submit(images_of(1), deadline=in_seconds(-1))
    assert engine.batches == []


def sleeper(images: Images) -> Logits:
    """Take 50 ms a call."""
    time.sleep(0.05)
    return images[:, :, 0, 0]


async def test_what_cannot_make_its_deadline_is_refused_at_once_once_the_engines_time_is_known() -> None:
    engine, observer = Doubler(), Recorder()
    async with batching(lambda images: sleeper(engine(images)[:, :, None, None]), observer=observer) as batcher:
        # Nothing is known of the engine: the request is taken, however little time it has.
        await batcher.submit(images_of(1), deadline=in_seconds(10))
        with pytest.raises(DeadlineExceeded, match=r"model@1: an answer takes \d+\.\d ms now") as refused:
            await batcher.submit(images_of(2), deadline=in_seconds(0.03))
        assert "give it more time" in str(refused.value)
        await batcher.submit(images_of(3), deadline=in_seconds(10))
    assert engine.ran == [1, 3]
    assert observer.rejections == ["deadline"]


async def test_the_first_request_is_never_refused_for_lack_of_knowledge() -> None:
    engine = Doubler(shut=True)
    async with batching(engine) as batcher:
        deadline = in_seconds(0.2)
        task = submitted(batcher, 1, deadline=deadline)
        await engine.wait_until_entered()
        asyncio.get_running_loop().call_at(deadline + 0.1, engine.gate.set)
        # It is late, and answered: the caller knows best what a late answer is worth.
        assert (await task).item() == 2


async def test_what_waits_ahead_counts_and_a_higher_priority_does_not_wait_for_it() -> None:
    engine = Doubler()

    def slow(images: Images) -> Logits:
        doubled = engine(images)
        time.sleep(0.05)
        return doubled

    async with batching(slow, settings=Batching(priority_levels=2)) as batcher:
        await batcher.submit(images_of(*range(MAX_BATCH)))
        engine.gate.clear()
        engine.entered.clear()
        tasks = [submitted(batcher, *range(MAX_BATCH))]
        await engine.wait_until_entered()
        tasks += [submitted(batcher, *range(MAX_BATCH)) for _ in range(14)]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="an answer takes"):
            await batcher.submit(images_of(1), deadline=in_seconds(0.5))
        first = submitted(batcher, 99, priority=1, deadline=in_seconds(0.5))
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await first).item() == 198
        await asyncio.gather(*tasks)


async def test_cancelled_and_closed_are_told_to_the_observer() -> None:
    engine, observer = Doubler(shut=True), Recorder()
    async with batching(engine, observer=observer) as batcher:
        running = submitted(batcher, 0)
        await engine.wait_until_entered()
        waiting = submitted(batcher, 1)
        await asyncio.sleep(0)
        waiting.cancel()
        running.cancel()  # this one runs already
        await asyncio.wait([waiting, running], timeout=_SECONDS)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await batcher.submit(images_of(2))
        engine.gate.set()
        await closing
    assert observer.rejections == ["cancelled", "closed"]
    assert engine.ran == [0]


async def test_each_call_of_the_engine_is_told_with_its_times() -> None:
    engine, observer = Doubler(shut=True), Recorder()
    async with batching(engine, observer=observer) as batcher:
        tasks = [submitted(batcher, 0)]
        await engine.wait_until_entered()
        tasks += [submitted(batcher, *range(5)), submitted(batcher, *range(3)), submitted(batcher, -1)]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, engine.gate.set)
        await asyncio.gather(*tasks, return_exceptions=True)
    told = observer.executions
    assert [(each.requests, each.images, each.closed_by, each.failed) for each in told] == [
        (1, 1, "idle", False),
        (2, 8, "full", False),
        (1, 1, "idle", True),
    ]
    assert [len(each.waited_ns) for each in told] == [1, 2, 1]
    # While the gate was shut the first ran and the others waited.
    assert told[0].infer_ns >= 40_000_000
    assert all(waited >= 40_000_000 for waited in [*told[1].waited_ns, *told[2].waited_ns])
    assert all(each.input_ns >= 0 and each.output_ns >= 0 for each in told)


@pytest.mark.parametrize("delay_ms", [0.0, 2.0])
@pytest.mark.parametrize("instances", [1, 3])
async def test_every_request_ends_whatever_becomes_of_it(*, delay_ms: float, instances: int) -> None:
    generator = np.random.default_rng(0)
    engines, observer = [Doubler() for _ in range(instances)], Recorder()
    settings = Batching(priority_levels=3, max_queue_size=50, max_queue_delay_ms=delay_ms, preferred_batch_sizes=(3, 5))
    outcomes: list[str] = []

    async def ask(number: int, batcher: Batcher) -> None:
        size, priority, fate = (int(generator.integers(limit)) for limit in (MAX_BATCH, 4, 4))
        task = submitted(
            batcher,
            *[number] * (size + 1),
            priority=priority,
            timeout_s=0.001 if fate == 1 else None,
            deadline=in_seconds(0.001) if fate == 2 else None,
        )
        if fate == 3:
            for _ in range(size + 1):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task], timeout=_SECONDS)
        if task.cancelled():
            outcomes.append("cancelled")
        elif (error := task.exception()) is not None:
            assert isinstance(error, DeadlineExceeded | ResourceExhausted)
            outcomes.append(type(error).__name__)
        else:
            np.testing.assert_array_equal(task.result()[:, 0], [2 * number] * (size + 1))
            outcomes.append("answered")

    async with batching(*engines, observer=observer, settings=settings) as batcher:
        for burst in range(30):
            await asyncio.gather(*(ask(number, batcher) for number in range(burst * 40, burst * 40 + 40)))
    assert len(outcomes) == 1200
    refused = {"queue_full": "ResourceExhausted", "cancelled": "cancelled"}
    told = [refused.get(reason, "DeadlineExceeded") for reason in observer.rejections]
    run = sum(execution.requests for execution in observer.executions)
    assert run + len(told) == 1200
    assert told.count("DeadlineExceeded") == outcomes.count("DeadlineExceeded")
    assert told.count("ResourceExhausted") == outcomes.count("ResourceExhausted")
    # Some were cancelled while they ran, or as soon as they had been answered.
    assert told.count("cancelled") <= outcomes.count("cancelled")
    assert all(execution.images <= MAX_BATCH for execution in observer.executions)
