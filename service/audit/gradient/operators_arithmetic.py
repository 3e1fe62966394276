"""ONNX's elementwise operators, comparisons and matrix products, by torch's.

Rounding has no gradient, as in torch, unless it is part of a quantisation (operators_quantisation): a network that
rounds its images hides its gradient, and the audit has to say so.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.audit.gradient.node import Node, Operator

# QuickGelu's factor, where its node gives none: x * sigmoid(1.702 x) is close to Gelu (Hendrycks & Gimpel 2016).
_QUICK_GELU = 1.702

# Selu's constants (Klambauer et al. 2017), as ONNX has them.
_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def _plain(function: Callable[..., Tensor]) -> Operator:
    """Return the operator of a torch function that takes the node's inputs and no attribute."""
    return lambda _node, *inputs: function(*inputs)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the operator of any number of inputs, broadcast."""
    return lambda _node, *inputs: reduce(function, inputs)


def _divide(_node: Node, left: Tensor, right: Tensor) -> Tensor:
    return left / right if left.is_floating_point() else torch.div(left, right, rounding_mode="trunc")


def _power(node: Node, base: Tensor, exponent: Tensor) -> Tensor:
    known = node.constants.get(1)
    result = base**exponent if known is None or known.numel() != 1 else base ** known.item()
    powers: Tensor = result.to(base.dtype)
    return powers


def _modulo(node: Node, left: Tensor, right: Tensor) -> Tensor:
    return torch.fmod(left, right) if node.get("fmod", 0) else torch.remainder(left, right)


def _mean(_node: Node, *inputs: Tensor) -> Tensor:
    return reduce(torch.add, inputs) / len(inputs)


def _clip(node: Node, images: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least, most = node.number(1, low), node.number(2, high)
    return images if least is None and most is None else images.clamp(least, most)


def _gelu(node: Node, images: Tensor) -> Tensor:
    return functional.gelu(images, approximate=node.get("approximate", "none"))


def _hard_sigmoid(node: Node, images: Tensor) -> Tensor:
    line: Tensor = images * node.get("alpha", 0.2) + node.get("beta", 0.5)
    return line.clamp(0, 1)


def _selu(node: Node, images: Tensor) -> Tensor:
    selu: Tensor = node.get("gamma", _SELU_GAMMA) * functional.elu(images, node.get("alpha", _SELU_ALPHA))
    return selu


def _prelu(_node: Node, images: Tensor, slope: Tensor) -> Tensor:
    return torch.where(images >= 0, images, images * slope)


def _quick_gelu(node: Node, images: Tensor) -> Tensor:
    return images * torch.sigmoid(node.get("alpha", _QUICK_GELU) * images)


def _gemm(node: Node, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    left = left.t() if node.get("transA", 0) else left
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if alpha == beta == 1 and bias is not None and bias.dim() == 1:
        return functional.linear(left, right if node.get("transB", 0) else right.t(), bias)
    product: Tensor = alpha * (left @ (right.t() if node.get("transB", 0) else right))
    return product if bias is None else product + beta * bias


def _einsum(node: Node, *inputs: Tensor) -> Tensor:
    return torch.einsum(node.get("equation"), *inputs)


OPERATORS: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Ceil": _plain(torch.ceil),
    "Celu": lambda node, images: functional.celu(images, node.get("alpha", 1.0)),
    "Clip": _clip,
    "Cos": _plain(torch.cos),
    "Div": _divide,
    "Einsum": _einsum,
    "Elu": lambda node, images: functional.elu(images, node.get("alpha", 1.0)),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(functional.hardswish),
    "IsInf": _plain(torch.isinf),
    "IsNaN": _plain(torch.isnan),
    "LeakyRelu": lambda node, images: functional.leaky_relu(images, node.get("alpha", 0.01)),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "MatMul": _plain(torch.matmul),
    "Max": _folded(torch.maximum),
    "Mean": _mean,
    "Min": _folded(torch.minimum),
    "Mish": _plain(functional.mish),
    "Mod": _modulo,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _power,
    "QuickGelu": _quick_gelu,
    "Reciprocal": _plain(torch.reciprocal),
    "Relu": _plain(torch.relu),
    "Round": _plain(torch.round),
    "Selu": _selu,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Softplus": _plain(functional.softplus),
    "Softsign": _plain(functional.softsign),
    "Sqrt": _plain(torch.sqrt),
    "Sub": _plain(torch.sub),
    "Sum": _folded(torch.add),
    "Swish": lambda node, images: images * torch.sigmoid(node.get("alpha", 1.0) * images),
    "Tanh": _plain(torch.tanh),
    "Where": _plain(torch.where),
    "Xor": _plain(torch.logical_xor),
}
