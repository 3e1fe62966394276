"""ONNX's reductions, by torch's: over axes of an attribute before opset 18, of an input since."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.audit.gradient.node import Node, Operator

    # (images, axes, keep the axes) -> reduced
    Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _over(reduction: Reduction) -> Operator:
    def operator(node: Node, images: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = node.get("axes") or node.numbers(1, axes) or []
        if not chosen and node.get("noop_with_empty_axes", 0):
            return images
        return reduction(images, chosen or [*range(images.dim())], bool(node.get("keepdims", 1)))

    return operator


def _product(images: Tensor, axes: list[int], keep: bool) -> Tensor:  # noqa: FBT001 - as all reductions here
    for axis in sorted((axis % images.dim() for axis in axes), reverse=True):
        images = images.prod(axis, keepdim=keep)
    return images


def _argument(pick: Callable[..., Tensor]) -> Operator:
    return lambda node, images: pick(images, dim=node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))


OPERATORS: dict[str, Operator] = {
    "ArgMax": _argument(torch.argmax),
    "ArgMin": _argument(torch.argmin),
    "ReduceL1": _over(lambda images, axes, keep: images.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _over(lambda images, axes, keep: torch.linalg.vector_norm(images, dim=axes, keepdim=keep)),
    "ReduceLogSum": _over(lambda images, axes, keep: images.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": _over(lambda images, axes, keep: images.logsumexp(axes, keepdim=keep)),
    "ReduceMax": _over(lambda images, axes, keep: images.amax(axes, keepdim=keep)),
    "ReduceMean": _over(lambda images, axes, keep: images.mean(axes, keepdim=keep)),
    "ReduceMin": _over(lambda images, axes, keep: images.amin(axes, keepdim=keep)),
    "ReduceProd": _over(_product),
    "ReduceSum": _over(lambda images, axes, keep: images.sum(axes, keepdim=keep)),
    "ReduceSumSquare": _over(lambda images, axes, keep: images.square().sum(axes, keepdim=keep)),
}
