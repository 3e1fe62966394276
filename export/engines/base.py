"""What every engine is, and the small fake that ships beside it for tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from export.manifest import Manifest

Images = Float32[np.ndarray, "batch channels height width"]
Logits = Float32[np.ndarray, "batch classes"]


class CannotRunHere(RuntimeError):  # noqa: N818 - it is no error of the engine
    """This machine lacks what the engine needs, a GPU or a library; the engine itself may be sound."""


class Engine(ABC):
    """An open engine: call it with images, close it (or use it in a `with` block) when done."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __call__(self, images: Images) -> Logits:
        """Return the logits of a batch.

        Args:
            images: (N, C, H, W) float32 in [0, 1], 1 <= N <= manifest.max_batch.

        Raises:
            ValueError: shape or dtype is not what the manifest says.
        """
        self._check(images)
        return self._run(images)

    def warm_up(self) -> None:
        """Run one batch of one, so that the first caller does not pay for lazy initialisation."""
        self(np.zeros((1, *self.manifest.image_shape), dtype=np.float32))

    @abstractmethod
    def close(self) -> None:
        """Free what the runtime holds; the engine cannot be called afterwards."""

    @abstractmethod
    def _run(self, images: Images) -> Logits: ...

    def _check(self, images: np.ndarray[Any, Any]) -> None:
        expected = self.manifest.image_shape
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.float32:
            raise ValueError(
                f"{self.manifest.model}: expected float32 images of shape (N, {', '.join(map(str, expected))}), "
                f"got {images.dtype} {images.shape}"
            )
        if not 1 <= len(images) <= self.manifest.max_batch:
            raise ValueError(
                f"{self.manifest.model}: expected 1 to {self.manifest.max_batch} images a call, got {len(images)}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeEngine(Engine):
    """A linear classifier with fixed weights: real answers without a runtime, for tests."""

    def __init__(self, manifest: Manifest, *, weights: Float32[np.ndarray, "pixels classes"]) -> None:
        super().__init__(manifest)
        self._weights = weights

    def _run(self, images: Images) -> Logits:
        return np.asarray(images.reshape(len(images), -1) @ self._weights)

    def close(self) -> None:
        """Do nothing: there is no runtime."""
