"""The dashboard over a real server and a real worker, asked by HTTP."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from service.client import Client
from tests.processes import address, running

if TYPE_CHECKING:
    from pathlib import Path

    from export.repository import Repository

PLAN = '[target]\nmodel = "digits"\n[data]\ndataset = "digits"\nsamples = 20\n'


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as response:
        content: bytes = response.read()
        return content.decode()


def test_audits_and_their_reports_are_pages(digits_models: Repository, tmp_path: Path) -> None:
    options = ["--repository", str(digits_models.folder), "--state", str(tmp_path / "state"), "--port", "0"]
    with running(tmp_path / "up.log", "up", *options) as up, Client(address(up)) as client:
        url = up.wait_for(r"^dashboard on (\S+)$")[1]
        assert "There are none yet" in _get(url)
        audit = client.submit_audit(PLAN).id
        missing = client.submit_audit(PLAN.replace('dataset = "digits"', 'folder = "/<b>nowhere</b>"')).id
        for each in (audit, missing):
            list(client.watch_audit(each))
        assert f'href="/audits/{audit}"' in _get(url)
        assert "Audit of digits" in _get(f"{url}/audits/{audit}")
        failed = _get(f"{url}/audits/{missing}")
        assert "failed" in failed
        assert "no such folder" in failed
        assert "<b>nowhere" not in failed
        with pytest.raises(urllib.error.HTTPError, match="404") as error:
            _get(f"{url}/audits/none")
        assert "there is none" in error.value.read().decode()
        error.value.close()
