"""From images to batches on the device, which augmentation then takes as they are.

LabelledImages -> all on the device, as uint8, once -> indexed there ----------------------.
                                                                                           +-> uint8 NHWC, labels
ImageFiles -> worker processes decode and crop each batch ahead -> pinned memory -> copy --'

seed, epoch -> `order` -> `own` part of each batch -> Source.training
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training import recipe, signals
from training.data import ImageFiles, Images, LabelledImages

Batches = Iterator[tuple[UInt8[Tensor, "batch height width 3"], Int64[Tensor, " batch"]]]
Crops = Callable[[int], UInt8[np.ndarray, "height width 3"]]  # of an image's number its pixels, all in one size


@runtime_checkable
class Source(Protocol):
    """Images that come in batches, on a device, in the order that is asked for."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of their numbers."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Return what a batch holds of each image: channels, height and width in pixels."""

    def __len__(self) -> int:
        """Return the number of images."""

    def fingerprint(self) -> str:
        """Return a sha256 of the images, the labels and the class names."""

    def training(self, indices: Int64[Tensor, " n"], *, batch_size: int, seed: int, epoch: int) -> Batches:
        """Yield the images at `indices` as training sees them before augmentation; the last batch may be smaller."""

    def evaluation(self, indices: Int64[Tensor, " n"], *, batch_size: int) -> Batches:
        """Yield the images at `indices` as they are evaluated; the last batch may be smaller."""


def source(images: Images, *, settings: recipe.Data, smallest_crop: float, device: torch.device) -> Source:
    """Return the source of a part's batches on a device.

    Args:
        images: what the part holds; files need `settings.size`.
        settings: of the recipe.
        smallest_crop: the least share, in (0, 1], of a file's image that a random crop in training keeps.
        device: where batches come out.
    """
    if isinstance(images, LabelledImages):
        return _InMemory.of(images, device)
    assert settings.size is not None
    return _InFiles(
        files=images,
        labels=torch.from_numpy(images.labels).to(device),
        size=settings.size,
        workers=settings.workers,
        smallest_crop=smallest_crop,
        device=device,
    )


def steps(count: int, *, batch_size: int) -> int:
    """Return the number of batches in an epoch over `count` images.

    What does not fill a last batch is left out of an epoch, so that batch statistics are of equal weight; a data
    set smaller than a batch is one batch.
    """
    return max(1, count // batch_size)


def order(count: int, *, batch_size: int, seed: int, epoch: int) -> Int64[Tensor, " shown"]:
    """Return the indices of the images of an epoch's batches, shuffled: the same for equal arguments."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return torch.from_numpy(generator.permutation(count)[: steps(count, batch_size=batch_size) * batch_size])


def own(order: Int64[Tensor, " shown"], batch_size: int, number: int, processes: int) -> Int64[Tensor, " own"]:
    """Return the part of one of several processes: an equal share of each batch, the batches in their order.

    A data set smaller than a batch loses what cannot be shared equally.

    Args:
        order: indices in whole batches, or fewer than one.
        batch_size: images of all processes together, a multiple of `processes`.
        number: of this process, from 0.
        processes: how many there are.

    Raises:
        ValueError: there is not one image for each process.
    """
    if len(order) == 0:
        return order
    size = min(batch_size, len(order))
    share = size // processes
    if share == 0:
        msg = f"data: expected an image for each of the {processes} processes, got {size}; start fewer processes"
        raise ValueError(msg)
    return order.view(-1, size)[:, number * share : (number + 1) * share].flatten()


@dataclass(frozen=True)
class _InMemory:
    """Images of one size, held on the device as uint8."""

    stored: LabelledImages
    images: UInt8[Tensor, "n height width 3"]
    labels: Int64[Tensor, " n"]

    @classmethod
    def of(cls, stored: LabelledImages, device: torch.device) -> _InMemory:
        images, labels = (torch.from_numpy(np.ascontiguousarray(array)) for array in (stored.images, stored.labels))
        return cls(stored, images.to(device), labels.to(device))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.stored.class_names

    @property
    def input_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.stored)

    def fingerprint(self) -> str:
        return self.stored.fingerprint()

    def training(
        self,
        indices: Int64[Tensor, " n"],
        *,
        batch_size: int,
        seed: int,  # noqa: ARG002  # of random crops, which only files need
        epoch: int,  # noqa: ARG002
    ) -> Batches:
        return self.evaluation(indices, batch_size=batch_size)

    def evaluation(self, indices: Int64[Tensor, " n"], *, batch_size: int) -> Batches:
        for chosen in _split(indices.to(self.images.device), batch_size):
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class _InFiles:
    """Images of any size in files, which worker processes decode and bring to one size."""

    files: ImageFiles
    labels: Int64[Tensor, " n"]
    size: int
    workers: int
    smallest_crop: float
    device: torch.device

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.files.class_names

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        return self.files.fingerprint()

    def training(self, indices: Int64[Tensor, " n"], *, batch_size: int, seed: int, epoch: int) -> Batches:
        # imported here, as workers that are forked then have it: a second to import, and only these need it
        from torchvision.transforms import v2  # noqa: PLC0415

        crop = v2.RandomResizedCrop(self.size, scale=(self.smallest_crop, 1.0))
        return self._decoded(_RandomCrops(self.files, crop, seed=seed, epoch=epoch), indices, batch_size=batch_size)

    def evaluation(self, indices: Int64[Tensor, " n"], *, batch_size: int) -> Batches:
        return self._decoded(functools.partial(self.files.pixels, size=self.size), indices, batch_size=batch_size)

    def _decoded(self, crops: Crops, indices: Int64[Tensor, " n"], *, batch_size: int) -> Batches:
        parts = _split(indices, batch_size)
        loader = DataLoader(
            _Decoded(crops, parts),
            batch_size=None,  # each item is a whole batch
            num_workers=min(self.workers, len(parts)),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from PyTorch's own
            worker_init_fn=_leave_stopping_to_the_main_process,
        )
        for part, decoded in zip(parts, loader, strict=True):
            if isinstance(decoded, Exception):
                raise decoded
            yield decoded.to(self.device, non_blocking=True), self.labels[part.to(self.device)]


@dataclass(frozen=True)
class _RandomCrops:
    """Crops drawn from (seed, epoch, index) alone, so that they are the same whoever draws them, and when."""

    files: ImageFiles
    crop: Callable[[Image.Image], Image.Image]
    seed: int
    epoch: int

    def __call__(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        image = self.files.image(index)
        numbers = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's own generator, which stays as it was
            torch.default_generator.manual_seed(int(numbers[0]))
            return np.asarray(self.crop(image), dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class _Decoded(Dataset[Any]):
    """Batches by number; an error is returned, as PyTorch would turn one that is raised into a page of text."""

    crops: Crops
    parts: list[Int64[Tensor, " _"]]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> UInt8[Tensor, "batch height width 3"] | Exception:
        try:
            return torch.from_numpy(np.stack([self.crops(index) for index in self.parts[number].tolist()]))
        except (OSError, ValueError) as error:
            return error


def _leave_stopping_to_the_main_process(_worker: int) -> None:
    """Ignore what asks a run to stop: launchers and terminals ask its workers, too, and it needs them until it has."""
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _split(indices: Int64[Tensor, " n"], batch_size: int) -> list[Int64[Tensor, " _"]]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
