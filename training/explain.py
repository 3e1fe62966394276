"""Where a run looks, beside where another looks: the TENET paper's figure 2.

image folder -> `read` -> Pictures -> `explain`, for each run -> Explanation -> overlay -> explain.png
                                                                             -> explain.json
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image, ImageOps
from torch import Tensor

from training import checkpoint, overlay
from training.data import SUFFIXES, ImageFiles
from training.grad_cam import grad_cam, map_layers, spread

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from training.checkpoint import Checkpoint

PICTURE, RECORD = "explain.png", "explain.json"
BATCH = 64  # images; bounds memory and does not change the maps
SHOWN = 5  # class names in an error


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images in [0, 1], their files relative to the folder, and their true classes where the folder tells."""

    files: tuple[str, ...]
    true_classes: tuple[str | None, ...]
    images: Float[Tensor, "n 3 height width"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model predicts, how probable it holds that to be, and where it looks: Grad-CAM of the predicted class.

    `spreads` are the shares of each image whose map is at least half of its maximum.
    """

    layer: str
    classes: Int64[Tensor, " n"]
    probabilities: Float[Tensor, " n"]
    maps: Float[Tensor, "n height width"]
    spreads: Float[Tensor, " n"]

    @property
    def mean_spread(self) -> tuple[float, float | None]:
        """Return the mean of the spreads and its standard error, which one image does not have."""
        n = len(self.spreads)
        return float(self.spreads.mean()), float(self.spreads.std()) / math.sqrt(n) if n > 1 else None


def compare(
    runs: Sequence[Path], *, images: Path, out: Path, layer: str | None = None, count: int = 8
) -> dict[str, Any]:
    """Explain what runs predict for the same images; write out/explain.png and out/explain.json.

    Args:
        runs: RUN folders, of the same classes and input size.
        images: a folder of images, or of one folder per class.
        out: the folder to write, or to write again.
        layer: as in `explain`.
        count: how many images, evenly spaced in the sorted list of files; all where there are fewer.

    Returns:
        The contents of explain.json.

    Raises:
        FileNotFoundError: a run or images are not there.
        ValueError: runs that do not go together, no such layer, a file that is not an image, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        msg = f"{out}: expected a folder to write, got a file; name another"
        raise ValueError(msg)
    checkpoints = [checkpoint.load(run) for run in runs]
    for run, loaded in zip(runs[1:], checkpoints[1:], strict=True):
        _refuse_other(run, loaded, first_run=runs[0], first=checkpoints[0])
    first = checkpoints[0]
    pictures = read(images, size=first.input_shape[1:], class_names=first.class_names, count=count)
    explanations = [explain(loaded.model, pictures.images, layer=layer) for loaded in checkpoints]
    names = _names(runs)
    drawn = overlay.draw(pictures, explanations, names=names, class_names=first.class_names)
    record = {
        "runs": [
            _run(name, loaded, explanation)
            for name, loaded, explanation in zip(names, checkpoints, explanations, strict=True)
        ],
        "images": _images(pictures, explanations, class_names=first.class_names),
    }
    out.mkdir(parents=True, exist_ok=True)
    drawn.savefig(out / PICTURE)
    (out / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def read(folder: Path, *, size: tuple[int, int], class_names: Sequence[str], count: int) -> Pictures:
    """Read images, scaled and cropped at the centre to `size`, height and width in pixels.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        PermissionError: a file may not be read.
        ValueError: a file is not an image, or a folder in it has no class's name.
    """
    if not folder.is_dir():
        msg = f"{folder}: no such folder; expected one of images, or of one folder per class"
        raise FileNotFoundError(msg)
    files = [(path, None) for path in _files(folder)] or _files_by_class(folder, class_names=class_names)
    if not files:
        msg = f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), here or in a folder per class, got none"
        raise FileNotFoundError(msg)
    count = min(count, len(files))
    chosen = [files[index * len(files) // count] for index in range(count)]
    paths = tuple(path.relative_to(folder).as_posix() for path, _ in chosen)
    reader = ImageFiles(folder, paths, np.zeros(count, dtype=np.int64), tuple(class_names))  # its labels are not asked
    fitted = [ImageOps.fit(reader.image(index), size[::-1], Image.Resampling.BILINEAR) for index in range(count)]
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in fitted]))
    return Pictures(paths, tuple(name for _, name in chosen), pixels.permute(0, 3, 1, 2).float() / 255)


def explain(
    model: nn.Module, images: Float[Tensor, "n channels height width"], *, layer: str | None = None
) -> Explanation:
    """Explain what a model predicts for each image.

    `layer` is the path of a submodule, as "layer3"; by default the last that puts out maps of more than one pixel.

    Raises:
        ValueError: there is no such layer, or none that puts out maps.
    """
    if layer is None:
        layers = map_layers(model, images[:1])
        if not layers:
            msg = f"model: expected one with maps of more than one pixel, got {type(model).__name__} without"
            raise ValueError(msg)
        layer = layers[-1].removeprefix("network.")  # as recipes name stages
    parts = [_explain(model, batch, layer=layer) for batch in torch.split(images, BATCH)]
    classes, probabilities, maps = (torch.cat(part) for part in zip(*parts, strict=True))
    return Explanation(layer, classes, probabilities, maps, spread(maps))


def _explain(model: nn.Module, images: Tensor, *, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        probabilities, classes = model(images).softmax(1).max(1)
    return classes, probabilities, grad_cam(model, images, classes, layer=layer)


def _refuse_other(run: Path, loaded: Checkpoint, *, first_run: Path, first: Checkpoint) -> None:
    if loaded.class_names != first.class_names:
        msg = (
            f"{run}: expected the classes of {first_run} ({_some(first.class_names)}), got {_some(loaded.class_names)}"
        )
        raise ValueError(msg)
    if loaded.input_shape != first.input_shape:
        sizes = [f"{shape[2]} x {shape[1]} pixels" for shape in (first.input_shape, loaded.input_shape)]
        msg = f"{run}: expected an input of {sizes[0]} as of {first_run}, got {sizes[1]}"
        raise ValueError(msg)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... {len(names)} in all" if len(names) > SHOWN else "")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def _files_by_class(folder: Path, *, class_names: Sequence[str]) -> list[tuple[Path, str | None]]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    for path in folders:
        if path.name not in class_names:
            msg = f"{path}: expected a folder named after a class of the run ({_some(class_names)}), got {path.name!r}"
            raise ValueError(msg)
    return [(file, path.name) for path in folders for file in _files(path)]


def _names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their folders: by the last part of the path, if it tells them apart."""
    names = [run.resolve().name for run in runs]
    return names if len({*names}) == len(names) else [str(run) for run in runs]


def _run(name: str, loaded: Checkpoint, explanation: Explanation) -> dict[str, Any]:
    mean, error = explanation.mean_spread
    return {
        "run": name,
        "sha256": loaded.sha256,
        "tenet": loaded.recipe.tenet is not None,
        "layer": explanation.layer,
        "mean_spread": mean,
        "standard_error": error,
        "n": len(explanation.spreads),
    }


def _images(
    pictures: Pictures, explanations: Sequence[Explanation], *, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "file": file,
            "true_class": true_class,
            "predictions": [
                {
                    "class": class_names[int(explanation.classes[index])],
                    "probability": float(explanation.probabilities[index]),
                    "spread": float(explanation.spreads[index]),
                }
                for explanation in explanations
            ],
        }
        for index, (file, true_class) in enumerate(zip(pictures.files, pictures.true_classes, strict=True))
    ]
