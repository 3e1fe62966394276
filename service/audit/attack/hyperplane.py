"""The nearest point of a hyperplane inside the box of images: what the FAB attack steps to.

point, normal, gap --> change of least norm with <normal, change> = -gap and point + change in [0, 1]
Where the box keeps the plane out of reach the change goes as near to it as it can. Croce and Hein, "Minimally distorted
Adversarial Examples with a Fast Adaptive Boundary Attack", 2020, section 3.1. Instead of the sort there, the one
unknown is found by Newton's method: what a change achieves is concave and piecewise linear in it, so that the steps
never overshoot and end exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float32
    from torch import Tensor

# Each step of Newton's method passes at least one pixel's limit, in practice most of them: about 8 are taken.
_MOST_STEPS = 100
# A level that moves less than float32 resolves has arrived.
_ARRIVED = 1e-7


def to_hyperplane_linf(
    points: Float32[Tensor, "n d"], normals: Float32[Tensor, "n d"], gaps: Float32[Tensor, " n"]
) -> Float32[Tensor, "n d"]:
    """Return the changes of least maximum norm: every pixel moves as far as any, up to the box's edge.

    Args:
        points: in [0, 1].
        normals: of the planes.
        gaps: <normal, point> - offset, 0 on the plane.
    """
    against, wanted = _facing(normals, gaps)
    room = _room(points, against)
    level = _level(against.abs(), room, wanted)
    return against.sign() * torch.minimum(room, level)


def to_hyperplane_l2(
    points: Float32[Tensor, "n d"], normals: Float32[Tensor, "n d"], gaps: Float32[Tensor, " n"]
) -> Float32[Tensor, "n d"]:
    """Return the changes of least Euclidean norm: every pixel moves by its share of the normal, up to the box's edge.

    Args:
        points: in [0, 1].
        normals: of the planes.
        gaps: <normal, point> - offset, 0 on the plane.
    """
    against, wanted = _facing(normals, gaps)
    room, rate = _room(points, against), against.abs()
    limit = torch.where(rate > 0, room / rate, 0)
    level = _level(rate.square(), limit, wanted)
    return against.sign() * torch.minimum(room, level * rate)


def _facing(normals: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normals from the points towards the planes, their largest entry 1, and how far along them to go."""
    scale = normals.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(normals.dtype).tiny)
    side = torch.where(gaps >= 0, -1.0, 1.0)[:, None]
    return normals / scale * side, gaps.abs()[:, None] / scale


def _room(points: Tensor, directions: Tensor) -> Tensor:
    return torch.where(directions > 0, 1 - points, points)


def _level(gains: Float32[Tensor, "n d"], limits: Float32[Tensor, "n d"], wanted: Float32[Tensor, "n 1"]) -> Tensor:
    """Return the least level with sum(gains * min(limits, level)) = wanted, or one above all limits: (n, 1)."""
    level = torch.zeros_like(wanted)
    for _ in range(_MOST_STEPS):
        slope = torch.where(limits > level, gains, 0).sum(dim=1, keepdim=True)
        missing = wanted - (gains * torch.minimum(limits, level)).sum(dim=1, keepdim=True)
        step = torch.where(slope > 0, missing.clamp_min(0) / slope, 0)
        level = level + step
        if bool((step <= _ARRIVED * level).all()):
            break
    return level
