"""Images that are sent encoded: decoded, resized and cropped in threads of their own, so that calls go on meanwhile.

    JPEG | PNG | WebP, one an element --bytes?--> threads --pixels?, decode (export.pictures)--> Inputs

An image is a job of its own: those of a request are decoded side by side, and those of a caller that goes away are not
begun. The libraries that decode are imported with the first image.
"""

from __future__ import annotations

import warnings
from asyncio import wrap_future
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from service.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.engines.base import Inputs
    from export.manifest import Manifest
    from service.settings import Images

_MIB = 1 << 20


class Pictures:
    """Decodes images within the limits of a server; made where an event loop runs."""

    def __init__(self, settings: Images) -> None:
        # Pillow warns of odd files, each time in other words, which Python would keep for ever.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._max_bytes = int(settings.max_mib * _MIB)
        self._max_mib = settings.max_mib
        self._max_pixels = settings.max_pixels
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="pictures")

    async def decode(self, encoded: Sequence[bytes | memoryview], manifest: Manifest) -> Inputs:
        """Return encoded images as a model takes them, in their order.

        Args:
            encoded: a whole JPEG, PNG or WebP file each.
            manifest: the model's, whose `preprocessing` says how they come to its size.

        Raises:
            InvalidArgument: an image is none, is damaged or too large, or the model takes no images of one size; the
                message names the input and the first element that is at fault.
            Unavailable: the server is shutting down.
        """
        spec = manifest.inputs[0]
        if min(spec.shape[1:]) < 1:
            raise InvalidArgument(f"input {spec.name!r}: takes images of any size, and so none that are encoded")
        for index, image in enumerate(encoded):
            if len(image) > self._max_bytes:
                raise InvalidArgument(
                    f"input {spec.name!r}, element {index}: expected at most {self._max_mib:g} MiB, got {len(image)} "
                    "bytes; make it smaller"
                )
        inputs = np.empty((len(encoded), *spec.shape[1:]), np.uint8 if manifest.channels_last else np.float32)
        jobs = self._submit(encoded, manifest, inputs)
        try:
            for index, job in enumerate(jobs):
                await _done(job, f"input {spec.name!r}, element {index}")
        finally:
            for job in jobs:
                job.cancel()
        return inputs

    def close(self) -> None:
        """Begin no more images; those that are being decoded go on for the moment that they need."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit(self, encoded: Sequence[bytes | memoryview], manifest: Manifest, inputs: Inputs) -> list[Future[None]]:
        try:
            return [
                self._threads.submit(_fill, inputs[index], image, manifest, self._max_pixels)
                for index, image in enumerate(encoded)
            ]
        except RuntimeError:
            raise Unavailable("the server is shutting down; try again, or elsewhere") from None


async def _done(job: Future[None], what: str) -> None:
    try:
        await wrap_future(job)
    except ValueError as error:
        raise InvalidArgument(f"{what}: {error}") from None


def _fill(place: Any, encoded: bytes | memoryview, manifest: Manifest, max_pixels: int) -> None:
    """Decode one image into its place; in a thread."""
    from export import pictures  # noqa: PLC0415 - 30 ms that servers of tensors need not spend

    pixels = pictures.pixels(
        encoded, image_shape=manifest.image_shape, preprocessing=manifest.preprocessing, max_pixels=max_pixels
    )
    if manifest.channels_last:
        place[...] = pixels
    else:
        pictures.unit_range(pixels, out=place)
