"""Audits as durable workflows: what a worker runs.

    queue --> audit(plan): for each shard: run_shard (a step, recorded) -> progress   --> write_report (a step)

A worker that is killed loses the shard in flight. The next one on the same state folder has the recorded results
of the finished shards handed to it by DBOS and goes on with the first unfinished one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer

from service.audit import provenance
from service.audit.auditor import Auditor, pin_threads
from service.audit.journal import APPLICATION, FORMAT, PROGRESS, QUEUE, WORKFLOW
from service.audit.plan import Plan
from service.audit.run import Progressing, finish
from service.audit.shard import Shard, ShardResult
from service.audit.target.base import TargetFailed

if TYPE_CHECKING:
    from export.repository import Repository
    from service.audit.state import State

logger = logging.getLogger(__name__)

# How often an idle worker looks for work: a person who submits an audit should not notice the wait.
_POLL_SECONDS = 0.2


@dataclass
class Worker:
    """What the workflows' steps need from the process they run in.

    Attributes:
        repository: the models.
        state: where reports go.
        auditors: for each running audit what it has open; that stays open between its shards.
        turn: held by the step that works: the shard in flight of an audit that has been cancelled goes on beside the
            first one of the next, and two at once on the same cores are slower than one after the other.
    """

    repository: Repository
    state: State
    auditors: dict[str, Auditor] = field(default_factory=dict)
    turn: Lock = field(default_factory=Lock)

    def auditor(self, plan: str) -> Auditor:
        """Return the running audit's auditor, opened at its first step in this process."""
        audit_id = _id()
        if audit_id not in self.auditors:
            self.auditors[audit_id] = Auditor(Plan.model_validate_json(plan), repository=self.repository)
        return self.auditors[audit_id]

    def close(self) -> None:
        """Close what the running audit has open."""
        auditor = self.auditors.pop(_id(), None)
        if auditor is not None:
            auditor.close()


# DBOS calls workflows by name, with JSON arguments only: what they need besides must hang on the process.
_worker: Worker | None = None


def start(repository: Repository, state: State) -> None:
    """Start to work on the audits of a state folder, in background threads, unfinished ones first."""
    global _worker  # noqa: PLW0603 - see above
    _worker = Worker(repository, state)
    pin_threads()
    config: DBOSConfig = {
        "name": APPLICATION,
        "system_database_url": state.database_url,
        "application_version": FORMAT,
        # One worker a state folder, so a restarted worker is the one that died.
        "executor_id": "worker",
        "serializer": DBOSPortableJSONSerializer(),
        "notification_listener_polling_interval_sec": _POLL_SECONDS,
        "log_level": "WARNING",
    }
    with state.migration():
        DBOS(config=config)
        DBOS.launch()
    logging.getLogger("dbos").addFilter(_NoCancellations())
    DBOS.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=_POLL_SECONDS)


class _NoCancellations(logging.Filter):
    """Keeps a cancelled audit, which is what somebody wanted, from being logged as a failure with a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or not kind.__name__.endswith("CancelledError")


@DBOS.workflow(name=WORKFLOW)
def audit(plan: str) -> str:
    """Run an audit and return its verdict."""
    early = Plan.model_validate_json(plan).sequential is not None
    try:
        shards = list_shards(plan)
        _progress(0, len(shards), "started")
        results = []
        for done, shard in enumerate(shards, start=1):
            results.append(run_shard(plan, shard))
            _progress(done, len(shards), Shard.model_validate(shard).name)
            if results[-1]["error"] or (early and decided(plan, results)):
                break
        return write_report(plan, results)
    finally:
        _here().close()


@DBOS.step()
def list_shards(plan: str) -> list[dict[str, Any]]:
    """Cut the plan into shards: recorded, so that a resumed audit has the boundaries it was begun with."""
    with _here().turn:
        return [shard.model_dump() for shard in _here().auditor(plan).shards]


@DBOS.step()
def run_shard(plan: str, shard: dict[str, Any]) -> dict[str, Any]:
    """Run one shard."""
    piece = Shard.model_validate(shard)
    with _here().turn:
        logger.info("audit %s: begins %s", _id(), piece.name)
        try:
            result = _here().auditor(plan).run(piece)
        except TargetFailed as failure:
            if piece.kind == "clean":  # nothing to report
                raise
            logger.warning("audit %s: %s: %s", _id(), piece.name, failure)
            return {"result": None, "worker": provenance.worker(), "error": f"{piece.name}: {failure}"}
        logger.info("audit %s: finished %s in %.2f s", _id(), piece.name, result.seconds)
    return {"result": result.model_dump(mode="json"), "worker": provenance.worker(), "error": ""}


@DBOS.step()
def decided(plan: str, recorded: list[dict[str, Any]]) -> bool:
    """Return whether all gates of a plan that may stop early are decided."""
    with _here().turn:
        results = [ShardResult.model_validate(entry["result"]) for entry in recorded]
        return Progressing(_here().auditor(plan)).replay(results)


@DBOS.step()
def write_report(plan: str, recorded: list[dict[str, Any]]) -> str:
    """Assemble the report and store it."""
    worker, audit_id = _here(), _id()
    measured = [entry for entry in recorded if entry["result"] is not None]
    results = [ShardResult.model_validate(entry["result"]) for entry in measured]
    with worker.turn:
        auditor = worker.auditor(plan)
        progressing = Progressing(auditor)
        progressing.replay(results)
        finished = finish(
            auditor,
            results,
            workers=[entry["worker"] for entry in measured],
            stopping=progressing.stopping,
            error=recorded[-1]["error"],
            audit=audit_id,
        )
    worker.state.write_report(audit_id, finished.files)
    return finished.report.verdict


def _progress(done: int, total: int, message: str) -> None:
    DBOS.write_stream(PROGRESS, {"shards_done": done, "shards_total": total, "message": message})


def _here() -> Worker:
    assert _worker is not None, "a workflow runs only in a process that called start()"
    return _worker


def _id() -> str:
    assert DBOS.workflow_id is not None, "a step runs only in a workflow"
    return DBOS.workflow_id
