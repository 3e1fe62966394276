"""Reports -> one self-contained HTML page: no script, no font and no image from elsewhere."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from service.audit import figures, summary
from service.audit import report as schema

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.audit.report import CorruptionsReport, ExampleReport, Report


@dataclass(frozen=True)
class Picture:
    """An adversarial example: what the report says of it, and the PNG as a data URI."""

    example: ExampleReport
    source: str


def render(reports: Sequence[str], *, pictures: Sequence[Mapping[str, bytes]] = ()) -> str:
    """Render reports, each the JSON of one, side by side.

    Args:
        reports: at least one.
        pictures: for each report PNG files by name (`report.picture_name`); those that are not given are not shown.

    Raises:
        ValueError: a text is not a report.
    """
    parsed = [schema.parse(text) for text in reports]
    environment = Environment(
        loader=PackageLoader("service.audit", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": summary.percent, "shade": _shade, "measured": summary.measured}
    headings, rows = summary.table(parsed)
    return environment.get_template("page.html.j2").render(
        reports=parsed, headings=headings, rows=rows, plots=figures.robustness(parsed), grids=_grids(parsed),
        pictures=_pictures(parsed, pictures), figures=figures, width=figures.WIDTH, height=figures.HEIGHT,
        with_interval=summary.with_interval, distance=summary.distance,
    )  # fmt: skip


def _pictures(reports: Sequence[Report], pictures: Sequence[Mapping[str, bytes]]) -> list[tuple[Report, list[Picture]]]:
    shown = []
    for report, files in zip(reports, pictures, strict=False):
        own = [(each, files.get(each.picture)) for each in report.examples]
        shown.append((report, [Picture(each, _uri(content)) for each, content in own if content is not None]))
    return [(report, own) for report, own in shown if own]


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _grids(reports: Sequence[Report]) -> list[tuple[Report, list[int], dict[str, dict[int, float]]]]:
    return [(report, *_grid(report.corruptions)) for report in reports if report.corruptions is not None]


def _grid(corruptions: CorruptionsReport) -> tuple[list[int], dict[str, dict[int, float]]]:
    """Return severities, and by corruption the errors at those that were measured."""
    severities = sorted({cell.severity for cell in corruptions.cells})
    names = dict.fromkeys(cell.corruption for cell in corruptions.cells)
    errors = {(cell.corruption, cell.severity): cell.error for cell in corruptions.cells}
    return severities, {
        name: {severity: errors[name, severity] for severity in severities if (name, severity) in errors}
        for name in names
    }


def _shade(error: float) -> str:
    """Return the CSS of a heat map's cell: white at no error, deep orange at all wrong, the text always readable."""
    return f"background: rgb(213 94 0 / {error:.2f}); color: {'#fff' if error > 0.6 else '#222'}"
