"""What the server says: one line a thing, with the id of the call that it is about, and nothing of what is secret."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import logs
from service.calls import Calls
from service.errors import NotFound
from service.settings import Logging

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TOKEN = "correct-horse-battery-staple"

logger = logging.getLogger("service.test")


class Context:
    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return (("x-request-id", "the-id"), ("authorization", f"Bearer {TOKEN}"))


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def _outside_a_call() -> Iterator[None]:
    yield
    every = Calls()
    every.end(every.begin(METHOD, Context()))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def objects(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said(capsys)]


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging())
    logger.warning("it is %s", "late")
    (line,) = said(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING service\.test: it is late", line)


def test_an_object_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(form="json"))
    logger.info("it is %s", "late")
    (line,) = objects(capsys)
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {"level": "info", "logger": "service.test", "message": "it is late"}


def test_configuring_again_replaces_what_was(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(form="json"))
    logs.configure(Logging(level="error"))
    logger.warning("too little")
    logger.error("enough")
    (line,) = said(capsys)
    assert line.endswith("ERROR   service.test: enough")


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_is_said_during_a_call_has_its_ids(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(form=form))
    every = Calls()
    call = every.begin(METHOD, Context())
    call.describe(model="digits", version="2")
    call.images = 1
    logger.error("during")
    every.end(call)
    logger.error("after")
    during, after = said(capsys)
    for each in ("the-id", "digits"):
        assert each in during
        assert each not in after


def test_a_call_is_a_line_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(form="json"))
    every = Calls(log=True)
    call = every.begin(METHOD, Context())
    call.describe(model="digits", version="2")
    call.images = 3
    call.ran(waited_ns=1_500_000, ran_ns=2_000_000, batch=8)
    every.end(call)
    (line,) = objects(capsys)
    assert line["message"] == f"{METHOD} OK"
    assert line["ms"] >= 0
    expected = {"status": "OK", "images": 3, "batch": 8, "queue_ms": 1.5, "compute_ms": 2.0}
    assert line.items() >= {**expected, "model": "digits", "version": "2", "request_id": "the-id"}.items()


def test_a_failed_call_s_line_has_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging())
    every = Calls(log=True)
    call = every.begin(METHOD, Context())
    call.fail(NotFound("no such model"))
    every.end(call)
    (line,) = said(capsys)
    assert "NOT_FOUND" in line


def test_calls_are_no_lines_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(level="debug"))
    every = Calls()
    every.end(every.begin(METHOD, Context()))
    assert said(capsys) == []


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_token_is_ever_said(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(form=form, level="debug"))
    every = Calls(log=True)
    call = every.begin(METHOD, Context())
    logger.debug("during")
    call.fail(ValueError())
    every.end(call)
    assert TOKEN not in "".join(said(capsys))


@pytest.mark.parametrize("form", ["text", "json"])
@given(sent=st.text())
def test_whatever_a_caller_sends_stays_on_its_line(form: Any, sent: str) -> None:
    formatter = logs.Json() if form == "json" else logs.Text()
    record = logger.makeRecord(
        logger.name, logging.INFO, "", 0, "model %r, %s", (sent, sent), None, extra={"fields": {"peer": sent}}
    )
    line = formatter.format(record)
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_a_traceback_is_told_and_cannot_be_taken_for_lines_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging())
    try:
        raise ValueError("first\n2026-01-01T00:00:00.000Z INFO    service: forged")
    except ValueError:
        logger.exception("failed")
    first, *rest = said(capsys)
    assert first.endswith("failed")
    assert "ValueError" in "".join(rest)
    assert all(line.startswith("  ") for line in rest)


def test_a_traceback_is_one_field(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(form="json"))
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("failed")
    (line,) = objects(capsys)
    assert line["exception"].endswith("ValueError: why")
