import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from export.intervals import wilson
from service.audit.statistics import (
    bootstrap_mean,
    confidence_sequence,
    holm,
    mcnemar,
    median_interval,
    paired_difference,
    samples_to_decide,
)


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
def test_bootstrap_bounds_the_mean_within_the_shares_that_there_can_be(
    images: int, cells: int, seed: int, confidence: float
) -> None:
    values = np.random.default_rng(seed).random((images, cells)) < 0.5
    lower, upper = bootstrap_mean(values, seed=seed, confidence=confidence, resamples=50)
    assert -1e-12 <= lower <= values.mean() + 1e-12
    assert values.mean() - 1e-12 <= upper <= 1 + 1e-12


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
    assert bootstrap_mean(np.ones((10, 5)), seed=0) == wilson(10, 10)
    assert bootstrap_mean(np.zeros((3, 5)), seed=0) == wilson(0, 3)
    assert bootstrap_mean(np.zeros((10, 1)), seed=0, bounds=(-1, 1))[0] < -0.3


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


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 700))
def test_paired_difference_leaves_zero_out_when_mcnemars_statistic_is_significant(
    first_only: int, second_only: int, agreeing: int
) -> None:
    n = first_only + second_only + agreeing
    lower, upper = paired_difference(first_only, second_only, n=n)
    assert -1 <= lower <= (first_only - second_only) / n <= upper <= 1
    statistic = (first_only - second_only) ** 2 / max(1, first_only + second_only)
    if abs(statistic - 1.959964**2) > 1e-3:
        assert (lower > 0 or upper < 0) == (statistic > 1.959964**2)
    assert paired_difference(second_only, first_only, n=n) == pytest.approx((-upper, -lower), abs=1e-12)


def test_paired_difference_of_one_sided_changes_is_wilsons_upward() -> None:
    assert paired_difference(0, 0, n=100) == pytest.approx((-wilson(0, 100)[1], wilson(0, 100)[1]))
    assert paired_difference(30, 0, n=100)[1] == pytest.approx(wilson(30, 100)[1])
    assert paired_difference(100, 0, n=100)[1] == 1.0


def test_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(120, [0.10, 0.03, 0.87], size=1000)
    intervals = [paired_difference(int(b), int(c), n=120) for b, c, _ in counts]
    # 950 expected; three standard deviations of a binomial are 21.
    assert 925 <= sum(lower <= 0.07 <= upper for lower, upper in intervals) <= 975


@pytest.mark.parametrize(("first_only", "second_only", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_paired_difference_refuses_impossible_counts(first_only: int, second_only: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected counts of at least 0 that n covers"):
        paired_difference(first_only, second_only, n=n)


def test_holm_gives_known_adjustments() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.6]) == (1.0, 1.0)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_shrinks_a_p_value_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    assert all(after <= min(1.0, len(p_values) * before) for before, after in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p_value(value: float) -> None:
    with pytest.raises(ValueError, match="expected p-values from 0 to 1"):
        holm([0.5, value])


@given(st.integers(1, 300), st.sampled_from([0.8, 0.95, 0.99]))
def test_median_interval_takes_the_ranks_of_the_binomial_distribution(n: int, confidence: float) -> None:
    lower, upper = median_interval(list(range(n)), confidence=confidence)
    rank = stats.binom.ppf((1 - confidence) / 2, n, 0.5)
    beyond = int(rank) - 1 if stats.binom.cdf(rank, n, 0.5) > (1 - confidence) / 2 else int(rank)
    assert (lower, upper) == ((-np.inf, np.inf) if beyond < 0 else (beyond, n - 1 - beyond))


def test_median_interval_takes_what_is_unknown_for_large() -> None:
    assert median_interval([0.1, np.inf, 0.2, np.inf, np.inf, 0.3]) == (0.1, np.inf)
    assert median_interval([1.0] * 5) == (-np.inf, np.inf)
    with pytest.raises(ValueError, match="expected at least 1 value and no NaN"):
        median_interval([])
    with pytest.raises(ValueError, match="expected at least 1 value and no NaN"):
        median_interval([0.1, np.nan])


def test_confidence_sequence_is_where_the_mixtures_capital_is_below_one_over_alpha() -> None:
    total, n, alpha = 30, 100, 0.05
    for mean in confidence_sequence(total, n):
        capital, _ = integrate.quad(
            lambda theta, mean=mean: (
                stats.beta.pdf(theta, 0.5, 0.5) * (theta / mean) ** total * ((1 - theta) / (1 - mean)) ** (n - total)
            ),
            0.01,
            0.99,
        )
        assert capital == pytest.approx(1 / alpha, rel=1e-4)


@given(st.integers(0, 1000), st.data())
def test_confidence_sequence_is_wider_than_wilson_and_contains_the_mean(n: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(0, n))
    lower, upper = confidence_sequence(total, n)
    assert 0 <= lower <= upper <= 1
    if n:
        assert lower <= total / n <= upper
        assert upper - lower > np.subtract(*wilson(total, n)[::-1])
    assert confidence_sequence(n - total, n) == pytest.approx((1 - upper, 1 - lower), abs=1e-9)


@pytest.mark.parametrize("draw", ["coins", "grey"])
def test_confidence_sequence_covers_the_truth_at_every_look(draw: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((200, 600)) < 0.2 if draw == "coins" else rng.beta(0.4, 1.6, size=(200, 600))
    totals = values.cumsum(axis=1)
    looks = range(20, 601, 20)
    misses = 0
    for row in totals:
        bounds = [confidence_sequence(float(row[n - 1]), n, confidence=0.9) for n in looks]
        misses += any(not lower <= 0.2 <= upper for lower, upper in bounds)
    assert misses <= 0.1 * 200


@pytest.mark.parametrize(("total", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_confidence_sequence_refuses_impossible_totals(total: float, n: int) -> None:
    with pytest.raises(ValueError, match="expected a total from 0 to n"):
        confidence_sequence(total, n)


def test_confidence_sequence_of_nothing_knows_nothing() -> None:
    assert confidence_sequence(0, 0) == (0.0, 1.0)


@given(st.floats(0.05, 0.95), st.floats(0.01, 0.99))
def test_samples_to_decide_is_the_first_number_at_which_wilson_leaves_the_limit_out(share: float, limit: float) -> None:
    samples = samples_to_decide(share, limit)
    if abs(share - limit) < 0.01:
        return
    assert samples is not None

    def score(n: int) -> float:
        return math.sqrt(n / (limit * (1 - limit))) * abs(share - limit)

    assert score(samples) >= 1.959963
    assert score(samples - 1) <= 1.959965


def test_samples_to_decide_agrees_with_the_interval() -> None:
    # 0.45 against 0.4: 368.8 samples.
    assert samples_to_decide(0.45, 0.4) == 369
    assert wilson(162, 360)[0] < 0.4 < wilson(171, 380)[0]
    assert samples_to_decide(0.4, 0.4) is None
    with pytest.raises(ValueError, match=r"expected a share and a limit from 0 to 1, got 45 and 0\.4"):
        samples_to_decide(45, 0.4)
