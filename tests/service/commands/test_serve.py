"""`tenet serve` as real processes: several on one port, settings of the environment, and the ways to end."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from typing import TYPE_CHECKING

import numpy as np
import pytest

from service.client import Client
from tests.processes import address, running, tenet

if TYPE_CHECKING:
    from pathlib import Path

    from tests.service.conftest import Publish

_IMAGE = np.full((1, 3, 4, 4), 0.5, np.float32)


@pytest.fixture
def models(publish: Publish, tmp_path: Path) -> Path:
    publish(tmp_path / "models", "linear")
    return tmp_path / "models"


def _settings(folder: Path, lines: str) -> list[str]:
    path = folder / "serve.toml"
    path.write_text(lines)
    return ["--settings", str(path)]


def test_several_processes_share_a_port_and_end_together(models: Path, tmp_path: Path) -> None:
    chosen = _settings(tmp_path, "[server]\nprocesses = 2\nport = 0")
    with running(tmp_path / "log", "serve", "--repository", str(models), *chosen) as server:
        where = server.wait_for(r"^2 processes on (\S+)$")[1]
        server.wait_for(r"(serving 1 models on [^\n]+\n[^\0]*){2}")
        for _ in range(8):
            with Client(where) as client:
                assert client.infer(_IMAGE, model="linear").shape == (1, 5)
        second = tenet("serve", "--repository", str(models), "--port", where.split(":")[1])
        assert (second.returncode, "is in use; choose another with --port" in second.stderr) == (2, True)
        assert server.signal(signal.SIGTERM) == 0
    assert server.text().count("stopped") == 2


def test_a_process_that_is_killed_is_started_again(models: Path, tmp_path: Path) -> None:
    chosen = _settings(tmp_path, "[server]\nprocesses = 2\nport = 0")
    with running(tmp_path / "log", "serve", "--repository", str(models), *chosen) as server:
        where = server.wait_for(r"^2 processes on (\S+)$")[1]
        server.wait_for(r"(serving 1 models on [^\n]+\n[^\0]*){2}")
        children = _children(server.pid)
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        server.wait_for(r"ended with exit code -9; starting another")
        server.wait_for(r"(serving 1 models on [^\n]+\n[^\0]*){3}")
        with Client(where) as client:
            assert client.ready("linear")


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ('[models]\nmode = "explicit"', "models.mode"),
        ("[shared_memory]\nenabled = true", "shared_memory.enabled"),
        ('[server]\nfront = "native"', 'server.front = "native"'),
    ],
)
def test_what_would_reach_one_process_alone_is_refused(models: Path, tmp_path: Path, lines: str, key: str) -> None:
    if "[server]" in lines:
        lines += "\nprocesses = 2"
    else:
        lines += "\n[server]\nprocesses = 2"
    refused = tenet("serve", "--repository", str(models), *_settings(tmp_path, lines))
    assert refused.returncode == 2
    assert key in refused.stderr


def test_the_environment_goes_over_the_file(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENET_MODELS__MODE", "explicit")
    monkeypatch.setenv("TENET_SERVER__PORT", "0")
    with running(tmp_path / "log", "serve", "--repository", str(models)) as server, Client(address(server)) as client:
        assert not client.ready("linear")
        client.load("linear")
        assert client.ready("linear")
    monkeypatch.setenv("TENET_SERVER__PRT", "0")
    refused = tenet("serve", "--repository", str(models))
    assert (refused.returncode, "environment: server.prt: unknown key" in refused.stderr) == (2, True)


def test_a_drain_delay_serves_on_while_it_says_that_it_ends(models: Path, tmp_path: Path) -> None:
    chosen = _settings(tmp_path, "[server]\ndrain_delay_s = 1.5\nport = 0")
    with (
        running(tmp_path / "log", "serve", "--repository", str(models), *chosen) as server,
        Client(address(server)) as client,
    ):
        assert client.ready()
        codes: list[int] = []
        ends = threading.Thread(target=lambda: codes.append(server.signal(signal.SIGTERM)))
        ends.start()
        while client.ready():
            pass
        assert client.infer(_IMAGE, model="linear").shape == (1, 5)
        ends.join()
        assert codes == [0]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(models: Path, tmp_path: Path, first: signal.Signals) -> None:
    chosen = _settings(tmp_path, "[server]\ndrain_delay_s = 600\nport = 0")
    with (
        running(tmp_path / "log", "serve", "--repository", str(models), *chosen) as server,
        Client(address(server)) as client,
    ):
        os.kill(server.pid, first)
        while client.ready():
            pass
        assert server.signal(signal.SIGTERM) != 0


def test_a_signal_to_the_whole_group_is_one_signal(models: Path, tmp_path: Path) -> None:
    chosen = _settings(tmp_path, "[server]\nprocesses = 2\nport = 0\ndrain_delay_s = 0.5")
    with running(tmp_path / "log", "serve", "--repository", str(models), *chosen) as server:
        server.wait_for(r"(serving 1 models on [^\n]+\n[^\0]*){2}")
        for child in _children(server.pid):
            os.kill(child, signal.SIGTERM)
        assert server.signal(signal.SIGTERM) == 0
    assert server.text().count("stopped") == 2


def test_ports_that_were_free_are_told(models: Path, tmp_path: Path) -> None:
    chosen = _settings(tmp_path, "[server]\nport = 0\nadmin_port = 0\n[metrics]\nport = 0")
    with running(tmp_path / "log", "serve", "--repository", str(models), *chosen) as server:
        operators = server.wait_for(r"^operators' port: (\S+)$")[1]
        page = server.wait_for(r"^metrics on (\S+)$")[1]
        done = tenet("models", "status", "--server", operators)
        assert (done.returncode, "linear" in done.stdout) == (0, True)
        with urllib.request.urlopen(page) as answer:
            assert b"nv_inference_count" in answer.read()


def _children(parent: int) -> list[int]:
    with open(f"/proc/{parent}/task/{parent}/children") as listed:  # noqa: PTH123 - no path of a file
        main = [int(child) for child in listed.read().split()]
    tasks = os.listdir(f"/proc/{parent}/task")  # noqa: PTH208 - as above
    for task in tasks:
        with open(f"/proc/{parent}/task/{task}/children") as listed:  # noqa: PTH123 - as above
            main += [int(child) for child in listed.read().split()]
    return sorted(set(main))
