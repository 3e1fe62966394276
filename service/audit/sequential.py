"""Sequential mode: gates looked at after every slice of the samples, until all are decided.

slice after slice --numbers so far--> look: confidence sequences --> comparisons, which stay decided --> stop?
A 95 % interval looked at again and again errs far more often than in 5 % of audits; a confidence sequence does not,
however often one looks. Its price is width: a number right at its limit takes more samples than it would otherwise.
"""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from service.audit import statistics
from service.audit.gates import Compared, compare
from service.audit.measured import Measured, needed, paired_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float64

    from service.audit.condition import Comparison
    from service.audit.gates import Gate, Judgement, Measure
    from service.audit.metric import Metric


class Savings(NamedTuple):
    """How many samples the plan has, and after how many the gates were decided (all, if they were not)."""

    planned: int
    used: int

    @property
    def share(self) -> float:
        """The share of samples that did not have to be looked at, in [0, 1]."""
        return 1 - self.used / self.planned


class Sequential:
    """The gates of an audit that stops early.

    The chance that any gate of the audit is decided wrongly is at most the error rate, which is shared among all
    comparisons alike (Bonferroni). The samples must be in random order, as `samples.load` gives them; the expected
    calibration error, which is no mean over images, is decided after the last sample alone, on its 95 % interval.

    Looks at the same numbers in the same order decide the same, so that a resumed audit looks at all slices again.

    Attributes:
        savings: of samples, up to the last look.
    """

    def __init__(self, gates: Mapping[str, Gate], *, error_rate: float, planned: int) -> None:
        """Prepare to look.

        Args:
            gates: by name; without any there is nothing to stop for, and `look` says so never.
            error_rate: in (0, 1).
            planned: samples of the whole audit, at least 1.

        Raises:
            ValueError: error_rate or planned is outside its range.
        """
        if not 0 < error_rate < 1:
            raise ValueError(f"expected an error rate between 0 and 1, got {error_rate}; 0.05 is usual")
        if planned < 1:
            raise ValueError(f"expected at least 1 planned sample, got {planned}; an audit needs images")
        self._gates = dict(gates)
        comparisons = dict.fromkeys(leaf for gate in gates.values() for leaf in gate.comparisons)
        self._confidence = 1 - error_rate / max(1, len(comparisons))
        self._compared = {comparison: Compared(comparison, None, "inconclusive") for comparison in comparisons}
        self.savings = Savings(planned, 0)

    def look(self, measure: Measure, *, samples: int) -> bool:
        """Look at the numbers of the first samples, and return whether all gates are decided.

        Args:
            measure: gives the metrics' numbers on these samples; None for what is not measured yet.
            samples: how many, more than at the look before.
        """
        last = samples >= self.savings.planned
        for comparison, before in self._compared.items():
            if before.outcome == "inconclusive":
                self._compared[comparison] = self._compare(comparison, measure, last=last)
        self.savings = Savings(self.savings.planned, samples)
        outcomes = {judgement.outcome for judgement in self.judgements().values()}
        return bool(outcomes) and "inconclusive" not in outcomes

    def judgements(self) -> dict[str, Judgement]:
        """Return what came of each gate, as of the last look.

        The intervals are those of the look that decided, and hold all together with the chance 1 - error_rate. The
        number of samples that would decide is an estimate, somewhat too small.
        """
        return {name: gate.decide(self._compared, samples=self.savings.used) for name, gate in self._gates.items()}

    def _compare(self, comparison: Comparison, measure: Measure, *, last: bool) -> Compared:
        if comparison.first.kind == "curve":
            return compare(comparison, measure) if last else Compared(comparison, None, "inconclusive")
        numbers = [measure(metric) for metric in comparison.metrics]
        known = [number for number in numbers if number is not None and number.n > 0]
        median = comparison.first.kind == "median"
        if len(known) < len(numbers) or (median and known[0].per_image is None):
            return Compared(comparison, None, "inconclusive")
        number = _bounded(comparison, known, confidence=self._confidence)
        outcome = comparison.outcome(number.low, number.high)
        enough = number.n if outcome != "inconclusive" else needed(number, comparison.limit, share=False)
        return Compared(comparison, number, outcome, needed=enough)


def _bounded(comparison: Comparison, numbers: list[Measured], *, confidence: float) -> Measured:
    if len(numbers) == 1:
        (number,) = numbers
        bounded = _median if comparison.first.kind == "median" else _mean
        return bounded(number, confidence=confidence)
    values = paired_values(*numbers)
    if values is not None:
        assert comparison.second is not None
        lowest = _lowest(comparison.first, comparison.second, values)
        return _paired(values, lowest=lowest, confidence=confidence)
    first, second = (_mean(number, confidence=(1 + confidence) / 2) for number in numbers)
    value = first.value - second.value
    return Measured(value, first.low - second.high, first.high - second.low, min(first.n, second.n))


def _mean(number: Measured, *, confidence: float) -> Measured:
    # A share times n is a whole number but for float64's rounding.
    total = min(float(number.n), max(0.0, number.value * number.n))
    low, high = statistics.confidence_sequence(total, number.n, confidence=confidence)
    return Measured(number.value, low, high, number.n)


def _median(number: Measured, *, confidence: float) -> Measured:
    """Leave out the medians that surely less than half of all values lie below, or above.

    Source: Howard and Ramdas, "Sequential estimation of quantiles with applications to A/B testing and best-arm
    identification", Bernoulli 28 (2022): a quantile is a value at which a share has its known size.
    """
    assert number.per_image is not None
    ordered, n = np.sort(number.per_image), number.n

    def may_be_half(count: int) -> bool:
        return statistics.confidence_sequence(count, n, confidence=confidence)[1] >= 0.5

    beyond = bisect.bisect_left(range(n // 2 + 1), x=True, key=may_be_half) - 1
    if beyond < 0:
        return Measured(number.value, -math.inf, math.inf, n)
    return Measured(number.value, float(ordered[beyond]), float(ordered[n - 1 - beyond]), n)


def _paired(values: Float64[np.ndarray, " n"], *, lowest: float, confidence: float) -> Measured:
    """Bound the mean of differences from `lowest` to 1, as that of values in [0, 1]."""
    n, width = len(values), 1 - lowest
    total = min(float(n), max(0.0, float((values - lowest).sum()) / width))
    low, high = statistics.confidence_sequence(total, n, confidence=confidence)
    return Measured(float(values.mean()), lowest + width * low, lowest + width * high, n)


def _lowest(first: Metric, second: Metric, values: Float64[np.ndarray, " n"]) -> float:
    """Return the least possible difference for an image."""
    # What is robust is classified correctly to begin with, but by a target that answers differently when asked again.
    nested = first.name == "accuracy" and second.name in {"robust_accuracy", "worst_case"}
    return 0.0 if nested and values.min() >= 0 else -1.0
