"""Balls of a norm around images: sizes of changes, the steepest step, projection, a random place on the surface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import foolbox
import torch

if TYPE_CHECKING:
    from foolbox.distances import Distance
    from jaxtyping import Float32
    from torch import Tensor

# Keeps a division by a size finite; far below any perturbation that float32 pixels can hold.
_TINY = 1e-12


class Ball(ABC):
    """A norm, of changes of images, (n, C, H, W).

    Attributes:
        distance: Foolbox's name for it.
    """

    distance: Distance

    @abstractmethod
    def size(self, changes: Float32[Tensor, "n c h w"]) -> Float32[Tensor, " n"]:
        """Return the norm of each."""

    @abstractmethod
    def steepest(self, gradients: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "n c h w"]:
        """Return the changes of size 1 along which a loss rises fastest."""

    @abstractmethod
    def clipped(self, changes: Float32[Tensor, "n c h w"], epsilon: float) -> Float32[Tensor, "n c h w"]:
        """Return the nearest changes whose size is at most epsilon."""

    @abstractmethod
    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Return noise of the shape of some changes, of no particular size."""

    def inside(
        self, images: Float32[Tensor, "n c h w"], *, clean: Float32[Tensor, "n c h w"], epsilon: float
    ) -> Float32[Tensor, "n c h w"]:
        """Return images, projected to the ball around the clean ones and then clipped to [0, 1].

        Args:
            images: anywhere.
            clean: in [0, 1], so that clipping cannot leave the ball.
            epsilon: its radius.
        """
        return (clean + self.clipped(images - clean, epsilon)).clamp(0, 1)

    def surface(self, like: Float32[Tensor, "n c h w"], *, generator: torch.Generator) -> Float32[Tensor, "n c h w"]:
        """Return random changes of size 1, for as many images, on their device."""
        noise = self.noise(like, generator).to(like.device)
        return noise / (self.size(noise).view(-1, 1, 1, 1) + _TINY)


class _Linf(Ball):
    distance = foolbox.distances.linf

    def size(self, changes: Tensor) -> Tensor:
        return changes.flatten(1).abs().amax(dim=1)

    def steepest(self, gradients: Tensor) -> Tensor:
        return gradients.sign()

    def clipped(self, changes: Tensor, epsilon: float) -> Tensor:
        return changes.clamp(-epsilon, epsilon)

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return 2 * torch.rand(like.shape, generator=generator, device=generator.device) - 1


class _L2(Ball):
    distance = foolbox.distances.l2

    def size(self, changes: Tensor) -> Tensor:
        sizes: Tensor = torch.linalg.vector_norm(changes.flatten(1), dim=1)
        return sizes

    def steepest(self, gradients: Tensor) -> Tensor:
        return gradients / (self.size(gradients).view(-1, 1, 1, 1) + _TINY)

    def clipped(self, changes: Tensor, epsilon: float) -> Tensor:
        factor = epsilon / self.size(changes).clamp_min(_TINY)
        return changes * factor.clamp_max(1).view(-1, 1, 1, 1)

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=generator.device)


LINF: Ball = _Linf()
L2: Ball = _L2()
