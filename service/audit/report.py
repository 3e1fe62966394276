"""What an audit found: the report's schema, published as docs/schemas/audit-report-2.json.

assembly --> Report --to_json--> JSON --parse--> Report --> summary, page

Every number stands with its n and, where it is an estimate, its 95 % interval. Everything that varies from run to run
stands in `provenance` alone, so that two runs of one plan on one machine agree in every other key. Of numbers that
were not measured there is null, and never a zero.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.audit.gates import Outcome

SCHEMA: Literal["tenet.audit.report/2"] = "tenet.audit.report/2"

# What it is called among the files of an audit.
FILE = "report.json"

# The dialect that pydantic writes.
_DIALECT = "https://json-schema.org/draft/2020-12/schema"

Interval = tuple[float, float]
# Of a median, null stands for a bound, or a value, that no image has.
OpenInterval = tuple[float | None, float | None]
Verdict = Literal["pass", "fail", "inconclusive", "untrusted"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class TargetReport(_Section):
    """Which classifier answered: an engine to the byte, or a model at an endpoint, whose bytes nobody knows.

    Attributes:
        model: its name.
        version: of the model; null where the endpoint names none.
        sha256: of the engine's file; null for an endpoint.
        runtime: "onnxruntime", or what else runs it; "endpoint" where that is not known.
        precision: of the engine; null where that is not known.
        endpoint: HOST:PORT; null for an engine in this process.
        input: what can be sent, "float32" or "uint8".
        batch_sizes: images at once at which it serves.
    """

    model: str
    version: int | None = None
    sha256: str | None = None
    runtime: str
    precision: str | None = None
    endpoint: str | None = None
    input: Literal["float32", "uint8"] = "float32"
    batch_sizes: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """What a heading calls it: MODEL@VERSION, or MODEL where there is no version."""
        return self.model if self.version is None else f"{self.model}@{self.version}"


class Proportion(_Section):
    """A share of n images with its 95 % interval (Wilson)."""

    accuracy: float
    interval: Interval
    n: int


class ClassReport(Proportion):
    """The accuracy on the images of one class."""

    name: str


class CleanReport(Proportion):
    """The accuracy on the images as they are, and by class: of those classes that have images."""

    classes: tuple[ClassReport, ...] = ()


class CurvePoint(Proportion):
    """Robust accuracy within `size`, in the attack's norm."""

    size: float


class EpsilonReport(_Section):
    """An attack at one epsilon.

    Attributes:
        epsilon: as the plan has it.
        size: in input units.
        robust_accuracy: share of images that are classified correctly and stay so, decided by the target.
        interval: of it.
        n: images attacked.
        queries: the mean number of questions to the target for an image, for all epsilons together.
        unrounded_accuracy: the same share if images did not have to be rounded to what can be sent: what was found
            rounded counts, and what a gradient source decides of the attack's last images, not rounded. Null where
            nothing is rounded; where nothing can decide, as without the target's own gradients; and where the queries
            ended before there were last images.
        parts: gradient source, or attack of a suite, in the order in which they were run -> the share of images that it
            was the first to fool, of those that had to be perturbed; null where nothing was left for it.
        classes: robust accuracy by class.
    """

    epsilon: str
    size: float
    robust_accuracy: float
    interval: Interval
    n: int
    queries: float
    unrounded_accuracy: float | None = None
    parts: dict[str, float | None] = {}
    classes: tuple[ClassReport, ...] = ()


class Quantiles(_Section):
    """A distribution over n images, some of which may have no value: it counts as larger than any other.

    Attributes:
        n: images counted.
        found: images with a value.
        values: quantile ("0.1", "0.25", "0.5", "0.75", "0.9") -> the smallest value that at least that share of the
            n images does not exceed; null where fewer have a value.
        interval: of the median, 95 %, by order statistics; a bound is null where it has no value.
    """

    n: int
    found: int
    values: dict[str, float | None]
    interval: OpenInterval

    @property
    def median(self) -> float | None:
        """The quantile 0.5."""
        return self.values["0.5"]


class Histogram(_Section):
    """Counts between edges: [edges[i], edges[i + 1]), the last bin with its upper edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Spread(Quantiles):
    """Quantiles with the histogram of the values found; null if there are none."""

    histogram: Histogram | None = None


class SourceReport(_Section):
    """Where gradients came from, and the share of n clean images that the source classifies as the target does."""

    name: str
    agreement: float
    n: int


class AttackReport(_Section):
    """One attack of the plan.

    Attributes:
        id: its key in the plan.
        name: of the attack, or of the suite.
        access: "white-box", "transfer", "score" or "decision".
        norm: of perturbations.
        n: images attacked.
        results: at each epsilon of the plan.
        curve: robust accuracy against epsilon, from 0 to the largest epsilon.
        distances: the smallest perturbations found, of all images attacked; 0 where none was needed. Its histogram
            is of those above 0.
        within: whether the attack keeps to the plan's epsilons and looks for no smaller perturbations: these are then
            upper bounds.
        unrounded: as `distances`, if images did not have to be rounded to what can be sent; null as
            `unrounded_accuracy`.
        queries_to_success: of the images that a perturbation fooled: questions up to the first success.
        queries: to the target, for all images; of no image more than its budget.
        overhead: other questions to the target, which no budget counts: about the nearest images found, at the end.
        budget_spent: images whose queries were used up.
        sources: of gradients.
    """

    id: str
    name: str
    access: str
    norm: str
    n: int
    results: tuple[EpsilonReport, ...]
    curve: tuple[CurvePoint, ...] = ()
    distances: Spread
    within: bool = False
    unrounded: Quantiles | None = None
    queries_to_success: Spread | None = None
    queries: int
    overhead: int = 0
    budget_spent: int = 0
    sources: tuple[SourceReport, ...] = ()


class WorstCaseReport(Proportion):
    """The share of images that survive all attacks of one norm within one epsilon, whichever found a perturbation."""

    norm: str
    epsilon: str
    size: float
    attacks: tuple[str, ...]


class WorstCase(Proportion):
    """The share of images that survive every attack at its largest epsilon, and by norm and epsilon."""

    results: tuple[WorstCaseReport, ...] = ()


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


class Comparison(_Section):
    """Target and reference on the same n images.

    Attributes:
        on: "clean", a corruption with its severity, or an attack's id: its adversarial images, made for the target.
        disagreement: share of images that the two put into different classes.
        interval: of it.
        n: images.
        target_only: images that the target alone gets right.
        reference_only: images that the reference alone gets right.
        p_value: of the exact McNemar test that they are right equally often. On adversarial images, which were
            searched against the target, a small one says how little they transfer.
        adjusted_p_value: by Holm, over all comparisons of the report.
    """

    on: str
    disagreement: float
    interval: Interval
    n: int
    target_only: int
    reference_only: int
    p_value: float
    adjusted_p_value: float


class DifferentialReport(_Section):
    """How often target and reference put an image into different classes, and whether one is right more often.

    Attributes:
        reference: with what was compared.
        reference_accuracy: on the clean images.
        p_value: of the exact McNemar test that they are right equally often, on the clean images.
        disagreement: on the clean images.
        interval: of it.
        n: clean images.
        corrupted_disagreement: the mean over corruptions and severities.
        corrupted_interval: of it, by the bootstrap over images.
        perturbed_disagreement: the same, over the adversarial images of all attacks.
        perturbed_interval: of it.
        comparisons: one by one.
        searches: of attacks that search for disagreement itself.
    """

    reference: TargetReport
    reference_accuracy: float
    p_value: float
    disagreement: float
    interval: Interval
    n: int
    corrupted_disagreement: float | None = None
    corrupted_interval: Interval | None = None
    perturbed_disagreement: float | None = None
    perturbed_interval: Interval | None = None
    comparisons: tuple[Comparison, ...] = ()
    searches: tuple[AttackReport, ...] = ()


class Bin(_Section):
    """Images whose confidence lies in (low, high]: their mean confidence and their accuracy; null where n is 0."""

    low: float
    high: float
    n: int
    confidence: float | None = None
    accuracy: float | None = None


class Shift(_Section):
    """Mean confidence on changed images less that on the same images clean.

    Attributes:
        on: "corruptions", of which each image's mean is taken, or an attack's id: its adversarial images, and the clean
            ones where it found none.
        shift: of confidence, in [-1, 1].
        interval: of it, by the bootstrap over images.
        n: images.
    """

    on: str
    shift: float
    interval: Interval
    n: int


class CalibrationReport(_Section):
    """Whether the confidence is the accuracy: expected calibration error on clean images, 15 bins of equal width."""

    ece: float
    interval: Interval
    n: int
    bins: tuple[Bin, ...]
    shifts: tuple[Shift, ...] = ()


class TermReport(_Section):
    """One comparison in a gate's condition.

    Attributes:
        text: the comparison.
        value: what was measured; null where nothing was, or for a median that no image has.
        interval: of it; null where nothing was measured.
        n: images that it was measured on.
        outcome: of this comparison alone, decided on the interval.
        needed: on how many of such images it is decided, if the number stays as it is; null if on no number.
    """

    text: str
    value: float | None
    interval: OpenInterval | None
    n: int
    outcome: Outcome
    needed: int | None = None


class GateReport(_Section):
    """One gate of the plan, with what it compared.

    Attributes:
        name: its key in the plan.
        gate: its condition.
        value: what its only comparison measured; null where it has several.
        interval: of it.
        n: images that it was measured on.
        outcome: decided on the intervals.
        samples: of an inconclusive gate, how many samples would decide it, if all numbers stay as they are; null if
            none would, and for a decided gate.
        terms: each comparison.
    """

    name: str
    gate: str
    value: float | None = None
    interval: OpenInterval | None = None
    n: int | None = None
    outcome: Outcome
    samples: int | None = None
    terms: tuple[TermReport, ...]


class SequentialReport(_Section):
    """What stopping as soon as all gates were decided has saved.

    Attributes:
        error_rate: the chance of a wrong decision of any gate that was allowed.
        decided: all gates are.
        planned: images of the plan.
        used: images that were looked at.
        saved: share of the planned images that were not needed.
    """

    error_rate: float
    decided: bool
    planned: int
    used: int
    saved: float


class ExampleReport(_Section):
    """One of the nearest adversarial images; `row` counts the audit's samples from 0, `index` those of the data."""

    attack: str
    row: int
    index: int
    label: str
    prediction: str
    confidence: float | None = None
    distance: float
    norm: str

    @property
    def picture(self) -> str:
        """The name of the PNG file that shows it."""
        return picture_name(self.attack, self.row)


class Doubt(_Section):
    """One reason not to believe a number (service.audit.checks)."""

    code: str
    explanation: str


class Report(_Section):
    """A whole audit; `complete` is false, and `error` says why, where it ended before all of it was measured.

    `refused_sources` says which sources of gradients that the plan wants were not used, and why.
    `not_checked` has the codes of reliability checks that could not be made: that they raised nothing says nothing.
    """

    schema_: Literal["tenet.audit.report/2"] = Field(default=SCHEMA, alias="schema")
    audit: dict[str, object]
    complete: bool = True
    error: str = ""
    target: TargetReport
    data: dict[str, object]
    clean: CleanReport
    attacks: tuple[AttackReport, ...] = ()
    worst_case: WorstCase | None = None
    corruptions: CorruptionsReport | None = None
    differential: DifferentialReport | None = None
    calibration: CalibrationReport | None = None
    sequential: SequentialReport | None = None
    examples: tuple[ExampleReport, ...] = ()
    gates: tuple[GateReport, ...] = ()
    warnings: tuple[Doubt, ...] = ()
    not_checked: tuple[str, ...] = ()
    refused_sources: tuple[str, ...] = ()
    verdict: Verdict
    provenance: dict[str, object] = {}

    def to_json(self) -> str:
        """Return the report as JSON, as its schema has it."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def parse(text: str) -> Report:
    """Read a report.

    Raises:
        ValueError: it is no report, or one of another schema.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError("expected a report in JSON, got something else; give the file that --json wrote") from None
    name = found.get("schema") if isinstance(found, dict) else None
    if name != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA!r}, got {name!r}; run the audit again with this version")
    return Report.model_validate(found)


def picture_name(attack: str, row: int) -> str:
    """Return the name of the PNG file that shows an attack's adversarial example."""
    return f"{attack}-{row}.png"


def json_schema() -> str:
    """Return the JSON Schema of a report, as docs/schemas/audit-report-2.json has it."""
    schema: dict[str, Any] = Report.model_json_schema(by_alias=True, mode="serialization")
    return json.dumps({"$schema": _DIALECT, "$id": SCHEMA, **schema}, indent=2) + "\n"
