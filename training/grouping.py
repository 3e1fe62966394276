"""Clustering-based feature grouping (CFG): k-medoids over the channels of each sample.

features (B, C, H, W) -> centred maps (B, C, H * W) -> [assign -> move, until stable] -> ids (B, C), centres (B, G)

All samples of a batch are grouped at once, on the device of the features. Equations are those of Liu et al.,
"Group-wise Inhibition based Feature Regularization for Robust Classification", ICCV 2021.

Distances come from matrix products: |a - b|^2 / 2 = |a|^2 / 2 - ab + |b|^2 / 2, of which a comparison over b needs no
|a|^2. Maps are centred on their sample's mean map first, so that what they have in common does not drown their
differences. Two distances that the rounding of those products could swap are a tie, and of a tie the lowest index
is taken: equal maps share a group, and how threads or a device split a product seldom shows.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHECK_EVERY = 5  # rounds between looks at whether the centres are stable, where each look waits for the device


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
    `max_rounds` rounds. A group that loses all its maps keeps its centre. Distances are computed in at least single
    precision, under autocast too; in single, half squared distances that differ by no more than about
    4e-7 * sqrt(C + H * W) of the squared norms of the maps, less the mean map of their sample, are a tie.

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
    centres = random_subset(count, channels, groups, generator=generator) if initial is None else initial
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        maps = _centred(features)
        norms = torch.linalg.vector_norm(maps, dim=2)
        centres = _settle(maps, norms, centres.to(maps.device, non_blocking=True), max_rounds=max_rounds)
        return _assign(maps, norms, centres), centres


def random_subset(
    count: int, channels: int, groups: int, *, generator: torch.Generator | None
) -> Int64[Tensor, "count groups"]:
    """Draw `groups` different channels for each of `count` samples, on the generator's device.

    Args:
        count: number of samples, 0 or more.
        channels: number of channels C that there are.
        groups: number of channels to draw, 1 to C.
        generator: what they are drawn from; by default PyTorch's own of the CPU.

    Raises:
        ValueError: fewer channels than groups.
    """
    check_groups(groups, channels=channels)
    device = torch.device("cpu") if generator is None else generator.device
    return torch.rand(count, channels, generator=generator, device=device).topk(groups, dim=1).indices


def check_groups(groups: int, *, channels: int) -> None:
    """Raise ValueError where a stage of so many channels cannot be grouped."""
    if not 1 <= groups <= channels:
        msg = f"groups: expected 1 to {channels}, the channels of the stage, got {groups}; lower it"
        raise ValueError(msg)


def _centred(features: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c n"]:
    maps = features.detach().flatten(2).contiguous()  # channels-last maps, too, are summed in one order
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return maps - maps.mean(1, keepdim=True)


def _settle(
    maps: Float[Tensor, "b c n"], norms: Float[Tensor, "b c"], centres: Int64[Tensor, "b g"], *, max_rounds: int
) -> Int64[Tensor, "b g"]:
    """Return the centres after `max_rounds` rounds; samples whose centres are stable take part in few more."""
    look = 1 if maps.device.type == "cpu" else CHECK_EVERY
    settled, rest = centres.clone(), torch.arange(len(maps), device=maps.device)
    for done in range(1, max_rounds + 1):
        moved = _move(maps, norms, _assign(maps, norms, centres), centres)
        if done % look == 0:
            going = (moved != centres).any(1).nonzero().squeeze(1)
            if len(going) <= len(rest) // 2:  # copying the maps of more than half would cost more than it saves
                settled[rest] = moved
                rest, maps, norms, moved = rest[going], maps[going], norms[going], moved[going]
            if len(going) == 0:
                break
        centres = moved
    settled[rest] = moved
    return settled


def _assign(
    maps: Float[Tensor, "b c n"], norms: Float[Tensor, "b c"], centres: Int64[Tensor, "b g"]
) -> Int64[Tensor, "b c"]:
    """Return the nearest centre of each map (eq. 1)."""
    chosen = maps.gather(1, centres[:, :, None].expand(-1, -1, maps.shape[2]))
    sizes = norms.gather(1, centres)[:, :, None]
    halves = sizes.square() / 2 - _products(chosen, maps.mT)
    return _lowest(halves, margin=_rounding(maps) * sizes * (sizes / 2 + norms[:, None]), dim=1)


def _move(
    maps: Float[Tensor, "b c n"],
    norms: Float[Tensor, "b c"],
    ids: Int64[Tensor, "b c"],
    centres: Int64[Tensor, "b g"],
) -> Int64[Tensor, "b g"]:
    """Return the map nearest to the mean of each group (eq. 2)."""
    members = (ids[:, None] == torch.arange(centres.shape[1], device=ids.device)[:, None]).to(maps.dtype)
    counts = members.sum(2, keepdim=True)
    shares = members / counts.clamp(min=1)
    means, sizes = _products(shares, maps), (shares * norms[:, None]).sum(2, keepdim=True)  # at least the means' norms
    norms = norms[:, None]
    halves = norms.square() / 2 - _products(means, maps.mT)
    nearest = _lowest(halves, margin=_rounding(maps) * norms * (norms / 2 + sizes), dim=2)
    return torch.where(counts.squeeze(2) > 0, nearest, centres)


def _products(left: Float[Tensor, "b i j"], right: Float[Tensor, "b j k"]) -> Float[Tensor, "b i k"]:
    """Return the samples' matrix products, of each the same whether alone or in a batch."""
    if len(left) == 1:  # threads share the work of a single product, and sum it in another order
        return torch.bmm(left.expand(2, -1, -1), right.expand(2, -1, -1))[:1]
    return torch.bmm(left, right)


def _rounding(maps: Float[Tensor, "b c n"]) -> float:
    """Return the relative error of a mean over channels and an inner product over space, which are sums.

    That of n terms, each rounded by up to eps / 2, is in practice within a small multiple of sqrt(n) * eps / 2 (Higham
    and Mary 2019, "A new approach to probabilistic rounding error analysis"); here twice that. The bound that always
    holds, n * eps / 2, would make ties of distances that differ.
    """
    return math.sqrt(sum(maps.shape[1:])) * torch.finfo(maps.dtype).eps


def _lowest(values: Float[Tensor, "b g c"], *, margin: Float[Tensor, "b g c"], dim: int) -> Int64[Tensor, "b k"]:
    """Return the first index along `dim` whose value may be the least: each is known to within its margin."""
    length = values.shape[dim]
    far = values - margin > (values + margin).amin(dim, keepdim=True)  # of no NaN, so that its index is valid, too
    indices = torch.arange(length, device=values.device)
    return torch.where(far, length, indices if dim == 2 else indices[:, None]).amin(dim)


def _check_initial(initial: Tensor, *, shape: tuple[int, int], channels: int) -> None:
    if initial.shape != shape:
        msg = f"initial: expected shape {shape}, got {tuple(initial.shape)}"
        raise ValueError(msg)
    if bool(((initial < 0) | (initial >= channels)).any()):  # waits for the device, which random centres need not
        msg = f"initial: expected channels in 0..{channels - 1}, got {initial.min():d} to {initial.max():d}"
        raise ValueError(msg)
