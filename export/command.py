"""What `tenet export` and `tenet import` take: flags -> a published version, or exit code 1 for a failed proof.

Flags stand in panels by what they are about; one that would have no effect is an error.
"""

from __future__ import annotations

import math
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from export import summary
from export.console import complain, console, progress
from export.manifest import LARGEST_BATCH, LARGEST_RESIZE, Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from export.console import Tick
    from export.mapping import Mapping
    from export.parity import ParityFailed
    from export.publish import Form, Terms
    from export.repository import Repository, Version
    from export.tensorrt_plan import Options
    from export.twin import Network
    from export.variant import Variant

# The exit code of a failed check, as that of a failed gate.
FAILED = 1

# Between two lines on a build's progress in a log.
_LOG_SECONDS = 5.0


class Precision(StrEnum):
    """The precisions of an engine."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Runtime(StrEnum):
    """What runs an engine."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"


class Target(StrEnum):
    """The forms of int8."""

    CPU = "cpu"
    TENSORRT = "tensorrt"


class Method(StrEnum):
    """How int8 chooses the ranges of activations."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"


class Input(StrEnum):
    """What an engine takes."""

    FLOAT32 = "float32"
    UINT8 = "uint8"


class Output(StrEnum):
    """What an engine answers with."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"


class Interpolation(StrEnum):
    """The filters that images are resized with."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Layout(StrEnum):
    """The order of the dimensions of a foreign graph's input."""

    NCHW = "NCHW"
    NHWC = "NHWC"


class Channels(StrEnum):
    """The order of the channels of a foreign graph's input."""

    RGB = "RGB"
    BGR = "BGR"
    L = "L"


class HardwareCompatibility(StrEnum):
    """Which other GPUs take a plan of `tensorrt`."""

    NONE = "none"
    AMPERE_PLUS = "ampere_plus"
    SAME_COMPUTE_CAPABILITY = "same_compute_capability"


def _option(panel: str, help_: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, **more)


_PROOF, _ROUNDING, _PLAN = "Proof", "Rounding", "TensorRT plans"
_OWN, _MEANING = "A PyTorch network of one's own", "What its input and output mean"

RepositoryOption = Annotated[
    str, typer.Option("--repository", help="The model repository: a folder, s3://… or gs://…; made if missing.")
]
NameOption = Annotated[str, typer.Option(help="The model's name in the repository.")]
InputOption = Annotated[Input, typer.Option("--input", help="What it takes: float32 NCHW in [0, 1], or uint8 NHWC.")]
MaxBatchOption = Annotated[int | None, typer.Option(min=1, max=LARGEST_BATCH, help="The largest batch it will take.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")]
ImagesOption = Annotated[Path | None, _option(_PROOF, "Folder of class folders to calibrate on and to compare on.")]
CountOption = Annotated[
    int | None,
    _option(_PROOF, "Images to compare on, at most: 512, or 256 above 128 x 128 pixels.", "--parity-images", min=1),
]
DisagreementOption = Annotated[
    float | None,
    _option(_PROOF, "Share of images whose top-1 may differ; by default 0.005, of fp16 0.01, of int8 0.03."),
]
BlockOption = Annotated[
    bool, _option(_PROOF, "Publish what fails its proof, too, as blocked: it is not served.", "--block")
]
MeanOption = Annotated[str | None, _option(_OWN, "Subtracted from images in [0, 1], per channel: 0.485,0.456,0.406.")]
StdOption = Annotated[str | None, _option(_OWN, "Then divided by, per channel: 0.229,0.224,0.225.")]
ResizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=LARGEST_RESIZE,
        help="Pixels that the shorter side of an image is resized to before the input's size is cut out of the middle; "
        "by default the largest middle part is resized to the input's size.",
    ),
]
InterpolationOption = Annotated[Interpolation, typer.Option(help="How images are resized.")]


def export(
    run: Annotated[Path | None, typer.Argument(help="A RUN folder of `tenet train`.")] = None,
    *,
    repository: RepositoryOption,
    name: NameOption,
    source: Annotated[
        str | None, typer.Option("--from", help="Make a variant of NAME, NAME@VERSION or NAME@ALIAS of the repository.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="The engine's precision; the source's by default.", show_default=False)
    ] = None,
    runtime: Annotated[Runtime, typer.Option(help="What will run the engine.")] = Runtime.ONNXRUNTIME,
    takes: InputOption = Input.FLOAT32,
    answers: Annotated[Output, typer.Option("--output", help="What it answers with.")] = Output.LOGITS,
    max_batch: MaxBatchOption = None,
    as_json: JsonOption = False,
    images: ImagesOption = None,
    count: CountOption = None,
    max_disagreement: DisagreementOption = None,
    block: BlockOption = False,
    bisect: Annotated[
        bool,
        _option(_PROOF, "If fp16 or int8 fails: say which layers cost most, and what to keep in fp32.", "--bisect"),
    ] = False,
    keep: Annotated[
        list[str] | None, _option(_ROUNDING, "A node to keep in fp32; may be repeated.", "--keep-fp32")
    ] = None,
    target: Annotated[Target | None, _option(_ROUNDING, "The form of int8; by default the runtime's.")] = None,
    method: Annotated[
        Method, _option(_ROUNDING, "How int8 chooses the ranges of activations.", "--calibration")
    ] = Method.MINMAX,
    percentile: Annotated[
        float, _option(_ROUNDING, "Per cent of values in a range of --calibration percentile.", min=50, max=100)
    ] = 99.99,
    calibration_images: Annotated[
        int | None, _option(_ROUNDING, "Images to calibrate on, at most; 256 by default.", min=1)
    ] = None,
    profile: Annotated[
        list[str] | None, _option(_PLAN, "Smallest, best and largest batch of a profile: 1,8,64; may be repeated.")
    ] = None,
    workspace: Annotated[int | None, _option(_PLAN, "MiB that a layer may use for itself.", min=1)] = None,
    optimization_level: Annotated[
        int | None, _option(_PLAN, "0, quickest build, to 5, quickest plan.", min=0, max=5)
    ] = None,
    compute_capability: Annotated[
        list[str] | None, _option(_PLAN, "A GPU to build for, such as 8.9 (tensorrt_rtx); may be repeated.")
    ] = None,
    hardware_compatibility: Annotated[
        HardwareCompatibility | None, _option(_PLAN, "Which other GPUs take the plan (tensorrt).")
    ] = None,
    version_compatible: Annotated[
        bool, _option(_PLAN, "Later versions take the plan, too (tensorrt).", "--version-compatible")
    ] = False,
    timing_cache: Annotated[Path | None, _option(_PLAN, "Folder that keeps kernels' timings (tensorrt).")] = None,
    factory: Annotated[str | None, _option(_OWN, "package.module:function that makes the network.")] = None,
    weights: Annotated[Path | None, _option(_OWN, "Its state_dict: safetensors, or as torch.save writes it.")] = None,
    input_shape: Annotated[str | None, _option(_OWN, "Channels, height, width: 3,32,32.")] = None,
    labels: Annotated[str | None, _option(_OWN, "Class names: a,b,c, or a file with one a line.")] = None,
    mean: MeanOption = None,
    std: StdOption = None,
    resize: ResizeOption = None,
    interpolation: InterpolationOption = Interpolation.BILINEAR,
) -> None:
    """Export a checkpoint to ONNX, or a model to another precision or runtime, with proof of parity."""
    from export.manifest import checked_name
    from export.publish import MAX_BATCH, Form, Terms
    from export.repository import open_repository
    from export.variant import CALIBRATION_IMAGES

    checked_name(name)
    _one_alone({"a RUN folder": run, "--from NAME": source, "--factory": factory})
    rounds, plans = precision in {Precision.FP16, Precision.INT8}, runtime is not Runtime.ONNXRUNTIME
    _needed_for("--factory", factory is not None, {
        "weights": weights, "input-shape": input_shape, "labels": labels, "mean": mean, "std": std, "resize": resize,
        "interpolation": interpolation is not Interpolation.BILINEAR,
    })  # fmt: skip
    _needed_for("a RUN folder or --factory", source is None, {
        "input": takes is not Input.FLOAT32, "output": answers is not Output.LOGITS,
    })  # fmt: skip
    _needed_for("--runtime tensorrt or tensorrt_rtx", plans, {
        "profile": profile, "workspace": workspace, "optimization-level": optimization_level,
        "compute-capability": compute_capability, "hardware-compatibility": hardware_compatibility,
        "version-compatible": version_compatible, "timing-cache": timing_cache,
    })  # fmt: skip
    _needed_for("--precision fp16 or int8", rounds, {
        "keep-fp32": keep, "bisect": bisect, "calibration-images": calibration_images,
    })  # fmt: skip
    _needed_for(
        "--precision int8", precision is Precision.INT8, {"target": target, "calibration": method.name != "MINMAX"}
    )
    _needed_for("--calibration percentile", method is Method.PERCENTILE, {"percentile": percentile != 99.99})

    place = open_repository(repository)
    terms = Terms(images=images, count=count, max_disagreement=max_disagreement, block=block)
    form = Form(takes.value, answers.value, max_batch or MAX_BATCH, _preprocessing(resize, interpolation))
    plan = _plan_options(
        profile=profile, workspace_mib=workspace, optimization_level=optimization_level,
        compute_capabilities=compute_capability, hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible, timing_cache=timing_cache,
    )  # fmt: skip
    wanted = _variant(
        precision, runtime, target=target, method=method.value, percentile=percentile,
        calibration=calibration_images or CALIBRATION_IMAGES, keep=tuple(keep or ()), max_batch=max_batch, plan=plan,
    )  # fmt: skip
    alone = source is None and not rounds and not plans
    if factory is not None and precision is Precision.INT8 and images is None:
        raise ValueError("--precision int8: expected --images to calibrate on, got none; a network has none of its own")
    with failures(as_json=as_json):
        if source is not None:
            version = place.parse(source)
        else:
            first = name if alone else f"{name}-fp32"
            network = None
            if factory is not None:
                network = _network(factory, weights, input_shape=input_shape, labels=labels, mean=mean, std=std)
            version = _first(run, network, weights, repository=place, name=first, form=form, terms=terms, alone=alone)
        if not alone:
            if source is None and not as_json:
                console.print(summary.describe(version), soft_wrap=True, markup=False)
            making = Making(version, place, name, wanted, terms)
            version = _made(making, bisect=bisect, as_json=as_json)
    summary.report(version, as_json=as_json)


def import_model(
    model: Annotated[Path, typer.Argument(help="An ONNX classifier; external data lie in its folder.")],
    *,
    repository: RepositoryOption,
    name: NameOption,
    labels: Annotated[
        str | None, typer.Option(help="Class names: a,b,c, or a file with one a line; else those in the file.")
    ] = None,
    takes: InputOption = Input.FLOAT32,
    max_batch: MaxBatchOption = None,
    as_json: JsonOption = False,
    mapping: Annotated[
        Path | None, _option(_MEANING, "TOML file with the same keys as these flags, which overrule it.")
    ] = None,
    input_name: Annotated[str | None, _option(_MEANING, "The image input, where there are several.")] = None,
    output_name: Annotated[str | None, _option(_MEANING, "The output to keep, where there are several.")] = None,
    layout: Annotated[Layout | None, _option(_MEANING, "The order of its input's dimensions.")] = None,
    channels: Annotated[Channels | None, _option(_MEANING, "The order of its input's channels.")] = None,
    white: Annotated[
        float | None, _option(_MEANING, "What white is for it, before mean and std: 1 or 255.", "--range")
    ] = None,
    mean: Annotated[str | None, _option(_MEANING, "Subtracted from images in [0, 1], per channel, RGB.")] = None,
    std: Annotated[str | None, _option(_MEANING, "Then divided by, per channel, RGB.")] = None,
    image_size: Annotated[str | None, _option(_MEANING, "Height, width, where the graph takes any: 224,224.")] = None,
    dynamic_batch: Annotated[
        bool,
        _option(
            _MEANING, "Replace a fixed batch by a dynamic one; proved against the file as it is.", "--dynamic-batch"
        ),
    ] = False,
    probabilities: Annotated[
        bool | None, _option(_MEANING, "Whether its answers are softmax already; by default it is looked at.")
    ] = None,
    resize: ResizeOption = None,
    interpolation: InterpolationOption = Interpolation.BILINEAR,
    images: ImagesOption = None,
    count: CountOption = None,
    max_disagreement: DisagreementOption = None,
    block: BlockOption = False,
) -> None:
    """Import anybody's ONNX classifier, with proof that the engine answers as the file does."""
    from export.manifest import checked_name
    from export.publish import MAX_BATCH, Form, Terms, publish_onnx
    from export.repository import open_repository

    checked_name(name)
    given = {
        "input": input_name, "output": output_name, "layout": layout, "channels": channels, "range": white,
        "mean": _numbers(mean, "mean"), "std": _numbers(std, "std"), "image_size": _whole(image_size, "image-size"),
        "dynamic_batch": dynamic_batch or None, "probabilities": probabilities,
    }  # fmt: skip
    with failures(as_json=as_json):
        version = publish_onnx(
            model,
            repository=open_repository(repository),
            name=name,
            mapping=_mapping(mapping, given),
            labels=labels,
            form=Form(
                takes.value,
                max_batch=max_batch or MAX_BATCH,
                preprocessing=_preprocessing(resize, interpolation),
            ),
            terms=Terms(images=images, count=count, max_disagreement=max_disagreement, block=block),
        )
    summary.report(version, as_json=as_json)


@contextmanager
def failures(*, as_json: bool = False) -> Iterator[None]:
    """Say why a proof failed and on which images, and exit with 1."""
    from export.parity import ParityFailed

    try:
        yield
    except ParityFailed as failed:
        _say(failed, as_json=as_json)
        raise typer.Exit(FAILED) from None


def _say(failed: ParityFailed, *, as_json: bool) -> None:
    complain(str(failed))
    summary.print_proof(failed.result, as_json=as_json)


def _one_alone(sources: dict[str, Any]) -> None:
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"expected one of {', '.join(sources)}, got {' and '.join(given) or 'none of them'}; give one alone"
        )


def _needed_for(what: str, there: bool, flags: dict[str, Any]) -> None:  # noqa: FBT001 - read as a sentence
    """Refuse flags that have no effect without something else."""
    idle = [name for name, value in flags.items() if value not in (None, False, [])]
    if idle and not there:
        raise ValueError(f"--{idle[0]}: has an effect with {what} alone; give that, or leave --{idle[0]} out")


def _first(
    run: Path | None,
    network: Network | None,
    weights: Path | None,
    *,
    repository: Repository,
    name: str,
    form: Form,
    terms: Terms,
    alone: bool,
) -> Version:
    """Publish fp32; to make a variant of, the engine that the repository has of the same weights will do."""
    from export import publish

    if network is not None:
        assert weights is not None
        return publish.publish_network(network, weights, repository=repository, name=name, form=form, terms=terms)
    assert run is not None
    found = None if alone else publish.exported(run, repository=repository, form=form)
    return found or publish.publish_checkpoint(run, repository=repository, name=name, form=form, terms=terms)


def _made(making: Making, *, bisect: bool, as_json: bool) -> Version:
    """Publish a variant, with a plan's build shown; where it fails and that is asked for, find out why."""
    from export.parity import ParityFailed

    try:
        version = making.publish(shown=not as_json)
    except ParityFailed as failed:
        if not bisect:
            raise
        _say(failed, as_json=as_json)
        making.bisect(as_json=as_json)
        raise typer.Exit(FAILED) from None
    if bisect and version.manifest.parity.status == "failed":
        making.bisect(as_json=as_json)
    return version


@dataclass(frozen=True)
class Making:
    """A variant to make: of what, where to, and on which terms."""

    source: Version
    repository: Repository
    name: str
    variant: Variant
    terms: Terms

    def publish(self, *, shown: bool) -> Version:
        """Publish it; the build of a plan takes long enough to be shown."""
        from export.variant import publish_variant

        arguments = {"repository": self.repository, "name": self.name, "variant": self.variant, "terms": self.terms}
        if self.variant.runtime == "onnxruntime" or not shown:
            return publish_variant(self.source, **arguments)  # type: ignore[arg-type]
        with progress("building the plan", total=None) as tick:
            return publish_variant(self.source, **arguments, progress=_seldom(tick))  # type: ignore[arg-type]

    def bisect(self, *, as_json: bool) -> None:
        """Print which layers cost most."""
        from export.variant import bisect

        arguments = {"repository": self.repository, "variant": self.variant, "terms": self.terms}
        if as_json:
            found = bisect(self.source, **arguments)  # type: ignore[arg-type]
        else:
            with progress("layers", total=None) as tick:
                found = bisect(
                    self.source,
                    **arguments,  # type: ignore[arg-type]
                    progress=lambda done, total, layer: tick(done, layer, total=total),
                )
        summary.print_layers(found, as_json=as_json)


def _seldom(tick: Tick) -> Callable[[str, int, int], None]:
    """Return what shows a build's progress: every step on a terminal, a line every few seconds in a log."""
    shown = -math.inf

    def step(phase: str, done: int, total: int) -> None:
        nonlocal shown
        if console.is_terminal or time.monotonic() - shown >= _LOG_SECONDS:
            shown = time.monotonic()
            tick(done, phase, total=total)

    return step


def _variant(precision: Precision | None, runtime: Runtime, *, target: Target | None, **rest: Any) -> Variant:
    from export.variant import Variant

    return Variant(
        precision=None if precision is None else precision.value,
        runtime=runtime.value,
        target=None if target is None else target.value,
        **rest,
    )


def _plan_options(
    *,
    profile: list[str] | None,
    compute_capabilities: list[str] | None,
    hardware_compatibility: HardwareCompatibility | None,
    **rest: Any,
) -> Options:
    from export.tensorrt_plan import Options

    profiles = [_whole(text, "profile") for text in profile or ()]
    return Options(
        profiles=tuple(profiles),  # type: ignore[arg-type]  # three each: Options says so if not
        compute_capabilities=tuple(compute_capabilities or ()),
        hardware_compatibility="none" if hardware_compatibility is None else hardware_compatibility.value,
        **rest,
    )


def _network(
    factory: str,
    weights: Path | None,
    *,
    input_shape: str | None,
    labels: str | None,
    mean: str | None,
    std: str | None,
) -> Network:
    from pydantic import ValidationError

    from export.labels import given
    from export.twin import Network, first_fault

    flags = {"--weights FILE": weights, "--input-shape 3,32,32": input_shape, "--labels a,b,c": labels}
    missing = [flag for flag, value in flags.items() if value is None]
    if missing:
        raise ValueError(f"--factory: expected {missing[0]} with it, got none; a function alone does not tell")
    assert labels is not None
    names = given(labels)
    shape, mean_, std_ = _whole(input_shape, "input-shape"), _numbers(mean, "mean"), _numbers(std, "std")
    if shape is None or len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"--input-shape: expected channels, height and width, as in 3,32,32, got {input_shape!r}")
    if len(names) < 2:
        raise ValueError(f"--labels: expected at least two classes, got {len(names)}; write a,b,c or name a file")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", factory):
        raise ValueError(f"--factory: expected package.module:function, got {factory!r}")
    record = {"factory": factory, "input_shape": shape, "class_names": names, "mean": mean_ or (), "std": std_ or ()}
    try:
        return Network.model_validate(record)
    except ValidationError as error:
        raise ValueError(f"--{first_fault(error).replace('class_names', 'labels').replace('_', '-')}") from None


def _preprocessing(resize: int | None, interpolation: Interpolation) -> Preprocessing:
    return Preprocessing(resize=resize, interpolation=interpolation.value)


def _mapping(path: Path | None, flags: dict[str, Any]) -> Mapping:
    from pydantic import ValidationError

    from export.mapping import Mapping, read_mapping
    from export.twin import first_fault

    base = {} if path is None else read_mapping(path).model_dump(exclude_unset=True)
    given = {
        key: str(value) if isinstance(value, StrEnum) else value for key, value in flags.items() if value is not None
    }
    try:
        return Mapping.model_validate({**base, **given})
    except ValidationError as error:
        raise ValueError(f"--{first_fault(error).replace('_', '-')}") from None


def _numbers(given: str | None, flag: str) -> tuple[float, ...] | None:
    try:
        return None if given is None else tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ValueError(f"--{flag}: expected numbers with commas between them, got {given!r}") from None


def _whole(given: str | None, flag: str) -> tuple[int, ...] | None:
    try:
        return None if given is None else tuple(int(part) for part in given.split(","))
    except ValueError:
        raise ValueError(f"--{flag}: expected whole numbers with commas between them, got {given!r}") from None
