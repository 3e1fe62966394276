"""What a training run tells while it goes on; each event's text is a line for people.

Advanced (often) ... EpochEnded ... Advanced ... EpochEnded -> TrainingEnded | TrainingStopped
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Advanced:
    """Some iterations are over, `done` of the run's `total`; losses are means of the epoch so far."""

    epoch: int
    done: int
    total: int
    loss: float
    tenet_loss: float | None
    images_per_second: float

    def __str__(self) -> str:
        tenet = "" if self.tenet_loss is None else f", TENET loss {self.tenet_loss:.3f}"
        return f"epoch {self.epoch}, loss {self.loss:.3f}{tenet}, {self.images_per_second:.0f} images/s"


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is over.

    Losses are means over the epoch's steps, `tenet_loss` None where it had no TENET step. `correct`, in training,
    `validation_accuracy` and, in adversarial training, `robust_accuracy` of the validation images are shares in
    [0, 1]. `done`, `tenet_steps` and `seconds` are the run's.
    """

    epoch: int
    epochs: int
    done: int
    loss: float
    tenet_loss: float | None
    correct: float
    validation_accuracy: float
    robust_accuracy: float | None
    learning_rate: float
    images_per_second: float
    tenet_steps: int
    seconds: float

    def __str__(self) -> str:
        tenet = "" if self.tenet_loss is None else f", TENET loss {self.tenet_loss:.3f}"
        robust = "" if self.robust_accuracy is None else f", robust {self.robust_accuracy:.2%}"
        return f"loss {self.loss:.3f}{tenet}, validation accuracy {self.validation_accuracy:.2%}{robust}"


@dataclass(frozen=True)
class TrainingEnded:
    """The run is over and `folder` is written; both accuracies, in [0, 1], are those of `best_epoch`."""

    folder: Path
    test_accuracy: float
    validation_accuracy: float
    best_epoch: int
    seconds: float
    tenet_steps: int
    iterations: int
    sha256: str

    def __str__(self) -> str:
        return (
            f"test accuracy {self.test_accuracy:.2%} (epoch {self.best_epoch}, validation "
            f"{self.validation_accuracy:.2%}), {self.iterations} iterations, {self.tenet_steps} TENET steps, "
            f"{self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class TrainingStopped:
    """The run was asked to stop, and its state is in `partial`: nothing is lost."""

    partial: Path
    epoch: int
    done: int
    total: int

    def __str__(self) -> str:
        return f"stopped after {self.done} of {self.total} iterations; go on with the same command and --resume"


Event = Advanced | EpochEnded | TrainingEnded | TrainingStopped
