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
    assert [line.split("  ")[0] for line in lines[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert lines[2].startswith("test accuracy ")
    assert lines[2].endswith(str(tmp_path / "run"))
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
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_an_interrupt_is_one_line_and_status_130_and_can_be_resumed(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.train", interrupt)
        assert main([str(file), "--out", str(out)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    with monkeypatch.context() as patch:
        patch.setattr("training.__main__.describe", interrupt)
        assert main([str(file), "--out", str(out)]) == 130
    captured = capsys.readouterr()
    assert captured.err == "interrupted; --resume goes on after the last whole epoch\n"
    assert not out.exists()
    assert main([str(file), "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out.startswith("epoch 2/2")
