"""What is known of every audit: submit, look up, watch, cancel; without the code that runs them.

servicer, command line --> Journal --> DBOS's database <-- service.audit.jobs (in a worker)
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, WorkflowHandleAsync

from service.audit.plan import Plan
from service.errors import FailedPrecondition, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from service.audit.state import State

# The names that tie a journal to the workers on the same database.
APPLICATION = "tenet"
QUEUE = "audits"
WORKFLOW = "audit"
PROGRESS = "progress"

# Of the recorded shards, not of the product: workers go on with audits of their own format only.
FORMAT = "2"

_POLL_SECONDS = 0.1


class AuditState(StrEnum):
    """Where an audit stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self in {AuditState.SUCCEEDED, AuditState.FAILED, AuditState.CANCELLED}


_STATES = {
    "ENQUEUED": AuditState.QUEUED,
    "DELAYED": AuditState.QUEUED,
    "PENDING": AuditState.RUNNING,
    "SUCCESS": AuditState.SUCCEEDED,
    "ERROR": AuditState.FAILED,
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": AuditState.FAILED,
    "CANCELLED": AuditState.CANCELLED,
}


@dataclass(frozen=True)
class Entry:
    """One audit."""

    id: str
    state: AuditState
    plan: Plan
    created: datetime
    updated: datetime
    error: str


@dataclass(frozen=True)
class Progress:
    """One shard has ended."""

    shards_done: int
    shards_total: int
    message: str


class Journal:
    """All audits of one state folder; any number of them may be open, beside any worker."""

    def __init__(self, state: State) -> None:
        self._state = state
        with state.migration():
            DBOS.migrate(state.database_url)
        self._closing = asyncio.Event()
        self._client = DBOSClient(
            system_database_url=state.database_url,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
        )

    async def submit(self, plan: Plan) -> Entry:
        """Put an audit in the queue; its versions must be pinned."""
        assert plan.target.version is not None
        handle: WorkflowHandleAsync[str] = await self._client.enqueue_async(
            {"workflow_name": WORKFLOW, "queue_name": QUEUE}, plan.model_dump_json()
        )
        return await self.get(handle.get_workflow_id())

    async def get(self, audit: str) -> Entry:
        """Return one audit.

        Raises:
            NotFound: there is none of that id.
        """
        found = await self._client.list_workflows_async(workflow_ids=[audit], name=WORKFLOW)
        if not found:
            raise NotFound(f"audit {audit!r}: there is none; `tenet audit list` shows what there is")
        return _entry(found[0])

    async def list(self, *, limit: int, offset: int) -> list[Entry]:
        """Return audits, newest first."""
        found = await self._client.list_workflows_async(name=WORKFLOW, limit=limit, offset=offset, sort_desc=True)
        return [_entry(status) for status in found]

    async def watch(self, audit: str, *, offset: int) -> AsyncIterator[Progress]:
        """Yield the progress of an audit from event `offset` on, until it has ended.

        Raises:
            NotFound: there is none of that id.
        """
        await self.get(audit)
        stream = self._client.read_stream_async(audit, PROGRESS, offset=offset, polling_interval_sec=_POLL_SECONDS)
        seen = offset
        async with aclosing(stream):
            while (event := await self._unless_closing(anext(stream, None), audit, seen)) is not None:
                seen += 1
                yield Progress(**event)
        # A stream ends with its workflow's last step; its status follows a moment later.
        while not (await self.get(audit)).state.ended:
            await self._unless_closing(asyncio.sleep(_POLL_SECONDS), audit, seen)

    async def cancel(self, audit: str) -> Entry:
        """Stop an audit before its next shard.

        Raises:
            NotFound: there is none of that id.
            FailedPrecondition: it has ended.
        """
        entry = await self.get(audit)
        if entry.state.ended:
            raise FailedPrecondition(f"audit {audit!r}: cannot be cancelled, it has {entry.state}")
        await self._client.cancel_workflow_async(audit)
        return await self.get(audit)

    async def report(self, audit: str) -> str:
        """Return the report as JSON.

        Raises:
            NotFound: there is no audit of that id.
            FailedPrecondition: it has no report (yet).
        """
        entry = await self.get(audit)
        content = self._state.read_report(audit) if entry.state is AuditState.SUCCEEDED else None
        if content is None:
            raise FailedPrecondition(f"audit {audit!r}: has no report, it is {entry.state}{_because(entry.error)}")
        return content

    def end_watches(self) -> None:
        """End all watches with `Unavailable`; call it in the event loop that they run in."""
        self._closing.set()

    async def _unless_closing(self, event: Awaitable[Any], audit: str, seen: int) -> Any:
        reading, closing = asyncio.ensure_future(event), asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({reading, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise Unavailable(f"the server is shutting down; watch audit {audit} again, from offset {seen}")
            return await reading
        finally:
            # Both have ended before the stream is closed: a generator that still runs cannot be.
            for task in (reading, closing):
                task.cancel()
            await asyncio.gather(reading, closing, return_exceptions=True)

    def close(self) -> None:
        """Close the database."""
        self._client.destroy()


def _because(error: str) -> str:
    return f": {error}" if error else ""


def _entry(status: Any) -> Entry:
    assert status.input is not None
    return Entry(
        id=status.workflow_id,
        state=_STATES[status.status],
        plan=Plan.model_validate_json(status.input["args"][0]),
        created=_time(status.created_at),
        updated=_time(status.updated_at),
        error=str(status.error) if status.error else "",
    )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, tz=UTC)
