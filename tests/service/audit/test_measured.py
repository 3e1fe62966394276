from __future__ import annotations

import numpy as np
import pytest

from service.audit import statistics
from service.audit.measured import Measured, difference, needed


def measured(values: np.ndarray) -> Measured:
    return Measured(float(values.mean()), 0.0, 1.0, len(values), values)


def test_shares_of_the_same_images_have_tangos_interval() -> None:
    first, second = np.array([1.0] * 60 + [0.0] * 40), np.array([0.0] * 20 + [1.0] * 45 + [0.0] * 35)
    found = difference(measured(first), measured(second))
    assert (found.low, found.high) == statistics.paired_difference(20, 5, n=100)
    assert found.value == pytest.approx(0.15)


def test_means_of_the_same_images_have_the_bootstraps_interval_and_always_the_same() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.random(400)
    found = difference(measured(hardness), measured(hardness * 0.9))
    half_width = 1.96 * (hardness * 0.1).std() / 20
    assert (found.low, found.high) == pytest.approx((found.value - half_width, found.value + half_width), rel=0.1)
    again = difference(measured(hardness), measured(hardness * 0.9))
    assert (again.low, again.high) == (found.low, found.high)


def test_only_images_that_both_have_are_compared() -> None:
    found = difference(measured(np.ones(100)), measured(np.zeros(30)))
    assert (found.value, found.n) == (1.0, 30)


def test_numbers_of_different_images_are_compared_as_independent() -> None:
    # Newcombe (1998), example (a): 56 of 70 against 48 of 80, method 10.
    first, second = Measured(56 / 70, 0.6918, 0.8769, 70), Measured(48 / 80, 0.4904, 0.7004, 80)
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=2e-4)


def test_intervals_are_taken_to_shrink_with_the_root_of_n() -> None:
    assert needed(Measured(0.5, 0.4, 0.6, 100), 0.55, share=False) == 401 - 1
    assert needed(Measured(0.5, 0.4, 0.6, 100), 0.5, share=False) is None
    assert needed(Measured(3.0, 1.0, np.inf, 100), 4.0, share=False) is None
