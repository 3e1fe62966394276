"""Disks that are full, and folders that nobody can write to, by real mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None or subprocess.run(["mount", *arguments], check=False).returncode:
        pytest.skip("mounting is not allowed here")


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    place.mkdir()
    _mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Make a folder one that cannot be written to, by root neither."""
    if os.geteuid() == 0:
        _mount("--bind", str(place), str(place))
        try:
            _mount("-o", "remount,bind,ro", str(place))
            yield
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return
    place.chmod(0o555)
    try:
        yield
    finally:
        place.chmod(0o755)
