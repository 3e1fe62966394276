"""Small networks that read scikit-learn's digits: trained in about two seconds, the same each time."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain

if TYPE_CHECKING:
    from torch import Tensor

_STEPS = 200
_BATCH = 128
# Images that no network was trained on.
_HELD_OUT = 400


@lru_cache(maxsize=1)
def images_and_labels() -> tuple[Tensor, Tensor]:
    """Return (400, 1, 8, 8) held-out digits in [0, 1], whole grey levels, and their classes."""
    images, labels = _digits()
    return images[-_HELD_OUT:], labels[-_HELD_OUT:]


@lru_cache(maxsize=4)
def network(seed: int = 0) -> nn.Module:
    """Return a trained network of about 95 % accuracy, frozen."""
    images, labels = _digits()
    images, labels = images[:-_HELD_OUT], labels[:-_HELD_OUT]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10)
        )
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(_STEPS):
            rows = torch.randint(0, len(images), (_BATCH,))
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return module.eval().requires_grad_(requires_grad=False)


def target(module: Any, *, domain: Domain | None = None, max_batch: int = 64, noise: float = 0.0) -> FakeTarget:
    """Return the target of a network; noise is the deviation of what is added to its logits, anew at each query."""
    numbers = np.random.default_rng(0)

    def answer(images: Any) -> Any:
        with torch.no_grad():
            logits = module(torch.from_numpy(images)).numpy()
        return logits + numbers.normal(scale=noise, size=logits.shape).astype(np.float32) if noise else logits

    return FakeTarget(
        answer, image_shape=(1, 8, 8), classes=10, domain=domain or Domain("float32"), max_batch=max_batch
    )


def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    pictures = torch.from_numpy(digits.images).float()[:, None] / 16
    return Domain("uint8").sent(pictures), torch.from_numpy(digits.target).long()
