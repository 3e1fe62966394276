"""ONNX's operators that move values and compute with shapes, by torch's.

Shapes, axes and indices stay on the CPU, where torch wants them anyway: a GPU is never waited for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.gradient.node import Node, Operator

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _shape(node: Node, images: Tensor) -> Tensor:
    return torch.tensor(images.shape[node.get("start", 0) : node.get("end")], dtype=torch.int64)


def _reshape(node: Node, images: Tensor, shape: Tensor) -> Tensor:
    wanted = node.numbers(1, shape) or []
    if not node.get("allowzero", 0):
        wanted = [images.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return images.reshape(wanted)


def _flatten(node: Node, images: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis += images.dim() if axis < 0 else 0
    # Both sizes written out: torch cannot tell what -1 stands for in an empty batch.
    return images.reshape(math.prod(images.shape[:axis]), math.prod(images.shape[axis:]))


def _transpose(node: Node, images: Tensor) -> Tensor:
    return images.permute(node.get("perm") or [*range(images.dim())][::-1])


def _squeeze(node: Node, images: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = node.get("axes") or node.numbers(1, axes)
    return images.squeeze() if chosen is None else images.squeeze(tuple(chosen))


def _unsqueeze(node: Node, images: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = node.get("axes") or node.numbers(1, axes) or []
    dims = images.dim() + len(chosen)
    for axis in sorted(axis % dims for axis in chosen):
        images = images.unsqueeze(axis)
    return images


def _split(node: Node, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    known = node.get("split") or node.numbers(1, sizes)
    if known is None:
        known = -(-images.shape[axis] // node.get("num_outputs", node.outputs))
    return torch.split(images, known, axis)


def _slice(node: Node, images: Tensor, starts: Tensor, ends: Tensor, *others: Tensor | None) -> Tensor:
    axes, steps = (*others, None, None)[:2]
    first, last = node.numbers(1, starts) or [], node.numbers(2, ends) or []
    chosen = node.numbers(3, axes) or [*range(len(first))]
    strides = node.numbers(4, steps) or [1] * len(first)
    for axis, start, end, step in zip(chosen, first, last, strides, strict=True):
        images = _sliced(images, axis % images.dim(), slice(start, end, step))
    return images


def _sliced(images: Tensor, axis: int, piece: slice) -> Tensor:
    start, end, step = piece.indices(images.shape[axis])
    if step > 0:
        return images[(slice(None),) * axis + (slice(start, max(start, end), step),)]
    return images.index_select(axis, torch.tensor([*range(start, end, step)], device=images.device, dtype=torch.int64))


def _gather(node: Node, images: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0) % images.dim()
    if indices.dim() == 0:
        return images.select(axis, node.number(1, indices))
    flat = indices.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + images.shape[axis], flat)
    return images.index_select(axis, flat).reshape(*images.shape[:axis], *indices.shape, *images.shape[axis + 1 :])


def _gather_elements(node: Node, images: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    return images.gather(axis, torch.where(indices < 0, indices + images.shape[axis], indices))


def _gather_nd(node: Node, images: Tensor, indices: Tensor) -> Tensor:
    places = indices.to(torch.int64).unbind(-1)
    # Along batch_dims each place is its own index.
    own = [
        torch.arange(images.shape[axis], device=images.device).reshape(-1, *(1,) * (places[0].dim() - axis - 1))
        for axis in range(node.get("batch_dims", 0))
    ]
    return images[(*own, *places)]


def _expand(node: Node, images: Tensor, shape: Tensor) -> Tensor:
    wanted = node.numbers(1, shape) or []
    # From the last axis on, an axis of the images stays where 1 is wanted.
    there = [1] * (len(wanted) - images.dim()) + [*images.shape]
    wanted = [1] * (images.dim() - len(wanted)) + wanted
    return images.expand([have if want == 1 else want for have, want in zip(there, wanted, strict=True)])


def _tile(node: Node, images: Tensor, repeats: Tensor) -> Tensor:
    return images.repeat(node.numbers(1, repeats) or [])


def _pad(node: Node, images: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    widths = node.numbers(1, pads) or []
    chosen = node.numbers(3, axes) or [*range(images.dim())]
    both = zip(widths[: len(chosen)], widths[len(chosen) :], strict=True)
    around = {axis % images.dim(): pair for axis, pair in zip(chosen, both, strict=True)}
    # torch names the last axis first, and reflects only if it is not asked to for batch and channels.
    flat = [width for axis in reversed(range(images.dim())) for width in around.get(axis, (0, 0))]
    if not any(flat[2 * images.dim() - 4 :]):
        flat = flat[: 2 * images.dim() - 4]
    mode = node.get("mode", "constant")
    if mode not in _PAD_MODES:
        raise node.unsupported(f"expected one of the modes {', '.join(_PAD_MODES)}, got {mode!r}")
    if mode != "constant":
        return functional.pad(images, flat, mode=_PAD_MODES[mode])
    return functional.pad(images, flat, value=node.number(2, value) or 0)


def _constant(node: Node) -> Tensor:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in node.attributes:
            return torch.as_tensor(node.attributes[name])
    raise node.unsupported(f"expected numbers, got {', '.join(node.attributes)}")


def _constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    value = node.get("value")
    value = torch.zeros(1) if value is None else value
    return value.reshape(()).expand(node.numbers(0, shape) or [])


def _range(node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = node.number(0, start), node.number(1, limit), node.number(2, delta)
    return torch.arange(first, last, step, dtype=start.dtype)


def _trilu(node: Node, images: Tensor, diagonal: Tensor | None = None) -> Tensor:
    offset = node.number(1, diagonal) or 0
    return images.triu(offset) if node.get("upper", 1) else images.tril(offset)


def _depth_to_space(node: Node, images: Tensor) -> Tensor:
    n, channels, height, width = images.shape
    block = node.get("blocksize")
    depth = channels // block**2
    if node.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(images, block)
    blocks = images.reshape(n, block, block, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, depth, height * block, width * block)


def _space_to_depth(node: Node, images: Tensor) -> Tensor:
    n, channels, height, width = images.shape
    block = node.get("blocksize")
    blocks = images.reshape(n, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, channels * block**2, height // block, width // block)


def _concat(node: Node, *inputs: Tensor) -> Tensor:
    return torch.cat(_same_type(inputs), node.get("axis"))


def _same_type(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one type: shapes are int64 here, also where a file computes them in int32."""
    return [each.to(inputs[0].dtype) for each in inputs]


def _first(_node: Node, images: Tensor, *_others: Tensor) -> Tensor:
    """Return the first input: what Identity does, and Dropout when nothing is trained."""
    return images


OPERATORS: dict[str, Operator] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": _first,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _first,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda _node, images: torch.tensor(images.numel()),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}

# Operators whose inputs but the first are read as Python numbers, so that they never have to be on its device.
READ_AS_NUMBERS = frozenset(
    {"Clip", "Expand", "Pad", "Range", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Tile", "Trilu", "Unsqueeze"}
)
