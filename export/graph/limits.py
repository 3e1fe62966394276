"""What a graph may hold at most: a file of a few hundred bytes can ask for any number of nodes, or for any memory.

model --nodes, those of branches and called functions too--> counted --shapes inferred--> bytes of each tensor
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx

from export.graph import onnx_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

# Nodes of a graph with its branches and with every call of a function written out; large classifiers have a few
# thousand. As many take seconds to look through.
MOST_NODES = 50_000

# Branches inside branches, functions called by functions: exporters write one for each level of modules.
DEEPEST = 32

# Bytes of one tensor for one image; attention over 4096 tokens with 16 heads, 1024 x 1024 pixels say, takes half.
LARGEST_TENSOR = 2 << 30


def check_nodes(model: onnx.ModelProto) -> None:
    """Refuse, by a ValueError, a model of too many nodes, or with branches or functions nested too deep."""
    functions = {(function.domain, function.name): function for function in model.functions}
    _Count(functions, {}).of(model.graph, depth=0)


def check_tensors(graph: onnx.GraphProto) -> None:
    """Refuse, by a ValueError, a graph that would compute or hold a tensor larger than any machine should need.

    Args:
        graph: with the shapes that were inferred; a dimension that is not known counts as 1, as one image does.
    """
    for name, size in _sizes(graph):
        if size > LARGEST_TENSOR:
            raise ValueError(
                f"value {name!r}: expected at most {LARGEST_TENSOR >> 30} GiB for one image, got "
                f"{size / 2**30:.1f} GiB; export the model for smaller images, and with a dynamic batch"
            )


@dataclass(frozen=True)
class _Count:
    """Counts nodes, those of a function once for each call."""

    functions: dict[tuple[str, str], onnx.FunctionProto]
    known: dict[tuple[str, str], int]

    def of(self, graph: onnx_parts.Nodes, *, depth: int) -> int:
        """Return how many nodes a graph or a function stands for."""
        if depth > DEEPEST:
            raise ValueError(
                f"expected branches and functions nested at most {DEEPEST} deep, got more; export the model flat"
            )
        total = len(graph.node)
        for node in graph.node:
            total += self._called(node, depth=depth)
            total += sum(self.of(inner, depth=depth + 1) for inner in onnx_parts.graphs_of(node))
            if total > MOST_NODES:
                raise ValueError(
                    f"expected at most {MOST_NODES} nodes, those of branches and functions included, got more; "
                    "export a smaller graph, its loops not written out"
                )
        return total

    def _called(self, node: onnx.NodeProto, *, depth: int) -> int:
        key = (node.domain, node.op_type)
        if key not in self.functions:
            return 0
        if key not in self.known:
            self.known[key] = self.of(self.functions[key], depth=depth + 1)
        return self.known[key]


def _sizes(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    """Yield the name and the bytes of every tensor whose shape is known in part."""
    for inner in onnx_parts.subgraphs(graph):
        if isinstance(inner, onnx.GraphProto):
            for value in (*inner.input, *inner.value_info, *inner.output):
                yield value.name, _bytes(value.type.tensor_type.elem_type, onnx_parts.shape_of(value))
            for sparse in inner.sparse_initializer:
                # ONNX Runtime writes out its zeros.
                yield sparse.values.name, _bytes(sparse.values.data_type, tuple(sparse.dims))


def _bytes(element: int, shape: tuple[int, ...]) -> int:
    known = element in onnx.helper.get_all_tensor_dtypes()
    width = onnx.helper.tensor_dtype_to_np_dtype(element).itemsize if known else 1
    return width * math.prod(1 if dim == -1 else dim for dim in shape)
