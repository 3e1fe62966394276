"""Batched augmentations of images, on the images' device, none of them a loop over samples.

uint8 NHWC -> crop -> flip -.-> clean view -------.
                            |                     +-> cutout -> random erasing -> float32 NCHW in [0, 1]
                            '-> AugMix, 0 to 2 ---'

Each takes the stream that it draws from, which gives the same augmentations on all devices; what is switched
off draws nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from training import augmix
from training.recipe import Augmentation, AugMix
from training.stream import Stream

GREY = 0.5  # what cutout fills with: the middle of the range, and what models normalise to 0 unless told otherwise
AREA = (0.02, 0.4)  # share of an image that random erasing replaces (Zhong et al. 2020, section 4.2: s_l, s_h)
FLATTEST = 0.3  # ratio of sides of the flattest rectangle (the same: r_1); the tallest has its inverse
NOISE_BYTES = 7  # of the 8 in a drawn number; int64 has no 2**64 to stay below


def views(
    images: UInt8[Tensor, "batch height width 3"], settings: Augmentation, *, stream: Stream
) -> list[Float[Tensor, "batch 3 height width"]]:
    """Return the augmented views of a batch, float32 NCHW in [0, 1], that training sees.

    One view, which AugMix mixes if there is such a section; with a weight for its Jensen-Shannon term three: the
    clean view and two mixed ones. All are of the same crop and flip, as published. Cutout and random erasing come
    last and fall on every view, the clean one too, each in a place of its own.
    """
    images = crop(images, padding=settings.crop_padding, stream=stream)
    if settings.flip:
        images = flip(images, stream=stream)
    return [_occluded(view, settings, stream=stream) for view in _mixed(images, settings.augmix, stream=stream)]


def unit_range(images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Turn uint8 NHWC into float32 NCHW in [0, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 255


def crop(
    images: UInt8[Tensor, "batch height width 3"], *, padding: int, stream: Stream
) -> UInt8[Tensor, "batch height width 3"]:
    """Shift each image by up to `padding` pixels either way; what enters from outside is black."""
    if padding == 0:
        return images
    count, height, width, _ = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    top, left = stream.integers(2 * padding + 1, count, 2).to(images.device, non_blocking=True).unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    samples = torch.arange(count, device=images.device)
    return padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(images: UInt8[Tensor, "batch height width 3"], *, stream: Stream) -> UInt8[Tensor, "batch height width 3"]:
    """Mirror each image left to right with probability one half."""
    mirrored = stream.uniform(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored.to(images.device, non_blocking=True), images.flip(2), images)


def cutout(
    images: Float[Tensor, "batch 3 height width"], *, side: int, stream: Stream
) -> Float[Tensor, "batch 3 height width"]:
    """Blot out a square of `side` pixels in each image of range [0, 1] (DeVries and Taylor 2017, section 3.2).

    Its centre is any pixel, so part of it may lie outside. The paper fills it with 0 after normalisation, which is
    the mean of the training images; here models normalise, so it is filled with mid-grey: 0 after a recipe's
    default normalisation, close to it after that of other natural images.
    """
    if side == 0:
        return images
    count, _, height, width = images.shape
    top = stream.integers(height, count) - side // 2
    left = stream.integers(width, count) - side // 2
    sides = torch.full_like(top, side)
    square = _rectangles(
        torch.stack((top, left, sides, sides), 1).to(images.device, non_blocking=True), height=height, width=width
    )
    return images.masked_fill(square, GREY)


def random_erasing(
    images: Float[Tensor, "batch 3 height width"], *, probability: float, stream: Stream
) -> Float[Tensor, "batch 3 height width"]:
    """Replace a rectangle of each image by noise with `probability` (Zhong et al. 2020, algorithm 1).

    Its area is 2 % to 40 % of the image and its ratio of height to width 0.3 to 1 / 0.3, both uniform; each value
    in it is one of 0/255..255/255 of its own, the paper's best choice (table 6, RE-R). A side that is longer than
    the image's is cut to it, where the paper draws again: few are, and then the area is a little smaller.
    """
    if probability == 0:
        return images
    count, _, height, width = images.shape
    erased, share, shape, above, before = stream.uniform(count, 5).unbind(1)
    area = (AREA[0] + (AREA[1] - AREA[0]) * share) * height * width
    ratio = FLATTEST + (1 / FLATTEST - FLATTEST) * shape
    rows = (area * ratio).sqrt().round().clamp(max=height) * (erased < probability)  # no rows, nothing erased
    columns = (area / ratio).sqrt().round().clamp(max=width)
    top, left = (above * (height - rows + 1)).floor(), (before * (width - columns + 1)).floor()
    places = torch.stack((top, left, rows, columns), 1).long().to(images.device, non_blocking=True)
    return torch.where(_rectangles(places, height=height, width=width), _noise(images, stream=stream), images)


def _mixed(
    images: UInt8[Tensor, "batch height width 3"], settings: AugMix | None, *, stream: Stream
) -> list[Float[Tensor, "batch 3 height width"]]:
    clean = unit_range(images)
    if settings is None:
        return [clean]
    if settings.jsd == 0:
        return [augmix.mix(images, settings, stream=stream)]
    return [clean, *(augmix.mix(images, settings, stream=stream) for _ in range(2))]


def _occluded(
    view: Float[Tensor, "batch 3 height width"], settings: Augmentation, *, stream: Stream
) -> Float[Tensor, "batch 3 height width"]:
    view = cutout(view, side=settings.cutout, stream=stream)
    return random_erasing(view, probability=settings.random_erasing, stream=stream)


def _rectangles(places: Int64[Tensor, "batch 4"], *, height: int, width: int) -> Bool[Tensor, "batch 1 height width"]:
    """Return which pixels lie in each image's rectangle of (top, left, rows, columns); it may reach outside."""
    top, left, rows, columns = places[:, :, None].unbind(1)
    vertical = torch.arange(height, device=places.device) - top
    horizontal = torch.arange(width, device=places.device) - left
    inside_rows, inside_columns = (vertical >= 0) & (vertical < rows), (horizontal >= 0) & (horizontal < columns)
    return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]


def _noise(images: Float[Tensor, "batch 3 height width"], *, stream: Stream) -> Float[Tensor, "batch 3 height width"]:
    """Return noise of the images' shape that takes the values of 8 bits.

    Seven values are cut from each number that is drawn, as the numbers of the images of all processes are drawn on
    the CPU: one number a value would take longer than a training step on large images.
    """
    values = images[0].numel()
    numbers = stream.integers(2 ** (8 * NOISE_BYTES), len(images), -(-values // NOISE_BYTES)).to(
        images.device, non_blocking=True
    )
    noise = numbers.view(torch.uint8).reshape(len(images), -1, 8)[:, :, :NOISE_BYTES]  # the lowest bytes come first
    return noise.flatten(1)[:, :values].reshape(images.shape).to(images.dtype) / 255
