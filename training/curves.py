"""Loss and accuracy against the epoch, as a picture.

metrics.jsonl -> `draw` -> curves.png
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training import metrics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

CURVES = "curves.png"
SIZE = (9.0, 3.6)  # inches, both panels
RESOLUTION = 160  # dots per inch: 1440 pixels across
FEW = 30  # epochs up to which each is marked
DECADES = 20.0  # ratio of the largest to the smallest loss from which the axis is logarithmic
# Okabe and Ito's colours, which colour-blind readers tell apart; line styles tell them apart in print
BLUE, VERMILION, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#404040"
GRID = "#e4e4e4"


def draw(folder: Path, *, best_epoch: int, test_accuracy: float) -> None:
    """Draw the curves of the run in `folder` into its curves.png.

    Args:
        folder: where the run's metrics are, and the picture goes.
        best_epoch: the epoch whose weights were tested.
        test_accuracy: theirs, a share in [0, 1].

    Raises:
        FileNotFoundError: there are no metrics.
        ValueError: the metrics are damaged, or of no epoch.
    """
    # a second to import, once a run; without pyplot, which keeps figures and chooses a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    records = metrics.read(folder)
    if not records:
        msg = f"{folder / metrics.METRICS}: expected the record of an epoch at least, got an empty file"
        raise ValueError(msg)
    figure = Figure(figsize=SIZE, dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    _losses(losses, records)
    _accuracies(accuracies, records, best_epoch=best_epoch, test_accuracy=test_accuracy)
    for axes in (losses, accuracies):
        _finish(axes, epochs=[record["epoch"] for record in records])
    figure.savefig(folder / CURVES)


def _losses(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    _curve(axes, records, "loss", label="training", colour=BLUE)
    _curve(axes, records, "tenet_loss", label="TENET", colour=VERMILION, style="--")
    values = [r[key] for r in records for key in ("loss", "tenet_loss") if r[key] is not None]
    if min(values) > 0 and max(values) / min(values) >= DECADES:
        _logarithmic(axes)
    axes.set_ylabel("mean loss (nats)")


def _logarithmic(axes: Axes) -> None:
    """Make the axis logarithmic, with ticks at 1, 2, 5, 10, ... written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: PLC0415  # as in `draw`

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _accuracies(axes: Axes, records: Sequence[dict[str, Any]], *, best_epoch: int, test_accuracy: float) -> None:
    _curve(axes, records, "correct", label="training", colour=BLUE, scale=100)
    _curve(axes, records, "validation_accuracy", label="validation", colour=VERMILION, style="--", scale=100)
    _curve(axes, records, "robust_accuracy", label="validation, attacked", colour=GREEN, style="-.", scale=100)
    label = f"test, {test_accuracy:.1%} (epoch {best_epoch})".replace("%", " %")
    axes.plot([best_epoch], [100 * test_accuracy], "D", color=INK, markersize=6, label=label, zorder=4, clip_on=False)
    axes.set_ylabel("accuracy (%)")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, min(top, 100.0) if bottom < 100 else top)


def _curve(
    axes: Axes,
    records: Sequence[dict[str, Any]],
    key: str,
    *,
    label: str,
    colour: str,
    style: str = "-",
    scale: float = 1.0,
) -> None:
    """Draw a line through the epochs that have a value, if any has."""
    points = [(r["epoch"], scale * r[key]) for r in records if r[key] is not None]
    if points:
        marker = "o" if len(records) <= FEW else None
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=label, clip_on=False)


def _finish(axes: Axes, *, epochs: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  # as in `draw`

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    # above the panel, where no curve can run into it
    columns = 3 if len(axes.get_lines()) == 3 else 2
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.8,
        handletextpad=0.5,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderaxespad=0.2,
    )
