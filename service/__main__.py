"""The command line `tenet` (= `python -m service`): one verb after another, in the order of the flow."""

from __future__ import annotations

import os
import signal
import sys

import typer

from export.console import complain
from service.commands import audit, demo, explain, export, models, predict, serve, train
from service.errors import ServiceError
from service.version import VERSION

# What a user can mend; everything else is a defect of ours and keeps its traceback.
_EXPECTED = (ValueError, FileNotFoundError, FileExistsError, RuntimeError, OSError, ServiceError)

# Which extra brings a package that the bare install does not have.
_EXTRAS = {
    "accelerate": "train",
    "dbos": "audit",
    "foolbox": "audit",
    "fsspec": "s3",
    "gcsfs": "gs",
    "jinja2": "audit",
    "matplotlib": "train",
    "onnxscript": "train",
    "s3fs": "s3",
    "safetensors": "train",
    "sklearn": "train",
    "starlette": "web",
    "tensorboard": "train",
    "timm": "train",
    "torch": "train",
    "torchvision": "train",
    "uvicorn": "web",
}

BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143

app = typer.Typer(
    name="tenet",
    help="Train, export, serve and audit image classifiers: robustness measured on what is deployed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
train.register(app)
explain.register(app)
export.register(app)
models.register(app)
serve.register(app)
predict.register(app)
audit.register(app)
demo.register(app)


def _print_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"tenet {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),  # noqa: FBT001, FBT003
) -> None:
    _print_version(wanted=version)


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit code 2."""
    # So that a command that is told to end cleans up behind itself, as it does after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        # Typer turns Ctrl-C into this exit code, and says nothing.
        if ended.code == INTERRUPTED:
            complain("interrupted")
        raise
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone: that is no error, and there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        complain(f"this needs {error.name}, which is not installed; pip install 'tenet[{_EXTRAS[error.name]}]'")
        sys.exit(BAD_INPUT)
    except _EXPECTED as error:
        complain(str(error))
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
