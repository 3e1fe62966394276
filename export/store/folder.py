"""A repository in a folder of this machine.

draft (hidden folder) --files written, fsynced--> rename --> <version>/ --config.pbtxt--> seen by Triton too
<version>/ --rename--> hidden folder --> removed                    readers never see half a version
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import override

from export import manifest as manifests
from export import triton
from export.manifest import NAME_PATTERN
from export.store import atomic, drafts, model_state
from export.store.storage import FORBIDDEN, VERSION, Listed, Storage, foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from export.manifest import Manifest
    from export.store.drafts import Draft
    from export.store.model_state import ModelState
    from export.store.storage import Step

_REMOVED = ".removed-"

# All that lies beside the versions of a model, model.json last: what is left without it is nobody's.
_BESIDE = (triton.CONFIG, triton.LABELS, model_state.FILE_NAME)


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
    def listed(self, model: str) -> Listed:
        try:
            paths = list((self.root / model).iterdir())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return Listed([])
        return Listed(sorted(int(path.name) for path in paths if VERSION.fullmatch(path.name) and path.is_dir()))

    @override
    def read(self, path: str) -> bytes:
        with self._file(path).open("rb") as file:
            return file.read(manifests.LARGEST_RECORD + 1)  # one byte more tells what is too large

    @override
    def read_all(self, paths: Iterable[str]) -> dict[str, bytes | OSError]:
        found: dict[str, bytes | OSError] = {}
        for path in paths:
            try:
                found[path] = self.read(path)
            except OSError as error:
                found[path] = error
        return found

    @override
    def sha256(self, path: str) -> str:
        return manifests.sha256_of(self._file(path))

    @override
    def files(self, model: str, version: int) -> list[str]:
        folder = self.root / model / str(version)
        # A link to a folder is one more file, whatever lies behind it.
        found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(folder).as_posix() for path in found)

    @override
    def made(self, model: str, engines: Mapping[int, str]) -> dict[int, datetime]:
        found = {}
        for version, engine in engines.items():
            with suppress(OSError):
                moment = (self.root / model / str(version) / engine).stat().st_mtime
                found[version] = datetime.fromtimestamp(moment, tz=UTC)
        return found

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
    def probe(self, model: str) -> None:
        with self._writing():
            place, handle = atomic.new_file(self.root / model)
        os.close(handle)
        place.unlink()

    @override
    def write(self, model: str, steps: Sequence[Step], *, over: Mapping[str, bytes] | None = None) -> None:
        del over  # who holds the lock is alone
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
            self.sweep(model)
            version = max([self.state(model).last_version, *self.listed(model).numbers]) + 1
            self.update(model, lambda state: state.model_copy(update={"last_version": version}))
            return drafts.begin(folder, model=model, version=version)

    @override
    def stage(self, draft: Draft) -> None:
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
        _delete(hidden)

    @override
    def sweep(self, model: str) -> list[str]:
        folder = self.root / model
        swept = drafts.sweep(folder)
        # Files in the model's folder are written under the lock alone: one that is there now is nobody's.
        for pattern in (_REMOVED, atomic.PREFIX):
            for path in sorted(folder.glob(f"{pattern}*")):
                with suppress(OSError):
                    _delete(path)
                swept.append(path.name)
        return swept

    @override
    def forget(self, model: str) -> None:
        folder = self.root / model
        if not self._has_state(model) or self.state(model).published:
            return
        if self.listed(model).numbers or drafts.any_in(folder):
            return
        for name in _BESIDE:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put something of theirs there
            folder.rmdir()

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
        elif any(path.name[0] != "." for path in folder.iterdir()) and not self.holds(folder.name):
            raise foreign(str(folder))

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
            if error.errno not in FORBIDDEN:
                raise
            raise PermissionError(
                f"{self.root}: expected a repository that can be written to, got: {error.strerror}; choose another, or "
                "mend its permissions"
            ) from error


def _delete(path: Path) -> None:
    """Remove a folder with all below it, or a file, or a link without what it points at."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
