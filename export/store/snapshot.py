"""A model as it was at one moment: read once, and then asked for everything that is to be done with it.

storage --one listing, one read of all--> Snapshot: manifests, what is damaged, aliases --> what Triton should read
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from export import manifest as manifests
from export import triton
from export.store import model_state
from export.store.model_state import ModelState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.manifest import Manifest
    from export.store.storage import Step, Storage

_BESIDE = (triton.CONFIG, triton.LABELS)


@dataclass(frozen=True)
class Snapshot:
    """What one look at a model has shown.

    Attributes:
        model: its name.
        manifests: of the versions, by number, ascending.
        damaged: the versions of whose manifest nothing is known, and why.
        state: what model.json holds; nothing, where it is damaged.
        state_damage: why model.json cannot be read, "" if it can: then nothing is known of aliases.
        beside: the files that Triton reads, by name.
    """

    model: str
    manifests: dict[int, Manifest]
    damaged: dict[int, str]
    state: ModelState
    state_damage: str
    beside: dict[str, bytes]

    @property
    def versions(self) -> list[int]:
        """The numbers of all versions, ascending."""
        return sorted([*self.manifests, *self.damaged])

    @property
    def aliases(self) -> dict[str, int]:
        """The version that each alias points at; a version that is gone has none."""
        return {alias: n for alias, n in sorted(self.state.aliases.items()) if n in {*self.manifests, *self.damaged}}

    def aliases_of(self, number: int) -> list[str]:
        """Return the aliases that point at a version."""
        return [alias for alias, pointed_at in self.aliases.items() if pointed_at == number]

    def changed(self, manifest: Manifest) -> Snapshot:
        """Return the model as it will be with this version, new or changed."""
        return replace(self, manifests={**self.manifests, manifest.version: manifest})

    def without(self, number: int) -> Snapshot:
        """Return the model as it will be without a version."""
        return replace(
            self,
            manifests={n: manifest for n, manifest in self.manifests.items() if n != number},
            damaged={n: why for n, why in self.damaged.items() if n != number},
        )

    def stale(self) -> list[str]:
        """Return which of the files that Triton reads are not what the versions call for."""
        wanted = self._wanted()
        return [name for name in _BESIDE if self.beside.get(name) != wanted.get(name)]

    def steps(self) -> Sequence[Step]:
        """Return the writes that bring what Triton reads to what the versions call for."""
        steps = triton.steps_to(self._wanted(), labels=self.beside.get(triton.LABELS))
        return [(f"{self.model}/{name}", content) for name, content in steps]

    def _wanted(self) -> dict[str, bytes]:
        return triton.files_of(self.model, self.manifests.values())


def taken(storage: Storage, model: str) -> Snapshot:
    """Look at a model; what is damaged is said, and a version that vanishes meanwhile is none."""
    numbers = storage.versions(model)
    paths = {number: f"{model}/{number}/{manifests.FILE_NAME}" for number in numbers}
    beside = {name: f"{model}/{name}" for name in (*_BESIDE, model_state.FILE_NAME)}
    contents = storage.read_all([*paths.values(), *beside.values()])
    if any(isinstance(contents[path], FileNotFoundError) for path in paths.values()):
        there = set(storage.versions(model))
        paths = {number: path for number, path in paths.items() if number in there}
    found: dict[int, Manifest] = {}
    damaged: dict[int, str] = {}
    for number, path in paths.items():
        try:
            found[number] = storage.manifest(model, number, _bytes(contents[path]))
        except (OSError, ValueError) as error:
            damaged[number] = str(error)
    state, state_damage = _state(contents[beside[model_state.FILE_NAME]], source=storage.location, model=model)
    read = {name: contents[beside[name]] for name in _BESIDE}
    there_beside = {name: content for name, content in read.items() if isinstance(content, bytes)}
    return Snapshot(model, found, damaged, state, state_damage, there_beside)


def _bytes(content: bytes | OSError) -> bytes:
    if isinstance(content, OSError):
        raise content
    return content


def _state(content: bytes | OSError, *, source: str, model: str) -> tuple[ModelState, str]:
    if isinstance(content, FileNotFoundError):
        return ModelState(), ""
    try:
        return model_state.from_json(_bytes(content), source=f"{source}/{model}/{model_state.FILE_NAME}"), ""
    except (OSError, ValueError) as error:
        return ModelState(), str(error)
