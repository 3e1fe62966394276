"""Versions of an object store that this machine has fetched, laid out as in a repository.

store --files, each checked by sha256--> <cache>/<model>/<version>/, manifest.json last --> engines, also offline
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from export import manifest as manifests
from export.store import atomic, model_state
from export.store.folder import FolderStorage
from export.store.storage import FORBIDDEN, FULL, VERSION, Listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from export.manifest import Manifest

# Set, to anything but 0, where there is no network: what was fetched before is read, and nothing else.
OFFLINE = "TENET_OFFLINE"

_LOCK = ".fetch.lock"


def cache_of(url: str) -> Path:
    """Return the folder on this machine where files of a repository are kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification has it
        base = Path.home() / ".cache"
    return base / "tenet" / "models" / hashlib.sha256(url.encode()).hexdigest()[:16]


class Cache:
    """The fetched versions of one repository; any number of processes fetch at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fetched(self, manifest: Manifest, *, get: Callable[[str, str, Path], None]) -> Path:
        """Return the folder of a version with all of its files, those that were missing or damaged fetched again.

        Args:
            manifest: of the version.
            get: writes the file of a path below the version's folder, and of this sha256, to a place.

        Raises:
            OSError: the cache cannot be written to, or is full.
            ValueError: a file is not the one that was published.
        """
        place = self.root / manifest.model / str(manifest.version)
        if _complete(place, manifest):  # without a write: the cache may be somebody else's, shared for reading
            return place
        with self._writing(manifest.model) as model:
            for name, sha256 in {manifest.file: manifest.sha256, **manifest.files}.items():
                if not _is(place / name, sha256):
                    with _arriving(model, place / name) as temporary:
                        get(name, sha256, temporary)
            _write(place / manifests.FILE_NAME, manifest.as_json())
        return place

    def keep_state(self, model: str, content: bytes) -> None:
        """Keep the aliases as they are now, for a machine without network, if they can be kept."""
        with suppress(OSError), self._writing(model) as folder:
            _write(folder / model_state.FILE_NAME, content)

    def versions(self, model: str) -> list[int]:
        """Return the numbers of the versions of which something was fetched."""
        return sorted(int(path.name) for path in (self.root / model).glob("*") if VERSION.fullmatch(path.name))

    def drop(self, model: str, versions: Iterable[int]) -> None:
        """Remove versions that the repository has no more, as far as that can be done."""
        for version in versions:
            shutil.rmtree(self.root / model / str(version), ignore_errors=True)

    @contextmanager
    def _writing(self, model: str) -> Iterator[Path]:
        """Keep other processes out of a model's folder, clear what killed ones left, say why nothing can be written."""
        folder = self.root / model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for path in folder.rglob(f"{atomic.PREFIX}*"):  # all are written under this lock
                    path.unlink(missing_ok=True)
                yield folder
        except OSError as error:
            if error.errno not in (*FULL, *FORBIDDEN):
                raise
            raise OSError(
                f"{self.root}: expected a cache that can be written to, got: {error.strerror}; make room there, mend "
                "its permissions, or set XDG_CACHE_HOME to another folder",
            ) from error


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
    def listed(self, model: str) -> Listed:
        numbers = super().listed(model).numbers
        # The manifest is written last: a version without it was not fetched to its end.
        return Listed([n for n in numbers if (self.root / model / str(n) / manifests.FILE_NAME).is_file()])

    @override
    def lock(self) -> AbstractContextManager[None]:
        raise PermissionError(f"{self.location}: cannot be changed without network; unset {OFFLINE}")


def _complete(place: Path, manifest: Manifest) -> bool:
    files = {manifest.file: manifest.sha256, **manifest.files}
    return _holds(place / manifests.FILE_NAME, manifest.as_json()) and all(_is(place / n, s) for n, s in files.items())


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and manifests.sha256_of(path) == sha256


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _write(path: Path, content: bytes) -> None:
    if not _holds(path, content):
        atomic.write(path, content)


@contextmanager
def _arriving(folder: Path, place: Path) -> Iterator[Path]:
    """Yield where a file is written that then is moved to its place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary, handle = atomic.new_file(folder)
    os.close(handle)
    try:
        yield temporary
        atomic.flush(temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
