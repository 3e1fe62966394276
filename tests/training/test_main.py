from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from training import checkpoint
from training.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path, colours: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(
        f'[data]\nname = "folder"\nroot = "{colours}"\n[model]\ndepth = 8\nwidth = 4\n'
        '[training]\nepochs = 2\nbatch_size = 8\nlearning_rate = 0.05\n[tenet]\nstage = "layer2"\nstart = 3\n'
    )
    return path


def test_training_prints_a_line_per_epoch_and_the_folder(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(file), "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2", str(tmp_path / "run")]
    assert lines[1].split(": ")[1].startswith("loss ")
    assert lines[2].split(": ")[1].startswith("test accuracy ")
    assert checkpoint.load(tmp_path / "run").class_names == ("blue", "green", "red")


def test_bad_input_is_one_line_and_status_2(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    bad = tmp_path / "bad.toml"
    bad.write_text(file.read_text() + "grups = 3\n")
    for arguments, message in (
        ([str(tmp_path / "none.toml"), "--out", str(tmp_path / "new")], "no such recipe"),
        ([str(file), "--out", str(tmp_path / "run")], "exists already"),
        ([str(bad), "--out", str(tmp_path / "new")], "tenet.grups: unknown key"),
        ([str(file), "--out", str(tmp_path / "new"), "--resume"], "expected an interrupted run, got none"),
        ([str(file), "--out", str(file / "new")], f"got one under the file {file}"),
        ([str(file), "--out", str(tmp_path / "new"), "--device", "meta"], "it computes nothing"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.parametrize("failure", [RuntimeError("CUDA out of memory"), OSError(13, "Permission denied")])
def test_a_failure_of_the_machine_is_one_line_and_status_2(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("training.checkpoint.finish", fail)
    assert main([str(file), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(failure.args[-1]) in line


def test_a_second_interrupt_is_one_line_and_status_130_and_can_be_resumed(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.events.EpochEnded.__str__", interrupt)
        assert main([str(file), "--out", str(out)]) == 130
    captured = capsys.readouterr()
    assert captured.err == "interrupted; --resume goes on from the last save, if there is one\n"
    assert not out.exists()
    assert main([str(file), "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out.startswith("epoch 2/2")
