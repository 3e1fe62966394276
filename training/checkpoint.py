"""What a training run leaves behind, and how to get it back.

RUN/weights.safetensors              the model's parameters and buffers
RUN/run.json                         recipe, classes, input shape, data, metrics, versions, sha256 of the weights
RUN/metrics.jsonl, tensorboard/, curves.png   how it went
RUN.partial/state.safetensors        the state of a run that is still going on, or was interrupted

Weights, record and state are written beside their places, flushed to the disk and renamed, and RUN.partial is renamed
to RUN when all is in it: a reader sees all of it or nothing. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from training import models
from training.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

WEIGHTS = "weights.safetensors"
RUN = "run.json"
STATE = "state.safetensors"
PACKAGES = ("tenet", "torch", "safetensors", "numpy")  # whose versions a run records


class Part(BaseModel):
    """The images of a part of the data: how many, and the sha256 that tells them from others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    images: int
    sha256: str


class RunRecord(BaseModel):
    """The contents of run.json; `data` has the parts "training", "validation" and "test".

    `commit` is that of the git working tree in which the training ran, with "-dirty" where files had changed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    recipe: Recipe
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    data: dict[str, Part]
    metrics: dict[str, float]
    versions: dict[str, str]
    commit: str | None = None
    sha256: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained classifier and where it came from.

    `model` is on the CPU, in evaluation mode; `input_shape` is (3, H, W); `sha256` is of the weights' file.
    """

    model: nn.Module
    recipe: Recipe
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    metrics: Mapping[str, float]
    sha256: str


def finish(
    partial: Path,
    *,
    out: Path,
    model: nn.Module,
    recipe: Recipe,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    data: Mapping[str, Part],
    metrics: Mapping[str, float],
) -> str:
    """Turn the folder of an unfinished run into the RUN folder `out`, and return the sha256 of its weights.

    Whatever else is in it moves along; its state is removed, as nothing is left to be resumed.

    Raises:
        FileExistsError: something is there already.
        OSError: a file cannot be written; the unfinished run is as it was.
    """
    refuse_existing(out)
    weights = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()})
    record = RunRecord(
        recipe=recipe,
        class_names=class_names,
        input_shape=input_shape,
        data=dict(data),
        metrics=dict(metrics),
        versions=_versions(),
        commit=_commit(),
        sha256=hashlib.sha256(weights).hexdigest(),
    )
    partial.mkdir(parents=True, exist_ok=True)
    _write(partial / WEIGHTS, weights)
    _write(partial / RUN, (record.model_dump_json(indent=2) + "\n").encode())
    partial.rename(out)
    _flush_folder(out.parent)
    for left in (out / STATE, _temporary(out / STATE)):  # the latter from a save that was killed
        left.unlink(missing_ok=True)
    return record.sha256


def load(folder: Path) -> Checkpoint:
    """Load a RUN folder; its weights are checked against their sha256 before they are parsed.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: a file is damaged, or the two do not belong together.
    """
    saved = record(folder)
    weights = _bytes(folder / WEIGHTS)
    sha256 = hashlib.sha256(weights).hexdigest()
    if sha256 != saved.sha256:
        msg = f"{folder / WEIGHTS}: expected sha256 {saved.sha256} as in {RUN}, got {sha256}; it has changed"
        raise ValueError(msg)
    with torch.random.fork_rng(devices=[]):  # the weights that it draws are replaced
        model = models.build(saved.recipe.model, classes=len(saved.class_names))
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (safetensors.SafetensorError, RuntimeError) as error:
        msg = f"{folder / WEIGHTS}: expected weights of the model in {RUN}, got others: {_first_line(error)}"
        raise ValueError(msg) from error
    return Checkpoint(
        model=model.eval(),
        recipe=saved.recipe,
        class_names=saved.class_names,
        input_shape=saved.input_shape,
        metrics=saved.metrics,
        sha256=sha256,
    )


def record(folder: Path) -> RunRecord:
    """Read the record of a RUN folder; its weights are left alone.

    Raises:
        FileNotFoundError: there is no such folder, or no record in it.
        ValueError: the record is damaged.
    """
    path = folder / RUN
    try:
        return RunRecord.model_validate_json(_bytes(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        msg = f"{path}: expected the record of a training run, got a damaged one: {where}: {first['msg']}"
        raise ValueError(msg) from error


def refuse_unwritable(folder: Path) -> None:
    """Raise ValueError where a run could not be written when it ends."""
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        msg = f"{folder}: expected a place in a folder, got one under the file {parent}; name another folder"
        raise ValueError(msg)
    if not os.access(parent, os.W_OK | os.X_OK):
        msg = f"{folder}: expected a place that can be written to, got {parent} without permission; "
        raise ValueError(msg + "name another folder")


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError where a run would be overwritten."""
    if folder.exists():
        msg = f"{folder}: exists already; name another folder, or remove it"
        raise FileExistsError(msg)


def partial_path(folder: Path) -> Path:
    """Return the folder in which the unfinished run `folder` is kept: beside it."""
    return folder.with_name(folder.name + ".partial")


def save_state(path: Path, *, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the state of an unfinished run, in place of an earlier one; `record` is of plain JSON values."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record)
    contents = safetensors.torch.save(plain, metadata={"record": text, "sha256": _seal(plain, text)})
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, contents)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; its tensors and its record are checked against their sha256.
    """
    if not path.is_file():
        msg = f"{path}: no such file; there is no interrupted run to go on with"
        raise FileNotFoundError(msg)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        if _seal(tensors, metadata["record"]) != metadata["sha256"]:
            raise ValueError("its contents have changed")
        return tensors, json.loads(metadata["record"])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise damaged_state(path) from error


def damaged_state(path: Path) -> ValueError:
    """Return the error for an interrupted run that cannot be gone on with."""
    return ValueError(
        f"{path}: expected the state of an interrupted run, got a damaged file; remove {path.parent} and start again"
    )


def _seal(tensors: dict[str, Tensor], record: str) -> str:
    """Return a sha256 of both: that of a file with nothing else in it."""
    return hashlib.sha256(safetensors.torch.save(tensors, metadata={"record": record})).hexdigest()


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        msg = f"{path}: no such file; expected a RUN folder with {WEIGHTS} and {RUN}"
        raise FileNotFoundError(msg)
    return path.read_bytes()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
            versions[package] = metadata.version(package)
    return versions


def _commit() -> str | None:
    """Return the commit of the working tree that this process runs in, None where there is no git or no tree."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # no shell, no input
    return told.stdout.strip() or None


def _write(path: Path, contents: bytes) -> None:
    """Write a file whole or not at all: beside its place, flushed, and renamed to it."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2]).replace("\t", "")
