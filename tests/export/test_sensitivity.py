from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from export import precision, sensitivity
from export.engines import ort
from export.graph import preparation
from tests.export import networks

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import Target
    from export.sensitivity import Logits


def _uneven() -> onnx.ModelProto:
    """A classifier in which one channel is 3000 times as large as the others and counts for nothing.

    A range for all channels of that tensor at once leaves the others one level of 256.
    """
    net, width = networks.Network(), 16
    tensor = "images"
    for place, (inputs, outputs) in enumerate(
        [(3, width), (width, width), (width, width), (width, width), (width, width)]
    ):
        weights = net.weights(outputs, inputs, 3, 3)
        if place == 2:
            weights[0] *= 3000
        if place == 3:
            weights[:, 0] = 0
        tensor = net.node("Conv", tensor, net.constant(weights), name=f"conv{place}", pads=[1] * 4)
        tensor = net.node("Relu", tensor)
    return net.model(net.head(tensor, width))


def _near(answers: Logits, expected: Logits) -> bool:
    return bool((answers.argmax(1) == expected.argmax(1)).mean() >= 0.95)


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    return networks.saved(_uneven(), tmp_path)


@pytest.mark.parametrize(
    ("target", "culprits"),
    # On CPUs the tensor between the two is rounded for both; for TensorRT a layer's input alone is.
    [("cpu", {"conv2", "conv3"}), ("tensorrt", {"conv3"})],
)
def test_the_layer_that_loses_most_is_first_and_the_proposal_mends_it(
    uneven: Path, tmp_path: Path, target: Target, culprits: set[str]
) -> None:
    images, calibration = networks.images(200, seed=2), networks.images(64)
    report = sensitivity.bisect(
        uneven, precision="int8", inputs=images, calibration_inputs=calibration, acceptable=_near, target=target
    )
    assert {layer.node for layer in report.layers[: len(culprits)]} == culprits
    assert report.layers[0].operator == "Conv"
    differences = [layer.mean_abs_difference for layer in report.layers]
    assert differences == sorted(differences, reverse=True)
    assert differences[0] > 5 * differences[len(culprits)]
    assert report.disagreement_before > 0.2
    assert report.proposal is not None
    assert set(report.proposal) == culprits
    assert report.disagreement_after is not None
    assert report.disagreement_after <= 0.05

    path = tmp_path / "int8.onnx"
    kept = precision.int8_from_onnx(uneven, path, inputs=calibration, target=target, keep=report.proposal)
    assert culprits < set(kept)
    source, made = (preparation.prepare(file).model for file in (uneven, path))
    given, expected = (sensitivity.answers(model, images) for model in (made, source))
    assert sensitivity.disagreement(given, expected) == pytest.approx(report.disagreement_after, abs=0.01)


def test_layers_of_a_graph_without_names_can_be_kept_by_the_names_reported(tmp_path: Path) -> None:
    model = _uneven()
    for node in model.graph.node:
        node.name = ""
    source = networks.saved(model, tmp_path)
    images = networks.images(64)
    report = sensitivity.bisect(
        source, precision="int8", inputs=images, calibration_inputs=images, acceptable=_near, target="tensorrt"
    )
    assert report.proposal == ("Conv_6",)
    kept = precision.int8_from_onnx(
        source, tmp_path / "int8.onnx", inputs=images, target="tensorrt", keep=report.proposal
    )
    assert "Conv_6" in kept


def test_what_is_kept_already_is_neither_ranked_nor_left_out_of_the_proposal(uneven: Path) -> None:
    images = networks.images(64)
    report = sensitivity.bisect(
        uneven,
        precision="int8",
        inputs=images,
        calibration_inputs=images,
        acceptable=_near,
        target="tensorrt",
        keep=["conv3"],
    )
    assert "conv3" not in {layer.node for layer in report.layers}
    assert report.proposal == ("conv3",)
    assert report.disagreement_before == report.disagreement_after


def test_there_is_no_proposal_where_nothing_helps(uneven: Path) -> None:
    images = networks.images(16)
    report = sensitivity.bisect(
        uneven, precision="int8", inputs=images, calibration_inputs=images, acceptable=lambda *_: False
    )
    assert report.proposal is None
    assert report.disagreement_after is None
    assert {layer.node for layer in report.layers} >= {"conv1", "conv2", "conv3", "conv4"}


def test_fp16_layers_are_ranked_too(tmp_path: Path) -> None:
    # Where 4000 is added values are rounded to multiples of 2 or 4.
    net = networks.Network()
    stem = net.node("Relu", net.convolution("images", 3, 8, name="stem"))
    raised = net.node("Add", stem, net.constant(np.float32(4000.0)), name="up")
    lowered = net.node("Sub", raised, net.constant(np.float32(4000.0)), name="down")
    source = networks.saved(net.model(net.head(net.convolution(lowered, 8, 8, name="last"), 8)), tmp_path)
    images = networks.images(100)
    report = sensitivity.bisect(source, precision="fp16", inputs=images, calibration_inputs=images, acceptable=_near)
    assert {layer.node for layer in report.layers[:2]} == {"up", "down"}
    assert report.disagreement_before > 0.1
    assert report.proposal is not None
    assert set(report.proposal) == {"up", "down"}
    assert report.disagreement_after == 0


def test_fp16_answers_show_the_rounding_that_a_cpu_leaves_out(tmp_path: Path) -> None:
    net = networks.Network()
    stem = net.node("Relu", net.convolution("images", 3, 8))
    raised = net.node("Add", stem, net.constant(np.float32(4000.0)), name="up")
    lowered = net.node("Sub", raised, net.constant(np.float32(4000.0)), name="down")
    source = networks.saved(net.model(net.head(net.convolution(lowered, 8, 8), 8)), tmp_path)
    images = networks.images(100)
    precision.fp16_from_onnx(source, tmp_path / "fp16.onnx", inputs=images)
    expected = sensitivity.answers(onnx.load(source), images)
    on_cpu = sensitivity.answers(onnx.load(tmp_path / "fp16.onnx"), images)
    rounded = sensitivity.fp16_answers(source, inputs=images, calibration_inputs=images)
    mended = sensitivity.fp16_answers(source, inputs=images, calibration_inputs=images, keep=["up", "down"])
    assert sensitivity.disagreement(on_cpu, expected) < 0.02
    assert sensitivity.disagreement(rounded, expected) > 0.1
    assert sensitivity.disagreement(mended, expected) < 0.02


def test_int8_for_tensorrt_is_measured_as_it_stands(tmp_path: Path) -> None:
    """ONNX Runtime would add pairs of its own around what stays in fp32, which TensorRT does not have."""
    source, images = networks.saved(networks.residual(), tmp_path), networks.images(32)
    seen: list[Logits] = []

    def acceptable(answers: Logits, expected: Logits) -> bool:
        seen.append(answers)
        return _near(answers, expected)

    sensitivity.bisect(
        source, precision="int8", inputs=images, calibration_inputs=images, acceptable=acceptable, target="tensorrt"
    )
    precision.int8_from_onnx(source, tmp_path / "int8.onnx", inputs=images, target="tensorrt")
    session = ort.open_session(tmp_path / "int8.onnx", optimise=False)
    np.testing.assert_array_equal(seen[0], session.run(None, {"images": images})[0])
    optimised = ort.open_session(tmp_path / "int8.onnx").run(None, {"images": images})[0]
    assert np.abs(seen[0] - optimised).max() > 1e-3


def test_progress_counts_to_its_end(uneven: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    images = networks.images(16)
    sensitivity.bisect(
        uneven,
        precision="int8",
        inputs=images,
        calibration_inputs=images,
        acceptable=_near,
        progress=lambda done, total, name: steps.append((done, total, name)),
    )
    assert [done for done, _, _ in steps] == list(range(1, len(steps) + 1))
    assert len({total for _, total, _ in steps}) == 1
    assert steps[-1][0] <= steps[0][1]
    assert {"conv1", "conv2", "conv3"} <= {name for _, _, name in steps}


def test_answers_that_are_no_numbers_disagree() -> None:
    expected = np.array([[0, 1], [0, 1], [1, 0]], np.float32)
    given = np.array([[0, 1], [np.nan, np.nan], [0, 1]], np.float32)
    assert sensitivity.disagreement(given, expected) == pytest.approx(2 / 3)
