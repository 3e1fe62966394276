"""`tenet serve`, `tenet work`, `tenet web`: the processes of a deployment; `tenet up`: all of them on one machine."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.console import console
from service.commands.companion import Companion, end_with
from service.commands.connection import Connection, connected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service.server import Service, Serving
    from service.settings import Settings

RepositoryOption = Annotated[str, typer.Option(help="The model repository: a folder, s3://… or gs://….")]
StateOption = Annotated[Path, typer.Option(help="The folder of audits: jobs, reports, locks; made if missing.")]
PortOption = Annotated[int | None, typer.Option(help="0 takes a free one.", min=0, max=65535)]
HostOption = Annotated[str | None, typer.Option(help="The address to listen on.")]
ParentOption = Annotated[int | None, typer.Option(hidden=True)]
SettingsOption = Annotated[Path | None, typer.Option("--settings", help="Service settings, TOML.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("serve", epilog="Example: tenet serve --repository models --port 8001")(serve)
    app.command("work", epilog="Example: tenet work --repository models --state state")(work)
    app.command("web", epilog="Example: tenet web --server 127.0.0.1:8001 --port 8080")(connected(web))
    app.command("up", epilog="Example: tenet up --repository models --state state --port 8001")(up)


def serve(
    repository: RepositoryOption,
    state: Annotated[Path | None, typer.Option(help="Serve the audit API too, on this folder of audits.")] = None,
    host: HostOption = None,
    port: PortOption = None,
    settings: SettingsOption = None,
    *,
    process: Annotated[int | None, typer.Option(hidden=True)] = None,
    parent: ParentOption = None,
) -> None:
    """Serve predictions by gRPC (Open Inference Protocol); with --state the audit API as well."""
    chosen = _settings(settings, host, port)
    if chosen.server.processes > 1 and process is None:
        from service.commands.processes import serve_in_processes

        if state is not None:
            raise ValueError("--state: expected server.processes = 1 with it; serve audits by a server of their own")
        given = {"--host": host, "--settings": settings}
        options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
        serve_in_processes(["--repository", repository, *options], chosen)
        return
    end_with(parent)
    _serve(repository, state, chosen.for_process(process or 0))


def work(repository: RepositoryOption, state: StateOption, parent: ParentOption = None) -> None:
    """Run submitted audits, unfinished ones first."""
    from export.repository import open_repository
    from service.audit import jobs
    from service.audit.state import State

    _log()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    end_with(parent)
    folder = State(state)
    with folder.lock("work"):
        jobs.start(open_repository(repository), folder)
        console.print(f"working on the audits in {state}", markup=False, soft_wrap=True)
        stop.wait()
        # Stops as it would crash: the shard in flight is given up, and the next worker goes on from the one before.
        sys.stdout.flush()
        os._exit(0)


def web(
    connection: Connection,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8080,
    parent: ParentOption = None,
) -> None:
    """Show audits and reports as web pages."""
    import uvicorn

    from service.web.dashboard import dashboard

    end_with(parent)
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; choose another with --port"
        ) from None
    with listener, connection.client() as client:
        console.print(f"dashboard on http://{host}:{listener.getsockname()[1]}", markup=False, soft_wrap=True)
        # uvicorn ends in good order, and then raises the signal again; that must not be what the exit code says.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        uvicorn.Server(uvicorn.Config(dashboard(client), log_level="warning")).run(sockets=[listener])


def up(
    repository: RepositoryOption,
    state: StateOption,
    *,
    host: HostOption = None,
    port: PortOption = None,
    web_port: Annotated[int, typer.Option(help="The dashboard's; 0 takes a free one.", min=0, max=65535)] = 0,
    settings: SettingsOption = None,
) -> None:
    """Serve, work and show on one machine; a process that dies is started again, its audit goes on."""
    from service.audit.state import State

    chosen = _settings(settings, host, port)
    if chosen.server.processes > 1:
        raise ValueError(
            f"server.processes: expected 1 with `tenet up`, got {chosen.server.processes}; use `tenet serve`"
        )
    with State(state).lock("up"), ExitStack() as companions:

        def start(address: str) -> None:
            worker = ["work", "--repository", repository, "--state", str(state)]
            dashboard = ["web", "--server", address, "--port", str(web_port)]
            started.append(companions.enter_context(Companion("worker", worker)))
            if importlib.util.find_spec("uvicorn") is None:
                console.print("no dashboard: it needs uvicorn; pip install 'tenet[web]'", markup=False)
                return
            started.append(companions.enter_context(Companion("dashboard", dashboard)))

        started: list[Companion] = []
        _serve(repository, state, chosen, on_ready=start)
        if any(companion.refused for companion in started):
            raise RuntimeError("stopped, because a part of it cannot run; its message is above")


def _serve(
    repository: str, state: Path | None, settings: Settings, *, on_ready: Callable[[str], None] | None = None
) -> None:
    from service import fronts, logs, memory, server
    from service.inference.threads import engines_run

    logs.configure(settings.logging)
    memory.keep_freed_tensors()

    def announce(serving: Serving) -> None:
        names = ", ".join(serving.models) or "none"
        console.print(
            f"serving {len(serving.models)} models on {serving.address}: {names}", markup=False, soft_wrap=True
        )
        if serving.admin_port is not None:
            console.print(f"operators' port: {serving.admin_address}", markup=False, soft_wrap=True)
        if serving.metrics_port is not None:
            page = fronts.address(settings.metrics.host, serving.metrics_port)
            console.print(f"metrics on http://{page}/metrics", markup=False, soft_wrap=True)
        if on_ready is not None:
            on_ready(serving.address)

    with (
        _audit_services(repository, state, settings) as services,
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        runner.run(server.serve(repository, settings, on_ready=announce, services=services))
    console.print("stopped")
    if engines_run():
        # Python would end its thread inside of C++, which aborts the process.
        sys.stdout.flush()
        os._exit(0)


def is_loopback(host: str) -> bool:
    """Return whether a server on this host can be reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's, where it is installed: a tenth less work a call than asyncio's own."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def _settings(path: Path | None, host: str | None, port: int | None) -> Settings:
    from service import settings

    return settings.read(path).listening(host=host, port=port)


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # DBOS tells of every migration of its own database.
    logging.getLogger("dbos").setLevel(logging.WARNING)


@contextmanager
def _audit_services(repository: str, state: Path | None, settings: Settings) -> Iterator[tuple[Service, ...]]:
    """Open the audit API if there is a state folder for it."""
    if state is None:
        yield ()
        return
    from functools import partial

    from export.repository import open_repository
    from protos.audit.v1 import audit_pb2, audit_pb2_grpc
    from service.audit.journal import Journal
    from service.audit.servicer import AuditServicer
    from service.audit.state import State
    from service.server import Service

    journal = Journal(State(state))
    # Whoever can reach a loopback address is on this machine, and can read its folders anyway.
    folders = is_loopback(settings.server.host)
    servicer = AuditServicer(journal=journal, repository=open_repository(repository), folders=folders)
    add = partial(audit_pb2_grpc.add_AuditServiceServicer_to_server, servicer)
    try:
        yield (Service(audit_pb2.DESCRIPTOR.services_by_name["AuditService"], add, journal.end_watches),)
    finally:
        journal.close()
