"""Networks as other people's exporters write them: nodes without names, branches, normalisation in front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

CLASSES = 10
SIDE = 16


class Network:
    """A graph so far; `node` returns the tensor that it makes."""

    def __init__(self, *, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, value: NDArray[Any] | np.generic | float, *, name: str = "") -> str:
        array = np.asarray(value, dtype=None if isinstance(value, np.ndarray | np.generic) else np.float32)
        self.constants.append(numpy_helper.from_array(array, name or f"c{len(self.constants)}"))
        return self.constants[-1].name

    def weights(self, *shape: int) -> NDArray[np.float32]:
        """Draw weights that keep the size of activations."""
        inputs = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
        drawn: NDArray[np.float32] = self.random.standard_normal(shape, dtype=np.float32) * np.sqrt(2 / inputs)
        return drawn.astype(np.float32)

    def convolution(
        self, tensor: str, inputs: int, outputs: int, *, size: int = 3, groups: int = 1, **more: Any
    ) -> str:
        weights = self.constant(self.weights(outputs, inputs // groups, size, size))
        bias = self.constant(0.1 * self.random.standard_normal(outputs).astype(np.float32))
        return self.node("Conv", tensor, weights, bias, pads=[size // 2] * 4, group=groups, **more)

    def normalised(self, tensor: str) -> str:
        mean, deviation = np.full((1, 3, 1, 1), 0.45, np.float32), np.full((1, 3, 1, 1), 0.225, np.float32)
        return self.node("Mul", self.node("Add", tensor, self.constant(-mean)), self.constant(1 / deviation))

    def from_uint8(self) -> str:
        pixels = self.node("Cast", "images", to=TensorProto.FLOAT)
        return self.node("Div", self.node("Transpose", pixels, perm=[0, 3, 1, 2]), self.constant(255.0))

    def head(self, tensor: str, channels: int, **more: Any) -> str:
        flat = self.node("Flatten", self.node("GlobalAveragePool", tensor))
        bias = self.constant(0.1 * self.random.standard_normal(CLASSES).astype(np.float32))
        return self.node("Gemm", flat, self.constant(self.weights(channels, CLASSES)), bias, **more)

    def model(self, answer: str, *, uint8: bool = False, side: int = SIDE, centred: bool = True) -> onnx.ModelProto:
        shape: list[str | int] = ["batch", side, side, 3] if uint8 else ["batch", 3, side, side]
        element = TensorProto.UINT8 if uint8 else TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("images", element, shape)],
            [helper.make_tensor_value_info(answer, TensorProto.FLOAT, ["batch", CLASSES])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        model.metadata_props.add(key="class_names", value="[]")
        if centred and side == SIDE:  # larger ones are there for their memory, which this would take
            _centre(model, uint8=uint8)
        onnx.checker.check_model(model, full_check=True)
        return model


def _centre(model: onnx.ModelProto, *, uint8: bool) -> None:
    """Shift the last bias so that the answers to different images are different classes."""
    last = next((node for node in reversed(model.graph.node) if node.op_type in {"Gemm", "Add"}), None)
    if last is None or model.graph.output[0].name not in last.output:
        return
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == last.input[-1])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"images": images(256, uint8=uint8, seed=9)})
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) - answers.mean(0), bias.name))


def residual(*, uint8: bool = False, side: int = SIDE, width: int = 8) -> onnx.ModelProto:
    """Convolutions, BatchNormalization, a depthwise one, a residual sum, Concat, Resize, Gemm."""
    net = Network()
    images = net.normalised(net.from_uint8() if uint8 else "images")
    stem = net.node("Relu", net.convolution(images, 3, width))
    branch = net.convolution(stem, width, width)
    statistics = [net.constant(net.random.uniform(0.5, 1.5, width).astype(np.float32)) for _ in range(4)]
    branch = net.node("Relu", net.node("BatchNormalization", branch, *statistics))
    branch = net.convolution(branch, width, width, groups=width)
    total = net.node("Relu", net.node("Add", branch, stem))
    small = net.node("MaxPool", total, kernel_shape=[2, 2], strides=[2, 2])
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    large = net.node("Resize", net.convolution(small, width, width, size=1), "", scales, mode="nearest")
    joined = net.node("Concat", large, total, axis=1)
    return net.model(
        net.head(net.node("Relu", net.convolution(joined, 2 * width, width)), width), uint8=uint8, side=side
    )


def attention(*, uint8: bool = False) -> onnx.ModelProto:
    """Patches, LayerNormalization, attention by MatMul and Softmax, a perceptron, MatMul and Add at the end."""
    net, width = Network(), 16
    images = net.normalised(net.from_uint8() if uint8 else "images")
    kernels = net.constant(net.weights(width, 3, 4, 4))
    patches = net.node(
        "Reshape", net.node("Conv", images, kernels, strides=[4, 4]), net.constant(np.array([0, width, -1]))
    )
    tokens = net.node("Transpose", patches, perm=[0, 2, 1])
    scale, shift = net.constant(np.ones(width, np.float32)), net.constant(np.zeros(width, np.float32))
    normal = net.node("LayerNormalization", tokens, scale, shift, axis=-1)
    query, key, value = (net.node("MatMul", normal, net.constant(net.weights(width, width))) for _ in range(3))
    scores = net.node("MatMul", query, net.node("Transpose", key, perm=[0, 2, 1]))
    shares = net.node("Softmax", net.node("Mul", scores, net.constant(width**-0.5)), axis=-1)
    tokens = net.node("Add", tokens, net.node("MatMul", shares, value))
    hidden = net.node("Gelu", net.node("MatMul", tokens, net.constant(net.weights(width, 2 * width))))
    tokens = net.node("Add", tokens, net.node("MatMul", hidden, net.constant(net.weights(2 * width, width))))
    pooled = net.node("ReduceMean", tokens, net.constant(np.array([1])), keepdims=0)
    logits = net.node("MatMul", pooled, net.constant(net.weights(width, CLASSES)))
    return net.model(net.node("Add", logits, net.constant(np.zeros(CLASSES, np.float32))), uint8=uint8)


NETWORKS: dict[str, Callable[..., onnx.ModelProto]] = {"residual": residual, "attention": attention}


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model to a file of the folder."""
    path = folder / "source.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def images(count: int, *, uint8: bool = False, side: int = SIDE, seed: int = 1) -> NDArray[Any]:
    """Draw images of different brightness and contrast, so that answers differ."""
    random = np.random.default_rng(seed)
    coarse = random.random((count, 3, 4, 4), dtype=np.float32).repeat(side // 4, 2).repeat(side // 4, 3)
    drawn = np.clip(coarse * random.uniform(0.3, 1, (count, 3, 1, 1)), 0, 1).astype(np.float32)
    return np.rint(255 * drawn.transpose(0, 2, 3, 1)).astype(np.uint8) if uint8 else drawn
