"""The parts of an ONNX model, wherever they are nested: nodes, tensors, names, and what an output depends on."""

from __future__ import annotations

import math
from itertools import chain, count
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx.reference import ReferenceEvaluator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    Nodes = onnx.GraphProto | onnx.FunctionProto
    _Item = TypeVar("_Item", bound=Message)

# Shape inference looks into small constants alone (targets of Reshape, axes, sizes); larger ones are weights.
_SMALL_ELEMENTS = 256


def subgraphs(graph: Nodes) -> Iterator[Nodes]:
    """Yield a graph, or a function, and all graphs inside its nodes (branches and loop bodies)."""
    yield graph
    for node in _own_nodes(graph):
        for inner in graphs_of(node):
            yield from subgraphs(inner)


def graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that are attributes of a node: branches, loop bodies."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes(graph: Nodes) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, those of branches and loop bodies too."""
    return chain.from_iterable(map(_own_nodes, subgraphs(graph)))


def tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield all tensors of a model with the names by which a reader finds them."""
    parts: list[Nodes] = [model.graph, *model.functions]
    for graph in chain.from_iterable(map(subgraphs, parts)):
        if isinstance(graph, onnx.GraphProto):
            yield from ((tensor.name, tensor) for tensor in graph.initializer)
            yield from ((sparse.values.name, part) for sparse in graph.sparse_initializer for part in _parts(sparse))
        for node in _own_nodes(graph):
            yield from ((label(node), tensor) for tensor in _tensors_of(node))


def texts(message: Message) -> Iterator[str | bytes]:
    """Yield all texts in a message and below it; one that is not UTF-8 comes as bytes."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, (str, bytes)) else value
        elif field.type == field.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from texts(part)


def label(node: onnx.NodeProto) -> str:
    """Return the name by which a reader finds a node: its own, or that of what it computes."""
    return node.name or next(iter(node.output), "")


def value_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names of all values of a graph and of the graphs inside it."""
    return set(_names(graph))


def free_name(wanted: str, *, taken: set[str]) -> str:
    """Return `wanted`, or with a number behind it if it is taken, and take it."""
    name = next(name for name in chain([wanted], (f"{wanted}_{n}" for n in count(1))) if name not in taken)
    taken.add(name)
    return name


def rename(graph: onnx.GraphProto, new: Mapping[str, str]) -> None:
    """Rename values, in place, wherever they are read, written or described."""
    for inner in subgraphs(graph):
        for node in inner.node:
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]
        if isinstance(inner, onnx.GraphProto):
            for value in (*inner.input, *inner.output, *inner.value_info):
                value.name = new.get(value.name, value.name)
            for tensor in inner.initializer:
                tensor.name = new.get(tensor.name, tensor.name)
            for sparse in inner.sparse_initializer:
                sparse.values.name = new.get(sparse.values.name, sparse.values.name)


def prune(graph: onnx.GraphProto, output: str) -> None:
    """Drop, in place, all outputs but one, and what that one does not depend on."""
    needed, kept = needs(graph, output)
    _replace(graph.node, kept)
    _replace(graph.output, [value for value in graph.output if value.name == output][:1])
    _replace(graph.input, [value for value in graph.input if value.name in needed])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
    _replace(graph.sparse_initializer, [tensor for tensor in graph.sparse_initializer if tensor.values.name in needed])
    # Both only annotate; neither may name what is gone.
    del graph.value_info[:]
    del graph.quantization_annotation[:]


def reads(node: onnx.NodeProto) -> set[str]:
    """Return the names of the values that a node reads, those of its branches and loop bodies too."""
    inner = (name for graph in graphs_of(node) for name in _names(graph))
    # An empty name stands for an optional value that is not given.
    return {*node.input, *inner} - {""}


def depending(graph: onnx.GraphProto, value: str) -> set[str]:
    """Return the names of all values that are computed from `value`, itself among them."""
    found = {value}
    for node in graph.node:
        if found.intersection(reads(node)):
            found.update(node.output)
    return found - {""}


def producer(graph: onnx.GraphProto, value: str) -> onnx.NodeProto | None:
    """Return the node that computes a value; None for inputs and constants."""
    return next((node for node in graph.node if value in node.output), None)


def constant(graph: onnx.GraphProto, value: str) -> onnx.TensorProto | None:
    """Return a value that the graph holds as a constant tensor; None for everything else."""
    for tensor in graph.initializer:
        if tensor.name == value:
            return tensor
    node = producer(graph, value)
    if node is None or node.op_type != "Constant":
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)


def folded(model: onnx.ModelProto, value: str) -> np.ndarray[Any, Any] | None:
    """Return a value that depends on no input, computed; None where it cannot be."""
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    needed, kept = needs(model.graph, value)
    part.graph.name = value
    part.graph.node.extend(kept)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    part.graph.output.append(onnx.ValueInfoProto(name=value))
    try:
        (result,) = ReferenceEvaluator(part).run(None, {})
    except Exception:  # noqa: BLE001 - whatever the evaluator cannot do, the graph keeps
        return None
    return np.asarray(result)


def needs(graph: onnx.GraphProto, value: str) -> tuple[set[str], list[onnx.NodeProto]]:
    """Return the names of all values that one depends on, itself among them, and the nodes between, in their order."""
    needed, kept = {value}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(reads(node))
    return needed, kept[::-1]


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the inferred shape of each value of the main graph whose rank is known, -1 for unknown dimensions.

    Raises:
        ValueError: the shapes inside the graph contradict each other; the message is ONNX's.
    """
    graph = inferred(model)
    values = (*graph.input, *graph.value_info, *graph.output)
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return constants | {value.name: shape_of(value) for value in values if value.type.tensor_type.HasField("shape")}


def inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    """Return the graph with the shapes of its values, and its larger weights as inputs.

    Raises:
        ValueError: the shapes inside the graph contradict each other; the message is ONNX's.
    """
    try:
        return onnx.shape_inference.infer_shapes(without_weights(model), strict_mode=True, data_prop=True).graph
    except Exception as error:
        raise ValueError(reason(error)) from error


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model with its weights as further inputs: cheap, and the same to shape inference."""
    graph = onnx.GraphProto(
        name=model.graph.name,
        node=model.graph.node,
        input=model.graph.input,
        output=model.graph.output,
        sparse_initializer=model.graph.sparse_initializer,
    )
    for tensor in model.graph.initializer:
        if _elements(tensor) <= _SMALL_ELEMENTS:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=graph)


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return a value's declared shape, -1 for named and unknown dimensions."""
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)


def reason(error: BaseException) -> str:
    """Return what an ONNX library says, as one line that can be printed: its first line, and the place it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    context = next((line for line in lines[1:] if line.startswith("==> Context: ")), "")
    line = f"{lines[0]} ({context.removeprefix('==> Context: ')})" if context else lines[0]
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:400]


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def _own_nodes(graph: Nodes) -> Iterator[onnx.NodeProto]:
    return iter(graph.node)


def _names(graph: Nodes) -> Iterator[str]:
    """Yield the names of the values of a graph and of those inside it."""
    for inner in subgraphs(graph):
        for node in _own_nodes(inner):
            yield from (*node.input, *node.output)
        if isinstance(inner, onnx.GraphProto):
            yield from (value.name for value in (*inner.input, *inner.output))
            yield from (tensor.name for tensor in inner.initializer)
            yield from (sparse.values.name for sparse in inner.sparse_initializer)


def _tensors_of(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        yield from chain.from_iterable(map(_parts, (*sparse, *attribute.sparse_tensors)))


def _parts(sparse: onnx.SparseTensorProto) -> tuple[onnx.TensorProto, onnx.TensorProto]:
    return sparse.values, sparse.indices


def _replace(field: RepeatedCompositeFieldContainer[_Item], items: Iterable[_Item]) -> None:
    kept = list(items)
    del field[:]
    field.extend(kept)
