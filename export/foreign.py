"""Anybody's classifier -> the graph that everything here runs: `images` in, `logits` or `probabilities` out.

model --export.graph.classifier--> one input, one output, any batch --nodes before and after--> our graph
images --Cast, NCHW, [0, 1] from uint8--> (x - mean) / std * range --BGR, NHWC, type--> graph --float32--> answer
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx

from export import labels, onnx_file
from export.graph import batch_dimension, onnx_parts
from export.graph.classifier import classifier_from_model
from export.labels import class_names
from export.mapping import Mapping, feed, per_channel, read_mapping

if TYPE_CHECKING:
    from export.graph.classifier import Classifier
    from export.manifest import TensorSpec

__all__ = ["Adapted", "Mapping", "adapted", "class_count", "class_names", "feed", "read_mapping"]

Output = Literal["logits", "probabilities"]

# Which channel comes when the first and the third change places.
_SWAPPED = (2, 1, 0)

# The value of white in a uint8 image.
_WHITE = np.float32(255)

# Operators that pass scores on as they are.
_PASSING = {"Identity", "Cast", "Flatten", "Reshape", "Squeeze"}

_ELEMENTS = {"FP32": onnx.TensorProto.FLOAT, "FP16": onnx.TensorProto.FLOAT16, "UINT8": onnx.TensorProto.UINT8}


@dataclass(frozen=True)
class Adapted:
    """A foreign graph as everything here runs it, and what is needed to compare it with the original.

    Attributes:
        model: takes `images`, float32 NCHW in [0, 1] or uint8 NHWC, and answers float32 (batch, classes).
        inputs: its one input.
        outputs: its one output.
        output: what it answers with.
        native: the original's input: what `feed` makes images into, in batches of native.shape[0] if that is not -1.
        native_output: the name of the original's output.
        notes: what was changed or assumed, for the manifest.
    """

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output: Output
    native: TensorSpec
    native_output: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Step:
    """A node to be put before or after a graph: one value in, a constant perhaps, one value out."""

    operator: str
    constant: np.ndarray[Any, Any] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)


def adapted(
    model: onnx.ModelProto,
    mapping: Mapping,
    *,
    class_names: tuple[str, ...],
    input: Literal["float32", "uint8"] = "float32",  # noqa: A002 - what the command line calls it
) -> Adapted:
    """Return the graph of a foreign classifier with our input and output.

    Args:
        model: as onnx_file.load returns it; it is not changed.
        mapping: what the graph takes and gives.
        class_names: as many as the graph has scores; stored in the metadata as JSON under "class_names".
        input: "float32" for images of NCHW in [0, 1], "uint8" for NHWC.

    Raises:
        ValueError: the graph is no classifier of images, or the mapping does not fit it; one line says why.
    """
    classifier = classifier_from_model(model, mapping)
    labels.check(class_names, count=classifier.classes)
    result, uint8 = classifier.model, input == "uint8"
    output, note = _kind(result.graph, mapping)
    _free(result.graph, {onnx_file.INPUT, output})
    _prepend(result.graph, _before(classifier, mapping, uint8=uint8))
    _append(result.graph, _after(classifier.output), output)
    _describe(result.graph, classifier, output=output, uint8=uint8)
    onnx_file.strip(result)
    result.metadata_props.add(key="class_names", value=json.dumps(class_names))
    _check(result)
    inputs, outputs = onnx_file.specs(result)
    native, native_output = classifier.native, classifier.output.name
    return Adapted(result, inputs, outputs, output, native, native_output, (*classifier.notes, *note))


def class_count(model: onnx.ModelProto, mapping: Mapping) -> int:
    """Return how many classes a foreign classifier has; raises as `adapted` does."""
    return classifier_from_model(model, mapping).classes


def _kind(graph: onnx.GraphProto, mapping: Mapping) -> tuple[Output, list[str]]:
    """Return what the graph answers with, and what was assumed for that."""
    if mapping.probabilities is not None:
        return "probabilities" if mapping.probabilities else "logits", []
    node = onnx_parts.producer(graph, graph.output[0].name)
    while node is not None and node.op_type in _PASSING:
        node = onnx_parts.producer(graph, node.input[0])
    if node is not None and node.op_type == "Softmax":
        return "probabilities", ["its output is taken for probabilities, since it ends in Softmax"]
    return "logits", []


def _free(graph: onnx.GraphProto, wanted: set[str]) -> None:
    """Rename, in place, values that have the names wanted for input and output."""
    taken = onnx_parts.value_names(graph)
    clashing = sorted(wanted & taken)
    onnx_parts.rename(graph, {name: onnx_parts.free_name(name, taken=taken | wanted) for name in clashing})


def _before(classifier: Classifier, mapping: Mapping, *, uint8: bool) -> list[_Step]:
    """Return the steps from our image to the graph's."""
    datatype, last = classifier.native.datatype, mapping.layout == "NHWC"
    same = uint8 and datatype == "UINT8" and not mapping.normalised() and mapping.white(datatype) == _WHITE
    steps = [] if same or not uint8 else [_cast("FP32")]
    if uint8 and not last:
        steps.append(_Step("Transpose", attributes={"perm": [0, 3, 1, 2]}))
    if not same:
        steps += _arithmetic(mapping, datatype, uint8=uint8, last=uint8 and last)
    if mapping.channels == "BGR":
        steps.append(_Step("Gather", np.asarray(_SWAPPED), {"axis": 3 if uint8 and last else 1}))
    if last and not uint8:
        steps.append(_Step("Transpose", attributes={"perm": [0, 2, 3, 1]}))
    if same or datatype == "FP32":
        return steps
    return [*steps, *([_Step("Round")] if datatype == "UINT8" else []), _cast(datatype)]


def _arithmetic(mapping: Mapping, datatype: str, *, uint8: bool, last: bool) -> list[_Step]:
    """Return the steps of `(x - mean) / std * range`, without those that would change nothing."""
    white = np.float32(mapping.white(datatype))
    if uint8 and white == _WHITE and not mapping.normalised():
        return []
    steps = [_Step("Div", np.asarray(_WHITE))] if uint8 else []
    if any(mapping.mean):
        steps.append(_Step("Sub", _constant(mapping.mean, last=last)))
    if any(value != 1 for value in mapping.std):
        steps.append(_Step("Div", _constant(mapping.std, last=last)))
    return steps if white == 1 else [*steps, _Step("Mul", np.asarray(white))]


def _constant(values: tuple[float, ...], *, last: bool) -> np.ndarray[Any, Any]:
    return per_channel(values).reshape(-1) if last else per_channel(values)


def _cast(datatype: str) -> _Step:
    return _Step("Cast", attributes={"to": _ELEMENTS[datatype]})


def _after(output: TensorSpec) -> list[_Step]:
    """Return the steps from the graph's answer to ours."""
    flatten = [_Step("Flatten", attributes={"axis": 1})] if len(output.shape) > 2 else []
    return flatten if output.datatype == "FP32" else [*flatten, _cast("FP32")]


def _prepend(graph: onnx.GraphProto, steps: list[_Step]) -> None:
    native = graph.input[0].name
    if not steps:
        onnx_parts.rename(graph, {native: onnx_file.INPUT})
    for index, node in enumerate(_chain(graph, steps, first=onnx_file.INPUT, last=native)):
        graph.node.insert(index, node)


def _append(graph: onnx.GraphProto, steps: list[_Step], output: Output) -> None:
    native = graph.output[0].name
    if not steps:
        onnx_parts.rename(graph, {native: output})
    graph.node.extend(_chain(graph, steps, first=native, last=output))


def _chain(graph: onnx.GraphProto, steps: list[_Step], *, first: str, last: str) -> list[onnx.NodeProto]:
    """Return the nodes of the steps from one value to another; their constants go into the graph."""
    taken = {*onnx_parts.value_names(graph), *(node.name for node in graph.node), first, last}
    nodes = []
    value = first
    for step in steps:
        name = onnx_parts.free_name(f"{first}_{step.operator.lower()}", taken=taken)
        result = last if step is steps[-1] else name
        inputs = [value]
        if step.constant is not None:
            inputs.append(onnx_parts.free_name(f"{name}_by", taken=taken))
            graph.initializer.append(onnx.numpy_helper.from_array(step.constant, inputs[1]))
        nodes.append(onnx.helper.make_node(step.operator, inputs, [result], name=name, **step.attributes))
        value = result
    return nodes


def _describe(graph: onnx.GraphProto, classifier: Classifier, *, output: Output, uint8: bool) -> None:
    """Declare, in place, the one input and the one output."""
    channels, height, width = classifier.image_shape
    shape = (height, width, channels) if uint8 else (channels, height, width)
    element = _ELEMENTS["UINT8" if uint8 else "FP32"]
    batch = batch_dimension.NAME
    describe = onnx.helper.make_tensor_value_info
    del graph.input[:], graph.output[:]
    graph.input.append(describe(onnx_file.INPUT, element, (batch, *shape)))
    graph.output.append(describe(output, _ELEMENTS["FP32"], (batch, classifier.classes)))


def _check(model: onnx.ModelProto) -> None:
    try:
        onnx_file.check_size(model.ByteSize())
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ValueError(f"the mapping does not fit the graph: {onnx_parts.reason(error)}; correct it") from error
