from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.repository import Repository


def _export(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_script_can_make_a_variant(own_models: Repository) -> None:
    place = ["--repository", str(own_models.folder)]
    done = _export(*place, "--from", "digits", "--name", "small", "--precision", "int8")
    assert (done.returncode, done.stdout.strip()) == (0, str(own_models.folder / "small" / "1")), done.stderr
    assert own_models.find("small").manifest.precision == "int8"


def test_bad_input_is_one_line_and_exit_code_2(own_models: Repository) -> None:
    place = ["--repository", str(own_models.folder)]
    unknown = _export(*place, "--from", "cats", "--name", "x")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: model 'cats': not in")
    assert _export(*place, "--name", "x").returncode == 2
    assert "expected letters" in _export("nowhere", *place, "--name", "../x").stderr
