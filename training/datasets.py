"""Data sets by name: where their images are, and the parts of them that a run learns from.

name, split -> `find` -> LabelledImages | ImageFiles -> `load` -> all in memory
recipe.Data -> `find` twice -> [images of each class] -> `parts` -> training, validation | test
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from training import archives, data, npz, recipe
from training.archives import Archive
from training.data import Images, LabelledImages

SPLITS = ("train", "test")
DIGITS_SIZE = 32  # pixels; what small networks for natural images take
DIGITS_TEST = 0.28  # share of the 1,797 digits: about 500 images, a 95 % interval of +- 1 % at 98.5 %
DIGITS_SEED = 0  # of the split, which is part of the data set and not of a run


def find(name: str, *, split: str, root: Path | None = None, download: bool = False) -> Images:
    """Find one split, "train" or "test", of a data set; images in files stay there until they are read.

    - "digits" are scikit-learn's 1,797 handwritten digits, enlarged to 32 x 32 pixels, with a fixed stratified
      split. They need no root.
    - "folder" is an image folder by class, `root`/`split`/CLASS/*.png|jpg.
    - "npz" is the file `root`, with arrays as `npz.read` says; MedMNIST's files are such.
    - "cifar10", "cifar100", "tiny-imagenet" and "cub-200-2011" are in `root` as their archives unpack; `download`
      fetches them first, if they are not there.

    Raises:
        ValueError: unknown name or split, a root too many or too few, nothing to download from, or data that
            cannot be used.
        FileNotFoundError: the data are not there.
        OSError: the download failed.
    """
    if name not in LOADERS:
        msg = f"data set: expected one of {', '.join(LOADERS)}, got {name!r}"
        raise ValueError(msg)
    if split not in SPLITS:
        msg = f"split: expected one of {', '.join(SPLITS)}, got {split!r}"
        raise ValueError(msg)
    loader = LOADERS[name]
    _refuse_unfit(name, loader, root=root, download=download)
    root = root or Path()
    if download and loader.archive is not None:
        archives.fetch(loader.archive, root)
    return loader.find(split, root)


def load(
    name: str, *, split: str, root: Path | None = None, download: bool = False, size: int | None = None
) -> LabelledImages:
    """Load one split of a data set, as `find` knows it, into memory, as it is evaluated.

    With `size`, the images of files are resized and cropped at the centre to `size` x `size` pixels; without, they
    must be of one size.

    Raises:
        ValueError, FileNotFoundError, OSError: as `find`, and where a file cannot be read.
    """
    return find(name, split=split, root=root, download=download).read(size)


def parts(settings: recipe.Data, *, seed: int) -> dict[str, Images]:
    """Return the images to train, to validate and to test with: "training", "validation" and "test".

    What is validated with is held out of the training split; both draw from the seed. All parts have the same
    classes. Without `settings.size` they are in memory and of one size, with it they are files.

    Raises:
        ValueError, FileNotFoundError, OSError: as `load`; the splits are not alike, or a class has too few images.
    """
    root = None if settings.root is None else Path(settings.root)
    whole, test = (find(settings.name, split=split, root=root, download=settings.download) for split in SPLITS)
    _refuse_unlike("classes", whole.class_names, test.class_names, root=root)
    if settings.per_class is not None:
        whole = whole.subset(data.per_class(whole, count=settings.per_class, seed=seed))
    if settings.size is None or isinstance(whole, LabelledImages):
        whole, test = whole.read(settings.size), test.read(settings.size)
        _refuse_unlike("height, width and channels", whole.images.shape[1:], test.images.shape[1:], root=root)
    kept, held = data.stratified(whole.labels, fraction=settings.validation, seed=seed)
    if len(held) == 0:
        msg = f"data: expected a class with an image to validate with, got {len(whole)} images, one per class"
        raise ValueError(msg)
    return {"training": whole.subset(kept), "validation": whole.subset(held), "test": test}


@dataclass(frozen=True)
class Loader:
    """How a data set is found.

    `find` takes the split and the root, `root` says what that is where there is one, and `archive` is where the data
    are published.
    """

    find: Callable[[str, Path], Images]
    root: str | None
    archive: Archive | None = None


def _digits(split: str, _: Path) -> Images:
    from sklearn.datasets import load_digits  # noqa: PLC0415  # a second to import, and only these need it

    digits = load_digits()
    small = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # their grey levels are 0 to 16
    large = functional.interpolate(small, size=(DIGITS_SIZE, DIGITS_SIZE), mode="bilinear", align_corners=False)
    images = large.round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
    labels = digits.target.astype(np.int64)
    train, test = data.stratified(labels, fraction=DIGITS_TEST, seed=DIGITS_SEED)
    names = tuple(str(digit) for digit in range(10))
    return LabelledImages(images, labels, names).subset(train if split == "train" else test)


def _folder(split: str, root: Path) -> Images:
    if not root.is_dir():
        msg = f"{root}: no such folder; expected it to hold train/CLASS/*.png|jpg and test/CLASS/*.png|jpg"
        raise FileNotFoundError(msg)
    return data.from_folder(root / split)


def _published(find: Callable[[str, Path], Images], archive: Archive) -> Loader:
    return Loader(find, f"the folder that holds, or is to hold, {archive.folder}", archive)


LOADERS = {
    "digits": Loader(_digits, root=None),
    "folder": Loader(_folder, "the folder that holds train/ and test/"),
    "npz": Loader(npz.read, "the npz file"),
    "cifar10": _published(archives.cifar10, archives.CIFAR10),
    "cifar100": _published(archives.cifar100, archives.CIFAR100),
    "tiny-imagenet": _published(archives.tiny_imagenet, archives.TINY_IMAGENET),
    "cub-200-2011": _published(archives.cub_200_2011, archives.CUB_200_2011),
}


def _refuse_unfit(name: str, loader: Loader, *, root: Path | None, download: bool) -> None:
    if root is not None and loader.root is None:
        msg = f"root: expected none, as the {name} come with scikit-learn, got {root}; leave it out"
        raise ValueError(msg)
    if root is None and loader.root is not None:
        msg = f"root: expected {loader.root}, got none; give data.root"
        raise ValueError(msg)
    if download and loader.archive is None:
        msg = f'download: expected false, as "{name}" has no public address, got true; leave it out'
        raise ValueError(msg)


def _refuse_unlike(what: str, expected: tuple[object, ...], got: tuple[object, ...], *, root: Path | None) -> None:
    if got != expected:
        msg = f"data.root: expected the {what} of the training split, {expected}, in the test split, got {got}; "
        raise ValueError(msg + f"make them alike in {root}")
