"""The images of calibrations and proofs: a folder's, a run's own, or noise where there is neither.

--images DIR        \
the run's data set   > shuffled, brought to the input's size --> ImageSet: float32 NCHW in [0, 1], labels, names, sha256
a seed              /
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch.nn import functional

from export import manifest as manifests
from training import augment, checkpoint, data, datasets

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of the noise; it stands in the manifest.
NOISE_SEED = 0

# Levels of an 8-bit image, which noise keeps to as photographs do.
_LEVELS = 255


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images to calibrate or to compare with.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1], on the grid of 8-bit images.
        description: what they are, for the reader of a manifest.
        names: of each image: a file's path below its folder, or a number.
        labels: each image's class as a number of the model's classes; None where they are not known.
        seed: of the noise, where they are noise.
    """

    images: Float32[np.ndarray, "n channels height width"]
    description: str
    names: tuple[str, ...]
    labels: Int64[np.ndarray, " n"] | None = None
    seed: int | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def record(self) -> manifests.Images:
        """What a manifest says of them."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).reshape(-1).data).hexdigest()
        return manifests.Images(description=self.description, n=len(self), sha256=digest, seed=self.seed)


def from_folder(
    folder: Path, *, count: int, image_shape: tuple[int, int, int], class_names: Sequence[str], after: int = 0
) -> ImageSet:
    """Read images of a folder of class folders, shuffled by a fixed seed.

    Images of a square input are resized and cropped at the centre; those of an oblong one must have its size. Labels
    are known where every folder has the name of a class.

    Args:
        folder: `folder`/CLASS/*.png|jpg.
        count: how many at most.
        image_shape: (C, H, W) of the engine's input.
        class_names: the engine's, in its order.
        after: leave out that many first images, which another use has taken, as far as there are enough.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: an image cannot be read, or has another size or number of channels than the engine takes.
    """
    return _chosen(data.from_folder(folder), f"images of {folder.name}", count, image_shape, class_names, after=after)


def from_run(run: Path, *, split: str, count: int, class_names: Sequence[str]) -> ImageSet:
    """Read images of the data set that a run was trained on, from its split "train" or "test".

    Raises:
        FileNotFoundError: the data set is not there (any more).
        ValueError: it cannot be read.
    """
    record = checkpoint.record(run)
    source = record.recipe.data
    root = None if source.root is None else Path(source.root)
    try:
        stored = datasets.find(source.name, split=split, root=root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or name a folder of images by --images") from error
    return _chosen(stored, f"{source.name} {split} images", count, record.input_shape, class_names, size=source.size)


def noise(*, count: int, image_shape: tuple[int, int, int], seed: int = NOISE_SEED) -> ImageSet:
    """Draw images of noise: smooth fields of several scales and contrasts, with grain, so that answers differ.

    They are no photographs: two engines that agree on them need not agree on the images that they will see.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = image_shape
    images = torch.full((count, *image_shape), 0.5)
    for cells in (2, 5, 11):
        field = torch.randn(count, channels, cells, cells, generator=generator)
        contrast = 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
        images += contrast * functional.interpolate(field, (height, width), mode="bilinear")
    images += 0.1 * torch.rand(count, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    levels = (images.clamp(0, 1) * _LEVELS).round().to(torch.uint8)
    names = tuple(map(str, range(count)))
    return ImageSet((levels.float() / _LEVELS).numpy(), f"noise of seed {seed}", names, seed=seed)


def _chosen(
    stored: data.Images,
    description: str,
    count: int,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    *,
    size: int | None = None,
    after: int = 0,
) -> ImageSet:
    # Image folders are sorted by class: without a shuffle the first images would be of one class.
    order = np.random.default_rng(0).permutation(len(stored))
    start = max(0, min(after, len(stored) - count))
    chosen = order[start:][:count]
    if start < after:
        description += ", some of the proof among them"
    part = stored.subset(chosen)
    if isinstance(part, data.ImageFiles) and size is None:
        size = _side(image_shape)
    read = part.read(size)
    images = augment.unit_range(torch.from_numpy(read.images)).numpy()
    if image_shape[0] == 1:
        images = _grey(images)
    if images.shape[1:] != image_shape:
        got = " x ".join(map(str, images.shape[1:]))
        expected = " x ".join(map(str, image_shape))
        raise ValueError(f"{description}: expected {expected} (channels, height, width), got {got}; resize them")
    names = part.paths if isinstance(part, data.ImageFiles) else tuple(str(index) for index in chosen)
    return ImageSet(images, description, names, _labels(read, class_names))


def _grey(images: Float32[np.ndarray, "n 3 height width"]) -> Float32[np.ndarray, "n 1 height width"]:
    """Return the luminance of ITU-R BT.601, as Pillow's mode L has it, on the grid of 8-bit images."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32).reshape(1, 3, 1, 1)
    grey = (images * weights).sum(axis=1, keepdims=True)
    return np.asarray(np.round(grey * _LEVELS) / np.float32(_LEVELS), dtype=np.float32)


def _side(image_shape: tuple[int, int, int]) -> int | None:
    """Return the side that images are brought to, in pixels; images of oblong inputs must have their size."""
    _, height, width = image_shape
    return height if height == width else None


def _labels(read: data.LabelledImages, class_names: Sequence[str]) -> Int64[np.ndarray, " n"] | None:
    if not set(read.class_names) <= set(class_names):
        return None
    numbers = np.array([list(class_names).index(name) for name in read.class_names], dtype=np.int64)
    return np.asarray(numbers[read.labels])
