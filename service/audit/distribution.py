"""Values by image, of which some may be unknown or infinite -> quantiles, the median's interval, a histogram.

[0.02, 0.05, inf, ...] --of--> Spread
"""

from __future__ import annotations

from math import ceil, isfinite
from typing import TYPE_CHECKING

import numpy as np

from service.audit import statistics
from service.audit.report import Histogram, Quantiles, Spread

if TYPE_CHECKING:
    from jaxtyping import Float64

# What is reported of a distribution.
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

# Bins of a histogram: enough for a shape, few enough for some hundred images.
_BINS = 20


def quantiles(values: Float64[np.ndarray, " n"]) -> Quantiles:
    """Return the quantiles of n values, at least one; inf stands for a value that was not found.

    A quantile is a value that occurs, never a mean of two of them, so that infinite ones do no harm.
    """
    ordered = np.sort(values)
    low, high = statistics.median_interval(ordered.tolist())
    return Quantiles(
        n=len(values),
        found=int(np.isfinite(values).sum()),
        values={f"{share:g}": _known(float(ordered[ceil(share * len(values)) - 1])) for share in QUANTILES},
        interval=(_known(max(low, 0.0)), _known(high)),
    )


def spread(values: Float64[np.ndarray, " n"], *, logarithmic: bool = False) -> Spread:
    """Return the quantiles with a histogram of the values found that are above 0.

    Args:
        values: at least one, 0 or more; inf for what was not found.
        logarithmic: bins have equal ratios instead of equal widths.
    """
    return Spread(**quantiles(values).model_dump(), histogram=_histogram(values, logarithmic=logarithmic))


def _known(value: float) -> float | None:
    return value if isfinite(value) else None


def _histogram(values: Float64[np.ndarray, " n"], *, logarithmic: bool) -> Histogram | None:
    found = values[np.isfinite(values) & (values > 0)]
    if not len(found):
        return None
    low, high = (float(found.min()), float(found.max())) if logarithmic else (0.0, float(found.max()))
    if low == high:
        return Histogram(edges=(low, high), counts=(len(found),))
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    # Their rounding must not lose the largest value.
    edges[0], edges[-1] = low, high
    counts, _ = np.histogram(found, bins=edges)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
