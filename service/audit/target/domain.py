"""What can be sent to a target: any float in [0, 1], or the 256 grey levels of an 8-bit image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from jaxtyping import Float32
    from torch import Tensor

# Grey levels above black of an 8-bit image.
_WHITE = 255


@dataclass(frozen=True)
class Domain:
    """The images that a target can be sent.

    Attributes:
        kind: "float32" for every number in [0, 1], "uint8" for whole multiples of 1/255.
    """

    kind: Literal["float32", "uint8"] = "float32"

    @property
    def step(self) -> float:
        """The distance between neighbouring values, in [0, 1]; 0 where there is none."""
        return 1 / _WHITE if self.kind == "uint8" else 0.0

    def sent(self, images: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "n c h w"]:
        """Return images as they arrive: clipped to [0, 1], and rounded half to even where there are grey levels.

        Args:
            images: any numbers; they come back themselves, no copy, where they can be sent as they are.
        """
        if self.kind == "uint8":
            return images.clamp(0, 1).mul_(_WHITE).round_().div_(_WHITE)
        return images if within(images) else images.clamp(0, 1)


def within(images: Float32[Tensor, "n c h w"]) -> bool:
    """Say whether all values are in [0, 1]; NaN is not. One pass that writes nothing."""
    if not images.numel():
        return True
    low, high = torch.aminmax(images)
    return bool(low >= 0) and bool(high <= 1)
