"""Options of every session: files that crash ONNX Runtime otherwise, and arithmetic that is the same everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torchvision.models import VisionTransformer

import export
from export import onnx_graph, precision
from export.engines import ort
from export.engines.session_options import saturates
from export.rounding import calibration
from tests.export import networks

_OPENINGS = {
    "a file": "from export.engines import ort; ort.open_session(path)",
    "calibration": "from export.rounding import calibration; calibration.open_session(model, optimise=True)",
    "a trial": "from export.graph import batch_dimension; batch_dimension.try_out(model, images)",
}


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer in fp16: one that crashes ONNX Runtime 1.31 with the options that it has by itself."""
    folder = tmp_path_factory.mktemp("transformer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = VisionTransformer(
            image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=32, num_classes=3
        )
    onnx_graph.onnx_from_module(
        module.eval(), folder / "fp32.onnx", image_shape=(3, 32, 32), class_names=("a", "b", "c")
    )
    precision.fp16_from_onnx(folder / "fp32.onnx", folder / "fp16.onnx")
    return folder / "fp16.onnx"


@pytest.mark.parametrize("opening", _OPENINGS)
def test_a_transformer_in_fp16_opens_wherever_nothing_says_that_it_is_one(transformer: Path, opening: str) -> None:
    # In a process of its own, which a crash would end.
    code = (
        "import sys, onnx, numpy; path = sys.argv[1]; model = onnx.load(path)\n"
        f"images = numpy.zeros((2, 3, 32, 32), numpy.float32)\n{_OPENINGS[opening]}"
    )
    root = Path(export.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code, str(transformer)], cwd=root, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_calibration_computes_as_engines_do(tmp_path: Path) -> None:
    path = networks.saved(networks.residual(), tmp_path)
    for session in (ort.open_session(path), calibration.open_session(onnx.load(path), optimise=False)):
        options: onnxruntime.SessionOptions = session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_products_are_slow_and_exact_only_where_quick_ones_saturate() -> None:
    assert saturates(machine="x86_64", flags=frozenset({"avx2", "avx512f"}))
    assert not saturates(machine="x86_64", flags=frozenset({"avx2", "avx512f", "avx512_vnni"}))
    assert not saturates(machine="x86_64", flags=frozenset({"avx2", "avx_vnni"}))
    assert not saturates(machine="aarch64", flags=frozenset({"asimddp"}))
