"""Small convolutional classifiers as ONNX, in every form that plans are built from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.manifest import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto, NodeProto

Form = Literal["fp32", "uint8", "fp16", "int8"]

SIDE, CHANNELS, FILTERS, CLASSES = 8, 3, 4, 5

IMAGES = TensorSpec(name="images", datatype="FP32", shape=(-1, CHANNELS, SIDE, SIDE))
STORED = TensorSpec(name="images", datatype="UINT8", shape=(-1, SIDE, SIDE, CHANNELS))
LOGITS = TensorSpec(name="logits", datatype="FP32", shape=(-1, CLASSES))


class _Drawing:
    """Nodes and constants so far, each node fed by the one before."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.last = "images"

    def add(self, operator: str, name: str, *others: str, **attributes: Any) -> None:
        output = f"{name}_out"
        self.nodes.append(helper.make_node(operator, [self.last, *others], [output], name=name, **attributes))
        self.last = output

    def constant(self, name: str, value: np.ndarray[Any, Any] | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def classifier(form: Form = "fp32", *, operators: tuple[str, ...] = (), filters: int = FILTERS) -> ModelProto:
    """Return a classifier with random weights; `operators` come after its convolution, as nodes of their names."""
    random = np.random.default_rng(0)
    dtype = np.float16 if form == "fp16" else np.float32
    drawing = _Drawing()
    if form == "uint8":
        drawing.add("Cast", "to_float", to=TensorProto.FLOAT)
        drawing.add("Transpose", "turn", perm=[0, 3, 1, 2])
        drawing.add("Div", "scale", drawing.constant("levels", np.float32(255)))
    if form == "fp16":
        drawing.add("Cast", "to_half", to=TensorProto.FLOAT16)
    kernels = random.standard_normal((filters, CHANNELS, 3, 3)).astype(dtype)
    weights = _quantised(drawing, kernels) if form == "int8" else drawing.constant("kernels", kernels)
    drawing.add("Conv", "convolution", weights, pads=[1, 1, 1, 1])
    for operator in operators:
        drawing.add(operator, f"the_{operator}")
    drawing.add("GlobalAveragePool", "pool")
    drawing.add("Flatten", "flatten")
    drawing.add("MatMul", "head", drawing.constant("weights", random.standard_normal((filters, CLASSES)).astype(dtype)))
    drawing.add(
        "Cast" if form == "fp16" else "Identity", "logits", **({"to": TensorProto.FLOAT} if form == "fp16" else {})
    )
    drawing.nodes[-1].output[0] = "logits"
    spec, element = (STORED, TensorProto.UINT8) if form == "uint8" else (IMAGES, TensorProto.FLOAT)
    images = helper.make_tensor_value_info("images", element, ["batch", *spec.shape[1:]])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(drawing.nodes, "classifier", [images], [logits], drawing.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def saved(folder: Path, form: Form = "fp32", *, operators: tuple[str, ...] = ()) -> Path:
    """Write the classifier to `folder`/source.onnx and return that."""
    path = folder / "source.onnx"
    path.write_bytes(classifier(form, operators=operators).SerializeToString())
    return path


def spec_of(form: Form) -> TensorSpec:
    """Return the image input of a form."""
    return STORED if form == "uint8" else IMAGES


def _quantised(drawing: _Drawing, kernels: np.ndarray[Any, Any]) -> str:
    """Quantise the image symmetrically to int8 and the kernels per filter; return the kernels' name."""
    scale, zero = drawing.constant("scale", np.float32(1 / 127)), drawing.constant("zero", np.int8(0))
    drawing.add("QuantizeLinear", "quantise", scale, zero)
    drawing.add("DequantizeLinear", "dequantise", scale, zero)
    scales = np.abs(kernels).max(axis=(1, 2, 3)) / 127
    drawing.constant("kernels", np.rint(kernels / scales[:, None, None, None]).astype(np.int8))
    drawing.constant("kernel_scales", scales.astype(np.float32))
    drawing.constant("kernel_zeros", np.zeros(len(scales), np.int8))
    inputs = ["kernels", "kernel_scales", "kernel_zeros"]
    drawing.nodes.append(
        helper.make_node("DequantizeLinear", inputs, ["kernels_out"], name="dequantise_kernels", axis=0)
    )
    return "kernels_out"
