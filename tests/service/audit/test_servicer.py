from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from protos.audit.v1 import audit_pb2
from service.audit.journal import Journal
from service.audit.servicer import AuditServicer
from service.audit.state import State
from service.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from export.repository import Repository

FOLDER = '[target]\nmodel = "digits"\n[data]\nfolder = "/somewhere"\n'
CONTEXT: Any = None  # which the servicer does not use


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(State(tmp_path))
    yield journal
    journal.close()


async def test_a_server_beyond_its_own_machine_reads_no_folders_for_others(
    journal: Journal, digits_models: Repository
) -> None:
    far = AuditServicer(journal=journal, repository=digits_models, folders=False)
    near = AuditServicer(journal=journal, repository=digits_models, folders=True)
    root = FOLDER.replace("folder =", 'dataset = "folder"\nroot =')
    for plan, key in ((FOLDER, "folder"), (root, "root")):
        with pytest.raises(
            InvalidArgument, match=rf"plan: data\.{key}: .* reads no folders for others; name a data set"
        ):
            await far.SubmitAudit(audit_pb2.SubmitAuditRequest(plan=plan), CONTEXT)
        assert (await near.SubmitAudit(audit_pb2.SubmitAuditRequest(plan=plan), CONTEXT)).id
    plan = FOLDER.replace('folder = "/somewhere"', 'dataset = "digits"')
    assert (await far.SubmitAudit(audit_pb2.SubmitAuditRequest(plan=plan), CONTEXT)).id


@pytest.mark.parametrize("token", ["x", "-1", "9" * 30])
async def test_a_page_token_of_somebody_s_own_is_refused(
    journal: Journal, digits_models: Repository, token: str
) -> None:
    servicer = AuditServicer(journal=journal, repository=digits_models, folders=True)
    with pytest.raises(InvalidArgument, match="page_token: expected one from an earlier response"):
        await servicer.ListAudits(audit_pb2.ListAuditsRequest(page_token=token), CONTEXT)
    with pytest.raises(InvalidArgument, match="page_size: expected 0 to 1000, got 1001"):
        await servicer.ListAudits(audit_pb2.ListAuditsRequest(page_size=1001), CONTEXT)


async def test_pages_follow_each_other(journal: Journal, digits_models: Repository) -> None:
    servicer = AuditServicer(journal=journal, repository=digits_models, folders=True)
    ids = [(await servicer.SubmitAudit(audit_pb2.SubmitAuditRequest(plan=FOLDER), CONTEXT)).id for _ in range(3)]
    first = await servicer.ListAudits(audit_pb2.ListAuditsRequest(page_size=2), CONTEXT)
    rest = await servicer.ListAudits(
        audit_pb2.ListAuditsRequest(page_size=2, page_token=first.next_page_token), CONTEXT
    )
    assert [audit.id for audit in (*first.audits, *rest.audits)] == ids[::-1]
    assert rest.next_page_token == ""
