from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from training import metrics
from training.events import EpochEnded
from training.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def values(epoch: int, **changed: Any) -> dict[str, Any]:
    ended = EpochEnded(
        epoch=epoch,
        epochs=4,
        done=10 * epoch,
        loss=2.0 / epoch,
        tenet_loss=0.25 / epoch if epoch > 1 else None,
        correct=0.2 * epoch,
        validation_accuracy=0.1875 * epoch,
        robust_accuracy=None,
        learning_rate=0.5**epoch,
        images_per_second=100.0,
        tenet_steps=3 * epoch,
        seconds=1.5 * epoch,
    )
    return asdict(ended) | changed


def write(folder: Path, *epochs: dict[str, Any], resume_after: int = 0) -> None:
    with Metrics(folder, resume_after=resume_after) as writer:
        for epoch in epochs:
            writer.epoch(epoch)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the events with TensorBoard's own reader."""
    from tensorboard.backend.event_processing import event_accumulator

    accumulator = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    names = accumulator.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}


def next_second() -> None:
    """Let a second begin: files of events are read in the order of the seconds in their names."""
    time.sleep(1.01 - time.time() % 1)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, values(1), values(2))
    assert metrics.read(tmp_path) == [values(1), values(2)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_record_can_be_read_before_the_run_ends(tmp_path: Path) -> None:
    with Metrics(tmp_path, resume_after=0) as writer:
        writer.epoch(values(1))
        assert metrics.read(tmp_path) == [values(1)]
        assert scalars(tmp_path)["train/loss"] == [(1, 2.0)]


def test_tensorboard_sees_each_value_at_its_epoch(tmp_path: Path) -> None:
    write(tmp_path, values(1, robust_accuracy=0.5), values(2, robust_accuracy=0.75))
    assert scalars(tmp_path) == {
        "train/loss": [(1, 2.0), (2, 1.0)],
        "train/tenet_loss": [(2, 0.125)],
        "train/accuracy": [(1, pytest.approx(0.2)), (2, pytest.approx(0.4))],
        "validation/accuracy": [(1, 0.1875), (2, 0.375)],
        "validation/robust_accuracy": [(1, 0.5), (2, 0.75)],
        "learning_rate": [(1, 0.5), (2, 0.25)],
        "images_per_second": [(1, 100.0), (2, 100.0)],
    }


def test_what_has_no_value_is_not_shown(tmp_path: Path) -> None:
    write(tmp_path, values(1))
    assert {"train/tenet_loss", "validation/robust_accuracy"}.isdisjoint(scalars(tmp_path))


def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    write(whole, *map(values, range(1, 5)))
    write(parts, *map(values, range(1, 3)))
    write(parts, *map(values, range(3, 5)), resume_after=2)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_an_epoch_that_is_done_again_stands_once(tmp_path: Path) -> None:
    write(tmp_path, values(1), values(2), values(3, loss=8.0))
    next_second()
    write(tmp_path, values(3), values(4), resume_after=2)
    assert metrics.read(tmp_path) == [values(epoch) for epoch in range(1, 5)]
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4]
    assert [value for _, value in scalars(tmp_path)["train/loss"]] == pytest.approx([2, 1, 2 / 3, 0.5])


def test_a_run_that_begins_again_begins_with_nothing(tmp_path: Path) -> None:
    write(tmp_path, values(1, loss=8.0), values(2, loss=8.0))
    next_second()
    write(tmp_path, values(1), resume_after=0)
    assert metrics.read(tmp_path) == [values(1)]
    assert scalars(tmp_path)["train/loss"] == [(1, 2.0)]


@pytest.mark.parametrize("torn", ['{"epoch": 2, "lo', json.dumps({"epoch": 2})], ids=["in it", "before its end"])
def test_a_line_that_a_killed_run_did_not_finish_is_dropped(torn: str, tmp_path: Path) -> None:
    write(tmp_path, values(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert metrics.read(tmp_path) == [values(1)]
    write(tmp_path, values(2), resume_after=1)
    assert metrics.read(tmp_path) == [values(1), values(2)]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"epoch": 2}', b"\xff\xfe", b""], ids=repr)
def test_a_damaged_line_is_named(damage: bytes, tmp_path: Path) -> None:
    write(tmp_path, values(1), values(2))
    path = tmp_path / "metrics.jsonl"
    first, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(first + b"\n" + damage + b"\n" + rest)
    complaint = r"metrics\.jsonl: line 2: expected the record of an epoch, got a damaged line; .*remove the line$"
    with pytest.raises(ValueError, match=complaint):
        metrics.read(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        write(tmp_path, values(3), resume_after=2)


def test_metrics_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: no such file"):
        metrics.read(tmp_path)


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Let no file grow beyond `largest` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_in_one_line_and_can_be_resumed_after(tmp_path: Path) -> None:
    with Metrics(tmp_path, resume_after=0) as writer:
        writer.epoch(values(1))
    room = (tmp_path / "metrics.jsonl").stat().st_size + 20
    complaint = r"metrics\.jsonl: epoch 2 cannot be written: File too large$"
    with pytest.raises(OSError, match=complaint), Metrics(tmp_path, resume_after=1) as writer, full_disk(room):
        writer.epoch(values(2))
    write(tmp_path, values(2), resume_after=1)
    assert metrics.read(tmp_path) == [values(1), values(2)]


def test_reading_needs_no_tensorboard() -> None:
    code = "import sys; from training import metrics, curves; print({'tensorboard', 'matplotlib'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
