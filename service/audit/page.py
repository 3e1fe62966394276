"""Reports -> one self-contained HTML page: no script, no font and no image from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from service.audit import summary
from service.audit.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.report import AttackReport, CorruptionsReport

# The plot's inner area in SVG units.
_WIDTH, _HEIGHT = 360, 160

# Distinguishable with the common colour deficiencies (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Point:
    """A measured point of a plot, in SVG units, with its interval and what a reader may hover for."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Series:
    """An engine's points in one plot."""

    engine: str
    colour: str
    points: list[Point]

    @property
    def path(self) -> str:
        """The polyline through the points."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Plot:
    """Robust accuracy over epsilon for one attack."""

    title: str
    ticks: list[tuple[float, str]]
    series: list[Series]


def render(reports: Sequence[str]) -> str:
    """Render reports, each the JSON of one, side by side.

    Raises:
        ValueError: a text is not a report.
    """
    parsed = [Report.model_validate_json(text) for text in reports]
    environment = Environment(
        loader=PackageLoader("service.audit", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": summary.percent, "shade": _shade}
    headings, rows = summary.table(parsed)
    return environment.get_template("page.html.j2").render(
        reports=parsed, headings=headings, rows=rows, plots=_plots(parsed), grids=_grids(parsed),
        width=_WIDTH, height=_HEIGHT, with_interval=summary.with_interval,
    )  # fmt: skip


def _plots(reports: Sequence[Report]) -> list[Plot]:
    titles = dict.fromkeys(
        (attack.id, attack.name, attack.norm, attack.access) for r in reports for attack in r.attacks
    )
    return [_plot(reports, *key) for key in titles]


def _plot(reports: Sequence[Report], attack_id: str, name: str, norm: str, access: str) -> Plot:
    attacks = [(r, attack) for r in reports for attack in r.attacks if attack.id == attack_id]
    sizes = sorted({(result.size, result.epsilon) for _, attack in attacks for result in attack.results})
    widest = sizes[-1][0]
    series = [
        Series(f"{r.target.model}@{r.target.version}", _COLOURS[index % len(_COLOURS)], _points(r, attack, widest))
        for index, (r, attack) in enumerate(attacks)
    ]
    ticks = [(0.0, "0"), *((_WIDTH * size / widest, epsilon) for size, epsilon in sizes)]
    return Plot(f"{attack_id}: {name}, {access}, {norm} epsilon", ticks, series)


def _points(report: Report, attack: AttackReport, widest: float) -> list[Point]:
    clean = (0.0, report.clean.accuracy, report.clean.interval, "no attack")
    measured = [(r.size, r.robust_accuracy, r.interval, f"epsilon {r.epsilon}") for r in attack.results]
    return [
        Point(
            x=_WIDTH * size / widest,
            y=_HEIGHT * (1 - value),
            low=_HEIGHT * (1 - interval[0]),
            high=_HEIGHT * (1 - interval[1]),
            title=f"{label}: {summary.with_interval(value, interval)}",
        )
        for size, value, interval, label in sorted([clean, *measured])
    ]


def _grids(reports: Sequence[Report]) -> list[tuple[Report, list[int], dict[str, dict[int, float]]]]:
    return [(report, *_grid(report.corruptions)) for report in reports if report.corruptions is not None]


def _grid(corruptions: CorruptionsReport) -> tuple[list[int], dict[str, dict[int, float]]]:
    severities = sorted({cell.severity for cell in corruptions.cells})
    names = dict.fromkeys(cell.corruption for cell in corruptions.cells)
    errors = {(cell.corruption, cell.severity): cell.error for cell in corruptions.cells}
    return severities, {name: {severity: errors[name, severity] for severity in severities} for name in names}


def _shade(error: float) -> str:
    """Return the CSS of a heat map's cell: white at no error, deep orange at all wrong, the text always readable."""
    return f"background: rgb(213 94 0 / {error:.2f}); color: {'#fff' if error > 0.6 else '#222'}"
