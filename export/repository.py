"""The model repository: `<repository>/<model>/<version>/`, laid out so that Triton can serve the same folder.

draft (hidden folder) --files written, fsynced--> rename --> <version>/      readers never see half a version
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import atomic
from export import manifest as manifests
from export.manifest import Manifest, Parity, checked_name

_TRITON_PLATFORMS = {
    "onnxruntime": "onnxruntime_onnx",
    "tensorrt": "tensorrt_plan",
    "tensorrt_rtx": "tensorrt_plan",
}


# Hidden folders in which versions are written.
_DRAFT = ".draft-"


@dataclass(frozen=True)
class Version:
    """One published version: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.manifest.model}@{self.manifest.version}"


class Draft:
    """A version that is being written: fill `folder`, then say what it is by `describe`."""

    def __init__(self, folder: Path, *, model: str, version: int) -> None:
        self.folder = folder
        self.model = model
        self.version = version
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The description given; asserts that there is one."""
        assert self._manifest is not None, "a draft must be described before its block ends"
        return self._manifest

    def describe(self, manifest: Manifest) -> None:
        """Write the manifest; it must carry this draft's model and version."""
        assert (manifest.model, manifest.version) == (self.model, self.version)
        self._manifest = manifest
        (self.folder / manifests.FILE_NAME).write_bytes(_as_json(manifest))


class Repository:
    """A folder of models; any number of readers and writers at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def models(self) -> list[str]:
        """Return the names of all models that have a version, sorted.

        Raises:
            FileNotFoundError: the repository's folder does not exist.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder}: expected a model repository here, found no folder; make one with `tenet export`"
            )
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(name for name in names if manifests.NAME_PATTERN.fullmatch(name) and self.versions(name))

    def versions(self, model: str) -> list[int]:
        """Return a model's version numbers, ascending; empty when there is no such model."""
        folder = self.folder / checked_name(model)
        if not folder.is_dir():
            return []
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def find(self, model: str, version: int | None = None) -> Version:
        """Return one version, the latest if none is named.

        Raises:
            FileNotFoundError: no such model or version; the message lists what there is.
            ValueError: the name is not a plain one, or the manifest cannot be read.
        """
        versions = self.versions(model)
        if not versions:
            known = ", ".join(self.models()) or "none"
            raise FileNotFoundError(f"model {model!r}: not in {self.folder}; its models are: {known}")
        if version is None:
            version = versions[-1]
        if version not in versions:
            known = ", ".join(map(str, versions))
            raise FileNotFoundError(f"model {model!r} has no version {version}; its versions are: {known}")
        folder = self.folder / model / str(version)
        return Version(folder, manifests.read(folder))

    def parse(self, reference: str) -> Version:
        """Return the version that `NAME` or `NAME@VERSION` means."""
        model, _, version = reference.partition("@")
        if version and not version.isdecimal():
            raise ValueError(f"{reference!r}: expected NAME or NAME@VERSION with a whole number, got {version!r}")
        return self.find(model, int(version) if version else None)

    def twin_of(self, version: Version) -> Path | None:
        """Return the checkpoint folder with this engine's weights, its own or a source's; None if there is none.

        Raises:
            FileNotFoundError: the source, or the checkpoint, has been removed.
            ValueError: the checkpoint is not the one that was exported.
        """
        while version.manifest.twin is None:
            source = version.manifest.source
            if source is None:
                return None
            version = self.find(source.model, source.version)
            if version.manifest.sha256 != source.sha256:
                raise ValueError(
                    f"{version}: expected sha256 {source.sha256[:12]}…, from which the variant was made, got "
                    f"{version.manifest.sha256[:12]}…; it is another model: make the variant again"
                )
        folder, twin = version.folder / version.manifest.twin.folder, version.manifest.twin
        weights = folder / twin.file
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}: expected {version}'s checkpoint here, found none; export it again")
        if (actual := manifests.sha256_of(weights)) != twin.sha256:
            raise ValueError(
                f"{weights}: expected sha256 {twin.sha256[:12]}… as in {version}'s manifest, got {actual[:12]}…; "
                "it is another checkpoint: export the model again"
            )
        return folder

    def record_proof(self, version: Version, proof: Parity) -> None:
        """Put a new proof into a published version's manifest, all of it or nothing."""
        manifest = version.manifest.model_copy(update={"parity": proof})
        atomic.write(version.folder / manifests.FILE_NAME, _as_json(manifest))

    @contextmanager
    def draft(self, model: str) -> Iterator[Draft]:
        """Publish a new version: all of it when the block ends well, nothing of it otherwise."""
        folder = self.folder / checked_name(model)
        version, temporary = self._begin(folder)
        try:
            draft = Draft(temporary, model=model, version=version)
            yield draft
            atomic.write(folder / "config.pbtxt", triton_config(draft.manifest).encode())
            temporary.chmod(0o755)
            atomic.flush_tree(temporary)
            temporary.rename(folder / str(version))
            atomic.flush(folder)
        finally:
            self._end(folder, temporary)

    def _begin(self, folder: Path) -> tuple[int, Path]:
        """Give out the next version number and a folder to write it in; a published model's number is never reused."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            folder.mkdir(exist_ok=True)
            state_path = folder / "model.json"
            state: dict[str, Any] = {"aliases": {}, "last_version": 0}
            if state_path.is_file():
                state = json.loads(state_path.read_text())
            state["last_version"] += 1
            atomic.write(state_path, json.dumps(state, indent=2).encode() + b"\n")
            version = int(state["last_version"])
            return version, Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{version}-", dir=folder))

    def _end(self, folder: Path, temporary: Path) -> None:
        """Remove what a failed draft has left, the model too if nothing of it was ever published."""
        shutil.rmtree(temporary, ignore_errors=True)
        with self._lock():
            if not self.versions(folder.name) and not any(folder.glob(f"{_DRAFT}*")):
                shutil.rmtree(folder)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def triton_config(manifest: Manifest) -> str:
    """Return the config.pbtxt with which Triton serves this model."""

    def tensors(field: str, specs: tuple[manifests.TensorSpec, ...]) -> str:
        entries = (
            f'  {{ name: "{spec.name}", data_type: TYPE_{spec.datatype}, dims: {list(spec.shape[1:])} }}'
            for spec in specs
        )
        return f"{field} [\n" + ",\n".join(entries) + "\n]\n"

    return (
        f'name: "{manifest.model}"\n'
        f'platform: "{_TRITON_PLATFORMS[manifest.runtime]}"\n'
        f"max_batch_size: {manifest.max_batch}\n"
        + tensors("input", manifest.inputs)
        + tensors("output", manifest.outputs)
        + "dynamic_batching { }\n"
    )


def _as_json(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=2).encode() + b"\n"
