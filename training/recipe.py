"""The only description of a training run.

TOML file -> `read` -> frozen `Recipe` -> every other module of the package

Decoding is strict: an unknown key, a missing key or a value of another type is an error that names its path
in the file. A recipe without a `[tenet]` section trains without TENET.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

BARE = re.compile(r"[A-Za-z0-9_-]+")  # keys that TOML takes without quotes
MAX_DEPTH = 110  # layers; the best of the ResNet paper's CIFAR family, 1202 do worse (He et al. 2016, table 6)
SEEDS = 2**62  # a run draws from the streams 2 * seed and 2 * seed + 1, which fit into 63 bits
MAX_PADDING = 64  # pixels; twice the size of the images that crops are usual for
MAX_RATE = 1e6  # far beyond any rate that trains
MAX_THREADS = 1024  # far beyond the cores of a machine; PyTorch starts as many as it is asked for

DataName = Literal["digits", "folder"]
ModelName = Literal["resnet"]
Schedule = Literal["one-cycle", "constant"]
Variant = Literal["published", "paper"]


def _depth(value: int) -> int:
    if (value - 2) % 6:
        msg = "expected 6n + 2 layers: 8, 14, 20, 26, 32, ..."
        raise ValueError(msg)
    return value


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
PerChannel = tuple[float, float, float]
Scale = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A frozen table of the recipe that accepts no key but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """What is learned from.

    `root` is the folder of the data set "folder", relative to the working folder. `validation` is the share
    of the training split that is held out, stratified by class, to pick the best epoch.
    """

    name: DataName
    root: str | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Model(Section):
    """A residual network of 6n + 2 layers; `width` channels in its first stage, 4 * `width` in its last.

    `mean` and `std` normalise images in [0, 1], per channel, inside the model.
    """

    name: ModelName = "resnet"
    depth: Annotated[int, Field(ge=8, le=MAX_DEPTH), AfterValidator(_depth)] = 20
    width: Annotated[int, Field(ge=1, le=1024)] = 16
    mean: PerChannel = (0.5, 0.5, 0.5)
    std: tuple[Scale, Scale, Scale] = (0.25, 0.25, 0.25)


class Training(Section):
    """Stochastic gradient descent with Nesterov momentum.

    `learning_rate` is the peak of the schedule. `crop_padding` is in pixels, 0 crops nothing. `threads` is
    the number of CPU threads, PyTorch's choice where it is left out.
    """

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)] = 128
    learning_rate: Annotated[float, Field(gt=0, le=MAX_RATE)] = 0.1
    weight_decay: Weight = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Schedule = "one-cycle"
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0
    crop_padding: Annotated[int, Field(ge=0, le=MAX_PADDING)] = 0
    flip: bool = False
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None


class Tenet(Section):
    """Group-wise inhibition; the defaults are the published ones.

    A TENET step follows every `interval`-th iteration once `start` iterations are done. `exact` repeats the
    order of the published code, with a second pass through the body.
    """

    stage: str
    groups: Annotated[int, Field(ge=2)] = 6
    variant: Variant = "published"
    interval: Count = 3
    start: Natural = 500
    lambda_tenet: Weight = 0.1
    lambda_orth: Weight = 1e-3
    exact: bool = False


class Recipe(Section):
    """A whole training run."""

    data: Data
    model: Model = Model()
    training: Training
    tenet: Tenet | None = None


def read(path: Path) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not TOML, or not a recipe; one line per problem.
    """
    if not path.is_file():
        msg = f"{path}: no such recipe; expected the path of a TOML file"
        raise FileNotFoundError(msg)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        msg = f"{path}: expected TOML, got an error on reading it: {error}"
        raise ValueError(msg) from error
    return decode(document, source=str(path))


def decode(document: Mapping[str, Any], *, source: str) -> Recipe:
    """Decode a recipe from plain values; `source` begins each line of the error.

    Raises:
        ValueError: one line per problem: the key's path, what was expected, what came.
    """
    try:
        # in JSON, pydantic's strict mode takes arrays for tuples; a date becomes text and is refused as such
        return Recipe.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        lines = [f"{source}: {_problem(details)}" for details in error.errors()]
        raise ValueError("\n".join(lines)) from error


def _problem(details: ErrorDetails) -> str:
    path = ".".join(_key(str(part)) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{path}: unknown key; known keys are {', '.join(_known(details['loc'][:-1]))}"
    if details["type"] == "missing":
        return f"{path}: missing; expected this key in the recipe"
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "expected to")
    message = message.replace("expected to be", "expected")
    return f"{path}: {message}, got {details['input']!r}"


def _key(name: str) -> str:
    """Return a key as TOML writes it: quoted, and on one line, unless it is bare."""
    return name if BARE.fullmatch(name) else json.dumps(name)


def _known(path: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[Section]] = {"data": Data, "model": Model, "training": Training, "tenet": Tenet}
    section = sections[str(path[0])] if path else Recipe
    return list(section.model_fields)
