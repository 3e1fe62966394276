"""Whether this machine can run an engine: decided by its manifest, before anything of the file is deserialised.

Machine: platform, runtimes, GPUs, driver --check(manifest)--> nothing | CannotRunHere: what it needs, what is here
"""

from __future__ import annotations

import functools
import platform
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from export.engines import cuda
from export.engines.base import CannotRunHere

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from export.engines.cuda import Gpu
    from export.manifest import Manifest, Runtime

# After a compute capability: newer GPUs take the plan as well.
OR_NEWER = "+"

# The distributions that bring a runtime; the first one installed counts.
_DISTRIBUTIONS: dict[Runtime, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
}

# CUDA versions that NVIDIA's packages are built for, newest first; they stand in the packages' names.
_CUDA_MAJORS = (14, 13, 12)


@dataclass(frozen=True)
class Machine:
    """What a machine has.

    Attributes:
        platform: such as "linux-x86_64".
        runtimes: the version of each runtime that is installed.
        gpus: in the order of their numbers.
        driver: the newest CUDA version that the GPUs' driver takes, such as "13.0"; None without a driver.
    """

    platform: str
    runtimes: Mapping[Runtime, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None

    @staticmethod
    def here() -> Machine:
        """Return this machine. No runtime is imported; the driver is asked once a process."""
        return _here()


def platform_name() -> str:
    """Return what plans are built for here, such as "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"


def driver_of(runtime: Runtime) -> str | None:
    """Return the CUDA version that a driver must take at least for an installed runtime; None if it does not say.

    Within a major version of CUDA, drivers of the first minor one run what was built for later ones (NVIDIA: minor
    version compatibility).
    """
    for major in _CUDA_MAJORS:
        if _version(f"{runtime}_cu{major}") is not None:
            return f"{major}.0"
    return None


def check(manifest: Manifest, machine: Machine | None = None, *, ordinal: int = 0) -> None:
    """Refuse an engine that cannot run here.

    Args:
        manifest: of the engine.
        machine: where it shall run; this machine by default. The GPUs are asked for only if the engine needs one.
        ordinal: the number of the GPU that shall run it.

    Raises:
        CannotRunHere: with everything that it needs and what is here, and the command that builds it again.
        ValueError: the manifest's requirements are none.
    """
    needs_gpu = manifest.runtime != "onnxruntime"
    if machine is None:
        machine = Machine.here() if needs_gpu else _without_gpus()
    faults = [*_software(manifest, machine), *(_hardware(manifest, machine, ordinal) if needs_gpu else ())]
    if faults:
        name = f"{manifest.model}@{manifest.version}"
        raise CannotRunHere(f"{name} cannot run here: {'; '.join(faults)}; {_way_out(manifest)}")


def _software(manifest: Manifest, machine: Machine) -> Iterator[str]:
    runtime, requires = manifest.runtime, manifest.requires
    version = machine.runtimes.get(runtime)
    if version is None:
        extra = "" if runtime == "onnxruntime" else f"[{runtime.replace('_', '-')}]"
        yield (
            f"expected {runtime} {requires.runtime}, and none is installed (`pip install 'tenet{extra}'`, and the "
            "version that it needs)"
        )
    elif not _meets(version, requires.runtime, name=f"{manifest.model}: {runtime}"):
        yield f"expected {runtime} {requires.runtime}, got {version}"
    if requires.platform not in {"any", machine.platform}:
        yield f"expected platform {requires.platform}, got {machine.platform}"


def _hardware(manifest: Manifest, machine: Machine, ordinal: int) -> Iterator[str]:
    requires = manifest.requires
    if not machine.gpus:
        yield f"a plan of {manifest.runtime} needs an NVIDIA GPU, and CUDA finds none on this machine"
        return
    if not 0 <= ordinal < len(machine.gpus):
        yield f"expected a GPU number from 0 to {len(machine.gpus) - 1}, got {ordinal}"
        return
    gpu = machine.gpus[ordinal]
    wanted = requires.compute_capabilities
    if wanted and not any(_fits(gpu.compute_capability, capability) for capability in wanted):
        yield f"expected a GPU of compute capability {' or '.join(wanted)}, got {gpu.compute_capability} ({gpu.name})"
    if requires.driver is not None and not _reaches(machine.driver, requires.driver):
        yield f"expected a driver for CUDA {requires.driver} or newer, got {machine.driver or 'one that does not say'}"


def _way_out(manifest: Manifest) -> str:
    command = f"`{manifest.build.command}`" if manifest.build.command else "the command that made it"
    if manifest.runtime == "onnxruntime":
        return f"install what it needs, or export it again here by {command}"
    return f"build it again here by {command}, or serve the ONNX model"


def _meets(version: str, specifier: str, *, name: str) -> bool:
    """Return whether an installed version is one of those specified; a post-release is the release that it follows."""
    try:
        wanted = SpecifierSet(specifier)
        # Nothing wanted would be met by everything.
        if not len(wanted):
            raise InvalidSpecifier(specifier)
    except InvalidSpecifier:
        raise ValueError(
            f"{name}: expected versions such as '==11.4.1.5' or '>=1.27', got {specifier!r}; export the model again"
        ) from None
    try:
        installed = Version(version)
    except InvalidVersion:
        return False
    base = Version(installed.public)
    release = Version(re.sub(r"\.post\d+$", "", str(base)))
    return wanted.contains(release, prereleases=True)


def _fits(capability: str, wanted: str) -> bool:
    if wanted.endswith(OR_NEWER):
        return _reaches(capability, wanted.removesuffix(OR_NEWER))
    return capability == wanted


def _reaches(got: str | None, wanted: str) -> bool:
    """Return whether one version is another or newer; 12.10 is newer than 12.9."""
    if got is None:
        return False
    try:
        return Version(got) >= Version(wanted)
    except InvalidVersion:
        return False


@functools.cache
def _here() -> Machine:
    bare = _without_gpus()
    return Machine(bare.platform, bare.runtimes, cuda.gpus(), cuda.driver_version())


@functools.cache
def _without_gpus() -> Machine:
    found = {runtime: _first(names) for runtime, names in _DISTRIBUTIONS.items()}
    return Machine(platform_name(), {runtime: version for runtime, version in found.items() if version is not None})


def _first(names: tuple[str, ...]) -> str | None:
    return next((version for name in names if (version := _version(name)) is not None), None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
