"""`tenet predict` against a real server: the same answer from every form that a model may have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from service import __main__ as command_line

if TYPE_CHECKING:
    from pathlib import Path

    from service.server import Serving


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    # Of the model's own size, so that nothing is resized.
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    return path


def predicted(serving: Serving, *arguments: str) -> Any:
    result = CliRunner().invoke(command_line.app, ["predict", *arguments, "--server", serving.address, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_models_of_one_network_predict_the_same_whatever_they_take_and_answer(
    serving: Serving, picture: Path, weights: Any
) -> None:
    logits = (np.asarray(Image.open(picture), np.float32).transpose(2, 0, 1).ravel() / 255) @ weights(0)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    names = ("plane", "car", "bird", "cat", "deer")
    for model in (["linear", "--version", "1"], ["stored"], ["shares"]):
        (found,) = predicted(serving, str(picture), "--model", *model)
        assert found["class"] == names[shares.argmax()]
        assert found["probability"] == pytest.approx(shares.max(), rel=1e-4)


def test_several_images_are_resized_and_answered_in_their_order(
    serving: Serving, picture: Path, tmp_path: Path
) -> None:
    Image.open(picture).resize((40, 30)).save(tmp_path / "large.png")
    found = predicted(serving, str(picture), str(tmp_path / "large.png"), "--model", "stored")
    assert [each["image"] for each in found] == [str(picture), str(tmp_path / "large.png")]
