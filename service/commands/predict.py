"""`tenet predict`: image files -> classes, by a running server.

files --as they are--> a server that decodes --------------------> classes
      --decoded and resized here, to arrays--> any other server -->
"""

from __future__ import annotations

import json
import math
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from export.console import print_table
from service.commands.connection import Connection, connected

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from PIL.ImageFile import ImageFile

    from export.engines.base import Images, Logits
    from service.client import Client, ModelMetadata, Prediction

# How files of the formats that servers decode begin; others are sent as PNG.
_SENDABLE = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")

# What is taken for an image in a folder.
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# Images that are decoded here and sent at once.
_BATCH = 64


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("predict", epilog="Example: tenet predict 7.png --server 127.0.0.1:8001 --model digits")(
        connected(predict)
    )


def predict(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders of them; they are resized to the model's input.")
    ],
    connection: Connection,
    model: Annotated[str, typer.Option(help="The model's name.")],
    version: Annotated[str | None, typer.Option(help="Its version, or an alias; the latest by default.")] = None,
    *,
    top: Annotated[int, typer.Option(min=1, help="The most probable classes of each image.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify images."""
    with connection.client() as client:
        described = client.metadata(model, version=version)
        paths = list(_files(images))
        answers = _answers(client, paths, described, version=version)
    found = described.predictions(answers, top=top)
    named = list(zip(map(str, paths), found, strict=True))
    if as_json:
        typer.echo(json.dumps([_record(path, classes, top=top) for path, classes in named]))
    else:
        print_table(["image", "class", "probability"], [row for path, classes in named for row in _rows(path, classes)])


def _files(images: Iterable[Path]) -> Iterator[Path]:
    """Yield files, in the place of a folder those in it and below it, by name."""
    for path in images:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in _SUFFIXES and each.is_file())
        if not inside:
            raise ValueError(f"{path}: expected a folder with images, found none that end in {', '.join(_SUFFIXES)}")
        yield from inside


def _answers(client: Client, paths: Sequence[Path], described: ModelMetadata, *, version: str | None) -> Logits:
    import numpy as np

    from service.errors import InvalidArgument

    if not described.takes_encoded_images:
        batches = _batches(paths, _checked(described))
        return np.concatenate(list(client.infer_many(batches, model=described.name, version=version)))
    try:
        return client.infer_encoded((_encoded(path) for path in paths), model=described.name, version=version)
    except InvalidArgument:
        # The server counts the images of a request: say which file it is.
        for path in paths:
            _pixels(path, (3, 1, 1))
        raise


def _batches(paths: Iterable[Path], shape: tuple[int, int, int]) -> Iterator[Images]:
    """Yield images as (N, C, H, W) float32 in [0, 1]."""
    import numpy as np

    left = iter(paths)
    while part := list(islice(left, _BATCH)):
        stored = np.stack([_pixels(path, shape) for path in part])
        yield stored.transpose(0, 3, 1, 2) / np.float32(255)


def _checked(described: ModelMetadata) -> tuple[int, int, int]:
    channels, height, width = described.image_shape
    if channels not in {1, 3} or min(height, width) < 1:
        raise ValueError(
            f"{described.name}: expected a model that takes grey or RGB images of one size, got one that takes "
            f"{described.inputs[0].shape}; send it arrays by `service.client`"
        )
    return channels, height, width


def _pixels(path: Path, shape: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode and resize one image, to (H, W, C) uint8."""
    from export import pictures

    encoded = _encoded(path)
    try:
        return pictures.pixels(encoded, image_shape=shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _encoded(path: Path) -> bytes:
    """Return a file as JPEG, PNG or WebP: as it is, or without loss as PNG."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected an image file here, found none") from None
    if content.startswith(_SENDABLE) or (content.startswith(b"RIFF") and content[8:12] == b"WEBP"):
        return content
    return _as_png(path, content)


def _as_png(path: Path, content: bytes) -> bytes:
    from PIL import Image, UnidentifiedImageError

    from export import pictures

    converted = BytesIO()
    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
            _check_depth(image)
            # As servers make of it what they decode, so that its pixels are those of the same image as PNG.
            pictures.plain(pictures.upright(image)).save(converted, "PNG", compress_level=1)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: expected an image, got a file that cannot be decoded") from None
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises, the file is at fault
        raise ValueError(f"{path}: expected a whole image, got one that cannot be decoded: {error}") from None
    return converted.getvalue()


def _check_depth(image: ImageFile) -> None:
    # Pillow has the 16 bits of PGM files in 32. What else has so many says nowhere what is white.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError("it has 32 bits a channel; save it with 8 or 16")


def _record(path: str, classes: Sequence[Prediction], *, top: int) -> dict[str, Any]:
    first = {"image": path, **_named(classes[0])}
    return first if top == 1 else {**first, "top": [_named(each) for each in classes]}


def _named(prediction: Prediction) -> dict[str, Any]:
    # JSON has no NaN, which is what a model answers that has gone wrong.
    probability = prediction.probability if math.isfinite(prediction.probability) else None
    return {"class": prediction.name, "probability": probability}


def _rows(path: str, classes: Sequence[Prediction]) -> list[list[str]]:
    return [[path if rank == 0 else "", each.name, f"{each.probability:.1%}"] for rank, each in enumerate(classes)]
