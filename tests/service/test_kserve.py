"""KServe's own client, unchanged, against our server: the protocol, and KServe's dialect of the repository's calls."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from service.settings import Settings

if TYPE_CHECKING:
    from tests.service.conftest import Publish, Start

_ROOT = Path(__file__).parents[2]
_PYTHON = _ROOT / ".venv-kserve" / "bin" / "python"
_CLIENT = _ROOT / "tests" / "kserve" / "client.py"


def test_kserves_client_works_unchanged(start: Start, publish: Publish, tmp_path: Path) -> None:
    from tests.service.conftest import weights_of

    publish(tmp_path, "linear", seed=3)
    settings = Settings.model_validate({"models": {"mode": "explicit", "load": ("*",)}})
    serving = start(tmp_path, settings)
    # `make test` makes this environment; the test is not skipped without it, because nobody would see that.
    done = subprocess.run(
        [_PYTHON, _CLIENT, serving.address, "linear"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    images = np.random.default_rng(1).random((3, 3, 4, 4), dtype=np.float32)
    expected = images.reshape(3, -1) @ weights_of(3)
    for form in ("raw", "typed"):
        answer = seen.pop(form)
        assert answer["id"] == "seven"
        np.testing.assert_allclose(answer["answer"], expected, rtol=1e-4, atol=1e-5)
    assert seen == {
        "live": True,
        "ready": True,
        "model ready": True,
        "inputs": [["images", "FP32", [-1, 3, 4, 4]]],
        "unloaded": ["linear", True],
        "ready after that": False,
        "loaded": ["linear", True],
    }
