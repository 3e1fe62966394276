"""Batched augmentations of uint8 images, on the images' device: crop and flip.

Each takes the generator that it draws from. A CPU generator serves images on any device, and gives the same
augmentations on all of them.
"""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional


def crop(
    images: UInt8[Tensor, "batch height width 3"], *, padding: int, generator: torch.Generator
) -> UInt8[Tensor, "batch height width 3"]:
    """Shift each image by up to `padding` pixels either way; what enters from outside is black."""
    if padding == 0:
        return images
    count, height, width, _ = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=generator.device)
    top, left = offsets.to(images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    samples = torch.arange(count, device=images.device)
    return padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(
    images: UInt8[Tensor, "batch height width 3"], *, generator: torch.Generator
) -> UInt8[Tensor, "batch height width 3"]:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    return torch.where(mirrored.to(images.device), images.flip(2), images)
