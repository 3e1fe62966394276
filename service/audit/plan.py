"""The audit plan: TOML -> one frozen value; torch-free, so that a server can check what it is asked to run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from export.manifest import checked_name
from export.mapping import Mapping
from service.audit.attack_tables import (
    Attack,
    Table,
    epsilon_value,
    unique,
)
from service.audit.gates import Gate
from service.decoding import decode, read_text

__all__ = [
    "CORRUPTIONS",
    "Attack",
    "Checks",
    "CorruptionName",
    "Corruptions",
    "Data",
    "Differential",
    "Plan",
    "Sequential",
    "Target",
    "epsilon_value",
    "parse",
    "pinned",
    "read",
    "to_toml",
]

# The corruptions that service.audit.corruptions implements, by their published names.
CorruptionName = Literal["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression"]
CORRUPTIONS: tuple[CorruptionName, ...] = get_args(CorruptionName)

# Pixels a side, as in a training recipe.
_SMALLEST_SIZE, _LARGEST_SIZE = 8, 4096

Severity = Annotated[int, Field(ge=1, le=5)]


# HOST:PORT, where a host may be an IPv6 address in brackets; the client says what it makes of it.
_ENDPOINT = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}$"
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9._-]{1,128})?")


def _twin(value: Any) -> Any:
    text = str(value)
    if not text.endswith(".onnx") and not _REFERENCE.fullmatch(text):
        raise ValueError(f"expected 'MODEL', 'MODEL@VERSION' or the path of an .onnx file, got {text!r}")
    return value


def _listed(table: Any) -> Any:
    """Return a table with tuples for TOML's arrays, as the mapping's strict decoding wants them."""
    if not isinstance(table, dict):
        return table
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


class Target(Table):
    """What is attacked: a version in a model repository, the latest if none is named; or a model at an endpoint.

    Attributes:
        model: its name, in the repository or at the endpoint.
        version: which; the latest, or the endpoint's choice, if None.
        repository: folder or URL.
        endpoint: HOST:PORT of any gRPC server of the Open Inference Protocol.
        labels: names of the endpoint's classes in the order of its scores, if it does not tell them.
        input: what can be sent; "auto" looks at the manifest or the endpoint's metadata.
        mapping: how images of ours become the endpoint's (`export.mapping`).
        twin: whose gradients attack an endpoint: a model of the repository, or an .onnx file.
    """

    model: Annotated[str, BeforeValidator(checked_name)]
    version: int | None = Field(default=None, ge=1)
    repository: str | None = Field(default=None, min_length=1)
    endpoint: str | None = Field(default=None, pattern=_ENDPOINT)
    labels: Annotated[tuple[str, ...], AfterValidator(unique)] = ()
    input: Literal["auto", "float32", "uint8"] = "auto"
    mapping: Annotated[Mapping, BeforeValidator(_listed)] | None = None
    twin: Annotated[str, BeforeValidator(_twin)] | None = None

    @model_validator(mode="after")
    def _of_an_endpoint(self) -> Self:
        given = [key for key in ("labels", "mapping", "twin") if getattr(self, key)]
        if given and self.endpoint is None:
            raise ValueError(
                f"expected {given[0]!r} beside 'endpoint', as a model of the repository says so itself; leave it out"
            )
        return self


class Data(Table):
    """Which images: a named data set's split, or a folder of class folders; stratified, seeded.

    With `size`, images of files are resized and cropped at the centre to that many pixels a side.
    """

    dataset: str | None = None
    split: Literal["train", "test"] = "test"
    root: Path | None = None
    folder: Path | None = None
    size: int | None = Field(default=None, ge=_SMALLEST_SIZE, le=_LARGEST_SIZE)
    samples: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.folder is None):
            raise ValueError("expected either 'dataset' or 'folder', got both or neither; keep one")
        if self.root is not None and self.dataset is None:
            raise ValueError("expected 'root' beside 'dataset', got it beside 'folder'; leave it out")
        return self


class Corruptions(Table):
    """Which corruptions at which severities."""

    suite: Literal["cifar"] = "cifar"
    names: Annotated[tuple[CorruptionName, ...], AfterValidator(unique)] = Field(default=CORRUPTIONS, min_length=1)
    severities: Annotated[tuple[Severity, ...], AfterValidator(unique)] = Field(default=(1, 2, 3, 4, 5), min_length=1)


class Differential(Table):
    """A second engine, whose answers are compared on every clean and every corrupted image."""

    reference: Annotated[str, BeforeValidator(checked_name)]
    version: int | None = Field(default=None, ge=1)


class Checks(Table):
    """How many images the reliability checks look at; all if there are fewer."""

    samples: int = Field(default=100, ge=1)


class Sequential(Table):
    """Stop as soon as every gate is decided, any of them wrongly with at most this probability."""

    error_rate: float = Field(default=0.05, gt=0, le=0.5)


class Plan(Table):
    """A whole audit."""

    target: Target
    data: Data
    attacks: tuple[Attack, ...] = ()
    corruptions: Corruptions | None = None
    differential: Differential | None = None
    gates: dict[str, Gate] = Field(default_factory=dict)
    checks: Checks = Checks()
    sequential: Sequential | None = None

    @model_validator(mode="after")
    def _unique_ids(self) -> Self:
        ids = [attack.id for attack in self.attacks]
        if repeated := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"attacks: expected unique ids, got {repeated[0]!r} twice; give each attack an 'id'")
        return self

    @model_validator(mode="after")
    def _attacks_have_what_they_need(self) -> Self:
        bare = self.target.endpoint is not None and self.target.twin is None
        for attack in self.attacks:
            if bare and attack.access == "white-box":
                raise ValueError(
                    f"attacks.{attack.id}: a white-box attack needs gradients, and an endpoint gives none; add "
                    "target.twin, or take an attack by scores or decisions"
                )
            if attack.name == "Disagreement" and self.differential is None:
                raise ValueError(f"attacks.{attack.id}: Disagreement needs a second engine; add a [differential] table")
        if self.sequential is not None and not self.gates:
            raise ValueError("sequential: expected gates, which say when to stop, found none; add a [gates] table")
        if self.sequential is not None and not self.attacks:
            raise ValueError(
                "sequential: expected an attack, after whose slices the gates are looked at, found none; add an "
                "[[attacks]] table, or leave [sequential] out"
            )
        return self

    @model_validator(mode="after")
    def _gates_have_subjects(self) -> Self:
        self.check_gates()
        return self

    def check_gates(self, *, class_names: tuple[str, ...] | None = None) -> None:
        """Refuse gates on what this plan does not measure.

        Args:
            class_names: the target's, once they are known; those that the plan gives, if any, until then.

        Raises:
            ValueError: a gate names an attack, an epsilon, a comparison or a class that there is not.
        """
        known = {(attack.id, epsilon) for attack in self.attacks for epsilon in attack.epsilons}
        for name, gate in self.gates.items():
            gate.check_subject(
                name,
                known,
                corruptions=self.corruptions is not None,
                reference=self.differential is not None,
                class_names=class_names or self.target.labels or None,
            )


def parse(text: str, *, source: str = "plan") -> Plan:
    """Decode a plan.

    Raises:
        ValueError: one line a mistake, each naming the key.
    """
    return decode(text, Plan, source=source)


def read(path: Path) -> Plan:
    """Read a plan from a file; a relative folder, root or .onnx twin in it is relative to the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `parse`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an audit plan here, found none")
    plan = parse(read_text(path), source=str(path))
    places = {"folder": plan.data.folder, "root": plan.data.root}
    found = {key: (path.parent / place).resolve() for key, place in places.items() if place is not None}
    target = plan.target
    if target.twin is not None and target.twin.endswith(".onnx"):
        target = target.model_copy(update={"twin": str((path.parent / target.twin).resolve())})
    return plan.model_copy(update={"data": plan.data.model_copy(update=found), "target": target})


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
