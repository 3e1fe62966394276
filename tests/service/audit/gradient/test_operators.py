"""Each operator answers as ONNX Runtime does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from service.audit.gradient.onnx_module import module_from_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 7


def one_operator(
    operator: str, *constants: NDArray[Any] | None, opset: int = 20, outputs: int = 1, **attributes: Any
) -> onnx.ModelProto:
    """Return images -> operator -> one row an image, with constants as further inputs."""
    names = [f"constant{i}" if value is not None else "" for i, value in enumerate(constants)]
    tensors = [numpy_helper.from_array(v, f"constant{i}") for i, v in enumerate(constants) if v is not None]
    made = [f"made{i}" for i in range(outputs)]
    nodes = [
        helper.make_node(operator, ["images", *names], made, name="it", **attributes),
        helper.make_node("Cast", [made[-1]], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["logits"], axis=1),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, None])
    graph = helper.make_graph(nodes, "one", [images], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def floats(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).uniform(0.5, 1.5, shape).astype(np.float32)


CASES: dict[str, onnx.ModelProto] = {
    "pool, odd padding": one_operator("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    "pool, pads": one_operator("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1),
    "pool, wide pads": one_operator("MaxPool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
    "average": one_operator("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average, counted": one_operator("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "average, odd padding": one_operator("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
    "convolution, odd padding": one_operator("Conv", floats(4, 3, 3, 3), pads=[0, 0, 1, 1], strides=[2, 2]),
    "convolution, same": one_operator("Conv", floats(4, 3, 2, 2), floats(4), auto_pad="SAME_LOWER"),
    "depthwise": one_operator("Conv", floats(3, 1, 3, 3), group=3, dilations=[2, 2]),
    "transposed": one_operator("ConvTranspose", floats(3, 2, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    "resize, nearest": one_operator("Resize", None, np.array([1, 1, 2, 1.5], np.float32), mode="nearest"),
    "resize, torch's": one_operator(
        "Resize",
        None,
        np.array([1, 1, 2, 2], np.float32),
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    ),
    "resize, linear": one_operator("Resize", None, None, ints(9, 5), mode="linear", axes=[2, 3]),
    "resize, corners": one_operator(
        "Resize", None, None, ints(9, 5), mode="linear", axes=[2, 3], coordinate_transformation_mode="align_corners"
    ),
    "resize, cubic": one_operator("Resize", None, np.array([1, 1, 2, 2], np.float32), mode="cubic"),
    "slice back": one_operator("Slice", ints(-1), ints(-(2**40)), ints(3), ints(-2)),
    "slice": one_operator("Slice", ints(1, -3), ints(2**40, -1), ints(2, 3)),
    "gather": one_operator("Gather", ints(2, -3, 0), axis=1),
    "gather one": one_operator("Gather", np.array(-1), axis=2),
    "gather, places": one_operator("GatherND", np.array([[1, 2], [0, -1]])),
    "gather, places of each image": one_operator("GatherND", np.array([[[1, 2], [0, -1]]] * 2), batch_dims=1),
    "gather, places of each channel": one_operator("GatherND", np.array([[[2], [-1], [0]]] * 2), batch_dims=2),
    "split": one_operator("Split", ints(1, 2), axis=1, outputs=2),
    "split unevenly": one_operator("Split", axis=3, num_outputs=2, outputs=2),
    "pad": one_operator("Pad", ints(0, 0, 1, 2, 0, 0, -1, 0), np.array(2, np.float32)),
    "pad, mirrored": one_operator("Pad", ints(0, 0, 1, 2, 0, 0, 2, 1), mode="reflect"),
    "pad, edge": one_operator("Pad", ints(1, 2), None, ints(3), mode="edge"),
    "expand": one_operator("Expand", ints(1, 1, 1, SIDE)),
    "reshape": one_operator("Reshape", ints(0, -1, SIDE)),
    "tile": one_operator("Tile", ints(1, 2, 1, 1)),
    "transpose": one_operator("Transpose", perm=[0, 2, 3, 1]),
    "mean": one_operator("ReduceMean", ints(-1, 2), keepdims=0),
    "mean, before 18": one_operator("ReduceMean", opset=13, axes=[2, 3]),
    "mean, of all axes but the batch": one_operator("ReduceSum", ints(1, 2, 3)),
    "product": one_operator("ReduceProd", ints(2, 3)),
    "l2": one_operator("ReduceL2", ints(1)),
    "log-sum-exp": one_operator("ReduceLogSumExp", ints(1)),
    "batch norm": one_operator("BatchNormalization", floats(3), floats(3), floats(3), floats(3)),
    "instance norm": one_operator("InstanceNormalization", floats(3), floats(3)),
    "layer norm": one_operator("LayerNormalization", floats(SIDE), floats(SIDE)),
    "layer norm, two axes": one_operator("LayerNormalization", floats(SIDE, SIDE), axis=2),
    "local response": one_operator("LRN", size=3, alpha=0.1),
    "lp": one_operator("LpNormalization", axis=1),
    "softmax over channels": one_operator("Softmax", axis=1),
    "clip": one_operator("Clip", np.array(0.3, np.float32), np.array(0.6, np.float32)),
    "clip above": one_operator("Clip", None, np.array(0.6, np.float32)),
    "power": one_operator("Pow", np.array(3.0, np.float32)),
    "power, of integers": one_operator("Pow", np.array(2, np.int64)),
    "gelu": one_operator("Gelu", approximate="tanh"),
    "hard sigmoid": one_operator("HardSigmoid", alpha=0.3, beta=0.4),
    "prelu": one_operator("PRelu", floats(3, 1, 1)),
    "einsum": one_operator("Einsum", floats(SIDE, 2), equation="bchw,wk->bchk"),
    "matmul": one_operator("MatMul", floats(SIDE, 2)),
    "maximum": one_operator("Max", floats(3, 1, 1), floats(SIDE)),
    "comparison": one_operator("Greater", np.array(0.5, np.float32)),
    "triangle": one_operator("Trilu", np.array(1), upper=0),
    **{
        f"plain {name}": one_operator(name)
        for name in ("Erf", "Sqrt", "Log", "HardSwish", "Mish", "Softplus", "Reciprocal", "Elu", "Selu", "Celu", "Abs")
    },
    "global average": one_operator("GlobalAveragePool"),
    "global maximum": one_operator("GlobalMaxPool"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_onnx_runtime(case: str) -> None:
    model = CASES[case]
    images = np.random.default_rng(0).uniform(0.05, 1, (2, 3, SIDE, SIDE)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"images": images})
    answers = module_from_model(model, where="a test")(torch.from_numpy(images))
    if case == "softmax over channels":  # the answer is its last step: logarithms come instead
        answers = answers.exp()
    np.testing.assert_allclose(answers.numpy(), expected, rtol=2e-5, atol=2e-6)


def test_an_unknown_operator_is_named_with_its_node() -> None:
    with pytest.raises(ValueError, match=r"^a test: operator NonZero, node 'it': expected one that gradients"):
        module_from_model(one_operator("NonZero"), where="a test")


def test_an_operator_of_another_domain_is_named_with_its_domain() -> None:
    model = one_operator("Gelu")
    model.graph.node[0].domain = "org.example"
    model.opset_import.append(helper.make_opsetid("org.example", 1))
    with pytest.raises(ValueError, match=r"operator org\.example\.Gelu, node 'it'"):
        module_from_model(model, where="a test")
