"""`python -m training RECIPE.toml --out RUN`: train a classifier, printing one line per epoch.

The same under a launcher: `torchrun --nproc-per-node 2 -m training ...` or `accelerate launch -m training ...`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from training import loop, processes, recipe, signals
from training.events import Advanced, EpochEnded, Event, TrainingEnded, TrainingStopped

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended, as shells have it


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 failed, 130 or 143 stopped by Ctrl-C or SIGTERM."""
    options = _parser().parse_args(arguments)
    try:
        with signals.requests() as request:
            for event in loop.train(
                recipe.read(options.recipe),
                out=options.out,
                device=options.device,
                resume=options.resume,
                stop=request.made,
            ):
                _tell(event)
        stopped = request.made.is_set() and not options.out.exists()
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError is PyTorch's, as of a device that is full
        for line in str(error).splitlines():
            _say(f"error: {line}", to=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("interrupted; --resume goes on from the last save, if there is one", to=sys.stderr)
        return INTERRUPTED
    finally:
        processes.leave()
    return request.status if stopped else 0


def _tell(event: Event) -> None:
    match event:
        case Advanced():
            pass  # a log needs no more than a line per epoch
        case EpochEnded():
            _say(f"epoch {event.epoch}/{event.epochs}: {event}", to=sys.stdout)
        case TrainingStopped():
            _say(str(event), to=sys.stderr)
        case TrainingEnded():
            _say(f"{event.folder}: {event}", to=sys.stdout)


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
    processes.end(main())
