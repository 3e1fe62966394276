from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
import torch

from training import checkpoint, models

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from training.recipe import Recipe

NAMES = ("blue", "green", "red")


@pytest.fixture
def model(recipe: Recipe) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(recipe.model, classes=3)


@pytest.fixture
def folder(tmp_path: Path, model: nn.Module, recipe: Recipe) -> Path:
    return save(tmp_path / "run", model, recipe)


def save(folder: Path, model: nn.Module, recipe: Recipe) -> Path:
    checkpoint.finish(
        checkpoint.partial_path(folder),
        out=folder,
        model=model,
        recipe=recipe,
        class_names=NAMES,
        input_shape=(3, 12, 12),
        data={"training": checkpoint.Part(images=36, sha256="f0")},
        metrics={"test_accuracy": 0.75, "iterations": 9},
    )
    return folder


def test_what_is_saved_is_loaded(folder: Path, model: nn.Module, recipe: Recipe) -> None:
    loaded = checkpoint.load(folder)
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(loaded.model(images), model.eval()(images))
    assert not loaded.model.training
    assert loaded.recipe == recipe
    assert loaded.class_names == NAMES
    assert loaded.input_shape == (3, 12, 12)
    assert loaded.metrics == {"test_accuracy": 0.75, "iterations": 9}
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_run_is_two_files_and_nothing_beside_them(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"weights.safetensors", "run.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    record = json.loads((folder / "run.json").read_text())
    assert record["versions"].keys() >= {"python", "torch"}
    assert checkpoint.load(folder).sha256 == record["sha256"]


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_a_run_says_the_commit_of_the_working_tree(
    tmp_path: Path, model: nn.Module, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    monkeypatch.chdir(tree)
    assert checkpoint.record(save(tmp_path / "outside", model, recipe)).commit is None
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b commit -m first"):
        (tree / "recipe.toml").write_text("[data]\n")
        subprocess.run(["git", *command.split()], check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert checkpoint.record(save(tmp_path / "clean", model, recipe)).commit == head
    (tree / "recipe.toml").write_text("[model]\n")
    assert checkpoint.record(save(tmp_path / "changed", model, recipe)).commit == f"{head}-dirty"


def test_a_record_is_read_without_the_weights(folder: Path, recipe: Recipe) -> None:
    (folder / "weights.safetensors").unlink()
    record = checkpoint.record(folder)
    assert (record.recipe, record.class_names, record.input_shape) == (recipe, NAMES, (3, 12, 12))
    assert record.data == {"training": checkpoint.Part(images=36, sha256="f0")}


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    checkpoint.load(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_is_never_overwritten(folder: Path, model: nn.Module, recipe: Recipe) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        save(folder, model, recipe)


def test_an_interrupted_save_leaves_no_half_file(
    tmp_path: Path, model: nn.Module, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "run", model, recipe)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_flipped_bit_in_the_weights_is_noticed(folder: Path) -> None:
    path = folder / "weights.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-5] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"weights\.safetensors: expected sha256 \w+ as in run\.json, got"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "run.json"])
@pytest.mark.parametrize("kept", [0, 1, 100])
def test_a_truncated_file_is_one_line(folder: Path, name: str, kept: int) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="expected") as caught:
        checkpoint.load(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "run.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file; expected a RUN folder"):
        checkpoint.load(folder)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["model"]["width"] = 8
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"expected weights of the model in run\.json") as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_the_record_is_refused(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text()) | {"extra": 1}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"run\.json: expected the record of a training run.*extra"):
        checkpoint.load(folder)


def test_a_state_is_one_file_that_is_replaced_whole(tmp_path: Path) -> None:
    path = checkpoint.partial_path(tmp_path / "run") / checkpoint.STATE
    for value in (1.0, 2.0):
        checkpoint.save_state(path, tensors={"a": torch.full((2,), value)}, record={"epoch": int(value)})
    tensors, record = checkpoint.load_state(path)
    assert torch.equal(tensors["a"], torch.full((2,), 2.0))
    assert record == {"epoch": 2}
    assert [p.name for p in path.parent.iterdir()] == [checkpoint.STATE]


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    path = checkpoint.partial_path(tmp_path / "run") / checkpoint.STATE
    checkpoint.save_state(path, tensors={"a": torch.zeros(2)}, record={"epoch": 1})
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(ValueError, match=r"got a damaged file; remove .*run\.partial and start again") as caught:
            checkpoint.load_state(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="expected the state of an interrupted run, got a damaged file"):
        checkpoint.load_state(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoint.load_state(tmp_path / "none.partial" / checkpoint.STATE)


def test_what_lies_in_an_unfinished_run_moves_along_and_its_state_goes(
    tmp_path: Path, model: nn.Module, recipe: Recipe
) -> None:
    partial = checkpoint.partial_path(tmp_path / "run")
    checkpoint.save_state(partial / checkpoint.STATE, tensors={}, record={})
    (partial / "metrics.jsonl").write_text("{}\n")
    folder = save(tmp_path / "run", model, recipe)
    assert {path.name for path in folder.iterdir()} == {"weights.safetensors", "run.json", "metrics.jsonl"}
    assert not partial.exists()
