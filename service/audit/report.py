"""What an audit found: the report's schema.

Every number stands with its n and its 95 % interval. Everything that varies from run to run stands in `provenance`
alone, so that two runs of one plan on one machine agree in every other key.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.audit.gates import Outcome

SCHEMA: Literal["tenet.audit.report/1"] = "tenet.audit.report/1"

Interval = tuple[float, float]
Verdict = Literal["pass", "fail", "inconclusive", "untrusted"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class EngineReport(_Section):
    """Which engine, to the byte."""

    model: str
    version: int
    sha256: str
    runtime: str
    precision: str


class Proportion(_Section):
    """A share of n images with its 95 % interval (Wilson)."""

    accuracy: float
    interval: Interval
    n: int


class EpsilonReport(_Section):
    """An attack at one epsilon; `queries` is the mean number of images asked of the engine per image, all epsilons."""

    epsilon: str
    size: float
    robust_accuracy: float
    interval: Interval
    n: int
    queries: float


class AttackReport(_Section):
    """One attack of the plan."""

    id: str
    name: str
    access: str
    norm: str
    results: tuple[EpsilonReport, ...]


class Cell(_Section):
    """One corruption at one severity; `disagreement` is with the reference engine, if there is one."""

    corruption: str
    severity: int
    error: float
    interval: Interval
    n: int
    disagreement: float | None = None


class CorruptionsReport(_Section):
    """All cells and their plain mean (the CIFAR convention; `mce` needs all 15 and AlexNet's errors at 224)."""

    cells: tuple[Cell, ...]
    mean_error: float
    interval: Interval
    n: int
    mce: float | None = None


class DifferentialReport(_Section):
    """How often target and reference put an image into different classes, and whether one is right more often.

    `p_value` is of the exact McNemar test that they are right equally often, on the clean images.
    """

    reference: EngineReport
    reference_accuracy: float
    p_value: float
    disagreement: float
    interval: Interval
    n: int
    corrupted_disagreement: float | None = None
    corrupted_interval: Interval | None = None


class GateReport(_Section):
    """One gate of the plan, with what it compared."""

    name: str
    gate: str
    value: float
    interval: Interval
    outcome: Outcome


class Doubt(_Section):
    """One reason not to believe a number (service.audit.checks)."""

    code: str
    explanation: str


class Report(_Section):
    """A whole audit."""

    schema_: Literal["tenet.audit.report/1"] = Field(default=SCHEMA, alias="schema")
    audit: dict[str, object]
    target: EngineReport
    data: dict[str, object]
    clean: Proportion
    attacks: tuple[AttackReport, ...] = ()
    worst_case: Proportion | None = None
    corruptions: CorruptionsReport | None = None
    differential: DifferentialReport | None = None
    gates: tuple[GateReport, ...] = ()
    warnings: tuple[Doubt, ...] = ()
    verdict: Verdict
    provenance: dict[str, object] = {}

    def to_json(self) -> str:
        """Return the report as JSON, as its schema has it."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
