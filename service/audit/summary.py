"""Reports -> one table, an engine a column: the same for the terminal, the page and the README."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.report import Interval, Report

_NONE = "–"


def table(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows; an engine whose audit has no such number shows a dash."""
    headings = ["", *(f"{r.target.model}@{r.target.version} ({r.target.precision})" for r in reports)]
    rows = [["accuracy", *(with_interval(r.clean.accuracy, r.clean.interval) for r in reports)]]
    rows += _robust_rows(reports)
    rows.append(["mean corruption error", *map(_corruptions, reports)])
    rows.append(["disagreement", *map(_disagreement, reports)])
    rows.append(["verdict", *(r.verdict for r in reports)])
    return headings, rows


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def with_interval(value: float, interval: Interval) -> str:
    """Return a share with its 95 % interval, in per cent."""
    return f"{percent(value)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _robust_rows(reports: Sequence[Report]) -> list[list[str]]:
    measured: dict[tuple[str, str, str], dict[int, str]] = {}
    for column, report in enumerate(reports):
        for attack in report.attacks:
            for result in attack.results:
                row = measured.setdefault((attack.id, attack.norm, result.epsilon), {})
                row[column] = with_interval(result.robust_accuracy, result.interval)
    return [
        [f"robust accuracy, {name}, {norm} {epsilon}", *(row.get(column, _NONE) for column in range(len(reports)))]
        for (name, norm, epsilon), row in measured.items()
    ]


def _corruptions(report: Report) -> str:
    found = report.corruptions
    return _NONE if found is None else with_interval(found.mean_error, found.interval)


def _disagreement(report: Report) -> str:
    found = report.differential
    if found is None:
        return _NONE
    return f"{with_interval(found.disagreement, found.interval)} with {found.reference.model}"
