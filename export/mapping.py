"""What a foreign graph takes for an image and gives for an answer, as its user describes it.

flags | TOML --strictly--> Mapping --> what the original is fed (`feed`), and the nodes put around it (export.foreign)
"""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float32, Shaped
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import TensorSpec

# What numpy calls the types that a graph may take images as.
DTYPES = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8}

_WHITE_UINT8 = 255.0


class Mapping(BaseModel):
    """How images of ours become the graph's, and which of its outputs is the answer.

    An image is RGB in [0, 1]. The graph gets `(image - mean) / std * range`, computed in float32; then the order of
    channels, the layout and the type that it wants. `mean` and `std` are those of torchvision: of images in [0, 1],
    in the order R, G, B even where the graph takes BGR. Where a model's documentation states them for images of 0 to
    255, divide them by 255, and give `range = 1` if it divides by std, `range = 255` if it only subtracts the mean.

    Attributes:
        input: the input that takes the images; needed where there are several.
        output: the output that gives the scores; needed where there are several.
        layout: the order of the graph's input dimensions.
        channels: the order of the graph's channels; "L" for one channel.
        range: the value that white has for the graph before mean and std; None stands for 1, and for 255 where the
            graph takes uint8.
        mean: subtracted: one number, or one a channel.
        std: divided by: one number, or one a channel.
        image_size: (height, width) in pixels, for graphs that leave them open.
        dynamic_batch: whether a fixed batch is to be replaced by a dynamic one.
        probabilities: whether the output is that of a softmax; None looks whether the graph ends in one.
        labels: names of the classes in the order of the scores; () for those in the file's metadata.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    input: str | None = None
    output: str | None = None
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR", "L"] = "RGB"
    range: FiniteFloat | None = Field(default=None, gt=0)
    mean: tuple[FiniteFloat, ...] = ()
    std: tuple[FiniteFloat, ...] = ()
    image_size: tuple[int, int] | None = None
    dynamic_batch: bool = False
    probabilities: bool | None = None
    labels: tuple[str, ...] = ()

    @field_validator("std")
    @classmethod
    def _divisible(cls, std: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0 for value in std):
            raise ValueError("expected numbers above 0, since images are divided by them")
        return std

    @field_validator("image_size")
    @classmethod
    def _positive(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and min(size) < 1:
            raise ValueError("expected height and width in pixels, both at least 1")
        return size

    def white(self, datatype: str) -> float:
        """Return the value of white for a graph that takes this type, before mean and std."""
        if self.range is not None:
            return self.range
        return _WHITE_UINT8 if datatype == "UINT8" else 1.0

    def normalised(self) -> bool:
        """Return whether there is a mean or a std to apply."""
        return any(self.mean) or any(value != 1 for value in self.std)


def read_mapping(path: Path) -> Mapping:
    """Read a mapping from a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or no mapping; the message names the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a mapping in TOML here, found no file; check the path")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        # Strict decoding takes arrays for tuples only by way of JSON, without dates: they become what no key takes.
        return Mapping.model_validate_json(json.dumps(document, default=lambda date: {"date": str(date)}))
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0] if first["loc"] else "document"
        known = f"; expected one of {', '.join(Mapping.model_fields)}" if first["type"] == "extra_forbidden" else ""
        message = "unknown key" if known else first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {key}: {message[0].lower()}{message[1:]}{known}") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected TOML: {error}") from None


def feed(
    images: Float32[np.ndarray, "batch channels height width"], mapping: Mapping, spec: TensorSpec
) -> Shaped[np.ndarray, "batch _ _ _"]:
    """Return what the original graph takes for these images.

    Args:
        images: in [0, 1]; for a graph adapted to uint8, those that 255 levels can express.
        mapping: what the graph takes.
        spec: its own input (`Adapted.native`).

    Returns:
        An array of the input's type, NCHW or NHWC as the mapping says.
    """
    values = images
    if mapping.mean:
        values = values - per_channel(mapping.mean)
    if mapping.std:
        values = values / per_channel(mapping.std)
    values = values * np.float32(mapping.white(spec.datatype))
    if mapping.channels == "BGR":
        values = values[:, ::-1]
    if mapping.layout == "NHWC":
        values = values.transpose(0, 2, 3, 1)
    if spec.datatype == "UINT8":
        values = np.rint(values)
    return np.ascontiguousarray(values.astype(DTYPES[spec.datatype]))


def per_channel(values: tuple[float, ...]) -> Float32[np.ndarray, "channels 1 1"]:
    """Return one number a channel (or one for all) as images take them, channels first."""
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1)
