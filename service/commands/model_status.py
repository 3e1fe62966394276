"""How the models of a running server do: its index, and its statistics now and a moment later -> rows and records."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.errors import NotFound, Unimplemented

if TYPE_CHECKING:
    from service.client import Client, IndexEntry, ModelStatistics

HEADINGS = ("model", "aliases", "state", "requests", "failed", "images/s", "queue ms", "compute ms", "mean batch")


@dataclass(frozen=True)
class Status:
    """One version: where it stands, and what it has done, where the server tells."""

    entry: IndexEntry
    aliases: tuple[str, ...]
    statistics: ModelStatistics | None
    images_per_second: float | None

    @property
    def name(self) -> str:
        """MODEL@VERSION; the model alone where no version is known."""
        return f"{self.entry.name}@{self.entry.version}" if self.entry.version else self.entry.name


def ask(client: Client, *, over_s: float) -> list[Status]:
    """Ask a server for the status of everything in its repository.

    Args:
        client: of the server.
        over_s: seconds between two looks, from which images/s are counted; 0 looks once.
    """
    began = time.monotonic()
    before = _statistics(client)
    if before and over_s:
        time.sleep(over_s)
    after = _statistics(client) if over_s else before
    elapsed_s = time.monotonic() - began
    found = []
    for entry in client.index():
        key = entry.name, entry.version
        first, last = before.get(key), after.get(key)
        rate = None
        # Counts go on over a reload; they begin anew with the server.
        if over_s and first is not None and last is not None and last.images >= first.images:
            rate = (last.images - first.images) / elapsed_s
        found.append(Status(entry, _aliases(client, entry), last, rate))
    return found


def row(status: Status) -> list[str]:
    """Return the cells of a table's row."""
    counted = status.statistics
    numbers = ["", "", "", "", "", ""]
    if counted is not None:
        numbers = [
            str(counted.requests),
            str(counted.failed.count),
            _number(status.images_per_second),
            _number(counted.queue.mean_ms, digits=2),
            _number(counted.compute.mean_ms, digits=2),
            _number(counted.mean_batch),
        ]
    return [status.name, ", ".join(status.aliases), status.entry.state, *numbers]


def record(status: Status) -> dict[str, Any]:
    """Return the same as JSON has it; `statistics` is null where the server tells none."""
    counted = status.statistics
    return {
        "model": status.entry.name,
        "version": status.entry.version,
        "state": status.entry.state,
        "reason": status.entry.reason,
        "aliases": list(status.aliases),
        "statistics": counted
        and {
            "requests": counted.requests,
            "failed": counted.failed.count,
            "images": counted.images,
            "executions": counted.executions,
            "images_per_second": status.images_per_second,
            "mean_queue_ms": counted.queue.mean_ms,
            "mean_compute_ms": counted.compute.mean_ms,
            "mean_batch": counted.mean_batch,
        },
    }


def _statistics(client: Client) -> dict[tuple[str, str], ModelStatistics]:
    try:
        return {(each.name, each.version): each for each in client.statistics()}
    except Unimplemented:
        # Not every server of the protocol counts.
        return {}


def _aliases(client: Client, entry: IndexEntry) -> tuple[str, ...]:
    if entry.state != "READY":
        return ()
    try:
        return client.metadata(entry.name, version=entry.version or None).aliases
    except (NotFound, Unimplemented):
        # It has gone since; or not every port that has an index describes models.
        return ()


def _number(value: float | None, *, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
