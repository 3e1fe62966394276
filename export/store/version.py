"""One published version, as a reader has it: its manifest, and its files, fetched when they are first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from export.manifest import Manifest


@dataclass(frozen=True)
class Version:
    """One published version: its manifest, and where its files are."""

    manifest: Manifest
    place: Callable[[Manifest], Path] = field(repr=False, compare=False)

    @cached_property
    def folder(self) -> Path:
        """Its folder on this machine; one of an object store is fetched, and checked, the first time this is read.

        Raises:
            FileNotFoundError: the store has lost a file, or the version.
            OSError: the store, or the cache on this machine, refuses.
            ValueError: a file was changed in the store.
        """
        return self.place(self.manifest)

    def __str__(self) -> str:
        return f"{self.manifest.model}@{self.manifest.version}"
