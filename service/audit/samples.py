"""The images of an audit: a stratified, seeded sample of a data set or a folder, labelled as the model labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from training import augment, data, datasets

if TYPE_CHECKING:
    from service.audit.plan import Data
    from training.data import Images


@dataclass(frozen=True)
class Samples:
    """Images as they are stored: uint8 NHWC, with labels in the model's order and a stable index each."""

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int64[np.ndarray, " n"]
    indices: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.images)


def as_input(images: UInt8[np.ndarray, "n height width 3"]) -> Float32[np.ndarray, "n 3 height width"]:
    """Return images as a model takes them: float32 NCHW in [0, 1]."""
    return augment.unit_range(torch.from_numpy(images)).numpy()


def load(source: Data, *, class_names: tuple[str, ...]) -> Samples:
    """Load the plan's images.

    Args:
        source: the plan's `[data]` table.
        class_names: the model's classes, in the order of its logits.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: there is no such data set, an image cannot be used, or the data's classes are not among the
            model's.
    """
    stored = _stored(source)
    labels = _relabelled(stored, class_names)
    chosen = stratified(labels, samples=source.samples, seed=source.seed)
    return Samples(stored.subset(chosen).read(source.size).images, labels[chosen], chosen)


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
    missing = sorted(set(stored.class_names) - set(class_names))
    if missing:
        raise ValueError(
            f"the data has the class {missing[0]!r}, which the model does not: its classes are "
            f"{', '.join(class_names)}; name the data's folders as the model's classes"
        )
    table = np.array([class_names.index(name) for name in stored.class_names], dtype=np.int64)
    return np.asarray(table[stored.labels])
