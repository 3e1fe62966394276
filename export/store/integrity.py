"""Whether every byte of a version is as it was written: the version's files, those beside it, its PyTorch twin's.

manifest --sha256 of each file--> storage        config.pbtxt, labels.txt --what the versions call for--> snapshot
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from export import manifest as manifests
from export.store import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from export.manifest import Manifest
    from export.store.storage import Storage
    from export.store.version import Version


@dataclass(frozen=True)
class TwinFiles:
    """The PyTorch model with an engine's weights: the folder that holds it, and the weights' file in it."""

    folder: Path
    file: str


def check(storage: Storage, model: str, number: int) -> Manifest:
    """Return a version's manifest after reading every byte of the version, and of the files beside it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not, byte for byte, the one that was written, or is one too many.
    """
    folder = f"{model}/{number}"
    path = f"{folder}/{manifests.FILE_NAME}"
    contents = storage.read(path)
    manifest = storage.manifest(model, number, contents)
    if manifest.as_json() != contents:
        raise ValueError(f"{storage.location}/{path}: was changed or damaged after export; export the model again")
    expected = {manifest.file: manifest.sha256, **manifest.files}
    for name, sha256 in expected.items():
        if (actual := storage.sha256(f"{folder}/{name}")) != sha256:
            raise _other(f"{storage.location}/{folder}/{name}", sha256, actual, "its manifest")
    for name in sorted({*storage.files(model, number)} - {*expected, manifests.FILE_NAME}):
        raise _one_more(f"{storage.location}/{folder}/{name}")
    _check_beside(storage, model)
    return manifest


def twin_of(version: Version, *, find: Callable[[str, int], Version]) -> TwinFiles | None:
    """Return the PyTorch model with this engine's weights, its own or a source's; None if there is none.

    All of its files are checked, and not the weights alone: the others say which code is imported.

    Args:
        version: the engine.
        find: returns a source.

    Raises:
        FileNotFoundError: the source, or the checkpoint, has been removed.
        ValueError: the checkpoint is not the one that was exported.
    """
    owner = _with_twin(version, find=find)
    twin = owner.manifest.twin if owner is not None else None
    if owner is None or twin is None:
        return None
    folder = owner.folder / twin.folder
    below = f"{twin.folder}/"
    listed = {n.removeprefix(below): sha256 for n, sha256 in owner.manifest.files.items() if n.startswith(below)}
    expected = {**listed, twin.file: twin.sha256}
    for name, sha256 in expected.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: expected {owner}'s checkpoint here, found none; export it again")
        if (actual := manifests.sha256_of(folder / name)) != sha256:
            raise _other(f"{folder / name}", sha256, actual, f"{owner}'s manifest", what="it is another checkpoint")
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in expected:
            raise _one_more(str(path))
    return TwinFiles(folder, twin.file)


def _with_twin(version: Version, *, find: Callable[[str, int], Version]) -> Version | None:
    """Return the version itself, or the first of its sources, that has a twin."""
    visited = []
    while version.manifest.twin is None:
        visited.append(str(version))
        source = version.manifest.source
        if source is None:
            return None
        version = find(source.model, source.version)
        if version.manifest.sha256 != source.sha256:
            raise ValueError(
                f"{version}: expected sha256 {source.sha256[:12]}…, from which the variant was made, got "
                f"{version.manifest.sha256[:12]}…; it is another model: make the variant again"
            )
        if str(version) in visited:
            raise ValueError(
                f"{version}: expected a source that was made before it, got a circle: {' from '.join(visited)}; "
                "export the model again"
            )
    return version


def _check_beside(storage: Storage, model: str) -> None:
    seen = snapshot.taken(storage, model)
    if seen.state_damage:
        raise ValueError(seen.state_damage)
    for name in seen.stale():
        raise ValueError(
            f"{storage.location}/{model}/{name}: differs from what this release of tenet writes for the model's "
            "versions: it was changed or damaged, or is another release's; `tenet models prune` writes it anew"
        )


def _other(place: str, expected: str, actual: str, source: str, *, what: str = "") -> ValueError:
    what = what or "the file was changed or damaged after export"
    return ValueError(
        f"{place}: expected sha256 {expected[:12]}… as in {source}, got {actual[:12]}…; {what}: export the model again"
    )


def _one_more(place: str) -> ValueError:
    return ValueError(
        f"{place}: expected the files of the manifest alone, got one more; remove it, or export the model again"
    )
