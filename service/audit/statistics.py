"""Intervals and tests that stand beside every number of an audit; those of proportions are in export.intervals.

a mean over images and corruptions    -> bootstrap_mean
two accuracies on the same images     -> mcnemar
"""

import numpy as np
from jaxtyping import Bool, Float64, Real


def bootstrap_mean(
    values: Real[np.ndarray, "images cells"] | Bool[np.ndarray, "images cells"],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Bound a mean over images and cells by the percentile bootstrap over images.

    Images are drawn with replacement and each brings all its cells, because the errors of one image under
    many corruptions are not independent: cells counted as samples of their own would give an interval far too
    narrow. Where all images agree the interval has no width; with few images, too, it is narrower than it
    claims.

    Args:
        values: (images, cells), any finite numbers; usually errors, 0 or 1, one column for each corruption
            and severity. At least 2 images and 1 cell.
        seed: of the draws, 0 or more; the same seed gives the same interval.
        confidence: the two-sided coverage, in (0, 1).
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
    return float(lower), float(upper)


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
