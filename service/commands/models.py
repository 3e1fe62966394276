"""`tenet models`: what is in a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from service.commands.console import console, print_table

RepositoryOption = Annotated[Path, typer.Option("--repository", help="The model repository.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    models = typer.Typer(help="List, show and verify the models of a repository.", no_args_is_help=True)
    models.command("list", epilog="Example: tenet models list --repository models")(list_models)
    models.command("show", epilog="Example: tenet models show digits --repository models")(show)
    models.command("verify", epilog="Example: tenet models verify digits-rtx --repository models")(verify)
    app.add_typer(models, name="models")


def list_models(
    repository: RepositoryOption,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every version of every model."""
    from export.repository import Repository

    found = Repository(repository)
    manifests = [found.find(name, number).manifest for name in found.models() for number in found.versions(name)]
    if as_json:
        typer.echo(json.dumps([manifest.model_dump(mode="json") for manifest in manifests], indent=2))
        return
    rows = [[f"{m.model}@{m.version}", m.precision, m.runtime, m.parity.status, m.sha256[:12]] for m in manifests]
    print_table(["model", "precision", "runtime", "parity", "sha256"], rows)


def show(
    model: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")],
    repository: RepositoryOption,
) -> None:
    """Print the manifest of one version, JSON, after checking the engine file's sha256."""
    from export import manifest
    from export.repository import Repository

    typer.echo(manifest.verify(Repository(repository).parse(model).folder).model_dump_json(indent=2))


def verify(
    model: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")],
    repository: RepositoryOption,
    images: Annotated[Path | None, typer.Option(help="Folder of class folders for the comparison.")] = None,
) -> None:
    """Complete or repeat a version's proof of parity on this machine; it is served once the proof is there."""
    from export import publish
    from export.repository import Repository
    from service.commands.export import describe

    found = Repository(repository)
    console.print(
        describe(publish.verify(found.parse(model), repository=found, images=images)), markup=False, soft_wrap=True
    )
