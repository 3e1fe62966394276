from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from export import onnx_file, onnx_graph
from export.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NAMES = ("cat", "dog", "bird")
_SHAPE = (3, 4, 6)


class _Net(nn.Module):
    """A classifier whose forward ends in whatever a test wants."""

    def __init__(self, last: Callable[[Tensor], object] = lambda scores: scores) -> None:
        super().__init__()
        self.linear = nn.Linear(72, 3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))
        self.last = last

    def forward(self, images: Tensor) -> object:
        return self.last(self.linear(images.view(images.shape[0], -1)))


def _exported(module: nn.Module, path: Path, **options: Literal["float32", "uint8", "logits", "probabilities"]) -> Path:
    onnx_graph.onnx_from_module(module.eval(), path, image_shape=_SHAPE, class_names=_NAMES, **options)  # type: ignore[arg-type]
    return path


def _run(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"images": images})
    return np.asarray(answers)


@pytest.fixture(scope="module")
def net() -> _Net:
    return _Net().eval()


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_the_graph_answers_as_the_module(
    net: _Net, tmp_path: Path, kind: Literal["float32", "uint8"], output: Literal["logits", "probabilities"]
) -> None:
    path = _exported(net, tmp_path / "model.onnx", input=kind, output=output)
    levels = np.random.default_rng(0).integers(0, 256, (5, *_SHAPE)).astype(np.uint8)
    images = levels.astype(np.float32) / 255
    with torch.inference_mode():
        expected = net(torch.from_numpy(images))
    if output == "probabilities":
        expected = expected.softmax(dim=-1)
    sent = images if kind == "float32" else levels.transpose(0, 2, 3, 1)
    for batch in (1, 5):
        np.testing.assert_allclose(_run(path, sent[:batch]), expected[:batch], atol=1e-5)
    shape, datatype = ((-1, 3, 4, 6), "FP32") if kind == "float32" else ((-1, 4, 6, 3), "UINT8")
    assert onnx_graph.specs(path) == (
        (TensorSpec(name="images", datatype=datatype, shape=shape),),
        (TensorSpec(name=output, datatype="FP32", shape=(-1, 3)),),
    )


def test_uint8_images_are_cast_before_anything_else(net: _Net, tmp_path: Path) -> None:
    path = _exported(net, tmp_path / "model.onnx", input="uint8")
    assert [node.op_type for node in onnx.load(path).graph.node][:3] == ["Cast", "Transpose", "Div"]


def test_the_file_is_the_same_every_time_and_holds_the_names_and_no_path(net: _Net, tmp_path: Path) -> None:
    first = _exported(net, tmp_path / "a.onnx", input="uint8", output="probabilities").read_bytes()
    assert _exported(net, tmp_path / "b.onnx", input="uint8", output="probabilities").read_bytes() == first
    (entry,) = onnx.load(tmp_path / "a.onnx").metadata_props
    assert (entry.key, json.loads(entry.value)) == ("class_names", list(_NAMES))
    for text in (b".py", b"site-packages", str(tmp_path).encode()):
        assert text not in first
    assert onnx_file.load(tmp_path / "a.onnx").graph.node


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (lambda scores: scores + torch.zeros(2, 3), r"logits: expected one row an image, got shape \(2, 3\)"),
        (lambda scores: scores.reshape(2, -1), "fixes the batch or mixes its images"),
        (lambda scores: (scores, scores), "logits: expected one output, got 2"),
        (lambda scores: scores.argmax(dim=1), "logits: expected float32, got int64"),
        (lambda scores: scores[:, :2], r"expected shape \('batch', 3\) for 3 class names, got \('batch', 2\)"),
        (torch.special.bessel_j1, r"cannot be exported to ONNX: operator prims\.bessel_j1 has no counterpart in ONNX"),
        (lambda scores: scores if scores.sum() > 0 else -scores, r"data-dependent.*\(test_onnx_graph\.py, line \d+: "),
        (lambda scores: scores @ scores, r"cannot be exported to ONNX: \w+Error: "),
    ],
)
def test_modules_that_make_no_classifier_are_refused_in_one_line(
    tmp_path: Path, last: Callable[[Tensor], object], message: str
) -> None:
    with redirect_stderr(io.StringIO()) as printed, pytest.raises(ValueError, match=message) as caught:
        _exported(_Net(last), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert printed.getvalue() == ""
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    net = _Net()
    with torch.no_grad():
        net.linear.weight[1, 2] = value
    with pytest.raises(ValueError, match=r"'linear\.weight': expected finite weights, got .* in 1 of 216 places"):
        _exported(net, tmp_path / "model.onnx")


def test_a_module_of_more_than_two_gib_is_refused_before_it_is_traced(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(72, 8_000_000))
    with pytest.raises(ValueError, match=r"at most 2 GiB.*, got 2\.18 GiB"):
        _exported(net, tmp_path / "model.onnx")


def test_the_parser_of_tensorrt_takes_a_network_of_torchvision_on_uint8(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    onnx_graph.onnx_from_module(
        torchvision.models.resnet18(num_classes=3).eval(),
        tmp_path / "model.onnx",
        image_shape=(3, 32, 32),
        class_names=_NAMES,
        input="uint8",
        output="probabilities",
    )
    parsed = parser.parse((tmp_path / "model.onnx").read_bytes())
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    assert tuple(network.get_input(0).shape) == (-1, 32, 32, 3)
