"""Clustering-based feature grouping (CFG): k-medoids over the channels of each sample.

features (B, C, H, W) -> group ids (B, C), centres (B, G)

All samples of a batch are grouped at once, on the device of the features. Equations are those of Liu et al.,
"Group-wise Inhibition based Feature Regularization for Robust Classification", ICCV 2021.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

CHECK_EVERY = 5  # rounds between looks at whether the centres are stable, each of which waits for the device


def group_channels(
    features: Float[Tensor, "batch channels height width"],
    groups: int,
    *,
    initial: Int64[Tensor, "batch groups"] | None = None,
    generator: torch.Generator | None = None,
    max_rounds: int = 50,
) -> tuple[Int64[Tensor, "batch channels"], Int64[Tensor, "batch groups"]]:
    """Group the channels of each sample by k-medoids (section 3.2, eqs. 1 and 2).

    Each map joins the centre with the least mean squared distance (eq. 1); each centre becomes the map, of
    all maps of the sample, that is nearest to the mean of its group (eq. 2); until nothing changes, or for
    `max_rounds` rounds. A group that loses all its maps keeps its centre.

    Args:
        features: maps of any range; no gradient flows through the grouping.
        groups: number of groups G, 1 to C.
        initial: channels in 0..C-1 that the centres start from; by default a random subset of each sample's.
        generator: what that subset is drawn from; a CPU generator serves features on any device.
        max_rounds: the bound on rounds, at least 1.

    Returns:
        Group ids in 0..G-1 per channel, and the channel that is the centre of each group.

    Raises:
        ValueError: fewer channels than groups, or `groups`, `initial` or `max_rounds` out of range.
    """
    count, channels = features.shape[:2]
    check_groups(groups, channels=channels)
    if max_rounds < 1:
        msg = f"max_rounds: expected at least 1, got {max_rounds}"
        raise ValueError(msg)
    if initial is not None:
        _check_initial(initial, shape=(count, groups), channels=channels)
    maps = features.detach().flatten(2)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    centres = _random_subset(count, channels, groups, generator=generator) if initial is None else initial
    centres = centres.to(maps.device)
    for index in range(max_rounds):
        ids = _assign(maps, centres)
        moved = _move(maps, ids, centres)
        if index % CHECK_EVERY == CHECK_EVERY - 1 and torch.equal(moved, centres):
            break
        centres = moved
    return _assign(maps, centres), centres


def check_groups(groups: int, *, channels: int) -> None:
    """Raise ValueError where a stage of so many channels cannot be grouped."""
    if not 1 <= groups <= channels:
        msg = f"groups: expected 1 to {channels}, the channels of the stage, got {groups}; lower it"
        raise ValueError(msg)


def _assign(maps: Float[Tensor, "b c n"], centres: Int64[Tensor, "b g"]) -> Int64[Tensor, "b c"]:
    """Return the nearest centre of each map (eq. 1)."""
    chosen = maps.gather(1, centres[:, :, None].expand(-1, -1, maps.shape[2]))
    return _distance(maps, chosen).argmin(2)


def _move(
    maps: Float[Tensor, "b c n"], ids: Int64[Tensor, "b c"], centres: Int64[Tensor, "b g"]
) -> Int64[Tensor, "b g"]:
    """Return the map nearest to the mean of each group (eq. 2)."""
    members = functional.one_hot(ids, centres.shape[1]).to(maps.dtype)
    sizes = members.sum(1)
    means = torch.einsum("bcg,bcn->bgn", members, maps) / sizes.clamp(min=1)[:, :, None]
    return torch.where(sizes > 0, _distance(maps, means).argmin(1), centres)


def _distance(maps: Float[Tensor, "b c n"], others: Float[Tensor, "b g n"]) -> Float[Tensor, "b c g"]:
    # in the same order as the mean squared distance; matrix products would lose near ties to rounding
    return torch.cdist(maps, others, compute_mode="donot_use_mm_for_euclid_dist")


def _random_subset(
    count: int, channels: int, groups: int, *, generator: torch.Generator | None
) -> Int64[Tensor, "count groups"]:
    device = torch.device("cpu") if generator is None else generator.device
    return torch.rand(count, channels, generator=generator, device=device).topk(groups, dim=1).indices


def _check_initial(initial: Tensor, *, shape: tuple[int, int], channels: int) -> None:
    if initial.shape != shape:
        msg = f"initial: expected shape {shape}, got {tuple(initial.shape)}"
        raise ValueError(msg)
    if bool(((initial < 0) | (initial >= channels)).any()):  # waits for the device, which random centres need not
        msg = f"initial: expected channels in 0..{channels - 1}, got {initial.min():d} to {initial.max():d}"
        raise ValueError(msg)
