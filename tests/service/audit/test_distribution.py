from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.audit import distribution

VALUES = st.lists(st.floats(0, 100) | st.just(float("inf")), min_size=1, max_size=60)


def test_quantiles_are_values_that_occur() -> None:
    found = distribution.quantiles(np.array([0.4, 0.1, 0.2, np.inf]))
    assert found.values == {"0.1": 0.1, "0.25": 0.1, "0.5": 0.2, "0.75": 0.4, "0.9": None}
    assert (found.n, found.found) == (4, 3)
    # Four values bound no median at 95 %.
    assert found.interval == (0.0, None)


def test_the_medians_interval_holds_it() -> None:
    found = distribution.quantiles(np.arange(1.0, 101.0))
    assert found.interval == (40, 61)


@given(VALUES)
def test_a_histogram_counts_every_value_found_above_zero(values: list[float]) -> None:
    for logarithmic in (False, True):
        found = distribution.spread(np.array(values), logarithmic=logarithmic)
        expected = sum(0 < value < float("inf") for value in values)
        assert (0 if found.histogram is None else sum(found.histogram.counts)) == expected


@given(VALUES)
def test_quantiles_never_fall(values: list[float]) -> None:
    found = list(distribution.quantiles(np.array(values)).values.values())
    known = [value for value in found if value is not None]
    assert known == sorted(known)
    assert found[: len(known)] == known
