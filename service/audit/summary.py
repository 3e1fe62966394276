"""Reports -> one table, a target a column: the same for the terminal, the page and the README."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.report import GateReport, OpenInterval, Report

_NONE = "–"


def table(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows; a target whose audit has no such number shows a dash."""
    headings = ["", *map(_heading, reports)]
    rows = [["accuracy", *(with_interval(r.clean.accuracy, r.clean.interval) for r in reports)]]
    rows += _robust_rows(reports)
    rows.append(["worst case of all attacks", *map(_worst_case, reports)])
    rows.append(["mean corruption error", *map(_corruptions, reports)])
    rows.append(["disagreement", *map(_disagreement, reports)])
    rows.append(["expected calibration error", *map(_calibration, reports)])
    measured = [row for row in rows if any(cell != _NONE for cell in row[1:])]
    return headings, [*measured, ["verdict", *map(_verdict, reports)]]


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """Return a share with its 95 % interval, in per cent."""
    return f"{percent(value)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def distance(value: float | None, interval: OpenInterval) -> str:
    """Return a distance with its interval; what no image has is said to be above all that were found."""
    low, high = ("none" if bound is None else f"{bound:.3g}" for bound in interval)
    return f"{'not found' if value is None else f'{value:.3g}'} [{low}, {high}]"


def measured(gate: GateReport) -> str:
    """Return what a gate compared, and how many samples would decide it if it is not decided."""
    said = "; ".join(
        f"{term.text}: not measured"
        if term.interval is None
        else f"{term.text}: {distance(term.value, term.interval)}, n = {term.n}"
        for term in gate.terms
    )
    return said if gate.samples is None else f"{said}; {gate.samples} samples would decide"


def _heading(report: Report) -> str:
    target = report.target
    return f"{target.title} ({target.precision or target.endpoint or target.runtime})"


def _robust_rows(reports: Sequence[Report]) -> list[list[str]]:
    found: dict[str, dict[int, str]] = {}
    for column, report in enumerate(reports):
        for attack in report.attacks:
            for result in attack.results:
                row = found.setdefault(f"robust accuracy, {attack.id}, {attack.norm} {result.epsilon}", {})
                row[column] = with_interval(result.robust_accuracy, result.interval)
    return _rows(found, len(reports))


def _rows(found: dict[str, dict[int, str]], columns: int) -> list[list[str]]:
    return [[name, *(row.get(column, _NONE) for column in range(columns))] for name, row in found.items()]


def _worst_case(report: Report) -> str:
    found = report.worst_case
    return _NONE if found is None or len(report.attacks) == 1 else with_interval(found.accuracy, found.interval)


def _corruptions(report: Report) -> str:
    found = report.corruptions
    return _NONE if found is None else with_interval(found.mean_error, found.interval)


def _disagreement(report: Report) -> str:
    found = report.differential
    if found is None:
        return _NONE
    return f"{with_interval(found.disagreement, found.interval)} with {found.reference.model}"


def _calibration(report: Report) -> str:
    found = report.calibration
    return _NONE if found is None else with_interval(found.ece, found.interval)


def _verdict(report: Report) -> str:
    return report.verdict if report.complete else f"{report.verdict} (partial)"
