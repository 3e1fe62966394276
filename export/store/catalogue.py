"""The reading side of a repository: its models, their versions and aliases, each file as it was written.

"NAME" | "NAME@3" | "NAME@stable" --parse--> Version: manifest, folder --twin_of--> the PyTorch model with its weights
                                                                       --check--> every byte is as it was written
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from export import manifest as manifests
from export import triton
from export.manifest import Manifest, checked_name
from export.store.storage import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from export.store.storage import Storage


@dataclass(frozen=True)
class Version:
    """One published version: its manifest, and where its files are."""

    manifest: Manifest
    place: Callable[[Manifest], Path] = field(repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """Its folder on this machine; one of an object store is fetched, and checked, before this returns."""
        return self.place(self.manifest)

    def __str__(self) -> str:
        return f"{self.manifest.model}@{self.manifest.version}"


@dataclass(frozen=True)
class TwinFiles:
    """The PyTorch model with an engine's weights: the folder that holds it, and the weights' file in it."""

    folder: Path
    file: str


class Catalogue:
    """What is in a repository; readers need no lock and never meet half a version."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def location(self) -> str:
        """The folder or address, as the user names it."""
        return self._storage.location

    def models(self) -> list[str]:
        """Return the names of all models that have a version, sorted.

        Raises:
            FileNotFoundError: there is no such repository.
        """
        return [model for model in self._storage.models() if self.versions(model)]

    def versions(self, model: str) -> list[int]:
        """Return a model's version numbers, ascending; empty when there is no such model."""
        return self._storage.versions(checked_name(model))

    def aliases(self, model: str) -> dict[str, int]:
        """Return the version that each of a model's aliases points at.

        Raises:
            ValueError: model.json was damaged.
        """
        aliases = self._storage.state(checked_name(model)).aliases
        # A version that is gone has no alias: a removal that is cut short takes both at once.
        there = self.versions(model) if aliases else []
        return {alias: version for alias, version in sorted(aliases.items()) if version in there}

    def find(self, model: str, version: int | None = None) -> Version:
        """Return one version, the latest if none is named.

        Raises:
            FileNotFoundError: no such model or version; the message lists what there is.
            ValueError: the name is not a plain one, or the manifest cannot be read.
        """
        versions = self.versions(model)
        if not versions:
            known = ", ".join(self.models()) or "none"
            raise FileNotFoundError(f"model {model!r}: not in {self.location}; its models are: {known}")
        if version is None:
            version = versions[-1]
        if version not in versions:
            known = ", ".join(map(str, versions))
            raise FileNotFoundError(f"model {model!r} has no version {version}; its versions are: {known}")
        return self._version(self._manifest(model, version))

    def parse(self, reference: str) -> Version:
        """Return the version that `NAME`, `NAME@VERSION` or `NAME@ALIAS` means.

        Raises:
            FileNotFoundError: no such model, version or alias; the message lists what there is.
            ValueError: it is not such a reference.
        """
        model, at, which = reference.partition("@")
        if not at or VERSION.fullmatch(which):
            return self.find(model, int(which) if at else None)
        if which.isdecimal() or not manifests.NAME_PATTERN.fullmatch(which):
            raise ValueError(
                f"{reference!r}: expected NAME, NAME@VERSION with a whole number, or NAME@ALIAS, got {which!r}"
            )
        latest = self.find(model)  # a model that is not there has no aliases either, and that is the message to give
        aliases = self.aliases(model)
        if which not in aliases:
            known = ", ".join(aliases) or "none"
            raise FileNotFoundError(
                f"model {model!r} has no alias {which!r}; its aliases are: {known}; set one with "
                f"`tenet models promote {latest} --alias {which}`"
            )
        return self.find(model, aliases[which])

    def twin_of(self, version: Version) -> TwinFiles | None:
        """Return the PyTorch model with this engine's weights, its own or a source's; None if there is none.

        Raises:
            FileNotFoundError: the source, or the checkpoint, has been removed.
            ValueError: the checkpoint is not the one that was exported.
        """
        while version.manifest.twin is None:
            source = version.manifest.source
            if source is None:
                return None
            version = self.find(source.model, source.version)
            if version.manifest.sha256 != source.sha256:
                raise ValueError(
                    f"{version}: expected sha256 {source.sha256[:12]}…, from which the variant was made, got "
                    f"{version.manifest.sha256[:12]}…; it is another model: make the variant again"
                )
        twin = version.manifest.twin
        folder = version.folder / twin.folder
        weights = folder / twin.file
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}: expected {version}'s checkpoint here, found none; export it again")
        if (actual := manifests.sha256_of(weights)) != twin.sha256:
            raise ValueError(
                f"{weights}: expected sha256 {twin.sha256[:12]}… as in {version}'s manifest, got {actual[:12]}…; "
                "it is another checkpoint: export the model again"
            )
        return TwinFiles(folder, twin.file)

    def check(self, version: Version) -> Manifest:
        """Return a version's manifest after reading every byte of the version, and of the files beside it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is not, byte for byte, the one that was written, or is one too many.
        """
        model, number = version.manifest.model, version.manifest.version
        manifest = self._manifest(model, number, whole=True)
        folder = f"{model}/{number}"
        expected = {manifest.file: manifest.sha256, **manifest.files}
        for name, sha256 in expected.items():
            self._check_file(f"{folder}/{name}", sha256)
        for name in sorted({*self._storage.files(model, number)} - {*expected, manifests.FILE_NAME}):
            raise ValueError(
                f"{self._name(f'{folder}/{name}')}: expected the files of the manifest alone, got one more; "
                "remove it, or export the model again"
            )
        self._storage.state(model)
        self._check_triton(model)
        return manifest

    def _manifest(self, model: str, version: int, *, whole: bool = False) -> Manifest:
        """Read a manifest; `whole`: every byte is as it was written, and it is that of this very version."""
        path = f"{model}/{version}/{manifests.FILE_NAME}"
        contents = self._storage.read(path)
        manifest = manifests.from_json(contents, source=self._name(path))
        if whole and manifest.as_json() != contents:
            raise ValueError(f"{self._name(path)}: was changed or damaged after export; export the model again")
        if whole and (manifest.model, manifest.version) != (model, version):
            raise ValueError(
                f"{self._name(path)}: is the manifest of {manifest.model}@{manifest.version}; export the model again"
            )
        return manifest

    def _readable(self, model: str) -> list[Manifest]:
        """Return the manifests of a model, ascending, without those that are damaged: nothing is known of these."""
        found = []
        for version in self.versions(model):
            with suppress(ValueError, FileNotFoundError):
                found.append(self._manifest(model, version))
        return found

    def _version(self, manifest: Manifest) -> Version:
        return Version(manifest, self._storage.folder)

    def _name(self, path: str) -> str:
        return f"{self.location}/{path}"

    def _check_file(self, path: str, expected: str) -> None:
        if (actual := self._storage.sha256(path)) != expected:
            raise ValueError(
                f"{self._name(path)}: expected sha256 {expected[:12]}… as in its manifest, got {actual[:12]}…; "
                "the file was changed or damaged after export: export the model again"
            )

    def _check_triton(self, model: str) -> None:
        for name in self._stale(model):
            raise ValueError(
                f"{self._name(f'{model}/{name}')}: expected what the model's versions call for, got something else: it "
                "was changed or damaged, or its writer killed; `tenet models prune` writes it again"
            )

    def _stale(self, model: str) -> list[str]:
        """Return which of the files that Triton reads are not what the versions that are there call for."""
        wanted = triton.files_of(model, self._readable(model))
        return [name for name in (triton.CONFIG, triton.LABELS) if self._beside(model, name) != wanted.get(name)]

    def _beside(self, model: str, name: str) -> bytes | None:
        """Return a file beside a model's versions, None if there is none."""
        try:
            return self._storage.read(f"{model}/{name}")
        except FileNotFoundError:
            return None
