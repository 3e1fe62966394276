"""What a repository holds at one moment, as far as serving goes by it.

repository --look: manifests and aliases, no engine--> Seen --candidates, by [models] versions--> versions to serve
                                                            --refusals---------------------------> why not the others
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from export.store.storage import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.manifest import Manifest
    from export.repository import Repository
    from service.settings import Models as Choice


@dataclass(frozen=True, slots=True)
class Seen:
    """One model, as one look has shown it.

    Attributes:
        model: its name.
        manifests: of the versions, by number.
        damaged: why nothing is known of the other versions, by number.
        aliases: the version that each alias points at; None where that cannot be read, and so is as it was before.
    """

    model: str
    manifests: Mapping[int, Manifest] = field(default_factory=dict)
    damaged: Mapping[int, str] = field(default_factory=dict)
    aliases: Mapping[str, int] | None = field(default_factory=dict)

    @property
    def versions(self) -> list[int]:
        """The numbers of all versions, ascending."""
        return sorted([*self.manifests, *self.damaged])

    def refusals(self) -> dict[int, str]:
        """Return why versions are not meant to be served, by number: no proof of parity, or one that failed."""
        reasons = {number: reason_against(manifest) for number, manifest in self.manifests.items()}
        return {number: reason for number, reason in reasons.items() if reason is not None}

    def faults(self) -> dict[int, str]:
        """Return why versions cannot be served, by number, though they should be: they are damaged, or of no use."""
        reasons = {number: _fault(manifest) for number, manifest in self.manifests.items()}
        return {**self.damaged, **{number: reason for number, reason in reasons.items() if reason is not None}}


def look(repository: Repository) -> dict[str, Seen]:
    """Look at all models of a repository.

    Raises:
        FileNotFoundError: there is none.
        OSError: the store cannot be reached.
    """
    return {
        seen.model: Seen(seen.model, seen.manifests, seen.damaged, None if seen.state_damage else seen.aliases)
        for seen in repository.snapshots()
    }


def look_at(repository: Repository, *, model: str) -> Seen | None:
    """Look at one model, None if the repository has none of this name; raises as `look`."""
    found: dict[int, Manifest] = {}
    damaged: dict[int, str] = {}
    for number in repository.versions(model):
        try:
            found[number] = repository.find(model, number).manifest
        except (OSError, ValueError) as error:
            damaged[number] = str(error)
    try:
        aliases = repository.aliases(model)
    except ValueError:
        aliases = None
    return Seen(model, found, damaged, aliases) if found or damaged else None


def candidates(seen: Seen, choice: Choice, *, aliases: Mapping[str, int]) -> list[int]:
    """Return the versions that should be served, the newest first; damaged ones are among them.

    Of these, `latest` serves only as many as it says: the next one takes the place of one that does not load.

    Args:
        seen: what there is.
        choice: the table `[models]`.
        aliases: what the aliases point at.
    """
    meant = sorted({*seen.versions} - seen.refusals().keys(), reverse=True)
    if choice.versions != "aliased":
        return meant
    pointed = set(aliases.values())
    return [number for number in meant if number in pointed]


def is_number(version: str) -> bool:
    """Whether this is a version's number; leading zeros are allowed, numbers longer than any version's are not."""
    return version.isascii() and version.isdecimal() and VERSION.fullmatch(version.lstrip("0") or "1") is not None


def reason_against(manifest: Manifest) -> str | None:
    """Return why a version is not meant to be served, None if it is."""
    explanation = manifest.parity.explanation or "no explanation"
    match manifest.parity.status:
        case "passed":
            return None
        case "failed":
            return f"blocked: its proof of parity failed: {explanation}; export it in another precision"
        case "not run":
            return (
                f"unproven: its proof of parity has not run: {explanation}; "
                f"complete it with `tenet models verify {manifest.model}@{manifest.version}`"
            )


def _fault(manifest: Manifest) -> str | None:
    if len(manifest.inputs) == 1 and len(manifest.outputs) == 1:
        return None
    counts = f"{len(manifest.inputs)} inputs and {len(manifest.outputs)} outputs"
    return f"expected one input and one output, got {counts}; export the model again"
