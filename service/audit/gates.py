"""Gates: one comparison of one number of the report with a limit, decided by the number's interval.

'robust_accuracy["pgd", "8/255"] >= 0.40'  --parse-->  Gate  --judge-->  pass | fail | inconclusive
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic_core import core_schema

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

Outcome = Literal["pass", "fail", "inconclusive"]

_FORM = 'expected SUBJECT OP NUMBER, as in \'robust_accuracy["pgd", "8/255"] >= 0.40\''
_PLAIN_SUBJECTS = ("accuracy", "mean_error", "disagreement", "worst_case")
_OPERATORS = {ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Lt: "<"}
_COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


class Measured(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gate:
    """One gate, parsed from its text.

    Attributes:
        text: as it was written.
        subject: "accuracy", "robust_accuracy", "worst_case", "mean_error" (corruptions) or "disagreement".
        key: (attack id, epsilon) for robust_accuracy, else empty.
        operator: ">=", ">", "<=" or "<".
        limit: the number on the right.
    """

    text: str
    subject: str
    key: tuple[str, ...]
    operator: str
    limit: float

    def judge(self, measured: Measured) -> Outcome:
        """Pass (or fail) only when the whole interval lies on one side of the limit."""
        holds = _COMPARISONS[self.operator]
        worst, best = (measured.low, measured.high) if self.operator in {">=", ">"} else (measured.high, measured.low)
        if holds(worst, self.limit):
            return "pass"
        return "inconclusive" if holds(best, self.limit) else "fail"

    def check_subject(
        self, name: str, attacks: AbstractSet[tuple[str, str]], *, corruptions: bool, reference: bool
    ) -> None:
        """Raise ValueError if the plan never measures what this gate compares."""
        if self.subject in {"robust_accuracy", "worst_case"} and not attacks:
            raise ValueError(f"gates.{name}: {self.subject} needs an attack in the plan; add an [[attacks]] table")
        if self.subject == "robust_accuracy" and self.key not in attacks:
            known = ", ".join(f'["{attack}", "{epsilon}"]' for attack, epsilon in sorted(attacks))
            raise ValueError(f"gates.{name}: expected one of robust_accuracy{known}, got {self.text!r}")
        if self.subject == "mean_error" and not corruptions:
            raise ValueError(f"gates.{name}: mean_error needs corruptions in the plan; add a [corruptions] table")
        if self.subject == "disagreement" and not reference:
            raise ValueError(f"gates.{name}: disagreement needs a reference; add a [differential] table")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda gate: gate.text)
        )


def parse(text: object) -> Gate:
    """Parse a gate.

    Raises:
        ValueError: it is not one comparison of a known subject with a number.
    """
    if isinstance(text, Gate):
        return text
    if not isinstance(text, str):
        raise ValueError(f"{_FORM}, got {text!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"{_FORM}, got {text!r}") from None
    match tree:
        case ast.Compare(left=left, ops=[comparison], comparators=[ast.Constant(value=int() | float() as limit)]) if (
            type(comparison) in _OPERATORS
        ):
            subject, key = _subject(left, text)
            return Gate(text, subject, key, _OPERATORS[type(comparison)], float(limit))
    raise ValueError(f"{_FORM}, got {text!r}")


def _subject(node: ast.expr, text: str) -> tuple[str, tuple[str, ...]]:
    match node:
        case ast.Name(id=name) if name in _PLAIN_SUBJECTS:
            return name, ()
        case ast.Subscript(
            value=ast.Name(id="robust_accuracy"),
            slice=ast.Tuple(elts=[ast.Constant(value=str(attack)), ast.Constant(value=str(epsilon))]),
        ):
            return "robust_accuracy", (attack, epsilon)
    subjects = ", ".join((*_PLAIN_SUBJECTS, 'robust_accuracy["attack id", "epsilon"]'))
    raise ValueError(f"expected one of the subjects {subjects}, got {text!r}")
