"""The model repository: `<repository>/<model>/<version>/`, laid out so that Triton can serve the same folder.

draft --described, proved--> <model>/<version>/ --promote--> alias in model.json
                                                --remove, prune--> gone, its number never given again

What may be done, and in which order, is here; how files come to be there whole is the storage's part.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from export import manifest as manifests
from export import triton
from export.manifest import Manifest, Parity, checked_name
from export.store import retention
from export.store.catalogue import Catalogue, TwinFiles, Version
from export.store.drafts import Draft
from export.store.model_state import ModelState, checked_alias
from export.store.retention import Kept, Policy
from export.store.storage import FULL, FolderStorage, Storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import timedelta

    from export.store.storage import Step

# Publishers in an object store, on other machines, that one may have to wait for before all agree.
_ROUNDS = 10

__all__ = ["Draft", "Pruned", "Repository", "TwinFiles", "Version", "open_repository"]


@dataclass(frozen=True)
class Pruned:
    """What a repository was cleared of: versions, and the names of what killed processes had left."""

    versions: tuple[Version, ...]
    remains: tuple[str, ...]


def open_repository(location: str | Path) -> Repository:
    """Open a repository: a folder, or `s3://bucket/prefix`, `gs://bucket/prefix`, `memory://name`.

    Raises:
        ValueError: it is an address of another kind.
        RuntimeError: the package that speaks to such a store is not installed.
    """
    protocol, found, path = str(location).partition("://")
    if not found or protocol == "file":
        return Repository(Path(path if found else protocol))
    from export.store import remote  # noqa: PLC0415 - serving from a folder needs none of it

    return Repository(remote.storage(str(location)))


class Repository(Catalogue):
    """Models, their versions and aliases; any number of readers and writers at once."""

    def __init__(self, place: Path | Storage) -> None:
        super().__init__(place if isinstance(place, Storage) else FolderStorage(place))

    @property
    def folder(self) -> Path:
        """The folder of a repository that is one; asserts that it is. `Version.folder` works for all."""
        assert isinstance(self._storage, FolderStorage), f"{self.location} is no folder"
        return self._storage.root

    @contextmanager
    def draft(self, model: str) -> Iterator[Draft]:
        """Publish a new version: all of it when the block ends well, nothing of it otherwise.

        Raises:
            OSError: there is no place for it: a full disk, a folder that cannot be written to, a file of that name.
            ValueError: the name is not a plain one, or model.json was damaged.
        """
        checked_name(model)
        with self._room("nothing was published; make room and publish again"):
            with self._storage.lock():
                self._storage.sweep(model)
                draft = self._storage.begin(model)
            try:
                with self._storage.lock():
                    self._keep_from_triton(model)
                yield draft
                self._storage.stage(draft)
                with self._storage.lock():
                    self._storage.publish(draft, self._steps(model, changed=draft.manifest))
                    self._settle(model)
            finally:
                with self._storage.lock():
                    self._storage.end(draft)

    def record_proof(self, version: Version, proof: Parity) -> None:
        """Put a new proof into a published version's manifest, all of it or nothing.

        Raises:
            FileNotFoundError: the version has been removed meanwhile.
        """
        model, number = version.manifest.model, version.manifest.version
        with self._changing():
            manifest = self.find(model, number).manifest.model_copy(update={"parity": proof})
            step = (f"{model}/{number}/{manifests.FILE_NAME}", manifest.as_json())
            beside = self._steps(model, changed=manifest)
            # Triton must not be told of a version before its proof is there, nor after it has failed.
            self._storage.write(model, [step, *beside] if manifest.servable else [*beside, step])
            self._settle(model)

    def promote(self, version: Version, alias: str = "stable") -> int | None:
        """Point an alias at a version, at once for all readers; return the number of the one it pointed at before.

        Raises:
            ValueError: the alias is no plain name, or the version is not servable; the message says why, and a way out.
            FileNotFoundError: the version has been removed meanwhile.
        """
        model, number = version.manifest.model, version.manifest.version
        checked_alias(alias)
        with self._changing():
            _refuse_unservable(self.find(model, number))
            former = self.aliases(model).get(alias)
            self._storage.update(model, lambda state: self._with_aliases(model, state, {alias: number}))
        return former

    def remove(self, version: Version, *, force: bool = False) -> None:
        """Remove a version: readers see all of it or nothing. Its number is not given again.

        Args:
            version: what to remove.
            force: though an alias points at it, which goes too, or variants were made from it, which lose their source.

        Raises:
            ValueError: an alias points at it, or other versions were made from it; both are named.
            FileNotFoundError: it has been removed meanwhile.
        """
        with self._changing():
            found = self.find(version.manifest.model, version.manifest.version)
            if not force:
                self._refuse_needed(found)
            self._remove(found)

    def prune(
        self,
        model: str | None = None,
        *,
        keep: int | None = None,
        older_than: timedelta | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove old versions and what killed processes left, and write anew what Triton reads.

        What an alias points at stays, what a staying version was made from, and the latest servable version of each
        model. Without `keep` and `older_than` no version goes.

        Args:
            model: of this model alone.
            keep: versions beyond the newest `keep` of a model are old, 1 or more.
            older_than: versions whose engine was made longer ago are old; with `keep`, both must hold.
            dry_run: only say which versions would go.

        Raises:
            FileNotFoundError: no such repository or model.
            ValueError: the policy is none.
        """
        policy = Policy(keep, older_than)
        models = self._storage.models()
        if model is not None:
            models = [self.find(model).manifest.model]
        if dry_run:
            return Pruned(self._doomed(policy, models), ())
        with self._changing():
            remains = [f"{name}/{left}" for name in models for left in self._storage.sweep(name)]
            versions = self._doomed(policy, models)
            for version in versions:
                self._remove(version)
            for name in models:
                if self.versions(name):
                    self._settle(name)
                self._storage.forget(name)
        return Pruned(versions, tuple(remains))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock, and say what a full disk means for the reader."""
        with self._room("what was there is as it was; make room and do it again"), self._storage.lock():
            yield

    @contextmanager
    def _room(self, way_out: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(f"{error.filename or self.location}: {error.strerror}; {way_out}") from error

    def _keep_from_triton(self, model: str) -> None:
        """Give a new model a configuration that lists no version: without one Triton would load what it finds."""
        if self._beside(model, triton.CONFIG) is None:
            self._storage.write(model, [(f"{model}/{triton.CONFIG}", triton.config_of(model, []).encode())])

    def _steps(self, model: str, *, changed: Manifest | None = None, without: int | None = None) -> Sequence[Step]:
        """Return the writes that bring what Triton reads to the versions that are there, one changed or taken away."""
        known = {manifest.version: manifest for manifest in self._readable(model) if manifest.version != without}
        if changed is not None:
            known[changed.version] = changed
        files = triton.files_of(model, known.values())
        steps = triton.steps_to(files, labels=self._beside(model, triton.LABELS))
        return [(f"{model}/{name}", content) for name, content in steps]

    def _settle(self, model: str) -> None:
        """Write what Triton reads, if it is not what the versions that are there call for.

        Only what was damaged, or what another machine did to an object store meanwhile, leaves anything to write.
        """
        for _ in range(_ROUNDS):
            if not self._stale(model):
                return
            self._storage.write(model, self._steps(model))

    def _with_aliases(self, model: str, state: ModelState, changes: dict[str, int]) -> ModelState:
        there = self.versions(model)
        kept = {alias: version for alias, version in state.aliases.items() if version in there}
        return state.model_copy(update={"aliases": {**kept, **changes}})

    def _refuse_needed(self, version: Version) -> None:
        """Raise if something would miss the version."""
        model, number = version.manifest.model, version.manifest.version
        aliases = [alias for alias, pointed_at in self.aliases(model).items() if pointed_at == number]
        if aliases:
            raise ValueError(
                f"{version}: not removed, because its alias points at it: {', '.join(aliases)}; point it at another "
                "version with `tenet models promote`, or use --force"
            )
        variants = [
            f"{manifest.model}@{manifest.version}"
            for name in self.models()
            for manifest in self._readable(name)
            if manifest.source is not None and (manifest.source.model, manifest.source.version) == (model, number)
        ]
        if variants:
            raise ValueError(
                f"{version}: not removed, because others were made from it, and are proved against it: "
                f"{', '.join(variants)}; remove them first, or use --force"
            )

    def _remove(self, version: Version) -> None:
        model, number = version.manifest.model, version.manifest.version
        try:
            # First, so that Triton is never told of a version that is not there.
            self._storage.write(model, self._steps(model, without=number))
        except OSError as error:
            # But a full disk must not keep anybody from making room.
            if error.errno not in FULL:
                raise
        self._storage.remove(model, number)
        self._settle(model)
        self._storage.update(model, lambda state: self._with_aliases(model, state, {}))

    def _doomed(self, policy: Policy, models: list[str]) -> tuple[Version, ...]:
        kept = [
            Kept(manifest, self._storage.made(manifest), aliased=manifest.version in aliased)
            for name in self.models()
            for aliased in [set(self.aliases(name).values())]
            for manifest in self._readable(name)
        ]
        chosen = retention.doomed(kept, policy, models=set(models), now=datetime.now(UTC))
        return tuple(self._version(manifest) for manifest in chosen)


def _refuse_unservable(version: Version) -> None:
    proof = version.manifest.parity
    why = proof.explanation or "no explanation"
    if proof.status == "failed":
        raise ValueError(
            f"{version}: not promoted, because it is blocked: its parity with {proof.reference} failed: {why}; "
            "export it again, or repeat the proof with `tenet models verify`"
        )
    if not version.manifest.servable:
        raise ValueError(
            f"{version}: not promoted, because its proof of parity was not run: {why}; complete it with "
            f"`tenet models verify {version}` on a machine that can run it"
        )
