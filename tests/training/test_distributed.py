"""Several processes train as one does: two gloo processes under PyTorch's launcher, on CPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
import torch

from tests.training.runs import changed, run, same, weights
from training import augment, checkpoint, datasets

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 150  # starting two processes that import PyTorch takes many on a busy machine
REGIMES: dict[str, dict[str, Any]] = {
    "tenet": {},
    "augmix": {"augmentation": {"augmix": {"width": 2}, "flip": True, "cutout": 4}, "training": {"ema": 0.9}},
    "free": {"adversarial": {"method": "free", "replays": 2}, "tenet": {"fused": True, "start": 8}},
}


def launched(file: Path, out: Path, *options: str, program: str = "training") -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*torchrun, "-m", *program.split(), str(file), "--out", str(out), *options]


def ended(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def written(document: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Path:
    file = folder / "recipe.toml"
    merged = {name: document.get(name, {}) | sections.get(name, {}) for name in {*document, *sections}}
    file.write_text(tomli_w.dumps(merged))
    return file


@pytest.mark.parametrize("regime", REGIMES)
def test_two_processes_train_as_one_does_with_the_same_batch(
    document: dict[str, Any], tmp_path: Path, environment: dict[str, str], regime: str
) -> None:
    document["training"] |= {"batch_size": 16}  # so that each process has its two correct images at every TENET step
    document["tenet"] |= {"start": 4}
    file = written(document, tmp_path, **REGIMES[regime])
    _, one = run(changed(document, **REGIMES[regime]), tmp_path / "one")
    done = ended(launched(file, tmp_path / "two"), environment)
    assert done.returncode == 0, done.stderr
    said = [line.split(": ")[0] for line in done.stdout.splitlines()]
    assert said == [*(f"epoch {number}/4" for number in range(1, 5)), str(tmp_path / "two")]
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-3, atol=2e-4), name
    ours, theirs = (checkpoint.load(tmp_path / name).metrics for name in ("one", "two"))
    assert one.tenet_steps > 0
    for name in ("iterations", "tenet_steps", "best_epoch", "test_accuracy"):
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize(
    "case",
    [
        ({"batch_size": 9}, [], "error: training.batch_size: expected a multiple of the 2 processes, got 9"),
        ({}, ["--device", "cuda:7"], "error: device: expected one that this machine has, got 'cuda:7'"),
    ],
    ids=["batch", "device"],
)
def test_what_cannot_be_shared_is_one_line(
    document: dict[str, Any],
    tmp_path: Path,
    environment: dict[str, str],
    case: tuple[dict[str, Any], list[str], str],
) -> None:
    change, options, message = case
    file = written(document, tmp_path, training=change)
    done = ended(launched(file, tmp_path / "two", *options), environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.glob("two*"))


def test_accuracies_without_shared_statistics_are_those_of_the_weights_that_are_saved(
    document: dict[str, Any], tmp_path: Path, environment: dict[str, str]
) -> None:
    document["data"] |= {"validation": 0.5}
    file = written(document, tmp_path, training={"sync_batch_norm": False, "epochs": 2})
    assert ended(launched(file, tmp_path / "two"), environment).returncode == 0
    loaded = checkpoint.load(tmp_path / "two")
    for part, name in (("validation", "validation_accuracy"), ("test", "test_accuracy")):
        images = datasets.parts(loaded.recipe.data, seed=0)[part].read(None)
        with torch.inference_mode():
            predicted = loaded.model(augment.unit_range(torch.from_numpy(images.images))).argmax(1)
        assert loaded.metrics[name] == pytest.approx(float((predicted.numpy() == images.labels).mean()))


def test_a_terminated_launcher_saves_and_goes_on_to_the_same_weights(
    document: dict[str, Any], tmp_path: Path, environment: dict[str, str]
) -> None:
    sections: dict[str, Any] = {"training": {"epochs": 12, "ema": 0.9}, "adversarial": {"method": "free", "replays": 2}}
    file = written(document, tmp_path, **sections)
    process = subprocess.Popen(
        launched(file, tmp_path / "parts"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    metrics, deadline = tmp_path / "parts.partial" / "metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, complaints = process.communicate(timeout=SECONDS)
    assert "go on with the same command and --resume" in complaints
    assert not (tmp_path / "parts").exists()
    _, record = checkpoint.load_state(tmp_path / "parts.partial" / checkpoint.STATE)
    assert 8 <= record["progress"]["iterations"] < 96
    assert ended(launched(file, tmp_path / "parts", "--resume"), environment).returncode == 0
    assert ended(launched(file, tmp_path / "whole", program="service train"), environment).returncode == 0
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
