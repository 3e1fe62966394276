"""`tenet explain` on two networks that have learned nothing: its words, its files, its errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from service import __main__ as command_line
from tests.processes import tenet
from training import checkpoint, models, recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, plain and tenet, of another one of other classes, and of images by class."""
    root: Path = tmp_path_factory.mktemp("explain")
    for seed, (name, classes) in enumerate([("plain", "ab"), ("tenet", "ab"), ("other", "abc")]):
        document = {"data": {"name": "digits"}, "model": {"depth": 8, "width": 4}, "training": {"epochs": 1}}
        decoded = recipe.decode(document, source="recipe")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = models.build(decoded.model, classes=len(classes))
        checkpoint.finish(
            root / f"{name}.partial",
            out=root / name,
            model=model,
            recipe=decoded,
            class_names=tuple(classes),
            input_shape=(3, 16, 16),
            data={},
            metrics={},
        )
    generator = np.random.default_rng(0)
    for name in "ab":
        (root / "images" / name).mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{index}.png")
    return root


def explain(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(command_line.app, ["explain", str(folder / "plain"), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_two_runs_are_explained(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--images", str(folder / "images"), "--against", str(folder / "tenet"), "--out", str(out)]
    output = explain(folder, *arguments)
    assert output.rstrip().endswith(str(out / "explain.png"))
    record = json.loads((out / "explain.json").read_text())
    for image in record["images"]:
        assert image["file"] in output
    for run in record["runs"]:
        assert f"{run['run']}: mean spread {run['mean_spread']:.1%} ± {run['standard_error']:.1%} (n = 6)" in output
    with Image.open(out / "explain.png") as picture:
        picture.load()


def test_json_is_the_record(folder: Path, tmp_path: Path) -> None:
    arguments = ["--images", str(folder / "images" / "a"), "--out", str(tmp_path), "--layer", "layer1", "--count", "2"]
    record: dict[str, Any] = json.loads(explain(folder, *arguments, "--json"))
    assert record == json.loads((tmp_path / "explain.json").read_text())
    assert [image["file"] for image in record["images"]] == ["0.png", "1.png"]
    assert record["runs"][0]["layer"] == "layer1"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layer", "layer9"], "layer2, layer3.0, layer3), got 'layer9'"),
        (["--against", "other"], "other: expected the classes of plain (a, b), got a, b, c"),
    ],
    ids=["layer", "classes"],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], complaint: str, folder: Path) -> None:
    result = tenet("explain", "plain", "--images", "images", "--out", "out", *arguments, cwd=folder)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert not (folder / "out").exists()
