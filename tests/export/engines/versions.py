"""Versions of a small linear classifier, made by hand: an ONNX file and its manifest, in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export import manifest as manifests
from export.manifest import Manifest, Parity, Requirements, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import GraphProto, NodeProto

CHANNELS, HEIGHT, WIDTH, CLASSES = 3, 4, 5, 6
MAX_BATCH = 8
CLASS_NAMES = tuple("abcdef")

Input = Literal["float32", "uint8"]
Output = Literal["logits", "probabilities"]
Array = np.ndarray[Any, np.dtype[np.float32]]


def weights_of(seed: int) -> Array:
    """Return (pixels, classes) float32, pixels in the order of NCHW."""
    return np.random.default_rng(seed).standard_normal((CHANNELS * HEIGHT * WIDTH, CLASSES)).astype(np.float32)


def answers(images: Array, *, seed: int = 0) -> Array:
    """Return the logits that a version with these weights has for float32 NCHW images in [0, 1]."""
    return np.asarray(images.reshape(-1, CHANNELS * HEIGHT * WIDTH) @ weights_of(seed))


def manifest(*, input: Input = "float32", output: Output = "logits", max_batch: int = MAX_BATCH) -> Manifest:  # noqa: A002 - the exporter's own word
    """Return a manifest for one of these versions, its sha256 to be filled in."""
    spec = TensorSpec(name="images", datatype="FP32", shape=(-1, CHANNELS, HEIGHT, WIDTH))
    if input == "uint8":
        spec = TensorSpec(name="images", datatype="UINT8", shape=(-1, HEIGHT, WIDTH, CHANNELS))
    return Manifest(
        model="linear",
        version=1,
        file="model.onnx",
        sha256="",
        runtime="onnxruntime",
        precision="fp32",
        inputs=(spec,),
        outputs=(TensorSpec(name=output, datatype="FP32", shape=(-1, CLASSES)),),
        output=output,
        class_names=CLASS_NAMES,
        max_batch=max_batch,
        requires=Requirements(runtime=">=1.27"),
        parity=Parity(status="passed", reference="numpy"),
    )


def graph(*, input: Input = "float32", output: Output = "logits", seed: int = 0) -> GraphProto:  # noqa: A002 - as above
    """Return the classifier: uint8 NHWC or float32 NCHW to logits or probabilities."""
    nodes: list[NodeProto] = []
    constants = [numpy_helper.from_array(weights_of(seed), "weights")]
    shape: list[str | int] = ["batch", CHANNELS, HEIGHT, WIDTH]
    last = "images"
    if input == "uint8":
        shape = ["batch", HEIGHT, WIDTH, CHANNELS]
        constants.append(numpy_helper.from_array(np.array(255, np.float32), "scale"))
        nodes.append(helper.make_node("Cast", ["images"], ["cast"], name="cast", to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Transpose", ["cast"], ["turned"], name="turn", perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("Div", ["turned", "scale"], ["scaled"], name="scale"))
        last = "scaled"
    nodes.append(helper.make_node("Flatten", [last], ["flat"], name="flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "weights"], ["logits"], name="head"))
    if output == "probabilities":
        nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax"))
    element = TensorProto.UINT8 if input == "uint8" else TensorProto.FLOAT
    images = helper.make_tensor_value_info("images", element, shape)
    answer = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", CLASSES])
    return helper.make_graph(nodes, "linear", [images], [answer], constants)


def save(graph: GraphProto, path: Path) -> None:
    """Write an ONNX file of this graph."""
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def version(
    folder: Path,
    *,
    input: Input = "float32",  # noqa: A002 - as above
    output: Output = "logits",
    seed: int = 0,
    max_batch: int = MAX_BATCH,
) -> Path:
    """Write a version into a folder, and return the folder."""
    save(graph(input=input, output=output, seed=seed), folder / "model.onnx")
    return described(folder, manifest(input=input, output=output, max_batch=max_batch))


def described(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest of what lies in a folder, whatever that is, and return the folder."""
    digest = manifests.sha256_of(folder / manifest.file)
    described = manifest.model_copy(update={"sha256": digest})
    (folder / manifests.FILE_NAME).write_bytes(described.as_json())
    return folder
