"""Numbers of reports -> plots in SVG units: what a template draws without any arithmetic.

Report --robustness, distances, queries, reliability, classes--> Plot: ticks, lines, points with intervals, bars
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from service.audit import summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.report import AttackReport, CalibrationReport, EpsilonReport, Histogram, Report, Spread

# A plot's inner area in SVG units.
WIDTH, HEIGHT = 360, 160

# Distinguishable with the common colour deficiencies (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

# Classes in a figure, those of lowest accuracy first: more cannot be read.
_CLASSES = 20
# Ticks of a histogram's axis.
_TICKS = 4


@dataclass(frozen=True)
class Point:
    """A measured point, with its interval and what a reader may hover for."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Series:
    """One line: `trace` holds points without marks, drawn lightly."""

    name: str
    colour: str
    points: tuple[Point, ...]
    trace: tuple[tuple[float, float], ...] = ()

    @property
    def path(self) -> str:
        """The polyline through the points."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)

    @property
    def faint(self) -> str:
        """The polyline of the trace."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.trace)


@dataclass(frozen=True)
class Bar:
    """A rectangle from the axis upwards."""

    x: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Plot:
    """One figure; `diagonal` is the line on which x equals y."""

    title: str
    ticks: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str], ...]
    series: tuple[Series, ...] = ()
    bars: tuple[Bar, ...] = ()
    diagonal: bool = False


# Shares on the vertical axis.
_SHARES = tuple((HEIGHT * (1 - quarter / 4), f"{25 * quarter} %") for quarter in range(5))


def robustness(reports: Sequence[Report]) -> list[Plot]:
    """Plot robust accuracy against epsilon, an attack a plot and a target a line."""
    titles = dict.fromkeys((a.id, a.name, a.norm, a.access) for r in reports for a in r.attacks if a.results)
    return [_against_epsilon(reports, *key) for key in titles]


def distributions(report: Report) -> list[Plot]:
    """Plot the smallest perturbations and the queries to success of each attack."""
    plots = []
    for attack in report.attacks:
        plots += _histogram(f"{attack.id}: smallest perturbations, {attack.norm}", attack.distances)
        plots += _histogram(f"{attack.id}: queries to success", attack.queries_to_success, logarithmic=True)
    return plots


def reliability(found: CalibrationReport) -> Plot:
    """Plot accuracy against confidence; bars on the diagonal are those of a calibrated classifier."""
    bars = tuple(
        Bar(
            x=WIDTH * each.low,
            width=WIDTH * (each.high - each.low),
            height=HEIGHT * each.accuracy,
            title=f"confidence {each.confidence:.3f}, accuracy {each.accuracy:.3f}, n = {each.n}",
        )
        for each in found.bins
        if each.accuracy is not None and each.confidence is not None
    )
    ticks = tuple((WIDTH * quarter / 4, f"{25 * quarter} %") for quarter in range(5))
    return Plot("accuracy against confidence", ticks, _SHARES, bars=bars, diagonal=True)


def classes(report: Report) -> list[tuple[str, str, list[str]]]:
    """Return a row for each class, lowest accuracy first: name, accuracy, robust accuracies at the largest epsilons."""
    worst = sorted(report.clean.classes, key=lambda each: each.accuracy)[:_CLASSES]
    columns = [{each.name: each for each in largest.classes} for _, largest in largest_epsilons(report)]
    return [
        (
            own.name,
            summary.with_interval(own.accuracy, own.interval),
            [
                summary.with_interval(column[own.name].accuracy, column[own.name].interval)
                if own.name in column
                else "–"
                for column in columns
            ],
        )
        for own in worst
    ]


def largest_epsilons(report: Report) -> list[tuple[AttackReport, EpsilonReport]]:
    """Return each attack with its result at the largest epsilon."""
    return [(each, max(each.results, key=lambda result: result.size)) for each in report.attacks if each.results]


def _against_epsilon(reports: Sequence[Report], attack_id: str, name: str, norm: str, access: str) -> Plot:
    attacks = [(r, a) for r in reports for a in r.attacks if (a.id, a.norm) == (attack_id, norm) and a.results]
    sizes = sorted({(result.size, result.epsilon) for _, attack in attacks for result in attack.results})
    widest = sizes[-1][0]
    series = tuple(
        Series(
            name=report.target.title,
            colour=COLOURS[index % len(COLOURS)],
            points=_points(report, attack, widest),
            trace=tuple((WIDTH * p.size / widest, HEIGHT * (1 - p.accuracy)) for p in attack.curve if p.size <= widest),
        )
        for index, (report, attack) in enumerate(attacks)
    )
    ticks = ((0.0, "0"), *((WIDTH * size / widest, epsilon) for size, epsilon in sizes))
    return Plot(f"{attack_id}: {name}, {access}, {norm} epsilon", ticks, _SHARES, series)


def _points(report: Report, attack: AttackReport, widest: float) -> tuple[Point, ...]:
    clean = (0.0, report.clean.accuracy, report.clean.interval, "no attack")
    measured = [(r.size, r.robust_accuracy, r.interval, f"epsilon {r.epsilon}") for r in attack.results]
    return tuple(
        Point(
            x=WIDTH * size / widest,
            y=HEIGHT * (1 - value),
            low=HEIGHT * (1 - interval[0]),
            high=HEIGHT * (1 - interval[1]),
            title=f"{label}: {summary.with_interval(value, interval)}",
        )
        for size, value, interval, label in sorted([clean, *measured])
    )


def _histogram(title: str, found: Spread | None, *, logarithmic: bool = False) -> list[Plot]:
    if found is None or found.histogram is None:
        return []
    histogram = found.histogram
    most = max(histogram.counts)
    places = _places(histogram, logarithmic=logarithmic)
    bars = tuple(
        Bar(x=left, width=right - left, height=HEIGHT * count / most, title=f"{low:.3g} to {high:.3g}: {count} images")
        for (left, right), (low, high), count in zip(
            pairwise(places), pairwise(histogram.edges), histogram.counts, strict=True
        )
    )
    every = max(1, len(histogram.counts) // _TICKS)
    pairs = list(zip(places, histogram.edges, strict=True))[::every]
    ticks = tuple((x, f"{edge:.3g}") for x, edge in pairs)
    return [Plot(f"{title} ({found.found} of {found.n} images)", ticks, ((0.0, str(most)), (HEIGHT, "0")), bars=bars)]


def _places(histogram: Histogram, *, logarithmic: bool) -> list[float]:
    """Return where edges are; a histogram of one value is one bar over the whole width."""
    edges = [math.log(edge) for edge in histogram.edges] if logarithmic else list(histogram.edges)
    width = edges[-1] - edges[0]
    if width == 0:
        return [0.0, float(WIDTH)]
    return [WIDTH * (edge - edges[0]) / width for edge in edges]
