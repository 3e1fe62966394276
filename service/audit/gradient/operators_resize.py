"""ONNX's Resize, by torch's `interpolate`, or by picking pixels where the nearest one is wanted.

size of the images, scales | sizes --> size of the result --nearest: pixels of each axis | linear, cubic--> result
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from service.audit.gradient.node import Node, Operator

# torch's cubic interpolation has this coefficient, and no other.
_CUBIC = -0.75

# What Resize calls the interpolations of images, and what torch does.
_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _resize(
    node: Node,
    images: Tensor,
    _region: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    size, factors = _target(node, images, node.numbers(2, scales), node.numbers(3, sizes))
    if node.get("mode", "nearest") == "nearest":
        for axis, (want, factor) in enumerate(zip(size, factors, strict=True)):
            if want != images.shape[axis]:
                images = images.index_select(axis, _nearest(node, images, axis, want, factor))
        return images
    return _interpolated(node, images, size, factors)


def _target(
    node: Node, images: Tensor, scales: list[float] | None, sizes: list[int] | None
) -> tuple[list[int], list[float]]:
    """Return the size of the result and the factor, for each axis."""
    given = sizes or scales
    if not given or node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.unsupported("expected scales or sizes that stretch, got neither")
    axes = node.get("axes") or [*range(images.dim())]
    size, factors = [*images.shape], [1.0] * images.dim()
    for axis, value in zip(axes, given, strict=True):
        size[axis] = int(value) if sizes else math.floor(images.shape[axis] * value)
        factors[axis] = size[axis] / images.shape[axis] if sizes else value
    return size, factors


def _nearest(node: Node, images: Tensor, axis: int, want: int, factor: float) -> Tensor:
    """Return which pixels of an axis the result has, as Resize-19's specification computes them."""
    places, have = torch.arange(want, dtype=torch.float64), images.shape[axis]
    match node.get("coordinate_transformation_mode", "half_pixel"):
        case "half_pixel" | "pytorch_half_pixel":
            at = (places + 0.5) / factor - 0.5
        case "asymmetric":
            at = places / factor
        case "align_corners":
            at = places * (have - 1) / max(1, want - 1)
        case other:
            raise node.unsupported(f"expected half_pixel, asymmetric or align_corners, got {other}")
    rounded = {
        "round_prefer_floor": torch.ceil(at - 0.5),
        "round_prefer_ceil": torch.floor(at + 0.5),
        "floor": torch.floor(at),
        "ceil": torch.ceil(at),
    }[node.get("nearest_mode", "round_prefer_floor")]
    return rounded.clamp(0, have - 1).to(images.device, torch.int64)


def _interpolated(node: Node, images: Tensor, size: list[int], factors: list[float]) -> Tensor:
    mode, how = _MODES.get(node.get("mode")), node.get("coordinate_transformation_mode", "half_pixel")
    known = mode is not None and images.dim() == 4 and size[:2] == [*images.shape[:2]]
    if not known or how not in {"half_pixel", "pytorch_half_pixel", "align_corners"}:
        raise node.unsupported(f"expected linear or cubic by half_pixel or align_corners of NCHW, got {how}")
    if mode == "bicubic" and not math.isclose(node.get("cubic_coeff_a", _CUBIC), _CUBIC):
        raise node.unsupported(f"expected a cubic coefficient of {_CUBIC}, got {node.get('cubic_coeff_a')}")
    assert mode is not None
    exact = all(want == have * factor for want, have, factor in zip(size, images.shape, factors, strict=True))
    return functional.interpolate(
        images,
        size=size[2:] if exact or how == "align_corners" else None,
        scale_factor=None if exact or how == "align_corners" else factors[2:],
        mode=mode,
        align_corners=how == "align_corners",
        antialias=bool(node.get("antialias", 0)),
    )


OPERATORS: dict[str, Operator] = {"Resize": _resize}
