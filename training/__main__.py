"""`python -m training RECIPE.toml --out RUN`: train a classifier, printing one line per epoch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from training import checkpoint, loop, recipe

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended, as shells have it


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 failed, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        for event in loop.train(
            recipe.read(options.recipe), out=options.out, device=options.device, resume=options.resume
        ):
            _say(_line(event), to=sys.stdout)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError is PyTorch's, as of a device that is full
        for line in str(error).splitlines():
            _say(f"error: {line}", to=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = checkpoint.partial_path(options.out).exists()
        way_on = "--resume goes on after the last whole epoch" if kept else "nothing was written"
        _say(f"interrupted; {way_on}", to=sys.stderr)
        return INTERRUPTED
    return 0


def _line(event: loop.Event) -> str:
    subject = event.folder if isinstance(event, loop.TrainingEnded) else f"epoch {event.epoch}/{event.epochs}"
    return f"{subject}: {event}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train a classifier as a recipe says.",
        epilog="example: python -m training configs/digits.toml --out runs/digits",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml", help="the recipe, the only source of settings")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the folder to write; must be new")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run of that folder")
    parser.add_argument("--device", default="cpu", help="PyTorch's name of the device, cpu (default) or cuda")
    return parser


def _say(line: str, *, to: TextIO) -> None:
    print(line, file=to, flush=True)


if __name__ == "__main__":
    sys.exit(main())
