"""Small files that ask for much: refused by their graph, before anything is run or allocated."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import foreign, onnx_file
from export.graph import limits, onnx_parts
from export.mapping import Mapping

if TYPE_CHECKING:
    from pathlib import Path

_HEAD = """
<ir_version: 10, opset_import: ["" : 20, "own": 1]>
net (float[N, 3, H, W] image) => (float[N, 3] scores)
"""

# Each makes `large`, of 16 GiB or more.
_BODIES = {
    "ConstantOfShape": "shape = Constant <value = int64[2] {65536, 65536}> () large = ConstantOfShape (shape)",
    "Range": "a = Constant <value = float {0}> () b = Constant <value = float {1e10}> () c = Constant <value = "
    "float {1}> () large = Range (a, b, c)",
    "Tile": "times = Constant <value = int64[2] {1, 2147483648}> () large = Tile (flat, times)",
    "Pad": "pads = Constant <value = int64[8] {0, 0, 0, 0, 0, 0, 131072, 131072}> () large = Pad (small, pads)",
    "branch": "yes = Constant <value = int64 {1}> () so = Cast <to = 9> (yes) large = If (so) <then_branch = a () => "
    "(float[1,1] one) { s = Constant <value = int64[2] {65536, 65536}> () c = ConstantOfShape (s) one = ReduceMax (c) "
    "}, else_branch = b () => (float[1,1] two) { two = Constant <value = float[1,1] {1}> () }>",
}


def _model(body: str) -> onnx.ModelProto:
    text = f"{{ small = GlobalAveragePool (image) flat = Flatten (small) {body} most = ReduceMax <keepdims = 0> (large)"
    return onnx.parser.parse_model(f"{_HEAD} {text} scores = Add (flat, most) }}")


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("body", _BODIES)
def test_a_tensor_that_no_machine_should_need_is_refused_by_name(tmp_path: Path, body: str) -> None:
    path = _saved(_model(_BODIES[body]), tmp_path)
    assert path.stat().st_size < 1000
    with pytest.raises(
        ValueError, match=r"value '\w+': expected at most 2 GiB for one image, got \d+\.\d GiB; "
    ) as told:
        onnx_file.load(path)
    assert "\n" not in str(told.value)


def test_what_the_size_of_the_images_makes_large_is_refused_when_that_is_known(tmp_path: Path) -> None:
    body = "times = Constant <value = int64[4] {1, 1, 4096, 4096}> () large = Tile (image, times)"
    model = onnx_file.load(_saved(_model(body), tmp_path))
    names = ("a", "b", "c")
    foreign.adapted(model, Mapping(image_size=(2, 2)), class_names=names)
    with pytest.raises(ValueError, match=r"value 'large': expected at most 2 GiB for one image, got 3\.0 GiB"):
        foreign.adapted(model, Mapping(image_size=(4, 4)), class_names=names)


def test_sparse_constants_count_with_their_zeros() -> None:
    values = helper.make_tensor("S", TensorProto.FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("I", TensorProto.INT64, [1], [0]), [1 << 17, 1 << 17])
    graph = helper.make_graph([], "g", [], [], sparse_initializer=[sparse])
    with pytest.raises(ValueError, match=r"value 'S': .*got 64\.0 GiB"):
        limits.check_tensors(graph)


def _nested(depth: int) -> onnx.ModelProto:
    """Two branches in each of two branches, and so on."""
    answer = helper.make_tensor_value_info("most", TensorProto.FLOAT, [])
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    inner = helper.make_graph([helper.make_node("Constant", [], ["most"], value=one)], "g", [], [answer])
    for _ in range(depth):
        branch = helper.make_node("If", ["yes"], ["most"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([branch], "g", [], [answer])
    model = _model("yes = Cast <to = 9> (flat) large = Identity (flat)")
    (least,) = (node for node in model.graph.node if "most" in node.output)
    least.CopyFrom(inner.node[0])
    return model


def test_branches_in_branches_are_counted(tmp_path: Path) -> None:
    path = _saved(_nested(15), tmp_path)
    with pytest.raises(ValueError, match="expected at most 50000 nodes, those of branches and functions included"):
        onnx_file.load(path)


def test_branches_too_deep_for_a_walk_are_refused() -> None:
    branch = helper.make_graph([], "g", [], [])
    for _ in range(limits.DEEPEST + 1):
        branch = helper.make_graph([helper.make_node("If", ["yes"], ["y"], then_branch=branch)], "g", [], [])
    with pytest.raises(ValueError, match="branches and functions nested at most 32 deep, got more; export"):
        limits.check_nodes(helper.make_model(branch))


def test_as_many_branches_as_are_allowed_take_seconds_at_most() -> None:
    model = _nested(14)
    start = time.perf_counter()
    limits.check_nodes(model)
    names = onnx_parts.value_names(model.graph)
    assert {"image", "most", "scores"} <= names
    assert "most" in onnx_parts.depending(model.graph, "image")
    assert time.perf_counter() - start < 10


def test_functions_that_call_each_other_count_as_they_are_written_out(tmp_path: Path) -> None:
    model = _model("large = f0 (flat)")
    model.graph.node[2].domain = "own"
    for level in range(40):
        called = f"f{level + 1}" if level < 39 else "Identity"
        nodes = [helper.make_node(called, [a], [b], domain="own" if level < 39 else "") for a, b in ("xy", "yz")]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", f"f{level}", ["x"], ["z"], nodes, opsets))
    with pytest.raises(ValueError, match=r"expected (at most 50000 nodes|branches and functions nested at most 32)"):
        onnx_file.load(_saved(model, tmp_path))
