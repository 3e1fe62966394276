"""`tenet audit`: run a plan here, or submit it to a server and follow it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.console import complain, console, print_table, progress
from protos.audit.v1 import audit_pb2
from service.commands.connection import (
    CaOption,
    CertOption,
    Connection,
    KeyOption,
    TokenFileOption,
    connected,
)

if TYPE_CHECKING:
    from export.repository import Repository
    from service.audit.plan import Plan
    from service.audit.report import Report
    from service.audit.run import Finished
    from service.client import Client

FAILED = 1

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IdArgument = Annotated[str, typer.Argument(help="The audit's id, as `submit` printed it.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON to this file.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML page to this file.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    audit = typer.Typer(help="Attack, corrupt and compare deployed engines.", no_args_is_help=True)
    audit.command("run", epilog="Example: tenet audit run plan.toml --html report.html")(run)
    audit.command("submit", epilog="Example: tenet audit submit plan.toml --server 127.0.0.1:8001")(connected(submit))
    audit.command("watch", epilog="Example: tenet audit watch ID --server 127.0.0.1:8001")(connected(watch))
    audit.command("show", epilog="Example: tenet audit show ID --server 127.0.0.1:8001")(connected(show))
    audit.command("list", epilog="Example: tenet audit list --server 127.0.0.1:8001")(connected(list_audits))
    audit.command("report", epilog="Example: tenet audit report ID --server 127.0.0.1:8001 --html r.html")(
        connected(report)
    )
    audit.command("cancel", epilog="Example: tenet audit cancel ID --server 127.0.0.1:8001")(connected(cancel))
    app.add_typer(audit, name="audit")


def run(
    plan: Annotated[Path, typer.Argument(help="The audit plan, TOML.")],
    *,
    repository: Annotated[
        str | None, typer.Option(help="The model repository; overrides the plan's target.repository.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default where the engine belongs.", show_default=False)
    ] = None,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write report, page, outcomes of every image and the worst examples into this folder."),
    ] = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
) -> None:
    """Run an audit in this process; exit code 1 if a gate fails, or the target fails on the way."""
    from export.repository import open_repository
    from service.audit import plan as plans

    parsed = plans.read(plan)
    place = repository or _relative(parsed, plan)
    # An audit may take hours: that there is no place for its report must be known before.
    for option, file in (("--json", json_file), ("--html", html_file), ("--out", out and out / "report.json")):
        if file is not None:
            _check_writable(option, file)
    finished = _run_here(
        parsed,
        None if place is None else open_repository(place),
        device=device,
        connection=Connection(token_file=token_file, ca=ca, cert=cert, key=key),
    )
    show_reports([finished.report])
    _write(finished.report.to_json(), json_file, html_file)
    if out is not None:
        finished.write(out)
    if not finished.report.complete:
        complain(f"the audit is not complete: {finished.report.error}")
        raise typer.Exit(FAILED)
    _exit_by(finished.report)


def submit(plan: Annotated[Path, typer.Argument(help="The audit plan, TOML.")], connection: Connection) -> None:
    """Submit an audit to a server; the last line printed is its id alone."""
    from service.audit import plan as plans

    parsed = plans.read(plan)
    with connection.client() as client:
        submitted = client.submit_audit(plans.to_toml(parsed))
    console.print(f"submitted: audit of {submitted.model}@{submitted.version}")
    typer.echo(submitted.id)


def watch(audit_id: IdArgument, connection: Connection) -> None:
    """Follow an audit until it has ended; exit code 1 if it failed, was cancelled, or a gate failed."""
    with connection.client() as client:
        follow(client, [audit_id])
        ended = client.audit(audit_id)
        if ended.state != audit_pb2.AUDIT_STATE_SUCCEEDED:
            complain(f"audit {audit_id}: {_state(ended)}{': ' + ended.error if ended.error else ''}")
            raise typer.Exit(FAILED)
        finished = finished_report(client, audit_id)
    show_reports([finished])
    _exit_by(finished)


def show(audit_id: IdArgument, connection: Connection, *, as_json: JsonOption = False) -> None:
    """Show where an audit stands."""
    with connection.client() as client:
        audit = client.audit(audit_id)
    if as_json:
        typer.echo(json.dumps(_record(audit)))
    else:
        print_table(["audit", "model", "state", "error"], [_row(audit)])


def list_audits(
    connection: Connection,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 50,
    *,
    as_json: JsonOption = False,
) -> None:
    """List audits, newest first."""
    with connection.client() as client:
        audits = client.audits(limit=limit)
    if as_json:
        typer.echo(json.dumps([_record(audit) for audit in audits]))
    else:
        print_table(["audit", "model", "state", "error"], [_row(audit) for audit in audits])


def report(
    audit_id: IdArgument, connection: Connection, json_file: JsonFile = None, html_file: HtmlFile = None
) -> None:
    """Fetch an audit's report: to files, or as a table."""
    from service.audit import report as reports

    with connection.client() as client:
        content = client.audit_report(audit_id).decode()
    _write(content, json_file, html_file)
    if json_file is None and html_file is None:
        show_reports([reports.parse(content)])


def cancel(audit_id: IdArgument, connection: Connection) -> None:
    """Cancel an audit: it stops before its next shard."""
    with connection.client() as client:
        audit = client.cancel_audit(audit_id)
    console.print(f"audit {audit.id}: {_state(audit)}")


def follow(client: Client, audits: list[str]) -> None:
    """Show the progress of audits that run one after another, until the last has ended."""
    for audit_id in audits:
        audit = client.audit(audit_id)
        with progress(f"audit of {audit.model}@{audit.version}", total=None) as tick:
            for event in client.watch_audit(audit_id):
                tick(event.shards_done, event.message, total=event.shards_total)


def finished_report(client: Client, audit_id: str) -> Report:
    """Return the report of an audit that has ended; raises what the server says if it has none."""
    from service.audit import report as reports

    return reports.parse(client.audit_report(audit_id).decode())


def show_reports(reports: list[Report]) -> None:
    """Print reports as one table, and their warnings and gates below."""
    from service.audit import summary

    print_table(*summary.table(reports))
    for finished in reports:
        name = finished.target.title
        for warning in finished.warnings:
            console.print(f"{name}: {warning.code}: {warning.explanation}", soft_wrap=True, markup=False)
        for reason in finished.refused_sources:
            console.print(f"{name}: no gradients from {reason}", soft_wrap=True, markup=False)
        if finished.not_checked:
            line = f"{name}: not checked: {', '.join(finished.not_checked)}"
            console.print(line, soft_wrap=True, markup=False)
        for gate in finished.gates:
            line = f"{name}: gate {gate.name}: {gate.outcome}: {gate.gate}, measured {summary.measured(gate)}"
            console.print(line, soft_wrap=True, markup=False)


def write_page(reports: list[Report], path: Path) -> None:
    """Write reports as one HTML page."""
    from export.store import atomic
    from service.audit import page

    atomic.write(path, page.render([finished.to_json() for finished in reports]).encode())


def _run_here(plan: Plan, repository: Repository | None, *, device: str | None, connection: Connection) -> Finished:
    from service.audit import run as runs

    with progress(f"audit of {plan.target.model}", total=None) as tick:
        return runs.run(
            plan,
            repository=repository,
            device=device,
            tls=connection.tls(),
            token=connection.token(),
            progress=lambda done, total, name: tick(done, name, total=total),
        )


def _relative(plan: Plan, path: Path) -> str | Path | None:
    """Return the repository that a plan names: a URL, or a folder as seen from the plan's own."""
    repository = plan.target.repository
    if repository is None and plan.target.endpoint is not None:
        return None
    if repository is None:
        raise ValueError(f"{path}: target.repository: expected a folder, found none; add it, or give --repository")
    return repository if "://" in repository else path.parent / repository


def _write(content: str, json_file: Path | None, html_file: Path | None) -> None:
    from export.store import atomic

    if json_file is not None:
        atomic.write(json_file, content.encode())
    if html_file is not None:
        from service.audit import report as reports

        write_page([reports.parse(content)], html_file)


def _check_writable(option: str, file: Path) -> None:
    """Make the folder of a file, and see that files can be written there.

    Raises:
        ValueError: it cannot be.
    """
    if file.is_dir():
        raise ValueError(f"{option}: expected a file, got the folder {file}; name a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"{option}: expected a folder that can be written, got {file.parent} ({reason}); choose another"
        ) from None


def _exit_by(finished: Report) -> None:
    if finished.verdict == "fail":
        raise typer.Exit(FAILED)


def _state(audit: audit_pb2.Audit) -> str:
    return audit_pb2.AuditState.Name(audit.state).removeprefix("AUDIT_STATE_").lower()


def _record(audit: audit_pb2.Audit) -> dict[str, object]:
    return {
        "id": audit.id,
        "state": _state(audit),
        "model": audit.model,
        "version": audit.version,
        "created": audit.create_time.ToJsonString(),
        "error": audit.error,
    }


def _row(audit: audit_pb2.Audit) -> list[str]:
    return [audit.id, f"{audit.model}@{audit.version}", _state(audit), audit.error]
