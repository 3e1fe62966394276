"""What an attack sees: every decision is the engine's, gradients are a twin's, and every image asked is counted.

images --no gradient asked--> engine (counted)          images --gradient asked--> PyTorch twin
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import eagerpy as ep
import foolbox
import numpy as np
import torch
from foolbox.types import Bounds

from export.engines.base import as_stored

if TYPE_CHECKING:
    from torch import Tensor, nn

    from export.engines.base import Engine, Images, Logits


# Below any probability that float32 tells from zero: its logarithm is finite.
_SMALLEST = np.finfo(np.float32).tiny


class EngineTarget:
    """An engine that counts the images it is asked about, and answers with logits for any number of them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.queries = 0

    def __call__(self, images: Images) -> Logits:
        """Return the engine's logits.

        Of an engine that answers with probabilities they are the logarithms, of which softmax makes the same
        probabilities; what is nearer to 0 or 1 than float32 can tell is lost in them.

        Args:
            images: (N, C, H, W) float32 in [0, 1]; an engine that takes uint8 sees them rounded (`seen`).
        """
        self.queries += len(images)
        answers = self.engine.classify(images)
        if self.engine.manifest.output == "probabilities":
            return np.asarray(np.log(np.maximum(answers, _SMALLEST)))
        return answers

    def predict(self, images: Images) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the engine's top-1 classes."""
        return np.asarray(self(images).argmax(axis=1))

    def seen(self, images: Images) -> Images:
        """Return images as the engine sees them: rounded to whole grey levels, where that is all it can be sent."""
        if not self.engine.manifest.channels_last:
            return images
        return np.ascontiguousarray(as_stored(images).transpose(0, 3, 1, 2)) / np.float32(255)


class AttackModel(foolbox.Model):
    """The Foolbox model of an engine: forward on the engine, unless a gradient is wanted and there is a twin."""

    def __init__(self, target: EngineTarget, twin: nn.Module | None) -> None:
        self.target = target
        self.twin = twin

    @property
    def bounds(self) -> Bounds:
        """The range of an image: [0, 1]."""
        return Bounds(0, 1)

    def __call__(self, inputs: Any) -> Any:
        """Return logits in the framework of the inputs."""
        images, restore = ep.astensor_(inputs)
        return restore(ep.astensor(self._logits(images.raw)))

    def _logits(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            assert self.twin is not None, "an attack that wants gradients is refused before it starts"
            return self.twin(images)  # type: ignore[no-any-return]
        return torch.from_numpy(self.target(images.detach().numpy()))


def zero_gradients(twin: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return (N,) bool: the loss at this image has no gradient at all, so that no gradient attack can move."""
    inputs = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(twin(inputs), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs)
    return gradient.flatten(1).abs().amax(dim=1) == 0
