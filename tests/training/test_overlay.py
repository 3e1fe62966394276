from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from training import grad_cam, overlay
from training.explain import Explanation, Pictures

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CLASSES = ("blue", "green", "red")


def pictures(count: int, true_classes: Sequence[str | None] | None = None) -> Pictures:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    files = tuple(f"{index}.png" for index in range(count))
    return Pictures(files, tuple(true_classes or [None] * count), images)


def explanation(maps: torch.Tensor) -> Explanation:
    count = len(maps)
    classes = torch.zeros(count, dtype=torch.int64)
    return Explanation("layer2", classes, torch.full((count,), 0.75), maps, grad_cam.spread(maps))


def texts(pictures: Pictures, *explanations: Explanation, class_names: Sequence[str] = CLASSES) -> list[str]:
    names = ["plain", "tenet"][: len(explanations)]
    figure = overlay.draw(pictures, explanations, names=names, class_names=class_names)
    return [text for axes in figure.axes for text in (axes.get_title(), axes.get_xlabel()) if text]


def halves(count: int = 1) -> torch.Tensor:
    maps = torch.zeros(count, 8, 8)
    maps[:, :, :2] = 1.0
    return maps


def test_the_picture_tells_what_was_predicted_and_how_spread_the_maps_are() -> None:
    found = texts(pictures(2), explanation(halves(2)), explanation(torch.ones(2, 8, 8)))
    assert found[:3] == ["0.png", "plain\nlayer2\nspread 25.0 ± 0.0 %", "blue\n75 %, spread 25 %"]
    assert found[3:5] == ["tenet\nlayer2\nspread 100.0 ± 0.0 %", "blue\n75 %, spread 100 %"]
    assert found[-1].endswith("n = 2")


def test_a_wrong_prediction_is_told() -> None:
    right, wrong = (texts(pictures(1, [name]), explanation(halves())) for name in ("blue", "red"))
    assert right[:3:2] == ["true class blue", "blue\n75 %, spread 25 %"]
    assert wrong[:3:2] == ["true class red", "blue\n75 %, wrong, spread 25 %"]


def test_the_line_goes_around_what_counts_as_spread() -> None:
    figure = overlay.draw(pictures(1), [explanation(halves())], names=["plain"], class_names=CLASSES)
    (line,) = figure.axes[1].collections
    assert np.asarray(line.get_paths()[0].vertices)[0, 0] == pytest.approx(
        1.5
    )  # between the second and the third column


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_flat_map_has_no_line(value: float) -> None:
    maps = torch.full((1, 8, 8), value)
    figure = overlay.draw(pictures(1), [explanation(maps)], names=["plain"], class_names=CLASSES)
    assert not figure.axes[1].collections


def test_the_picture_has_a_page_of_images_at_most() -> None:
    count = 3 * overlay.ROWS
    found = texts(pictures(count), explanation(halves(count)))
    assert sum(text.endswith(".png") for text in found) == overlay.ROWS
    assert found[-1].endswith(f"n = {count}")


def test_names_of_any_kind_are_drawn(tmp_path: Path) -> None:
    names = ("$a_b$ and $\\nonsense$", "b" * 200, "red")
    drawn = overlay.draw(pictures(1), [explanation(halves())], names=["c" * 200], class_names=names)
    drawn.savefig(tmp_path / "a.png")
    assert f"{names[0]}\n75 %, spread 25 %" in [axes.get_xlabel() for axes in drawn.axes]
