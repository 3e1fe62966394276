from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from export import precision, sensitivity
from tests.export import networks
from tests.export.networks import NETWORKS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from export.manifest import Method, Target


def _answers(path: Path, images: NDArray[Any]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("optimization.disable_specified_optimizers", "MatmulTransposeFusion")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"images": images})
    return np.asarray(answers)


def _agreement(path: Path, source: Path, images: NDArray[Any]) -> float:
    return float((_answers(path, images).argmax(1) == _answers(source, images).argmax(1)).mean())


def _graph(path: Path) -> onnx.GraphProto:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def _maker(graph: onnx.GraphProto, tensor: str) -> str:
    return next((node.op_type for node in graph.node if tensor in node.output), "constant or input")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("uint8", [False, True])
def test_fp16_answers_as_fp32_does_and_takes_the_same(tmp_path: Path, network: str, *, uint8: bool) -> None:
    source, path = networks.saved(NETWORKS[network](uint8=uint8), tmp_path), tmp_path / "fp16.onnx"
    images = networks.images(64, uint8=uint8)
    precision.fp16_from_onnx(source, path, inputs=images)
    answers, expected = _answers(path, images), _answers(source, images)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, expected, atol=0.02 * np.abs(expected).max())
    assert not np.array_equal(answers, expected)
    weights = [array for array in _constants(_graph(path)).values() if array.ndim > 1 and array.size > 10]
    assert {array.dtype for array in weights} == {np.dtype(np.float16)}
    assert {prop.key for prop in onnx.load(path).metadata_props} == {"class_names"}


def test_images_are_normalised_in_fp32(tmp_path: Path) -> None:
    # In fp16 images that differ by 1/4096 are the same, and this normalisation makes 16 of that.
    net = networks.Network()
    centred = net.node("Add", "images", net.constant(np.float32(-0.75)), name="centre")
    stretched = net.node("Mul", centred, net.constant(np.float32(65536.0)), name="stretch")
    source = networks.saved(net.model(net.head(net.convolution(stretched, 3, 8), 8), centred=False), tmp_path)
    images = (0.75 + networks.images(8) / 4096).astype(np.float32)
    kept = precision.fp16_from_onnx(source, tmp_path / "fp16.onnx")
    assert kept == ("centre", "stretch")
    expected = _answers(source, images)
    np.testing.assert_allclose(_answers(tmp_path / "fp16.onnx", images), expected, atol=0.01 * np.abs(expected).max())


def test_weights_beyond_fp16_stay_in_fp32(tmp_path: Path) -> None:
    net = networks.Network()
    stem = net.node("Relu", net.convolution("images", 3, 8))
    large = net.node("Mul", stem, net.constant(np.float32(1e6), name="huge"), name="up")
    small = net.node("Mul", large, net.constant(np.float32(1e-6)), name="down")
    source = networks.saved(net.model(net.head(net.convolution(small, 8, 8), 8)), tmp_path)
    images = networks.images(8)
    kept = precision.fp16_from_onnx(source, tmp_path / "fp16.onnx", keep=["down"])
    assert kept == ("up", "down")
    np.testing.assert_allclose(_answers(tmp_path / "fp16.onnx", images), _answers(source, images), atol=0.02)


def test_activations_beyond_fp16_stay_in_fp32_where_images_show_them(tmp_path: Path) -> None:
    net = networks.Network()
    raised = net.node("Mul", net.convolution("images", 3, 8), net.constant(np.float32(60000.0)), name="up")
    bent = net.node("Sqrt", net.node("Abs", raised, name="size"), name="root")
    source = networks.saved(net.model(net.head(net.convolution(bent, 8, 8), 8)), tmp_path)
    without = precision.fp16_from_onnx(source, tmp_path / "fp16.onnx")
    kept = precision.fp16_from_onnx(source, tmp_path / "fp16.onnx", inputs=networks.images(8))
    assert "size" not in without
    assert {"size", "root"} <= set(kept)
    graph = _graph(tmp_path / "fp16.onnx")
    values = {
        value.name: value
        for value in onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "fp16.onnx")).graph.value_info
    }
    assert values[_node(graph, "size").output[0]].type.tensor_type.elem_type == TensorProto.FLOAT


def test_activations_near_the_end_of_fp16_stay_in_fp32_too(tmp_path: Path) -> None:
    """Other images are brighter than those seen: nothing may become infinite."""
    net = networks.Network()
    doubled = net.node("Conv", "images", net.constant(2 * np.eye(3, dtype=np.float32)[:, :, None, None]))
    raised = net.node("Mul", net.node("Relu", doubled), net.constant(np.float32(60000.0)), name="up")
    lowered = net.node("Mul", raised, net.constant(np.float32(1e-4)), name="down")
    source = networks.saved(net.model(net.head(net.convolution(lowered, 3, 8), 8)), tmp_path)
    images = networks.images(16)
    # 48,000 at most, and 120,000 for white.
    seen = images * np.float32(0.4 / images.max())
    answers = sensitivity.fp16_answers(source, inputs=images, calibration_inputs=seen)
    expected = _answers(source, images)
    np.testing.assert_allclose(answers, expected, atol=0.02 * np.abs(expected).max())


def test_nodes_that_are_kept_compute_in_fp32_without_a_detour(tmp_path: Path) -> None:
    """Two that share an input, and one behind them: no value between them passes through fp16."""
    net = networks.Network()
    stem = net.node("Relu", net.convolution("images", 3, 8), name="stem")
    sides = [net.convolution(stem, 8, 8, name=name) for name in ("left", "right")]
    total = net.node("Add", *sides, name="sum")
    source = networks.saved(net.model(net.head(total, 8, name="last")), tmp_path)
    keep = ("left", "right", "sum", "last")
    assert precision.fp16_from_onnx(source, tmp_path / "fp16.onnx", keep=keep) == keep
    graph = _graph(tmp_path / "fp16.onnx")
    assert [_maker(graph, name) for name in _node(graph, "sum").input] == ["Conv", "Conv"]
    assert _node(graph, "left").input[0] == _node(graph, "right").input[0]
    assert {array.dtype for array in _constants(graph).values() if array.shape == (8, 8, 3, 3)} == {
        np.dtype(np.float32)
    }
    answer = next(node for node in graph.node if graph.output[0].name in node.output)
    assert _maker(graph, answer.input[0]) == "Gemm"


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_int8_answers_nearly_as_fp32_does(tmp_path: Path, network: str, target: Target, method: Method) -> None:
    source, path = networks.saved(NETWORKS[network](), tmp_path), tmp_path / "int8.onnx"
    images = networks.images(64)
    precision.int8_from_onnx(source, path, inputs=images, target=target, method=method)
    answers, expected = _answers(path, images), _answers(source, images)
    assert (answers.argmax(1) == expected.argmax(1)).mean() > 0.85
    assert 0 < np.abs(answers - expected).mean() < 0.2 * expected.std()
    # Constants are stored in eight bits, not beside them.
    stored = Counter(array.dtype for array in _constants(_graph(path)).values() if array.ndim > 1 and array.size > 200)
    assert stored[np.dtype(np.int8)] > stored[np.dtype(np.float32)]


def test_int8_for_cpus_has_u8_activations_and_s8_weights_per_channel(tmp_path: Path) -> None:
    source, path = networks.saved(networks.residual(), tmp_path), tmp_path / "int8.onnx"
    kept = precision.int8_from_onnx(source, path, inputs=networks.images(16))
    graph, source_nodes = _graph(path), [node.op_type for node in onnx.load(source).graph.node]
    constants = _constants(graph)
    zeros = [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {zero.dtype for zero in zeros} == {np.dtype(np.uint8)}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == source_nodes.count("Conv")
    for node in convolutions[1:]:
        maker = next(other for other in graph.node if node.input[1] in other.output)
        weights, scales = constants[maker.input[0]], constants[maker.input[1]]
        assert weights.dtype == np.int8
        assert scales.shape == (len(weights),)
    # The first convolution, the last product, and the normalisation, which 8 bits would coarsen.
    assert kept == ("Add_0", "Mul_1", "Conv_2", "Gemm_18")
    for name in ("Conv_2", "Gemm_18"):
        assert constants[_node(graph, name).input[1]].dtype == np.float32
    assert _maker(graph, _node(graph, "Mul_1").input[0]) == "Add"


def test_residual_sums_of_a_transformer_stay_in_fp32_on_cpus(tmp_path: Path) -> None:
    source, path = networks.saved(networks.attention(), tmp_path), tmp_path / "int8.onnx"
    kept = precision.int8_from_onnx(source, path, inputs=networks.images(16))
    graph = _graph(path)
    makers = {name: node for node in graph.node for name in node.output}
    around = [node for node in graph.node if node.op_type in {"Add", "LayerNormalization", "ReduceMean", "Softmax"}]
    assert len(around) == 6
    for name in (name for node in around for name in node.input if _maker(graph, name) == "DequantizeLinear"):
        # A product's own answer is in 8 bits; no sum is, though the next product reads it in 8.
        assert _maker(graph, makers[makers[name].input[0]].input[0]) == "MatMul"
    products = [node for node in graph.node if node.op_type == "MatMul" and node.name not in kept]
    assert len(products) == 7
    for node in products:
        assert [_maker(graph, name) for name in node.input] == ["DequantizeLinear"] * 2


def test_residual_sums_between_convolutions_stay_in_int8(tmp_path: Path) -> None:
    source, path = networks.saved(networks.residual(), tmp_path), tmp_path / "int8.onnx"
    precision.int8_from_onnx(source, path, inputs=networks.images(16))
    graph = _graph(path)
    between = [node for node in graph.node if node.op_type in {"Add", "Concat"} and node.name != "Add_0"]
    assert len(between) == 2
    for node in between:
        assert {_maker(graph, name) for name in node.input} == {"DequantizeLinear"}


def test_int8_for_tensorrt_is_symmetric_and_every_layer_has_its_own_pair(tmp_path: Path) -> None:
    source, path = networks.saved(networks.residual(), tmp_path), tmp_path / "int8.onnx"
    kept = precision.int8_from_onnx(source, path, inputs=networks.images(16), target="tensorrt", keep=["Conv_14"])
    graph = _graph(path)
    constants = _constants(graph)
    linear = [node for node in graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert {constants[node.input[2]].dtype for node in linear} == {np.dtype(np.int8)}
    assert not any(constants[node.input[2]].any() for node in linear)
    readers = Counter(name for node in graph.node for name in node.input)
    assert {readers[node.output[0]] for node in linear} == {1}
    for node in (node for node in graph.node if node.op_type == "Conv" and node.name not in kept):
        assert [_maker(graph, name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
        assert constants[node.input[2]].dtype == np.float32
    assert kept == ("Conv_2", "Conv_14", "Gemm_18")
    for name in kept:
        assert _maker(graph, _node(graph, name).input[0]) != "DequantizeLinear"


def test_what_follows_the_last_product_stays_in_fp32(tmp_path: Path) -> None:
    net = networks.Network()
    logits = net.head(net.convolution(net.convolution("images", 3, 8), 8, 8), 8)
    shares = net.node("Softmax", net.node("Mul", logits, net.constant(np.float32(0.5))), axis=-1)
    source = networks.saved(net.model(shares), tmp_path)
    images = networks.images(16)
    precision.int8_from_onnx(source, tmp_path / "int8.onnx", inputs=images)
    np.testing.assert_allclose(_answers(tmp_path / "int8.onnx", images).sum(1), 1, atol=1e-5)


def test_int8_takes_uint8_images(tmp_path: Path) -> None:
    source, path = networks.saved(networks.residual(uint8=True), tmp_path), tmp_path / "int8.onnx"
    images = networks.images(64, uint8=True)
    precision.int8_from_onnx(source, path, inputs=images)
    assert _graph(path).input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert _agreement(path, source, images) > 0.85


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_scales_of_a_gemm_are_honoured(tmp_path: Path, target: Target) -> None:
    net = networks.Network()
    hidden = net.node("Relu", net.head(net.convolution("images", 3, 8), 8, alpha=0.5, beta=3.0))
    bias = net.constant(np.zeros(networks.CLASSES, np.float32))
    source = networks.saved(net.model(net.node("Gemm", hidden, net.constant(net.weights(10, 10)), bias)), tmp_path)
    images = networks.images(64)
    precision.int8_from_onnx(source, tmp_path / "int8.onnx", inputs=images, target=target)
    expected = _answers(source, images)
    np.testing.assert_allclose(_answers(tmp_path / "int8.onnx", images), expected, atol=0.05 * np.abs(expected).max())


def test_a_node_that_was_folded_into_another_keeps_that_one(tmp_path: Path) -> None:
    source, path = networks.saved(networks.residual(), tmp_path), tmp_path / "int8.onnx"
    nodes = {node.op_type: index for index, node in enumerate(onnx.load(source).graph.node)}
    normalisation = f"BatchNormalization_{nodes['BatchNormalization']}"
    kept = precision.int8_from_onnx(source, path, inputs=networks.images(8), keep=[normalisation])
    assert "Conv_4" in kept
    assert _constants(_graph(path))[_node(_graph(path), "Conv_4").input[1]].dtype == np.float32


def test_an_unknown_name_is_answered_with_the_closest(tmp_path: Path) -> None:
    source = networks.saved(networks.residual(), tmp_path)
    with pytest.raises(ValueError, match=r"keep: expected the name .* got 'Conv_41'; the closest are .*'Conv_4'"):
        precision.int8_from_onnx(source, tmp_path / "int8.onnx", inputs=networks.images(4), keep=["Conv_41"])
    with pytest.raises(ValueError, match="got 'nothing like it'"):
        precision.fp16_from_onnx(source, tmp_path / "fp16.onnx", keep=["nothing like it"])
    assert list(tmp_path.glob("*p*.onnx")) == []


def test_int8_without_images_is_refused(tmp_path: Path) -> None:
    source = networks.saved(networks.residual(), tmp_path)
    with pytest.raises(ValueError, match="expected at least one, got none; name a folder by --images"):
        precision.int8_from_onnx(source, tmp_path / "int8.onnx", inputs=networks.images(0))


def test_a_graph_with_nothing_left_to_quantise_is_refused(tmp_path: Path) -> None:
    net = networks.Network()
    source = networks.saved(net.model(net.head(net.convolution("images", 3, 8), 8)), tmp_path)
    with pytest.raises(ValueError, match="expected a layer to convert, found none"):
        precision.int8_from_onnx(source, tmp_path / "int8.onnx", inputs=networks.images(4))
    assert not (tmp_path / "int8.onnx").exists()


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    source = networks.saved(networks.residual(), tmp_path)
    with pytest.raises(ValueError, match="target: expected one of cpu, tensorrt, got 'tpu'"):
        precision.int8_from_onnx(source, tmp_path / "i.onnx", inputs=networks.images(4), target="tpu")  # type: ignore[arg-type]


def test_a_file_that_onnxruntime_cannot_take_is_refused(tmp_path: Path) -> None:
    model = networks.residual()
    model.graph.node[-1].op_type = "NoSuchOperator"
    with pytest.raises(ValueError, match=r"source.onnx: ONNX Runtime cannot take it: .*NoSuchOperator"):
        precision.fp16_from_onnx(networks.saved(model, tmp_path), tmp_path / "fp16.onnx")


def test_a_file_that_is_int8_already_is_refused_in_one_line(tmp_path: Path) -> None:
    source, path = networks.saved(networks.residual(), tmp_path), tmp_path / "int8.onnx"
    precision.int8_from_onnx(source, path, inputs=networks.images(8))
    with pytest.raises(ValueError, match=r"int8\.onnx: what was made of it is not a valid graph: .*fp32 file$") as told:
        precision.int8_from_onnx(path, tmp_path / "twice.onnx", inputs=networks.images(8))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "twice.onnx").exists()


_MAKE = """
import sys
from pathlib import Path
from export import precision
from tests.export import networks
folder = Path(sys.argv[1])
source = networks.saved(networks.attention(), folder)
precision.fp16_from_onnx(source, folder / "fp16.onnx", inputs=networks.images(8))
for target in ("cpu", "tensorrt"):
    precision.int8_from_onnx(source, folder / f"{target}.onnx", inputs=networks.images(8), target=target)
"""


def test_the_same_file_and_images_give_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        # Another order of every set, which must not matter.
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", _MAKE, str(folder)], env=environment, check=True)
        made.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()})
    assert made[0] == made[1]
    assert len(made[0]) == 4


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_tensorrt_builds_a_plan_of_it(tmp_path: Path, network: str, kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    from export import tensorrt_plan
    from export.manifest import TensorSpec

    source, path = networks.saved(NETWORKS[network](), tmp_path), tmp_path / "lower.onnx"
    if kind == "fp16":
        precision.fp16_from_onnx(source, path)
    else:
        precision.int8_from_onnx(source, path, inputs=networks.images(8), target="tensorrt")
    image = TensorSpec(name="images", datatype="FP32", shape=(-1, 3, networks.SIDE, networks.SIDE))
    tensorrt_plan.plan_from_onnx(
        path, tmp_path / "model.plan", runtime="tensorrt_rtx", image=image, max_batch=4, options=tensorrt_plan.Options()
    )
    assert (tmp_path / "model.plan").stat().st_size > 1000
