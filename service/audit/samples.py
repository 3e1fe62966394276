"""The images of an audit: a stratified, seeded sample of a data set or a folder, labelled as the model labels.

[data] --labels--> the model's classes --stratified--> chosen --pixels: as servers bring files to the input--> Samples
Only what was chosen is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from export import pictures
from export.manifest import Preprocessing
from training import data, datasets

if TYPE_CHECKING:
    from service.audit.plan import Data
    from training.data import ImageFiles, Images

# Images that an audit takes where the plan does not say, or all if there are fewer: a share of one half is then known
# to 3 points.
_SAMPLES = 1000

# Names in one line of an error.
_MOST_NAMES = 20

# ITU-R BT.601 in 65,536ths, rounded by half of them: how Pillow makes RGB grey.
_LUMINANCE, _HALF, _BITS = np.array([19595, 38470, 7471], dtype=np.uint32), np.uint32(1 << 15), np.uint32(16)


@dataclass(frozen=True)
class Samples:
    """Images as they are stored: uint8 NHWC, with labels in the model's order and a stable index each."""

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int64[np.ndarray, " n"]
    indices: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.images)


def as_input(images: UInt8[np.ndarray, "n height width channels"]) -> Float32[np.ndarray, "n channels height width"]:
    """Return images as targets take them: float32 NCHW in [0, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) / np.float32(255)


def load(
    source: Data,
    *,
    class_names: tuple[str, ...],
    image_shape: tuple[int, int, int] | None = None,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 - it is frozen
) -> Samples:
    """Load the plan's images.

    Args:
        source: the plan's `[data]` table.
        class_names: the model's classes, in the order of its logits.
        image_shape: (channels, height, width) of the model's input; images that are no files must have it, and files
            are brought to it unless the plan gives `data.size`. Without it images are taken as they are.
        preprocessing: how files come to that shape (`Manifest.preprocessing`), as where the model is served.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: there is no such data set, it has fewer images than are wanted, an image cannot be used, images
            have another shape than the model takes, or the data's classes are not among the model's.
    """
    stored = _stored(source)
    labels = _relabelled(stored, class_names)
    if source.samples is not None and source.samples > len(labels):
        raise ValueError(
            f"data.samples: expected at most the {len(labels)} that there are, got {source.samples}; lower it"
        )
    chosen = stratified(labels, samples=source.samples or _SAMPLES, seed=source.seed)
    images = _pixels(stored.subset(chosen), size=source.size, image_shape=image_shape, preprocessing=preprocessing)
    if image_shape is not None:
        _check_shape(images, image_shape)
    return Samples(images, labels[chosen], chosen)


def _stored(source: Data) -> Images:
    if source.folder is not None:
        return data.from_folder(source.folder)
    assert source.dataset is not None
    return datasets.find(source.dataset, split=source.split, root=source.root)


def stratified(labels: Int64[np.ndarray, " n"], *, samples: int, seed: int) -> Int64[np.ndarray, " m"]:
    """Return shuffled indices with every class in its share: round-robin over the classes' shuffled members."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = order[np.argsort(rank[order], kind="stable")][:samples]
    return rng.permutation(chosen).astype(np.int64)


def _relabelled(stored: Images, class_names: tuple[str, ...]) -> Int64[np.ndarray, " n"]:
    if len(stored.labels) and (largest := int(stored.labels.max())) >= len(stored.class_names):
        raise ValueError(
            f"data: expected labels from 0 to {len(stored.class_names) - 1}, one for each class, got {largest}; name "
            "all classes, or correct the labels"
        )
    missing = sorted(set(stored.class_names) - set(class_names))
    if missing:
        raise ValueError(
            f"the data has the class {missing[0]!r}, which the model does not: its classes are "
            f"{_listed(class_names)}; name the data's folders as the model's classes, or give target.labels"
        )
    table = np.array([class_names.index(name) for name in stored.class_names], dtype=np.int64)
    return np.asarray(table[stored.labels])


def _listed(names: tuple[str, ...]) -> str:
    """Return names for one line: all, or the first of many."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _pixels(
    chosen: Images, *, size: int | None, image_shape: tuple[int, int, int] | None, preprocessing: Preprocessing
) -> UInt8[np.ndarray, "n height width channels"]:
    if image_shape is None:
        return chosen.read(size).images
    if size is None and isinstance(chosen, data.ImageFiles):
        return np.stack([_as_served(chosen, path, image_shape, preprocessing) for path in chosen.paths])
    images = chosen.read(size).images
    return _grey(images) if image_shape[0] == 1 else images


def _as_served(
    files: ImageFiles, path: str, image_shape: tuple[int, int, int], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "height width channels"]:
    file = files.root / path
    try:
        return pictures.pixels(file.read_bytes(), image_shape=image_shape, preprocessing=preprocessing)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _grey(images: UInt8[np.ndarray, "n height width 3"]) -> UInt8[np.ndarray, "n height width 1"]:
    """Return the luminance, as Pillow's mode L has it."""
    return ((images @ _LUMINANCE + _HALF) >> _BITS).astype(np.uint8)[..., None]


def _check_shape(images: UInt8[np.ndarray, "n height width channels"], image_shape: tuple[int, int, int]) -> None:
    channels, height, width = image_shape
    if (actual := images.shape[1:]) != (height, width, channels):
        raise ValueError(
            f"the images are {actual[1]} x {actual[0]} of {actual[2]} channels, and the model takes {width} x {height} "
            f"of {channels}; resize them, or give data.size"
        )
