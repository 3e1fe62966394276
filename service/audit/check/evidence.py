"""What the reliability checks decide from: probes, and what the plan's own attacks found, by image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from service.audit.outcomes import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Bool

    from service.audit.plan import Attack, Plan
    from service.audit.report import AttackReport
    from service.audit.shard import Distances, Probe, ShardResult


@dataclass(frozen=True)
class Evidence:
    """All that is known when an audit ends, also one that ended early.

    Attributes:
        plan: of the audit.
        results: of its shards, in any order.
        reports: of its attacks that search for a wrong class.
    """

    plan: Plan
    results: Sequence[ShardResult]
    reports: Sequence[AttackReport]

    def probes(self, code: str) -> list[Probe]:
        """Return what was measured for one code."""
        return [probe for result in self.results for probe in result.probes if probe.code == code and probe.n]

    @cached_property
    def attacks(self) -> list[Attack]:
        """Return the plan's attacks that were run."""
        reported = {report.id for report in self.reports}
        return [attack for attack in self.plan.attacks if attack.id in reported and self.shards(attack.id)]

    def shards(self, attack: str) -> list[ShardResult]:
        """Return what an attack found, by shard, in the samples' order."""
        own = [each for each in self.results if each.shard.kind == "attack" and each.shard.subject == attack]
        return sorted((each for each in own if each.distances), key=lambda each: each.shard.start)

    def fooled(self, attack: str, size: float) -> dict[int, bool]:
        """Return for each sample that was attacked whether a perturbation of at most this size was found."""
        return {
            each.shard.start + place: _within(distance, size)
            for each in self.shards(attack)
            for place, distance in enumerate(each.distances)
        }

    def parts(self, attack: str, size: float) -> dict[str, Bool[np.ndarray, " n"]]:
        """Return for each part of an attack, in its order, which images it fooled within a size."""
        shards = self.shards(attack)
        names = dict.fromkeys(name for each in shards for name in each.by_part)
        return {name: np.concatenate([_fooled_by(name, each, size) for each in shards]) for name in names}

    def paired(self, first: str, second: str, size: float) -> tuple[int, int, int]:
        """Return how many images only the first attack fooled, only the second, and how many both were given."""
        one, other = self.fooled(first, size), self.fooled(second, size)
        shared = one.keys() & other.keys()
        return (
            sum(one[row] and not other[row] for row in shared),
            sum(other[row] and not one[row] for row in shared),
            len(shared),
        )

    def pairs(self) -> Iterator[tuple[Attack, Attack]]:
        """Return each iterative white-box attack with each other attack of its norm that should be weaker."""
        for trusted in self.attacks:
            for other in self.attacks:
                if _is_iterative(trusted) and not _is_iterative(other) and other.norm == trusted.norm:
                    yield other, trusted


def is_single_step(attack: Attack) -> bool:
    """Return whether an attack takes one step along the gradient."""
    return attack.name in {"FGSM", "FGM"} or attack.name.endswith("FastGradientAttack")


def _is_iterative(attack: Attack) -> bool:
    return attack.access == "white-box" and not is_single_step(attack)


def _fooled_by(part: str, result: ShardResult, size: float) -> Bool[np.ndarray, " n"]:
    missing: Distances = tuple(0.0 if distance == 0 else None for distance in result.distances)
    return np.array([_within(distance, size) for distance in result.by_part.get(part, missing)], dtype=bool)


def _within(distance: float | None, size: float) -> bool:
    return distance is not None and distance <= size + TOLERANCE
