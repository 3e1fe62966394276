"""Runs that are stopped, killed or out of space, and go on."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from tests.training.runs import changed, leave, run, same, weights
from training import checkpoint, iteration, loop
from training.events import Advanced, EpochEnded, TrainingEnded, TrainingStopped

if TYPE_CHECKING:
    from training.recipe import Recipe

REGIMES: dict[str, dict[str, Any]] = {
    "tenet": {},
    "fused": {"tenet": {"fused": True}},
    "adamw and average": {"training": {"optimizer": "adamw", "learning_rate": 0.01, "ema": 0.9}},
    "augmix": {"augmentation": {"augmix": {"width": 2}, "cutout": 4, "random_erasing": 0.5, "flip": True}},
    "dropout": {"model": {"factory": "tests.training.classifiers:dropping"}, "tenet": {"stage": "0"}},
    "free": {"adversarial": {"method": "free", "replays": 2}},
    "pgd": {"adversarial": {"method": "pgd", "steps": 2}},
}


def stopped_after(recipe: Recipe, out: Path, *, batches: int, resume: bool = False) -> TrainingStopped:
    """Train until so many batches are done, and ask the run to stop there."""
    stop = threading.Event()
    events = loop.train(recipe, out=out, resume=resume, stop=stop)
    for event in events:
        if isinstance(event, TrainingStopped):
            return event
        if isinstance(event, Advanced) and event.done >= batches:
            stop.set()
    raise AssertionError("the run was not stopped")


@pytest.fixture(autouse=True)
def an_event_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ADVANCE_SECONDS", 0.0)


@pytest.mark.parametrize("done", [1, 2, 4])
def test_resumed_after_an_epoch_equals_uninterrupted(recipe: Recipe, tmp_path: Path, done: int) -> None:
    _, whole = run(recipe, tmp_path / "whole")
    leave(loop.train(recipe, out=tmp_path / "parts"), after=done)
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.partial"]
    epochs, ended = run(recipe, tmp_path / "parts", resume=True)
    assert len(epochs) == 4 - done
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert (ended.sha256, ended.tenet_steps) == (whole.sha256, whole.tenet_steps)
    assert ended.best_epoch == whole.best_epoch
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize("regime", REGIMES)
def test_resumed_within_an_epoch_equals_uninterrupted_in_every_regime(
    document: dict[str, Any], tmp_path: Path, regime: str
) -> None:
    if "factory" in REGIMES[regime].get("model", {}):
        del document["model"]
    recipe = changed(document, **REGIMES[regime])
    _, whole = run(recipe, tmp_path / "whole")
    factor = 2 if regime == "free" else 1
    stopped = stopped_after(recipe, tmp_path / "parts", batches=6 * factor)
    assert (stopped.epoch, stopped.done, stopped.total) == (2, 6 * factor, 16 * factor)
    stopped_after(recipe, tmp_path / "parts", batches=11 * factor, resume=True)
    _, ended = run(recipe, tmp_path / "parts", resume=True)
    assert ended.sha256 == whole.sha256
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert _told(tmp_path / "parts") == _told(tmp_path / "whole")


def _told(folder: Path) -> list[dict[str, Any]]:
    """What the metrics of a run say, but for how long it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def test_a_stop_before_the_first_batch_is_kept_too(recipe: Recipe, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    (stopped,) = loop.train(recipe, out=tmp_path / "run", stop=stop)
    assert isinstance(stopped, TrainingStopped)
    assert stopped.done == 0
    _, ended = run(recipe, tmp_path / "run", resume=True)
    _, whole = run(recipe, tmp_path / "whole")
    assert ended.sha256 == whole.sha256


def test_what_is_there_is_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    leave(loop.train(recipe, out=tmp_path / "run"), after=1)
    with pytest.raises(FileExistsError, match="go on with it with --resume, or remove it"):
        loop.train(recipe, out=tmp_path / "run")
    (tmp_path / "done").mkdir()
    with pytest.raises(FileExistsError, match="done: exists already"):
        loop.train(recipe, out=tmp_path / "done", resume=True)
    with pytest.raises(FileNotFoundError, match="expected an interrupted run, got none"):
        loop.train(recipe, out=tmp_path / "fresh", resume=True)


def test_a_run_that_ended_before_its_first_save_is_started_again(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "metrics.jsonl").write_text("half a li")
    _, ended = run(recipe, tmp_path / "run")
    assert len(_told(ended.folder)) == 4


def test_what_is_not_a_run_s_is_neither_removed_nor_renamed(recipe: Recipe, tmp_path: Path) -> None:
    notes = tmp_path / "run.partial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(FileExistsError, match=r"nothing but an unfinished run in it, got notes\.txt; move it away"):
        loop.train(recipe, out=tmp_path / "run")
    assert notes.read_text() == "mine"
    (tmp_path / "other.partial").touch()
    with pytest.raises(FileExistsError, match=r"expected a folder, got a file"):
        loop.train(recipe, out=tmp_path / "other")


def test_an_error_before_the_first_save_leaves_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.augment.views", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(loop.train(recipe, out=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_another_recipe_is_not_resumed(document: dict[str, Any], tmp_path: Path) -> None:
    leave(loop.train(changed(document), out=tmp_path / "run"), after=1)
    other = changed(document, training={"epochs": 5})
    with pytest.raises(ValueError, match=r"expected the recipe that the run began with.*in training; restore"):
        list(loop.train(other, out=tmp_path / "run", resume=True))


def test_other_data_are_not_resumed(document: dict[str, Any], colours: Path, tmp_path: Path) -> None:
    own = shutil.copytree(colours, tmp_path / "colours")
    recipe = changed(document, data={"root": str(own)})
    leave(loop.train(recipe, out=tmp_path / "run"), after=1)
    Image.new("RGB", (12, 12)).save(own / "test" / "red" / "0.png")
    with pytest.raises(ValueError, match=r"expected the data that the run began with, got a change in test; restore"):
        list(loop.train(recipe, out=tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.pop("generator.centres"),
        lambda tensors, _: tensors.pop("model.network.fc.weight"),
        lambda tensors, _: tensors.update({"generator.augmentation": torch.zeros(3, dtype=torch.uint8)}),
        lambda tensors, _: tensors.pop("sums"),
        lambda _, record: record.pop("data"),
        lambda _, record: record.update(recipe=[]),
        lambda _, record: record["progress"].update(extra=1),
    ],
)
def test_an_interrupted_run_with_other_contents_is_one_line(recipe: Recipe, tmp_path: Path, change: Any) -> None:
    leave(loop.train(recipe, out=tmp_path / "run"), after=1)
    path = tmp_path / "run.partial" / checkpoint.STATE
    tensors, record = checkpoint.load_state(path)
    change(tensors, record)
    checkpoint.save_state(path, tensors=tensors, record=record)
    with pytest.raises(ValueError, match=r"damaged file; remove .*run\.partial and start again") as caught:
        list(loop.train(recipe, out=tmp_path / "run", resume=True))
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_save(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(document)
    events = loop.train(recipe, out=tmp_path / "run")
    for event in events:
        if isinstance(event, EpochEnded):
            break
    kept = (tmp_path / "run.partial" / checkpoint.STATE).read_bytes()
    monkeypatch.setattr("training.schedule.rate", lambda *_: 1e30)
    with pytest.raises(ValueError, match=r"expected a finite number, got (nan|inf) in epoch 2.*saved before is in"):
        list(events)
    assert (tmp_path / "run.partial" / checkpoint.STATE).read_bytes() == kept
    monkeypatch.undo()
    _, ended = run(recipe, tmp_path / "run", resume=True)
    _, whole = run(recipe, tmp_path / "whole")
    assert ended.sha256 == whole.sha256


def test_weights_that_are_no_numbers_are_not_saved(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = iteration.Iteration._step

    def exploding(self: iteration.Iteration, *views: Any, **how: Any) -> Any:
        result = step(self, *views, **how)
        if self.run.progress.iterations == 8:  # the last of the second epoch, whose own loss is a number
            self.run.model.get_parameter("network.fc.bias").data.fill_(float("nan"))
        return result

    monkeypatch.setattr(iteration.Iteration, "_step", exploding)
    with pytest.raises(ValueError, match=r"network\.fc\.bias: expected finite numbers, got others in epoch 2; lower"):
        list(loop.train(changed(document, tenet=None), out=tmp_path / "run"))
    monkeypatch.undo()
    tensors, record = checkpoint.load_state(tmp_path / "run.partial" / checkpoint.STATE)
    assert record["progress"]["epoch"] == 1
    assert all(bool(tensor.isfinite().all()) for name, tensor in tensors.items() if name.startswith("model."))


FULL = """
import resource, signal, sys
from pathlib import Path
from training.__main__ import main
from training import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = checkpoint.save_state
def fills_up(path, **state):  # the disk is full from the second save on
    save(path, **state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
checkpoint.save_state = fills_up
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_stops_with_a_clear_line_and_keeps_the_last_save(document: dict[str, Any], tmp_path: Path) -> None:
    import tomli_w

    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(document))
    command = [sys.executable, "-c", FULL, str(file), "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert "the run cannot be saved: File too large" in line
    assert line.endswith("run.partial is as it was; make room, and go on with --resume")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    _, resumed = run(changed(document), tmp_path / "run", resume=True)
    _, whole = run(changed(document), tmp_path / "whole")
    assert isinstance(resumed, TrainingEnded)
    assert resumed.sha256 == whole.sha256
