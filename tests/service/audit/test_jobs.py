"""Audits as jobs: real server, real workers, really killed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from protos.audit.v1 import audit_pb2
from service.audit import plan as plans
from service.audit.auditor import Auditor
from service.audit.run import finish
from service.client import Client
from service.errors import FailedPrecondition, InvalidArgument, NotFound, ServiceError, Unavailable
from tests.processes import address, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from export.repository import Repository

PLAN = """
[target]
model = "digits-int8"
[data]
dataset = "digits"
samples = 150
[checks]
samples = 10
[[attacks]]
id = "pgd"
name = "LinfPGD"
epsilons = ["8/255"]
steps = 40
[corruptions]
names = ["contrast"]
[differential]
reference = "digits"
"""
SHARDS = 1 + 1 + 5 + 3


@pytest.fixture
def client(digits_models: Repository, tmp_path: Path) -> Iterator[Client]:
    options = ["--repository", str(digits_models.folder), "--state", str(tmp_path / "state"), "--port", "0"]
    with running(tmp_path / "serve.log", "serve", *options) as server, Client(address(server)) as client:
        yield client


def _worker(digits_models: Repository, tmp_path: Path) -> list[str]:
    return ["work", "--repository", str(digits_models.folder), "--state", str(tmp_path / "state")]


def _shards(text: str, what: str) -> Counter[str]:
    return Counter(re.findall(rf"audit \S+: {what} (.*?)(?: in [\d.]+ s)?$", text, re.MULTILINE))


def test_a_killed_worker_s_audit_is_completed_by_the_next_without_repeating_finished_shards(
    client: Client, digits_models: Repository, tmp_path: Path
) -> None:
    audit = client.submit_audit(PLAN)
    assert (audit.model, audit.version, audit.state) == ("digits-int8", 1, audit_pb2.AUDIT_STATE_QUEUED)
    events = client.watch_audit(audit.id)
    with running(tmp_path / "first.log", *_worker(digits_models, tmp_path)) as first:
        assert next(events).shards_total == SHARDS
        first.wait_for(r"finished pgd, images 1 to 50")
        assert first.signal(signal.SIGKILL) == -signal.SIGKILL
    with running(tmp_path / "second.log", *_worker(digits_models, tmp_path)) as second:
        seen = [1 + event.shards_done for event in events]
        assert seen == sorted(seen)
        assert client.audit(audit.id).state == audit_pb2.AUDIT_STATE_SUCCEEDED

    shards, expected = _uninterrupted(digits_models)
    finished, again = _shards(first.text(), "finished"), _shards(second.text(), "begins")
    assert finished
    # What was finished a moment before the kill may not have been recorded any more: the shard in flight, one.
    assert sum((finished & again).values()) <= 1
    assert finished.keys() | again.keys() == {shard.name for shard in shards}
    document = json.loads(client.audit_report(audit.id))
    workers = [entry["worker"].rsplit(":", 1)[1] for entry in document["provenance"].pop("shards")]
    assert workers[0] == str(first.pid)
    assert workers[-1] == str(second.pid)
    document.pop("provenance")
    assert document == expected


def _uninterrupted(digits_models: Repository) -> tuple[list, dict[str, object]]:  # type: ignore[type-arg]
    plan = plans.pinned(plans.parse(PLAN), version=1, reference_version=1)
    with Auditor(plan, repository=digits_models) as auditor:
        results = [auditor.run(shard) for shard in auditor.shards]
        report = finish(auditor, results, workers=["this one"] * len(results)).report
        document = json.loads(report.to_json())
        document.pop("provenance")
        return auditor.shards, document


def test_a_cancelled_audit_stops_and_the_worker_takes_the_next(
    client: Client, digits_models: Repository, tmp_path: Path
) -> None:
    long = client.submit_audit(PLAN.replace("steps = 40", "steps = 2000"))
    short = client.submit_audit('[target]\nmodel = "digits"\n[data]\ndataset = "digits"\nsamples = 20\n')
    waiting = client.submit_audit(PLAN)
    assert client.cancel_audit(waiting.id).state == audit_pb2.AUDIT_STATE_CANCELLED
    with running(tmp_path / "work.log", *_worker(digits_models, tmp_path)) as worker:
        worker.wait_for(r"begins sanity checks")
        assert client.cancel_audit(long.id).state == audit_pb2.AUDIT_STATE_CANCELLED
        with pytest.raises(FailedPrecondition, match="cannot be cancelled, it has cancelled"):
            client.cancel_audit(long.id)
        # The shard in flight would take minutes; an audit that is cancelled must not hold up the queue for it.
        worker.stop()
    with running(tmp_path / "work2.log", *_worker(digits_models, tmp_path)):
        assert [event.shards_done for event in client.watch_audit(short.id)] == [0, 1, 2]
    assert [audit.id for audit in client.audits(limit=10)] == [waiting.id, short.id, long.id]
    assert [audit.id for audit in client.audits(limit=1)] == [waiting.id]
    with pytest.raises(FailedPrecondition, match="has no report, it is cancelled"):
        client.audit_report(long.id)
    html = client.audit_report(short.id, html=True).decode()
    assert html.startswith("<!doctype html>")


def test_a_watch_may_be_given_up_and_ends_with_the_server(digits_models: Repository, tmp_path: Path) -> None:
    options = ["--repository", str(digits_models.folder), "--state", str(tmp_path / "state"), "--port", "0"]
    with running(tmp_path / "serve.log", "serve", *options) as server:
        with Client(address(server)) as hasty:
            audit = hasty.submit_audit(PLAN).id
            threading.Timer(0.5, hasty.close).start()
            with pytest.raises((ServiceError, ValueError)):
                list(hasty.watch_audit(audit))
        with Client(address(server)) as client:
            threading.Timer(0.5, server.signal, [signal.SIGTERM]).start()
            with pytest.raises(Unavailable, match=rf"shutting down; watch audit {audit} again, from offset 0"):
                list(client.watch_audit(audit))
        server.signal(0)
    assert "ERROR" not in server.text()


def test_a_second_audit_of_one_plan_sees_the_images_as_they_are_now(
    client: Client, digits_models: Repository, tmp_path: Path
) -> None:
    for digit in "01":
        (tmp_path / "images" / digit).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (32, 32)).save(tmp_path / "images" / digit / f"{index}.png")
    plan = f'[target]\nmodel = "digits"\n[data]\nfolder = "{tmp_path / "images"}"\n'
    with running(tmp_path / "work.log", *_worker(digits_models, tmp_path)):
        first = client.submit_audit(plan).id
        list(client.watch_audit(first))
        shutil.rmtree(tmp_path / "images" / "1")
        second = client.submit_audit(plan).id
        list(client.watch_audit(second))
    assert [json.loads(client.audit_report(each))["clean"]["n"] for each in (first, second)] == [6, 3]


def test_an_audit_that_cannot_work_fails_and_says_why(
    client: Client, digits_models: Repository, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    audit = client.submit_audit(f'[target]\nmodel = "digits"\n[data]\nfolder = "{nowhere}"\n')
    with running(tmp_path / "work.log", *_worker(digits_models, tmp_path)):
        list(client.watch_audit(audit.id))
    failed = client.audit(audit.id)
    assert failed.state == audit_pb2.AUDIT_STATE_FAILED
    assert f"{nowhere}: no such folder" in failed.error


def test_bad_requests_are_refused_with_the_right_status(client: Client) -> None:
    with pytest.raises(InvalidArgument, match=r"attacks\[0\]\.name: unknown 'Magic'"):
        client.submit_audit(PLAN.replace("LinfPGD", "Magic"))
    with pytest.raises(InvalidArgument, match=r"corruptions\.names\[0\]"):
        client.submit_audit(PLAN.replace('"contrast"', '"smoke"'))
    with pytest.raises(NotFound, match=r"'cats': not in .*; its models are: digits, digits-int8"):
        client.submit_audit(PLAN.replace("digits-int8", "cats"))
    with pytest.raises(InvalidArgument, match=r"model name '\.\./x'"):
        client.submit_audit(PLAN.replace("digits-int8", "../x"))
    for call in (client.audit, client.cancel_audit, client.audit_report, lambda key: list(client.watch_audit(key))):
        with pytest.raises(NotFound, match="audit 'none': there is none"):
            call("none")
    with pytest.raises(InvalidArgument, match="offset: expected 0 to"):
        list(client.watch_audit("none", offset=-1))
    assert client.audits(limit=5) == []
