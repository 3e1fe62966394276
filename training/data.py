"""Named data sets, and the batches that a training loop takes from them.

name, split -> `load` -> LabelledImages (uint8, NHWC, in memory) -> `batches` -> float32 NCHW in [0, 1]
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from training import augment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SPLITS = ("train", "test")
SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})
FORMATS = ("PNG", "JPEG")  # what a file may hold, whatever its name says
DEEP = ("I", "F")  # what Pillow's modes of more than 8 bits a channel begin with: I, I;16, I;16B, F
DIGITS_SIZE = 32  # pixels; what small networks for natural images take
DIGITS_TEST = 0.28  # share of the 1,797 digits: about 500 images, a 95 % interval of +- 1 % at 98.5 %
DIGITS_SEED = 0  # of the split, which is part of the data set and not of a run


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their class numbers.

    `images` are uint8 (N, H, W, 3); `labels` are int64 (N,) and index `class_names`.
    """

    images: UInt8[np.ndarray, "n height width 3"]
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def subset(self, indices: Int64[np.ndarray, " k"]) -> LabelledImages:
        """Return the images at `indices`, in that order."""
        return LabelledImages(self.images[indices], self.labels[indices], self.class_names)

    def fingerprint(self) -> str:
        """Return a sha256 of the class names, the shape, the images and the labels."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.images.shape]).encode())
        digest.update(np.ascontiguousarray(self.images).reshape(-1).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def load(name: str, *, split: str, root: Path | None = None) -> LabelledImages:
    """Load one split, "train" or "test", of a data set.

    "digits" are scikit-learn's 1,797 handwritten digits, enlarged to 32 x 32 pixels, with a fixed stratified
    split. "folder" is an image folder by class, `root`/`split`/CLASS/*.png|jpg, all of one size.

    Raises:
        ValueError: unknown name or split, a root too many or too few, or images that cannot be used.
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if name not in LOADERS:
        msg = f"data set: expected one of {', '.join(LOADERS)}, got {name!r}"
        raise ValueError(msg)
    if split not in SPLITS:
        msg = f"split: expected one of {', '.join(SPLITS)}, got {split!r}"
        raise ValueError(msg)
    return LOADERS[name](split, root)


def from_folder(folder: Path) -> LabelledImages:
    """Load an image folder by class: `folder`/CLASS/*.png|jpg; classes are sorted by name.

    Raises:
        FileNotFoundError: there is no such folder, no class folder in it, or a class folder without images.
        PermissionError: a file may not be read.
        ValueError: a file is not a PNG or JPEG image of 8 bits a channel, or the images differ in size.
    """
    if not folder.is_dir():
        msg = f"{folder}: no such folder; expected {folder.name}/CLASS/*.png|jpg in {folder.parent}"
        raise FileNotFoundError(msg)
    class_folders = sorted(path for path in _visible(folder) if path.is_dir())
    if not class_folders:
        msg = f"{folder}: expected one folder per class in it, got none; put images in {folder}/CLASS/"
        raise FileNotFoundError(msg)
    paths = [(path, label) for label, parent in enumerate(class_folders) for path in _image_paths(parent)]
    first = _pixels(paths[0][0])
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for index, (path, _) in enumerate(paths):
        pixels = _pixels(path)
        if pixels.shape != first.shape:
            msg = f"{path}: expected {_size(first)} pixels like {paths[0][0]}, got {_size(pixels)}; resize it"
            raise ValueError(msg)
        images[index] = pixels
    labels = np.array([label for _, label in paths], dtype=np.int64)
    return LabelledImages(images, labels, tuple(path.name for path in class_folders))


def stratified(
    labels: Int64[np.ndarray, " n"], *, fraction: float, seed: int
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held"]]:
    """Split indices into those kept and those held out.

    Held out is `fraction` of each class, rounded, but at least one image and never all of them.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held[members[:count]] = True
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def unit_range(images: UInt8[Tensor, "n height width 3"]) -> Float[Tensor, "n 3 height width"]:
    """Turn uint8 NHWC into float32 NCHW in [0, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 255


def batches(
    images: UInt8[Tensor, "n height width 3"],
    labels: Int64[Tensor, " n"],
    *,
    batch_size: int,
    generator: torch.Generator,
    crop_padding: int = 0,
    flip: bool = False,
) -> Iterator[tuple[Float[Tensor, "batch 3 height width"], Int64[Tensor, " batch"]]]:
    """Yield one epoch of shuffled, augmented batches, on the device of the images.

    Images come out as float32 NCHW in [0, 1]. What does not fill a last batch is left out of this epoch, so
    that batch statistics are of equal weight; a data set smaller than a batch is one batch.
    """
    order = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
    for index in range(steps(len(images), batch_size=batch_size)):
        chosen = order[index * batch_size : (index + 1) * batch_size]
        batch = augment.crop(images[chosen], padding=crop_padding, generator=generator)
        if flip:
            batch = augment.flip(batch, generator=generator)
        yield unit_range(batch), labels[chosen]


def steps(count: int, *, batch_size: int) -> int:
    """Return the number of batches in an epoch over `count` images."""
    return max(1, count // batch_size)


def _digits(split: str, root: Path | None) -> LabelledImages:
    if root is not None:
        msg = f"root: expected none, as the digits come with scikit-learn, got {root}; leave it out"
        raise ValueError(msg)
    from sklearn.datasets import load_digits  # noqa: PLC0415  # a second to import, and only these need it

    digits = load_digits()
    small = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # their grey levels are 0 to 16
    large = functional.interpolate(small, size=(DIGITS_SIZE, DIGITS_SIZE), mode="bilinear", align_corners=False)
    images = large.round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
    labels = digits.target.astype(np.int64)
    train, test = stratified(labels, fraction=DIGITS_TEST, seed=DIGITS_SEED)
    names = tuple(str(digit) for digit in range(10))
    return LabelledImages(images, labels, names).subset(train if split == "train" else test)


def _folder(split: str, root: Path | None) -> LabelledImages:
    if root is None:
        msg = "root: expected the folder that holds train/ and test/, got none; give data.root"
        raise ValueError(msg)
    if not root.is_dir():
        msg = f"{root}: no such folder; expected it to hold train/CLASS/*.png|jpg and test/CLASS/*.png|jpg"
        raise FileNotFoundError(msg)
    return from_folder(root / split)


LOADERS: dict[str, Callable[[str, Path | None], LabelledImages]] = {"digits": _digits, "folder": _folder}


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _image_paths(folder: Path) -> list[Path]:
    paths = sorted(path for path in _visible(folder) if path.suffix.lower() in SUFFIXES)
    if not paths:
        msg = f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), got none; add some or remove it"
        raise FileNotFoundError(msg)
    return paths


def _pixels(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            mode = image.mode
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"{path}: expected a PNG or JPEG image, got a file that cannot be decoded; remove or replace it"
        raise ValueError(msg) from error
    if mode.startswith(DEEP):  # Pillow would cut their values off at 255
        msg = f"{path}: expected 8 bits per channel, got an image of mode {mode}; convert it"
        raise ValueError(msg)
    return pixels


def _size(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
