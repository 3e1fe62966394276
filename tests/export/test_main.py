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
    done = _export("run", *place, "--from", "digits", "--name", "small", "--precision", "int8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("small@1: int8 on onnxruntime, parity with digits@1 passed on 504 digits test images")
    assert own_models.find("small").manifest.precision == "int8"


def test_bad_input_is_one_line_and_exit_code_2(own_models: Repository) -> None:
    place = ["--repository", str(own_models.folder)]
    unknown = _export("run", *place, "--from", "cats", "--name", "x")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: model 'cats': not in")
    assert _export("run", *place, "--name", "x").stderr == (
        "error: expected one of a RUN folder, --from NAME, --factory, got none of them; give one alone\n"
    )
    assert "expected letters" in _export("run", "nowhere", *place, "--name", "../x").stderr
