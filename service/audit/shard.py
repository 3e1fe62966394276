"""A piece of an audit's work, and what it found: plain values, as they are recorded.

Auditor.shards --> Shard --Auditor.run--> ShardResult --assembly--> Report
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from service.audit.examples import Example

Kind = Literal["clean", "corruption", "attack", "checks"]
# The smallest perturbation that fooled the target: 0 where none is needed, None where none was found.
Distances = tuple[float | None, ...]


class Shard(BaseModel):
    """One piece of work; `name` is unique in the audit.

    Attributes:
        kind: what is done.
        subject: the attack's id, or the corruption's name.
        severity: of the corruption.
        start: the first of its images, in the samples' order.
        stop: one after the last.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    subject: str = ""
    severity: int = 0
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        """What a progress line says."""
        match self.kind:
            case "attack":
                return f"{self.subject}, images {self.start + 1} to {self.stop}"
            case "corruption":
                return f"{self.subject}, severity {self.severity}"
            case "checks":
                return "sanity checks"
        return "clean images"


class Probe(BaseModel):
    """What one sanity check measured (service.audit.checks); counts of images.

    Attributes:
        code: of the check.
        attack: whose numbers it is about, or which source of gradients; empty if it is about the target.
        count: images that speak against the target or the attack.
        n: images looked at.
        details: other numbers that the explanation needs, by name.
    """

    model_config = ConfigDict(frozen=True)

    code: str
    attack: str = ""
    count: int
    n: int
    details: dict[str, float] = {}


class ShardResult(BaseModel):
    """What a shard found; tuples have an entry for each image of the shard, in the samples' order.

    Attributes:
        shard: which.
        queries: images that the target was asked about, all in all.
        seconds: wall time.
        answering: of these, seconds in which the target answered.
        predictions: top-1 classes (clean and corrupted images).
        confidences: the softmax probability of the top-1 class, 6 decimals.
        reference_predictions: the reference engine's; () without one.
        distances: attack: in the norm of the attack.
        unrounded: as distances, of results that were not rounded to what can be sent; () where nothing is rounded, or
            nothing could decide.
        halfway: as distances, when half of an image's budget was asked; () without a budget.
        by_part: distances of each gradient source, or of each attack of a suite, by its name.
        agreement: gradient source -> share of the shard's clean images that it classifies as the target does.
        asked: attack: queries by image.
        first_success: attack: queries up to the first success; 0 for none.
        adversarial_predictions: attack: the target's class of the nearest adversarial image; its clean class for none.
        adversarial_confidences: as confidences, of these.
        reference_adversarial: the reference engine's classes of these; () without one.
        probes: what the sanity checks measured.
        budget_spent: attack: images whose queries were used up.
        examples: attack: the nearest adversarial images.
    """

    model_config = ConfigDict(frozen=True)

    shard: Shard
    queries: int
    seconds: float
    answering: float = 0.0
    predictions: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    reference_predictions: tuple[int, ...] = ()
    distances: Distances = ()
    unrounded: Distances = ()
    halfway: Distances = ()
    by_part: dict[str, Distances] = {}
    agreement: dict[str, float] = {}
    asked: tuple[int, ...] = ()
    first_success: tuple[int, ...] = ()
    adversarial_predictions: tuple[int, ...] = ()
    adversarial_confidences: tuple[float, ...] = ()
    reference_adversarial: tuple[int, ...] = ()
    probes: tuple[Probe, ...] = ()
    budget_spent: int = 0
    examples: tuple[Example, ...] = ()
