"""Gates: comparisons of a report's numbers with limits, decided by the numbers' intervals.

'robust_accuracy["pgd", "8/255"] >= 0.40 and ece <= 0.05'
    --parse--> Gate: comparisons under and, or, not --judge, number by number--> pass | fail | inconclusive
A comparison is of one metric, or of the difference of two, which is decided by the interval of the paired difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import core_schema

from service.audit import condition, measured
from service.audit.condition import Comparison, Node, Not, Outcome, Some
from service.audit.measured import Measured
from service.audit.metric import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from collections.abc import Set as AbstractSet

    # Gives a metric's number; None for what was not measured, as in a partial report.
    Measure = Callable[[Metric], Measured | None]

__all__ = ["Compared", "Comparison", "Gate", "Judgement", "Measured", "Metric", "Outcome", "compare", "parse"]

_NEGATED: dict[Outcome, Outcome] = {"pass": "fail", "fail": "pass", "inconclusive": "inconclusive"}


@dataclass(frozen=True, eq=False)
class Compared:
    """One comparison, decided or not.

    Attributes:
        comparison: which.
        measured: the number on its left, with the interval that decided; None if it was not measured.
        outcome: of this comparison alone.
        needed: on how many of its images it is decided, if the number stays as it is; None if on no number.
    """

    comparison: Comparison
    measured: Measured | None
    outcome: Outcome
    needed: int | None = None


@dataclass(frozen=True, eq=False)
class Judgement:
    """What came of a gate.

    Attributes:
        outcome: of the whole gate.
        comparisons: in the order in which they are written.
        samples: of an inconclusive gate, how many samples of the plan would decide it, if all numbers stay as they
            are; None if none would, and for a decided gate.
    """

    outcome: Outcome
    comparisons: tuple[Compared, ...]
    samples: int | None = None


def compare(comparison: Comparison, measure: Measure) -> Compared:
    """Decide one comparison on the 95 % interval of its number."""
    number = _number(comparison, measure)
    if number is None:
        return Compared(comparison, None, "inconclusive")
    outcome = comparison.outcome(number.low, number.high)
    if outcome != "inconclusive":
        return Compared(comparison, number, outcome, needed=number.n)
    share = comparison.second is None and comparison.first.kind == "share"
    return Compared(comparison, number, outcome, needed=measured.needed(number, comparison.limit, share=share))


def _number(comparison: Comparison, measure: Measure) -> Measured | None:
    numbers = [measure(metric) for metric in comparison.metrics]
    match numbers:
        case [Measured() as first, Measured() as second]:
            return measured.difference(first, second)
        case [Measured() as only]:
            return only
    return None


@dataclass(frozen=True)
class Gate:
    """One gate, parsed from its text.

    Attributes:
        text: as it was written.
        condition: what it says.
    """

    text: str
    condition: Node

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """All of them, in the order in which they are written."""
        return tuple(condition.leaves(self.condition))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What must be measured, each once."""
        return tuple(dict.fromkeys(metric for comparison in self.comparisons for metric in comparison.metrics))

    def judge(self, measure: Measure, *, samples: int) -> Judgement:
        """Decide the gate on 95 % intervals.

        Args:
            measure: gives the metrics' numbers.
            samples: images of the audit.
        """
        return self.decide(
            {comparison: compare(comparison, measure) for comparison in self.comparisons}, samples=samples
        )

    def decide(self, compared: dict[Comparison, Compared], *, samples: int) -> Judgement:
        """Put the outcomes of the comparisons together.

        Args:
            compared: of every comparison.
            samples: images of the audit on which they were made.
        """
        view = _view(self.condition, compared, samples)
        comparisons = tuple(compared[comparison] for comparison in self.comparisons)
        if view.outcome != "inconclusive" or math.isinf(view.needed):
            return Judgement(view.outcome, comparisons)
        return Judgement(view.outcome, comparisons, max(samples + 1, math.ceil(view.needed)))

    def check_subject(
        self,
        name: str,
        attacks: AbstractSet[tuple[str, str]],
        *,
        corruptions: bool,
        reference: bool,
        class_names: Collection[str] | None = None,
    ) -> None:
        """Check that a plan measures what this gate compares.

        Args:
            name: of the gate in the plan.
            attacks: the plan's pairs of attack id and epsilon.
            corruptions: whether there are any.
            reference: whether there is a reference engine.
            class_names: of the target; None while they are unknown.

        Raises:
            ValueError: it does not.
        """
        for number in self.metrics:
            try:
                number.check(attacks, corruptions=corruptions, reference=reference, class_names=class_names)
            except ValueError as error:
                raise ValueError(f"gates.{name}: {error}") from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda gate: gate.text)
        )


class _View(NamedTuple):
    """An outcome; which way the values lean; and how many samples put the whole interval there, inf if none do."""

    outcome: Outcome
    leans: bool
    needed: float


def _view(node: Node, compared: dict[Comparison, Compared], samples: int) -> _View:
    match node:
        case Comparison():
            return _view_of(compared[node], samples)
        case Not(operand):
            return _negated(_view(operand, compared, samples))
        case Some(operands):
            return _negated(_all_of([_negated(_view(operand, compared, samples)) for operand in operands]))
    return _all_of([_view(operand, compared, samples) for operand in node.operands])


def _view_of(compared: Compared, samples: int) -> _View:
    number = compared.measured
    if compared.outcome != "inconclusive":
        return _View(compared.outcome, compared.outcome == "pass", 0.0)
    if number is None or compared.needed is None:
        # Which way it leans makes no difference: it is never decided, so only the others can decide the whole.
        return _View("inconclusive", leans=True, needed=math.inf)
    # Only some of the samples are of a class.
    of_class = any(metric.name == "class_accuracy" for metric in compared.comparison.metrics)
    needed = compared.needed * samples / number.n if of_class else compared.needed
    return _View("inconclusive", compared.comparison.holds(number.value), needed)


def _negated(view: _View) -> _View:
    return _View(_NEGATED[view.outcome], not view.leans, view.needed)


def _all_of(views: list[_View]) -> _View:
    """One failure decides against all; else all must pass."""
    failing = [view.needed for view in views if not view.leans]
    needed = min(failing) if failing else max(view.needed for view in views)
    outcomes = {view.outcome for view in views}
    if "fail" in outcomes:
        return _View("fail", leans=False, needed=needed)
    return _View("inconclusive" if "inconclusive" in outcomes else "pass", not failing, needed)


def parse(text: object) -> Gate:
    """Parse a gate.

    Raises:
        ValueError: see `condition.parse`.
    """
    return text if isinstance(text, Gate) else Gate(str(text), condition.parse(text))
