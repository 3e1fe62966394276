from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from training import curves

if TYPE_CHECKING:
    from pathlib import Path


def record(epoch: int, **changed: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "loss": 2.0 / epoch,
        "tenet_loss": None,
        "correct": 1 - 0.5 / epoch,
        "validation_accuracy": 1 - 0.6 / epoch,
        "robust_accuracy": None,
        "learning_rate": 0.1,
        "images_per_second": 100.0,
    } | changed


def drawn(folder: Path, *records: dict[str, Any], best_epoch: int = 1, test_accuracy: float = 0.5) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    curves.draw(folder, best_epoch=best_epoch, test_accuracy=test_accuracy)
    with Image.open(folder / "curves.png") as image:
        return np.asarray(image.convert("RGB"))


def columns(pixels: np.ndarray, colour: str) -> set[int]:
    """Return in which columns of the picture a colour stands."""
    return {*np.flatnonzero((pixels == ImageColor.getrgb(colour)).all(2).any(0)).tolist()}


def left(pixels: np.ndarray, colour: str) -> bool:
    return any(column < pixels.shape[1] / 2 for column in columns(pixels, colour))


def test_loss_and_accuracies_are_drawn(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, *map(record, range(1, 6)))
    assert left(pixels, curves.BLUE)
    middle = pixels.shape[1] / 2
    for colour in (curves.BLUE, curves.VERMILION, curves.INK):  # training, validation, test
        assert any(column > middle for column in columns(pixels, colour))


def test_tenet_and_robust_accuracy_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    plain = drawn(tmp_path, *map(record, range(1, 6)))
    assert not left(plain, curves.VERMILION)
    assert not columns(plain, curves.GREEN)
    whole = drawn(tmp_path, record(1), *(record(e, tenet_loss=0.2 / e, robust_accuracy=0.1 * e) for e in range(2, 6)))
    assert left(whole, curves.VERMILION)
    assert columns(whole, curves.GREEN)


@pytest.mark.parametrize("epochs", [1, 2, 31, 200])
def test_any_number_of_epochs_is_drawn(epochs: int, tmp_path: Path) -> None:
    pixels = drawn(tmp_path, *map(record, range(1, epochs + 1)), best_epoch=epochs)
    assert left(pixels, curves.BLUE)


def test_a_lone_value_between_epochs_without_one_is_drawn(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, record(1), record(2, robust_accuracy=0.4), record(3))
    assert columns(pixels, curves.GREEN)


def test_a_loss_of_zero_is_drawn(tmp_path: Path) -> None:
    assert left(drawn(tmp_path, record(1), record(2, loss=0.0)), curves.BLUE)


def test_the_test_accuracy_stands_at_the_best_epoch(tmp_path: Path) -> None:
    first, last = (drawn(tmp_path, *map(record, range(1, 6)), best_epoch=best, test_accuracy=0.1) for best in (1, 5))
    places = [max(np.flatnonzero((p[-150:-80] == ImageColor.getrgb(curves.INK)).all(2).any(0))) for p in (first, last)]
    assert places[0] < places[1]


def test_the_same_metrics_give_the_same_picture(tmp_path: Path) -> None:
    before = drawn(tmp_path / "a", *map(record, range(1, 6)))
    assert np.array_equal(before, drawn(tmp_path / "b", *map(record, range(1, 6))))
    assert not np.array_equal(before, drawn(tmp_path / "c", *(record(e, loss=1.0 / e**2) for e in range(1, 6))))


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    drawn(tmp_path, record(1))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_no_epoch_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected the record of an epoch at least, got an empty"):
        drawn(tmp_path)
