"""What the benchmarks of an audit attack: a network, its engine, and images that it classifies correctly.

a training run, or random weights that tell made-up photographs apart --published--> engine --> Subject
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from export import twin
from export.repository import Repository
from service.audit.attack.search import Search
from service.audit.gradient.preparation import prepared
from service.audit.target.engine import EngineTarget

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from torch import Tensor, nn

    from export.repository import Version
    from service.audit.attack.search import Norm
    from service.audit.target.base import Target

_SIDE = 32  # pixels, of made-up photographs
_READ = 2  # times as many as are attacked, which the network classifies correctly


@dataclass(frozen=True, eq=False)
class Subject:
    """What is attacked.

    Attributes:
        name: for the reader.
        network: the engine's weights, in evaluation mode.
        source: it, prepared for gradients.
        target: the engine.
        images: (n, C, H, W) in [0, 1].
        labels: (n,) true classes.
        epsilon: in the maximum norm.
        threads: of torch, and of the engine.
    """

    name: str
    network: nn.Module
    source: nn.Module
    target: Target
    images: Tensor
    labels: Tensor
    epsilon: float
    threads: int

    def first(self, n: int) -> Subject:
        """Return the same with fewer images."""
        return replace(self, images=self.images[:n], labels=self.labels[:n])

    def searched(self, *, norm: Norm = "linf", budget: int | None = None) -> Search:
        """Return a search over the images, begun."""
        search = Search(self.target, self.images, self.labels, norm=norm, budget=budget)
        search.begin()
        return search

    def robust(self, images: Tensor) -> float:
        """Return the share of adversarial images that the network classifies correctly."""
        with torch.no_grad():
            return float((self.source(images).argmax(1) == self.labels).float().mean())


@contextmanager
def prepared_subject(given: argparse.Namespace) -> Iterator[Subject]:
    """Publish the network and open its engine, in a folder that goes away; without --epsilon, epsilon is 0."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Repository(Path(folder) / "models")
        version = _published(given, Path(folder), repository)
        network = twin.load(version, repository=repository)
        assert network is not None
        images, labels = _read(given.images or Path(folder) / "photographs", version, n=_READ * given.samples)
        source = prepared(network, example=images)
        with torch.no_grad():
            correct = source(images).argmax(1) == labels
        images, labels = images[correct][: given.samples], labels[correct][: given.samples]
        with EngineTarget.opened(version, threads=given.threads) as target:
            name = given.run.name if given.run else "ResNet-20 of random weights"
            epsilon = given.epsilon or 0.0
            yield Subject(name, network.eval(), source, target, images, labels, epsilon, given.threads)


def _published(given: argparse.Namespace, scratch: Path, repository: Repository) -> Version:
    from export.publish import Terms, publish_checkpoint, publish_network  # noqa: PLC0415 - workers need none of it

    if given.run:
        return publish_checkpoint(given.run, repository=repository, name="audited", terms=Terms(images=given.images))
    from benchmarks.engines import resnet20  # noqa: PLC0415 - as above
    from benchmarks.export_time import SHOWN_CLASSES, fit, photographs  # noqa: PLC0415 - as above

    images, weights = scratch / "photographs", scratch / "weights.pt"
    names = tuple(f"class{index}" for index in range(SHOWN_CLASSES))
    photographs(images, names=names, count=_READ * given.samples, side=_SIDE)
    torch.manual_seed(0)
    network = resnet20(num_classes=SHOWN_CLASSES)
    fit(network, images, side=_SIDE)
    torch.save(network.state_dict(), weights)
    described = twin.Network(factory="benchmarks.engines:resnet20", input_shape=(3, _SIDE, _SIDE), class_names=names)
    return publish_network(described, weights, repository=repository, name="audited", terms=Terms(images=images))


def _read(folder: Path, version: Version, *, n: int) -> tuple[Tensor, Tensor]:
    from training import augment, data  # noqa: PLC0415 - as in `_published`

    stored = data.from_folder(folder)
    chosen = np.random.default_rng(0).permutation(len(stored))[:n]
    read = stored.subset(chosen).read(version.manifest.image_shape[-1])
    return augment.unit_range(torch.from_numpy(read.images)), torch.from_numpy(read.labels).long()
