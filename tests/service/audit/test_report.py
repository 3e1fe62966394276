from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.audit import report

SCHEMAS = Path(__file__).parents[3] / "docs" / "schemas"


def test_the_published_schema_is_that_of_the_report() -> None:
    # Written by: python -c "from service.audit import report; print(report.json_schema(), end='')"
    assert (SCHEMAS / "audit-report-2.json").read_text() == report.json_schema()


def test_the_schema_names_every_key_as_the_report_writes_it() -> None:
    properties = json.loads(report.json_schema())["properties"]
    assert properties["schema"]["const"] == report.SCHEMA
    assert "schema_" not in properties


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>", "expected a report in JSON, got something else"),
        ("[]", "schema: expected 'tenet.audit.report/2', got None"),
        ('{"schema": "tenet.audit.report/1"}', "got 'tenet.audit.report/1'; run the audit again with this version"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.parse(text)
