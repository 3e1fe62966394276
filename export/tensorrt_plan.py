"""ONNX -> TensorRT plan, by `tensorrt` or by `tensorrt_rtx` (which also builds on a machine without a GPU).

onnx.checker --> parser --> strongly typed network + optimisation profiles --> serialised plan
                   every message on the way --> build.log

Precision comes from the ONNX file: TensorRT 11 has no switches for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx

from export import requirements
from export.engines import cuda
from export.engines.base import CannotRunHere
from export.engines.messages import import_runtime, logger
from export.engines.plans import uncovered
from export.manifest import Requirements
from export.plan import build_log, plan_source, timing_cache
from export.plan.build_progress import monitor
from export.store import atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic import JsonValue

    from export.engines.messages import Messages
    from export.manifest import Runtime, TensorSpec

# The build's log, beside the plan.
LOG = "build.log"

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
_COMPATIBILITIES: tuple[HardwareCompatibility, ...] = ("none", "ampere_plus", "same_compute_capability")

# What TensorRT takes for its optimisation level; it takes larger ones for the largest, and says nothing.
_LEVELS = range(6)

# Compute capability from which `tensorrt_rtx` builds for every GPU unless it is told to; Turing only when told.
_AMPERE = 8.0


@dataclass(frozen=True)
class Options:
    """How a plan is built.

    Attributes:
        profiles: (smallest, best, largest) batch of each optimisation profile. By default two: one image alone, and
            any batch, tuned for the largest. A single profile would be slow at one end: kernels are chosen for its
            best size.
        workspace_mib: the most memory that a layer may use for itself, in MiB; all of the GPU's if None.
        optimization_level: 0 (quickest build) to 5 (quickest plan); TensorRT's own default, 3, if None.
        compute_capabilities: the GPUs that `tensorrt_rtx` builds for, such as ("8.9", "12.0"); every GPU that it
            supports from 8.0 on if empty. `tensorrt` builds for the GPU at hand.
        hardware_compatibility: of `tensorrt`: other GPUs that take the plan, at the cost of some speed.
        version_compatible: of `tensorrt`: later versions of the same major one take the plan, which then carries code.
        timing_cache: of `tensorrt`: a folder that keeps what was measured, so that the next build is quick.
    """

    profiles: tuple[tuple[int, int, int], ...] = ()
    workspace_mib: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        for profile in self.profiles:
            if len(profile) != 3 or not 1 <= profile[0] <= profile[1] <= profile[2]:
                raise ValueError(
                    f"profile {profile}: expected a smallest, a best and a largest batch, 1 <= smallest <= best <= "
                    "largest; write 1,8,64, say"
                )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ValueError(f"workspace: expected at least 1 MiB, got {self.workspace_mib}; leave it out for no limit")
        if self.optimization_level is not None and self.optimization_level not in _LEVELS:
            raise ValueError(f"optimisation level: expected 0 to 5, got {self.optimization_level}")
        if self.hardware_compatibility not in _COMPATIBILITIES:
            raise ValueError(
                f"hardware compatibility: expected one of {', '.join(_COMPATIBILITIES)}, got "
                f"{self.hardware_compatibility!r}"
            )
        for name in self.compute_capabilities:
            if not re.fullmatch(r"[1-9][0-9]*\.[0-9]", name):
                raise ValueError(f"compute capability {name!r}: expected a number such as 8.9")

    def flags(self) -> list[str]:
        """Return the flags of a `tenet export` that builds like this; defaults are left out."""
        profiles = [text for profile in self.profiles for text in ("--profile", ",".join(map(str, profile)))]
        capabilities = [text for name in self.compute_capabilities for text in ("--compute-capability", name)]
        workspace = [] if self.workspace_mib is None else ["--workspace", str(self.workspace_mib)]
        level = [] if self.optimization_level is None else ["--optimization-level", str(self.optimization_level)]
        hardware = self.hardware_compatibility
        compatible = [] if hardware == "none" else ["--hardware-compatibility", hardware]
        version = ["--version-compatible"] if self.version_compatible else []
        return [*profiles, *workspace, *level, *capabilities, *compatible, *version]

    def as_record(self) -> dict[str, JsonValue]:
        """Return what a manifest keeps: all but the timing cache, which makes no other plan."""
        return {
            "profiles": [list(profile) for profile in self.profiles],
            "workspace_mib": self.workspace_mib,
            "optimization_level": self.optimization_level,
            "compute_capabilities": list(self.compute_capabilities),
            "hardware_compatibility": self.hardware_compatibility,
            "version_compatible": self.version_compatible,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, JsonValue]) -> Options:
        """Return the options that a manifest keeps.

        Raises:
            ValueError: they are none.
        """
        known: Any = record
        try:
            return cls(
                profiles=tuple((int(a), int(b), int(c)) for a, b, c in known["profiles"]),
                workspace_mib=known["workspace_mib"],
                optimization_level=known["optimization_level"],
                compute_capabilities=tuple(known["compute_capabilities"]),
                hardware_compatibility=known["hardware_compatibility"],
                version_compatible=known["version_compatible"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"options of a plan: expected those of its build, got {record}; export it again"
            ) from error


@dataclass(frozen=True)
class PlanBuild:
    """What a build was, for the manifest: what its plan requires, its options, the versions that took part."""

    requires: Requirements
    options: dict[str, JsonValue]
    versions: dict[str, str]


def default_profiles(max_batch: int) -> tuple[tuple[int, int, int], ...]:
    """Return the profiles that serve single images and full batches well."""
    every = (1, max_batch, max_batch)
    return (every,) if max_batch == 1 else ((1, 1, 1), every)


def known_compute_capabilities(trt: Any) -> dict[str, Any]:
    """Return the GPUs that `tensorrt_rtx` can build for, by names such as "8.9", with its own names of them."""
    found = (re.fullmatch(r"SM(\d+)(\d)", name) for name in trt.ComputeCapability.__members__)
    return {f"{match[1]}.{match[2]}": trt.ComputeCapability.__members__[match[0]] for match in found if match}


def plan_from_onnx(
    source: Path,
    path: Path,
    *,
    runtime: Runtime,
    image: TensorSpec,
    max_batch: int,
    options: Options = Options(),
    progress: Callable[[str, int, int], None] | None = None,
) -> PlanBuild:
    """Build a plan for batches of 1 to `max_batch` and write it; its log goes beside it, whether it succeeds or not.

    Args:
        source: the ONNX file; its own types are the plan's (TensorRT 11 is strongly typed).
        path: the file to write.
        runtime: "tensorrt" or "tensorrt_rtx".
        image: the graph's image input.
        max_batch: the largest batch that the engine will take.
        options: how to build.
        progress: is told the phase of the build, its step (0 at its start) and how many there are.

    Raises:
        CannotRunHere: the runtime is not installed, or cannot build here.
        ValueError: an option does not fit, or the parser or the builder refused the graph; the message names the
            operator and the node, or has the builder's reason.
        KeyboardInterrupt: Ctrl-C; nothing is written but the log.
    """
    trt = import_runtime(runtime)
    options = _fitting(trt, options, runtime=runtime, max_batch=max_batch)
    plan_source.check(source, image)
    with build_log.kept(trt, path.parent / LOG, private=(source.parent, path.parent)) as messages:
        builder = _builder(trt, runtime, messages)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        plan_source.parse(trt, network, source, runtime=runtime)
        config = builder.create_builder_config()
        # TensorFloat-32 rounds fp32 products to 10 bits: fast, but no longer what the source computes.
        config.clear_flag(trt.BuilderFlag.TF32)
        _configure(trt, config, options)
        _add_profiles(builder, config, options, image=image, messages=messages)
        # Kept in a name: the builder calls it for as long as it lives. It is there without `progress`, too, for Ctrl-C.
        watching = monitor(trt, progress, messages)
        config.progress_monitor = watching
        with timing_cache.kept(config, options.timing_cache, runtime=runtime, version=trt.__version__):
            plan = builder.build_serialized_network(network, config)
        if plan is None and not messages.interrupted:
            raise ValueError(f"{source}: {runtime} could not build a plan: {messages.why}; {plan_source.SERVE_ONNX}")
    # TensorRT's own memory, by the buffer protocol: not copied.
    atomic.write(path, plan)
    return PlanBuild(
        requires=_requirements(trt, options, runtime=runtime),
        options={**options.as_record(), "tf32": "off"},
        versions=_versions(runtime, trt.__version__),
    )


def _fitting(trt: Any, options: Options, *, runtime: Runtime, max_batch: int) -> Options:
    """Return the options with their profiles, if they make sense for the runtime and the engine."""
    profiles = options.profiles or default_profiles(max_batch)
    ranges = [(smallest, largest) for smallest, _, largest in profiles]
    if (missing := uncovered(ranges, max_batch=max_batch)) is not None:
        raise ValueError(
            f"profiles {profiles}: expected them to take every batch from 1 to {max_batch}, none takes {missing}; "
            "add one, or choose another largest batch"
        )
    if (largest := max(largest for _, largest in ranges)) > max_batch:
        raise ValueError(
            f"profiles {profiles}: expected batches of at most {max_batch}, the engine's largest, got {largest}; "
            "choose another largest batch"
        )
    (_check_rtx if runtime == "tensorrt_rtx" else _check_tensorrt)(trt, options)
    return Options(**{**vars(options), "profiles": profiles})


def _check_rtx(trt: Any, options: Options) -> None:
    if options.version_compatible:
        raise ValueError("version compatible: plans of tensorrt_rtx run on the version that built them alone")
    if options.hardware_compatibility != "none":
        raise ValueError("hardware compatibility: tensorrt_rtx has none; name the compute capabilities instead")
    if options.timing_cache is not None:
        raise ValueError("timing cache: tensorrt_rtx has none, its builds are quick; leave it out")
    known = known_compute_capabilities(trt)
    for name in options.compute_capabilities:
        if name not in known:
            raise ValueError(
                f"compute capability {name!r}: expected one that tensorrt_rtx {trt.__version__} builds for, "
                f"{', '.join(known)}; take runtime tensorrt for other GPUs"
            )


def _check_tensorrt(_: Any, options: Options) -> None:
    if options.compute_capabilities:
        raise ValueError(
            "compute capabilities: tensorrt builds for the GPU at hand; take tensorrt_rtx, or hardware compatibility"
        )


def _builder(trt: Any, runtime: str, messages: Messages) -> Any:
    try:
        return trt.Builder(logger(trt))
    except TypeError as error:
        # What the bindings make of a constructor that returned null.
        raise CannotRunHere(f"{runtime} cannot build here: {messages.why}") from error


def _configure(trt: Any, config: Any, options: Options) -> None:
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper()
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[level]
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        known = known_compute_capabilities(trt)
        for index, name in enumerate(options.compute_capabilities):
            if not config.set_compute_capability(known[name], index):
                raise ValueError(f"compute capability {name!r}: TensorRT does not build for it; leave it out")


def _add_profiles(builder: Any, config: Any, options: Options, *, image: TensorSpec, messages: Messages) -> None:
    for sizes in options.profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, *((size, *image.shape[1:]) for size in sizes))
        if config.add_optimization_profile(profile) < 0:
            raise ValueError(f"profile {sizes}: TensorRT does not take it: {messages.why}")


def _requirements(trt: Any, options: Options, *, runtime: Runtime) -> Requirements:
    version = str(trt.__version__)
    specifier = f"=={version}"
    if options.version_compatible:
        specifier = f">={version},<{int(version.partition('.')[0]) + 1}"
    return Requirements(
        runtime=specifier,
        platform=requirements.platform_name(),
        compute_capabilities=_targets(trt, options, runtime=runtime),
        driver=requirements.driver_of(runtime),
    )


def _targets(trt: Any, options: Options, *, runtime: Runtime) -> tuple[str, ...]:
    if options.compute_capabilities:
        return options.compute_capabilities
    if runtime == "tensorrt_rtx":
        return tuple(name for name in known_compute_capabilities(trt) if float(name) >= _AMPERE)
    if options.hardware_compatibility == "ampere_plus":
        return (f"{_AMPERE}{requirements.OR_NEWER}",)
    gpu = cuda.current_gpu()
    return () if gpu is None else (gpu.compute_capability,)


def _versions(runtime: Runtime, version: str) -> dict[str, str]:
    versions = {runtime: version, "onnx": onnx.__version__}
    driver = cuda.driver_version()
    return versions if driver is None else {**versions, "driver": driver}
