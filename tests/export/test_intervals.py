import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from export.intervals import wilson

CONFIDENCES = st.floats(0.5, 0.999)


@st.composite
def proportions(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 10_000))
    return draw(st.integers(0, n)), n


@pytest.mark.parametrize(
    ("successes", "n", "lower", "upper"),
    [(0, 100, 0.0, 0.0370), (500, 1000, 0.4691, 0.5309), (100, 100, 0.9630, 1.0), (0, 1, 0.0, 0.7935)],
)
def test_wilson_gives_known_intervals(successes: int, n: int, lower: float, upper: float) -> None:
    assert wilson(successes, n) == pytest.approx((lower, upper), abs=5e-5)


@given(proportions(), CONFIDENCES)
def test_wilson_equals_scipys(proportion: tuple[int, int], confidence: float) -> None:
    successes, n = proportion
    theirs = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    assert wilson(successes, n, confidence=confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(proportions(), CONFIDENCES)
def test_wilson_holds_the_proportion_and_stays_in_range(proportion: tuple[int, int], confidence: float) -> None:
    successes, n = proportion
    lower, upper = wilson(successes, n, confidence=confidence)
    assert 0 <= lower <= successes / n <= upper <= 1


@given(proportions(), CONFIDENCES)
def test_wilson_of_failures_mirrors_that_of_successes(proportion: tuple[int, int], confidence: float) -> None:
    successes, n = proportion
    lower, upper = wilson(successes, n, confidence=confidence)
    mirrored = wilson(n - successes, n, confidence=confidence)
    assert mirrored == pytest.approx((1 - upper, 1 - lower), abs=1e-12)


@given(proportions())
def test_wilson_narrows_with_samples_and_widens_with_confidence(proportion: tuple[int, int]) -> None:
    successes, n = proportion
    lower, upper = wilson(successes, n)
    more_lower, more_upper = wilson(4 * successes, 4 * n)
    surer_lower, surer_upper = wilson(successes, n, confidence=0.99)
    assert more_upper - more_lower < upper - lower < surer_upper - surer_lower


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "expected n of at least 1, got 0"),
        (-1, 5, 0.95, "expected successes from 0 to n = 5, got -1"),
        (6, 5, 0.95, "expected successes from 0 to n = 5, got 6"),
        (1, 5, 0.0, "expected confidence between 0 and 1, got 0.0"),
        (1, 5, 1.0, "expected confidence between 0 and 1, got 1.0"),
        (1, 5, float("nan"), "expected confidence between 0 and 1, got nan"),
    ],
)
def test_wilson_refuses_the_impossible(successes: int, n: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson(successes, n, confidence=confidence)
