"""Where the files of a repository lie: a folder here; `export.store.remote` has the one for object stores.

draft (hidden folder) --files written, fsynced--> rename --> <version>/ --config.pbtxt--> seen by Triton too
<version>/ --rename--> hidden folder --> removed                    readers never see half a version
"""

from __future__ import annotations

import errno
import fcntl
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import override

from export import manifest as manifests
from export.manifest import NAME_PATTERN
from export.store import atomic, drafts, model_state
from export.store.model_state import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from export.manifest import Manifest
    from export.store.drafts import Draft

# A file to be written by its path below the repository, None for one to be removed.
Step = tuple[str, bytes | None]

# A version's folder; no leading zeros, so that each number has one name. Triton ignores others as well.
VERSION = re.compile(r"[1-9][0-9]{0,17}")

# Errors of a disk, a quota or a file size that is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_REMOVED = ".removed-"


class Storage(ABC):
    """Files by their paths below the repository, and the few steps that must be whole or not at all.

    What is said to need the lock is called while `lock` is held.
    """

    location: str

    @abstractmethod
    def models(self) -> list[str]:
        """Return the names of what may be models.

        Raises:
            FileNotFoundError: there is no repository.
        """

    @abstractmethod
    def versions(self, model: str) -> list[int]:
        """Return a model's version numbers, ascending."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return a file's bytes; raises FileNotFoundError."""

    @abstractmethod
    def sha256(self, path: str) -> str:
        """Return the sha256 of a file's bytes as they lie there; raises FileNotFoundError."""

    @abstractmethod
    def files(self, model: str, version: int) -> list[str]:
        """Return the paths of all files of a version, below its folder."""

    @abstractmethod
    def made(self, manifest: Manifest) -> datetime:
        """Return when a version's engine file was written."""

    @abstractmethod
    def folder(self, manifest: Manifest) -> Path:
        """Return the folder of a version on this machine, whose files may be opened."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Keep other writers out, as far as that can be; readers are never kept out."""

    @abstractmethod
    def write(self, model: str, steps: Sequence[Step]) -> None:
        """Write files, each whole or not at all, in their order, once there is room for all; needs the lock."""

    @abstractmethod
    def update(self, model: str, change: Callable[[ModelState], ModelState]) -> None:
        """Replace the model's state; needs the lock."""

    @abstractmethod
    def begin(self, model: str) -> Draft:
        """Give out the next version number, never to be given again, and a draft; needs the lock."""

    @abstractmethod
    def stage(self, draft: Draft) -> None:
        """Do what takes long in publishing a draft, without the lock."""

    @abstractmethod
    def publish(self, draft: Draft, steps: Sequence[Step]) -> None:
        """Show a staged draft to readers, then write files beside the version; needs the lock."""

    @abstractmethod
    def end(self, draft: Draft) -> None:
        """Remove what a draft that was not published has left; needs the lock."""

    @abstractmethod
    def remove(self, model: str, version: int) -> None:
        """Hide a version from readers, then remove its files; needs the lock."""

    @abstractmethod
    def sweep(self, model: str) -> list[str]:
        """Remove what killed processes have left of a model, return its names; needs the lock."""

    @abstractmethod
    def forget(self, model: str) -> None:
        """Remove what is left of a model that never had a version, whose numbers may be given again; needs the lock."""

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


class FolderStorage(Storage):
    """A folder on this machine; any number of readers and writers at once, in threads and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    @override
    def models(self) -> list[str]:
        if not self.root.is_dir():
            found = "a file" if self.root.exists() else "no folder"
            raise FileNotFoundError(
                f"{self.root}: expected a model repository here, found {found}; make one with `tenet export`"
            )
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(name for name in names if NAME_PATTERN.fullmatch(name))

    @override
    def versions(self, model: str) -> list[int]:
        folder = self.root / model
        if not folder.is_dir():
            return []
        return sorted(int(path.name) for path in folder.iterdir() if VERSION.fullmatch(path.name) and path.is_dir())

    @override
    def read(self, path: str) -> bytes:
        return self._file(path).read_bytes()

    @override
    def sha256(self, path: str) -> str:
        return manifests.sha256_of(self._file(path))

    @override
    def files(self, model: str, version: int) -> list[str]:
        folder = self.root / model / str(version)
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())

    @override
    def made(self, manifest: Manifest) -> datetime:
        path = self.folder(manifest) / manifest.file
        return datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)

    @override
    def folder(self, manifest: Manifest) -> Path:
        return self.root / manifest.model / str(manifest.version)

    @override
    def lock(self) -> AbstractContextManager[None]:
        return self._locked()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            with self._writing():
                self.root.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.root / ".lock").open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @override
    def write(self, model: str, steps: Sequence[Step]) -> None:
        with self._staged(model, steps) as put:
            put()

    @override
    def update(self, model: str, change: Callable[[ModelState], ModelState]) -> None:
        before = self.state(model)
        if (after := change(before)) != before:
            self.write(model, [(f"{model}/{model_state.FILE_NAME}", after.as_json())])

    @override
    def begin(self, model: str) -> Draft:
        folder = self.root / model
        with self._writing():
            self._make(folder)
            version = max([self.state(model).last_version, *self.versions(model)]) + 1
            self.update(model, lambda state: state.model_copy(update={"last_version": version}))
            return drafts.begin(folder, model=model, version=version)

    @override
    def stage(self, draft: Draft) -> None:
        draft.folder.chmod(0o755)
        atomic.flush_tree(draft.folder)

    @override
    def publish(self, draft: Draft, steps: Sequence[Step]) -> None:
        folder = self.root / draft.model
        place = folder / str(draft.version)
        if place.exists():
            raise FileExistsError(f"{place}: appeared while it was being written; move it away and publish again")
        with self._staged(draft.model, steps) as put:
            self.update(draft.model, lambda state: state.model_copy(update={"published": True}))
            draft.folder.rename(place)
            atomic.flush(folder)
            put()

    @override
    def end(self, draft: Draft) -> None:
        draft.close()
        self.forget(draft.model)

    @override
    def remove(self, model: str, version: int) -> None:
        folder = self.root / model
        # The name of a hidden folder has to be new: one of a removal that was killed may still be there.
        hidden = folder / f"{_REMOVED}{version}-{secrets.token_hex(4)}"
        (folder / str(version)).rename(hidden)
        atomic.flush(folder)
        shutil.rmtree(hidden)

    @override
    def sweep(self, model: str) -> list[str]:
        folder = self.root / model
        swept = drafts.sweep(folder)
        for path in sorted(folder.glob(f"{_REMOVED}*")):
            shutil.rmtree(path, ignore_errors=True)
            swept.append(path.name)
        # Files in the model's folder are written under the lock alone: one that is there now is nobody's.
        for path in sorted(folder.glob(f"{atomic.PREFIX}*")):
            path.unlink(missing_ok=True)
            swept.append(path.name)
        return swept

    @override
    def forget(self, model: str) -> None:
        folder = self.root / model
        if not folder.is_dir() or self.versions(model) or drafts.any_in(folder) or self.state(model).published:
            return
        shutil.rmtree(folder)

    def _file(self, path: str) -> Path:
        file = self.root / path
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected a file of the repository here, found none; export it again")
        return file

    def _make(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder}: expected a model's folder, got a file; choose another name")
        if not folder.exists():
            folder.mkdir()
            atomic.flush(self.root)
        ours = (folder / model_state.FILE_NAME).exists() or self.versions(folder.name)
        if not ours and any(path.name[0] != "." for path in folder.iterdir()):
            raise FileExistsError(
                f"{folder}: is there already, and is no model of this repository; choose another name, or move it away"
            )

    @contextmanager
    def _staged(self, model: str, steps: Sequence[Step]) -> Iterator[Callable[[], None]]:
        """Write all contents beside their places; yield what puts them there, one after the other."""
        with ExitStack() as stack:
            puts: list[Callable[[], None]] = []
            for path, content in steps:
                place = self.root / path
                if content is None:
                    puts.append(partial(place.unlink, missing_ok=True))
                else:
                    puts.append(stack.enter_context(atomic.staged(place, content, folder=self.root / model)))

            def put_all() -> None:
                for put in puts:
                    put()

            yield put_all

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in the user's words why nothing can be written."""
        try:
            yield
        except (FileExistsError, NotADirectoryError) as error:
            if error.errno is None:
                raise
            raise NotADirectoryError(
                f"{self.root}: expected a folder for the repository, got a file on its path; choose another"
            ) from error
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise PermissionError(
                f"{self.root}: expected a repository that can be written to, got: {error.strerror}; choose another, or "
                "mend its permissions"
            ) from error
