"""A writer that is killed with SIGKILL before its n-th step on the disk, for every n: the old state or the new one.

this module as a program: a process for each n --audit hook--> counts its steps below the repository, kills itself
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export.manifest import Images, Manifest, Parity, Requirements, TensorSpec, sha256_of
from export.repository import Draft, Repository, Version

# No writer takes so many steps; one that does is in a circle.
_MOST_STEPS = 1000


def _fill(draft: Draft, *, classes: tuple[str, ...]) -> None:
    path = draft.folder / "model.onnx"
    path.write_bytes(b"engine " * 100)
    (draft.folder / "checkpoint").mkdir()
    (draft.folder / "checkpoint" / "weights").write_bytes(b"weights")
    draft.describe(
        Manifest(
            model=draft.model,
            version=draft.version,
            file="model.onnx",
            sha256=sha256_of(path),
            runtime="onnxruntime",
            precision="fp32",
            inputs=(TensorSpec(name="images", datatype="FP32", shape=(-1, 3, 8, 8)),),
            outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
            class_names=classes,
            max_batch=4,
            requires=Requirements(runtime=">=1.27"),
            parity=_proof("passed"),
        )
    )


def _proof(status: str) -> Parity:
    images = Images(description="noise", n=8, sha256="0" * 64, seed=0)
    return Parity.model_validate({"status": status, "reference": "none", "images": images})


def _publish(repository: Repository, *, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    with repository.draft("pets") as draft:
        _fill(draft, classes=classes)


def _publish_other_labels(repository: Repository) -> None:
    _publish(repository, classes=("dog", "cat"))


def _promote(repository: Repository) -> None:
    repository.promote(repository.find("pets", 2))


def _remove(repository: Repository) -> None:
    repository.remove("pets", 2)


def _remove_aliased(repository: Repository) -> None:
    repository.remove("pets", 1, force=True)


def _prune(repository: Repository) -> None:
    repository.prune(keep=1)


def _block(repository: Repository) -> None:
    repository.record_proof(repository.find("pets", 2), _proof("failed"))


def _rename_first(repository: Repository) -> None:
    """Publish as nobody should: the version is there before its manifest is."""
    with repository.draft("pets") as draft:
        _fill(draft, classes=("cat", "dog"))
        place = repository.folder / "pets" / str(draft.version)
        manifest = (draft.folder / "manifest.json").read_bytes()
        (draft.folder / "manifest.json").unlink()
        draft.folder.rename(place)
        (place / "manifest.json").write_bytes(manifest)
        os._exit(0)


def _remove_in_place(repository: Repository) -> None:
    """Remove as nobody should: file by file, in sight of readers."""
    shutil.rmtree(repository.find("pets", 2).folder)


WRITERS: dict[str, Callable[[Repository], None]] = {
    "publish": _publish,
    "publish other labels": _publish_other_labels,
    "promote": _promote,
    "remove": _remove,
    "remove aliased": _remove_aliased,
    "prune": _prune,
    "block": _block,
    "rename first": _rename_first,
    "remove in place": _remove_in_place,
}

# Steps that change the disk, and every file that is opened: the audit events that Python raises before each.
_EVENTS = {"open", *(f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "chmod", "link", "truncate"))}


def _die_at(step: int, folder: Path) -> None:
    """Have this process killed before its step-th step below a folder."""
    below, steps = str(folder), 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal steps
        if event not in _EVENTS:
            return
        # Removing a tree names files by themselves, below a folder that is open.
        steps += event in {"os.remove", "os.rmdir"} or any(str(path).startswith(below) for path in arguments[:2])
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _kill_all(writer: str, before: Path, copies: Path) -> None:
    """Run a writer once for each of its steps, each time on a copy of its own, until one ends by itself."""
    for step in range(1, _MOST_STEPS):
        folder = copies / f"{step:04}"
        shutil.copytree(before, folder)
        child = os.fork()
        if child == 0:
            _die_at(step, folder)
            WRITERS[writer](Repository(folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return
    raise AssertionError(f"{writer} took more than {_MOST_STEPS} steps")


State = dict[str, object]


def _state(folder: Path) -> State:
    """What readers see; raises if they meet anything that is not whole."""
    repository = Repository(folder)
    versions: list[Version] = []
    if folder.is_dir():
        versions = [repository.find(model, v) for model in repository.models() for v in repository.versions(model)]
    files: State = {}
    for version in versions:
        names = [version.manifest.file, *version.manifest.files]
        assert {name: sha256_of(version.folder / name) for name in names} == {
            version.manifest.file: version.manifest.sha256,
            **version.manifest.files,
        }
        files[str(version)] = version.manifest.parity.status
    _assert_triton_sees_what_is_there(repository, versions)
    return {**files, "aliases": repository.aliases("pets")}


def _assert_triton_sees_what_is_there(repository: Repository, versions: list[Version]) -> None:
    """Triton is never told of a version that is not there, not servable, or has other labels."""
    path = repository.folder / "pets" / "config.pbtxt"
    if not versions:
        return
    config = path.read_text()
    listed = re.search(r"versions: \[([\d, ]*)\]", config)
    assert listed is not None
    numbers = [int(number) for number in listed[1].split(",") if number.strip()]
    labels_of = {v.manifest.version: v.manifest.class_names for v in versions if v.manifest.servable}
    assert labels_of.keys() >= set(numbers)
    if numbers and "label_filename" in config:
        labels = tuple((path.parent / "labels.txt").read_text().splitlines())
        assert {labels_of[number] for number in numbers} == {labels}


def _outcomes(writer: str, before: Path, tmp_path: Path) -> list[Path]:
    """Return the repositories that a writer left, killed at each step, and last the one that it finished."""
    copies = tmp_path / "copies"
    copies.mkdir()
    subprocess.run([sys.executable, __file__, writer, before, copies], check=True, timeout=120)
    outcomes = sorted(copies.iterdir())
    assert len(outcomes) > 5  # each writer is killed at a good many steps
    return outcomes


def _made(folder: Path, *, versions: int, alias: int | None = None) -> Path:
    repository = Repository(folder)
    folder.mkdir()
    for _ in range(versions):
        _publish(repository)
    if alias is not None:
        repository.promote(repository.find("pets", alias))
    return folder


@pytest.mark.parametrize(
    ("writer", "versions", "alias"),
    [
        ("publish", 0, None),
        ("publish", 1, 1),
        ("publish other labels", 1, None),
        ("promote", 2, 1),
        ("promote", 2, None),
        ("remove", 2, 1),
        ("remove aliased", 1, 1),
        ("remove aliased", 2, 1),
        ("prune", 3, None),
        ("block", 2, None),
    ],
)
def test_a_writer_killed_at_any_step_leaves_the_old_state_or_the_new(
    writer: str, versions: int, alias: int | None, tmp_path: Path
) -> None:
    before = _made(tmp_path / "before", versions=versions, alias=alias)
    outcomes = _outcomes(writer, before, tmp_path)
    allowed = [_state(before), _state(outcomes[-1])]
    assert allowed[0] != allowed[1]
    if writer == "prune":  # several removals, each whole
        middle = {key: value for key, value in allowed[0].items() if key != "pets@1"}
        allowed.append(middle)
    given = max([versions, *Repository(outcomes[-1]).versions("pets")])
    seen = []
    for outcome in outcomes:
        state = _state(outcome)
        assert state in allowed, outcome
        seen.append(state)
        _assert_the_next_publisher_mends_all(outcome, state, newest=versions if state == allowed[0] else given)
    assert all(state in seen for state in allowed)  # kills before and after the change


def _assert_the_next_publisher_mends_all(folder: Path, state: State, *, newest: int) -> None:
    repository = Repository(folder)
    _publish(repository)
    published = repository.find("pets")
    assert published.manifest.version > newest
    after = _state(folder)
    assert after == {**state, str(published): "passed"}
    for version in repository.versions("pets"):
        repository.check(repository.find("pets", version))
    hidden = [path.name for path in (folder / "pets").iterdir() if path.name.startswith(".")]
    assert hidden == []


@pytest.mark.parametrize("writer", ["rename first", "remove in place"])
def test_a_writer_that_shows_half_a_version_is_found_out(writer: str, tmp_path: Path) -> None:
    before = _made(tmp_path / "before", versions=2)
    outcomes = _outcomes(writer, before, tmp_path)
    broken = 0
    for outcome in outcomes:
        try:
            _state(outcome)
        except (FileNotFoundError, ValueError, AssertionError):
            broken += 1
    assert broken


if __name__ == "__main__":
    _kill_all(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
