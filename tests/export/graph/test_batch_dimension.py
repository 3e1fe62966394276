from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from export.graph import batch_dimension, onnx_parts


def _model(body: str, *, batch: int = 1, scores: str = "float[N, M] scores") -> onnx.ModelProto:
    """A graph of images (batch, 3, 2, 2) with a class token of 12 numbers."""
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[{batch}, 3, 2, 2] image) => ({scores})
        <float[1, 1, 12] token = {{{", ".join(map(str, range(12)))}}}>
        {{
            {body}
        }}
    """)


def _released(body: str, *, batch: int = 1) -> onnx.ModelProto:
    model = _model(body, batch=batch)
    batch_dimension.release(model, image="image", shapes=onnx_parts.shapes(model))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


def _run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"image": images})
    return np.asarray(answers)


def _constant(name: str, *values: int) -> str:
    return f"{name} = Constant <value: tensor = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


_FLAT = f"{_constant('flat', 1, 12)} scores = Reshape (image, flat)"
_TOKEN = f"""
    {_constant("rows", 1, 1, 12)} row = Reshape <allowzero: int = 1> (image, rows)
    {_constant("size", 1, 1, 12)} mine = Expand (token, size)
    both = Concat <axis: int = 1> (mine, row)
    scores = Flatten (both)
"""
_LEFT_OVER = f"{_constant('halves', 2, 6)} half = Reshape (image, halves) {_constant('flat', 1, 12)} "


@pytest.mark.parametrize("body", [_FLAT, _TOKEN, _FLAT.replace("1, 12", "1, -1")])
def test_a_graph_of_one_image_becomes_one_of_any_number(body: str) -> None:
    images = np.random.default_rng(0).random((5, 3, 2, 2), dtype=np.float32)
    expected = np.concatenate([_run(_model(body), images[index : index + 1]) for index in range(5)])
    released = _released(body)
    np.testing.assert_array_equal(_run(released, images), expected)
    assert batch_dimension.check(released, image="image", output="scores")[1:] in {(12,), (24,)}


def test_a_target_that_a_constant_shares_with_others_is_not_changed_for_them() -> None:
    body = f"{_constant('flat', 1, 12)} a = Reshape (token, flat) b = Reshape (image, flat) scores = Add (a, b)"
    images = np.ones((3, 3, 2, 2), np.float32)
    np.testing.assert_array_equal(_run(_released(body), images), np.arange(12)[None].repeat(3, axis=0) + 1.0)


def test_a_batch_that_cannot_be_replaced_is_refused_with_the_node() -> None:
    body = (
        f"{_constant('mixed', 4, 3)} a = Reshape (image, mixed) {_constant('flat', 1, -1)} scores = Reshape (a, flat)"
    )
    with pytest.raises(ValueError, match=r"node 'scores' reshapes to \[1, -1\]: its batch of 1 cannot be replaced"):
        _released(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{_constant('mixed', 4, 3)} scores = Reshape (image, mixed)", r"'scores' \(Reshape\) makes \(4, 3\) of"),
        (f"{_constant('axes', 0)} scores = ReduceSum (image, axes)", "expected one answer for each image"),
        (
            f"a = Flatten (image) {_constant('one', 2, 12)} b = ConstantOfShape (one) scores = Add (a, b)",
            r"takes no batch of any size: .*Add",
        ),
    ],
)
def test_a_graph_that_mixes_its_images_is_refused(body: str, message: str) -> None:
    model = _model(body, scores="float[a, b] scores")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(ValueError, match=message):
        batch_dimension.check(model, image="image", output="scores")
