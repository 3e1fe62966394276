"""The images of calibrations and proofs: a folder's, a run's own, or noise where there is neither.

--images DIR        \
the run's data set   > shuffled --pictures: to the input size--> ImageSet: float32 NCHW in [0, 1], labels, names, sha256
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
from export import pictures
from export.manifest import Preprocessing
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


@dataclass(frozen=True)
class Share:
    """How many images of a folder a proof and a calibration want; each gets images of its own, while there are two.

    Attributes:
        proof: how many to compare on, at most.
        calibration: how many to calibrate on, at most; 0 where there is nothing to calibrate.
    """

    proof: int
    calibration: int = 0

    def of(self, total: int) -> tuple[slice, slice]:
        """Return which of `total` shuffled images the proof and the calibration get; few are shared in proportion."""
        if total >= self.proof + self.calibration:
            proof = self.proof
        else:
            proof = max(1, round(total * self.proof / (self.proof + self.calibration)))
            if self.calibration and total > 1:
                proof = min(proof, total - 1)
        rest = slice(proof, proof + self.calibration) if total > proof else slice(0, total)
        return slice(0, proof), rest


def from_folder(
    folder: Path,
    *,
    share: Share,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 - it is frozen
    to_calibrate: bool = False,
) -> ImageSet:
    """Read images of a folder of class folders, shuffled by a fixed seed.

    They are brought to the input's size as servers do it. Labels are known where every folder has the name of a class.

    Args:
        folder: `folder`/CLASS/*.png|jpg.
        share: how many images the two uses want.
        image_shape: (C, H, W) of the engine's input.
        class_names: the engine's, in its order.
        preprocessing: how images come to that shape (`Manifest.preprocessing`).
        to_calibrate: return the images for calibration, and not those of the proof.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: an image cannot be read, or the engine takes neither grey nor RGB images.
    """
    stored, description = data.from_folder(folder), f"images of {folder.resolve().name}"
    part = share.of(len(stored))[to_calibrate]
    if to_calibrate and part.start == 0:
        description += ", the proof's own"
    return _chosen(stored, description, part, image_shape, class_names, preprocessing=preprocessing)


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
    description, part = f"{source.name} {split} images", slice(0, count)
    return _chosen(stored, description, part, record.input_shape, class_names)


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
    part: slice,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    *,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 - as above
) -> ImageSet:
    # Image folders are sorted by class: without a shuffle the first images would be of one class.
    chosen = np.random.default_rng(0).permutation(len(stored))[part]
    subset = stored.subset(chosen)
    if isinstance(subset, data.ImageFiles):
        images, names = _read(subset, image_shape, preprocessing), subset.paths
    else:
        images, names = _unit_range(subset, image_shape), tuple(str(index) for index in chosen)
    if images.shape[1:] != image_shape:
        got = " x ".join(map(str, images.shape[1:]))
        expected = " x ".join(map(str, image_shape))
        raise ValueError(f"{description}: expected {expected} (channels, height, width), got {got}; resize them")
    strange = sorted(set(subset.class_names) - set(class_names))
    if strange:
        description += f" (no accuracy: {strange[0]!r} is no class of the model)"
    return ImageSet(images, description, names, None if strange else _labels(subset, class_names))


def _read(
    files: data.ImageFiles, image_shape: tuple[int, int, int], preprocessing: Preprocessing
) -> Float32[np.ndarray, "n channels height width"]:
    images = np.empty((len(files), *image_shape), np.float32)
    for place, relative in zip(images, files.paths, strict=True):
        path = files.root / relative
        try:
            pixels = pictures.pixels(path.read_bytes(), image_shape=image_shape, preprocessing=preprocessing)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        pictures.unit_range(pixels, out=place)
    return images


def _unit_range(
    stored: data.LabelledImages, image_shape: tuple[int, int, int]
) -> Float32[np.ndarray, "n channels height width"]:
    images = augment.unit_range(torch.from_numpy(stored.images)).numpy()
    return _grey(images) if image_shape[0] == 1 else images


def _grey(images: Float32[np.ndarray, "n 3 height width"]) -> Float32[np.ndarray, "n 1 height width"]:
    """Return the luminance of ITU-R BT.601, as Pillow's mode L has it, on the grid of 8-bit images."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32).reshape(1, 3, 1, 1)
    grey = (images * weights).sum(axis=1, keepdims=True)
    return np.asarray(np.round(grey * _LEVELS) / np.float32(_LEVELS), dtype=np.float32)


def _labels(read: data.Images, class_names: Sequence[str]) -> Int64[np.ndarray, " n"]:
    numbers = np.array([list(class_names).index(name) for name in read.class_names], dtype=np.int64)
    return np.asarray(numbers[read.labels])
