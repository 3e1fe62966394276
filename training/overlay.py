"""Grad-CAM maps drawn over their images, one row for each image and one column for each run.

Pictures, Explanations -> `draw` -> image | its maps under the runs' names | ... | a scale below all
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from training.grad_cam import HALF

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from training.explain import Explanation, Pictures

ROWS = 16  # most images that are drawn; a page holds no more
# inches: an image's width, the space between columns, the headings, the text below an image, the scale, the foot
IMAGE, GAP, HEAD, TEXT, BAR, FOOT = 1.7, 0.1, 0.55, 0.5, 0.08, 0.8
RESOLUTION = 160  # dots per inch
OPACITY = 0.6  # of the map over the image
COLOURS = "viridis"  # brightness rises evenly, for colour-blind readers and in print
INK, WRONG = "#202020", "#D55E00"  # the latter is Okabe and Ito's vermilion
NAME = 24  # characters that fit into a column


def draw(
    pictures: Pictures, explanations: Sequence[Explanation], *, names: Sequence[str], class_names: Sequence[str]
) -> Figure:
    """Draw a row for each image, 16 at most: the image, and for each run its map over it, in `names`' order.

    A line goes around what has at least half of a map's maximum.
    """
    # a second to import; without pyplot, which keeps figures and chooses a screen
    from matplotlib import figure as figures  # noqa: PLC0415
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    rows, columns = min(len(pictures.files), ROWS), 1 + len(names)
    tall = IMAGE * pictures.images.shape[2] / pictures.images.shape[3]
    size = (columns * (IMAGE + GAP) + GAP, HEAD + rows * (tall + TEXT) + FOOT)
    drawn = figures.Figure(figsize=size, dpi=RESOLUTION)
    FigureCanvasAgg(drawn)

    def place(row: int, column: int) -> Axes:
        left, bottom = GAP + column * (IMAGE + GAP), size[1] - HEAD - row * (tall + TEXT) - tall
        return drawn.add_axes((left / size[0], bottom / size[1], IMAGE / size[0], tall / size[1]))

    for row in range(rows):
        index = row * len(pictures.files) // rows
        image = pictures.images[index].permute(1, 2, 0).numpy()
        _draw_image(place(row, 0), image, label=_true_class(pictures, index))
        for column, (name, explanation) in enumerate(zip(names, explanations, strict=True), start=1):
            axes = place(row, column)
            _draw_map(axes, image, explanation.maps[index].numpy())
            _label(axes, explanation, index, class_names=class_names, true_class=pictures.true_classes[index])
            if row == 0:
                heading = f"{_short(name)}\n{_short(explanation.layer)}\nspread {_percent(*explanation.mean_spread)}"
                axes.set_title(heading, fontsize=8, color=INK, parse_math=False)
    scale = drawn.add_axes((0.1, (FOOT - BAR) / size[1], 0.8, BAR / size[1]))
    _draw_scale(drawn, scale, n=len(pictures.files))
    return drawn


def _draw_scale(drawn: Figure, axes: Axes, *, n: int) -> None:
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415  # as in `draw`
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    scale = ScalarMappable(cmap=COLOURS)
    bar = drawn.colorbar(scale, cax=axes, orientation="horizontal", format=PercentFormatter(1, symbol=" %"))
    bar.ax.axvline(HALF, color="white", linewidth=1.2)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    note = "Grad-CAM, share of its maximum\nspread: area of at least half of it (white line)\n"
    bar.set_label(f"{note}above: mean ± standard error, n = {n}", fontsize=7, color=INK)


def _percent(mean: float, error: float | None) -> str:
    return f"{100 * mean:.1f} %" if error is None else f"{100 * mean:.1f} ± {100 * error:.1f} %"


def _true_class(pictures: Pictures, index: int) -> str:
    name = pictures.true_classes[index]
    return _short(pictures.files[index] if name is None else f"true class {name}")


def _label(
    axes: Axes, explanation: Explanation, index: int, *, class_names: Sequence[str], true_class: str | None
) -> None:
    name = class_names[int(explanation.classes[index])]
    wrong = true_class is not None and name != true_class
    label = f"{_short(name)}\n{100 * explanation.probabilities[index]:.0f} %{', wrong' if wrong else ''}"
    label += f", spread {100 * explanation.spreads[index]:.0f} %"
    axes.set_xlabel(label, fontsize=8, color=WRONG if wrong else INK, parse_math=False)


def _draw_image(axes: Axes, image: np.ndarray, *, label: str | None = None) -> None:
    axes.imshow(image, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if label is not None:
        axes.set_xlabel(label, fontsize=8, color=INK, parse_math=False)


def _draw_map(axes: Axes, image: np.ndarray, heat: np.ndarray) -> None:
    from matplotlib import colormaps  # noqa: PLC0415  # as in `draw`

    grey = image.mean(axis=2, keepdims=True)  # so that all colour is the map's
    _draw_image(axes, OPACITY * colormaps[COLOURS](heat)[..., :3] + (1 - OPACITY) * grey)
    if heat.min() < HALF <= heat.max():
        axes.contour(heat, levels=[HALF], colors="white", linewidths=1.2)


def _short(name: str) -> str:
    return name if len(name) <= NAME else "…" + name[1 - NAME :]
