"""`python -m export`: what `tenet export` and `tenet import` do, for scripts that need no service code."""

from __future__ import annotations

import sys

import typer

from export import command
from export.console import complain

BAD_INPUT = 2

app = typer.Typer(
    name="python -m export",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
app.command("run")(command.export)
app.command("import")(command.import_model)


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        complain(str(error))
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
