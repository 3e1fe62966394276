"""What can be sent to a target: any float in [0, 1], or the 256 grey levels of an 8-bit image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
        """Return images as they arrive: clipped to [0, 1], and rounded half to even where there are grey levels."""
        clipped = images.clamp(0, 1)
        return (clipped * _WHITE).round() / _WHITE if self.kind == "uint8" else clipped
