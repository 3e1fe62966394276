"""Anybody's fp32 graph -> the graph that precisions are made from, with names that a user can refer to.

ONNX file --name every node--> source --ONNX Runtime: fold constants, BatchNormalization, bias--> folded
folded --names of the source's nodes, shapes of every tensor--> Prepared

The same file gives the same names and the same bytes, so a list of nodes to keep in fp32 holds from run to run.
"""

from __future__ import annotations

import difflib
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper, version_converter

from export.engines.session_options import session_options

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

# Operators whose second operand is a layer's weights: nearly all of a classifier's work.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

# DequantizeLinear has an axis, which weights scaled channel by channel need, from this opset on.
_OLDEST_OPSET = 13

# How many names an error proposes: enough to recognise one's own, few enough for one line.
_PROPOSED = 3


@dataclass(frozen=True, eq=False)
class Prepared:
    """A graph with folded constants, named nodes and known shapes.

    Attributes:
        model: the graph; a node that stands for one of the source has its name.
        homes: of each node of the source, the node of `model` that does its work; None where it was folded away.
    """

    model: onnx.ModelProto
    homes: Mapping[str, str | None]

    def resolved(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the nodes of `model` that do the work of the source's nodes of these names, in their order.

        Raises:
            ValueError: the source has no node of that name; the message has the closest ones.
        """
        nodes = {node.name: node.name for node in self.model.graph.node} | dict(self.homes)
        for name in names:
            if name not in nodes:
                close = difflib.get_close_matches(name, nodes, n=_PROPOSED, cutoff=0.0)
                raise ValueError(
                    f"keep: expected the name of a node in the graph, got {name!r}; "
                    f"the closest are {', '.join(map(repr, close))}"
                )
        found = (nodes[name] for name in names)
        return tuple(dict.fromkeys(node for node in found if node is not None))

    @property
    def layers(self) -> tuple[onnx.NodeProto, ...]:
        """The nodes with weights, in the order of the graph."""
        constants = {tensor.name for tensor in self.model.graph.initializer}
        nodes = (node for node in self.model.graph.node if node.op_type in WEIGHTED)
        return tuple(node for node in nodes if constants.intersection(node.input[:2]))

    def activations(self, operators: Collection[str] | None = None) -> list[str]:
        """Return the float32 tensors that nodes of these operators (or all) take and give, in the graph's order."""
        graph = self.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        values = (*graph.input, *graph.value_info, *graph.output)
        floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT} - constants
        nodes = (node for node in graph.node if operators is None or node.op_type in operators)
        return list(dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name in floats))

    def upstream(self, node: onnx.NodeProto) -> set[str]:
        """Return the names of all nodes that this node's inputs come from."""
        producers = {output: other for other in self.model.graph.node for output in other.output}
        return _reached(node, lambda at: (producers[name] for name in at.input if name in producers))

    def downstream(self, node: onnx.NodeProto) -> set[str]:
        """Return the names of all nodes that this node's outputs go into."""
        consumers: dict[str, list[onnx.NodeProto]] = {}
        for other in self.model.graph.node:
            for name in other.input:
                consumers.setdefault(name, []).append(other)
        return _reached(node, lambda at: (other for name in at.output for other in consumers.get(name, ())))

    def copy(self) -> onnx.ModelProto:
        """Return a copy of `model`, for a tool that changes it."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return model

    def finished(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return what a tool made of the copy, with its nodes sorted and nothing of the tool's own in it."""
        sort_nodes(model.graph)
        del model.graph.value_info[:]
        del model.metadata_props[:]
        model.metadata_props.extend(self.model.metadata_props)
        model.producer_name, model.producer_version = self.model.producer_name, self.model.producer_version
        return model


def prepare(source: Path) -> Prepared:
    """Fold and name the graph of an ONNX file.

    Raises:
        ValueError: ONNX Runtime cannot take the file; the message has its reason.
    """
    model = onnx.load(source)
    _name_nodes(model.graph)
    try:
        model = _recent(model)
        folded = _folded(model)
    except Exception as error:
        raise ValueError(f"{source}: ONNX Runtime cannot take it: {_first_line(error)}") from error
    homes = _rename(folded.graph, model.graph)
    _fold_beta(folded.graph)
    described = onnx.shape_inference.infer_shapes(folded)
    _describe_activations_alone(described.graph)
    _keep_used_domains(described)
    del described.metadata_props[:]
    described.metadata_props.extend(model.metadata_props)
    return Prepared(described, homes)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node behind those that it depends on, and otherwise leave them in their order."""
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    done: dict[int, None] = {}
    for first in range(len(nodes)):
        waiting = [first]
        while waiting:
            needed = [makers[name] for name in nodes[waiting[-1]].input if name in makers]
            missing = [index for index in needed if index not in done]
            if missing:
                waiting += missing
            else:
                done[waiting.pop()] = None
    del graph.node[:]
    graph.node.extend(nodes[index] for index in done)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own: its operator and its place in the graph, where it has none or shares it."""
    counts = Counter(node.name for node in graph.node)
    taken, seen = set(counts), set[str]()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = _free(f"{node.name or node.op_type}_{index}", taken)
            taken.add(node.name)
        seen.add(node.name)


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _recent(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in an opset that the quantiser can work in."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), _OLDEST_OPSET)
    if opset >= _OLDEST_OPSET:
        return model
    with warnings.catch_warnings():
        # The converter uses deprecated parts of onnx itself.
        warnings.simplefilter("ignore")
        converted = version_converter.convert_version(model, _OLDEST_OPSET)
    _name_nodes(converted.graph)
    return converted


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let ONNX Runtime fold what is constant, by rewrites that stay within the ONNX standard."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "folded.onnx"
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantSharing"],  # it renames constants, which errors refer to
        )
        return onnx.load(path)


def _rename(folded: onnx.GraphProto, source: onnx.GraphProto) -> dict[str, str | None]:
    """Give nodes that ONNX Runtime made the names of those they replace; return where each node's work is done."""
    producers = {output: node for node in source.node for output in node.output if output}
    known = {node.name for node in source.node}
    taken = known.intersection(node.name for node in folded.node)
    for node in folded.node:
        if node.name in known:
            continue
        origin = _origin(node, producers)
        wanted = origin.name if origin is not None and origin.name not in taken else f"{node.op_type}_{node.output[0]}"
        node.name = wanted if wanted not in taken else _free(wanted, taken | known)
        taken.add(node.name)
    places = {output: node.name for node in folded.node for output in node.output}
    return {node.name: _home(node, taken, places) for node in source.node}


def _home(node: onnx.NodeProto, taken: Collection[str], places: Mapping[str, str]) -> str | None:
    if node.name in taken:
        return node.name
    return next((places[output] for output in node.output if output in places), None)


def _origin(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """Return the source's node that a new one stands for: the layer, where a layer was joined with what follows it."""
    origin = next((producers[output] for output in node.output if output in producers), None)
    at = origin
    while at is not None and node.op_type in WEIGHTED and at.op_type not in WEIGHTED:
        at = next((producers[name] for name in at.input if name in producers), None)
    return at or origin


def _fold_beta(graph: onnx.GraphProto) -> None:
    """Multiply constant biases of Gemm by their beta: the quantiser takes it for 1 where biases stay in fp32."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        beta = next((entry for entry in node.attribute if entry.name == "beta"), None)
        if node.op_type == "Gemm" and beta is not None and beta.f != 1 and len(node.input) == 3:
            bias = constants.get(node.input[2])
            if bias is not None:
                name = _free(f"{bias.name}_scaled_{node.name}", constants)
                scaled = np.float32(beta.f) * numpy_helper.to_array(bias)
                graph.initializer.append(numpy_helper.from_array(scaled, name))
                node.input[2] = name
                beta.f = 1.0


def _reached(start: onnx.NodeProto, neighbours: Callable[[onnx.NodeProto], Iterable[onnx.NodeProto]]) -> set[str]:
    names, waiting = set[str](), [start]
    while waiting:
        found = [node for node in neighbours(waiting.pop()) if node.name not in names]
        names.update(node.name for node in found)
        waiting += found
    return names


def _keep_used_domains(model: onnx.ModelProto) -> None:
    """Drop the operator sets that ONNX Runtime lists in every file it writes and that no node uses."""
    used = {node.domain for node in model.graph.node} | {function.domain for function in model.functions}
    kept = [entry for entry in model.opset_import if entry.domain in used | {"", "ai.onnx"}]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _describe_activations_alone(graph: onnx.GraphProto) -> None:
    """Drop the descriptions of constants, which ONNX Runtime writes and which go stale when a constant is converted."""
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.value_info if value.name not in constants]
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in values]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
