"""Repositories in object stores, s3:// and gs://, by fsspec; memory:// is one that ends with the process.

publish: draft here --all its files--> store, then manifest.json, which must not be there yet: readers see the version
read:    store --manifest.json--> Version --folder--> its files, fetched to the cache and checked by sha256 --> engines

A store has no rename and no lock, but it writes an object whole or not at all, and creates one only once if asked to.
What follows from that: a version number is an object that is created (`.numbers/<n>`) and never removed; a version is
there once its manifest is, and gone once that is; an alias moves with one write of model.json, which s3:// takes only
from whom has read the one before, while in gs:// the last of two writers at the same moment wins. A killed publisher
leaves files without a manifest: nobody sees them, and the first who publishes or prunes a day later removes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from export import manifest as manifests
from export.manifest import NAME_PATTERN
from export.store import atomic, drafts, model_state
from export.store.storage import FULL, VERSION, FolderStorage, Storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from export.manifest import Manifest
    from export.store.drafts import Draft
    from export.store.model_state import ModelState
    from export.store.storage import Step

__all__ = ["OFFLINE", "ObjectStorage", "OfflineStorage", "cache_of", "storage"]

# Which package speaks to a store, and which extra of ours brings it.
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "memory": ("fsspec", "s3")}

# Objects whose existence says that a number was given out.
_NUMBERS = ".numbers"

# No upload of a version takes a day: files without a manifest that are older are a killed publisher's.
_ABANDONED = timedelta(days=1)

# What a store answers when an object that is to be created is there, or is being created by another.
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "conditionNotMet", "pre-condition")

# Writers on other machines that may be in the way of one write of model.json, each of a moment.
_TRIES = 20

_CHUNK_BYTES = 1 << 20

# Set, to anything but 0, where there is no network: what was fetched before is read, and nothing else.
OFFLINE = "TENET_OFFLINE"


def storage(url: str) -> Storage:
    """Return the storage of `s3://bucket/prefix`, `gs://bucket/prefix` or `memory://name`.

    Raises:
        ValueError: it is an address of another kind.
        RuntimeError: the package that speaks to such a store is not installed.
    """
    address = re.fullmatch(r"(s3|gs|memory)://([^/].*?)/*", url)
    if address is None:
        raise ValueError(
            f"repository: expected a folder, s3://bucket/prefix, gs://bucket/prefix or memory://name, got {url!r}"
        )
    url = f"{address[1]}://{address[2]}"
    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        return OfflineStorage(url, cache_of(url))
    return ObjectStorage(url, _filesystem(url, address[1]), cache_of(url))


def cache_of(url: str) -> Path:
    """Return the folder on this machine where files of a repository are kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification has it
        base = Path.home() / ".cache"
    return base / "tenet" / "models" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _filesystem(url: str, protocol: str) -> Any:
    package, extra = _PACKAGES[protocol]
    try:
        # Another machine's publisher must be seen at once.
        return importlib.import_module("fsspec").filesystem(protocol, use_listings_cache=False)
    except ImportError:
        raise RuntimeError(
            f"{url}: this needs {package}, which is not installed; pip install 'tenet[{extra}]'"
        ) from None


class ObjectStorage(Storage):
    """Objects below an address, and a cache of versions on this machine."""

    def __init__(self, url: str, filesystem: Any, cache: Path) -> None:
        self.location = url
        self._fs = filesystem
        self._root = filesystem._strip_protocol(url)
        # Drafts and fetched versions lie here as in a repository, which a machine without network can read.
        self._cache = FolderStorage(cache)

    @override
    def models(self) -> list[str]:
        try:
            with self._asking():
                found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.location}: expected a model repository here, found none; check the address, or make one with "
                "`tenet export`"
            ) from None
        names = (PurePosixPath(entry["name"]).name for entry in found if entry["type"] == "directory")
        return sorted(name for name in names if NAME_PATTERN.fullmatch(name))

    @override
    def versions(self, model: str) -> list[int]:
        names = (path.partition("/") for path in self._below(model))
        return sorted(int(v) for v, _, rest in names if rest == manifests.FILE_NAME and VERSION.fullmatch(v))

    @override
    def read(self, path: str) -> bytes:
        with self._asking(path):
            return bytes(self._fs.cat_file(self._path(path)))

    @override
    def sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._asking(path), self._fs.open(self._path(path), "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    @override
    def files(self, model: str, version: int) -> list[str]:
        return self._below(f"{model}/{version}")

    @override
    def made(self, manifest: Manifest) -> datetime:
        return self._modified(f"{manifest.model}/{manifest.version}/{manifest.file}")

    @override
    def folder(self, manifest: Manifest) -> Path:
        model = self._cache.root / manifest.model
        place = model / str(manifest.version)
        place.mkdir(parents=True, exist_ok=True)
        with (model / ".fetch.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name, sha256 in {manifest.file: manifest.sha256, **manifest.files}.items():
                self._fetch(manifest, _checked_path(name, manifest), sha256)
            atomic.write(place / manifests.FILE_NAME, manifest.as_json())
            # For a machine without network: the aliases as they are now.
            atomic.write(model / model_state.FILE_NAME, self.state(manifest.model).as_json())
        return place

    @override
    def lock(self) -> AbstractContextManager[None]:
        return self._cache.lock()

    @override
    def write(self, model: str, steps: Sequence[Step]) -> None:
        for path, content in steps:
            with self._asking():
                if content is None:
                    self._fs.rm_file(self._path(path))
                else:
                    self._fs.pipe_file(self._path(path), content)

    @override
    def update(self, model: str, change: Callable[[ModelState], ModelState]) -> None:
        path = f"{model}/{model_state.FILE_NAME}"
        for _ in range(_TRIES):
            tag = self._tag(path)  # first: what is written between it and the contents is noticed
            before = self.state(model)
            after = change(before)
            if after == before or self._exchange(path, after.as_json(), tag):
                return
        raise OSError(f"{self.location}/{path}: changed by others all the time; do it again")

    @override
    def begin(self, model: str) -> Draft:
        given = [path.partition("/")[2 if path.startswith(_NUMBERS) else 0] for path in self._below(model)]
        version = max([self.state(model).last_version, *(int(n) for n in given if VERSION.fullmatch(n))]) + 1
        while not self._create(f"{model}/{_NUMBERS}/{version}", b""):
            version += 1
        folder = self._cache.root / model
        folder.mkdir(parents=True, exist_ok=True)
        return drafts.begin(folder, model=model, version=version)

    @override
    def stage(self, draft: Draft) -> None:
        draft.folder.chmod(0o755)
        for path in sorted(draft.folder.rglob("*")):
            name = path.relative_to(draft.folder).as_posix()
            if path.is_file() and name != manifests.FILE_NAME:
                target = f"{draft.model}/{draft.version}/{name}"
                with self._asking():
                    self._fs.put_file(str(path), self._path(target))

    @override
    def publish(self, draft: Draft, steps: Sequence[Step]) -> None:
        target = f"{draft.model}/{draft.version}/{manifests.FILE_NAME}"
        if not self._create(target, draft.manifest.as_json()):
            raise FileExistsError(f"{self.location}/{target}: appeared while it was being written; publish again")
        self.write(draft.model, steps)
        place = self._cache.root / draft.model / str(draft.version)
        if not place.exists():  # it need not be fetched, then
            draft.folder.rename(place)

    @override
    def end(self, draft: Draft) -> None:
        draft.close()
        # What fails here is removed a day later.
        with suppress(OSError):
            if draft.version not in self.versions(draft.model):
                self._delete(f"{draft.model}/{draft.version}")

    @override
    def remove(self, model: str, version: int) -> None:
        # First, and alone: with it readers lose sight of the version.
        self.write(model, [(f"{model}/{version}/{manifests.FILE_NAME}", None)])
        self._delete(f"{model}/{version}")
        shutil.rmtree(self._cache.root / model / str(version), ignore_errors=True)

    @override
    def sweep(self, model: str) -> list[str]:
        drafts.sweep(self._cache.root / model)
        published, now = set(self.versions(model)), datetime.now(UTC)
        swept = []
        for version in sorted({path.partition("/")[0] for path in self._below(model)}):
            if not VERSION.fullmatch(version) or int(version) in published:
                continue
            names = self._below(f"{model}/{version}")
            if all(now - self._modified(f"{model}/{version}/{name}") > _ABANDONED for name in names):
                self._delete(f"{model}/{version}")
                swept.append(version)
        return swept

    @override
    def forget(self, model: str) -> None:
        """Leave what there is: a number that was given out is not given again."""

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _below(self, prefix: str) -> list[str]:
        """Return the paths of all objects below a prefix, relative to it."""
        root = self._path(prefix)
        try:
            with self._asking():
                found = self._fs.find(root)
        except FileNotFoundError:
            return []
        return sorted(name[len(root) + 1 :] for name in found)

    def _modified(self, path: str) -> datetime:
        with self._asking(path):
            moment: datetime = self._fs.modified(self._path(path))
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    def _tag(self, path: str) -> str | None:
        """Return what changes with an object, as far as its store tells: "" if it does not, None without the object."""
        try:
            with self._asking(path):
                return str(self._fs.info(self._path(path)).get("ETag", ""))
        except FileNotFoundError:
            return None

    def _exchange(self, path: str, content: bytes, tag: str | None) -> bool:
        """Write an object if it is still the one with this tag; return whether it was."""
        if tag is None:
            return self._create(path, content)
        return self._pipe(path, content, **({"IfMatch": tag} if tag else {}))

    def _create(self, path: str, content: bytes) -> bool:
        """Write an object that is not there; return whether it was not, which the store alone can tell."""
        return self._pipe(path, content, mode="create")

    def _pipe(self, path: str, content: bytes, **conditions: str) -> bool:
        """Write an object on conditions; return whether they held."""
        with self._asking():
            try:
                self._fs.pipe_file(self._path(path), content, **conditions)
            except Exception as error:
                if not isinstance(error, FileExistsError) and not any(word in repr(error) for word in _TAKEN):
                    raise
                return False
        return True

    def _delete(self, prefix: str) -> None:
        for name in self._below(prefix):
            with suppress(FileNotFoundError), self._asking():
                self._fs.rm_file(self._path(f"{prefix}/{name}"))

    def _fetch(self, manifest: Manifest, name: str, sha256: str) -> None:
        """Bring a file to the cache, unless it is there as it should be."""
        place = self._cache.root / manifest.model / str(manifest.version) / name
        if place.is_file() and manifests.sha256_of(place) == sha256:
            return
        path = f"{manifest.model}/{manifest.version}/{name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=atomic.PREFIX, dir=self._cache.root / manifest.model)
        os.close(handle)
        fetched = Path(temporary)
        try:
            with self._asking(path):
                self._fs.get_file(self._path(path), temporary)
            if (actual := manifests.sha256_of(fetched)) != sha256:
                raise ValueError(
                    f"{self.location}/{path}: expected sha256 {sha256[:12]}… as in its manifest, got {actual[:12]}…; "
                    "the file was changed or damaged in the store: export the model again"
                )
            atomic.flush(fetched)
            fetched.replace(place)
        finally:
            fetched.unlink(missing_ok=True)

    @contextmanager
    def _asking(self, path: str = "") -> Iterator[None]:
        """Say in one line what a store, or the way to it, refuses; whatever its package raises."""
        where = f"{self.location}/{path}" if path else self.location
        try:
            yield
        except FileNotFoundError as error:
            what = "expected a file of the repository here, found none" if path else _one_line(error)
            raise FileNotFoundError(f"{where}: {what}; check the address, or export the model again") from error
        except OSError as error:
            if error.errno in FULL:
                raise
            raise OSError(_refusal(where, error)) from error
        except Exception as error:
            raise OSError(_refusal(where, error)) from error


class OfflineStorage(FolderStorage):
    """The cache of a repository in an object store, for reading alone: versions that this machine has used before."""

    def __init__(self, url: str, cache: Path) -> None:
        super().__init__(cache)
        self.location = url

    @override
    def models(self) -> list[str]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.location}: nothing of it was fetched to this machine before; unset {OFFLINE} to fetch it"
            )
        return super().models()

    @override
    def lock(self) -> AbstractContextManager[None]:
        raise PermissionError(f"{self.location}: cannot be changed without network; unset {OFFLINE}")


def _refusal(where: str, error: Exception) -> str:
    said = _one_line(error)
    return f"{where}: the store refused, or cannot be reached: {said}; check the address, credentials and network"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _checked_path(name: str, manifest: Manifest) -> str:
    """Return a file's path if it stays below the version's folder, whatever the manifest in a store says."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
        raise ValueError(
            f"{manifest.model}@{manifest.version}: its manifest names a file outside of its folder, {name!r}; "
            "do not use it: export the model again"
        )
    return name
