"""Calibration: whether a classifier is right as often as its confidence says.

confidences, right or wrong --bins--> reliability diagram --> expected calibration error, with an interval
confidences of the same images, before and after -----------> confidence shift, with an interval
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from service.audit import statistics
from service.audit.measured import Measured

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

# Of equal width, as in most papers since Guo et al.; the error's size depends on the number.
BINS = 15
# Bootstrap samples, as for means.
_RESAMPLES = 2000


class Bin(NamedTuple):
    """One bar of a reliability diagram: images whose confidence is above `low` and at most `high`.

    `confidence` and `accuracy` are the means over its n images; both None where there are none.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def reliability(
    confidences: Float64[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], *, bins: int = BINS
) -> tuple[Bin, ...]:
    """Return the reliability diagram.

    Args:
        confidences: the softmax probability of the top-1 class, in [0, 1].
        correct: whether the top-1 class is the label.
        bins: how many, at least 1.

    Raises:
        ValueError: there are no images, the arguments differ in length, or a confidence is outside [0, 1].
    """
    _check(confidences, correct, bins=bins)
    edges = np.linspace(0, 1, bins + 1)
    places = _places(confidences, bins=bins)
    counts = np.bincount(places, minlength=bins)
    sums = np.bincount(places, weights=confidences, minlength=bins)
    right = np.bincount(places, weights=correct, minlength=bins)
    return tuple(
        Bin(
            float(edges[index]),
            float(edges[index + 1]),
            int(counts[index]),
            float(sums[index] / counts[index]) if counts[index] else None,
            float(right[index] / counts[index]) if counts[index] else None,
        )
        for index in range(bins)
    )


def expected_calibration_error(
    confidences: Float64[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], *, seed: int, bins: int = BINS
) -> Measured:
    """Return the expected calibration error: the gap between accuracy and confidence, averaged over bins by size.

    Chance alone opens gaps, so that the error of few images is too large, and that of their bootstrap samples once
    more. The upper bound keeps that, which makes it larger than need be. The lower one takes off all that chance may
    have added: by the triangle inequality the error exceeds the truth by no more than the gaps' own errors in sum.

    Args:
        confidences: the softmax probability of the top-1 class, in [0, 1].
        correct: whether the top-1 class is the label.
        seed: of the bootstrap, 0 or more.
        bins: of equal width, at least 1.

    Raises:
        ValueError: there are no images, the arguments differ in length, or a confidence is outside [0, 1].

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 3; Efron
    and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    _check(confidences, correct, bins=bins)
    n = len(confidences)
    places, gaps = _places(confidences, bins=bins), correct - confidences
    rng = np.random.default_rng(seed)
    observed = _gaps(places, gaps, bins=bins)
    drawn = np.stack([_drawn(places, gaps, rng=rng, bins=bins) for _ in range(_RESAMPLES)])
    chance = np.quantile(np.abs(drawn - observed).sum(axis=1), 0.975)
    largest = np.quantile(np.abs(drawn).sum(axis=1), 0.975)
    value = float(np.abs(observed).sum())
    low, high = max(0.0, value - float(chance)), min(1.0, max(value, float(largest)))
    return Measured(value, low, high, n)


def confidence_shift(before: Float64[np.ndarray, " n"], after: Float64[np.ndarray, " n"], *, seed: int) -> Measured:
    """Return by how much the mean confidence rises from one set of answers to another on the same images.

    Args:
        before: top-1 confidences, as on clean images or of the reference engine.
        after: as on corrupted or adversarial images, or of the target.
        seed: of the bootstrap over images, 0 or more.

    Returns:
        The mean of after minus before, in [-1, 1].

    Raises:
        ValueError: the arguments differ in length, or there are fewer than 2 images.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"expected as many confidences before as after, got {before.shape} and {after.shape}; pair them"
        )
    shift = after.astype(np.float64) - before.astype(np.float64)
    low, high = statistics.bootstrap_mean(shift[:, None], seed=seed, bounds=(-1.0, 1.0))
    return Measured(float(shift.mean()), low, high, len(shift), shift)


def _check(confidences: Float64[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], *, bins: int) -> None:
    if confidences.shape != correct.shape or confidences.ndim != 1 or len(confidences) == 0:
        raise ValueError(
            f"expected a confidence and a truth value for each image, got {confidences.shape} and {correct.shape}"
        )
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise ValueError("expected confidences from 0 to 1, got others; take the softmax of the logits")
    if bins < 1:
        raise ValueError(f"expected at least 1 bin, got {bins}; {BINS} are usual")


def _places(confidences: Float64[np.ndarray, " n"], *, bins: int) -> Int64[np.ndarray, " n"]:
    return np.asarray(np.digitize(confidences, np.linspace(0, 1, bins + 1)[1:-1], right=True))


def _gaps(
    places: Int64[np.ndarray, " n"], gaps: Float64[np.ndarray, " n"], *, bins: int
) -> Float64[np.ndarray, " bins"]:
    # A bin's mean gap, weighted by its share of the images, is the sum of its gaps / n.
    return np.asarray(np.bincount(places, weights=gaps, minlength=bins) / len(gaps))


def _drawn(
    places: Int64[np.ndarray, " n"], gaps: Float64[np.ndarray, " n"], *, rng: np.random.Generator, bins: int
) -> Float64[np.ndarray, " bins"]:
    chosen = rng.integers(len(gaps), size=len(gaps))
    return _gaps(places[chosen], gaps[chosen], bins=bins)
