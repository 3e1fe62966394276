"""Files that a reader sees whole or not at all, whatever crashes: written beside their place, flushed, renamed."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# How the names of files begin that are being written: what a killed process leaves can be told by it.
PREFIX = ".writing-"


def write(path: Path, content: bytes) -> None:
    """Put a file in its place, in the stead of an earlier one; when it fails, nothing is left beside it."""
    with staged(path, content) as put:
        put()


@contextmanager
def staged(path: Path, content: bytes, *, folder: Path | None = None) -> Iterator[Callable[[], None]]:
    """Write a file beside its place, and yield what puts it there: a rename, for which a full disk has room as well.

    Args:
        path: its place.
        content: its bytes.
        folder: where it is written, on the same disk; by default the folder of its place.
    """
    handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder or path.parent)
    temporary = Path(name)

    def put() -> None:
        temporary.replace(path)
        flush(path.parent)

    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.chmod(0o644)
        flush(temporary)
        yield put
    finally:
        temporary.unlink(missing_ok=True)


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
