"""What varies from run to run of one plan: who ran it, when, where and for how long."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from service.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.shard import ShardResult


def worker() -> str:
    """Return the name of this process, HOST:PID."""
    return f"{platform.node()}:{os.getpid()}"


def record(results: Sequence[ShardResult], *, workers: Sequence[str], audit: str | None = None) -> dict[str, object]:
    """Return the report's `provenance` for an audit that has just finished.

    Args:
        results: of all shards, in order.
        workers: for each shard the process that ran it.
        audit: its id, if it was a submitted one.
    """
    shards = [
        {
            "shard": result.shard.name,
            "seconds": round(result.seconds, 3),
            "answering": round(result.answering, 3),
            "worker": name,
        }
        for result, name in zip(results, workers, strict=True)
    ]
    return {
        "audit": audit,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tenet": VERSION,
        "latency_ms": _latency_ms(results),
        "shards": shards,
    }


def _latency_ms(results: Sequence[ShardResult]) -> float | None:
    """Return the milliseconds an image that the target took for the clean images, in its largest batches."""
    clean = [result for result in results if result.shard.kind == "clean" and result.queries]
    images = sum(result.queries for result in clean)
    return round(1000 * sum(result.answering for result in clean) / images, 4) if images else None
