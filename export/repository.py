"""The model repository: `<repository>/<model>/<version>/`, laid out so that Triton can serve the same folder.

draft --described, proved--> <model>/<version>/ --promote--> alias in model.json
                                                --remove, prune--> gone, its number never given again
"NAME" | "NAME@3" | "NAME@stable" --parse--> Version: manifest, folder --twin_of--> the PyTorch model with its weights

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
from export.store import integrity, retention, snapshot
from export.store.drafts import Draft
from export.store.folder import FolderStorage
from export.store.integrity import TwinFiles
from export.store.model_state import checked_alias
from export.store.retention import Kept, Policy, Reference
from export.store.snapshot import Snapshot
from export.store.storage import FULL, VERSION, Storage
from export.store.version import Version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

    from export.store.model_state import ModelState

# Publishers in an object store, on other machines, that one may have to wait for before all agree.
_ROUNDS = 10

__all__ = ["Draft", "Pruned", "Repository", "Snapshot", "TwinFiles", "Version", "open_repository"]


@dataclass(frozen=True)
class Pruned:
    """What a repository was cleared of, and what is wrong with it.

    Attributes:
        versions: those that went.
        remains: the names of what killed processes had left.
        damaged: why versions, or the aliases of a model, could not be judged, and stayed.
    """

    versions: tuple[Version, ...]
    remains: tuple[str, ...]
    damaged: tuple[str, ...] = ()


def open_repository(location: str | Path) -> Repository:
    """Open a repository: a folder, or `s3://bucket/prefix`, `gs://bucket/prefix`, `memory://name`.

    Raises:
        ValueError: it is an address of another kind, or empty.
        RuntimeError: the package that speaks to such a store is not installed.
    """
    protocol, found, path = str(location).partition("://")
    if not found or protocol == "file":
        folder = path if found else protocol
        if not folder.strip():  # pathlib would take it for the working folder
            raise ValueError(
                f"repository: expected a folder, s3://bucket/prefix or gs://bucket/prefix, got {location!r}"
            )
        return Repository(Path(folder))
    from export.store import remote  # noqa: PLC0415 - serving from a folder needs none of it

    return Repository(remote.storage(str(location)))


class Repository:
    """Models, their versions and aliases; any number of readers and writers at once.

    Readers need no lock and never meet half a version.
    """

    def __init__(self, place: Path | Storage) -> None:
        self._storage = place if isinstance(place, Storage) else FolderStorage(place)

    @property
    def location(self) -> str:
        """The folder or address, as the user names it."""
        return self._storage.location

    @property
    def folder(self) -> Path:
        """The folder of a repository that is one; asserts that it is. `Version.folder` works for all."""
        assert isinstance(self._storage, FolderStorage), f"{self.location} is no folder"
        return self._storage.root

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

    def snapshots(self) -> list[Snapshot]:
        """Return what each model is at this moment, damaged versions included: the way to look at all of them.

        Raises:
            FileNotFoundError: there is no such repository.
        """
        seen = (snapshot.taken(self._storage, model) for model in self._storage.models())
        return [model for model in seen if model.versions]

    def readable(self) -> list[Version]:
        """Return all versions whose manifests can be read, by model and number.

        Raises:
            FileNotFoundError: there is no such repository.
        """
        return [self._version(manifest) for seen in self.snapshots() for manifest in seen.manifests.values()]

    def find(self, model: str, version: int | None = None) -> Version:
        """Return one version, the latest if none is named.

        Raises:
            FileNotFoundError: no such model or version; the message lists what there is.
            ValueError: the name is not a plain one, or the manifest cannot be read.
        """
        checked_name(model)
        return self._found(lambda: (model, self._latest(model) if version is None else version))

    def parse(self, reference: str) -> Version:
        """Return the version that `NAME`, `NAME@VERSION` or `NAME@ALIAS` means; raises as `resolve` and `find` do."""
        return self._found(lambda: self.resolve(reference))

    def resolve(self, reference: str) -> Reference:
        """Return the model and the number that `NAME`, `NAME@VERSION` or `NAME@ALIAS` means, unread.

        Raises:
            FileNotFoundError: no such model or alias; the message lists what there is.
            ValueError: it is not such a reference, or model.json was damaged.
        """
        model, at, which = reference.partition("@")
        checked_name(model)
        if not at:
            return model, self._latest(model)
        if VERSION.fullmatch(which):
            return model, int(which)
        if which.isdecimal() or not manifests.NAME_PATTERN.fullmatch(which):
            raise ValueError(
                f"{reference!r}: expected NAME, NAME@VERSION with a whole number, or NAME@ALIAS, got {which!r}"
            )
        latest = self._latest(model)  # a model that is not there has no aliases either, and that is the message to give
        aliases = self.aliases(model)
        if which not in aliases:
            known = ", ".join(aliases) or "none"
            raise FileNotFoundError(
                f"model {model!r} has no alias {which!r}; its aliases are: {known}; set one with "
                f"`tenet models promote {model}@{latest} --alias {which}`"
            )
        return model, aliases[which]

    def twin_of(self, version: Version) -> TwinFiles | None:
        """Return the PyTorch model with this engine's weights, its own or a source's; None if there is none.

        Raises:
            FileNotFoundError: the source, or the checkpoint, has been removed.
            ValueError: the checkpoint is not the one that was exported.
        """
        return integrity.twin_of(version, find=self.find)

    def check(self, version: Version) -> Manifest:
        """Return a version's manifest after reading every byte of the version, and of the files beside it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is not, byte for byte, the one that was written, or is one too many.
        """
        return integrity.check(self._storage, version.manifest.model, version.manifest.version)

    def check_writable(self, model: str) -> None:
        """Raise if nothing can be written to a model, as far as that shows before something is: not in a store.

        Raises:
            OSError: it cannot, and why.
        """
        with self._changing():
            self._storage.probe(checked_name(model))

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
                draft = self._storage.begin(model)
            try:
                with self._storage.lock():
                    self._keep_from_triton(model)
                yield draft
                self._storage.stage(draft)
                with self._storage.lock():
                    seen = snapshot.taken(self._storage, model).changed(draft.manifest)
                    self._storage.publish(draft, seen.steps())
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
        path = f"{model}/{number}/{manifests.FILE_NAME}"
        with self._changing():
            self.find(model, number)  # says what there is, if it is not there
            before = self._storage.read(path)
            manifest = self._storage.manifest(model, number, before).model_copy(update={"parity": proof})
            step = (path, manifest.as_json())
            beside = snapshot.taken(self._storage, model).changed(manifest).steps()
            # Triton must not be told of a version before its proof is there, nor after it has failed.
            steps = [step, *beside] if manifest.servable else [*beside, step]
            self._storage.write(model, steps, over={path: before})
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
            former = self.aliases(model)
            self._point(model, {alias: number})
        return former.get(alias)

    def remove(self, model: str, version: int, *, force: bool = False) -> None:
        """Remove a version, damaged or not: readers see all of it or nothing. Its number is not given again.

        Args:
            model: whose version.
            version: its number.
            force: though an alias points at it, which goes too, or variants were made from it, which lose their source.

        Raises:
            ValueError: an alias points at it, or other versions were made from it; both are named.
            FileNotFoundError: there is none, or it has been removed meanwhile.
        """
        checked_name(model)
        with self._changing():
            seen = snapshot.taken(self._storage, model)
            if version not in seen.versions:
                raise self._missing(model, version)
            if not force:
                self._refuse_needed(seen, version)
            self._remove(seen, version)
            self._settle(model)

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
        model. Without `keep` and `older_than` no version goes. What is no model of this repository is not touched,
        and what is damaged is said.

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
        if model is not None:
            self._latest(model)
        if dry_run:
            versions, damaged = self._doomed(policy, model, {seen.model: seen for seen in self.snapshots()})
            return Pruned(versions, (), damaged)
        with self._changing():
            ours = [name for name in self._storage.models() if model in {None, name} and self._storage.holds(name)]
            remains = tuple(f"{name}/{left}" for name in ours for left in self._storage.sweep(name))
            seen = {found.model: found for found in self.snapshots()}
            versions, damaged = self._doomed(policy, model, seen)
            for manifest in (version.manifest for version in versions):
                seen[manifest.model] = self._remove(seen[manifest.model], manifest.version)
            for name in ours:
                if name in seen and seen[name].stale():
                    self._settle(name)
                self._storage.forget(name)
        return Pruned(versions, remains, damaged)

    def _version(self, manifest: Manifest) -> Version:
        return Version(manifest, self._storage.folder)

    def _latest(self, model: str) -> int:
        versions = self.versions(model)
        if not versions:
            known = ", ".join(self.models()) or "none"
            raise FileNotFoundError(f"model {model!r}: not in {self.location}; its models are: {known}")
        return versions[-1]

    def _found(self, which: Callable[[], Reference]) -> Version:
        """Return the version that is meant; what it is, is asked again if it has been removed before it was read."""
        meant = which()
        while True:
            try:
                return self._version(self._storage.manifest(*meant))
            except FileNotFoundError:
                before, meant = meant, which()
                if meant == before:
                    raise self._missing(*meant) from None

    def _missing(self, model: str, version: int) -> FileNotFoundError:
        """Return the complaint about a version without a manifest, mostly that there is none."""
        self._latest(model)
        versions = self.versions(model)
        if version in versions:
            return FileNotFoundError(
                f"{self.location}/{model}/{version}: expected a manifest here, found none: it is damaged; remove it "
                f"with `tenet models remove {model}@{version}`, or export the model again"
            )
        known = ", ".join(map(str, versions))
        return FileNotFoundError(f"model {model!r} has no version {version}; its versions are: {known}")

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
        path = f"{model}/{triton.CONFIG}"
        try:
            self._storage.read(path)
        except FileNotFoundError:
            self._storage.write(model, [(path, triton.config_of(model, []).encode())])

    def _settle(self, model: str) -> None:
        """Write what Triton reads, if it is not what the versions that are there call for.

        Only what was damaged, or what another machine did to an object store meanwhile, leaves anything to write.
        """
        for _ in range(_ROUNDS):
            seen = snapshot.taken(self._storage, model)
            if not seen.stale():
                return
            self._storage.write(model, seen.steps())

    def _point(self, model: str, changes: dict[str, int]) -> None:
        """Change aliases, and drop those whose versions are gone."""
        there = self.versions(model)

        def pointed(state: ModelState) -> ModelState:
            kept = {alias: version for alias, version in state.aliases.items() if version in there}
            return state.model_copy(update={"aliases": {**kept, **changes}})

        self._storage.update(model, pointed)

    def _refuse_needed(self, seen: Snapshot, number: int) -> None:
        """Raise if something would miss the version, or nobody knows."""
        version = f"{seen.model}@{number}"
        if seen.state_damage:
            raise ValueError(f"{seen.state_damage}; or remove {version} with --force, whatever points at it")
        if aliases := seen.aliases_of(number):
            raise ValueError(
                f"{version}: not removed, because its alias points at it: {', '.join(aliases)}; point it at another "
                "version with `tenet models promote`, or use --force"
            )
        made_from = [
            str(other)
            for other in self.readable()
            for source in [other.manifest.source]
            if source is not None and (source.model, source.version) == (seen.model, number)
        ]
        if made_from:
            raise ValueError(
                f"{version}: not removed, because others were made from it, and are proved against it: "
                f"{', '.join(made_from)}; remove them first, or use --force"
            )

    def _remove(self, seen: Snapshot, number: int) -> Snapshot:
        """Remove a version; return the model without it. What Triton reads is settled afterwards."""
        left = seen.without(number)
        try:
            # First, so that Triton is never told of a version that is not there.
            self._storage.write(seen.model, left.steps())
        except OSError as error:
            # But a full disk must not keep anybody from making room.
            if error.errno not in FULL:
                raise
        self._storage.remove(seen.model, number)
        if number in seen.state.aliases.values():
            self._point(seen.model, {})
        return left

    def _doomed(
        self, policy: Policy, model: str | None, seen: dict[str, Snapshot]
    ) -> tuple[tuple[Version, ...], tuple[str, ...]]:
        """Return which versions go, and what could not be judged."""
        kept: list[Kept] = []
        damaged: list[str] = []
        for name, found in seen.items():
            made: dict[int, datetime] = {}
            if policy.older_than is not None:
                made = self._storage.made(name, {n: manifest.file for n, manifest in found.manifests.items()})
            kept += [_kept(found, number, made.get(number)) for number in found.manifests]
            if model in {None, name}:
                damaged += _damage(found)
                if policy.older_than is not None:
                    damaged += [f"{name}@{n}: its engine file is missing" for n in found.manifests if n not in made]
        chosen = retention.doomed(kept, policy, models={model} if model else {*seen}, now=datetime.now(UTC))
        return tuple(self._version(seen[name].manifests[number]) for name, number in chosen), tuple(damaged)


def _kept(seen: Snapshot, number: int, made: datetime | None) -> Kept:
    manifest = seen.manifests[number]
    source = None if manifest.source is None else (manifest.source.model, manifest.source.version)
    aliased = bool(seen.state_damage or seen.aliases_of(number))
    return Kept((seen.model, number), manifest.servable, source, aliased, made)


def _damage(seen: Snapshot) -> list[str]:
    found = [f"{seen.model}@{number}: {why}" for number, why in seen.damaged.items()]
    return [*found, f"{seen.model}: {seen.state_damage}"] if seen.state_damage else found


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
