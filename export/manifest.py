"""What an engine is: the one description that travels with every engine file.

export --writes--> manifest.json --read by--> engines, serving, audits

It says enough to decide, before anything is parsed or deserialised, whether the file is the one that was published,
whether this machine can run it, how it was proved, how to make it again and what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

FILE_NAME = "manifest.json"

# What a name may look like, so that it is always one plain folder below the repository.
NAME_PATTERN = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# Bytes of a manifest.json or model.json: thousands of classes and files take one MiB; what is larger is none of ours.
LARGEST_RECORD = 8 << 20

# Images an engine takes at once: as float32 of 3 x 224 x 224 so many are 37 GiB, and Triton's limit is 2^31 - 1.
LARGEST_BATCH = 1 << 16

# Pixels of the shorter side of a resized image: more than any input has, and the longer one may have as many again.
LARGEST_RESIZE = 1 << 14

# Version numbers have 18 digits at most: they fit the 64 bits that Triton and the wire have for them.
VERSIONS_BELOW = 10**18

# One mebibyte a read keeps memory flat for files of any size.
_CHUNK_BYTES = 1 << 20

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
Precision = Literal["fp32", "fp16", "int8"]
Target = Literal["cpu", "tensorrt"]
Method = Literal["minmax", "percentile", "entropy"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


def _below(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name or name == ".":
        raise ValueError(f"expected a path below the version's folder, got {name!r}")
    return name


# The path of a file of a version, whoever wrote the manifest: it never leads out of the version's folder.
RelativePath = Annotated[str, AfterValidator(_below)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Record):
    """One input or output: its name, Open Inference Protocol datatype and shape, -1 for the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Preprocessing(_Record):
    """How an image of any size comes to that of the input; the default is how training evaluates.

    Attributes:
        resize: pixels that the shorter side is resized to before the input's size is cut out of the middle, as
            torchvision's `Resize` and `CenterCrop` do; None takes the largest part in the middle that has the input's
            proportions, and resizes that.
        interpolation: how it is resized, always with antialiasing.
    """

    resize: int | None = Field(default=None, ge=1, le=LARGEST_RESIZE)
    interpolation: Interpolation = "bilinear"

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise a ValueError if an input of this shape, (C, H, W), cannot be cut out of what is resized."""
        if self.resize is not None and self.resize < (side := max(image_shape[1:])):
            raise ValueError(f"resize: expected at least {side}, the input's longer side, got {self.resize}")


class Source(_Record):
    """The engine that this one was made from."""

    model: str
    version: int
    sha256: str


class Twin(_Record):
    """The PyTorch model with the same weights, and its weights' file: where white-box attacks get gradients.

    Attributes:
        folder: where it lies, below the version's folder.
        file: the weights, below that folder.
        sha256: of the weights' file.
    """

    folder: RelativePath
    file: RelativePath
    sha256: str


class Images(_Record):
    """The images of a calibration or a proof.

    Attributes:
        description: what they are, for the reader.
        n: how many.
        sha256: of the float32 NCHW values in [0, 1], in their order.
        seed: of the noise, where they are noise and no images at all.
    """

    description: str
    n: int
    sha256: str
    seed: int | None = None


class Quantization(_Record):
    """How an int8 graph came about.

    Attributes:
        target: "cpu" (U8 activations, S8 weights per channel) or "tensorrt" (S8 S8, symmetric).
        method: how the ranges of activations were chosen.
        percentile: the share of values that a range holds, in percent; only of method "percentile".
        images: what the ranges were measured on.
    """

    target: Target
    method: Method
    percentile: float | None = None
    images: Images


class Difference(_Record):
    """One image on which two engines differ.

    Attributes:
        image: which of the proof's images, counted from 0, and its file's name where it has one.
        logit_difference: the largest absolute difference of its logits.
        answer: the class that the engine names.
        expected: the class that the reference names.
        label: the true class, where it is known.
    """

    image: str
    logit_difference: float
    answer: str
    expected: str
    label: str | None = None


class Parity(_Record):
    """How this engine's answers compare with its source's on the same images (export.parity).

    Intervals are 95 % ones, Wilson's. Accuracies are None where the images have no labels.
    """

    status: Literal["passed", "failed", "not run"]
    reference: str
    images: Images | None = None
    agreement: float | None = None
    agreement_interval: tuple[float, float] | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    max_abs_difference: float | None = None
    mean_abs_difference: float | None = None
    limits: dict[str, float] = {}
    worst: tuple[Difference, ...] = ()
    machine: str = ""
    explanation: str = ""


class Requirements(_Record):
    """What a machine must have to run the engine.

    Attributes:
        runtime: versions of the runtime that take the file: ">=1.27" for ONNX, "==11.4.1.5" for a plan.
        platform: "any", or what a plan was built for, such as "linux-x86_64".
        compute_capabilities: of the GPUs that a plan was built for, such as "8.9"; empty where any will do.
        driver: the CUDA version that the driver must support at least; None without a GPU.
    """

    runtime: str
    platform: str = "any"
    compute_capabilities: tuple[str, ...] = ()
    driver: str | None = None


class Build(_Record):
    """How to make the engine again.

    Attributes:
        command: the `tenet` command line that makes it from its source.
        options: what the build was given.
        versions: of the packages that took part.
        machine: where it was made.
        onnx: the ONNX file beside a plan from which it was built; None where the engine is an ONNX file itself.
        log: the builder's log, beside it.
        notes: what the reader should know: what was changed in a foreign graph, say.
    """

    command: str = ""
    options: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}
    machine: str = ""
    onnx: RelativePath | None = None
    log: RelativePath | None = None
    notes: tuple[str, ...] = ()


class Provenance(_Record):
    """What the first of an engine's ancestors was made from.

    Attributes:
        kind: a training run of ours, somebody's PyTorch weights, or somebody's ONNX file.
        file: its name.
        sha256: of that file: the weights, or the ONNX file.
        recipe: the run's recipe.
        data: the parts of the run's data set: counts and hashes.
        commit: of the working tree where the training was started, if it was one.
        factory: `package.module:function` that makes the network for the weights.
    """

    kind: Literal["run", "weights", "onnx"]
    file: str
    sha256: str
    recipe: dict[str, JsonValue] | None = None
    data: dict[str, JsonValue] | None = None
    commit: str | None = None
    factory: str | None = None


class Manifest(_Record):
    """Everything that a reader needs before it opens the file, sha256 first.

    Attributes:
        output: what the engine answers with; probabilities are those of softmax.
        preprocessing: how images of other sizes come to that of the input.
        kept_fp32: the nodes of a fp16 or int8 graph that were kept in fp32.
        files: sha256 of every other file of the version, by its path below the version's folder.
    """

    schema_version: Literal[2] = 2
    model: str
    version: int = Field(ge=1, lt=VERSIONS_BELOW)
    file: Literal["model.onnx", "model.plan"]
    sha256: str
    runtime: Runtime
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output: Literal["logits", "probabilities"] = "logits"
    class_names: tuple[str, ...]
    preprocessing: Preprocessing = Preprocessing()
    max_batch: int = Field(ge=1, le=LARGEST_BATCH)
    source: Source | None = None
    twin: Twin | None = None
    quantization: Quantization | None = None
    kept_fp32: tuple[str, ...] = ()
    requires: Requirements
    build: Build = Build()
    provenance: Provenance | None = None
    parity: Parity
    files: dict[RelativePath, str] = {}

    @field_validator("model")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        return checked_name(name)

    @model_validator(mode="after")
    def _large_enough_to_crop(self) -> Manifest:
        if self.preprocessing.resize is not None:
            self.preprocessing.check(self.image_shape)
        return self

    @property
    def channels_last(self) -> bool:
        """Whether the engine takes uint8 NHWC; otherwise it takes float32 NCHW in [0, 1]."""
        return self.inputs[0].datatype == "UINT8"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, whatever order the engine takes it in."""
        if self.channels_last:
            _, height, width, channels = self.inputs[0].shape
        else:
            _, channels, height, width = self.inputs[0].shape
        return channels, height, width

    @property
    def servable(self) -> bool:
        """Whether the proof of parity is there and passed."""
        return self.parity.status == "passed"

    def as_json(self) -> bytes:
        """Return the bytes of manifest.json: with a checksum, so that a changed manifest is noticed."""
        record = self.model_dump(mode="json")
        if self.preprocessing == Preprocessing():  # as in manifests from before there was a choice
            del record["preprocessing"]
        return json.dumps({**record, "checksum": _checksum(record)}, indent=2, ensure_ascii=False).encode() + b"\n"


def checked_name(name: str) -> str:
    """Return a model's name if it is a plain one.

    Raises:
        ValueError: it could leave the repository's folder or confuse a shell.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            f"model name {name!r}: expected letters, digits, '.', '_' and '-' (at most 128, the first a letter or "
            "digit, no '..'); choose a plain name"
        )
    return name


def read(folder: Path) -> Manifest:
    """Read the manifest of one version.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is not a manifest of this schema, or it was changed.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a manifest here, found none; export the model again")
    with path.open("rb") as file:
        return from_json(file.read(LARGEST_RECORD + 1), source=str(path))


def from_json(contents: bytes, *, source: str) -> Manifest:
    """Decode the contents of a manifest.json; `source` is named in errors.

    Raises:
        ValueError: it is not a manifest of this schema, or it was changed.
    """
    if len(contents) > LARGEST_RECORD:
        raise ValueError(f"{source}: expected at most {LARGEST_RECORD >> 20} MiB, got more; export the model again")
    try:
        record: Any = json.loads(contents)
        checksum = record.pop("checksum", None) if isinstance(record, dict) else None
        manifest = Manifest.model_validate_json(json.dumps(record))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ValueError(f"{source}: {where}: {first['msg'].lower()}; export the model again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, got something else: {error}; export the model again") from None
    if checksum != _checksum(record):
        raise ValueError(
            f"{source}: its checksum is not that of its contents: it was changed or damaged after export; "
            "export the model again"
        )
    return manifest


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify(folder: Path) -> Manifest:
    """Return the manifest of a version whose engine file is the one that was published.

    Raises:
        FileNotFoundError: manifest or engine file is missing.
        ValueError: the file's sha256 differs; nothing of the file has been parsed.
    """
    manifest = read(folder)
    _check(folder / manifest.file, manifest.sha256)
    return manifest


def verify_all(folder: Path) -> Manifest:
    """Return the manifest of a version all of whose files are those that were published; raises as `verify`."""
    manifest = verify(folder)
    for name, sha256 in manifest.files.items():
        _check(folder / name, sha256)
    return manifest


def files_below(folder: Path, *, engine: str) -> dict[str, str]:
    """Return the sha256 of all files of a version but its manifest and its engine, for `Manifest.files`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256_of(path) for name, path in named.items() if name not in {FILE_NAME, engine}}


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of the version here, found none; export the model again")
    if (actual := sha256_of(path)) != expected:
        raise ValueError(
            f"{path}: expected sha256 {expected[:12]}… as in its manifest, got {actual[:12]}…; "
            "the file was changed or damaged after export: export the model again"
        )
