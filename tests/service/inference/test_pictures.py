"""Images that are sent encoded: what a model gets of them, the server's limits, and callers that go away."""

from __future__ import annotations

import asyncio
import io
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from export import pictures
from export.manifest import Manifest, Parity, Preprocessing, Requirements, TensorSpec
from service.errors import InvalidArgument, Unavailable
from service.inference.pictures import Pictures
from service.settings import Images

if TYPE_CHECKING:
    from collections.abc import Iterator

SIDE = 16


def manifest_of(
    shape: tuple[int, ...] = (-1, 3, SIDE, SIDE),
    *,
    datatype: str = "FP32",
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008
) -> Manifest:
    return Manifest(
        model="photographs",
        version=1,
        file="model.onnx",
        sha256="",
        runtime="onnxruntime",
        precision="fp32",
        inputs=(TensorSpec(name="images", datatype=datatype, shape=shape),),
        outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
        class_names=("cat", "dog"),
        preprocessing=preprocessing,
        max_batch=8,
        requires=Requirements(runtime=">=1.27"),
        parity=Parity(status="passed", reference="numpy"),
    )


def photograph(seed: int, *, size: tuple[int, int] = (40, 30), format_: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, format_)
    return file.getvalue()


@pytest.fixture
def decoder() -> Iterator[Pictures]:
    decoder = Pictures(Images())
    yield decoder
    decoder.close()


async def test_images_are_decoded_in_their_order_as_float32(decoder: Pictures) -> None:
    encoded = [photograph(seed, format_=kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP") * 3)]
    inputs = await decoder.decode([memoryview(image) for image in encoded], manifest_of())
    assert inputs.dtype == np.float32
    assert inputs.flags.c_contiguous
    for image, given in zip(encoded, inputs, strict=True):
        stored = pictures.pixels(image, image_shape=(3, SIDE, SIDE))
        np.testing.assert_array_equal(given, stored.transpose(2, 0, 1) / np.float32(255))


@pytest.mark.parametrize("channels", [1, 3])
async def test_a_model_of_uint8_gets_pixels(channels: int, decoder: Pictures) -> None:
    manifest = manifest_of((-1, SIDE, SIDE, channels), datatype="UINT8")
    inputs = await decoder.decode([photograph(0)], manifest)
    np.testing.assert_array_equal(inputs[0], pictures.pixels(photograph(0), image_shape=(channels, SIDE, SIDE)))


async def test_images_are_resized_and_cropped_as_the_manifest_says(decoder: Pictures) -> None:
    preprocessing = Preprocessing(resize=20, interpolation="bicubic")
    manifest = manifest_of((-1, SIDE, SIDE, 3), datatype="UINT8", preprocessing=preprocessing)
    inputs = await decoder.decode([photograph(0)], manifest)
    wanted = pictures.pixels(photograph(0), image_shape=(3, SIDE, SIDE), preprocessing=preprocessing)
    np.testing.assert_array_equal(inputs[0], wanted)
    assert (wanted != pictures.pixels(photograph(0), image_shape=(3, SIDE, SIDE))).any()


@pytest.mark.parametrize("broken", [b"", b"no image", photograph(0)[:200], photograph(0, format_="BMP")])
async def test_the_first_image_that_is_none_is_named(broken: bytes, decoder: Pictures) -> None:
    with pytest.raises(InvalidArgument, match="input 'images', element 1: expected a"):
        await decoder.decode([photograph(0), broken, photograph(1), b"another"], manifest_of())


async def test_an_image_of_too_many_bytes_is_refused() -> None:
    image = photograph(0)
    decoder = Pictures(Images(max_mib=(len(image) - 1) / (1 << 20)))
    with pytest.raises(InvalidArgument, match=rf"element 1: expected at most .* MiB, got {len(image)} bytes"):
        await decoder.decode([photograph(1, size=(8, 8)), image], manifest_of())
    decoder.close()


async def test_an_image_of_too_many_pixels_is_refused() -> None:
    decoder = Pictures(Images(max_pixels=1199))
    with pytest.raises(InvalidArgument, match="element 0: expected at most 1199 pixels, got 40 x 30"):
        await decoder.decode([photograph(0)], manifest_of())
    decoder.close()


@pytest.mark.parametrize("shape", [(-1, 3, -1, -1), (-1, 4, SIDE, SIDE)], ids=str)
async def test_a_model_that_takes_no_pictures_says_so(shape: tuple[int, ...], decoder: Pictures) -> None:
    with pytest.raises(InvalidArgument, match="input 'images'"):
        await decoder.decode([photograph(0)], manifest_of(shape))


class Held:
    """Bytes that hold the thread that decodes them until they are released."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()

    def __len__(self) -> int:
        return 1

    def __bytes__(self) -> bytes:
        self.begun.set()
        assert self.released.wait(60)
        return photograph(0)


class Seen(Held):
    """Bytes that never should be looked at."""

    def __bytes__(self) -> bytes:
        self.begun.set()
        return photograph(0)


async def test_images_of_a_caller_that_went_away_are_not_begun() -> None:
    decoder = Pictures(Images(threads=1))
    held, seen = Held(), Seen()
    images: list[Any] = [held, seen]
    call = asyncio.create_task(decoder.decode(images, manifest_of()))
    await asyncio.to_thread(held.begun.wait, 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    held.released.set()
    inputs = await decoder.decode([photograph(1)], manifest_of())  # behind whatever was to be done before
    assert inputs.shape == (1, 3, SIDE, SIDE)
    assert not seen.begun.is_set()
    decoder.close()


async def test_the_event_loop_goes_on_while_images_are_decoded() -> None:
    decoder = Pictures(Images(threads=2))
    held = Held()
    images: list[Any] = [held]
    call = asyncio.create_task(decoder.decode(images, manifest_of()))
    await asyncio.to_thread(held.begun.wait, 60)
    assert (await decoder.decode([photograph(1)], manifest_of())).shape == (1, 3, SIDE, SIDE)
    assert not call.done()
    held.released.set()
    assert (await call).shape == (1, 3, SIDE, SIDE)
    decoder.close()


async def test_a_decoder_that_is_closed_says_so(decoder: Pictures) -> None:
    decoder.close()
    with pytest.raises(Unavailable, match="the server is shutting down"):
        await decoder.decode([photograph(0)], manifest_of())
