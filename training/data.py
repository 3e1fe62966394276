"""What is learned from: labelled images, in memory or in files, and how some of them are chosen.

image folder by class -> `from_folder` -> ImageFiles (paths) -> `read` -> LabelledImages (uint8, NHWC, in memory)
either's labels -> `per_class`, `stratified` -> indices -> `subset`
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps

SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})
FORMATS = ("PNG", "JPEG")  # what a file may hold, whatever its name says
DEEP = ("I", "F")  # what Pillow's modes of more than 8 bits a channel begin with: I, I;16, I;16B, F


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images in memory, all of one size, with their class numbers.

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

    def read(self, size: int | None = None) -> LabelledImages:
        """Return these very images, as they are in memory.

        Raises:
            ValueError: there is a `size`, which is for files.
        """
        if size is not None:
            msg = f"data.size: expected none, as these images are all of {_size(self.images[0])} pixels, got {size}; "
            raise ValueError(msg + "leave it out")
        return self

    def fingerprint(self) -> str:
        """Return a sha256 of the class names, the shape, the images and the labels."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.images.shape]).encode())
        digest.update(np.ascontiguousarray(self.images).reshape(-1).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in PNG or JPEG files, which may differ in size, with their class numbers.

    `paths` are relative to `root`; `labels` are int64 (N,) and index `class_names`. A file is opened when its image
    is asked for, and not before.
    """

    root: Path
    paths: tuple[str, ...]
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def subset(self, indices: Int64[np.ndarray, " k"]) -> ImageFiles:
        """Return the images at `indices`, in that order."""
        paths = tuple(self.paths[index] for index in indices)
        return ImageFiles(self.root, paths, self.labels[indices], self.class_names)

    def image(self, index: int) -> Image.Image:
        """Return an image, in RGB of 8 bits a channel, turned as its EXIF data say.

        Raises:
            FileNotFoundError: the file is gone.
            PermissionError: the file may not be read.
            ValueError: the file is not a PNG or JPEG image of 8 bits a channel.
        """
        return _decoded(self.root / self.paths[index])

    def pixels(self, index: int, *, size: int | None = None) -> UInt8[np.ndarray, "height width 3"]:
        """Return an image's pixels; with `size`, those of its largest centred square, resized to that many a side.

        Raises:
            OSError, ValueError: as `image`.
        """
        image = self.image(index)
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8)

    def read(self, size: int | None = None) -> LabelledImages:
        """Return all images in memory: as they are, or with `size` as `pixels` makes them, for evaluation.

        Raises:
            OSError: a file is gone or may not be read.
            ValueError: a file cannot be decoded, or without `size` images differ in theirs.
        """
        first = self.pixels(0, size=size)
        images = np.empty((len(self), *first.shape), dtype=np.uint8)
        for index, path in enumerate(self.paths):
            pixels = self.pixels(index, size=size)
            if pixels.shape != first.shape:
                msg = f"{self.root / path}: expected {_size(first)} pixels like {self.root / self.paths[0]}, got "
                raise ValueError(msg + f"{_size(pixels)}; resize it, or give data.size")
            images[index] = pixels
        return LabelledImages(images, self.labels, self.class_names)

    def fingerprint(self) -> str:
        """Return a sha256 of the class names, the labels, and each file's relative path and contents.

        It reads every file: a copy elsewhere has the same fingerprint, which times of files cannot promise, and an
        image that is replaced by one of as many bytes has another.
        """
        digest = hashlib.sha256(json.dumps([self.class_names, self.labels.tolist(), self.paths]).encode())
        for path in self.paths:
            digest.update(_sha256_of(self.root / path))
        return digest.hexdigest()


Images = LabelledImages | ImageFiles


def from_folder(folder: Path) -> ImageFiles:
    """Find the images of a folder by class: `folder`/CLASS/*.png|jpg; classes are sorted by name.

    Raises:
        FileNotFoundError: there is no such folder, no class folder in it, or a class folder without images.
    """
    if not folder.is_dir():
        msg = f"{folder}: no such folder; expected {folder.name}/CLASS/*.png|jpg in {folder.parent}"
        raise FileNotFoundError(msg)
    class_folders = sorted(path for path in _visible(folder) if path.is_dir())
    if not class_folders:
        msg = f"{folder}: expected one folder per class in it, got none; put images in {folder}/CLASS/"
        raise FileNotFoundError(msg)
    return by_class(folder, {path.name: path for path in class_folders})


def by_class(root: Path, folders: dict[str, Path]) -> ImageFiles:
    """Find the images of each class in its folder below `root`; other files, and folders, are left alone.

    Raises:
        FileNotFoundError: a folder is not there, or without images.
    """
    found = [(path, label) for label, folder in enumerate(folders.values()) for path in _image_paths(folder)]
    return ImageFiles(
        root,
        tuple(path.relative_to(root).as_posix() for path, _ in found),
        np.array([label for _, label in found], dtype=np.int64),
        tuple(folders),
    )


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


def per_class(images: Images, *, count: int, seed: int) -> Int64[np.ndarray, " chosen"]:
    """Return the indices, rising, of `count` images of each class, drawn by the seed.

    Raises:
        ValueError: a class has fewer.
    """
    # apart from the draws of `stratified`, which follows with the same seed; fewer images are some of the more
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    chosen = np.zeros(len(images), dtype=bool)
    for label, name in enumerate(images.class_names):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        if len(members) < count:
            msg = f"data.per_class: expected at most the {len(members)} images of class {name!r}, got {count}; lower it"
            raise ValueError(msg)
        chosen[members[:count]] = True
    return np.flatnonzero(chosen).astype(np.int64)


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _image_paths(folder: Path) -> list[Path]:
    found = _visible(folder) if folder.is_dir() else []
    paths = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not paths:
        msg = f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), got none; add some or remove it"
        raise FileNotFoundError(msg)
    return paths


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            mode = image.mode
            decoded = ImageOps.exif_transpose(image).convert("RGB")
    except (PermissionError, FileNotFoundError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"{path}: expected a PNG or JPEG image, got a file that cannot be decoded; remove or replace it"
        raise ValueError(msg) from error
    if mode.startswith(DEEP):  # Pillow would cut their values off at 255
        msg = f"{path}: expected 8 bits per channel, got an image of mode {mode}; convert it"
        raise ValueError(msg)
    return decoded


def _sha256_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _size(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
