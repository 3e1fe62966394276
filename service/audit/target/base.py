"""What every target is: a classifier that answers with logits, and counts the images that it is asked about.

images, float32 NCHW in [0, 1] --counted, checked--> logits (n, classes), finite
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from export.engines.base import Images, Logits
    from service.audit.target.domain import Domain


class TargetFailed(RuntimeError):  # noqa: N818 - it is the target's failure, and no error of the audit
    """The target died, or answered with what is no answer: what was measured before still holds."""


class Target(ABC):
    """A deployed classifier; use it in a `with` block.

    Attributes:
        name: for the reader of a report, as in "cifar10@3".
        class_names: in the order of the logits.
        image_shape: (channels, height, width).
        domain: what it can be sent.
        batch_sizes: images at once, ascending: those at which it serves; the last is the most that it takes.
        queries: images that it has been asked about.
        seconds: that it took to answer, all in all.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    domain: Domain
    batch_sizes: tuple[int, ...]

    def __init__(self) -> None:
        self.queries = 0
        self.seconds = 0.0

    def __call__(self, images: Images) -> Logits:
        """Return the logits of any number of images.

        Of a target that answers with probabilities they are the logarithms, of which softmax makes the same.

        Args:
            images: (n, C, H, W) float32, of the target's domain.

        Raises:
            TargetFailed: it does not answer, or the answers are NaN or of another shape.
        """
        self.queries += len(images)
        started = time.perf_counter()
        answers = self._answer(images)
        self.seconds += time.perf_counter() - started
        if answers.shape != (len(images), len(self.class_names)):
            raise TargetFailed(
                f"{self.name}: expected logits of shape ({len(images)}, {len(self.class_names)}), got {answers.shape}"
            )
        if not np.isfinite(answers).all():
            bad = int((~np.isfinite(answers)).any(axis=1).sum())
            raise TargetFailed(
                f"{self.name}: expected finite logits, got NaN or infinity for {bad} of {len(images)} images"
            )
        return answers

    def predict(self, images: Images) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the top-1 classes, (n,)."""
        return np.asarray(self(images).argmax(axis=1))

    @property
    def max_batch(self) -> int:
        """The most images that it takes at once."""
        return self.batch_sizes[-1]

    @abstractmethod
    def _answer(self, images: Images) -> Logits:
        """Return the logits, as the target gives them, in batches that it takes."""

    @abstractmethod
    def close(self) -> None:
        """Free what the target holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeTarget(Target):
    """A target made of a function, for tests and for models that are no engines."""

    def __init__(
        self, answer: Any, *, image_shape: tuple[int, int, int], classes: int, domain: Domain, max_batch: int = 64
    ) -> None:
        super().__init__()
        self._function = answer
        self.name = "fake"
        self.class_names = tuple(f"class {index}" for index in range(classes))
        self.image_shape = image_shape
        self.domain = domain
        self.batch_sizes = (1, max_batch)

    def _answer(self, images: Images) -> Logits:
        starts = range(0, len(images), self.max_batch)
        return np.concatenate([self._function(images[start : start + self.max_batch]) for start in starts])

    def close(self) -> None:
        """Do nothing."""
