"""Reports -> one table, an engine a row: the same for the terminal, the page and the README."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.report import Interval, Report


def table(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows; an engine whose audit has no such number shows a dash."""
    results = dict.fromkeys(
        (attack.id, result.epsilon, attack.norm)
        for report in reports
        for attack in report.attacks
        for result in attack.results
    )
    headings = ["engine", "accuracy", *(f"{name} {norm} {epsilon}" for name, epsilon, norm in results)]
    headings += ["mean corruption error", "disagreement", "verdict"]
    return headings, [_row(report, list(results)) for report in reports]


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def with_interval(value: float, interval: Interval) -> str:
    """Return a share with its 95 % interval, in per cent."""
    return f"{percent(value)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _row(report: Report, results: list[tuple[str, str, str]]) -> list[str]:
    measured = {
        (attack.id, result.epsilon): with_interval(result.robust_accuracy, result.interval)
        for attack in report.attacks
        for result in attack.results
    }
    corruptions, differential = report.corruptions, report.differential
    return [
        f"{report.target.model}@{report.target.version} ({report.target.precision})",
        with_interval(report.clean.accuracy, report.clean.interval),
        *(measured.get((name, epsilon), "–") for name, epsilon, _ in results),
        with_interval(corruptions.mean_error, corruptions.interval) if corruptions else "–",
        with_interval(differential.disagreement, differential.interval) if differential else "–",
        report.verdict,
    ]
