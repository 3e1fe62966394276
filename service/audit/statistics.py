"""Intervals and tests that stand beside every number of an audit; those of proportions are in export.intervals.

a mean over images and corruptions    -> bootstrap_mean
two accuracies on the same images     -> mcnemar (do they differ?), paired_difference (by how much?)
many tests at once                    -> holm
a median                              -> median_interval
a mean looked at after every slice    -> confidence_sequence
a share and the limit of a gate       -> samples_to_decide
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float64, Real

from export.intervals import wilson

# Halvings of an interval of length 2 at most: what is left, 2e-16, is float64's own rounding.
_HALVINGS = 53

# Images that must differ from the rest before resampling them shows how far their mean may lie from the truth.
_DIFFERING = 10

# What a sum of float64 shares may be off by.
_ROUNDING = 1e-9


def bootstrap_mean(
    values: Real[np.ndarray, "images cells"] | Bool[np.ndarray, "images cells"],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """Bound a mean over images and cells by the percentile bootstrap over images.

    Images are drawn with replacement and each brings all its cells, because the errors of one image under
    many corruptions are not independent: cells counted as samples of their own would give an interval far too
    narrow. Where fewer than 10 images differ from the rest, resampling sees next to no spread: the interval is then no
    narrower than Wilson's for as many images that stand at the bounds.

    Args:
        values: (images, cells), any finite numbers; usually errors, 0 or 1, one column for each corruption
            and severity. At least 2 images and 1 cell.
        seed: of the draws, 0 or more; the same seed gives the same interval.
        confidence: the two-sided coverage, in (0, 1).
        bounds: between which values lie; (-1, 1) for differences of shares.
        resamples: how many bootstrap samples to draw, at least 1; 2,000 leave the bounds an error of a few
            per cent of the interval's width.

    Returns:
        The lower and the upper bound, in the units of the values.

    Raises:
        ValueError: values have another shape or are not finite, there are fewer than 2 images or no cells, or
            confidence, resamples or seed are outside their ranges.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
    """
    _check_values(values)
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"expected resamples of at least 1, got {resamples}; 2000 is usual")
    if seed < 0:
        raise ValueError(f"expected a seed of at least 0, got {seed}; choose another")
    means = _resampled_means(
        values.mean(axis=1, dtype=np.float64), rng=np.random.default_rng(seed), resamples=resamples
    )
    lower, upper = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    floor = _without_spread(values.mean(axis=1, dtype=np.float64), bounds=bounds, confidence=confidence)
    return min(float(lower), floor[0]), max(float(upper), floor[1])


def _without_spread(
    means: Float64[np.ndarray, " images"], *, bounds: tuple[float, float], confidence: float
) -> tuple[float, float]:
    """Return the least interval of a mean where too few images differ for the bootstrap to see a spread.

    Of n bounded numbers none is further spread than n that stand at the bounds alone, of which Wilson's interval holds.
    """
    mean, n = float(means.mean()), len(means)
    _, counts = np.unique(means, return_counts=True)
    low, high = bounds
    if n - counts.max() >= _DIFFERING or not (low <= means.min() and means.max() <= high):
        return mean, mean
    share = (mean - low) / (high - low) * n
    lower = wilson(math.floor(share + _ROUNDING), n, confidence=confidence)[0]
    upper = wilson(math.ceil(share - _ROUNDING), n, confidence=confidence)[1]
    return low + lower * (high - low), low + upper * (high - low)


def mcnemar(first_only: int, second_only: int) -> float:
    """Test whether two classifiers differ in accuracy on the same images.

    Only the images on which exactly one of them is right tell anything; if the two are equally good, each of
    these falls to either side with probability one half (exact binomial test, both tails).

    Args:
        first_only: how many images the first alone gets right, 0 or more.
        second_only: how many the second alone gets right, 0 or more.

    Returns:
        The two-sided p-value, in [0, 1]; 1 where the two never differ.

    Raises:
        ValueError: a count is negative.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12 (1947); the exact, binomial form instead of the chi-squared one.
    """
    if min(first_only, second_only) < 0:
        raise ValueError(f"expected counts of at least 0, got {first_only} and {second_only}; count images")
    n = first_only + second_only
    ways = total = 1
    for k in range(min(first_only, second_only)):
        ways = ways * (n - k) // (k + 1)
        total += ways
    # Whole numbers up to here, and Python rounds their quotient correctly however long they are.
    return min(1.0, 2 * total / (1 << n))


def paired_difference(first_only: int, second_only: int, *, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bound the difference of two shares of the same images, by Tango's score interval.

    Images on which both agree count, but only by their number. Like Wilson's interval it keeps its coverage where
    few images differ or none do; it leaves out 0 exactly when McNemar's chi-squared statistic is significant.

    Args:
        first_only: how many images count for the first share alone, 0 or more.
        second_only: how many count for the second alone, 0 or more.
        n: all images, at least 1.
        confidence: the two-sided coverage, in (0, 1).

    Returns:
        The lower and the upper bound of first minus second, each in [-1, 1].

    Raises:
        ValueError: a count is negative, both exceed n, n is below 1, or confidence is outside (0, 1).

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998).
    """
    if n < 1 or min(first_only, second_only) < 0 or first_only + second_only > n:
        raise ValueError(
            f"expected counts of at least 0 that n covers, got {first_only} and {second_only} of n = {n}; "
            "count all over the same images"
        )
    _check_confidence(confidence)
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    observed = (first_only - second_only) / n

    def excluded(difference: float) -> bool:
        # The second count's share, most likely under this difference, solves 2n q^2 + middle q + last = 0.
        middle = (2 * n - first_only + second_only) * difference - first_only - second_only
        last = -second_only * difference * (1 - difference)
        share = (math.sqrt(max(0.0, middle * middle - 8 * n * last)) - middle) / (4 * n)
        variance = max(0.0, n * (2 * share + difference * (1 - difference)))
        return abs(n * (observed - difference)) > quantile * math.sqrt(variance)

    return _edge(excluded, inside=observed, end=-1.0), _edge(excluded, inside=observed, end=1.0)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Correct the p-values of many tests, so that all of them together err as rarely as one.

    Args:
        p_values: of any tests, dependent or not, each in [0, 1].

    Returns:
        The adjusted p-values in the same order, each at least the one given and at most 1: all tests whose adjusted
        p-value is at most alpha can be called significant, with a chance of alpha at most that any of them is not.

    Raises:
        ValueError: a p-value is outside [0, 1].

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    if wrong := [value for value in p_values if not 0 <= value <= 1]:
        raise ValueError(f"expected p-values from 0 to 1, got {wrong[0]}; leave out what was not tested")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Bound a median by two of the values themselves, whatever their distribution.

    Args:
        values: at least 1, not NaN; inf where a value is only known to be large.
        confidence: the two-sided coverage, in (0, 1).

    Returns:
        The lower and the upper bound; -inf and inf where there are too few values for any (fewer than 6 at 0.95).

    Raises:
        ValueError: there are no values, one is NaN, or confidence is outside (0, 1).

    Source: David and Nagaraja, "Order Statistics" (2003), section 7.1.
    """
    if not values or any(math.isnan(value) for value in values):
        raise ValueError(f"expected at least 1 value and no NaN, got {len(values)} values; use inf for what is unknown")
    _check_confidence(confidence)
    ordered, n = sorted(values), len(values)
    # The chance that `beyond` values or fewer lie below the median, in units of 2 ** -n.
    allowed = math.floor((1 - confidence) / 2 * 2.0**53) * (1 << n) >> 53
    beyond, ways, total = -1, 1, 1
    while total <= allowed:
        beyond += 1
        ways = ways * (n - beyond) // (beyond + 1)
        total += ways
    return (-math.inf, math.inf) if beyond < 0 else (ordered[beyond], ordered[n - 1 - beyond])


def confidence_sequence(total: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bound the mean of values in [0, 1], however often one looks and whatever makes one stop.

    The chance that the true mean is ever outside, at any of all n, is at most 1 - confidence, for any number of
    values and any distribution in [0, 1]. A mean is left out when a bettor against it, who spreads the capital over
    all means by Jeffreys' prior Beta(1/2, 1/2), has made 1 / (1 - confidence) out of 1. Values between 0 and 1 earn
    the bettor no more than coin flips of the same mean would.

    Args:
        total: the sum of the values, 0 to n.
        n: how many there are, at least 0; drawn in random order.
        confidence: of the whole sequence, in (0, 1).

    Returns:
        The lower and the upper bound, each in [0, 1]; the observed mean lies between them. (0, 1) for n = 0.

    Raises:
        ValueError: total is outside 0 to n, n is below 0, or confidence is outside (0, 1).

    Source: Robbins, "Statistical methods related to the law of the iterated logarithm", Annals of Mathematical
    Statistics 41 (1970); for values in [0, 1]: Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric,
    nonasymptotic confidence sequences", Annals of Statistics 49 (2021), the beta-binomial mixture.
    """
    if n < 0 or not 0 <= total <= n:
        raise ValueError(f"expected a total from 0 to n, got {total} of n = {n}; give values in [0, 1]")
    _check_confidence(confidence)
    if n == 0:
        return 0.0, 1.0
    misses = n - total
    # Of Beta(1/2, 1/2), whose own constant is pi.
    mixture = math.lgamma(total + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(n + 1) - math.log(math.pi)
    threshold = -math.log1p(-confidence)

    def excluded(mean: float) -> bool:
        return mixture - _weighted_log(total, mean) - _weighted_log(misses, 1 - mean) >= threshold

    return _edge(excluded, inside=total / n, end=0.0), _edge(excluded, inside=total / n, end=1.0)


def samples_to_decide(share: float, limit: float, *, confidence: float = 0.95) -> int | None:
    """Return how many samples put a limit outside of Wilson's interval, if the share stays as it is.

    Args:
        share: as observed, in [0, 1].
        limit: that it is compared with, in [0, 1].
        confidence: of the interval, in (0, 1).

    Returns:
        The smallest such number; None where share and limit are equal, which no number of samples decides.

    Raises:
        ValueError: share or limit is outside [0, 1], or confidence outside (0, 1).

    Source: Wilson's interval is the score test turned round: it leaves a limit p out when
    n (share - p)^2 > z^2 p (1 - p).
    """
    if not (0 <= share <= 1 and 0 <= limit <= 1):
        raise ValueError(
            f"expected a share and a limit from 0 to 1, got {share} and {limit}; percentages are shares x 100"
        )
    _check_confidence(confidence)
    if share == limit:
        return None
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    return math.floor((quantile / (share - limit)) ** 2 * limit * (1 - limit)) + 1


def _weighted_log(weight: float, value: float) -> float:
    if weight == 0:
        return 0.0
    return weight * math.log(value) if value > 0 else -math.inf


def _edge(excluded: Callable[[float], bool], *, inside: float, end: float) -> float:
    """Return where the interval around `inside` stops on its way to `end`; the end itself if it is in the interval."""
    if not excluded(end):
        return end
    outside = end
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if excluded(middle):
            outside = middle
        else:
            inside = middle
    return outside


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence between 0 and 1, got {confidence}; 0.95 is usual")


def _check_values(values: Real[np.ndarray, "..."] | Bool[np.ndarray, "..."]) -> None:
    if values.ndim != 2:
        raise ValueError(f"expected values of shape (images, cells), got {values.shape}; give each image a row")
    images, cells = values.shape
    if images < 2 or cells < 1:
        raise ValueError(f"expected at least 2 images and 1 cell, got {images} and {cells}; use more samples")
    if not np.isfinite(values).all():
        raise ValueError("expected finite values, got nan or inf; leave out the cells that were not measured")


def _resampled_means(
    values: Float64[np.ndarray, " images"], *, rng: np.random.Generator, resamples: int
) -> Float64[np.ndarray, " resamples"]:
    # One at a time: all indices at once would take resamples x images x 8 bytes, 160 MB for 10,000 images.
    n = len(values)
    return np.array([values[rng.integers(n, size=n)].mean() for _ in range(resamples)])
