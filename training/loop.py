"""The one training loop, from a recipe to a RUN folder; it yields events and prints nothing.

recipe -> data, model -> epochs of iterations, each `interval`-th with a TENET step
                      -> after each epoch: validate, keep the best weights, save RUN.partial, EpochEnded
                      -> the best weights on the test set, once; save RUN, TrainingEnded
stop, at any iteration -> save RUN.partial, TrainingStopped
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from training import augment, batches, checkpoint, curves, datasets, evaluation
from training import processes as launched
from training import run as runs
from training.checkpoint import Part
from training.events import Advanced, EpochEnded, Event, TrainingEnded, TrainingStopped
from training.iteration import Iteration
from training.metrics import EVENTS, METRICS, Metrics
from training.objective import Objective
from training.stream import Stream

if TYPE_CHECKING:
    import threading
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from training.batches import Source
    from training.processes import Processes
    from training.recipe import Recipe
    from training.run import Run

ADVANCE_SECONDS = 0.2  # between two Advanced; each waits for the device
CHECK_EVERY = 50  # batches between looks at whether the loss is still a number; each waits for the device
AGREE_EVERY = 10  # batches between looks, of several processes together, at whether one was asked to stop
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk, a quota or a file size that is full


def train(
    recipe: Recipe, *, out: Path, device: str = "cpu", resume: bool = False, stop: threading.Event | None = None
) -> Iterator[Event]:
    """Train as the recipe says and write the RUN folder `out`; `resume` goes on with an interrupted run.

    Once `stop` is set, the run is saved after the iteration under way and ends with TrainingStopped. The iterator
    may also be dropped at any time: what was done until the last epoch's end is in RUN.partial beside `out`. A
    resumed run ends with the same weights as an uninterrupted one.

    Where a launcher started several processes, each of them calls this; the first alone writes and yields events,
    the others return when all is done. `out` must be one folder to all of them, on several nodes too.

    Raises:
        ValueError: data, model, stage, device or interrupted run do not fit the recipe, `out` cannot be written,
            or the loss diverges.
        FileNotFoundError: the data are not there, or there is nothing to resume.
        FileExistsError: `out` exists or, without `resume`, its RUN.partial.
        OSError: the disk is full; RUN.partial is as the last save left it.
    """
    checkpoint.refuse_existing(out)
    checkpoint.refuse_unwritable(out)
    partial = checkpoint.partial_path(out)
    _refuse_foreign(partial)
    interrupted = (partial / checkpoint.STATE).exists()
    if interrupted and not resume:
        msg = f"{partial}: expected no interrupted run, got one; go on with it with --resume, or remove it"
        raise FileExistsError(msg)
    if resume and not interrupted:
        msg = f"{partial}: expected an interrupted run, got none; start without --resume"
        raise FileNotFoundError(msg)
    processes = launched.join(device)
    launched.own_batch(recipe.training, processes)
    processes.wait()  # the first process writes what the others have just looked for
    events = _train(recipe, out=out, processes=processes, resume=resume, stop=stop)
    return events if processes.main else _in_silence(events)


def _refuse_foreign(partial: Path) -> None:
    """Raise FileExistsError where a folder that will be removed, or renamed, holds what no run has written."""
    if partial.exists() and not partial.is_dir():
        msg = f"{partial}: expected a folder, got a file; remove what an earlier version left, or move it away"
        raise FileExistsError(msg)
    known = {METRICS, EVENTS, curves.CURVES, checkpoint.WEIGHTS, checkpoint.RUN, checkpoint.STATE}
    for path in partial.iterdir() if partial.exists() else ():
        if path.name.strip(".").removesuffix(".partial") not in known:
            msg = f"{partial}: expected nothing but an unfinished run in it, got {path.name}; move it away"
            raise FileExistsError(msg)


@dataclass(frozen=True)
class _Work:
    """What stays the same during a run."""

    recipe: Recipe
    out: Path
    processes: Processes
    sources: dict[str, Source]
    fingerprints: dict[str, str]
    steps: int  # batches in an epoch
    total: int  # iterations in the run
    stop: threading.Event | None

    @property
    def state(self) -> Path:
        """Return where the run's state is kept."""
        return checkpoint.partial_path(self.out) / checkpoint.STATE


def _train(
    recipe: Recipe, *, out: Path, processes: Processes, resume: bool, stop: threading.Event | None
) -> Iterator[Event]:
    work = _work(recipe, out=out, processes=processes, stop=stop)
    run = runs.begin(recipe, classes=len(work.sources["training"].class_names), processes=processes)
    iteration = _iteration(work, run)
    if resume:
        runs.take_up(run, work.state, recipe=recipe, data=work.fingerprints, processes=processes)
    with _threads(recipe.training.threads), _metrics(work, run) as metrics:
        while run.progress.epoch < recipe.training.epochs:
            ended = yield from _epoch(work, run, iteration)
            _preserve(work, run, metrics, ended)
            processes.wait()  # none leaves before the state is written: a launcher would end the others
            yield ended
            if isinstance(ended, TrainingStopped):
                return
        accuracy = _test(work, run)
    finished = _finish(work, run, test_accuracy=accuracy) if processes.main else None
    processes.wait()  # before the last event, after which the iterator may be dropped
    if finished is not None:
        yield finished


def _in_silence(events: Iterator[Event]) -> Iterator[Event]:
    """Do the work of a process that is not the main one, and tell nothing."""
    for _ in events:
        pass
    return iter(())


def _work(recipe: Recipe, *, out: Path, processes: Processes, stop: threading.Event | None) -> _Work:
    sources = {
        part: batches.source(
            images,
            settings=recipe.data,
            smallest_crop=recipe.augmentation.smallest_crop,
            device=processes.device,
        )
        for part, images in datasets.parts(recipe.data, seed=recipe.training.seed).items()
    }
    steps = batches.steps(len(sources["training"]), batch_size=recipe.training.batch_size)
    settings = recipe.adversarial
    replays = settings.replays if settings is not None and settings.method == "free" else 1
    work = _Work(
        recipe=recipe,
        out=out,
        processes=processes,
        sources=sources,
        fingerprints={part: source.fingerprint() for part, source in sources.items()},
        steps=steps,
        total=recipe.training.epochs * steps * replays,
        stop=stop,
    )
    _refuse_no_tenet(recipe, iterations=work.total)
    return work


def _refuse_no_tenet(recipe: Recipe, *, iterations: int) -> None:
    tenet = recipe.tenet
    if tenet is not None and iterations - iterations % tenet.interval < max(tenet.start, 1):
        msg = f"tenet.start: expected a TENET step in the run's {iterations} iterations, got none from "
        msg += f"{tenet.start} with interval {tenet.interval}; lower them, or leave [tenet] out"
        raise ValueError(msg)


def _iteration(work: _Work, run: Run) -> Iteration:
    images, _ = next(
        iter(work.sources["training"].evaluation(torch.arange(min(2, len(work.sources["training"]))), batch_size=2))
    )
    objective = Objective(
        run.model,
        recipe=work.recipe,
        processes=work.processes,
        centres=run.generators["centres"],
        example=augment.unit_range(images),
    )
    averaged = work.processes.averaging(objective)
    return Iteration(work.recipe, run, objective, averaged, work.processes, work.total)


def _epoch(work: _Work, run: Run, iteration: Iteration) -> Generator[Event, None, EpochEnded | TrainingStopped]:
    """Go through the rest of an epoch; return what it ended with."""
    settings, progress = work.recipe.training, run.progress
    began, spoken, first = time.perf_counter(), time.perf_counter(), progress.iterations
    before = progress.seconds
    run.model.train()
    for x, y in _batches(work, run):
        if _asked_to_stop(work, run):
            progress.seconds = before + time.perf_counter() - began
            _refuse_nan(work, run)
            _refuse_nan_weights(work, run)
            return TrainingStopped(work.state.parent, progress.epoch + 1, progress.iterations, work.total)
        iteration(x, y)
        progress.batch += 1
        if progress.batch % CHECK_EVERY == 0:
            _refuse_nan(work, run)
        now = time.perf_counter()
        if now - spoken > ADVANCE_SECONDS:
            spoken = now
            speed = (progress.iterations - first) * settings.batch_size / (now - began)
            loss, images, _, tenet_loss, tenet_steps = run.sums.tolist()
            tenet = tenet_loss / tenet_steps if tenet_steps else None
            yield Advanced(progress.epoch + 1, progress.iterations, work.total, loss / images, tenet, speed)
    loss, tenet_loss, correct = _refuse_nan(work, run)
    _refuse_nan_weights(work, run)
    trained = time.perf_counter() - began
    work.processes.agree(run.model)
    work.processes.agree(run.deployed)
    accuracy = _accuracy(work, run, "validation")
    robust = None if work.recipe.adversarial is None else _accuracy(work, run, "validation", attacked=True)
    run.end_epoch(accuracy=accuracy, robust_accuracy=robust)
    progress.seconds = before + time.perf_counter() - began
    return EpochEnded(
        epoch=progress.epoch,
        epochs=settings.epochs,
        done=progress.iterations,
        loss=loss,
        tenet_loss=tenet_loss,
        correct=correct,
        validation_accuracy=accuracy,
        robust_accuracy=robust,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        images_per_second=(progress.iterations - first) * settings.batch_size / trained,
        tenet_steps=progress.tenet_steps,
        seconds=progress.seconds,
    )


def _batches(work: _Work, run: Run) -> batches.Batches:
    """Return what is left of the epoch, this process's part of each batch."""
    settings, progress = work.recipe.training, run.progress
    source = work.sources["training"]
    order = batches.order(len(source), batch_size=settings.batch_size, seed=settings.seed, epoch=progress.epoch)
    left = order[progress.batch * settings.batch_size :]
    own = batches.own(left, settings.batch_size, work.processes.number, work.processes.count)
    size = launched.own_batch(settings, work.processes)
    return source.training(own, batch_size=size, seed=settings.seed, epoch=progress.epoch)


def _asked_to_stop(work: _Work, run: Run) -> bool:
    """Say whether to stop before this batch: if any process was asked to, all stop at the same one."""
    asked = work.stop is not None and work.stop.is_set()
    if work.processes.count == 1:
        return asked
    return run.progress.batch % AGREE_EVERY == 0 and sum(work.processes.each(int(asked))) > 0


def _refuse_nan(work: _Work, run: Run) -> tuple[float, float | None, float]:
    """Return the epoch's mean loss, mean TENET loss and share correct so far, of all processes.

    Raises:
        ValueError: a loss is not a number.
    """
    loss, images, correct, tenet_loss, tenet_steps = work.processes.sum(run.sums).tolist()
    for value in (loss, tenet_loss):
        if not math.isfinite(value):
            raise _diverged(work, run, f"loss: expected a finite number, got {value}")
    images = max(images, 1)
    return loss / images, tenet_loss / tenet_steps if tenet_steps else None, correct / images


def _refuse_nan_weights(work: _Work, run: Run) -> None:
    """Raise ValueError where the last step left weights that are no numbers, which its loss did not show."""
    for name, tensor in run.model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise _diverged(work, run, f"{name}: expected finite numbers, got others")


def _diverged(work: _Work, run: Run, what: str) -> ValueError:
    """Return the error for a run that cannot go on, with what is left of it."""
    kept = f"what was saved before is in {work.state.parent}" if work.state.exists() else "nothing is kept"
    msg = f"{what} in epoch {run.progress.epoch + 1}; lower training.learning_rate and begin again"
    return ValueError(f"{msg} ({kept})")


def _accuracy(work: _Work, run: Run, part: str, *, attacked: bool = False) -> float:
    stream = Stream(run.generators["attack"]) if attacked else None
    return evaluation.accuracy(
        run.deployed, work.sources[part], recipe=work.recipe, processes=work.processes, attack=stream
    )


def _preserve(work: _Work, run: Run, metrics: Metrics | None, ended: EpochEnded | TrainingStopped) -> None:
    """Write down how an epoch went, then the state: a resumed run drops the metrics of epochs after its state."""
    with _saying_what_is_kept(work):
        if isinstance(ended, EpochEnded) and metrics is not None:
            metrics.epoch(asdict(ended))
        runs.preserve(run, work.state, recipe=work.recipe, data=work.fingerprints, processes=work.processes)


@contextlib.contextmanager
def _saying_what_is_kept(work: _Work) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = f"{work.state.parent} is as it was" if work.state.exists() else "nothing is kept"
        msg = f"{work.out}: the run cannot be saved: {error.strerror or error}; {kept}; "
        way_out = "make room" if error.errno in FULL else "mend that"
        raise OSError(error.errno, f"{msg}{way_out}, and go on with --resume") from error


def _test(work: _Work, run: Run) -> float:
    """Test the best epoch's weights, once."""
    run.deployed.load_state_dict(run.best)
    return _accuracy(work, run, "test")


def _finish(work: _Work, run: Run, *, test_accuracy: float) -> TrainingEnded:
    progress, test_set = run.progress, work.sources["test"]
    partial = work.state.parent
    with _saying_what_is_kept(work):
        curves.draw(partial, best_epoch=progress.best_epoch, test_accuracy=test_accuracy)
        sha256 = checkpoint.finish(
            partial,
            out=work.out,
            model=run.deployed,
            recipe=work.recipe,
            class_names=test_set.class_names,
            input_shape=test_set.input_shape,  # both are those of the training set
            data={name: Part(images=len(s), sha256=work.fingerprints[name]) for name, s in work.sources.items()},
            metrics={
                "test_accuracy": test_accuracy,
                "test_images": len(test_set),
                "validation_accuracy": progress.best_accuracy,
                "best_epoch": progress.best_epoch,
                "iterations": progress.iterations,
                "tenet_steps": progress.tenet_steps,
                "seconds": progress.seconds,
            },
        )
    return TrainingEnded(
        folder=work.out,
        test_accuracy=test_accuracy,
        validation_accuracy=progress.best_accuracy,
        best_epoch=progress.best_epoch,
        seconds=progress.seconds,
        tenet_steps=progress.tenet_steps,
        iterations=progress.iterations,
        sha256=sha256,
    )


@contextlib.contextmanager
def _metrics(work: _Work, run: Run) -> Iterator[Metrics | None]:
    """Open the metrics of the run, in the main process."""
    if not work.processes.main:
        yield None
        return
    partial = work.state.parent
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with Metrics(partial, resume_after=run.progress.epoch) as metrics:
            yield metrics
    finally:
        if not work.state.exists():  # nothing that could be resumed
            shutil.rmtree(partial)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
