"""Images among which attacks by decisions look for a start, and what the target says to them: asked once an audit.

images --sent--> Pool --classes, when first wanted--> driver: the nearest image of another class
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from service.audit.target.base import Target


class Pool:
    """Images of any class, each of which the target is asked about at most once.

    Attributes:
        images: (m, C, H, W) float32 in [0, 1], as sent.
        queries: images that the target was asked about so far: none, or all.
    """

    def __init__(self, target: Target, images: Float32[Tensor, "m c h w"]) -> None:
        """Prepare a pool; nothing is asked yet."""
        self.images = target.domain.sent(images)
        self.queries = 0
        self._target = target

    @cached_property
    def classes(self) -> Int64[Tensor, " m"]:
        """The target's classes of the images.

        Raises:
            TargetFailed: see `Target`.
        """
        found = torch.from_numpy(self._target.predict(self.images.cpu().contiguous().numpy()))
        self.queries = len(self.images)
        return found
