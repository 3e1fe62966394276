"""What a run measured: one record an epoch, for people's scripts and for TensorBoard.

EpochEnded -> `Metrics.epoch` -> metrics.jsonl (a line an epoch) -> `read` -> curves
                              -> tensorboard/ (scalars whose step is the epoch)

A run that is killed between an epoch's line and its state does that epoch again when it is resumed: `resume_after`
drops what was written of it before, so that each epoch stands once.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
SCALARS = {  # a record's keys, and their names in TensorBoard, which groups them by what stands before the slash
    "loss": "train/loss",
    "tenet_loss": "train/tenet_loss",
    "correct": "train/accuracy",
    "validation_accuracy": "validation/accuracy",
    "robust_accuracy": "validation/robust_accuracy",
    "learning_rate": "learning_rate",
    "images_per_second": "images_per_second",
}


class Metrics:
    """Writes the metrics of a run that is going on; a context manager.

    Args:
        folder: where metrics.jsonl and tensorboard/ are written; it must exist.
        resume_after: the last epoch whose records stay, 0 for a new run.

    Raises:
        ValueError: on entering, metrics.jsonl is damaged.
    """

    def __init__(self, folder: Path, *, resume_after: int) -> None:
        self._path, self._events_folder = folder / METRICS, folder / EVENTS
        self._resume_after = resume_after
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # half a second to import, and reading metrics needs none of it
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        _drop(self._path, after=self._resume_after)
        with contextlib.ExitStack() as opened:
            self._lines = opened.enter_context(self._path.open("a", encoding="utf-8"))
            # readers leave out the events of earlier files from this step on
            writer = SummaryWriter(str(self._events_folder), purge_step=self._resume_after + 1)
            self._events = opened.enter_context(writer)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # on a full disk closing fails as well, and must not hide the error that ended the run
        with contextlib.suppress(*([] if error is None else [OSError])):
            self._opened.close()

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Write the record of an epoch: the fields of an EpochEnded, None where there is no value.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self._lines.write(json.dumps(dict(values)) + "\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())  # the epoch's state, saved after it, must not outlive it
            for key, name in SCALARS.items():
                if values[key] is not None:
                    self._events.add_scalar(name, values[key], global_step=values["epoch"])
            self._events.flush()
        except OSError as error:
            msg = f"{self._path}: epoch {values['epoch']} cannot be written: {error.strerror or error}"
            raise OSError(error.errno, msg) from error  # what to do is said by the loop, which knows what is kept


def read(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run, in the order of its epochs.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a line is damaged.
    """
    path = folder / METRICS
    if not path.is_file():
        msg = f"{path}: no such file; expected the metrics of a training run in {folder}"
        raise FileNotFoundError(msg)
    return [record for record, _ in _records(path)]


def _drop(path: Path, *, after: int) -> None:
    """Cut off the records of epochs `after` this one, and a last line that was never finished."""
    if not path.exists():
        return
    ends = [end for record, end in _records(path) if record["epoch"] <= after]
    os.truncate(path, max(ends, default=0))


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each record and the byte after it; what a run was killed over while writing it is left out."""
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        end += len(line)
        if line.endswith(b"\n"):
            yield _record(line, where=f"{path}: line {number}"), end


def _record(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # of JSON, or of UTF-8
        record = None
    if not isinstance(record, dict) or not {"epoch", *SCALARS} <= record.keys():
        msg = f"{where}: expected the record of an epoch, got a damaged line; restore the file, or remove the line"
        raise ValueError(msg)
    return record
