"""Versions that are being written: a hidden folder each, and beside it a file that its publisher keeps locked.

begin --> .draft-<version>-<token>/ + .lock, locked --files written--> described --> published, or swept

The lock goes with its process, however that ends: a folder whose lock is free is what a killed publisher left.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from export import manifest as manifests

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import Manifest

_PREFIX = ".draft-"
_LOCK = ".lock"


class Draft:
    """A version that is being written: fill `folder`, then say what it is by `describe`."""

    def __init__(self, folder: Path, *, model: str, version: int, lock: IO[str]) -> None:
        self.folder = folder
        self.model = model
        self.version = version
        self._lock = lock
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The description given; asserts that there is one."""
        assert self._manifest is not None, "a draft must be described before its block ends"
        return self._manifest

    def describe(self, manifest: Manifest) -> None:
        """Write the manifest, with the sha256 of all files that lie beside it; it carries this draft's model, version.

        May be called again, once more is known.
        """
        assert (manifest.model, manifest.version) == (self.model, self.version)
        files = manifests.files_below(self.folder, engine=manifest.file)
        self._manifest = manifest.model_copy(update={"files": files})
        (self.folder / manifests.FILE_NAME).write_bytes(self._manifest.as_json())

    def close(self) -> None:
        """Remove what is left of it in its hidden place, and unlock it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # the lock alone is nothing, and goes with the next sweep
            _lock_of(self.folder).unlink(missing_ok=True)
        self._lock.close()


def begin(folder: Path, *, model: str, version: int) -> Draft:
    """Make a draft in a model's folder; whoever sweeps there must be kept out meanwhile."""
    place = folder / f"{_PREFIX}{version}-{secrets.token_hex(4)}"
    lock = _lock_of(place).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        place.mkdir()
    except OSError:
        lock.close()
        raise
    return Draft(place, model=model, version=version, lock=lock)


def any_in(folder: Path) -> bool:
    """Whether somebody writes a version in this model's folder, or a killed process left one."""
    return any(folder.glob(f"{_PREFIX}*"))


def sweep(folder: Path) -> list[str]:
    """Remove the drafts of publishers that are no more from a model's folder; return their names."""
    living = {path.name for path in folder.glob(f"{_PREFIX}*{_LOCK}") if _held(path)}
    swept = []
    for path in sorted(folder.glob(f"{_PREFIX}*"), key=lambda path: path.name.endswith(_LOCK)):  # locks last
        if path.name in living or _lock_of(path).name in living:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            swept.append(path.name)
        else:
            path.unlink(missing_ok=True)
    return swept


def _lock_of(place: Path) -> Path:
    return place.with_name(place.name + _LOCK)


def _held(lock: Path) -> bool:
    """Whether a lock is held; the one that is asked for is never made."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
