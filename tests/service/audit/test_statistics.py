import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from service.audit.statistics import bootstrap_mean, mcnemar


def test_bootstrap_of_independent_cells_has_the_width_of_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=(1000, 4))
    lower, upper = bootstrap_mean(values, seed=0)
    half_width = 1.96 * values.mean(axis=1).std() / np.sqrt(1000)
    assert (lower, upper) == pytest.approx(
        (values.mean() - half_width, values.mean() + half_width), abs=0.15 * half_width
    )


def test_bootstrap_does_not_take_the_cells_of_an_image_for_samples() -> None:
    column = np.random.default_rng(1).random((200, 1)) < 0.3
    assert bootstrap_mean(np.repeat(column, 75, axis=1), seed=0) == pytest.approx(bootstrap_mean(column, seed=0))


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        hardness = rng.random((200, 1))
        lower, upper = bootstrap_mean(rng.random((200, 5)) < hardness, seed=trial, confidence=0.9, resamples=200)
        hits += lower <= 0.5 <= upper
    # 180 expected; three standard deviations of a binomial are 13, and 200 resamples cost about a hundredth.
    assert 164 <= hits <= 193


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**32), st.floats(0.5, 0.999))
def test_bootstrap_stays_among_the_images(images: int, cells: int, seed: int, confidence: float) -> None:
    values = np.random.default_rng(seed).random((images, cells)) < 0.5
    lower, upper = bootstrap_mean(values, seed=seed, confidence=confidence, resamples=50)
    means = values.mean(axis=1)
    assert means.min() - 1e-12 <= lower <= upper <= means.max() + 1e-12


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32))
def test_bootstrap_is_decided_by_its_seed_and_widens_with_confidence(seed: int) -> None:
    values = np.random.default_rng(seed).random((30, 3))
    interval = bootstrap_mean(values, seed=seed, resamples=100)
    lower, upper = bootstrap_mean(values, seed=seed, confidence=0.5, resamples=100)
    assert interval == bootstrap_mean(values, seed=seed, resamples=100)
    assert interval != bootstrap_mean(values, seed=seed + 1, resamples=100)
    assert interval[0] < lower < upper < interval[1]


def test_bootstrap_of_agreeing_images_has_no_width() -> None:
    assert bootstrap_mean(np.ones((10, 5)), seed=0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(5), r"expected values of shape \(images, cells\), got \(5,\)"),
        (np.ones((1, 5)), "expected at least 2 images and 1 cell, got 1 and 5"),
        (np.ones((0, 5)), "expected at least 2 images and 1 cell, got 0 and 5"),
        (np.ones((5, 0)), "expected at least 2 images and 1 cell, got 5 and 0"),
        (np.full((5, 2), np.nan), "expected finite values, got nan or inf"),
        (np.full((5, 2), np.inf), "expected finite values, got nan or inf"),
    ],
)
def test_bootstrap_refuses_impossible_values(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, seed=0)


@pytest.mark.parametrize(
    ("seed", "confidence", "resamples", "message"),
    [
        (-1, 0.95, 10, "expected a seed of at least 0, got -1"),
        (0, 1.0, 10, "expected confidence between 0 and 1, got 1.0"),
        (0, 0.95, 0, "expected resamples of at least 1, got 0"),
    ],
)
def test_bootstrap_refuses_impossible_settings(seed: int, confidence: float, resamples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(np.ones((5, 2)), seed=seed, confidence=confidence, resamples=resamples)


@pytest.mark.parametrize(
    ("first_only", "second_only", "p_value"),
    [(0, 0, 1.0), (0, 5, 2 / 32), (0, 6, 2 / 64), (1, 5, 14 / 64), (3, 3, 1.0), (2, 8, 112 / 1024)],
)
def test_mcnemar_gives_known_p_values(first_only: int, second_only: int, p_value: float) -> None:
    assert mcnemar(first_only, second_only) == pytest.approx(p_value)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_equals_scipys_binomial_test_and_is_symmetric(first_only: int, second_only: int) -> None:
    p_value = mcnemar(first_only, second_only)
    assert 0 < p_value <= 1
    assert p_value == mcnemar(second_only, first_only)
    if first_only + second_only > 0:
        theirs = stats.binomtest(first_only, first_only + second_only).pvalue
        assert p_value == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_takes_counts_beyond_floating_point() -> None:
    assert mcnemar(4900, 5100) == pytest.approx(stats.binomtest(4900, 10_000).pvalue, rel=1e-9)
    assert mcnemar(0, 10_000) == 0.0


@pytest.mark.parametrize("counts", [(-1, 3), (3, -1)])
def test_mcnemar_refuses_negative_counts(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected counts of at least 0"):
        mcnemar(*counts)


def test_statistics_do_not_need_torch() -> None:
    code = "import sys, service.audit.statistics; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
