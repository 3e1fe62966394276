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

import hashlib
import importlib
import os
import re
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from export import manifest as manifests
from export.manifest import NAME_PATTERN
from export.store import drafts, model_state
from export.store.cache import OFFLINE, Cache, OfflineStorage, cache_of
from export.store.folder import FolderStorage
from export.store.storage import FULL, VERSION, Listed, Storage, foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from export.manifest import Manifest
    from export.store.drafts import Draft
    from export.store.model_state import ModelState
    from export.store.storage import Step

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

# What stores call an object's time, and the tag that changes with its contents.
_MODIFIED = ("LastModified", "updated", "created")
_TAGS = ("ETag", "etag")

_CHUNK_BYTES = 1 << 20


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
        self._cache = Cache(cache)
        # What is read at once is small: s3fs need not ask for its size first, to read it in several parts.
        self._small = {"max_concurrency": 1} if url.startswith("s3:") else {}
        # What was read of an object, by its path, with the tag that it had: looking again costs no second request.
        self._known: dict[str, tuple[str, bytes]] = {}
        self._tags: dict[str, str] = {}

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
    def listed(self, model: str) -> Listed:
        return _listed(self._below(model))

    @override
    def read(self, path: str) -> bytes:
        with self._asking(path):
            return bytes(self._fs.cat_file(self._path(path), **self._small))

    @override
    def read_all(self, paths: Iterable[str]) -> dict[str, bytes | OSError]:
        # Manifests alone are kept: what else there is, is small, and changes to and fro.
        tags = {path: self._tags.get(path, "") if path.endswith(manifests.FILE_NAME) else "" for path in paths}
        found: dict[str, bytes | OSError] = {p: c for p, (tag, c) in self._known.items() if tag and tags.get(p) == tag}
        wanted = {self._path(path): path for path in tags if path not in found}
        with self._asking():
            answers = self._fs.cat(list(wanted), on_error="return", **self._small) if wanted else {}
        for place, path in wanted.items():
            with self._asking(path):
                content = answers[place]
                if isinstance(content, FileNotFoundError):
                    found[path] = content
                    continue
                if isinstance(content, Exception):  # whether it is there is not known, so nothing is
                    raise content
            found[path] = bytes(content)
            self._known[path] = tags[path], bytes(content)
        return found

    @override
    def sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._asking(path), self._fs.open(self._path(path), "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    @override
    def files(self, model: str, version: int) -> list[str]:
        return list(self._below(f"{model}/{version}"))

    @override
    def made(self, model: str, engines: Mapping[int, str]) -> dict[int, datetime]:
        found = self._below(model)
        wanted = {number: f"{number}/{engine}" for number, engine in engines.items()}
        return {number: _modified(found[path]) for number, path in wanted.items() if path in found}

    @override
    def folder(self, manifest: Manifest) -> Path:
        def get(name: str, sha256: str, target: Path) -> None:
            path = f"{manifest.model}/{manifest.version}/{name}"
            with self._asking(path):
                self._fs.get_file(self._path(path), str(target))
            if (actual := manifests.sha256_of(target)) != sha256:
                raise ValueError(
                    f"{self.location}/{path}: expected sha256 {sha256[:12]}… as in its manifest, got {actual[:12]}…; "
                    "the file was changed or damaged in the store: export the model again"
                )

        place = self._cache.fetched(manifest, get=get)
        with suppress(OSError, ValueError):  # for a machine without network: the aliases as they are now
            self._cache.keep_state(manifest.model, self.state(manifest.model).as_json())
        return place

    @override
    def lock(self) -> AbstractContextManager[None]:
        # The processes of this machine queue, so that its own are never in each other's way.
        return FolderStorage(self._cache.root).lock()

    @override
    def probe(self, model: str) -> None:
        """Do nothing: what its credentials allow, a store says when they are used."""

    @override
    def write(self, model: str, steps: Sequence[Step], *, over: Mapping[str, bytes] | None = None) -> None:
        for path, content in steps:
            if content is None:
                with self._asking():
                    self._fs.rm_file(self._path(path))
            elif over is not None and path in over:
                self._replace(path, content, before=over[path])
            else:
                self._pipe(path, content)

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
        found = self._below(model)
        listed = _listed(found)
        if found and not self._is_ours(model, listed):
            raise foreign(f"{self.location}/{model}")
        self._sweep(model, found)
        given = [path.removeprefix(f"{_NUMBERS}/").partition("/")[0] for path in found]
        version = max([self.state(model).last_version, *(int(n) for n in given if VERSION.fullmatch(n))]) + 1
        while not self._create(f"{model}/{_NUMBERS}/{version}", b""):
            version += 1
        folder = self._cache.root / model
        folder.mkdir(parents=True, exist_ok=True)
        return drafts.begin(folder, model=model, version=version)

    @override
    def stage(self, draft: Draft) -> None:
        for path in sorted(draft.folder.rglob("*")):
            name = path.relative_to(draft.folder).as_posix()
            if path.is_file() and name != manifests.FILE_NAME:
                target = f"{draft.model}/{draft.version}/{name}"
                with self._asking():
                    self._fs.put_file(str(path), self._path(target))

    @override
    def publish(self, draft: Draft, steps: Sequence[Step]) -> None:
        target, content = f"{draft.model}/{draft.version}/{manifests.FILE_NAME}", draft.manifest.as_json()
        # One that is there already may be ours: the store's answer to an earlier try was lost on its way.
        if not self._create(target, content) and self.read(target) != content:
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
            if draft.version not in self.listed(draft.model).numbers:
                self._delete(f"{draft.model}/{draft.version}")

    @override
    def remove(self, model: str, version: int) -> None:
        # First, and alone: with it readers lose sight of the version.
        self.write(model, [(f"{model}/{version}/{manifests.FILE_NAME}", None)])
        self._delete(f"{model}/{version}")
        self._cache.drop(model, [version])

    @override
    def sweep(self, model: str) -> list[str]:
        found = self._below(model)
        self._cache.drop(model, sorted({*self._cache.versions(model)} - {*_listed(found).numbers}))
        return self._sweep(model, found)

    @override
    def forget(self, model: str) -> None:
        """Leave what there is: a number that was given out is not given again."""

    def _sweep(self, model: str, found: dict[str, Any]) -> list[str]:
        """Remove what was never published under the numbers that were given out here, once it is a day old."""
        drafts.sweep(self._cache.root / model)
        now, swept = datetime.now(UTC), []
        given = {path.removeprefix(f"{_NUMBERS}/") for path in found if path.startswith(f"{_NUMBERS}/")}
        for version in sorted(given - {str(number) for number in _listed(found).numbers}):
            left = [entry for path, entry in found.items() if path.startswith(f"{version}/")]
            if left and all(now - _modified(entry) > _ABANDONED for entry in left):
                self._delete(f"{model}/{version}")
                swept.append(version)
        return swept

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _below(self, prefix: str) -> dict[str, Any]:
        """Return what the store says of all objects below a prefix, by their paths relative to it."""
        root = self._path(prefix)
        try:
            with self._asking():
                found = self._fs.find(root, detail=True)
        except FileNotFoundError:
            return {}
        # Where there was nothing, s3fs asks for the folder itself, which may be there by then.
        below = {name[len(root) + 1 :]: found[name] for name in sorted(found) if name.startswith(f"{root}/")}
        others = {path: tag for path, tag in self._tags.items() if not path.startswith(f"{prefix}/")}
        self._tags = {**others, **{f"{prefix}/{path}": _tag_of(entry) for path, entry in below.items()}}
        return below

    def _tag(self, path: str) -> str | None:
        """Return what changes with an object, as far as its store tells: "" if it does not, None without the object."""
        try:
            with self._asking(path):
                return str(self._fs.info(self._path(path)).get("ETag", ""))
        except FileNotFoundError:
            return None

    def _replace(self, path: str, content: bytes, *, before: bytes) -> None:
        """Write over an object that still holds what was there before."""
        tag = self._tag(path)
        held = tag is not None and self.read(path) == before and self._exchange(path, content, tag)
        if not held and self._tag(path) is None:
            raise FileNotFoundError(f"{self.location}/{path}: has been removed meanwhile; nothing was written")
        if not held:
            raise OSError(f"{self.location}/{path}: was changed by another at the same time; do it again")

    def _exchange(self, path: str, content: bytes, tag: str | None) -> bool:
        """Write an object if it is still the one with this tag; return whether it was."""
        if tag is None:
            return self._create(path, content)
        try:
            return self._pipe(path, content, **({"IfMatch": tag} if tag else {}))
        except FileNotFoundError:
            return False

    def _create(self, path: str, content: bytes) -> bool:
        """Write an object that is not there; return whether it was not, which the store alone can tell."""
        return self._pipe(path, content, mode="create")

    def _pipe(self, path: str, content: bytes, **conditions: str) -> bool:
        """Write an object on conditions; return whether they held."""
        self._known.pop(path, None)
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


def _listed(found: Mapping[str, Any]) -> Listed:
    """Return what the paths below a model say: a version is there once its manifest is."""
    names = (path.partition("/") for path in found)
    numbers = sorted(int(v) for v, _, rest in names if rest == manifests.FILE_NAME and VERSION.fullmatch(v))
    return Listed(numbers, claimed=any(path.startswith(f"{_NUMBERS}/") for path in found))


def _modified(entry: dict[str, Any]) -> datetime:
    """Return when an object was written; one whose store does not say is as good as new."""
    moment: Any = next((entry[key] for key in _MODIFIED if entry.get(key)), None)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if isinstance(moment, float):
        moment = datetime.fromtimestamp(moment, tz=UTC)
    if not isinstance(moment, datetime):
        return datetime.now(UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _tag_of(entry: dict[str, Any]) -> str:
    return str(next((entry[key] for key in _TAGS if entry.get(key)), ""))


def _refusal(where: str, error: Exception) -> str:
    said = _one_line(error)
    return f"{where}: the store refused, or cannot be reached: {said}; check the address, credentials and network"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
