"""AugMix (Hendrycks et al. 2020): images mixed with randomly processed ones, and the loss that ties their views.

uint8 NHWC -.-> chain 1: operation -> operation -> ... -.
            |-> chain 2: operation                      +-> Dirichlet sum -.
            |-> ...                                     |                  +-> Beta sum -> float32 NCHW in [0, 1]
            |-> chain `width` --------------------------'                  |
            '-> clean -----------------------------------------------------'

An operation takes all images that drew it at once, on their device. As in the published code, which calls Pillow,
images are of 8 bits between operations; tests compare each operation with Pillow's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from training.recipe import AugMix
from training.stream import Stream

WEAKEST = 0.1  # the least level that is drawn
STRONGEST = 10.0  # the level that each operation's greatest change belongs to
RANDOM_DEPTHS = 3  # a chain of random depth has 1 to 3 operations
ROTATION, SHEAR, SHIFT = 30.0, 0.3, 1 / 3  # greatest changes: degrees, slope, share of the side
POSTERIZED, SOLARIZED, ENHANCED = 4.0, 256.0, 1.8  # the same: bits, grey levels, factor; an enhancement is 0.1 more
SMALLEST = 1e-7  # probability that a mixture is clamped to
ROUNDING = 1 / 64  # grey levels; Pillow cuts fractions off, which must not turn 99.999 for 100 into 99
LUMA = (19595, 38470, 7471)  # of 65536; Pillow's weights of red, green and blue in grey
SMOOTH = ((1, 1, 1), (1, 5, 1), (1, 1, 1))  # of 13; Pillow's smoothing filter

Images = UInt8[Tensor, "n 3 height width"]
Levels = Float[Tensor, " n"]


def mix(
    images: UInt8[Tensor, "batch height width 3"], settings: AugMix, *, stream: Stream
) -> Float[Tensor, "batch 3 height width"]:
    """Return one mixed view of each image, float32 NCHW in [0, 1] (algorithm 1).

    (1 - m) * image + m * sum_i w_i * chain_i(image), m from Beta(alpha, alpha) and w from Dirichlet(alpha). The
    published code mixes normalised images: that is the same, as the weights sum to one and normalisation is affine.
    """
    count, width = len(images), settings.width
    clean = images.permute(0, 3, 1, 2).contiguous()
    weights = stream.dirichlet(settings.alpha, count, width).to(images.device, non_blocking=True)
    share = stream.beta(settings.alpha, count).to(images.device, non_blocking=True)
    chains = _chains(clean.repeat_interleave(width, 0), settings, stream=stream)
    chains = chains.reshape(count, width, *clean.shape[1:])
    mixture = (weights[:, :, None, None, None] * chains.float()).sum(1)
    return (clean.float().lerp(mixture, share[:, None, None, None]) / 255).clamp(0, 1)


def jensen_shannon(logits: Sequence[Float[Tensor, "batch classes"]]) -> Float[Tensor, ""]:
    """Return the Jensen-Shannon divergence between the predictions of views, in nats, differentiable (eq. 2).

    The views' mean Kullback-Leibler divergence to their mixture, which is clamped to [1e-7, 1] as published, as a
    mean over images; computed in at least single precision.
    """
    views = torch.stack(list(logits))
    logarithms = functional.log_softmax(views.to(torch.promote_types(views.dtype, torch.float32)), dim=2)
    mixture = logarithms.exp().mean(0).clamp(SMALLEST, 1).log()
    # with logarithms as target, a probability that underflows to 0 has a gradient of 0 and not of nan
    return functional.kl_div(
        mixture.expand_as(logarithms).flatten(0, 1), logarithms.flatten(0, 1), reduction="batchmean", log_target=True
    )


def _chains(images: Images, settings: AugMix, *, stream: Stream) -> Images:
    """Return images after a chain of operations each; the `width` copies of an image are neighbours."""
    count, width = len(images) // settings.width, settings.width
    names = PUBLISHED + OVERLAPPING if settings.all_operations else PUBLISHED
    depth = RANDOM_DEPTHS if settings.depth < 0 else settings.depth
    choices = stream.integers(len(names), count, width, depth).flatten(0, 1)
    levels, signs = stream.uniform(count, 2, width, depth).unbind(1)
    levels = (WEAKEST + (settings.severity - WEAKEST) * levels).flatten(0, 1)
    signs = torch.where(signs > 0.5, -1.0, 1.0).flatten(0, 1)
    if settings.depth < 0:
        ends = 1 + stream.integers(RANDOM_DEPTHS, count, width).flatten()
        choices = choices.masked_fill(torch.arange(depth) >= ends[:, None], len(names))  # no operation's number
    for step in range(depth):
        images = _operate(images, names, choices[:, step], levels=levels[:, step], signs=signs[:, step])
    return images


def _operate(
    images: Images, names: tuple[str, ...], choices: Int64[Tensor, " n"], *, levels: Levels, signs: Levels
) -> Images:
    """Return each image after the operation that it chose; choices, levels and signs are on the CPU.

    There, the number of images that an operation takes is known without waiting for the device.
    """
    images = images.clone()
    height, width = images.shape[2:]
    moved, matrices = [], []
    for number, name in enumerate(names):
        chosen = (choices == number).nonzero().squeeze(1)
        if len(chosen) == 0:
            continue
        if name in GEOMETRIC:
            moved.append(chosen)
            matrices.append(GEOMETRIC[name](levels[chosen], signs[chosen], height, width))
        else:
            here = chosen.to(images.device, non_blocking=True)
            images[here] = POINTWISE[name](images[here], levels[chosen].to(images.device, non_blocking=True))
    if moved:
        here = torch.cat(moved).to(images.device, non_blocking=True)
        images[here] = _transformed(images[here], torch.cat(matrices).to(images.device, non_blocking=True))
    return images


def _transformed(images: Images, matrices: Float[Tensor, "n 2 3"]) -> Images:
    """Return each image with pixel (x, y) taken from where its matrix sends (x, y, 1), or black from outside.

    Coordinates are in pixels, the first one's centre at (0.5, 0.5). Bilinear; within half a pixel of the border,
    the border's pixels are repeated, as in Pillow.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device) + 0.5
    across, down, offset = matrices[:, :, :, None, None].unbind(2)
    sources = across * x + down * y[:, None] + offset  # (n, 2, height, width): x, y
    size = torch.tensor((width, height), device=images.device)[:, None, None]
    inside = ((sources >= 0) & (sources < size)).all(1, keepdim=True)
    grid = (2 * sources / size - 1).permute(0, 2, 3, 1)
    sampled = functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return (sampled + ROUNDING).byte() * inside


def _rotation(levels: Levels, signs: Levels, height: int, width: int) -> Float[Tensor, "n 2 3"]:
    angles = torch.deg2rad(signs * _whole(levels, ROTATION))
    cosine, sine = angles.cos(), angles.sin()
    x, y = width / 2, height / 2  # the centre, which stays
    return _matrices(len(levels), cosine, -sine, x - x * cosine + y * sine, sine, cosine, y - x * sine - y * cosine)


def _shear_x(levels: Levels, signs: Levels, _height: int, _width: int) -> Float[Tensor, "n 2 3"]:
    return _matrices(len(levels), 1.0, signs * _part(levels, SHEAR), 0.0, 0.0, 1.0, 0.0)


def _shear_y(levels: Levels, signs: Levels, _height: int, _width: int) -> Float[Tensor, "n 2 3"]:
    return _matrices(len(levels), 1.0, 0.0, 0.0, signs * _part(levels, SHEAR), 1.0, 0.0)


def _translation_x(levels: Levels, signs: Levels, _height: int, width: int) -> Float[Tensor, "n 2 3"]:
    return _matrices(len(levels), 1.0, 0.0, signs * _whole(levels, width * SHIFT), 0.0, 1.0, 0.0)


def _translation_y(levels: Levels, signs: Levels, height: int, _width: int) -> Float[Tensor, "n 2 3"]:
    return _matrices(len(levels), 1.0, 0.0, 0.0, 0.0, 1.0, signs * _whole(levels, height * SHIFT))


def _autocontrast(images: Images, _levels: Levels) -> Images:
    """Stretch the values of each channel to 0..255; a flat channel stays."""
    low, high = images.amin((2, 3), keepdim=True).int(), images.amax((2, 3), keepdim=True).int()
    stretched = (images - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.byte(), images)


def _equalize(images: Images, _levels: Levels) -> Images:
    """Make the values of each channel about equally frequent; one of fewer than 255 pixels below its top stays."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    top = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - top) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(2, values).reshape(images.shape).byte()
    return torch.where((step > 0)[..., None], equalized, images)


def _posterize(images: Images, levels: Levels) -> Images:
    """Keep 4 or fewer of the highest bits."""
    dropped = (8 - POSTERIZED + _whole(levels, POSTERIZED)).to(torch.int32)[:, None, None, None]
    return ((images >> dropped) << dropped).byte()


def _solarize(images: Images, levels: Levels) -> Images:
    """Turn the values from a threshold on into their negatives."""
    threshold = (256 - _whole(levels, SOLARIZED)).to(torch.int32)[:, None, None, None]
    return torch.where(images >= threshold, 255 - images, images)


def _color(images: Images, levels: Levels) -> Images:
    return _blended(_grey(images), images, levels)


def _contrast(images: Images, levels: Levels) -> Images:
    mean = (_grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blended(mean, images, levels)


def _brightness(images: Images, levels: Levels) -> Images:
    return _blended(torch.zeros_like(images), images, levels)


def _sharpness(images: Images, levels: Levels) -> Images:
    """Blend with the smoothed image, whose border is that of the image."""
    kernel = torch.tensor(SMOOTH, dtype=torch.float32, device=images.device).expand(3, 1, 3, 3)
    smooth = images.clone()
    inner = functional.conv2d(images.float(), kernel, groups=3)  # sums of whole numbers, exact in any order
    smooth[:, :, 1:-1, 1:-1] = ((2 * inner.int() + 13) // 26).byte()
    return _blended(smooth, images, levels)


def _blended(degenerate: Tensor, images: Images, levels: Levels) -> Images:
    """Blend with a degenerate image: a factor below 1 moves towards it, one above 1 away from it."""
    factors = (0.1 + _part(levels, ENHANCED))[:, None, None, None]
    return (degenerate + factors * (images.float() - degenerate)).clamp(0, 255).byte()


def _grey(images: Images) -> Float[Tensor, "n 1 height width"]:
    weights = torch.tensor(LUMA, dtype=torch.int32, device=images.device)[:, None, None]
    return (((images * weights).sum(1, keepdim=True) + (1 << 15)) >> 16).float()


def _part(levels: Levels, greatest: float) -> Levels:
    return levels * greatest / STRONGEST


def _whole(levels: Levels, greatest: float) -> Levels:
    return _part(levels, greatest).floor()


def _matrices(count: int, *entries: Tensor | float) -> Float[Tensor, "{count} 2 3"]:
    """Return `count` affine matrices from their six entries, row by row; numbers are those of all."""
    columns = [torch.as_tensor(entry, dtype=torch.float32).expand(count) for entry in entries]
    return torch.stack(columns, 1).reshape(count, 2, 3)


PUBLISHED = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
OVERLAPPING = ("color", "contrast", "brightness", "sharpness")  # with the corruptions of the benchmark

GEOMETRIC: dict[str, Callable[[Levels, Levels, int, int], Tensor]] = {
    "rotate": _rotation,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translation_x,
    "translate_y": _translation_y,
}
POINTWISE: dict[str, Callable[[Images, Levels], Images]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
