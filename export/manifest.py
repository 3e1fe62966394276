"""What an engine is: the one description that travels with every engine file.

export --writes--> manifest.json --read by--> engines, serving, audits
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

FILE_NAME = "manifest.json"

# What a name may look like, so that it is always one plain folder below the repository.
NAME_PATTERN = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# One mebibyte a read keeps memory flat for files of any size.
_CHUNK_BYTES = 1 << 20

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
Precision = Literal["fp32", "int8"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Record):
    """One input or output: its name, Open Inference Protocol datatype and shape, -1 for the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Source(_Record):
    """The engine that this one was made from."""

    model: str
    version: int
    sha256: str


class Twin(_Record):
    """The PyTorch checkpoint with the same weights, and its weights' file: where white-box attacks get gradients."""

    folder: str
    file: str
    sha256: str


class Parity(_Record):
    """How this engine's answers compare with its source's on the same images (export.parity)."""

    status: Literal["passed", "failed", "not run"]
    reference: str
    images: str
    n: int = 0
    agreement: float | None = None
    max_abs_difference: float | None = None
    mean_abs_difference: float | None = None
    limits: dict[str, float] = {}
    explanation: str = ""


class Manifest(_Record):
    """Everything that a reader needs before it opens the file, sha256 first."""

    schema_version: Literal[1] = 1
    model: str
    version: int
    file: Literal["model.onnx", "model.plan"]
    sha256: str
    runtime: Runtime
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    class_names: tuple[str, ...]
    max_batch: int = Field(ge=1)
    source: Source | None = None
    twin: Twin | None = None
    parity: Parity
    build: dict[str, str] = {}

    @field_validator("model")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        return checked_name(name)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.inputs[0].shape
        return channels, height, width

    @property
    def servable(self) -> bool:
        """Whether the proof of parity is there and passed."""
        return self.parity.status == "passed"


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
        ValueError: it is not a manifest of this schema.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a manifest here, found none; export the model again")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ValueError(f"{path}: {where}: {first['msg'].lower()}; export the model again") from None


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
    path = folder / manifest.file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the engine file here, found none; export the model again")
    if (actual := sha256_of(path)) != manifest.sha256:
        raise ValueError(
            f"{path}: expected sha256 {manifest.sha256[:12]}… as in its manifest, got {actual[:12]}…; "
            "the file was changed or damaged after export: export the model again"
        )
    return manifest
