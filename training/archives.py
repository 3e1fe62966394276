"""Published data sets, in the layouts that their archives unpack to.

public address -> `fetch` -> root/FOLDER -> `cifar10`, `cifar100` -> LabelledImages
                                        -> `tiny_imagenet`, `cub_200_2011` -> ImageFiles
"""

from __future__ import annotations

import fcntl
import http.client
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training import data
from training.data import ImageFiles, LabelledImages

LOCK = ".download.lock"  # in the root; whoever holds it downloads
TRAINING = "1"  # what CUB's train_test_split.txt says of a training image


@dataclass(frozen=True)
class Archive:
    """Where a data set is published: its address, the archive's md5, and the folder that it unpacks to."""

    url: str
    md5: str
    folder: str


CIFAR10 = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"
)
CIFAR100 = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"
)
TINY_IMAGENET = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", "tiny-imagenet-200"
)
CUB_200_2011 = Archive(
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    "97eceeb196236b17998738112f37df78",
    "CUB_200_2011",
)


def fetch(archive: Archive, root: Path) -> None:
    """Download and unpack an archive into `root`, unless its folder is there.

    One process of a machine does so at a time, and the folder appears whole or not at all.

    Raises:
        OSError: the download failed.
    """
    if (root / archive.folder).exists():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not (root / archive.folder).exists():
                _unpack(archive, root)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError is torchvision's, of a wrong md5
        reason = (str(error) or type(error).__name__).splitlines()[0]
        msg = f"{archive.url}: the download into {root} failed: {reason}; try again, or unpack the archive there"
        raise OSError(msg) from error


def cifar10(split: str, root: Path) -> LabelledImages:
    """Read CIFAR-10 (Krizhevsky 2009) from `root`/cifar-10-batches-py.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its files are not the published ones.
    """
    from torchvision.datasets import CIFAR10 as Published  # noqa: N811, PLC0415  # a second to import

    return _cifar(Published, CIFAR10, split, root)


def cifar100(split: str, root: Path) -> LabelledImages:
    """Read CIFAR-100 (Krizhevsky 2009), with its fine labels, from `root`/cifar-100-python.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its files are not the published ones.
    """
    from torchvision.datasets import CIFAR100 as Published  # noqa: N811, PLC0415  # a second to import

    return _cifar(Published, CIFAR100, split, root)


def tiny_imagenet(split: str, root: Path) -> ImageFiles:
    """Find the images of Tiny-ImageNet (Stanford CS231n), 64 x 64 pixels, in `root`/tiny-imagenet-200.

    Classes are named by their WordNet ids, as in the benchmark's corrupted versions, and sorted. The test split is
    the published validation split: the labels of the published test split are not public.

    Raises:
        FileNotFoundError: it, or a part of it, is not there.
        ValueError: a list in it is not as published.
    """
    folder = _folder(TINY_IMAGENET, root)
    names = sorted(name for (name,) in _rows(folder / "wnids.txt", "WNID"))
    if split == "train":
        return data.by_class(folder, {name: folder / "train" / name / "images" for name in names})
    rows = _rows(folder / "val" / "val_annotations.txt", "FILE WNID LEFT TOP RIGHT BOTTOM")
    labels = {name: label for label, name in enumerate(names)}
    unknown = [row[1] for row in rows if row[1] not in labels]
    if unknown:
        msg = f"{folder}/val/val_annotations.txt: expected ids of wnids.txt, got {unknown[0]}; {_again(folder)}"
        raise ValueError(msg)
    paths = tuple(f"val/images/{row[0]}" for row in rows)
    return ImageFiles(folder, paths, np.array([labels[row[1]] for row in rows], dtype=np.int64), tuple(names))


def cub_200_2011(split: str, root: Path) -> ImageFiles:
    """Find the images of CUB-200-2011 (Wah et al. 2011), of many sizes, in `root`/CUB_200_2011.

    Classes are named, and splits made, as published.

    Raises:
        FileNotFoundError: it, or a part of it, is not there.
        ValueError: a list in it is not as published.
    """
    folder = _folder(CUB_200_2011, root)
    names = dict(_rows(folder / "classes.txt", "ID NAME"))
    classes, training = (dict(_rows(folder / f"{name}.txt", "ID NUMBER")) for name in _CUB_LISTS)
    images = dict(_rows(folder / "images.txt", "ID PATH"))
    if not images.keys() == classes.keys() == training.keys() or not set(classes.values()) <= names.keys():
        msg = f"{folder}: expected lists of the same images and classes, got lists that differ; {_again(folder)}"
        raise ValueError(msg)
    numbers = {number: label for label, number in enumerate(names)}
    chosen = [image for image in images if (training[image] == TRAINING) == (split == "train")]
    return ImageFiles(
        folder / "images",
        tuple(images[image] for image in chosen),
        np.array([numbers[classes[image]] for image in chosen], dtype=np.int64),
        tuple(names.values()),
    )


_CUB_LISTS = ("image_class_labels", "train_test_split")


def _unpack(archive: Archive, root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive  # noqa: PLC0415  # a second to import

    with tempfile.TemporaryDirectory(dir=root) as unpacked:
        download_and_extract_archive(
            archive.url, str(root), extract_root=unpacked, md5=archive.md5, remove_finished=True
        )
        (Path(unpacked) / archive.folder).rename(root / archive.folder)


def _cifar(published: type, archive: Archive, split: str, root: Path) -> LabelledImages:
    folder = _folder(archive, root)
    try:
        images = published(root, train=split == "train")
    except RuntimeError as error:  # torchvision checks the files' md5 before it unpickles them
        msg = f"{folder}: expected the published files, got a missing or another one; {_again(folder)}"
        raise ValueError(msg) from error
    pixels = np.ascontiguousarray(images.data)
    return LabelledImages(pixels, np.array(images.targets, dtype=np.int64), tuple(images.classes))


def _folder(archive: Archive, root: Path) -> Path:
    folder = root / archive.folder
    if not folder.is_dir():
        msg = f"{folder}: no such folder; give data.download = true in a recipe, or unpack {archive.url} in {root}"
        raise FileNotFoundError(msg)
    return folder


def _rows(path: Path, columns: str) -> list[list[str]]:
    """Return a list's lines, each split into as many words as there are columns; the last may hold spaces."""
    if not path.is_file():
        msg = f"{path}: no such file; expected it as published; remove its folder and fetch the data set again"
        raise FileNotFoundError(msg)
    count = len(columns.split())
    rows = [line.split(maxsplit=count - 1) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows or any(len(row) != count for row in rows):
        msg = f"{path}: expected lines of {columns}, got another one or none; remove its folder and fetch it again"
        raise ValueError(msg)
    return rows


def _again(folder: Path) -> str:
    return f"remove {folder} and fetch it again"
