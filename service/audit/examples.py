"""The nearest adversarial images of an audit: plain values while it runs, files when it has ended.

Search --nearest: a few of a shard--> [Example] --worst: a few of an attack--> examples.npz, PNG: clean, adversarial,
                                                                               difference
"""

from __future__ import annotations

import base64
import io
import zipfile
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from service.audit.report import ExampleReport, picture_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float32, Float64, UInt8

    from service.audit.outcomes import Outcomes
    from service.audit.plan import Attack

# Of a shard: the nearest of all are among the nearest of each.
PER_SHARD = 2

# Of an attack in a report: a row of pictures.
PER_ATTACK = 4

_WHITE = 255
# A pixel that does not change is grey.
_GREY = 128
# The least side of a picture, in pixels: a 32 x 32 image is enlarged, or nobody sees it.
_SIDE = 128
# The first moment that a ZIP file knows, so that equal arrays make equal files.
_EPOCH = (1980, 1, 1, 0, 0, 0)


class Example(BaseModel):
    """One adversarial image, exactly as it was sent.

    Attributes:
        attack: id of the attack that found it.
        row: which of the audit's samples it is a change of.
        distance: in the attack's norm.
        shape: (channels, height, width).
        clean: the bytes of the clean image in float32, [0, 1], little endian, in base64.
        adversarial: the same of the adversarial one.
    """

    model_config = ConfigDict(frozen=True)

    attack: str
    row: int
    distance: float
    shape: tuple[int, int, int]
    clean: str
    adversarial: str

    @property
    def picture(self) -> str:
        """The name of the PNG file that shows it."""
        return picture_name(self.attack, self.row)

    def images(self) -> Float32[np.ndarray, "2 c h w"]:
        """Return the clean and the adversarial image."""
        pixels = [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in (self.clean, self.adversarial)]
        return np.stack(pixels).reshape(2, *self.shape)


def nearest(
    *,
    attack: str,
    start: int,
    clean: Float32[np.ndarray, "n c h w"],
    adversarial: Float32[np.ndarray, "n c h w"],
    distances: Float64[np.ndarray, " n"],
    count: int = PER_SHARD,
) -> tuple[Example, ...]:
    """Return the nearest adversarial images of a shard, nearest first.

    Args:
        attack: its id.
        start: the shard's first row.
        clean: images as sent.
        adversarial: the nearest that fooled the target.
        distances: 0 where none was needed and inf where none was found, which are left out.
        count: at most this many.
    """
    found = np.flatnonzero(np.isfinite(distances) & (distances > 0))
    chosen = found[np.argsort(distances[found], kind="stable")][:count]
    return tuple(
        Example(
            attack=attack,
            row=start + int(index),
            distance=float(distances[index]),
            shape=clean.shape[1:],
            clean=_text(clean[index]),
            adversarial=_text(adversarial[index]),
        )
        for index in chosen
    )


def worst(found: Sequence[Example], *, count: int = PER_ATTACK) -> tuple[Example, ...]:
    """Return the nearest of each attack, nearest first: attacks in the order in which they occur."""
    kept: list[Example] = []
    for attack in dict.fromkeys(each.attack for each in found):
        own = sorted((each for each in found if each.attack == attack), key=lambda each: (each.distance, each.row))
        kept += own[:count]
    return tuple(kept)


def describe(
    example: Example,
    outcomes: Outcomes,
    *,
    attack: Attack,
    indices: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]],
    class_names: Sequence[str],
) -> ExampleReport:
    """Return what a report says of an example.

    Args:
        example: found by the attack.
        outcomes: of its audit.
        attack: of the plan.
        indices: of the audit's samples in their data set.
        class_names: in the order of the logits.
    """
    nearest = outcomes.attacked[example.attack].nearest
    place = int(np.searchsorted(nearest.rows, example.row))
    confidences = nearest.confidences
    return ExampleReport(
        attack=example.attack,
        row=example.row,
        index=int(indices[example.row]),
        label=class_names[outcomes.labels[example.row]],
        prediction=class_names[nearest.predictions[place]],
        confidence=None if confidences is None else float(confidences[place]),
        distance=example.distance,
        norm=attack.norm,
    )


def to_npz(examples: Sequence[Example]) -> bytes:
    """Return the images exactly: arrays "ATTACK-ROW.clean" and "ATTACK-ROW.adversarial", float32 CHW in [0, 1].

    Equal examples make equal bytes, which `numpy.savez` with its time stamps does not promise.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for example in examples:
            name = f"{example.attack}-{example.row}"
            for kind, image in zip(("clean", "adversarial"), example.images(), strict=True):
                content = io.BytesIO()
                np.lib.format.write_array(content, image, allow_pickle=False)
                entry = zipfile.ZipInfo(f"{name}.{kind}.npy", date_time=_EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content.getvalue())
    return file.getvalue()


def to_png(example: Example) -> bytes:
    """Return the clean image, the adversarial one and their difference side by side.

    The difference is stretched until its largest change is black or white; no change is grey.
    """
    clean, adversarial = example.images()
    change = adversarial - clean
    stretched = change / max(float(np.abs(change).max()), np.finfo(np.float32).tiny)
    levels = [_levels(clean * _WHITE), _levels(adversarial * _WHITE), _levels(_GREY + stretched * (_WHITE - _GREY))]
    row = np.concatenate(levels, axis=1)
    picture = Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row)
    scale = max(1, _SIDE // example.shape[1])
    file = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _levels(image: Float32[np.ndarray, "c h w"]) -> UInt8[np.ndarray, "h w c"]:
    levels: UInt8[np.ndarray, "c h w"] = np.rint(image).clip(0, _WHITE).astype(np.uint8)
    return levels.transpose(1, 2, 0)


def _text(image: Float32[np.ndarray, "c h w"]) -> str:
    return base64.b64encode(image.astype("<f4").tobytes()).decode()
