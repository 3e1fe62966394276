"""The audit plan: TOML -> one frozen value; torch-free, so that a server can check what it is asked to run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from export.manifest import checked_name
from service.audit.gates import Gate
from service.decoding import decode, read_text

# The corruptions that service.audit.corruptions implements, by their published names.
CorruptionName = Literal["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression"]
CORRUPTIONS: tuple[CorruptionName, ...] = get_args(CorruptionName)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# Pixels a side, as in a training recipe.
_SMALLEST_SIZE, _LARGEST_SIZE = 8, 4096

# Short numbers only: an exact fraction of 1e99999999 would take for ever.
_EPSILON = re.compile(r"\d{1,6}(\.\d{1,12})?(e-\d{1,2})?(/[1-9]\d{0,6})?")


def _epsilon_text(value: Any) -> str:
    text = str(value)
    if not _EPSILON.fullmatch(text):
        raise ValueError(f"expected a number or a fraction such as '8/255', got {text!r}")
    if epsilon_value(text) <= 0:
        raise ValueError(f"expected an epsilon above 0, in input units, got {text!r}")
    return text


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"expected each value once, got {repeated[0]!r} twice; remove one")
    return values


# An epsilon keeps the form in which it was written: it is a key of the report.
Epsilon = Annotated[str, BeforeValidator(_epsilon_text)]


def epsilon_value(epsilon: str) -> float:
    """Return the size of an epsilon in input units."""
    number, _, divisor = epsilon.partition("/")
    return float(number) / float(divisor or 1)


Severity = Annotated[int, Field(ge=1, le=5)]


class Target(_Table):
    """What is attacked: a version in a model repository, the latest if none is named."""

    model: Annotated[str, BeforeValidator(checked_name)]
    version: int | None = Field(default=None, ge=1)
    repository: str | None = Field(default=None, min_length=1)


class Data(_Table):
    """Which images: a named data set's split, or a folder of class folders; stratified, seeded.

    With `size`, images of files are resized and cropped at the centre to that many pixels a side.
    """

    dataset: str | None = None
    split: Literal["train", "test"] = "test"
    root: Path | None = None
    folder: Path | None = None
    size: int | None = Field(default=None, ge=_SMALLEST_SIZE, le=_LARGEST_SIZE)
    samples: int = Field(default=1000, ge=2)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.folder is None):
            raise ValueError("expected either 'dataset' or 'folder', got both or neither; keep one")
        if self.root is not None and self.dataset is None:
            raise ValueError("expected 'root' beside 'dataset', got it beside 'folder'; leave it out")
        return self


class _Attack(_Table):
    name: str
    id: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$")
    epsilons: Annotated[tuple[Epsilon, ...], AfterValidator(_unique)] = Field(min_length=1)

    @property
    def norm(self) -> Literal["linf", "l2"]:
        """The norm in which the attack's epsilons are measured."""
        return "l2" if self.name.startswith("L2") or self.name == "BoundaryAttack" else "linf"

    @model_validator(mode="before")
    @classmethod
    def _named_id(cls, table: dict[str, Any]) -> dict[str, Any]:
        return {"id": table.get("name", ""), **table} if isinstance(table, dict) else table


class SingleStepAttack(_Attack):
    """One gradient step (Goodfellow et al., 2015)."""

    name: Literal["FGSM"]
    access: Literal["white-box"] = "white-box"
    gradients: Literal["auto", "checkpoint"] = "auto"


class GradientAttack(_Attack):
    """Projected gradient descent from a random start (Madry et al., 2018)."""

    name: Literal["LinfPGD", "L2PGD"]
    access: Literal["white-box"] = "white-box"
    gradients: Literal["auto", "checkpoint"] = "auto"
    steps: int = Field(default=40, ge=1, le=10_000)


class DecisionAttack(_Attack):
    """Boundary attack (Brendel et al., 2018): top-1 answers of the engine are all that it sees."""

    name: Literal["BoundaryAttack"]
    access: Literal["decision"] = "decision"
    steps: int = Field(default=1000, ge=1, le=100_000)


class NoiseAttack(_Attack):
    """Random noise, `repeats` draws an image: what no adversary is needed for."""

    name: Literal["LinfUniformNoise", "L2GaussianNoise"]
    access: Literal["decision"] = "decision"
    repeats: int = Field(default=100, ge=1, le=100_000)


Attack = Annotated[SingleStepAttack | GradientAttack | DecisionAttack | NoiseAttack, Field(discriminator="name")]


class Corruptions(_Table):
    """Which corruptions at which severities."""

    suite: Literal["cifar"] = "cifar"
    names: Annotated[tuple[CorruptionName, ...], AfterValidator(_unique)] = Field(default=CORRUPTIONS, min_length=1)
    severities: Annotated[tuple[Severity, ...], AfterValidator(_unique)] = Field(default=(1, 2, 3, 4, 5), min_length=1)


class Differential(_Table):
    """A second engine, whose answers are compared on every clean and every corrupted image."""

    reference: Annotated[str, BeforeValidator(checked_name)]
    version: int | None = Field(default=None, ge=1)


class Plan(_Table):
    """A whole audit."""

    target: Target
    data: Data
    attacks: tuple[Attack, ...] = ()
    corruptions: Corruptions | None = None
    differential: Differential | None = None
    gates: dict[str, Gate] = {}

    @model_validator(mode="after")
    def _unique_ids(self) -> Self:
        ids = [attack.id for attack in self.attacks]
        if repeated := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"attacks: expected unique ids, got {repeated[0]!r} twice; give each attack an 'id'")
        return self

    @model_validator(mode="after")
    def _gates_have_subjects(self) -> Self:
        known = {(attack.id, epsilon) for attack in self.attacks for epsilon in attack.epsilons}
        for name, gate in self.gates.items():
            gate.check_subject(
                name, known, corruptions=self.corruptions is not None, reference=self.differential is not None
            )
        return self


def parse(text: str, *, source: str = "plan") -> Plan:
    """Decode a plan.

    Raises:
        ValueError: one line a mistake, each naming the key.
    """
    return decode(text, Plan, source=source)


def read(path: Path) -> Plan:
    """Read a plan from a file; a relative folder or root in it is relative to the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `parse`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an audit plan here, found none")
    plan = parse(read_text(path), source=str(path))
    places = {"folder": plan.data.folder, "root": plan.data.root}
    found = {key: (path.parent / place).resolve() for key, place in places.items() if place is not None}
    return plan.model_copy(update={"data": plan.data.model_copy(update=found)})


def to_toml(plan: Plan) -> str:
    """Return a plan as TOML, without the repository: a server audits its own."""
    table = plan.model_dump(mode="json", exclude={"target": {"repository"}}, exclude_none=True)
    return tomli_w.dumps(table)


def pinned(plan: Plan, *, version: int, reference_version: int | None) -> Plan:
    """Return the plan with the versions of target and reference fixed: an audit never changes its mind."""
    differential = plan.differential
    if differential is not None:
        differential = differential.model_copy(update={"version": reference_version})
    target = plan.target.model_copy(update={"version": version})
    return plan.model_copy(update={"target": target, "differential": differential})
