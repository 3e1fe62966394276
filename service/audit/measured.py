"""A number with its interval, as gates see it, and the difference of two such numbers.

report --> Measured, Measured --difference, paired by image--> Measured --needed--> samples that would decide
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.audit import statistics

if TYPE_CHECKING:
    from jaxtyping import Float64

# Of the bootstrap of differences: one seed, so that the same values always get the same interval.
_SEED = 0


@dataclass(frozen=True, eq=False)
class Measured:
    """A number with its 95 % interval.

    Attributes:
        value: the number.
        low: lower bound.
        high: upper bound.
        n: images that it was measured on.
        per_image: (n,) each image's own value, whose mean `value` is (or, of a median, the median): the first n of the
            audit's samples, in their order, so that two numbers can be compared image by image. None for what is
            measured on other images, as the accuracy of one class, or not image by image.
    """

    value: float
    low: float
    high: float
    n: int
    per_image: Float64[np.ndarray, " n"] | None = None


def paired_values(first: Measured, second: Measured) -> Float64[np.ndarray, " n"] | None:
    """Return first minus second by image, on the images that both have; None where there are none such."""
    if first.per_image is None or second.per_image is None:
        return None
    n = min(len(first.per_image), len(second.per_image))
    if n == 0:
        return None
    return first.per_image[:n].astype(np.float64) - second.per_image[:n].astype(np.float64)


def difference(first: Measured, second: Measured) -> Measured:
    """Return first minus second: paired by image where both have values by image, as independent otherwise.

    Source: Tango (1998) for shares, the bootstrap over images for means; for independent numbers the square-and-add
    interval of Newcombe, "Interval estimation for the difference between independent proportions", Statistics in
    Medicine 17 (1998), method 10.
    """
    values = paired_values(first, second)
    if values is None:
        return _independent(first, second)
    n = len(values)
    if np.isin(values, (-1, 0, 1)).all():
        low, high = statistics.paired_difference(int((values > 0).sum()), int((values < 0).sum()), n=n)
    elif n < 2:
        low, high = -1.0, 1.0
    else:
        low, high = statistics.bootstrap_mean(values[:, None], seed=_SEED, bounds=(-1.0, 1.0))
    return Measured(float(values.mean()), low, high, n, values)


def needed(measured: Measured, limit: float, *, share: bool) -> int | None:
    """Return how many images would put the limit outside of the interval, if the number stays as it is.

    Args:
        measured: whose interval has the limit inside.
        limit: that it is compared with.
        share: whether it is a share of images with Wilson's interval, for which the answer is exact; other intervals
            are taken to shrink with the root of the number of images.

    Returns:
        A number above `measured.n`; None where no number of images would.
    """
    gap = abs(measured.value - limit)
    side = measured.value - measured.low if limit < measured.value else measured.high - measured.value
    if gap == 0 or not math.isfinite(gap) or not math.isfinite(side):
        return None
    if share and 0 <= limit <= 1:
        enough = statistics.samples_to_decide(measured.value, limit)
        assert enough is not None
    else:
        enough = math.ceil(measured.n * (side / gap) ** 2)
    return max(enough, measured.n + 1)


def _independent(first: Measured, second: Measured) -> Measured:
    value = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Measured(value, max(-1.0, value - down), min(1.0, value + up), min(first.n, second.n))
