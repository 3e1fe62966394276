"""One node of an ONNX graph as the operators here read it: attributes decoded once, constants known beforehand.

onnx.NodeProto --attributes as Python values, tensors as torch's--> Node --with its inputs--> operator --> outputs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

# (node, *inputs) -> output or outputs; an input that is left out is None.
Operator = Callable[..., Tensor | tuple[Tensor, ...]]

# Everything that ONNX computes in floats is computed in float32 here, whatever the file has.
FLOATS = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
)


@dataclass(frozen=True)
class Node:
    """A node, without its place in the graph.

    Attributes:
        operator: as in "Conv".
        name: the node's, or its first output's where it has none.
        domain: of the operator; "" for ONNX's own.
        opset: version of ONNX's own operators.
        attributes: decoded; a tensor is torch's.
        outputs: how many.
        constants: inputs that are known beforehand, by position, on the CPU.
    """

    operator: str
    name: str
    domain: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int = 1
    constants: Mapping[int, Tensor] = field(default_factory=dict)

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute, or its default."""
        return self.attributes.get(attribute, default)

    def numbers(self, position: int, value: Tensor | None) -> list[Any] | None:
        """Return an input as Python numbers, without asking a GPU if it is a constant; None if it is left out."""
        known = self.constants.get(position, value)
        return None if known is None else known.reshape(-1).tolist()

    def number(self, position: int, value: Tensor | None) -> Any:
        """Return an input's only number; None if it is left out."""
        numbers = self.numbers(position, value)
        return numbers[0] if numbers else None

    def unsupported(self, what: str) -> ValueError:
        """Return the error of a node whose operator is known, but not this use of it.

        Args:
            what: "expected X, got Y".
        """
        return ValueError(f"operator {self.operator}, node {self.name!r}: {what}; {WAY_OUT}")


WAY_OUT = "take gradients from a checkpoint, or attack without gradients"


def node_from_proto(proto: onnx.NodeProto, *, opset: int) -> Node:
    """Return a node of a graph; its constants are not known yet."""
    attributes = {attribute.name: _decoded(attribute) for attribute in proto.attribute}
    name = proto.name or next(iter(proto.output), "")
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    return Node(proto.op_type, name, domain, opset, attributes, len(proto.output))


def tensor_from_proto(proto: onnx.TensorProto) -> Tensor:
    """Return a constant: floats of any width as float32, other types as they are."""
    array = numpy_helper.to_array(proto)
    if proto.data_type in FLOATS:
        array = array.astype(np.float32)
    elif array.dtype in {np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)}:
        array = array.astype(np.int64)  # torch adds and compares no unsigned numbers but bytes
    return torch.from_numpy(np.array(array))


def _decoded(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return tensor_from_proto(value)
    return value.decode() if isinstance(value, bytes) else value
