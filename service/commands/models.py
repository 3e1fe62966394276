"""`tenet models`: what is in a repository, which version is which, and what may go."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from export.console import console, print_table
from service.commands.connection import Connection, connected

if TYPE_CHECKING:
    from export.manifest import Manifest
    from export.repository import Snapshot

RepositoryOption = Annotated[
    str, typer.Option("--repository", help="The model repository: a folder, s3://bucket/prefix or gs://bucket/prefix.")
]
VersionArgument = Annotated[str, typer.Argument(help="NAME (its latest version), NAME@VERSION or NAME@ALIAS.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_HOURS = {"h": 1, "d": 24, "w": 24 * 7}


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    models = typer.Typer(
        help="List, show, verify, promote and remove the models of a repository; ask a server how its models do.",
        no_args_is_help=True,
    )
    models.command("list", epilog="Example: tenet models list --repository models")(list_models)
    models.command("show", epilog="Example: tenet models show digits --repository models")(show)
    models.command("verify", epilog="Example: tenet models verify digits-rtx --repository models")(verify)
    models.command("promote", epilog="Example: tenet models promote digits@3 --alias stable --repository models")(
        promote
    )
    models.command("remove", epilog="Example: tenet models remove digits@1 --repository models")(remove)
    models.command("prune", epilog="Example: tenet models prune --keep 3 --older-than 30d --repository models")(prune)
    models.command("status", epilog="Example: tenet models status --server 127.0.0.1:8001")(connected(status))
    app.add_typer(models, name="models")


def list_models(repository: RepositoryOption, *, as_json: JsonOption = False) -> None:
    """List every version of every model, with its aliases and its proof."""
    from export.repository import open_repository

    seen = open_repository(repository).snapshots()
    if as_json:
        typer.echo(json.dumps([record for model in seen for record in _records(model)], indent=2))
        return
    rows = [_row(model, number) for model in seen for number in model.versions]
    print_table(["model", "aliases", "precision", "runtime", "parity", "agreement", "sha256"], rows)
    for why in [why for model in seen for why in (*model.damaged.values(), model.state_damage) if why]:
        console.print(f"damaged: {why}", markup=False, soft_wrap=True)


def show(model: VersionArgument, repository: RepositoryOption) -> None:
    """Print the manifest of one version, JSON, after checking the engine file's sha256."""
    from export import manifest
    from export.repository import open_repository

    typer.echo(manifest.verify(open_repository(repository).parse(model).folder).model_dump_json(indent=2))


def verify(
    model: VersionArgument,
    repository: RepositoryOption,
    images: Annotated[Path | None, typer.Option(help="Folder of class folders for the comparison.")] = None,
    *,
    files_only: Annotated[bool, typer.Option(help="Check the files alone, and leave the proof as it is.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a version, then complete or repeat its proof of parity on this machine.

    It is served once the proof is there. Exit code 1 if parity failed, which is recorded. Where nothing can be recorded
    only --files-only is of use.
    """
    from export import summary
    from export.command import failures
    from export.repository import open_repository

    found = open_repository(repository)
    version = found.parse(model)
    checked = found.check(version)
    if files_only:
        _say(
            {"model": checked.model, "version": checked.version, "files": len(checked.files) + 1},
            f"{version}: {len(checked.files) + 1} files are, byte for byte, those that were published",
            as_json=as_json,
        )
        return
    found.check_writable(checked.model)  # before a long proof of which nothing could be kept
    from export import publish

    with failures():
        proved = publish.verify(version, repository=found, images=images)
    summary.report(proved, as_json=as_json)


def promote(
    model: VersionArgument,
    repository: RepositoryOption,
    alias: Annotated[str, typer.Option(help="A plain name, such as stable or canary.")] = "stable",
    *,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version that has passed its proof, at once for all who read the repository."""
    from export.repository import open_repository

    found = open_repository(repository)
    version = found.parse(model)
    former = found.promote(version, alias)
    name, number = version.manifest.model, version.manifest.version
    before = "there was none before" if former is None else f"before, {name}@{former} was"
    if former == number:
        before = "as before"
    record = {"model": name, "alias": alias, "version": number, "former": former}
    _say(record, f"{version} is {alias} now; {before}", as_json=as_json)


def remove(
    model: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    repository: RepositoryOption,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Though an alias points at it, or variants were made from it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove one version; its number is not given again."""
    from export.repository import open_repository

    if "@" not in model:
        raise ValueError(f"{model!r}: expected NAME@VERSION, the version to remove; `tenet models list` shows them")
    found = open_repository(repository)
    name, number = found.resolve(model)
    found.remove(name, number, force=force)
    _say({"model": name, "version": number}, f"{name}@{number}: removed", as_json=as_json)


def prune(
    model: Annotated[str | None, typer.Argument(help="NAME: of this model alone.")] = None,
    *,
    repository: RepositoryOption,
    keep: Annotated[int | None, typer.Option(min=1, help="Keep the newest KEEP versions of each model.")] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Keep what was made since: 12h, 30d, 8w; with --keep, what either keeps.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove old versions, and what killed processes left.

    What an alias points at stays, what a staying version was made from, and each model's latest servable version.
    Without --keep and --older-than no version goes. What is damaged stays, and is named.
    """
    from export.repository import open_repository

    age = None if older_than is None else _age(older_than)
    pruned = open_repository(repository).prune(model, keep=keep, older_than=age, dry_run=dry_run)
    gone = {"versions": [str(version) for version in pruned.versions], "remains": list(pruned.remains)}
    if as_json:
        typer.echo(json.dumps({**gone, "damaged": list(pruned.damaged), "dry_run": dry_run}, indent=2))
        return
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{what}: {verb}" for what in [*gone["versions"], *gone["remains"]]] or ["nothing to remove"]
    for line in [*lines, *(f"damaged, and left: {why}" for why in pruned.damaged)]:
        console.print(line, markup=False, soft_wrap=True)


def status(
    connection: Connection,
    *,
    over: Annotated[
        float, typer.Option("--over", min=0, max=3600, help="Seconds over which images/s are counted; 0 leaves it out.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show the models of a running server: which versions answer, or why not, and what they have done."""
    from service.commands import model_status

    with connection.client() as client:
        found = model_status.ask(client, over_s=over)
    if as_json:
        typer.echo(json.dumps([model_status.record(each) for each in found], indent=2))
        return
    print_table(model_status.HEADINGS, [model_status.row(each) for each in found])
    for each in found:
        if each.entry.reason:
            console.print(f"{each.name}: {each.entry.reason}", markup=False, soft_wrap=True)


def _say(record: dict[str, Any], line: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        console.print(line, markup=False, soft_wrap=True)


def _records(seen: Snapshot) -> list[dict[str, Any]]:
    """Return each version's manifest with its aliases, or why it cannot be read: one that is damaged hides no other."""
    return [
        {**manifest.model_dump(mode="json"), **_aliases(seen, number)}
        if (manifest := seen.manifests.get(number)) is not None
        else {"model": seen.model, "version": number, "error": seen.damaged[number]}
        for number in seen.versions
    ]


def _aliases(seen: Snapshot, number: int) -> dict[str, Any]:
    if seen.state_damage:
        return {"aliases": None, "aliases_error": seen.state_damage}
    return {"aliases": seen.aliases_of(number)}


def _row(seen: Snapshot, number: int) -> list[str]:
    manifest: Manifest | None = seen.manifests.get(number)
    name, aliases = f"{seen.model}@{number}", "damaged" if seen.state_damage else ", ".join(seen.aliases_of(number))
    if manifest is None:
        return [name, aliases, "", "", "damaged", "", ""]
    agreement = manifest.parity.agreement
    return [
        name,
        aliases,
        manifest.precision,
        manifest.runtime,
        _status(manifest.parity.status),
        "" if agreement is None else f"{agreement:.2%}",
        manifest.sha256[:12],
    ]


def _status(status: str) -> str:
    """Return what a proof's status means for serving: one that failed, and was published all the same, blocks."""
    return "blocked" if status == "failed" else status


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if found is None:
        raise ValueError(f"--older-than: expected hours, days or weeks, such as 12h, 30d or 8w, got {text!r}")
    return timedelta(hours=int(found[1]) * _HOURS[found[2]])
