"""`tenet export` and `tenet import`: what export.command has, among the other verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export import command

if TYPE_CHECKING:
    import typer


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    epilog = (
        "Examples: tenet export runs/digits --repository models --name digits  |  "
        "tenet export --from digits --repository models --name digits-int8 --precision int8"
    )
    app.command("export", epilog=epilog)(command.export)
    epilog = "Example: tenet import resnet50.onnx --repository models --name resnet50 --labels classes.txt"
    app.command("import", epilog=epilog)(command.import_model)
