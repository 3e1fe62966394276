"""What ONNX Runtime's providers on GPUs are told, and which GPU and which TensorRT they get."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.engines import providers
from export.engines.base import CannotRunHere
from tests.export.engines.nvidia import Cuda

ROOT = Path(__file__).parents[3]


def handle(bus: str | None) -> Any:
    """Return what ONNX Runtime lists of a GPU: where it is, where it could find out."""
    return SimpleNamespace(device=SimpleNamespace(metadata={} if bus is None else {"pci_bus_id": bus}))


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let CUDA find GPUs at 0000:C1:00.0, 0000:81:00.0 and so on, downwards."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Cuda(gpus=number))


def test_a_gpu_is_found_by_its_place_on_the_bus_and_not_by_its_place_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    # In the order of the bus, with one that CUDA does not show to this process.
    listed = [handle("0000:41:00.0"), handle("0000:81:00.0"), handle("00000000:c1:00.0")]
    assert providers.on_gpu(listed, 0) is listed[2]
    assert providers.on_gpu(listed, 1) is listed[1]


@pytest.mark.parametrize("listed", [[], ["0000:41:00.0"], [None], ["0000:41:00.0", None]])
def test_a_gpu_that_is_not_listed_is_not_replaced_by_another(
    monkeypatch: pytest.MonkeyPatch, listed: list[str | None]
) -> None:
    gpus(monkeypatch, 2)
    with pytest.raises(CannotRunHere, match=r"supports GPU 1 at 0000:81:00\.0, ONNX Runtime lists (none|0000:41|one)"):
        providers.on_gpu([handle(bus) for bus in listed], 1)


def test_the_only_gpu_need_not_say_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    (only,) = listed = [handle(None)]
    assert providers.on_gpu(listed, 0) is only
    with pytest.raises(CannotRunHere, match=r"lists 0000:41:00\.0"):
        providers.on_gpu([handle("0000:41:00.0")], 0)


def test_another_tensorrt_than_onnx_runtime_was_built_for_is_named_with_the_way_out() -> None:
    with pytest.raises(CannotRunHere) as told:
        providers.nvinfer(77, installed="78.4.1")
    assert "expected TensorRT 77, for which this ONNX Runtime was built, found TensorRT 78.4.1" in str(told.value)
    assert "choose provider 'cuda' or a plan" in str(told.value)
    assert "`tensorrt==77.*` in an environment without tenet[tensorrt]" in str(told.value)
    with pytest.raises(CannotRunHere, match=r"was built, libnvinfer\.so\.77: cannot open"):
        providers.nvinfer(77, installed=None)


@pytest.mark.parametrize(
    ("said", "loaded", "expected", "warning"),
    [
        (None, "libnothing.so", "0", ""),
        ("0", "libnothing.so", "0", ""),
        ("1", "libnothing.so", "1", "NVIDIA_TF32_OVERRIDE is 1: products of fp32 may be rounded"),
        (None, "libc.so.6", "0", "libc.so.6 was loaded before it could be told"),
    ],
)
def test_tensorfloat_is_off_before_tensorrt_is_loaded_or_a_warning_says_why_not(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    said: str | None,
    loaded: str,
    expected: str,
    warning: str,
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", said or "")
    if said is None:
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    with caplog.at_level(logging.WARNING):
        providers.without_tf32(loaded)
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == expected
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nv_tensorrt_rtx"])
def test_products_of_fp32_are_those_of_fp32_on_a_gpu(tmp_path: Path, provider: str) -> None:
    # A process of its own: another provider's libraries may have been loaded in this one already.
    program = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from export.engines import ort; from export.engines.base import CannotRunHere\n"
        "from tests.export import graphs\n"
        "source = graphs.saved(Path(sys.argv[1]))\n"
        "images = np.random.default_rng(0).random((8, *graphs.IMAGES.shape[1:]), dtype=np.float32)\n"
        "expected = ort.open_session(source).run(['logits'], {'images': images})[0]\n"
        "try: session = ort.open_session(source, provider=sys.argv[2])\n"
        "except CannotRunHere as error: print('skip', error); sys.exit()\n"
        "print(np.abs(session.run(['logits'], {'images': images})[0] - expected).max() / np.abs(expected).max())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), provider], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    # TensorFloat-32 rounds to 2**-11, fp32 to 2**-24.
    assert float(done.stdout) < 2e-5
