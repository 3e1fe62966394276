from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["training", "export", "service", "protos"])
def test_our_package_names_resolve_into_this_repository(name: str) -> None:
    path = importlib.import_module(name).__file__
    assert path is not None
    assert Path(path) == ROOT / name / "__init__.py"


@pytest.mark.parametrize("verb", [["--help"], ["serve", "--help"], ["audit", "submit", "--help"]])
def test_the_command_line_starts_without_torch(verb: list[str]) -> None:
    program = (
        "import sys; from service.__main__ import app\n"
        f"try: app({verb!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'torchvision', 'foolbox', 'dbos', 'onnxruntime'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
