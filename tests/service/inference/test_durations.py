"""Estimates of an engine's time: nothing invented, quick to fall, slow to rise."""

from __future__ import annotations

from time import monotonic_ns

from hypothesis import given
from hypothesis import strategies as st

from service.inference.durations import Durations


def test_nothing_is_expected_before_anything_is_measured() -> None:
    assert Durations(8).of(8) == 0


def test_a_size_that_has_not_run_takes_at_least_what_a_smaller_one_took() -> None:
    durations = Durations(8)
    durations.measured(2, 100)
    durations.measured(5, 300)
    assert [durations.of(size) for size in (1, 2, 4, 5, 8)] == [0, 100, 100, 300, 300]


@given(st.lists(st.integers(1, 10**12), min_size=1))
def test_an_estimate_stays_between_the_quickest_and_the_last_call(measured: list[int]) -> None:
    durations = Durations(1)
    for each in measured:
        durations.measured(1, each)
    assert min(measured) <= durations.of(1) <= max(measured)


def test_one_slow_call_counts_little_and_lasting_slowness_counts() -> None:
    durations = Durations(1)
    durations.measured(1, 100)
    durations.measured(1, 1000)
    assert durations.of(1) < 500
    for _ in range(20):
        durations.measured(1, 1000)
    assert durations.of(1) > 900
    durations.measured(1, 100)
    assert durations.of(1) == 100


def test_what_has_not_run_lately_is_not_certain() -> None:
    durations = Durations(4)
    durations.measured(2, 1_000)
    now = monotonic_ns()
    assert durations.certain(2, since_ns=now - 10_000_000_000) == 1_000
    # One slow call must not refuse a size for ever, whatever other sizes do meanwhile.
    durations.measured(1, 1_000)
    assert durations.certain(2, since_ns=now) == 0
    assert durations.certain(3, since_ns=0) == 0
