"""The queue alone, against a list that is sorted: order, sizes, bounds, and who is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.engines.base import Inputs
from service.inference.queues import NEVER, Queue, Waiting

MAX_BATCH = 8
_NOW_NS = 1000


@contextmanager
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def answers() -> Iterator[asyncio.AbstractEventLoop]:
    with loop() as made:
        yield made


def images(count: int) -> Inputs:
    return np.zeros((count, 1, 1, 1), np.float32)


def waiting(
    answers: asyncio.AbstractEventLoop,
    size: int = 1,
    *,
    level: int = 0,
    start_by_ns: int = NEVER,
    cancelled: bool = False,
    arrived_ns: int = 0,
) -> Waiting:
    made = Waiting(images(size), answers.create_future(), level=level, arrived_ns=arrived_ns)
    made.start_by_ns = start_by_ns
    if cancelled:
        made.answer.cancel()
    return made


requests = st.lists(
    st.fixed_dictionaries(
        {
            "size": st.integers(1, MAX_BATCH),
            "level": st.integers(0, 2),
            "start_by_ns": st.sampled_from([NEVER, NEVER, _NOW_NS - 1, _NOW_NS, _NOW_NS + 1]),
            "cancelled": st.booleans(),
        }
    ),
    max_size=40,
)


@given(wanted=requests, enough=st.integers(1, MAX_BATCH))
def test_everything_is_taken_once_in_order_and_nothing_dead_runs(wanted: list[dict[str, int]], enough: int) -> None:
    queue = Queue(levels=3, bound=40)
    with loop() as answers:
        pushed = [waiting(answers, **each) for each in wanted]  # type: ignore[arg-type]
        assert all(queue.push(each) for each in pushed)
        batches, late = [], []
        while queue.images:
            batch, too_late, _ = queue.take(MAX_BATCH, enough=enough, now_ns=_NOW_NS)
            batches.append(batch)
            late += too_late
        live = [each for each in pushed if not each.answer.cancelled()]
        ordered = sorted(live, key=lambda each: each.level)
        assert [each for batch in batches for each in batch] == [each for each in ordered if each.start_by_ns > _NOW_NS]
        assert late == [each for each in ordered if each.start_by_ns <= _NOW_NS]
        for batch in batches:
            sizes = [each.size for each in batch]
            assert sum(sizes) <= MAX_BATCH
            # It stops as soon as there are enough.
            assert sum(sizes[:-1]) < enough
        assert all(each.taken for batch in batches for each in batch)


@given(wanted=requests)
def test_expiring_takes_out_what_is_late_and_leaves_the_rest_in_order(wanted: list[dict[str, int]]) -> None:
    queue = Queue(levels=3, bound=40)
    with loop() as answers:
        pushed = [waiting(answers, **each) for each in wanted]  # type: ignore[arg-type]
        for each in pushed:
            queue.push(each)
        late = queue.expire(_NOW_NS)
        ordered = sorted(pushed, key=lambda each: each.level)
        overdue = [each for each in ordered if each.start_by_ns <= _NOW_NS]
        assert late == sorted(overdue, key=lambda each: each.start_by_ns)
        assert list(queue) == [each for each in ordered if each.start_by_ns > _NOW_NS]
        assert queue.images == sum(each.size for each in queue)
        assert queue.next_expiry_ns() == min((each.start_by_ns for each in queue), default=NEVER)


def test_each_level_has_a_bound_of_its_own(answers: asyncio.AbstractEventLoop) -> None:
    queue = Queue(levels=2, bound=2)
    assert [queue.push(waiting(answers, level=1)) for _ in range(3)] == [True, True, False]
    assert [queue.push(waiting(answers, level=0)) for _ in range(3)] == [True, True, False]
    assert queue.images == 4


def test_what_is_removed_leaves_its_place(answers: asyncio.AbstractEventLoop) -> None:
    queue = Queue(levels=1, bound=1)
    first, second = waiting(answers, 3), waiting(answers, 2)
    assert queue.push(first)
    queue.remove(second)  # it never was there
    queue.remove(first)
    assert queue.images == 0
    assert queue.push(second)


def test_images_ahead_are_those_of_the_same_and_higher_priorities(answers: asyncio.AbstractEventLoop) -> None:
    queue = Queue(levels=3, bound=9)
    for level, size in ((2, 4), (0, 1), (1, 2)):
        queue.push(waiting(answers, size, level=level))
    assert [queue.ahead(level) for level in range(3)] == [1, 3, 7]


@pytest.mark.parametrize(
    ("sizes", "preferred", "expected"),
    [
        ([], {4}, (0, None)),
        ([3], {4}, (3, None)),
        ([3, 1], {4}, (4, "preferred")),
        ([2, 2, 1], {2, 4}, (4, "preferred")),  # the largest; the last image waits for others
        ([3, 2], {4}, (5, None)),  # no prefix has the size
        ([4, 4, 1], {4}, (8, "full")),
        ([4, 3, 2], {4}, (4, "preferred")),
        ([5, 4], {4}, (5, "next")),
    ],
)
def test_a_batch_is_closed_early_when_full_preferred_or_blocked(
    answers: asyncio.AbstractEventLoop, sizes: list[int], preferred: set[int], expected: tuple[int, str | None]
) -> None:
    queue = Queue(levels=1, bound=9)
    for size in sizes:
        queue.push(waiting(answers, size))
    assert queue.fitting(MAX_BATCH, preferred=preferred) == expected


def test_a_batch_fills_for_a_delay_or_three_quarters_of_a_requests_time(answers: asyncio.AbstractEventLoop) -> None:
    queue = Queue(levels=1, bound=9)
    queue.push(waiting(answers, arrived_ns=200))
    queue.push(waiting(answers, arrived_ns=100))
    assert queue.fill_until_ns(50) == 150
    queue.push(waiting(answers, arrived_ns=100, start_by_ns=140))
    assert queue.fill_until_ns(50) == 130
