"""`tenet predict`: image files -> classes, by a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import print_table

if TYPE_CHECKING:
    from export.engines.base import Images


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
        _, _, height, width = described.inputs[0].shape
        batch = np.stack([_read(path, height, width) for path in images])
        logits = client.infer(batch, model=model, version=version)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    names = described.class_names or tuple(map(str, range(logits.shape[1])))
    found = [(str(path), names[share.argmax()], float(share.max())) for path, share in zip(images, shares, strict=True)]
    if as_json:
        typer.echo(json.dumps([{"image": path, "class": name, "probability": share} for path, name, share in found]))
    else:
        print_table(["image", "class", "probability"], [[path, name, f"{share:.1%}"] for path, name, share in found])


def _read(path: Path, height: int, width: int) -> Images:
    """Return one image as (3, H, W) float32 in [0, 1]."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected an image file here, found none") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: expected an image, got a file that cannot be decoded") from None
    return np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
