"""`tenet predict`: image files -> classes, by a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.console import print_table

if TYPE_CHECKING:
    from export.engines.base import Images, Logits
    from service.client import ModelMetadata

# Pillow's modes for as many channels.
_MODES = {1: "L", 3: "RGB"}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("predict", epilog="Example: tenet predict 7.png --server 127.0.0.1:8001 --model digits")(predict)


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files; they are resized to the model's input.")],
    server: Annotated[str, typer.Option(envvar="TENET_SERVER", help="HOST:PORT of the server.")],
    model: Annotated[str, typer.Option(help="The model's name.")],
    version: Annotated[int | None, typer.Option(help="Its version; the latest by default.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify images."""
    import numpy as np

    from service.client import Client

    with Client(server) as client:
        described = client.metadata(model, version=version)
        batch = np.stack([_read(path, _checked(described)) for path in images])
        answers = client.infer(batch, model=model, version=version)
    shares = answers if described.answers_probabilities else _softmax(answers)
    names = described.class_names or tuple(map(str, range(shares.shape[1])))
    found = [(str(path), names[share.argmax()], float(share.max())) for path, share in zip(images, shares, strict=True)]
    if as_json:
        typer.echo(json.dumps([{"image": path, "class": name, "probability": share} for path, name, share in found]))
    else:
        print_table(["image", "class", "probability"], [[path, name, f"{share:.1%}"] for path, name, share in found])


def _checked(described: ModelMetadata) -> tuple[int, int, int]:
    channels, height, width = described.image_shape
    if channels not in _MODES or min(height, width) < 1:
        raise ValueError(
            f"{described.name}: expected a model that takes grey or RGB images of one size, got one that takes "
            f"{described.inputs[0].shape}; send it arrays by `service.client`"
        )
    return channels, height, width


def _softmax(logits: Logits) -> Logits:
    import numpy as np

    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _read(path: Path, shape: tuple[int, int, int]) -> Images:
    """Return one image as (C, H, W) float32 in [0, 1]."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            resized = image.convert(_MODES[channels]).resize((width, height), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected an image file here, found none") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: expected an image, got a file that cannot be decoded") from None
    stored = np.asarray(resized, dtype=np.float32).reshape(height, width, channels)
    return stored.transpose(2, 0, 1) / np.float32(255)
