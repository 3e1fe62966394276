"""The one way from an encoded image to a model's pixels: what it sees, and what it refuses."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from export import pictures
from export.manifest import Preprocessing
from training import augment, data

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (3, 16, 16)
FORMATS = ("JPEG", "PNG", "WEBP")

# Red, green / blue, white: which of them is where tells how an image was turned.
_CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)


def photograph(width: int, height: int, *, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (30, 41), (17, 400), (5, 9)], ids=str)
@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_images_are_those_that_training_evaluates(size: tuple[int, int], format_: str, tmp_path: Path) -> None:
    content = encoded(photograph(*size), format_)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / f"0.{format_.lower()}").write_bytes(content)
    evaluated = data.from_folder(tmp_path).pixels(0, size=16)
    np.testing.assert_array_equal(pictures.pixels(content, image_shape=SHAPE), evaluated)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_png_of_any_mode_is_what_training_makes_of_it(mode: str, tmp_path: Path) -> None:
    content = encoded(photograph(40, 30).convert(mode))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(content)
    evaluated = data.from_folder(tmp_path).pixels(0, size=16)
    np.testing.assert_array_equal(pictures.pixels(content, image_shape=SHAPE), evaluated)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (333, 250), (16, 16), (21, 400), (9, 7)], ids=str)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", [16, 19, 32])
def test_a_resize_and_crop_is_torchvision_s(size: tuple[int, int], interpolation: Any, resize: int) -> None:
    image = photograph(*size)
    how = v2.InterpolationMode(interpolation)
    wanted = v2.Compose([v2.Resize(resize, how), v2.CenterCrop((16, 12))])(image)
    preprocessing = Preprocessing(resize=resize, interpolation=interpolation)
    found = pictures.pixels(encoded(image), image_shape=(3, 16, 12), preprocessing=preprocessing)
    np.testing.assert_array_equal(found, np.asarray(wanted))


def test_the_default_resizes_the_largest_middle_part() -> None:
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 6:18] = 200  # and two pixels more on either side, which the filter reaches
    assert (pictures.pixels(encoded(Image.fromarray(stripes)), image_shape=(3, 4, 4)) == 200).all()


def test_an_image_of_the_input_s_size_is_left_as_it_is() -> None:
    image = photograph(20, 12)
    np.testing.assert_array_equal(pictures.pixels(encoded(image), image_shape=(3, 12, 20)), np.asarray(image))


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 5, 7)], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_input_of_one_channel_gets_luminance(shape: tuple[int, int, int], mode: str) -> None:
    image = photograph(shape[2], shape[1]).convert(mode)
    found = pictures.pixels(encoded(image), image_shape=shape)
    np.testing.assert_array_equal(found[..., 0], np.asarray(image.convert("L")))


def test_unit_range_is_training_s() -> None:
    stored = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    images = np.empty(SHAPE, np.float32)
    pictures.unit_range(stored, out=images)
    np.testing.assert_array_equal(images, augment.unit_range(torch.from_numpy(stored[None]))[0].numpy())


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(orientation: int, format_: str) -> None:
    turned = {1: (0, 1, 2, 3), 2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1), 5: (0, 2, 1, 3), 6: (2, 0, 3, 1),
              7: (3, 1, 2, 0), 8: (1, 3, 0, 2)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(_CORNERS).resize((32, 32), Image.Resampling.NEAREST)
    content = encoded(image, format_, exif=exif, quality=95)
    found = pictures.pixels(content, image_shape=SHAPE)[4::8, 4::8].reshape(4, 3)
    colours = _CORNERS.reshape(4, 3)[list(turned)]
    assert (np.abs(found.astype(int) - colours) < 60).all()


def test_broken_exif_leaves_an_image_as_it_is_stored() -> None:
    image = photograph(16, 16)
    content = encoded(image, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(pictures.pixels(content, image_shape=SHAPE), np.asarray(image))


def test_16_bit_images_keep_their_upper_8_bits() -> None:
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    found = pictures.pixels(encoded(deep), image_shape=(1, 16, 16))
    np.testing.assert_array_equal(found[..., 0], np.arange(256).reshape(16, 16))


def test_a_cmyk_photograph_has_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    found = pictures.pixels(encoded(red, "JPEG", quality=95), image_shape=SHAPE)
    assert (np.abs(found.astype(int) - (220, 20, 20)) < 8).all()


def test_a_transparent_palette_image_is_read_without_a_warning() -> None:
    image = photograph(16, 16).quantize(16)
    found = pictures.pixels(encoded(image, transparency=bytes(range(16))), image_shape=SHAPE)
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(format_: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    content = encoded(frames[0], format_, save_all=True, append_images=frames[1:], lossless=True)
    assert (pictures.pixels(content, image_shape=SHAPE) == (255, 0, 0)).all()


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_that_is_cut_off_is_refused(format_: str) -> None:
    content = encoded(photograph(64, 64), format_)
    for length in (len(content) // 4, len(content) // 2, len(content) * 3 // 4):
        with pytest.raises(ValueError, match=r"expected a whole .* image, got one that cannot be decoded"):
            pictures.pixels(content[:length], image_shape=SHAPE)


@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(format_: str) -> None:
    with pytest.raises(ValueError, match=r"expected a JPEG, PNG or WebP image, got .* bytes that begin with"):
        pictures.pixels(encoded(photograph(16, 16), format_), image_shape=SHAPE)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"text"], ids=repr
)
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="expected a"):
        pictures.pixels(content, image_shape=SHAPE)


@pytest.mark.parametrize("format_", FORMATS)
def test_too_many_pixels_are_refused(format_: str) -> None:
    content = encoded(photograph(50, 41), format_)
    assert pictures.pixels(content, image_shape=SHAPE, max_pixels=2050).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="expected at most 2049 pixels, got 50 x 41"):
        pictures.pixels(content, image_shape=SHAPE, max_pixels=2049)


def test_a_bomb_is_refused_by_its_header() -> None:
    """No pixel of it is decoded: there are none in the file, which would be another error."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="expected at most 1000 pixels, got 2147483647 x 2147483647"):
        pictures.pixels(content, image_shape=SHAPE, max_pixels=1000)


def test_an_image_whose_resized_form_has_too_many_pixels_is_refused() -> None:
    thread = encoded(Image.new("RGB", (1, 5000)))
    with pytest.raises(ValueError, match="expected proportions that fit into 1000000 pixels at 32 on the shorter side"):
        pictures.pixels(thread, image_shape=SHAPE, preprocessing=Preprocessing(resize=32), max_pixels=1_000_000)


@pytest.mark.parametrize("hidden", [b"", b"\xff\x01", b"\xff\xfe\x00\x04\xff\xd9", b"\xff\xff"], ids=bytes.hex)
def test_a_jpeg_of_very_many_scans_is_refused(hidden: bytes) -> None:
    """However its markers are dressed up: decoders go through the whole image once a scan."""
    content = encoded(photograph(64, 64), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    assert pictures.pixels(content[:-2] + 50 * last + b"\xff\xd9", image_shape=SHAPE).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="it has more than 100 scans"):
        pictures.pixels(content[:-2] + 101 * (hidden + last) + b"\xff\xd9", image_shape=SHAPE)


def test_a_jpeg_of_one_component_a_scan_is_counted_too() -> None:
    """It need not be progressive to be decoded again and again."""
    content = encoded(photograph(64, 64), "JPEG")
    start = content.rindex(b"\xff\xda")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    with pytest.raises(ValueError, match="it has more than 100 scans"):
        pictures.pixels(content[:start] + 101 * scan + b"\xff\xd9", image_shape=SHAPE)


def test_what_follows_a_jpeg_is_not_taken_for_scans() -> None:
    """Such as the film behind a photograph of a telephone."""
    content = encoded(photograph(64, 64), "JPEG", progressive=True)
    film = content + 200 * b"\xff\xda\0\0"
    np.testing.assert_array_equal(pictures.pixels(film, image_shape=SHAPE), pictures.pixels(content, image_shape=SHAPE))


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, -1, -1)], ids=str)
def test_a_model_that_takes_no_pictures_says_so(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected a model that takes grey or RGB images of one size"):
        pictures.pixels(encoded(photograph(16, 16)), image_shape=shape)


_CONTENTS = [encoded(photograph(24, 20), format_) for format_ in FORMATS] + [
    encoded(photograph(24, 20), "JPEG", progressive=True),
    encoded(photograph(24, 20).convert("RGBA"), "WEBP", lossless=True),
    encoded(photograph(24, 20).quantize(8), "PNG"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_CONTENTS), st.data())
def test_a_damaged_file_is_an_image_or_refused_in_a_line(content: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(content)
    for position in draw.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        damaged[position] = draw.draw(st.integers(0, 255))
    end = draw.draw(st.integers(0, len(content)) | st.just(len(content)))
    try:
        found = pictures.pixels(bytes(damaged[:end]), image_shape=SHAPE, max_pixels=1 << 20)
    except ValueError as error:
        refusal = str(error)
    else:
        assert found.shape == (16, 16, 3)
        assert found.dtype == np.uint8
        return
    assert re.fullmatch("expected .*", refusal)  # a line: "." is no end of one
