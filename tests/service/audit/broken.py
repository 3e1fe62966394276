"""A sound network of digits, and the same broken on purpose: what reliability checks have to tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from service.audit.gradient.source import Source
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain
from tests.service.audit.attack import digits_network

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

N = 100
IMAGES, LABELS = (tensor[:N] for tensor in digits_network.images_and_labels())


def source(module: nn.Module, name: Literal["checkpoint", "onnx"] = "checkpoint") -> Source:
    """Return a module as a source of gradients."""
    return Source(name, module, agreement=1.0)


class Changed(nn.Module):
    """The sound network with something before and something after it."""

    def __init__(
        self, *, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network = digits_network.network()
        self._before = before or (lambda images: images)
        self._after = after or (lambda logits: logits)

    def forward(self, images: Tensor) -> Tensor:
        """Return the changed logits."""
        logits: Tensor = self._after(self.network(self._before(images)))
        return logits


def noise(scale: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a function that adds normal numbers, other ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: logits + scale * torch.randn(logits.shape, generator=generator)


def target(module: nn.Module, *, kind: Any = "float32", batch_sizes: tuple[int, ...] = (1, 8, 64)) -> FakeTarget:
    """Return the target of a module."""

    def answer(images: Any) -> Any:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    made = FakeTarget(answer, image_shape=(1, 8, 8), classes=10, domain=Domain(kind), max_batch=batch_sizes[-1])
    made.batch_sizes = batch_sizes
    return made


ROUNDED = Changed(before=lambda images: (images * 255).round() / 255)
SCALED = Changed(after=lambda logits: logits * 1000)
SOFTMAX = Changed(after=lambda logits: logits.softmax(dim=1))
SATURATED = Changed(after=lambda logits: (logits * 1000).log_softmax(dim=1))
CONSTANT = Changed(after=lambda logits: torch.zeros_like(logits) + torch.arange(10.0))
# As a network whose normalisation was left in training mode.
OF_THE_BATCH = Changed(after=lambda logits: logits - logits.mean(dim=0, keepdim=True))
