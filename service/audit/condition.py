"""Conditions: what a gate's text says, as comparisons under and, or, not.

'accuracy >= 0.9 and not ece > 0.05' --parse--> Every(Comparison, Not(Comparison))
"""

from __future__ import annotations

import ast
import math
import operator
from dataclasses import dataclass
from typing import Literal

from service.audit import metric
from service.audit.metric import Metric

Outcome = Literal["pass", "fail", "inconclusive"]

_FORM = (
    "expected METRIC OP NUMBER or METRIC - METRIC OP NUMBER, joined by and, or, not, "
    'as in \'robust_accuracy["pgd", "8/255"] >= 0.40\''
)
_OPERATORS = {ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Lt: "<"}
_COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
# Characters: far more than a gate needs, and too few to exhaust the parser's recursion.
_LONGEST = 1000


@dataclass(frozen=True)
class Comparison:
    """One comparison of a number with a limit.

    Attributes:
        first: what is compared.
        second: what is subtracted from it before; None for nothing.
        operator: ">=", ">", "<=" or "<".
        limit: the number on the right.
    """

    first: Metric
    second: Metric | None
    operator: str
    limit: float

    def __str__(self) -> str:
        left = f"{self.first} - {self.second}" if self.second else str(self.first)
        return f"{left} {self.operator} {self.limit:g}"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """One or two."""
        return (self.first, self.second) if self.second else (self.first,)

    def holds(self, value: float) -> bool:
        """Return whether a value is on the right side of the limit."""
        return bool(_COMPARISONS[self.operator](value, self.limit))

    def outcome(self, low: float, high: float) -> Outcome:
        """Pass (or fail) only when the whole interval lies on one side of the limit."""
        worst, best = (low, high) if self.operator in {">=", ">"} else (high, low)
        if self.holds(worst):
            return "pass"
        return "inconclusive" if self.holds(best) else "fail"


@dataclass(frozen=True)
class Not:
    """The opposite of a condition."""

    operand: Node


@dataclass(frozen=True)
class Every:
    """Several conditions, all of which must hold."""

    operands: tuple[Node, ...]


@dataclass(frozen=True)
class Some:
    """Several conditions, one of which must hold."""

    operands: tuple[Node, ...]


Node = Comparison | Not | Every | Some


def leaves(node: Node) -> list[Comparison]:
    """Return the comparisons of a condition, in the order in which they are written."""
    match node:
        case Comparison():
            return [node]
        case Not(operand):
            return leaves(operand)
    return [leaf for operand in node.operands for leaf in leaves(operand)]


def parse(text: object) -> Node:
    """Parse a condition.

    Raises:
        ValueError: it is none, names an unknown metric, or compares with a limit that the metric cannot have.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError(f"{_FORM}, got {text!r:.100}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{_FORM}, got {text!r}") from None
    try:
        return _condition(tree)
    except ValueError as error:
        raise ValueError(f"{error}, in {text!r}") from None


def _condition(node: ast.expr) -> Node:
    match node:
        case ast.BoolOp(op=ast.And(), values=values):
            return Every(tuple(map(_condition, values)))
        case ast.BoolOp(values=values):
            return Some(tuple(map(_condition, values)))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return Not(_condition(operand))
        case ast.Compare(left=left, ops=[comparison], comparators=[right]) if type(comparison) in _OPERATORS:
            return _comparison(left, _OPERATORS[type(comparison)], right)
    raise ValueError(f"{_FORM}, got {ast.unparse(node)!r}")


def _comparison(left: ast.expr, comparison: str, right: ast.expr) -> Comparison:
    limit = _number(right)
    match left:
        case ast.BinOp(left=first, op=ast.Sub(), right=second):
            return _checked(Comparison(metric.from_node(first), metric.from_node(second), comparison, limit))
    return _checked(Comparison(metric.from_node(left), None, comparison, limit))


def _number(node: ast.expr) -> float:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand)
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) < math.inf:
            try:
                return float(value)
            except OverflowError:
                pass
    raise ValueError(f"{_FORM}; expected a number on the right, got {ast.unparse(node)!r}")


def _checked(comparison: Comparison) -> Comparison:
    kinds = {number.kind for number in comparison.metrics}
    if comparison.second is not None and not kinds <= {"share", "mean"}:
        raise ValueError(f"expected a difference of means over images, got {comparison}; compare each by itself")
    lowest = -1.0 if comparison.second is not None else 0.0
    highest = math.inf if "median" in kinds else 1.0
    if not lowest <= comparison.limit <= highest:
        raise ValueError(f"expected a limit from {lowest:g} to {highest:g}, got {comparison.limit:g}; 40 % is 0.4")
    return comparison
