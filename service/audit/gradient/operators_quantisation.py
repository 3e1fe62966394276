"""ONNX's quantisation and casts, with a gradient: rounding is passed straight through, as if it were the identity.

float --QuantizeLinear: / scale, round, + zero point, clip--> whole numbers, kept as floats --DequantizeLinear--> float
gradient <------------------- 1 inside the range, 0 outside (Bengio et al. 2013, section 4) ------------- gradient

Numbers of 8 and 16 bits that come from an image are kept as floats, since torch differentiates nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor

from service.audit.gradient.node import FLOATS

if TYPE_CHECKING:
    from service.audit.gradient.node import Node, Operator

_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-(1 << 15), (1 << 15) - 1)}

_BYTES = {onnx.TensorProto.UINT8: (0, 255), onnx.TensorProto.INT8: (-128, 127)}

_WHOLE = {
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT16: torch.int64,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.UINT32: torch.int64,
    onnx.TensorProto.UINT64: torch.int64,
}


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return the rounded values, with the gradient of those that were rounded."""
    # Not values + (rounded - values).detach(): that is off by a last bit, and then outside the range.
    result: Tensor = _StraightThrough.apply(values, rounded.detach())
    return result


def _within(values: Tensor, low: int, high: int) -> Tensor:
    """Return values clipped to a range, both of whose ends still pass the gradient: torch's clamp drops theirs."""
    inside = (values >= low) & (values <= high)
    return torch.where(inside, values, values.detach().clamp(low, high))


class _StraightThrough(torch.autograd.Function):
    """(values, rounded) -> rounded, with the gradient of values."""

    @staticmethod
    def forward(_context: Any, _values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _cast(node: Node, values: Tensor, _like: Tensor | None = None) -> Tensor:
    to = node.get("to")
    if to in FLOATS:
        return values.to(torch.float32)
    if to in _BYTES:
        return _within(straight_through(values, values.trunc()), *_BYTES[to]) if values.is_floating_point() else values
    if to not in _WHOLE:
        raise node.unsupported(f"expected a number, got {onnx.TensorProto.DataType.Name(to)}")
    return values.to(_WHOLE[to])


def _cast_like(_node: Node, values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)


def _quantize(node: Node, values: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    low, high = levels(node)
    scaled = values / _along(node, values, scale)
    whole = straight_through(scaled, scaled.round())
    return _within(whole if zero is None else whole + _along(node, values, zero), low, high)


def _dequantize(node: Node, values: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    _check(node)
    whole = values.to(torch.float32)
    return (whole if zero is None else whole - _along(node, values, zero)) * _along(node, values, scale)


def _quantized_and_back(node: Node, values: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Return what QuantizeLinear and DequantizeLinear with the same constants make, in one step of torch's own."""
    low, high = levels(node)
    step, at = node.number(1, scale), node.number(2, zero) or 0
    return torch.fake_quantize_per_tensor_affine(values, step, int(at), low, high)


def levels(node: Node) -> tuple[int, int]:
    """Return the least and the largest number that a QuantizeLinear makes.

    Raises:
        ValueError: they are not of 8 or 16 bits.
    """
    _check(node)
    zero = node.constants.get(2)
    if zero is not None and zero.dtype in _RANGES:
        return _RANGES[zero.dtype]
    to = node.get("output_dtype", 0) or onnx.TensorProto.UINT8
    if zero is None and to in _BYTES:
        return _BYTES[to]
    raise node.unsupported("expected a constant zero point of uint8 or int8, got another")


def _check(node: Node) -> None:
    if node.get("block_size", 0):
        raise node.unsupported(f"expected one scale a tensor or a channel, got one for {node.get('block_size')} values")


def _along(node: Node, values: Tensor, parameter: Tensor) -> Tensor:
    """Return a parameter as floats, in the shape that meets each channel."""
    parameter = parameter.to(torch.float32)
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * values.dim()
    shape[node.get("axis", 1)] = -1
    return parameter.reshape(shape)


OPERATORS: dict[str, Operator] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "QuantizeDequantize": _quantized_and_back,
    "RoundToLevels": lambda _node, values: straight_through(values, values.round()),
}
