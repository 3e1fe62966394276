"""Data sets in one npz file: NumPy arrays by name, as MedMNIST's files have them.

FILE.npz -> images and labels of a split, class names -> checked -> LabelledImages
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from training.data import LabelledImages

KEYS = ("train_images", "train_labels", "test_images", "test_labels")  # class_names may come with them

Array = np.ndarray[Any, np.dtype[Any]]


def read(split: str, path: Path) -> LabelledImages:
    """Read one split, "train" or "test", of a file with train_images, train_labels, test_images and test_labels.

    Images are uint8 (N, H, W, 3), or grey (N, H, W) or (N, H, W, 1); labels are integers from 0, (N,) or (N, 1).
    Classes are named by class_names, texts (K,), where there are any, and by their numbers otherwise. Other arrays
    are left alone: MedMNIST's validation split, too, as what is validated with is held out of the training split.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an npz file, or its arrays are others.
    """
    if not path.is_file():
        msg = f"{path}: no such file; expected an npz file of {', '.join(KEYS)}"
        raise FileNotFoundError(msg)
    arrays = _arrays(path, [f"{split}_images", "train_labels", "test_labels", "class_names"])
    labels = {key: _labels(arrays[key], where=f"{path}: {key}") for key in ("train_labels", "test_labels")}
    names = _class_names(arrays.get("class_names"), labels, path=path)
    images = _images(arrays[f"{split}_images"], where=f"{path}: {split}_images")
    if len(images) != len(labels[f"{split}_labels"]):
        msg = f"{path}: expected a label for each of the {len(images)} images of {split}_images, got "
        raise ValueError(msg + f"{len(labels[f'{split}_labels'])} in {split}_labels")
    return LabelledImages(images, labels[f"{split}_labels"], names)


def _arrays(path: Path, wanted: list[str]) -> dict[str, Array]:
    """Return those of the arrays that are there; only their parts of the file are read."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        with np.load(path, allow_pickle=False) as file:
            if missing := [key for key in KEYS if key not in file]:
                there = ", ".join(file.files) or "none"
            arrays = {} if missing else {key: file[key] for key in wanted if key in file}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:  # ValueError of arrays that need pickle
        msg = f"{path}: expected an npz file of numbers and texts, got another or a damaged one ({error}); "
        raise ValueError(msg + "write it by numpy.savez_compressed") from error
    if missing:
        msg = f"{path}: expected the arrays {', '.join(KEYS)}, got {there}; add {', '.join(missing)}"
        raise ValueError(msg)
    return arrays


def _labels(labels: Array, *, where: str) -> Int64[np.ndarray, " n"]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype.kind not in "iu" or int(labels.min()) < 0:
        msg = f"{where}: expected integers from 0, of shape (N,) or (N, 1), got {_kind(labels)}"
        raise ValueError(msg + (f" from {labels.min()}" if labels.size and labels.dtype.kind == "i" else ""))
    return labels.astype(np.int64)


def _images(images: Array, *, where: str) -> UInt8[np.ndarray, "n height width 3"]:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.size == 0 or images.dtype != np.uint8:
        msg = f"{where}: expected uint8 of shape (N, H, W, 3), or (N, H, W) for grey ones, got {_kind(images)}"
        raise ValueError(msg)
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))


def _class_names(names: Array | None, labels: dict[str, Int64[np.ndarray, " _"]], *, path: Path) -> tuple[str, ...]:
    classes = 1 + max(int(array.max()) for array in labels.values())
    if names is None:
        return tuple(str(number) for number in range(classes))
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != len(names) or len(names) < classes:
        msg = f"{path}: class_names: expected {classes} or more different texts, as labels go to {classes - 1}, got "
        raise ValueError(msg + _kind(names))
    return tuple(str(name) for name in names)


def _kind(array: Array) -> str:
    return f"{array.dtype} of shape {array.shape}"
