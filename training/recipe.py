"""The only description of a training run.

TOML file -> `read` -> frozen `Recipe` -> every other module of the package

Decoding is strict: an unknown key, a missing key or a value of another type is an error that names its path
in the file. A recipe without a `[tenet]` section trains without TENET, one without `[adversarial]` on natural
images.
"""

from __future__ import annotations

import json
import re
import tomllib
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

BARE = re.compile(r"[A-Za-z0-9_-]+")  # keys that TOML takes without quotes
MAX_DEPTH = 110  # layers; the best of the ResNet paper's CIFAR family, 1202 do worse (He et al. 2016, table 6)
SEEDS = 2**60  # streams of random numbers are seeded with 4 * seed + 0..3, which fit into 63 bits
MAX_PADDING = 64  # pixels; twice the size of the images that crops are usual for
MAX_RATE = 1e6  # far beyond any rate that trains
MAX_THREADS = 1024  # far beyond the cores of a machine; PyTorch starts as many as it is asked for
MAX_SIZE = 4096  # pixels; far beyond what classifiers are trained on

DataName = Literal["digits", "folder", "npz", "cifar10", "cifar100", "tiny-imagenet", "cub-200-2011"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["one-cycle", "cosine", "step", "constant"]
Variant = Literal["published", "paper"]
Precision = Literal["fp32", "bf16"]


def _layers(per_block: int, rest: int) -> AfterValidator:
    def check(value: int) -> int:
        if value < per_block + rest or (value - rest) % per_block:
            examples = ", ".join(str(per_block * blocks + rest) for blocks in range(1, 5))
            msg = f"expected {per_block}n + {rest} layers: {examples}, ..."
            raise ValueError(msg)
        return value

    return AfterValidator(check)


def _fraction(value: object) -> object:
    """Return the number that a text such as "8/255" stands for."""
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError('expected a number or a fraction such as "8/255"') from error


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PerChannel = tuple[float, float, float]
Scale = Annotated[float, Field(gt=0)]
Depth = Annotated[int, Field(ge=8, le=MAX_DEPTH)]
Width = Annotated[int, Field(ge=1, le=1024)]
Distance = Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)]


class Section(BaseModel):
    """A frozen table of the recipe that accepts no key but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """What is learned from.

    `root` is a folder, or the npz file, relative to the working folder. `download` fetches a data set that has a
    public address into `root` first. `validation` is the share of the training split that is held out,
    stratified by class, to pick the best epoch. `per_class` keeps that many images of each class to train and
    validate with, drawn by the run's seed: the low-data regime. With `size`, images may differ in size: `workers`
    processes decode them for each batch, crop at random to `size` x `size` pixels in training, and resize and
    crop at the centre otherwise; without it, images must be of one size and stay in memory.
    """

    name: DataName
    root: str | None = None
    download: bool = False
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    per_class: Annotated[int, Field(ge=2)] | None = None
    size: Annotated[int, Field(ge=8, le=MAX_SIZE)] | None = None
    workers: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 2

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        _refuse_unused(self, "workers", unless=self.size is not None, only_with="size")
        return self


class _Model(Section):
    """What all classifiers have: `mean` and `std` normalise images in [0, 1], per channel, inside the model."""

    mean: PerChannel = (0.5, 0.5, 0.5)
    std: tuple[Scale, Scale, Scale] = (0.25, 0.25, 0.25)


class ResNet(_Model):
    """A residual network for small images, of 6n + 2 layers; `width` channels in its first stage."""

    name: Literal["resnet"] = "resnet"
    depth: Annotated[Depth, _layers(6, 2)] = 20
    width: Width = 16


class ResNeXt(_Model):
    """ResNeXt for small images, of 9n + 2 layers; the defaults are the TENET paper's ResNeXt-29 (4 x 32d)."""

    name: Literal["resnext"]
    depth: Annotated[Depth, _layers(9, 2)] = 29
    cardinality: Width = 4
    width: Width = 32


class WideResNet(_Model):
    """A wide residual network for small images, of 6n + 4 layers, `width` times as wide as a ResNet."""

    name: Literal["wide-resnet"]
    depth: Annotated[Depth, _layers(6, 4)] = 40
    width: Width = 2


class LibraryModel(_Model):
    """A classifier of a library, as "torchvision/resnet18" or "timm/efficientnet_b0", with fresh weights."""

    name: Annotated[str, Field(pattern=r"^(torchvision|timm)/[A-Za-z0-9_.-]+$")]


class OwnModel(_Model):
    """A classifier of one's own: `factory` is "package.module:function", called with `num_classes=` alone."""

    factory: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

    @property
    def name(self) -> str:
        """Return what stands for the name of a classifier of one's own."""
        return self.factory


def _model_tag(value: object) -> str:
    """Return which kind of classifier a table, or a decoded one, describes."""
    if isinstance(value, OwnModel) or (isinstance(value, dict) and "factory" in value):
        return "own"
    name = value.get("name", "resnet") if isinstance(value, dict) else getattr(value, "name", None)
    return str(name) if name in ("resnet", "resnext", "wide-resnet") else "library"


Model = Annotated[
    Annotated[ResNet, Tag("resnet")]
    | Annotated[ResNeXt, Tag("resnext")]
    | Annotated[WideResNet, Tag("wide-resnet")]
    | Annotated[LibraryModel, Tag("library")]
    | Annotated[OwnModel, Tag("own")],
    Discriminator(_model_tag),
]


class AugMix(Section):
    """AugMix (Hendrycks et al. 2020); the defaults are the published ones.

    `width` chains of `depth` operations, 1 to 3 at random where it is -1, of strength up to `severity` of 10,
    mixed with Dirichlet and Beta weights of parameter `alpha`. `jsd` is the weight of the Jensen-Shannon term
    between the clean and two mixed views; 0 trains on one mixed view alone. `all_operations` adds brightness,
    colour, contrast and sharpness, which overlap with the corruptions of the benchmark.
    """

    severity: Annotated[float, Field(gt=0, le=10)] = 3
    width: Annotated[int, Field(ge=1, le=10)] = 3
    depth: Literal[-1, 1, 2, 3, 4] = -1
    alpha: Scale = 1.0
    jsd: Weight = 12.0
    all_operations: bool = False


class Augmentation(Section):
    """What is done to training images, in this order, on the device.

    `crop_padding` is in pixels, 0 crops nothing. `cutout` is the side, in pixels, of the square that is blotted
    out (DeVries and Taylor 2017), 0 for none. `random_erasing` is the probability that a rectangle is replaced
    by noise (Zhong et al. 2020). `smallest_crop` is the least share of the area that a random crop to `data.size`
    keeps.
    """

    crop_padding: Annotated[int, Field(ge=0, le=MAX_PADDING)] = 0
    flip: bool = False
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    augmix: AugMix | None = None
    cutout: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    random_erasing: Share = 0.0


class Training(Section):
    """How the loss is lowered.

    `batch_size` counts the images of all processes together. `learning_rate` is the peak of the schedule:
    "one-cycle" and "cosine" end at 0, "step" multiplies by `decay` after each epoch of `milestones`. The rate
    rises over the `warm_up` share of the run, 0.3 in "one-cycle" and 0 elsewhere unless it is given.
    `momentum` is SGD's, with Nesterov's correction. `ema` is the decay, an iteration, of an exponential moving average
    of the weights, which is validated, tested and saved in their place, 0 for none; after n iterations it is at most
    (1 + n) / (10 + n), so that the first weights are forgotten. `clip_norm` bounds the norm of the
    gradient. `precision` "bf16" computes under autocast. `channels_last` and `compile` change speed, not results.
    `threads` is the number of CPU threads, PyTorch's choice where it is left out. `sync_batch_norm` makes batch
    statistics those of all processes together.
    """

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)] = 128
    optimizer: Optimizer = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=MAX_RATE)] = 0.1
    weight_decay: Weight = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Schedule = "one-cycle"
    warm_up: Annotated[float, Field(ge=0, lt=1)] | None = None
    milestones: tuple[Count, ...] = ()
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Scale | None = None
    precision: Precision = "fp32"
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = True
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        _refuse_unused(self, "momentum", unless=self.optimizer == "sgd", only_with='optimizer "sgd"')
        _refuse_unused(self, "decay", unless=self.schedule == "step", only_with='schedule "step"')
        return self

    @model_validator(mode="after")
    def _milestones_are_for_steps(self) -> Self:
        if (self.schedule == "step") != bool(self.milestones):
            msg = f'expected milestones with schedule "step" and with no other, got schedule "{self.schedule}" and '
            raise ValueError(msg + f"milestones {list(self.milestones)}")
        if list(self.milestones) != sorted({*self.milestones}) or any(m >= self.epochs for m in self.milestones):
            msg = f"expected milestones that rise and come before epoch {self.epochs}, got {list(self.milestones)}"
            raise ValueError(msg)
        return self


class FreeAdversarial(Section):
    """Free adversarial training (Shafahi et al. 2019), Linf.

    Each batch is replayed `replays` times, each a step on the weights and on the perturbation, so `epochs` is
    divided by `replays` to do as many steps as natural training. `epsilon` is in pixel space [0, 1].
    """

    method: Literal["free"]
    epsilon: Distance = 8 / 255
    replays: Annotated[int, Field(ge=2, le=100)] = 8


class PgdAdversarial(Section):
    """Adversarial training on projected gradient descent (Madry et al. 2018), Linf.

    `epsilon` and `step_size` are in pixel space [0, 1].
    """

    method: Literal["pgd"]
    epsilon: Distance = 8 / 255
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    step_size: Distance = 2 / 255
    random_start: bool = True


Adversarial = Annotated[FreeAdversarial | PgdAdversarial, Field(discriminator="method")]


class Tenet(Section):
    """Group-wise inhibition; the defaults are the published ones.

    A TENET step follows every `interval`-th iteration once `start` iterations are done. `exact` repeats the
    order of the published code, with a second pass through the body. `fused` makes it no step of its own: the
    iteration's maps serve both losses, and one step lowers their sum.
    """

    stage: str
    groups: Annotated[int, Field(ge=2)] = 6
    variant: Variant = "published"
    interval: Count = 3
    start: Natural = 500
    lambda_tenet: Weight = 0.1
    lambda_orth: Weight = 1e-3
    exact: bool = False
    fused: bool = False

    @model_validator(mode="after")
    def _fused_is_not_exact(self) -> Self:
        if self.exact and self.fused:
            raise ValueError("expected exact or fused, got both; exact takes a second pass, which fused does without")
        return self


class Recipe(Section):
    """A whole training run."""

    data: Data
    model: Model = ResNet()
    training: Training
    augmentation: Augmentation = Augmentation()
    adversarial: Adversarial | None = None
    tenet: Tenet | None = None

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        _refuse_unused(self.augmentation, "smallest_crop", unless=self.data.size is not None, only_with="data.size")
        return self

    @model_validator(mode="after")
    def _consistency_is_of_natural_images(self) -> Self:
        augmix = self.augmentation.augmix
        if self.adversarial is not None and augmix is not None and augmix.jsd > 0:
            msg = "expected augmentation.augmix.jsd = 0 in adversarial training, whose images have one view, got "
            raise ValueError(msg + f"{augmix.jsd}")
        return self


def _refuse_unused(section: Section, key: str, *, unless: bool, only_with: str) -> None:
    """Raise ValueError for a key that is not at its default, and has no effect."""
    value = getattr(section, key)
    if not unless and value != type(section).model_fields[key].default:
        msg = f"expected {key} only with {only_with}, without which it has no effect, got {value}; leave it out"
        raise ValueError(msg)


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


KINDS: dict[str, type[Section]] = {
    "resnet": ResNet,
    "resnext": ResNeXt,
    "wide-resnet": WideResNet,
    "library": LibraryModel,
    "own": OwnModel,
    "free": FreeAdversarial,
    "pgd": PgdAdversarial,
}
TABLES: dict[str, type[Section]] = {
    "data": Data,
    "training": Training,
    "augmentation": Augmentation,
    "augmix": AugMix,
    "tenet": Tenet,
}


def _problem(details: ErrorDetails) -> str:
    location = [str(part) for part in details["loc"]]
    keys = location[:1] + [part for part in location[1:] if part not in KINDS]  # a union's tag is not in the file
    if details["type"].startswith("union_tag"):
        keys.append("method")
    match details["type"]:
        case "extra_forbidden":
            complaint = f"unknown key; known keys are {', '.join(_known(location[:-1]))}"
        case "missing":
            complaint = "missing; expected this key in the recipe"
        case "union_tag_not_found":
            complaint = 'missing; expected "free" or "pgd"'
        case "union_tag_invalid":
            complaint = f'expected "free" or "pgd", got {details["ctx"]["tag"]!r}'
        case "string_pattern_mismatch":
            complaint = f"expected {EXPECTED_NAMES[keys[-1]]}, got {details['input']!r}"
        case _:
            complaint = _reworded(details)
    return f"{'.'.join(_key(key) for key in keys) or 'recipe'}: {complaint}"


def _reworded(details: ErrorDetails) -> str:
    """Return pydantic's message in the words of our own."""
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "expected to")
    message = message.replace("expected to be", "expected")
    if isinstance(details["input"], dict) and details["type"] == "value_error":  # the message names what came
        return message
    return f"{message}, got {details['input']!r}"


EXPECTED_NAMES = {
    "name": '"resnet", "resnext", "wide-resnet", "torchvision/NAME" or "timm/NAME"',
    "factory": '"package.module:function"',
}


def _key(name: str) -> str:
    """Return a key as TOML writes it: quoted, and on one line, unless it is bare."""
    return name if BARE.fullmatch(name) else json.dumps(name)


def _known(path: list[str]) -> list[str]:
    section = Recipe if not path else (KINDS | TABLES)[path[-1]]
    return list(section.model_fields)
