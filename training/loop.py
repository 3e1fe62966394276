"""The one training loop, from a recipe to a RUN folder; it yields events and prints nothing.

recipe -> data, model -> epochs of ordinary steps, each `interval`-th followed by a TENET step
                      -> after each epoch: validate, keep the best weights, save RUN.partial, EpochEnded
                      -> the best weights on the test set, once; save RUN, TrainingEnded
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from training import checkpoint, data
from training import run as runs
from training.inhibition import TenetStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from training.data import LabelledImages
    from training.recipe import Recipe, Schedule
    from training.run import Run

WARM_UP = 0.3  # share of a one-cycle run in which the rate rises; PyTorch's OneCycleLR has the same
FIRST_RATE = 0.04  # share of the peak that a one-cycle run starts from; PyTorch's 1 / div_factor
PARTS = ("training", "validation", "test")
EVALUATION_BATCH = 500  # images; bounds memory and does not change accuracies


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is over.

    Losses are means over the epoch's steps, `tenet_loss` None where it had no TENET step. `correct`, in
    training, and `validation_accuracy` are shares in [0, 1]. `tenet_steps` and `seconds` are the run's.
    """

    epoch: int
    epochs: int
    loss: float
    tenet_loss: float | None
    correct: float
    validation_accuracy: float
    tenet_steps: int
    seconds: float

    def __str__(self) -> str:
        tenet = "" if self.tenet_loss is None else f", TENET loss {self.tenet_loss:.3f}"
        return f"loss {self.loss:.3f}{tenet}, validation accuracy {self.validation_accuracy:.2%}"


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


Event = EpochEnded | TrainingEnded


def train(recipe: Recipe, *, out: Path, device: str = "cpu", resume: bool = False) -> Iterator[Event]:
    """Train as the recipe says and write the RUN folder `out`; `resume` goes on with an interrupted run.

    The iterator may be dropped at any time: what was done until the last epoch's end is in RUN.partial beside
    `out`, and a resumed run ends with the same weights as an uninterrupted one. A finished run removes it.

    Raises:
        ValueError: data, stage, device or interrupted run do not fit the recipe, `out` cannot be written, or the
            loss diverges.
        FileNotFoundError: the data are not there, or there is nothing to resume.
        FileExistsError: `out` exists or, without `resume`, its RUN.partial.
    """
    checkpoint.refuse_existing(out)
    checkpoint.refuse_unwritable(out)
    partial = checkpoint.partial_path(out)
    if partial.exists() and not resume:
        msg = f"{partial}: expected no interrupted run, got one; go on with it with --resume, or remove it"
        raise FileExistsError(msg)
    if resume and not partial.exists():
        msg = f"{partial}: expected an interrupted run, got none; start without --resume"
        raise FileNotFoundError(msg)
    return _train(recipe, out=out, device=_device(device), resume=resume)


def rate(share: float, *, schedule: Schedule) -> float:
    """Return the learning rate, as a share of its peak, when `share` of the run is done."""
    if schedule == "constant":
        return 1.0
    if share < WARM_UP:
        return FIRST_RATE + (1 - FIRST_RATE) * (1 - math.cos(math.pi * share / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2


def _train(recipe: Recipe, *, out: Path, device: torch.device, resume: bool) -> Iterator[Event]:
    training_set, validation_set, test_set = sets = _sets(recipe)
    fingerprints = {part: images.fingerprint() for part, images in zip(PARTS, sets, strict=True)}
    images, labels = _on_device(training_set, device)
    validation = _on_device(validation_set, device)
    partial = checkpoint.partial_path(out)
    run = runs.begin(recipe, classes=len(training_set.class_names), device=device)
    tenet = _tenet_step(recipe, run, images)
    if resume:
        runs.take_up(run, partial, recipe=recipe, data=fingerprints)
    with _threads(recipe.training.threads):
        while run.progress.epoch < recipe.training.epochs:
            began = time.perf_counter()
            loss, tenet_loss, correct = _epoch(run, recipe, images, labels, tenet=tenet)
            accuracy = _accuracy(run.model, *validation)
            run.end_epoch(accuracy=accuracy, seconds=time.perf_counter() - began)
            runs.preserve(run, partial, recipe=recipe, data=fingerprints)
            yield EpochEnded(
                epoch=run.progress.epoch,
                epochs=recipe.training.epochs,
                loss=loss,
                tenet_loss=tenet_loss,
                correct=correct,
                validation_accuracy=accuracy,
                tenet_steps=run.progress.tenet_steps,
                seconds=run.progress.seconds,
            )
        ended = _finish(run, recipe, test_set, out=out, device=device)
    partial.unlink(missing_ok=True)
    yield ended


def _epoch(
    run: Run, recipe: Recipe, images: Tensor, labels: Tensor, *, tenet: TenetStep | None
) -> tuple[float, float | None, float]:
    """Go through the data once; return the mean ordinary loss, the mean TENET loss and the share correct."""
    settings, progress = recipe.training, run.progress
    iterations = settings.epochs * data.steps(len(images), batch_size=settings.batch_size)
    losses, tenet_losses, correct = list[Tensor](), list[Tensor](), list[Tensor]()
    run.model.train()
    for x, y in data.batches(
        images,
        labels,
        batch_size=settings.batch_size,
        generator=run.shuffling,
        crop_padding=settings.crop_padding,
        flip=settings.flip,
    ):
        share = rate(progress.iterations / iterations, schedule=settings.schedule)
        run.optimizer.param_groups[0]["lr"] = settings.learning_rate * share
        logits = run.model(x)
        losses.append(_step(run.optimizer, functional.cross_entropy(logits, y)))
        correct.append((logits.argmax(1) == y).float().mean())
        progress.iterations += 1
        if tenet is not None and _due(recipe, progress.iterations):
            tenet_loss = tenet(x, y, logits=logits.detach())
            if tenet_loss is not None:
                tenet_losses.append(_step(run.optimizer, tenet_loss))
                progress.tenet_steps += 1
    tenet_mean = _finite_mean(tenet_losses, run=run) if tenet_losses else None
    return _finite_mean(losses, run=run), tenet_mean, torch.stack(correct).mean().item()


def _step(optimizer: torch.optim.SGD, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _due(recipe: Recipe, iterations: int) -> bool:
    tenet = recipe.tenet
    return tenet is not None and iterations >= tenet.start and iterations % tenet.interval == 0


def _finite_mean(losses: list[Tensor], *, run: Run) -> float:
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        msg = f"loss: expected a finite number, got {mean} in epoch {run.progress.epoch + 1}; "
        raise ValueError(msg + "lower training.learning_rate")
    return mean


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model, left in evaluation mode, classifies correctly."""
    model.eval()
    with torch.inference_mode():
        right = [
            (model(data.unit_range(x)).argmax(1) == y).sum()
            for x, y in zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True)
        ]
    return int(torch.stack(right).sum()) / len(images)


def _finish(run: Run, recipe: Recipe, test_set: LabelledImages, *, out: Path, device: torch.device) -> TrainingEnded:
    """Test the best weights, for the first and only time, and save them."""
    run.model.load_state_dict(run.best)
    progress, accuracy = run.progress, _accuracy(run.model, *_on_device(test_set, device))
    sha256 = checkpoint.save(
        out,
        model=run.model,
        recipe=recipe,
        class_names=test_set.class_names,
        input_shape=(3, *test_set.images.shape[1:3]),  # both are those of the training set
        metrics={
            "test_accuracy": accuracy,
            "test_images": len(test_set),
            "validation_accuracy": progress.best_accuracy,
            "best_epoch": progress.best_epoch,
            "iterations": progress.iterations,
            "tenet_steps": progress.tenet_steps,
            "seconds": progress.seconds,
        },
    )
    return TrainingEnded(
        folder=out,
        test_accuracy=accuracy,
        validation_accuracy=progress.best_accuracy,
        best_epoch=progress.best_epoch,
        seconds=progress.seconds,
        tenet_steps=progress.tenet_steps,
        iterations=progress.iterations,
        sha256=sha256,
    )


def _tenet_step(recipe: Recipe, run: Run, images: Tensor) -> TenetStep | None:
    settings = recipe.tenet
    if settings is None:
        return None
    iterations = recipe.training.epochs * data.steps(len(images), batch_size=recipe.training.batch_size)
    last = iterations - iterations % settings.interval
    if last < max(settings.start, 1):
        msg = f"tenet.start: expected a TENET step in the run's {iterations} iterations, got none from "
        msg += f"{settings.start} with interval {settings.interval}; lower them, or leave [tenet] out"
        raise ValueError(msg)
    tenet = TenetStep(
        run.model,
        stage=settings.stage,
        groups=settings.groups,
        variant=settings.variant,
        lambda_tenet=settings.lambda_tenet,
        lambda_orth=settings.lambda_orth,
        exact=settings.exact,
        generator=run.centres,
    )
    tenet.check(data.unit_range(images[:2]))
    return tenet


def _sets(recipe: Recipe) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Return the images to train, to validate and to test with."""
    whole, test = _load(recipe, split="train"), _load(recipe, split="test")
    for what, expected, got in (
        ("classes", whole.class_names, test.class_names),
        ("height, width and channels", whole.images.shape[1:], test.images.shape[1:]),
    ):
        if got != expected:
            msg = f"data.root: expected the {what} of the training split, {expected}, in the test split, got {got}; "
            raise ValueError(msg + f"make them alike in {recipe.data.root}")
    kept, held = data.stratified(whole.labels, fraction=recipe.data.validation, seed=recipe.training.seed)
    if len(held) == 0:
        msg = f"data: expected a class with an image to validate with, got {len(whole)} images, one per class"
        raise ValueError(msg)
    return whole.subset(kept), whole.subset(held), test


def _load(recipe: Recipe, *, split: str) -> LabelledImages:
    root = None if recipe.data.root is None else Path(recipe.data.root)
    return data.load(recipe.data.name, split=split, root=root)


def _on_device(images: LabelledImages, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.images).to(device), torch.from_numpy(images.labels).to(device)


def _device(name: str) -> torch.device:
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:  # of an unknown name, and of CUDA where there is none
        reason = str(error).split("\n", maxsplit=1)[0]
        msg = f"device: expected one that this machine has, got {name!r}: {reason}"
        raise ValueError(msg) from error
    return device


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
