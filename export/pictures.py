"""Encoded images as a model sees them: the one way from a JPEG, PNG or WebP file to the pixels of an input.

    bytes --format, size--> refused | decoded, upright, 8-bit --resize, crop as the manifest says--> (H, W, C) uint8
                                                                               --unit_range--> (C, H, W) in [0, 1]

Proofs, calibrations and servers all come this way, so that what was proved is what is served. Only the first frame of
an animation is seen, transparency and colour profiles are left out, and of 16 bits the upper 8 are kept, as Pillow does
with 16-bit colours. JPEG is decoded at its full size: to decode a smaller one is quicker, but gives other pixels.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from export.manifest import Preprocessing

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

# Pixels of an image where nobody says otherwise: above this Pillow, too, takes an image for an attack.
LARGEST_PIXELS = 178_956_970

# Scans that a JPEG file may have. Encoders write a dozen; each makes a decoder go through the whole image once more,
# so that a file of some MiB could keep it busy for hours.
_MOST_SCANS = 100
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

# A marker of a segment among a JPEG file's compressed data: 0xFF and none of those that stand alone.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")

# Pillow's modes for as many channels.
MODES = {1: "L", 3: "RGB"}

# The turns that the EXIF orientations 2 to 8 ask for.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_WHITE = np.float32(255)


def pixels(
    encoded: bytes | memoryview,
    *,
    image_shape: tuple[int, int, int],
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 - it is frozen
    max_pixels: int = LARGEST_PIXELS,
) -> UInt8[np.ndarray, "height width channels"]:
    """Decode an image, and resize and crop it to a model's input.

    Args:
        encoded: a whole JPEG, PNG or WebP file.
        image_shape: (C, H, W) of the input; 1 channel for grey, 3 for RGB.
        preprocessing: how it comes to that size (`Manifest.preprocessing`).
        max_pixels: pixels that it may have as it is stored, and once it is resized.

    Raises:
        ValueError: it is no such file, is damaged or cut off, or has too many pixels; the input has other channels.
    """
    channels, height, width = image_shape
    if channels not in MODES or min(height, width) < 1:
        raise ValueError(
            f"expected a model that takes grey or RGB images of one size, got one that takes {channels} x {height} x "
            f"{width} (channels, height, width); send it arrays"
        )
    resampling = Image.Resampling[preprocessing.interpolation.upper()]
    image = decoded(encoded, max_pixels=max_pixels)
    if preprocessing.resize is None:
        image = ImageOps.fit(image, (width, height), resampling)
    else:
        image = _resized(image, preprocessing.resize, resampling, max_pixels=max_pixels)
        image = _centre(image, width=width, height=height)
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    return np.asarray(image).reshape(height, width, channels)


def unit_range(
    pixels: UInt8[np.ndarray, "height width channels"], *, out: Float32[np.ndarray, "channels height width"]
) -> None:
    """Write pixels into an image of float32 in [0, 1], channels first."""
    np.divide(pixels.transpose(2, 0, 1), _WHITE, out=out)


def decoded(encoded: bytes | memoryview, *, max_pixels: int = LARGEST_PIXELS) -> Image.Image:
    """Decode an image: grey or RGB of 8 bits, turned as its EXIF data say.

    Raises:
        ValueError: it is no JPEG, PNG or WebP file, is damaged or cut off, or has too many pixels.
    """
    data = bytes(encoded)
    kind = _format(data)
    try:
        image = _opened(data, kind)
        width, height = image.size
        if width * height <= max_pixels:
            image.load()
            return plain(upright(image))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises, the file is at fault
        raise ValueError(f"expected a whole {kind} image, got one that cannot be decoded: {error}") from None
    raise ValueError(f"expected at most {max_pixels} pixels, got {width} x {height}; make it smaller")


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF data say; it must be loaded, as some formats turn it themselves."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - data beside the image that nobody can read leave it as it is stored
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def plain(image: Image.Image) -> Image.Image:
    """Return an image as grey or RGB of 8 bits a channel; of 16 bits the upper 8 are kept."""
    if image.mode in MODES.values():
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # Pillow would warn that it is left out
    return image.convert("L" if image.mode in {"1", "LA"} else "RGB")


def _format(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    raise ValueError(f"expected a JPEG, PNG or WebP image, got {len(data)} bytes that begin with {data[:8]!r}")


def _opened(data: bytes, kind: str) -> ImageFile:
    """Read the header. Not by `Image.open`, whose limit of pixels is one for the whole process."""
    if kind == "JPEG":
        return _opened_jpeg(data)
    if kind == "PNG":
        return PngImagePlugin.PngImageFile(BytesIO(data))
    return WebPImagePlugin.WebPImageFile(BytesIO(data))


def _opened_jpeg(data: bytes) -> ImageFile:
    image = JpegImagePlugin.JpegImageFile(BytesIO(data))
    if _scans(data, components=image.layers, progressive="progressive" in image.info) > _MOST_SCANS:
        raise ValueError(f"it has more than {_MOST_SCANS} scans")
    return image


def _scans(data: bytes, *, components: int, progressive: bool) -> int:
    """Return the number of scans that a decoder would read of a JPEG file."""
    scans, position = 0, 2
    while marker := _MARKER.search(data, position):
        kind, position = data[marker.end() - 1], marker.end()
        if kind == _END_OF_IMAGE:
            break
        if kind == _START_OF_SCAN:
            scans += 1
            if not progressive and data[position + 2 : position + 3] == bytes([components]):
                break  # it has all there is to read
        position += int.from_bytes(data[position : position + 2])
    return scans


def _resized(image: Image.Image, shorter: int, resampling: Image.Resampling, *, max_pixels: int) -> Image.Image:
    """Resize the shorter side, as torchvision's `Resize` does it: the longer one is rounded down."""
    width, height = image.size
    longer = int(shorter * max(image.size) / min(image.size))
    if shorter * longer > max_pixels:
        raise ValueError(
            f"expected proportions that fit into {max_pixels} pixels at {shorter} on the shorter side, got {width} x "
            f"{height}; crop it"
        )
    size = (shorter, longer) if width <= height else (longer, shorter)
    return image if size == image.size else image.resize(size, resampling)


def _centre(image: Image.Image, *, width: int, height: int) -> Image.Image:
    """Cut out the middle, as torchvision's `CenterCrop` does it."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
