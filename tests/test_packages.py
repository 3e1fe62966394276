from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata
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


def test_the_bare_install_does_not_ask_for_torch() -> None:
    requirements = metadata.requires("tenet") or []
    bare = {re.split(r"[^\w-]", line)[0] for line in requirements if "extra ==" not in line}
    assert "onnxruntime-gpu" in bare
    assert not bare & {"torch", "torchvision", "onnxruntime", "onnxscript", "dbos", "foolbox", "scikit-learn"}


def test_every_installed_version_is_the_constrained_one() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert not any("/" in version for version in pinned.values())
    for name in ("torch", "onnxruntime-gpu", "grpcio", "dbos", "foolbox", "ruff"):
        assert metadata.version(name) == pinned[name]
