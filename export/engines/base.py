"""What every engine is, and the small fake that ships beside it for tests.

images, float32 NCHW in [0, 1] --classify: as_input, batches--> inputs, as the engine takes them --call--> logits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from export.manifest import Manifest

Images = Float32[np.ndarray, "batch channels height width"]
Stored = UInt8[np.ndarray, "batch height width channels"]
# What an engine takes: one or the other, by its manifest.
Inputs = Images | Stored
Logits = Float32[np.ndarray, "batch classes"]

# The protocol's datatypes that an engine takes, as numpy has them.
DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype(np.float32), "UINT8": np.dtype(np.uint8)}


class CannotRunHere(RuntimeError):  # noqa: N818 - it is no error of the engine
    """This machine lacks what the engine needs, a GPU or a library; the engine itself may be sound."""


class Engine(ABC):
    """An open engine: call it with images, close it (or use it in a `with` block) when done."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        # Looked up once: a small model answers in less time than a manifest is read through a few times.
        self._dtype = DTYPES[manifest.inputs[0].datatype]
        self._shape = manifest.inputs[0].shape[1:]
        self._max_batch = manifest.max_batch

    def __call__(self, inputs: Inputs) -> Logits:
        """Return the logits of a batch; probabilities, where that is the manifest's `output`.

        Args:
            inputs: as the manifest says, (N, C, H, W) float32 in [0, 1] or (N, H, W, C) uint8,
                1 <= N <= manifest.max_batch.

        Raises:
            ValueError: shape or dtype is not what the manifest says.
        """
        if inputs.shape[1:] != self._shape or inputs.dtype != self._dtype or not 1 <= len(inputs) <= self._max_batch:
            raise self._complaint(inputs)
        return self._run(inputs)

    def classify(self, images: Images) -> Logits:
        """Return the answers to any number of images, whatever the engine takes and however many at once.

        Args:
            images: (N, C, H, W) float32 in [0, 1]. For an engine that takes uint8 they are rounded (`as_input`).

        Returns:
            (N, classes), what calls return.

        Raises:
            ValueError: shape or dtype is another, or values for an engine that takes uint8 are outside [0, 1].
        """
        inputs = as_input(self.manifest, images)
        if 1 <= len(inputs) <= self._max_batch:
            return self(inputs)
        starts = range(0, len(inputs), self._max_batch)
        answers = [self(inputs[start : start + self._max_batch]) for start in starts]
        empty = np.empty((0, len(self.manifest.class_names)), np.float32)
        return np.concatenate(answers) if answers else empty

    def warm_up(self) -> None:
        """Run one batch of one, so that the first caller does not pay for lazy initialisation."""
        self(np.zeros((1, *self._shape), dtype=self._dtype))

    @abstractmethod
    def close(self) -> None:
        """Free what the runtime holds; the engine cannot be called afterwards."""

    @abstractmethod
    def _run(self, inputs: Inputs) -> Logits: ...

    def _complaint(self, inputs: np.ndarray[Any, Any]) -> ValueError:
        if inputs.ndim != 4 or inputs.shape[1:] != self._shape or inputs.dtype != self._dtype:
            return ValueError(
                f"{self.manifest.model}: expected {self._dtype} images of shape "
                f"(N, {', '.join(map(str, self._shape))}), got {inputs.dtype} {inputs.shape}"
            )
        return ValueError(f"{self.manifest.model}: expected 1 to {self._max_batch} images a call, got {len(inputs)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_input(manifest: Manifest, images: Images) -> Inputs:
    """Return images as the engine of a manifest takes them: as they are, or as uint8 NHWC.

    Args:
        manifest: of the engine.
        images: (N, C, H, W) float32 in [0, 1].

    Raises:
        ValueError: shape or dtype is another, or values for an engine that takes uint8 are outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1:] != manifest.image_shape or images.dtype != np.float32:
        raise ValueError(
            f"{manifest.model}: expected float32 images of shape (N, {', '.join(map(str, manifest.image_shape))}), "
            f"got {images.dtype} {images.shape}"
        )
    return as_stored(images) if manifest.channels_last else images


def as_stored(images: Images) -> Stored:
    """Return images as uint8 NHWC: each value times 255, rounded half to even.

    Raises:
        ValueError: a value is outside [0, 1], or no number.
    """
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"expected values in [0, 1], got {images.min():g} to {images.max():g}; scale the images before they are "
            "sent as uint8"
        )
    return np.ascontiguousarray(np.rint(images * np.float32(255)).astype(np.uint8).transpose(0, 2, 3, 1))


class FakeEngine(Engine):
    """A linear classifier with fixed weights: real answers without a runtime, for tests."""

    def __init__(self, manifest: Manifest, *, weights: Float32[np.ndarray, "pixels classes"]) -> None:
        super().__init__(manifest)
        self._weights = weights

    def _run(self, inputs: Inputs) -> Logits:
        images = inputs.transpose(0, 3, 1, 2) / np.float32(255) if self.manifest.channels_last else inputs
        return np.asarray(images.reshape(len(images), -1) @ self._weights)

    def close(self) -> None:
        """Do nothing: there is no runtime."""
