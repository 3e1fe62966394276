"""What a place for repositories must be able to do: a folder (`folder`), or an object store (`remote`).

draft --begin, stage, publish--> <model>/<version>/ --write--> config.pbtxt, model.json beside it --remove--> gone
"""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from export import manifest as manifests
from export.store import model_state
from export.store.model_state import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime
    from pathlib import Path

    from export.manifest import Manifest
    from export.store.drafts import Draft

# A file to be written by its path below the repository, None for one to be removed.
Step = tuple[str, bytes | None]

# A version's folder; no leading zeros, so that each number has one name. Triton ignores others as well.
VERSION = re.compile(r"[1-9][0-9]{0,17}")

# Errors of a disk, a quota or a file size that is full, and of a place that may not be written to.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Listed(NamedTuple):
    """What the names in a model's folder say: the numbers of versions, and whether one was given out here."""

    numbers: list[int]
    claimed: bool = False


class Storage(ABC):
    """Files by their paths below the repository, and the few steps that must be whole or not at all.

    What changes anything, from `write` on, is called while `lock` is held, but for `stage`, which takes long.
    """

    location: str

    def holds(self, model: str) -> bool:
        """Whether a folder is a model of this repository: it has our model.json, or a version with its own manifest.

        All that lists, writes or removes goes by this: whatever else lies in the repository is somebody else's.
        """
        return self._is_ours(model, self.listed(model))

    def versions(self, model: str) -> list[int]:
        """Return a model's version numbers, ascending; none if it is no model of this repository."""
        listed = self.listed(model)
        return listed.numbers if listed.numbers and self._is_ours(model, listed) else []

    def _is_ours(self, model: str, listed: Listed) -> bool:
        return listed.claimed or self._has_state(model) or any(self._has_own(model, n) for n in listed.numbers)

    def _has_state(self, model: str) -> bool:
        try:
            model_state.from_json(self.read(f"{model}/{model_state.FILE_NAME}"), source="")
        except (FileNotFoundError, PermissionError, ValueError):
            return False
        return True

    def _has_own(self, model: str, number: int) -> bool:
        try:
            self.manifest(model, number)
        except (FileNotFoundError, PermissionError, ValueError):
            return False
        return True

    def manifest(self, model: str, number: int, contents: bytes | None = None) -> Manifest:
        """Return a version's manifest, which is that of this very version, from its contents or after reading them.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read, or is another version's: somebody has copied a folder.
        """
        path = f"{model}/{number}/{manifests.FILE_NAME}"
        source = f"{self.location}/{path}"
        manifest = manifests.from_json(self.read(path) if contents is None else contents, source=source)
        if (manifest.model, manifest.version) != (model, number):
            raise ValueError(
                f"{self.location}/{model}/{number}: its manifest is that of {manifest.model}@{manifest.version}; a "
                "copied folder is no version: export the model again"
            )
        return manifest

    def state(self, model: str) -> ModelState:
        """Return what model.json holds.

        Raises:
            ValueError: it is not what was written.
        """
        path = f"{model}/{model_state.FILE_NAME}"
        try:
            contents = self.read(path)
        except FileNotFoundError:
            return ModelState()
        return model_state.from_json(contents, source=f"{self.location}/{path}")

    @abstractmethod
    def models(self) -> list[str]:
        """Return the names of what may be models.

        Raises:
            FileNotFoundError: there is no repository.
        """

    @abstractmethod
    def listed(self, model: str) -> Listed:
        """Return what the names in a model's folder say; nothing, where there is no such folder."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return a file's bytes; raises FileNotFoundError."""

    @abstractmethod
    def read_all(self, paths: Iterable[str]) -> dict[str, bytes | OSError]:
        """Return the bytes of files, or why one cannot be read; raises OSError where none can be."""

    @abstractmethod
    def sha256(self, path: str) -> str:
        """Return the sha256 of a file's bytes as they lie there; raises FileNotFoundError."""

    @abstractmethod
    def files(self, model: str, version: int) -> list[str]:
        """Return the paths of all files of a version, below its folder."""

    @abstractmethod
    def made(self, model: str, engines: Mapping[int, str]) -> dict[int, datetime]:
        """Return when the engine files of versions were written, without those that are missing."""

    @abstractmethod
    def folder(self, manifest: Manifest) -> Path:
        """Return the folder of a version on this machine, whose files may be opened; that may take long."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Keep other writers out, as far as that can be; readers are never kept out."""

    @abstractmethod
    def probe(self, model: str) -> None:
        """Raise OSError if nothing can be written to a model, as far as that shows before something is."""

    @abstractmethod
    def write(self, model: str, steps: Sequence[Step], *, over: Mapping[str, bytes] | None = None) -> None:
        """Write files, each whole or not at all, in their order, once there is room for all.

        Args:
            model: below whose folder.
            steps: what to write.
            over: what files of theirs must still hold, where others may write at the same time.

        Raises:
            FileNotFoundError: such a file is gone.
        """

    @abstractmethod
    def update(self, model: str, change: Callable[[ModelState], ModelState]) -> None:
        """Replace the model's state."""

    @abstractmethod
    def begin(self, model: str) -> Draft:
        """Give out the next version number, never to be given again, and a draft.

        Raises:
            FileExistsError: something that is no model of this repository is in its place.
        """

    @abstractmethod
    def stage(self, draft: Draft) -> None:
        """Do what takes long in publishing a draft, without the lock."""

    @abstractmethod
    def publish(self, draft: Draft, steps: Sequence[Step]) -> None:
        """Show a staged draft to readers, then write files beside the version."""

    @abstractmethod
    def end(self, draft: Draft) -> None:
        """Remove what a draft that was not published has left."""

    @abstractmethod
    def remove(self, model: str, version: int) -> None:
        """Hide a version from readers, then remove its files."""

    @abstractmethod
    def sweep(self, model: str) -> list[str]:
        """Remove what killed processes have left of a model of ours, return its names."""

    @abstractmethod
    def forget(self, model: str) -> None:
        """Remove what is left of a model of ours that never had a version, whose numbers may be given again."""


def foreign(place: str) -> FileExistsError:
    """Return the complaint about something in a model's place that is no model of this repository."""
    return FileExistsError(
        f"{place}: is there already, and is no model of this repository; choose another name, or move it away"
    )
