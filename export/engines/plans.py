"""A TensorRT plan on its way from the file to an engine: deserialised, and compared with its manifest.

plan --header, deserialise--> engine --tensors' names, types and shapes; profiles--> Plan

Whatever does not fit is found here, before the first batch, and named.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.engines.base import CannotRunHere
from export.engines.messages import logger

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from export.engines.messages import Messages
    from export.manifest import Manifest, TensorSpec

# TensorRT's names of the Open Inference Protocol's datatypes.
_DATATYPES = {"FLOAT": "FP32", "HALF": "FP16", "UINT8": "UINT8", "INT8": "INT8", "INT32": "INT32", "INT64": "INT64"}


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: its number in the plan, the smallest and the largest batch that it takes."""

    index: int
    smallest: int
    largest: int


def tightest(profiles: Iterable[Profile], batch: int) -> Profile:
    """Return the profile that holds a batch and least else: it was tuned for sizes like this one."""
    holding = (profile for profile in profiles if profile.smallest <= batch <= profile.largest)
    return min(holding, key=lambda profile: (profile.largest - profile.smallest, profile.index))


def uncovered(ranges: Iterable[tuple[int, int]], *, max_batch: int) -> int | None:
    """Return the smallest batch from 1 to `max_batch` that is in none of the ranges; None where all are in one."""
    reached = 0
    for smallest, largest in sorted(ranges):
        if smallest > reached + 1:
            break
        reached = max(reached, largest)
    return None if reached >= max_batch else reached + 1


@dataclass(frozen=True)
class Plan:
    """An engine, and the runtime, which must outlive it."""

    runtime: Any
    engine: Any
    profiles: tuple[Profile, ...]


def opened(trt: Any, path: Path, manifest: Manifest, messages: Messages) -> Plan:
    """Deserialise a plan, and compare it with the manifest before anything relies on either.

    Raises:
        CannotRunHere: the runtime cannot start, or does not take this plan on this machine.
        ValueError: the plan is empty, or is not what its manifest says.
    """
    again = _again(manifest)
    if not path.stat().st_size:
        raise ValueError(f"{path}: expected a plan, got an empty file; {again}")
    try:
        runtime = trt.Runtime(logger(trt))
    except TypeError as error:
        # What the bindings make of a constructor that returned null.
        raise CannotRunHere(f"{manifest.runtime} cannot start here: {messages.why}") from error
    # The part of TensorRT that such a plan carries along is code; the plan's sha256 is that of its manifest.
    if manifest.build.options.get("version_compatible") is True:
        runtime.engine_host_code_allowed = True
    # Mapped, not read: after this block no copy of the plan is left on the host.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        _check_header(trt, runtime, plan, manifest)
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        # Its sha256 is its manifest's: the plan is as it was built, and this runtime or this machine is another.
        raise CannotRunHere(
            f"{path}: expected a plan that {manifest.runtime} {trt.__version__} takes here, got one for "
            f"{manifest.requires.runtime}: {messages.why}; {again}"
        )
    _check_tensors(engine, manifest)
    return Plan(runtime, engine, _profiles(engine, manifest))


def _check_header(trt: Any, runtime: Any, plan: mmap.mmap, manifest: Manifest) -> None:
    """Ask `tensorrt_rtx`, which can tell by a few bytes what a machine lacks; `tensorrt` has no such question."""
    if manifest.runtime != "tensorrt_rtx":
        return
    validity, bits = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    lacking = [name.lower().replace("_", " ") for name, bit in known if int(bits) & int(bit)]
    if validity == trt.EngineValidity.INVALID and lacking and lacking != ["malformed engine"]:
        raise CannotRunHere(
            f"{manifest.model}: {manifest.runtime} cannot run it here: {', '.join(lacking)}; {_again(manifest)}"
        )


def _check_tensors(engine: Any, manifest: Manifest) -> None:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {f"{_mode(engine, name)} {name!r}": _described(engine, name) for name in names}
    expected = {f"INPUT {spec.name!r}": _spec(spec) for spec in manifest.inputs}
    expected |= {f"OUTPUT {spec.name!r}": _spec(spec) for spec in manifest.outputs}
    if found != expected:
        raise ValueError(
            f"{manifest.model}: expected {_listed(expected)} as in its manifest, its plan has {_listed(found)}; "
            f"{_again(manifest)}"
        )


def _profiles(engine: Any, manifest: Manifest) -> tuple[Profile, ...]:
    name, profiles = manifest.inputs[0].name, []
    for index in range(engine.num_optimization_profiles):
        smallest, _, largest = engine.get_tensor_profile_shape(name, index)
        profiles.append(Profile(index, smallest[0], largest[0]))
    ranges = [(profile.smallest, profile.largest) for profile in profiles]
    if (missing := uncovered(ranges, max_batch=manifest.max_batch)) is not None:
        raise ValueError(
            f"{manifest.model}: expected a plan for batches of 1 to {manifest.max_batch} as in its manifest, none of "
            f"its profiles takes {missing}; {_again(manifest)}"
        )
    return tuple(profiles)


def _mode(engine: Any, name: str) -> str:
    return str(engine.get_tensor_mode(name).name)


def _described(engine: Any, name: str) -> str:
    datatype = engine.get_tensor_dtype(name).name
    return f"{_DATATYPES.get(datatype, datatype)} {tuple(engine.get_tensor_shape(name))}"


def _spec(spec: TensorSpec) -> str:
    return f"{spec.datatype} {spec.shape}"


def _listed(tensors: dict[str, str]) -> str:
    return ", ".join(f"{name} {described}" for name, described in sorted(tensors.items()))


def _again(manifest: Manifest) -> str:
    command = manifest.build.command
    return f"build it again with `{command}`" if command else "build it again"
