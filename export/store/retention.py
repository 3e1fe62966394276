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

    from export.manifest import Manifest

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

    def covers(self, *, newer: int, age: timedelta) -> bool:
        """Whether a version is old: `newer` versions of its model came after it."""
        if self.keep is None and self.older_than is None:
            return False
        return (self.keep is None or newer >= self.keep) and (self.older_than is None or age > self.older_than)


@dataclass(frozen=True)
class Kept:
    """A version as its repository keeps it: when its engine was made, and whether an alias points at it."""

    manifest: Manifest
    made: datetime
    aliased: bool

    @property
    def reference(self) -> Reference:
        """Its model and its number."""
        return self.manifest.model, self.manifest.version


def doomed(versions: Iterable[Kept], policy: Policy, *, models: set[str], now: datetime) -> list[Manifest]:
    """Return the versions that go, each before what it was made from.

    Args:
        versions: all of the repository.
        policy: what is old.
        models: only versions of these go.
        now: when ages are taken.
    """
    by_model: dict[str, list[Kept]] = defaultdict(list)
    for version in versions:
        by_model[version.manifest.model].append(version)
    candidates: dict[Reference, Manifest] = {}
    for model in models & by_model.keys():
        candidates |= {kept.reference: kept.manifest for kept in _old(by_model[model], policy, now)}
    _spare_sources(candidates, [kept for model in by_model.values() for kept in model])
    return _variants_first(candidates)


def _old(versions: list[Kept], policy: Policy, now: datetime) -> list[Kept]:
    ordered = sorted(versions, key=lambda kept: kept.manifest.version, reverse=True)
    latest = next((kept.manifest.version for kept in ordered if kept.manifest.servable), None)
    return [
        kept
        for newer, kept in enumerate(ordered)
        if policy.covers(newer=newer, age=now - kept.made) and not kept.aliased and kept.manifest.version != latest
    ]


def _spare_sources(candidates: dict[Reference, Manifest], versions: list[Kept]) -> None:
    """Take from the candidates what a version that stays was made from, and what that was made from in its turn."""
    staying = [kept.manifest for kept in versions if kept.reference not in candidates]
    while staying:
        source = staying.pop().source
        spared = candidates.pop((source.model, source.version), None) if source is not None else None
        if spared is not None:
            staying.append(spared)


def _variants_first(candidates: dict[Reference, Manifest]) -> list[Manifest]:
    """Order versions so that a removal that is cut short leaves none without its source."""
    ordered: list[Manifest] = []
    remaining = dict(sorted(candidates.items()))
    while remaining:
        sources = {(m.source.model, m.source.version) for m in remaining.values() if m.source is not None}
        # Nothing is made from itself; a circle of manifests, which nobody can publish, goes in any order.
        free = [reference for reference in remaining if reference not in sources] or list(remaining)
        ordered += [remaining.pop(reference) for reference in free]
    return ordered
