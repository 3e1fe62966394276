from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from tests.training.runs import changed, run
from training import signals

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request_and_a_second_one_an_order(number: int, status: int) -> None:
    before = signal.getsignal(number)
    with signals.requests() as request:
        assert not request.made.is_set()
        os.kill(os.getpid(), number)
        assert request.made.is_set()
        assert request.status == status
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("command", [["-m", "training"], ["-m", "service", "train"]], ids=["module", "verb"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(
    document: dict[str, Any], tmp_path: Path, command: list[str], number: int, status: int
) -> None:
    document["training"] |= {"epochs": 300}
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(document))
    started = [sys.executable, *command, str(file), "--out", str(tmp_path / "run")]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "1/300: loss" in process.stdout.readline()
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == status
    assert "stopped after" in said
    assert "go on with the same command and --resume" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="in training; restore"):
        run(changed(document, training={"epochs": 4}), tmp_path / "run", resume=True)


def test_workers_that_are_asked_to_stop_as_well_let_the_run_save(
    document: dict[str, Any], colours: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(colours, tmp_path / "colours")
    for image in list((root / "train").glob("*/*.png")):  # workers have much to do yet when they are asked to stop
        for number in range(20):
            shutil.copy(image, image.with_stem(f"{image.stem}-{number}"))
    document["data"] |= {"root": str(root), "size": 16, "workers": 2}
    document["training"] |= {"epochs": 300, "batch_size": 2}
    document["tenet"] |= {"start": 20}
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(document))
    command = [sys.executable, "-m", "training", str(file), "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "1/300: loss" in process.stdout.readline()
        time.sleep(0.7)  # the second epoch, of some seconds, has its workers by then
        os.killpg(process.pid, signal.SIGTERM)  # as launchers, time limits and terminals do
        said = process.stderr.read()
    assert process.returncode == 143, said
    assert "go on with the same command and --resume" in said
