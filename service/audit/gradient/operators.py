"""All operators that gradients can be taken through, by name.

node --its domain and operator--> table of arithmetic | layers | quantisation | reductions | resize | shapes --> torch
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.audit.gradient import (
    operators_arithmetic,
    operators_layers,
    operators_quantisation,
    operators_reductions,
    operators_resize,
    operators_shapes,
)
from service.audit.gradient.node import WAY_OUT

if TYPE_CHECKING:
    from service.audit.gradient.node import Node, Operator

_ONNX: dict[str, Operator] = {
    **operators_arithmetic.OPERATORS,
    **operators_layers.OPERATORS,
    **operators_quantisation.OPERATORS,
    **operators_reductions.OPERATORS,
    **operators_resize.OPERATORS,
    **operators_shapes.OPERATORS,
}

# Of ONNX Runtime's own operators, those that mean the same as ONNX's.
_MICROSOFT = {name: _ONNX[name] for name in ("DequantizeLinear", "Gelu", "QuantizeLinear", "QuickGelu")}

_DOMAINS = {"": _ONNX, "com.microsoft": _MICROSOFT}


def operator_of(node: Node) -> Operator:
    """Return what computes a node.

    Raises:
        ValueError: nothing here does; the message names the operator and the node.
    """
    operator = _DOMAINS.get(node.domain, {}).get(node.operator)
    if operator is None:
        name = f"{node.domain}.{node.operator}" if node.domain else node.operator
        raise ValueError(
            f"operator {name}, node {node.name!r}: expected one that gradients can be taken through, got another; "
            f"{WAY_OUT}"
        )
    return operator
