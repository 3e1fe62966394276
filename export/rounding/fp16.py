"""fp32 graph -> fp16 graph: weights and activations in half precision, casts around what must stay in fp32.

ONNX file --preparation--> Converter --graph(kept=...)--> fp16 graph whose inputs and outputs keep their types
images --ranges of activations: what fp16 cannot hold--^

ONNX Runtime's CPU provider computes a fp16 graph in fp32 and drops the casts in between, so neither overflow nor
rounding of activations shows in what it answers. The ranges over images show the one, `Converter.on_cpu` the other.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers import float16

from export.graph import preparation
from export.rounding import calibration

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from export.graph.preparation import Prepared
    from export.rounding.calibration import Inputs

# Names of the casts to fp16 that the converter adds behind fp32 inputs and nodes.
_NARROWS = re.compile(r"^graph_input_cast\d+$|_cast_to_fp16_node$")

# The largest finite fp16.
FP16_MAX = 65504.0

# What an activation may be at most on the images that are seen: others make more of it, and a sum of a few in fp16
# must not overflow either.
_ACTIVATION_MAX = FP16_MAX / 4

# Operators that hand values on as they are, or choose among them: they round nothing.
_PASS = frozenset(
    {
        "Cast", "Clip", "Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu", "Reshape",
        "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Converter:
    """A prepared graph from which fp16 graphs are made, whatever they keep in fp32.

    Attributes:
        always: nodes that every graph keeps in fp32: what normalises the images, operators that are not defined for
            fp16, and nodes with weights beyond its range or, where images were given, with activations that come near
            its end.
        optimise: whether the graphs to measure may be optimised; the casts that round stay.
    """

    prepared: Prepared
    always: frozenset[str]
    optimise: bool = True

    def candidates(self, kept: Collection[str]) -> tuple[onnx.NodeProto, ...]:
        """Return the nodes that compute in fp16, in the order of the graph: not those kept."""
        floats = set(self.prepared.activations())
        return tuple(
            node
            for node in self.prepared.model.graph.node
            if node.op_type not in _PASS
            and floats.intersection(node.output)
            and node.name not in self.always
            and node.name not in kept
        )

    def kept(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the nodes that stay in fp32 with `names`, in the order of the graph."""
        nodes = self.prepared.model.graph.node
        return tuple(node.name for node in nodes if node.name in names or node.name in self.always)

    def graph(self, *, kept: Collection[str] = ()) -> onnx.ModelProto:
        """Return the fp16 graph; `kept` are nodes of the prepared graph that stay in fp32 with those that always do."""
        with warnings.catch_warnings():
            # The converter uses deprecated parts of onnx.
            warnings.simplefilter("ignore")
            converted = float16.convert_float_to_float16(
                self.prepared.copy(),
                keep_io_types=True,
                disable_shape_infer=True,
                node_block_list=sorted({*self.always, *kept}),
            )
        _tidy_casts(converted.graph)
        return self.prepared.finished(converted)

    def on_cpu(self, *, kept: Collection[str] = (), only: Collection[str] = ()) -> onnx.ModelProto:
        """Return a fp32 graph whose nodes read and make rounded values, as those of the fp16 graph do on a GPU.

        Sums inside a node are those of fp32, as GPUs keep them in products and convolutions.

        Args:
            kept: nodes of the prepared graph to keep in fp32, beside those that always are.
            only: the nodes to round; all that are not kept by default.
        """
        chosen = {node.name for node in self.candidates(kept) if not only or node.name in only}
        model = self.prepared.copy()
        constants = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
        _round(model.graph, chosen, floats={*self.prepared.activations(), *constants})
        return self.prepared.finished(model)


def _round(graph: onnx.GraphProto, chosen: Collection[str], *, floats: Collection[str]) -> None:
    """Cast to fp16 and back what the chosen nodes make, and for them alone what else they read."""
    nodes = [node for node in graph.node if node.name in chosen]
    made = {name for node in nodes for name in node.output if name in floats}
    read = {name: None for node in nodes for name in node.input if name in floats and name not in made}
    for node in nodes:
        node.input[:] = [f"{name}/rounded" if name in read else name for name in node.input]
        node.output[:] = [f"{name}/exact" if name in made else name for name in node.output]
    casts = [(name, f"{name}/rounded") for name in read] + [(f"{name}/exact", name) for name in sorted(made)]
    for exact, rounded in casts:
        half = f"{rounded}/half"
        graph.node.append(helper.make_node("Cast", [exact], [half], name=half, to=TensorProto.FLOAT16))
        graph.node.append(helper.make_node("Cast", [half], [rounded], name=f"{half}/back", to=TensorProto.FLOAT))


def converter(source: Path, *, inputs: Inputs | None = None) -> Converter:
    """Prepare a graph and find what fp16 cannot hold.

    Args:
        source: the fp32 file.
        inputs: (N, ...) images as the graph takes them; without any, activations are taken to be in range.

    Raises:
        ValueError: the file cannot be taken, or the images do not fit the graph.
    """
    prepared = preparation.prepare(source)
    large = {tensor.name for tensor in prepared.model.graph.initializer if _beyond_fp16(tensor)}
    if inputs is not None:
        ranges = calibration.ranges(prepared.model, inputs, tensors=prepared.activations())
        large |= {name for name, data in ranges.items() if max(-data.lowest, data.highest) > _ACTIVATION_MAX}
    normalising = {name for node in prepared.layers[:1] for name in prepared.upstream(node)}
    always = {
        node.name
        for node in prepared.model.graph.node
        if node.name in normalising
        or node.op_type in float16.DEFAULT_OP_BLOCK_LIST
        or large.intersection((*node.input, *node.output))
    }
    return Converter(prepared, frozenset(always))


def _beyond_fp16(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != TensorProto.FLOAT:
        return False
    values = np.abs(numpy_helper.to_array(tensor))
    return bool((values[np.isfinite(values)] > FP16_MAX).any())


def _tidy_casts(graph: onnx.GraphProto) -> None:
    """Drop casts that the converter adds twice, and those to fp16 and straight back between nodes kept in fp32."""
    # Nodes that make the same tensor are the same cast.
    nodes = {tuple(node.output): onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node}.values()
    narrowed = {node.output[0]: node.input[0] for node in nodes if _NARROWS.search(node.name)}
    widened = {node.output[0]: node.input[0] for node in nodes if node.name.endswith("_cast_to_fp32_node")}
    straight = {name: narrowed[origin] for name, origin in widened.items() if origin in narrowed}
    for node in nodes:
        names = narrowed if node.name.startswith("graph_output_cast") else straight
        node.input[:] = [names.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(_needed(list(nodes), {value.name for value in graph.output}))


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Collection[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs are computed from."""
    makers = {name: node for node in nodes for name in node.output}
    wanted, found = list(outputs), set[str]()
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            wanted += node.input
    return [node for node in nodes if node.name in found]
