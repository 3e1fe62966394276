"""The long-running commands as a person meets them: taken ports, taken folders, Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service.client import Client
from service.commands.serve import is_loopback
from tests.processes import address, running, tenet

if TYPE_CHECKING:
    from export.repository import Repository


def _up(digits_models: Repository, tmp_path: Path) -> list[str]:
    return ["up", "--repository", str(digits_models.folder), "--state", str(tmp_path / "state"), "--port", "0"]


def test_a_second_up_on_one_folder_is_refused_and_the_first_goes_on(digits_models: Repository, tmp_path: Path) -> None:
    with running(tmp_path / "up.log", *_up(digits_models, tmp_path)) as first:
        first.wait_for("working on the audits")
        second = tenet(*_up(digits_models, tmp_path))
        assert second.returncode == 2
        assert f"`tenet up` already runs on this state folder (process {first.pid})" in second.stderr
        work = tenet("work", "--repository", str(digits_models.folder), "--state", str(tmp_path / "state"))
        assert work.returncode == 2
        assert "`tenet work` already runs on this state folder" in work.stderr
        with Client(address(first)) as client:
            assert client.ready("digits")


def test_up_starts_another_worker_when_one_dies(digits_models: Repository, tmp_path: Path) -> None:
    with running(tmp_path / "up.log", *_up(digits_models, tmp_path)) as up:
        up.wait_for("working on the audits")
        worker = int((tmp_path / "state" / "work.lock").read_text())
        os.kill(worker, signal.SIGKILL)
        up.wait_for(r"the worker ended with exit code -9; starting another")
        up.wait_for(r"(?s)starting another.*working on the audits")
        assert int((tmp_path / "state" / "work.lock").read_text()) != worker


def test_a_worker_does_not_outlive_a_killed_up(digits_models: Repository, tmp_path: Path) -> None:
    with running(tmp_path / "up.log", *_up(digits_models, tmp_path)) as up:
        up.wait_for("working on the audits")
        up.signal(signal.SIGKILL)
    # The locks are free again once both are gone.
    with running(tmp_path / "again.log", *_up(digits_models, tmp_path)) as again:
        again.wait_for(r"(?s)working on the audits")


def test_a_port_in_use_is_named(digits_models: Repository) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = tenet("serve", "--repository", str(digits_models.folder), "--port", str(port))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (f"error: port {port} on 127.0.0.1 is in use; choose another with --port")


def test_up_ends_when_the_dashboard_s_port_is_in_use(digits_models: Repository, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = tenet(*_up(digits_models, tmp_path), "--web-port", port)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --port" in result.stderr


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_only_a_loopback_server_takes_folders(host: str, local: bool) -> None:  # noqa: FBT001
    assert is_loopback(host) is local


def test_serve_works_where_torch_and_its_kin_cannot_be_imported(digits_models: Repository, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'foolbox', 'training', 'sklearn'): sys.modules[name] = None\n"
        "from service.__main__ import main\n"
        "main()"
    )
    options = ["--repository", str(digits_models.folder), "--state", str(tmp_path / "state"), "--port", "0"]
    command = [sys.executable, "-c", program, "serve", *options]
    with running(tmp_path / "log", command=command) as server, Client(address(server)) as client:
        assert client.ready("digits")
        assert client.audits(limit=1) == []


@pytest.mark.parametrize("verb", ["serve", "up", "work"])
def test_ctrl_c_ends_a_service_in_good_order(verb: str, digits_models: Repository, tmp_path: Path) -> None:
    arguments = _up(digits_models, tmp_path)[1:]
    options = arguments[:-2] if verb == "work" else arguments
    with running(tmp_path / "log", verb, *options) as process:
        process.wait_for(r"serving 2 models|working on the audits")
        assert process.signal(signal.SIGINT) == 0
    assert "Traceback" not in process.text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_dashboard_ends_in_good_order(number: signal.Signals, tmp_path: Path) -> None:
    with running(tmp_path / "log", "web", "--server", "127.0.0.1:1", "--port", "0") as process:
        url = process.wait_for(r"^dashboard on (\S+)$")[1]
        with pytest.raises(urllib.error.HTTPError, match="502") as error:
            urllib.request.urlopen(url, timeout=20)
        assert "cannot reach 127.0.0.1:1" in error.value.read().decode()
        error.value.close()
        assert process.signal(number) == 0
    assert "Traceback" not in process.text()


def test_ctrl_c_in_training_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[3] / "configs" / "digits.toml"
    with running(tmp_path / "log", "train", str(recipe), "--out", str(tmp_path / "run")) as process:
        process.wait_for(r"training: 1/")
        assert process.signal(signal.SIGINT) == 130
    stopped, interrupted = process.text().splitlines()[-2:]
    assert stopped.startswith("stopped after ")
    assert stopped.endswith(" of 720 iterations; go on with the same command and --resume")
    assert interrupted == "error: interrupted"
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run.partial" / "state.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "run.partial"]


def test_ctrl_c_in_an_audit_writes_no_report(digits_models: Repository, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'[target]\nrepository = "{digits_models.folder}"\nmodel = "digits"\n[data]\ndataset = "digits"\n'
        '[[attacks]]\nname = "LinfPGD"\nepsilons = ["8/255"]\nsteps = 1000\n'
    )
    options = ["audit", "run", str(plan), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    with running(tmp_path / "log", *options) as process:
        process.wait_for(r"1/\d+: clean images")
        assert process.signal(signal.SIGINT) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "plan.toml"]
    assert "Traceback" not in process.text()
