"""Which old versions go: those beyond the newest few, or past an age, that nothing points at.

all versions of a repository --policy--> candidates --aliases, living variants, the latest servable one--> doomed
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime, timedelta

Reference = tuple[str, int]


@dataclass(frozen=True)
class Policy:
    """What is old: beyond the newest `keep` of its model and, where both are given, `older_than` too.

    Raises:
        ValueError: `keep` is not positive, or `older_than` is negative.
    """

    keep: int | None = None
    older_than: timedelta | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep: expected 1 or more of the newest versions, got {self.keep}")
        if self.older_than is not None and self.older_than.total_seconds() < 0:
            raise ValueError(f"older_than: expected a positive age, got {self.older_than}")

    def covers(self, *, newer: int, age: timedelta | None) -> bool:
        """Whether a version is old: `newer` versions of its model came after it; one of unknown age is not."""
        if self.keep is None and self.older_than is None:
            return False
        aged = self.older_than is None or (age is not None and age > self.older_than)
        return aged and (self.keep is None or newer >= self.keep)


@dataclass(frozen=True)
class Kept:
    """A version as its repository keeps it.

    Attributes:
        reference: its model and its number.
        servable: whether its proof passed.
        source: what it was made from.
        aliased: whether an alias points at it, as far as is known.
        made: when its engine was; None where that is not known, or does not matter.
    """

    reference: Reference
    servable: bool = False
    source: Reference | None = None
    aliased: bool = False
    made: datetime | None = None


def doomed(versions: Iterable[Kept], policy: Policy, *, models: set[str], now: datetime) -> list[Reference]:
    """Return the versions that go, each before what it was made from.

    Args:
        versions: all of the repository.
        policy: what is old.
        models: only versions of these go.
        now: when ages are taken.
    """
    by_model: dict[str, list[Kept]] = defaultdict(list)
    for version in versions:
        by_model[version.reference[0]].append(version)
    candidates: dict[Reference, Kept] = {}
    for model in models & by_model.keys():
        candidates |= {kept.reference: kept for kept in _old(by_model[model], policy, now)}
    _spare_sources(candidates, [kept for model in by_model.values() for kept in model])
    return _variants_first(candidates)


def _old(versions: list[Kept], policy: Policy, now: datetime) -> list[Kept]:
    ordered = sorted(versions, key=lambda kept: kept.reference, reverse=True)
    latest = next((kept.reference for kept in ordered if kept.servable), None)
    return [
        kept
        for newer, kept in enumerate(ordered)
        if policy.covers(newer=newer, age=None if kept.made is None else now - kept.made)
        and not kept.aliased
        and kept.reference != latest
    ]


def _spare_sources(candidates: dict[Reference, Kept], versions: list[Kept]) -> None:
    """Take from the candidates what a version that stays was made from, and what that was made from in its turn."""
    staying = [kept for kept in versions if kept.reference not in candidates]
    while staying:
        source = staying.pop().source
        spared = candidates.pop(source, None) if source is not None else None
        if spared is not None:
            staying.append(spared)


def _variants_first(candidates: dict[Reference, Kept]) -> list[Reference]:
    """Order versions so that a removal that is cut short leaves none without its source."""
    ordered: list[Reference] = []
    remaining = dict(sorted(candidates.items()))
    while remaining:
        sources = {kept.source for kept in remaining.values()}
        # Nothing is made from itself; a circle of manifests, which nobody can publish, goes in any order.
        free = [reference for reference in remaining if reference not in sources] or list(remaining)
        for reference in free:
            del remaining[reference]
        ordered += free
    return ordered
