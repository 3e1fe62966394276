"""What a version has done: counted once, by Triton's rules, and never forgotten."""

from __future__ import annotations

import asyncio
import gc
import threading
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, ServiceError, Unavailable
from service.inference.batching import Execution
from service.inference.queues import ClosedBy
from service.inference.statistics import DURATIONS_NS, Failure, Histogram, Ledger, Statistics

MILLISECOND_NS = 1_000_000


def execution(
    *waited_ns: int, images: int | None = None, closed_by: ClosedBy = "idle", failed: bool = False
) -> Execution:
    return Execution(
        images=images or len(waited_ns),
        requests=len(waited_ns),
        waited_ns=waited_ns,
        input_ns=10,
        infer_ns=2 * MILLISECOND_NS,
        output_ns=30,
        closed_by=closed_by,
        failed=failed,
    )


def test_requests_images_and_calls_are_counted_as_triton_counts_them() -> None:
    statistics = Statistics(16)
    statistics.executed(execution(100, 200, images=9))
    statistics.succeeded(5_000)
    statistics.succeeded(7_000)
    message = statistics.as_message("model", "3")
    assert (message.name, message.version) == ("model", "3")
    assert (message.inference_count, message.execution_count) == (9, 1)
    stats = message.inference_stats
    assert (stats.success.count, stats.success.ns) == (2, 12_000)
    assert (stats.queue.count, stats.queue.ns) == (2, 300)
    # Each request takes as long as its batch.
    assert (stats.compute_infer.count, stats.compute_infer.ns) == (2, 4 * MILLISECOND_NS)
    (batch,) = message.batch_stats
    assert (batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns) == (9, 1, 2 * MILLISECOND_NS)
    assert (batch.compute_input.ns, batch.compute_output.ns) == (10, 30)
    # The engine's call alone, and each once however many requests share it.
    assert statistics.compute_times.read().total == 2 * MILLISECOND_NS
    assert message.last_inference > 1_600_000_000_000


@given(st.lists(st.one_of(st.just("hit"), st.lists(st.integers(0, 10**12), min_size=1, max_size=8))))
def test_the_counts_that_perf_analyzer_compares_agree(work: list[str | list[int]]) -> None:
    statistics = Statistics(8)
    for each in work:
        if isinstance(each, str):
            statistics.cache_hit(5)
            statistics.succeeded(50)
            continue
        statistics.executed(execution(*each))
        for waited in each:
            statistics.succeeded(waited + 3 * MILLISECOND_NS)
    message = statistics.as_message("model", "1")
    stats = message.inference_stats
    assert stats.success.count == stats.queue.count
    assert stats.compute_input.count == stats.compute_infer.count == stats.compute_output.count
    assert stats.compute_infer.count == stats.success.count - stats.cache_hit.count
    assert message.execution_count == sum(batch.compute_infer.count for batch in message.batch_stats)
    sizes = {batch.batch_size: batch.compute_infer.count for batch in message.batch_stats}
    assert message.inference_count == sum(size * count for size, count in sizes.items())
    assert list(sizes) == sorted(sizes)


def test_a_failed_call_answers_nobody() -> None:
    statistics = Statistics(8)
    statistics.executed(execution(100, closed_by="full", failed=True))
    statistics.failed(900, RuntimeError("out of memory"))
    message = statistics.as_message("model", "1")
    assert (message.inference_count, message.execution_count, message.last_inference) == (0, 0, 0)
    assert (message.inference_stats.fail.count, message.inference_stats.fail.ns) == (1, 900)
    assert statistics.closed_by["full"] == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ResourceExhausted("full"), "REJECTED"),
        (Unavailable("full"), "REJECTED"),
        (DeadlineExceeded("late"), "REJECTED"),
        (asyncio.CancelledError(), "CANCELED"),
        (InvalidArgument("shape"), "OTHER"),
        (ServiceError("engine"), "BACKEND"),
        (RuntimeError("engine"), "BACKEND"),
        (None, "OTHER"),
    ],
)
def test_a_failure_is_counted_by_triton_s_reason(error: BaseException | None, reason: Failure) -> None:
    statistics = Statistics(8)
    statistics.failed(10, error)
    assert {name: each.count for name, each in statistics.failures.items() if each.count} == {reason: 1}


@given(st.lists(st.integers(0, 10**11)))
def test_a_histogram_counts_each_observation_up_to_every_bound_above_it(values: list[int]) -> None:
    histogram = Histogram(DURATIONS_NS)
    for value in values:
        histogram.observe(value)
    bounds, cumulative, total = histogram.read()
    assert total == sum(values)
    expected = [sum(value <= bound for value in values) for bound in bounds]
    assert list(cumulative) == [*expected, len(values)]


@given(st.integers(1, 300), st.data())
def test_batch_sizes_show_how_often_a_batch_was_full(max_batch: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, max_batch)))
    statistics = Statistics(max_batch)
    for size in sizes:
        statistics.executed(execution(1, images=size))
    bounds, cumulative, total = statistics.batch_sizes()
    assert bounds[-1] == max_batch
    assert list(bounds) == sorted(set(bounds))
    assert list(cumulative) == [*(bisect_left(sorted(sizes), bound + 1) for bound in bounds), len(sizes)]
    assert total == sum(sizes)


def test_a_version_that_comes_back_goes_on_counting() -> None:
    ledger = Ledger()
    ledger.of("model", 1, max_batch=8).succeeded(10)
    again = ledger.of("model", 1, max_batch=16)
    again.succeeded(10)
    assert again.success.count == 2
    assert again.batch_sizes().bounds[-1] == 16


def test_versions_are_listed_in_the_order_of_their_numbers() -> None:
    ledger = Ledger()
    for model, version in (("b", 1), ("a", 10), ("a", 9)):
        ledger.of(model, version, max_batch=1)
    assert [(model, version) for model, version, _ in ledger.read()] == [("a", "9"), ("a", "10"), ("b", "1")]


class Line:
    """A queue of so many."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting


def test_nobody_waits_in_a_queue_that_is_gone_and_it_is_not_kept() -> None:
    statistics = Statistics(8)
    assert statistics.waiting == 0
    old, new = Line(3), Line(4)
    statistics.watch(old)
    statistics.watch(new)
    assert statistics.waiting == 7
    del old
    gc.collect()
    assert statistics.waiting == 4


def test_counts_never_go_back_for_who_reads_them_meanwhile() -> None:
    statistics = Statistics(64)
    begun, done = threading.Event(), threading.Event()
    seen: list[Sequence[int]] = []
    errors: list[Exception] = []

    def read() -> None:
        try:
            while not done.is_set():
                seen.append([statistics.success.count, *statistics.batch_sizes().cumulative])
                seen[-1] = [*seen[-1], statistics.as_message("model", "1").execution_count]
                begun.set()
        except RuntimeError as error:
            errors.append(error)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(10)
    for number in range(20_000):
        statistics.executed(execution(1, images=1 + number % 64))
        statistics.succeeded(number)
    done.set()
    reader.join()
    assert not errors
    for before, after in pairwise(seen):
        assert all(late >= early for early, late in zip(before, after, strict=True))


def test_every_status_of_ours_has_a_reason() -> None:
    for kind in ServiceError.__subclasses__():
        statistics = Statistics(1)
        statistics.failed(1, kind("why"))
        assert sum(each.count for each in statistics.failures.values()) == 1
        assert statistics.failures["BACKEND"].count == (kind.status is grpc.StatusCode.INTERNAL)
