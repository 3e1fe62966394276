"""`tenet train`: recipe -> RUN folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import complain, console, progress

if TYPE_CHECKING:
    from training.loop import TrainingEnded
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
    """Train a classifier, with TENET group-wise inhibition if the recipe says so."""
    from training import checkpoint
    from training import recipe as recipes

    try:
        ended = run(recipes.read(recipe), out=out, device=device, resume=resume)
    except KeyboardInterrupt:
        if checkpoint.partial_path(out).exists():
            complain("the epochs that are done are kept; go on with the same command and --resume")
        raise
    if as_json:
        typer.echo(json.dumps({"run": str(ended.folder), "test_accuracy": ended.test_accuracy, "sha256": ended.sha256}))
    else:
        console.print(f"{ended.folder}: {ended}", soft_wrap=True)


def run(recipe: Recipe, *, out: Path, device: str = "cpu", resume: bool = False) -> TrainingEnded:
    """Train with a progress bar and return the last event."""
    from training import loop

    with progress("training", total=recipe.training.epochs) as tick:
        for event in loop.train(recipe, out=out, device=device, resume=resume):
            if isinstance(event, loop.TrainingEnded):
                return event
            tick(event.epoch, str(event))
    raise AssertionError("a training run ends with TrainingEnded")
