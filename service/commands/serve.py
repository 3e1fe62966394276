"""`tenet serve`, `tenet work`, `tenet up`: the processes of a deployment, or all of them on one machine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from service.server import Service, Serving
    from service.settings import Settings

RepositoryOption = Annotated[Path, typer.Option(help="The model repository.")]
StateOption = Annotated[Path, typer.Option(help="The folder of audits: jobs, reports, locks; made if missing.")]
PortOption = Annotated[int | None, typer.Option(help="0 takes a free one.", min=0, max=65535)]
HostOption = Annotated[str | None, typer.Option(help="The address to listen on.")]
SettingsOption = Annotated[Path | None, typer.Option("--settings", help="Service settings, TOML.")]

# How long a worker may take to hand in its last shard before it is ended.
_WORKER_GRACE_SECONDS = 10

# A worker that dies at once would otherwise be restarted in a busy loop.
_RESTART_SECONDS = 1

_PARENT_POLL_SECONDS = 1


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("serve", epilog="Example: tenet serve --repository models --port 8001")(serve)
    app.command("work", epilog="Example: tenet work --repository models --state state")(work)
    app.command("up", epilog="Example: tenet up --repository models --state state --port 8001")(up)


def serve(
    repository: RepositoryOption,
    state: Annotated[Path | None, typer.Option(help="Serve the audit API too, on this folder of audits.")] = None,
    host: HostOption = None,
    port: PortOption = None,
    settings: SettingsOption = None,
) -> None:
    """Serve predictions by gRPC (Open Inference Protocol); with --state the audit API as well."""
    _serve(repository, state, _settings(settings, host, port))


def work(
    repository: RepositoryOption,
    state: StateOption,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run submitted audits, unfinished ones first."""
    from export.repository import Repository
    from service.audit import jobs
    from service.audit.state import State

    _log()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    folder = State(state)
    with folder.lock("work"):
        jobs.start(Repository(repository), folder)
        console.print(f"working on the audits in {state}", markup=False, soft_wrap=True)
        while not stop.wait(_PARENT_POLL_SECONDS) and parent in {None, os.getppid()}:
            pass
        # Stops as it would crash: the shard in flight is given up, and the next worker goes on from the one before.
        sys.stdout.flush()
        os._exit(0)


def up(
    repository: RepositoryOption,
    state: StateOption,
    host: HostOption = None,
    port: PortOption = None,
    settings: SettingsOption = None,
) -> None:
    """Serve and work on one machine; a worker that dies is started again and goes on with its audit."""
    from service.audit.state import State

    chosen = _settings(settings, host, port)
    with State(state).lock("up"), _Worker(repository, state) as worker:
        _serve(repository, state, chosen, on_ready=worker.start)


def _serve(
    repository: Path, state: Path | None, settings: Settings, *, on_ready: Callable[[], None] | None = None
) -> None:
    from service import server

    _log()

    def announce(serving: Serving) -> None:
        names = ", ".join(serving.models) or "none"
        console.print(
            f"serving {len(serving.models)} models on {serving.address}: {names}", markup=False, soft_wrap=True
        )
        if on_ready is not None:
            on_ready()

    with _audit_services(repository, state) as services:
        asyncio.run(server.serve(repository, settings, on_ready=announce, services=services))
    console.print("stopped")


class _Worker:
    """A worker process beside the server, started again when it dies, ended with the block."""

    def __init__(self, repository: Path, state: Path) -> None:
        options = ["--repository", str(repository), "--state", str(state), "--parent", str(os.getpid())]
        self._command = [sys.executable, "-m", "service", "work", *options]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker")

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            process = subprocess.Popen(self._command)  # noqa: S603 - our own command
            while process.poll() is None and not self._stop.wait(_RESTART_SECONDS):
                pass
            if self._stop.is_set():
                _end(process)
            else:
                console.print(f"the worker ended with exit code {process.returncode}; starting another")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_WORKER_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _settings(path: Path | None, host: str | None, port: int | None) -> Settings:
    from service import settings

    read = settings.Settings() if path is None else settings.read(path)
    return read.listening(host=host, port=port)


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


@contextmanager
def _audit_services(repository: Path, state: Path | None) -> Iterator[tuple[Service, ...]]:
    """Open the audit API if there is a state folder for it."""
    if state is None:
        yield ()
        return
    from functools import partial

    from export.repository import Repository
    from protos.audit.v1 import audit_pb2, audit_pb2_grpc
    from service.audit.journal import Journal
    from service.audit.servicer import AuditServicer
    from service.audit.state import State
    from service.server import Service

    journal = Journal(State(state))
    servicer = AuditServicer(journal=journal, repository=Repository(repository))
    add = partial(audit_pb2_grpc.add_AuditServiceServicer_to_server, servicer)
    try:
        yield (Service(audit_pb2.DESCRIPTOR.services_by_name["AuditService"], add, journal.end_watches),)
    finally:
        journal.close()
