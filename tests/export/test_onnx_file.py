from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from export import onnx_file
from export.manifest import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

_TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[N, 3, 4, 4] image) => (float[N, 2] scores)
<float[2, 3, 4, 4] kernel, float[2] bias>
{
    features = Conv <kernel_shape: ints = [4, 4]> (image, kernel, bias)
    scores = Flatten (features)
}
"""


def _model(text: str = _TEXT, **weights: np.ndarray) -> onnx.ModelProto:
    """A classifier of two classes; weights are seeded noise but for those given."""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    declared = {"kernel": rng.standard_normal((2, 3, 4, 4), np.float32), "bias": rng.standard_normal(2, np.float32)}
    del model.graph.initializer[:]
    for name, value in (declared | weights).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(answers)


def _images(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(1).random((count, 3, side, side), dtype=np.float32)


def test_a_sound_file_is_returned_as_it_is(tmp_path: Path) -> None:
    model = _model()
    loaded = onnx_file.load(_saved(model, tmp_path))
    assert loaded.graph.node == model.graph.node
    assert onnx_file.specs(loaded) == (
        (TensorSpec(name="image", datatype="FP32", shape=(-1, 3, 4, 4)),),
        (TensorSpec(name="scores", datatype="FP32", shape=(-1, 2)),),
    )
    np.testing.assert_array_equal(_run(loaded, _images(3, 4)), _run(model, _images(3, 4)))


def test_a_written_model_is_the_same_every_time(tmp_path: Path) -> None:
    model = onnx_file.load(_saved(_model(), tmp_path))
    onnx_file.write(model, tmp_path / "a.onnx")
    onnx_file.write(onnx_file.load(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "got an empty one"),
        (bytes(range(256)), "truncated or of another kind"),
        (b"PK\x03\x04rest", "got a zip archive"),
        (b"\x80\x02}q\x00", "got a pickle"),
        (b"ftrt\x00\x00", "got a TensorRT plan"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer; fetch the file"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":', "safetensors"),
        (_model().SerializeToString()[:100], "truncated or of another kind"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "without a graph"),
    ],
)
def test_other_files_are_refused_in_one_line_that_says_what_they_are(
    tmp_path: Path, contents: bytes, message: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        onnx_file.load(path)
    assert str(caught.value).startswith(f"{path}: expected an ONNX ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.onnx: expected an ONNX file here, found none"):
        onnx_file.load(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="got a folder"):
        onnx_file.load(tmp_path)


def test_a_file_of_more_than_two_gib_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ValueError, match=r"at most 2 GiB.* got 3\.00 GiB"):
        onnx_file.load(path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("Flatten", "Flaten", r"operator 'Flaten' of node 'scores' does not exist in opset 20"),
        ("Flatten", "mine.Flatten", r"'Flatten' of node 'scores' is of the domain 'mine'"),
        ('"" : 20', '"" : 6', "opset 6 is too old: expected 7 to"),
        ('"" : 20', '"" : 99', "opset 99 is too new"),
        ("float[N, 2] scores", "float[N, 5] scores", r"not a valid ONNX model: .*Flatten.*\(2\) vs \(5\)"),
        ("(features)", "(futures)", "not a valid ONNX model: .*'futures'"),
    ],
)
def test_unsound_graphs_are_refused_with_what_is_wrong(tmp_path: Path, before: str, after: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        onnx_file.load(_saved(_model(_TEXT.replace(before, after)), tmp_path))
    assert "\n" not in str(caught.value)


def test_operators_inside_branches_are_looked_at_too(tmp_path: Path) -> None:
    text = _TEXT.replace(
        "scores = Flatten (features)",
        """yes = Constant <value: tensor = bool {1}> ()
    scores = If (yes) <
        then_branch: graph = yes_graph () => (float[N, 2] a) { a = Flatten (features) },
        else_branch: graph = no_graph () => (float[N, 2] b) { b = mine.Flatten (features) }
    >""",
    )
    with pytest.raises(ValueError, match="'Flatten' of node 'b' is of the domain 'mine'"):
        onnx_file.load(_saved(_model(text), tmp_path))


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN in 1 of 2 places"), (np.inf, "infinity in 1 of 2 places")]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, value: float, message: str, dtype: type
) -> None:
    model = _model()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([1, value], dtype), "gamma"))
    with pytest.raises(ValueError, match=f"constant 'gamma' holds {message}"):
        onnx_file.load(_saved(model, tmp_path))


def test_bounds_and_masks_may_be_infinite(tmp_path: Path) -> None:
    model = _model()
    for name, value in {"bound": np.float32(np.inf), "mask": np.asarray([0, -np.inf], np.float32)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    assert len(onnx_file.load(_saved(model, tmp_path)).graph.initializer) == 4


def test_constants_shorter_than_their_shape_are_refused_by_name(tmp_path: Path) -> None:
    model = _model()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    with pytest.raises(ValueError, match="constant 'kernel' cannot be read"):
        onnx_file.load(_saved(model, tmp_path))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("scores = Flatten (features)", "fp32"),
        ("codes = Cast <to = 10> (features) wide = Cast <to = 1> (codes) scores = Flatten (wide)", "fp32"),
        ("codes = QuantizeLinear (features, scale) back = DequantizeLinear (codes, scale) scores = Flatten (back)",
         "int8"),
        ("flat = Flatten (features) codes, by, zero = DynamicQuantizeLinear (flat) sums = MatMulInteger (codes, codes) "
         "scores = Cast <to = 1> (sums)", "int8"),
    ],
)  # fmt: skip
def test_the_precision_of_a_file_is_that_of_its_arithmetic(body: str, expected: str) -> None:
    text = _TEXT.replace("scores = Flatten (features)", body)
    assert onnx_file.precision_of(_model(text, scale=np.array(0.1, np.float32))) == expected


def test_a_file_of_fp16_is_one_by_most_of_its_weights() -> None:
    model = _model()
    (kernel,) = (tensor for tensor in model.graph.initializer if tensor.name == "kernel")
    half = onnx.numpy_helper.to_array(kernel).astype(np.float16)
    kernel.CopyFrom(onnx.numpy_helper.from_array(half, "kernel"))
    assert onnx_file.precision_of(model) == "fp16"
    # As many in fp32 again.
    model.graph.initializer.append(onnx.numpy_helper.from_array(half.astype(np.float32), "other"))
    assert onnx_file.precision_of(model) == "fp32"


def test_initialisers_are_no_inputs_where_old_files_list_them(tmp_path: Path) -> None:
    model = _model(_TEXT.replace('"" : 20', '"" : 9'))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
    loaded = onnx_file.load(_saved(model, tmp_path))
    assert [spec.name for spec in onnx_file.specs(loaded)[0]] == ["image"]
    np.testing.assert_array_equal(_run(loaded, _images(2, 4)), _run(model, _images(2, 4)))


def test_a_file_of_a_newer_ir_version_runs_where_it_needs_none(tmp_path: Path) -> None:
    model = _model()
    model.ir_version = onnx.IR_VERSION
    assert _run(onnx_file.load(_saved(model, tmp_path)), _images(2, 4)).shape == (2, 2)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    text = _TEXT.replace('["" : 20]', '["" : 20, "local" : 1]').replace("= Flatten", "= local.flat") + (
        '<domain: "local", opset_import: ["" : 20]> flat (x) => (y) { y = Flatten (x) }'
    )
    loaded = onnx_file.load(_saved(_model(text), tmp_path))
    assert [node.op_type for node in loaded.graph.node] == ["Conv", "Flatten"]
    np.testing.assert_array_equal(_run(loaded, _images(2, 4)), _run(_model(), _images(2, 4)))


_SMALL = _model().SerializeToString()
_PATIENT = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _load_or_value_error(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
    try:
        onnx_file.load(path)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        # A changed weight is no fault that can be seen.
        message = f"{path}: sound"
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@_PATIENT
@given(contents=st.binary(max_size=200))
@example(contents=b"\x3a\x00")
def test_random_bytes_raise_nothing_but_a_value_error(tmp_path: Path, contents: bytes) -> None:
    _load_or_value_error(tmp_path / "model.onnx", contents)


@_PATIENT
@given(length=st.integers(1, len(_SMALL) - 1))
def test_no_truncated_file_is_taken_for_a_whole_one(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_SMALL[:length])
    with pytest.raises(ValueError, match=r"model\.onnx: "):
        onnx_file.load(path)


@_PATIENT
@given(changes=st.lists(st.tuples(st.integers(0, len(_SMALL) - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_changed_bytes_raise_nothing_but_a_value_error(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    contents = bytearray(_SMALL)
    for position, difference in changes:
        contents[position] ^= difference
    _load_or_value_error(tmp_path / "model.onnx", bytes(contents))


@pytest.mark.parametrize(("name", "opset"), [("resnet18", 7), ("mobilenet_v3_small", 9), ("shufflenet_v2_x0_5", 12)])
def test_older_opsets_are_converted_and_answer_as_before(tmp_path: Path, name: str, opset: int) -> None:
    network = torchvision.models.get_model(name, num_classes=5).eval()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        # The exporter of old files is deprecated itself.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, 32, 32),),
            path,
            dynamo=False,
            opset_version=opset,
            dynamic_axes={"x": {0: "N"}},
            input_names=["x"],
        )
    model = onnx_file.load(path)
    upgraded = onnx_file.upgraded(model)
    assert max(entry.version for entry in upgraded.opset_import) == onnx_file.BASE_OPSET
    np.testing.assert_array_equal(_run(upgraded, _images(3, 32)), _run(onnx.load(path), _images(3, 32)))
    assert onnx_file.upgraded(upgraded) is upgraded
