"""Files that a reader sees whole or not at all, whatever crashes: written beside their place, flushed, renamed."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

# How the names of files begin that are being written: what a killed process leaves can be told by it.
PREFIX = ".writing-"


def write(path: Path, content: bytes) -> None:
    """Put a file in its place, in the stead of an earlier one; when it fails, nothing is left beside it."""
    with staged(path, content) as put:
        put()


def write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, each as `write` does and in their order, into a folder that is made if it is missing.

    Args:
        folder: where to.
        files: contents by name, which may have folders in it.
    """
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)


@contextmanager
def staged(path: Path, content: bytes, *, folder: Path | None = None) -> Iterator[Callable[[], None]]:
    """Write a file beside its place, and yield what puts it there: a rename, for which a full disk has room as well.

    Args:
        path: its place.
        content: its bytes.
        folder: where it is written, on the same disk; by default the folder of its place.
    """
    temporary, handle = new_file(folder or path.parent)

    def put() -> None:
        temporary.replace(path)
        flush(path.parent)

    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        flush(temporary)
        yield put
    finally:
        temporary.unlink(missing_ok=True)


def new_file(folder: Path) -> tuple[Path, int]:
    """Make a file that nobody else has, readable by whom the umask allows; return it, and it open for writing."""
    path = folder / f"{PREFIX}{secrets.token_hex(8)}"
    return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Wait until a folder and all below it are on the disk."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)
