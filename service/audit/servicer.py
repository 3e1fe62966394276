"""The audit API: protobuf in, protobuf out, the journal behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from protos.audit.v1 import audit_pb2, audit_pb2_grpc
from service.audit import plan as plans
from service.audit.journal import AuditState, Entry
from service.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime
    from typing import Any

    import grpc

    from export.repository import Repository
    from service.audit.journal import Journal

    Context = grpc.aio.ServicerContext[Any, Any]

_STATES = {
    AuditState.QUEUED: audit_pb2.AUDIT_STATE_QUEUED,
    AuditState.RUNNING: audit_pb2.AUDIT_STATE_RUNNING,
    AuditState.SUCCEEDED: audit_pb2.AUDIT_STATE_SUCCEEDED,
    AuditState.FAILED: audit_pb2.AUDIT_STATE_FAILED,
    AuditState.CANCELLED: audit_pb2.AUDIT_STATE_CANCELLED,
}
_DEFAULT_PAGE = 50
_LARGEST_PAGE = 1000
_LONGEST_TOKEN = 9  # digits
_LARGEST_OFFSET = 10**9


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    """Serves audits of the models of one repository; only with `folders` may a plan name a folder of images."""

    def __init__(self, *, journal: Journal, repository: Repository, folders: bool) -> None:
        self._journal = journal
        self._repository = repository
        self._folders = folders

    async def SubmitAudit(self, request: audit_pb2.SubmitAuditRequest, context: Context) -> audit_pb2.Audit:
        plan = self._checked(request.plan)
        return _message(await self._journal.submit(plan))

    async def GetAudit(self, request: audit_pb2.GetAuditRequest, context: Context) -> audit_pb2.Audit:
        return _message(await self._journal.get(request.id))

    async def ListAudits(self, request: audit_pb2.ListAuditsRequest, context: Context) -> audit_pb2.ListAuditsResponse:
        size, offset = _page(request)
        # One more than asked for tells whether there is another page.
        entries = await self._journal.list(limit=size + 1, offset=offset)
        token = str(offset + size) if len(entries) > size else ""
        return audit_pb2.ListAuditsResponse(audits=map(_message, entries[:size]), next_page_token=token)

    async def WatchAudit(
        self, request: audit_pb2.WatchAuditRequest, context: Context
    ) -> AsyncIterator[audit_pb2.AuditProgress]:
        if not 0 <= request.offset <= _LARGEST_OFFSET:
            raise InvalidArgument(f"offset: expected 0 to {_LARGEST_OFFSET}, got {request.offset}")
        async for event in self._journal.watch(request.id, offset=request.offset):
            yield audit_pb2.AuditProgress(
                state=audit_pb2.AUDIT_STATE_RUNNING,
                shards_done=event.shards_done,
                shards_total=event.shards_total,
                message=event.message,
            )

    async def CancelAudit(self, request: audit_pb2.CancelAuditRequest, context: Context) -> audit_pb2.Audit:
        return _message(await self._journal.cancel(request.id))

    async def GetReport(self, request: audit_pb2.GetReportRequest, context: Context) -> audit_pb2.Report:
        content = await self._journal.report(request.id)
        if request.format == audit_pb2.REPORT_FORMAT_HTML:
            from service.audit import page  # noqa: PLC0415 - jinja2 is not needed to serve

            return audit_pb2.Report(media_type="text/html", content=page.render([content]).encode())
        return audit_pb2.Report(media_type="application/json", content=content.encode())

    def _checked(self, text: str) -> plans.Plan:
        """Return the plan with its versions pinned.

        Raises:
            InvalidArgument: it is not a plan.
            NotFound: target or reference is not in the repository.
        """
        try:
            plan = plans.parse(text)
            place = "folder" if plan.data.folder is not None else "root" if plan.data.root is not None else None
            if place is not None and not self._folders:
                raise InvalidArgument(
                    f"plan: data.{place}: this server listens beyond its own machine and reads no folders for others; "
                    "name a data set that needs none"
                )
            if plan.target.endpoint is not None:
                raise InvalidArgument(
                    "plan: target.endpoint: this server audits the models of its own repository alone; run the plan by "
                    "`tenet audit run`"
                )
            target = self._repository.find(plan.target.model, plan.target.version).manifest
            reference_version = None
            if plan.differential is not None:
                reference = self._repository.find(plan.differential.reference, plan.differential.version)
                reference_version = reference.manifest.version
        except FileNotFoundError as error:
            raise NotFound(str(error)) from None
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        return plans.pinned(plan, version=target.version, reference_version=reference_version)


def _page(request: audit_pb2.ListAuditsRequest) -> tuple[int, int]:
    if not 0 <= request.page_size <= _LARGEST_PAGE:
        raise InvalidArgument(f"page_size: expected 0 to {_LARGEST_PAGE}, got {request.page_size}")
    token = request.page_token or "0"
    if not token.isdecimal() or len(token) > _LONGEST_TOKEN:
        raise InvalidArgument(f"page_token: expected one from an earlier response, got {token!r}")
    return request.page_size or _DEFAULT_PAGE, int(token)


def _message(entry: Entry) -> audit_pb2.Audit:
    assert entry.plan.target.version is not None
    message = audit_pb2.Audit(
        id=entry.id,
        state=_STATES[entry.state],
        model=entry.plan.target.model,
        version=entry.plan.target.version,
        error=entry.error,
    )
    message.create_time.CopyFrom(_timestamp(entry.created))
    message.update_time.CopyFrom(_timestamp(entry.updated))
    return message


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
