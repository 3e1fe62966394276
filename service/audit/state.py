"""Where audits are kept: one folder with the job database, the reports and the locks.

<state>/audits.sqlite        DBOS's database: submitted audits, their shards' results, their progress
<state>/reports/<id>/        all files of an audit (service.audit.artifacts), report.json last
<state>/work.lock, up.lock   held by the process that works, or runs everything, on this folder
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from export.store import atomic
from service.audit.report import FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class State:
    """The state folder; made if it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.reports = self.folder / "reports"
        self.reports.mkdir(parents=True, exist_ok=True)

    @property
    def database_url(self) -> str:
        """The job database, as SQLAlchemy names it."""
        return f"sqlite:///{self.folder / 'audits.sqlite'}"

    def write_report(self, audit: str, files: Mapping[str, bytes]) -> None:
        """Store the files of an audit, each whole or not at all."""
        atomic.write_all(self.reports / audit, files)

    def read_report(self, audit: str) -> str | None:
        """Return a report, None if there is none."""
        path = self.reports / audit / FILE
        return path.read_text() if path.is_file() else None

    @contextmanager
    def migration(self) -> Iterator[None]:
        """Take turns with other processes at making the database or bringing it up to date."""
        with (self.folder / "migration.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def lock(self, role: str) -> Iterator[None]:
        """Hold a role on this folder; the lock ends with the process, however that ends.

        Raises:
            RuntimeError: another process holds it.
        """
        path = self.folder / f"{role}.lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RuntimeError(
                    f"{self.folder}: `tenet {role}` already runs on this state folder (process {holder}); "
                    "stop it first, or choose another folder with --state"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
