"""`tenet train`: recipe -> RUN folder."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.console import console, progress

if TYPE_CHECKING:
    import threading

    from export.console import Tick
    from training.events import Event, TrainingEnded, TrainingStopped
    from training.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("train", epilog="Example: tenet train configs/digits.toml --out runs/digits")(train)


def train(
    recipe: Annotated[Path, typer.Argument(help="The training recipe, TOML.")],
    out: Annotated[Path, typer.Option(help="The RUN folder to write; it must not exist.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a classifier, with TENET group-wise inhibition if the recipe says so.

    Ctrl-C, or SIGTERM, saves the run after the iteration under way; a second one stops at once.
    """
    from training import processes, signals
    from training import recipe as recipes
    from training.events import TrainingStopped

    try:
        with signals.requests() as request:
            ended = run(recipes.read(recipe), out=out, device=device, resume=resume, stop=request.made)
    finally:
        processes.leave()
    if ended is None or isinstance(ended, TrainingStopped):
        if ended is not None:
            typer.echo(str(ended), err=True)
        processes.end(request.status)
    if as_json:
        typer.echo(json.dumps({"run": str(ended.folder), "test_accuracy": ended.test_accuracy, "sha256": ended.sha256}))
    else:
        console.print(f"{ended.folder}: {ended}", soft_wrap=True, markup=False)
    processes.end(0)


def run(
    recipe: Recipe,
    *,
    out: Path,
    device: str = "cpu",
    resume: bool = False,
    stop: threading.Event | None = None,
) -> TrainingEnded | TrainingStopped | None:
    """Train with a progress bar and return the last event; of several processes, all but the main one get none."""
    from training import loop
    from training.events import TrainingEnded, TrainingStopped

    main = os.environ.get("RANK", "0") == "0"  # which launchers number processes by
    with progress("training", total=None) if main else nullcontext(_nothing) as tick:
        for event in loop.train(recipe, out=out, device=device, resume=resume, stop=stop):
            if isinstance(event, TrainingEnded | TrainingStopped):
                return event
            _show(event, tick)
    return None


def _nothing(done: int, message: str, *, total: int | None = None) -> None:
    """Move no bar."""


def _show(event: Event, tick: Tick) -> None:
    """Move the bar with the iterations and leave a line for each epoch above it; a log has the lines alone."""
    from training.events import Advanced, EpochEnded

    if isinstance(event, Advanced) and console.is_terminal:
        tick(event.done, str(event), total=event.total)
    elif isinstance(event, EpochEnded):
        if console.is_terminal:
            console.print(f"epoch {event.epoch}/{event.epochs}: {event}", soft_wrap=True, markup=False)
        else:
            tick(event.epoch, str(event), total=event.epochs)
