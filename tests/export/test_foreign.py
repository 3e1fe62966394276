from __future__ import annotations

import json
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from export import foreign, onnx_file
from export.foreign import Mapping
from export.graph import classifier
from export.manifest import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

_NAMES = ("cat", "dog")
_TORCHVISION = Mapping(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

Kind = Literal["float32", "uint8"]


def _model(
    *, shape: str = "N, 3, 5, 4", element: str = "float", body: str = "", scores: str = "float[N, 2] scores"
) -> onnx.ModelProto:
    """A linear classifier of whatever shape and type of image; `body` goes from `pixels` (float, flat) to `scores`."""
    body = body or "scores = MatMul (pixels, weights)"
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        net ({element}[{shape}] image) => ({scores})
        <float[60, 2] weights = {{{", ".join(str((7 * index) % 11 / 10 - 0.5) for index in range(120))}}}>
        {{
            numbers = Cast <to: int = 1> (image)
            pixels = Flatten (numbers)
            {body}
        }}
    """)


def _run(model: onnx.ModelProto, images: np.ndarray, output: str | None = None) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(output and [output], {session.get_inputs()[0].name: images})
    return np.asarray(answers)


def _images(count: int = 3, shape: tuple[int, ...] = (3, 5, 4)) -> np.ndarray:
    """Images that 255 levels can express."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.float32) / np.float32(255)


def _sent(images: np.ndarray, kind: Kind) -> np.ndarray:
    return images if kind == "float32" else np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _assert_equal(model: onnx.ModelProto, mapping: Mapping, kind: Kind, images: np.ndarray, **names: Any) -> None:
    """Compare the adapted graph with the original, which is fed by numpy."""
    adapted = foreign.adapted(model, mapping, input=kind, **({"class_names": _NAMES} | names))
    fed = foreign.feed(images, mapping, adapted.native)
    expected = _run(model, fed, adapted.native_output).reshape(len(images), -1)
    answers = _run(adapted.model, _sent(images, kind))
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.ptp(expected) > 0


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize(
    ("shape", "element"),
    [("N, 3, 5, 4", "float"), ("N, 5, 4, 3", "float"), ("N, 3, 5, 4", "float16"), ("N, 5, 4, 3", "uint8")],
)
@pytest.mark.parametrize(
    "mapping",
    [
        {},
        {"range": 255.0},
        {"channels": "BGR", "mean": (0.4, 0.5, 0.6), "range": 255.0},
        {"mean": (0.5,), "std": (0.25, 0.5, 1.0)},
    ],
)
def test_the_adapted_graph_answers_as_the_original_with_its_own_preprocessing(
    kind: Kind, shape: str, element: str, mapping: dict[str, Any]
) -> None:
    mapping = mapping.copy()
    if element == "uint8" and "mean" in mapping:
        # What a graph of uint8 takes must lie between 0 and 255.
        mapping |= {"mean": (0.0,), "std": (2.0,)}
    mapping["layout"] = "NHWC" if shape.endswith("3") else "NCHW"
    _assert_equal(_model(shape=shape, element=element), Mapping(**mapping), kind, _images())


def test_mean_and_std_are_of_images_in_0_1_in_the_order_r_g_b() -> None:
    images = np.stack([np.full((5, 4), value, np.float32) for value in (0.5, 0.25, 1.0)])[None]
    mapping = Mapping(channels="BGR", mean=(0.5, 0.0, 0.5), std=(1.0, 0.5, 1.0), range=10.0)
    fed = foreign.feed(images, mapping, TensorSpec(name="x", datatype="FP32", shape=(-1, 3, 5, 4)))
    assert fed[0, :, 0, 0].tolist() == [5.0, 5.0, 0.0]


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_what_needs_no_change_stays_as_it_is_but_for_names(kind: Kind) -> None:
    element, shape = ("float", "N, 3, 5, 4") if kind == "float32" else ("uint8", "N, 5, 4, 3")
    mapping = Mapping(layout="NCHW" if kind == "float32" else "NHWC")
    model = _model(element=element, shape=shape)
    adapted = foreign.adapted(model, mapping, class_names=_NAMES, input=kind)
    assert [node.op_type for node in adapted.model.graph.node] == [node.op_type for node in model.graph.node]
    assert (adapted.inputs[0].name, adapted.outputs[0].name, adapted.output) == ("images", "logits", "logits")
    assert adapted.notes == ()


def test_the_contract_of_names_shapes_types_and_metadata() -> None:
    model = _model(scores="float16[N, 2] scores", body="a = MatMul (pixels, weights) scores = Cast <to: int = 10> (a)")
    model.doc_string = "/home/somebody"
    model.graph.node[0].doc_string = "/home/somebody"
    model.metadata_props.add(key="path", value="/home/somebody")
    first, second = (foreign.adapted(model, _TORCHVISION, class_names=_NAMES, input="uint8") for _ in range(2))
    assert first.inputs == (TensorSpec(name="images", datatype="UINT8", shape=(-1, 5, 4, 3)),)
    assert first.outputs == (TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),)
    assert first.native == TensorSpec(name="image", datatype="FP32", shape=(-1, 3, 5, 4))
    (entry,) = first.model.metadata_props
    assert (entry.key, json.loads(entry.value)) == ("class_names", list(_NAMES))
    assert [first.model.graph.node[index].op_type for index in (0, 1)] == ["Cast", "Transpose"]
    contents = first.model.SerializeToString(deterministic=True)
    assert contents == second.model.SerializeToString(deterministic=True)
    assert b"somebody" not in contents
    assert model.doc_string, "the original is not changed"
    (batch,) = {
        value.type.tensor_type.shape.dim[0].dim_param for value in (*first.model.graph.input, *first.model.graph.output)
    }
    assert batch == "batch"


def test_names_that_are_taken_inside_the_graph_do_not_clash() -> None:
    body = "images = Identity (pixels) logits = MatMul (images, weights) scores = Identity (logits)"
    _assert_equal(_model(body=body), _TORCHVISION, "float32", _images())
    _assert_equal(_model(body=body), Mapping(), "uint8", _images())


@pytest.mark.parametrize(
    ("body", "given", "expected"),
    [
        ("scores = MatMul (pixels, weights)", None, "logits"),
        ("scores = MatMul (pixels, weights)", True, "probabilities"),
        ("a = MatMul (pixels, weights) b = Softmax (a) scores = Identity (b)", None, "probabilities"),
        ("a = MatMul (pixels, weights) scores = Softmax (a)", False, "logits"),
    ],
)
def test_probabilities_are_named_as_such(body: str, given: bool | None, expected: str) -> None:  # noqa: FBT001
    adapted = foreign.adapted(_model(body=body), Mapping(probabilities=given), class_names=_NAMES)
    assert (adapted.output, adapted.outputs[0].name) == (expected, expected)
    assert bool(adapted.notes) == (given is None and expected == "probabilities")


def test_scores_of_one_pixel_are_flattened() -> None:
    body = """a = MatMul (pixels, weights) axes = Constant <value: tensor = int64[2] {2, 3}> ()
        scores = Unsqueeze (a, axes)"""
    _assert_equal(_model(body=body, scores="float[N, 2, 1, 1] scores"), Mapping(), "float32", _images())


@pytest.mark.parametrize(
    ("body", "scores", "message"),
    [
        (
            "scores = Identity (numbers)",
            "float[N, 3, 5, 4] scores",
            r"expected scores of shape \(N, classes\), got \(N, 3, 5, 4\)",
        ),
        ("a = MatMul (pixels, weights) scores = ArgMax <axis: int = 1> (a)", "int64[N, 1] scores", "got INT64"),
        ("a = Shape (pixels) scores = Cast <to: int = 1> (a)", "float[2] scores", "one answer for each image"),
        ("scores = Constant <value: tensor = float[1, 2] {1, 2}> ()", "float[1, 2] scores", "got a constant"),
    ],
)
def test_graphs_that_do_not_classify_images_are_refused(body: str, scores: str, message: str) -> None:
    with pytest.raises(ValueError, match="output 'scores': .*" + message):
        foreign.adapted(_model(body=body, scores=scores), Mapping(), class_names=_NAMES)


@pytest.mark.parametrize(
    ("shape", "element", "mapping", "message"),
    [
        ("N, 60", "float", {}, r"expected images, 4 dimensions .* got FP32 of shape \(\?, 60\)"),
        ("N, 3, 5, 4", "int32", {}, "got INT32"),
        ("N, 20, 1, 3", "float", {}, "looks like NHWC; give --layout NHWC"),
        ("N, 3, H, W", "float", {}, "leaves the size of its images open; give --image-size"),
        ("N, 3, 5, 4", "float", {"image_size": (8, 8)}, "expected images of 5 x 4, got --image-size 8,8"),
        ("N, 4, 5, 3", "float", {"channels": "BGR"}, "expected 3 channels for BGR, got 4"),
        ("N, 3, 5, 4", "float", {"channels": "L"}, "expected 1 channels for L, got 3"),
        ("N, 3, 5, 4", "float", {"mean": (0.5, 0.5)}, "mean: expected 1 or 3 numbers, one a channel, got 2"),
        ("N, 3, 5, 4", "float", {"input": "x"}, "input: expected one of 'image', got 'x'"),
        ("N, 3, 5, 4", "float", {"output": "y"}, "output: expected one of 'scores', got 'y'"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(
    shape: str, element: str, mapping: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        foreign.adapted(_model(shape=shape, element=element), Mapping(**mapping), class_names=_NAMES)


def test_other_sizes_and_channels_than_those_of_photographs() -> None:
    model = _model(shape="N, C, H, W")
    adapted = foreign.adapted(model, Mapping(image_size=(5, 4)), class_names=_NAMES)
    assert adapted.inputs[0].shape == (-1, 3, 5, 4)
    assert adapted.notes == ("the size of its images, which it leaves open, was fixed at (3, 5, 4)",)
    _assert_equal(model, Mapping(image_size=(5, 4)), "uint8", _images())
    _assert_equal(_model(shape="N, 1, 10, 6"), Mapping(channels="L", mean=(0.5,)), "uint8", _images(2, (1, 10, 6)))
    _assert_equal(_model(shape="N, 10, 3, 2"), Mapping(), "float32", _images(2, (10, 3, 2)))


def _two_of_each() -> onnx.ModelProto:
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[N, 3, 2, 2] a, float[N, 3, 2, 2] b) => (float[N, 12] first, float[N, 12] second, float[N, 12] both)
        {
            first = Flatten (a)
            second = Flatten (b)
            both = Add (first, second)
        }
    """)


def test_of_several_inputs_and_outputs_one_is_chosen_and_the_rest_pruned() -> None:
    names = tuple(map(str, range(12)))
    adapted = foreign.adapted(_two_of_each(), Mapping(output="first"), class_names=names)
    assert [node.op_type for node in adapted.model.graph.node] == ["Flatten"]
    assert adapted.notes == (
        "its output 'second' was dropped",
        "its output 'both' was dropped",
        "its input 'b' was dropped",
    )
    images = _images(2, (3, 2, 2))
    alone = classifier.pruned(_two_of_each(), Mapping(output="first"))
    np.testing.assert_array_equal(_run(alone, images), _run(adapted.model, images))
    with pytest.raises(ValueError, match="output: expected one of 'first', 'second', 'both', got 3; choose it"):
        foreign.class_count(_two_of_each(), Mapping())
    with pytest.raises(ValueError, match="input: expected one of 'a', 'b', got 2; choose it"):
        foreign.class_count(_two_of_each(), Mapping(output="both"))
    with pytest.raises(ValueError, match="inputs 'b': expected one input, the image 'a'; export the model with"):
        foreign.class_count(_two_of_each(), Mapping(output="both", input="a"))
    with pytest.raises(ValueError, match="input 'b': output 'first' does not depend on it"):
        foreign.class_count(_two_of_each(), Mapping(output="first", input="b"))


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_names_as_scores_are_wanted(count: int) -> None:
    assert foreign.class_count(_model(), Mapping()) == 2
    with pytest.raises(ValueError, match=f"labels: expected 2, as many as the model has scores, got {count}"):
        foreign.adapted(_model(), Mapping(), class_names=tuple("abc"[:count]))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_refused_with_its_size_or_replaced(batch: int) -> None:
    model = _model(
        shape=f"{batch}, 3, 5, 4",
        scores=f"float[{batch}, 2] scores",
        body=f"""target = Constant <value: tensor = int64[2] {{{batch}, 60}}> ()
            again = Reshape (pixels, target)
            scores = MatMul (again, weights)""",
    )
    with pytest.raises(
        ValueError, match=rf"fixed at {batch}; export the model with a dynamic batch, or give --dynamic"
    ):
        foreign.adapted(model, Mapping(), class_names=_NAMES)
    adapted = foreign.adapted(model, Mapping(dynamic_batch=True), class_names=_NAMES)
    assert adapted.native.shape == (batch, 3, 5, 4)
    assert adapted.notes == (f"its fixed batch of {batch} was replaced by one of any size",)
    expected = np.concatenate([_run(model, _images(8)[start : start + batch]) for start in range(0, 8, batch)])
    np.testing.assert_allclose(_run(adapted.model, _images(8)), expected, rtol=1e-5)


def test_a_graph_that_says_any_batch_and_means_one_is_refused() -> None:
    fixed = "target = Constant <value: tensor = int64[2] {1, 60}> () a = Reshape (pixels, target)"
    with pytest.raises(ValueError, match=r"makes \(1, 60\) of \(1009, 60\) .*: it was made for one size of batch"):
        foreign.adapted(_model(body=f"{fixed} scores = MatMul (a, weights)"), Mapping(), class_names=_NAMES)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("fixed", [False, True])
def test_networks_of_torchvision(tmp_path: Path, name: str, fixed: bool) -> None:  # noqa: FBT001
    network = torchvision.models.get_model(name, num_classes=4).eval()
    path = tmp_path / "model.onnx"
    example = (torch.zeros(1 if fixed else 2, 3, 32, 32),)
    axes = None if fixed else {"x": {0: "N"}}
    with warnings.catch_warnings():
        # The exporter that most files come from is deprecated by now.
        warnings.simplefilter("ignore")
        torch.onnx.export(network, example, path, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
    model = onnx_file.load(path)
    mapping = _TORCHVISION.model_copy(update={"dynamic_batch": fixed})
    adapted = foreign.adapted(model, mapping, class_names=tuple("abcd"), input="uint8")
    images = _images(3, (3, 32, 32))
    with torch.inference_mode():
        expected = network(torch.from_numpy(foreign.feed(images, mapping, adapted.native))).numpy()
    np.testing.assert_allclose(_run(adapted.model, _sent(images, "uint8")), expected, atol=1e-4)


def test_a_transformer_of_a_fixed_batch_becomes_one_of_any(tmp_path: Path) -> None:
    import timm

    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, depth=2, embed_dim=24, num_heads=2
    ).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(network, (torch.zeros(1, 3, 32, 32),), path, dynamo=True, verbose=False, opset_version=18)
    adapted = foreign.adapted(onnx_file.load(path), Mapping(dynamic_batch=True), class_names=tuple("abcd"))
    images = _images(5, (3, 32, 32))
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(_run(adapted.model, images), expected, atol=1e-4)


def test_a_fixed_batch_that_only_a_run_can_show_is_refused(tmp_path: Path) -> None:
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=4).eval()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (torch.zeros(1, 3, 32, 32),), path, dynamo=False, opset_version=17)
    with pytest.raises(ValueError, match=r"does not run on a batch of 2 .*Reshape.*; export the model with a dynamic"):
        foreign.class_count(onnx_file.load(path), Mapping(dynamic_batch=True))


def test_the_parser_of_tensorrt_takes_a_graph_adapted_to_uint8() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    model = foreign.adapted(_model(), _TORCHVISION, class_names=_NAMES, input="uint8").model
    assert parser.parse(model.SerializeToString()), [parser.get_error(n).desc() for n in range(parser.num_errors)]
    assert tuple(network.get_input(0).shape) == (-1, 5, 4, 3)


@given(
    mean=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3).map(tuple),
    std=st.lists(st.floats(0.125, 1, width=32), min_size=3, max_size=3).map(tuple),
    white=st.sampled_from([1.0, 2.0, 255.0]),
    channels=st.sampled_from(["RGB", "BGR"]),
    kind=st.sampled_from(["float32", "uint8"]),
)
def test_any_normalisation_is_the_same_inside_the_graph_as_outside(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    white: float,
    channels: Literal["RGB", "BGR"],
    kind: Kind,
) -> None:
    _assert_equal(_model(), Mapping(mean=mean, std=std, range=white, channels=channels), kind, _images())


def test_no_message_has_more_than_one_line() -> None:
    with pytest.raises(ValueError, match=re.escape("labels: expected 2")) as caught:
        foreign.adapted(_model(), Mapping(), class_names=("a\nb",))
    assert "\n" not in str(caught.value)
