"""What Triton reads beside the versions of a model: config.pbtxt, and labels.txt with the names of the classes.

the model's manifests --newest servable one, and those like it--> config.pbtxt: tensors, batching, versions to load

Triton loads the versions that config.pbtxt lists and no others, so an engine without its proof is never served by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from export.manifest import Manifest, TensorSpec

CONFIG = "config.pbtxt"
LABELS = "labels.txt"

_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "tensorrt_rtx": "tensorrt_plan"}

# Microseconds that a request waits for others to share a batch with: long enough for concurrent clients to meet,
# short beside an inference, which takes milliseconds.
_QUEUE_DELAY_US = 100

# Smaller batches are not worth stopping at: the cost of a call outweighs that of its images.
_SMALLEST_PREFERRED = 4

# Triton reads labels by lines; a name with one of these could not be told from two.
_LINE_ENDS = ("\n", "\r")

_NOTHING_SERVABLE = (
    "# No version is listed, so Triton refuses to load this model: none has its proof of parity.\n"
    "# `tenet models verify` completes it.\n"
)
_NOT_FOR_TRITON = (
    "# No version is listed, so Triton refuses to load this model: its backend `tensorrt` cannot read TensorRT-RTX\n"
    "# plans. `tenet serve` serves them; for Triton, export the model with --runtime tensorrt or onnxruntime.\n"
)


def files_of(model: str, manifests: Iterable[Manifest]) -> dict[str, bytes]:
    """Return the files beside a model's versions, by name."""
    ordered = sorted(manifests, key=lambda manifest: manifest.version)
    files = {CONFIG: config_of(model, ordered).encode()}
    if ordered and _has_labels(_described(ordered)):
        files[LABELS] = "".join(f"{name}\n" for name in _described(ordered).class_names).encode()
    return files


def steps_to(files: dict[str, bytes], *, labels: bytes | None) -> list[tuple[str, bytes | None]]:
    """Return the writes that bring a model's folder to these files; None removes one.

    Whatever write is the last before a crash, no config.pbtxt names labels that are another version's.

    Args:
        files: what is to be there.
        labels: the labels.txt that is there.
    """
    wanted = files.get(LABELS)
    final: list[tuple[str, bytes | None]] = [(CONFIG, files[CONFIG])]
    if wanted == labels:
        return final
    if wanted is None:
        return [*final, (LABELS, None)]
    without = files[CONFIG].replace(_label_line().encode(), b"")
    first: list[tuple[str, bytes | None]] = [] if labels is None else [(CONFIG, without)]
    return [*first, (LABELS, wanted), *final]


def config_of(model: str, manifests: Sequence[Manifest]) -> str:
    """Return the config.pbtxt with which Triton serves a model.

    Args:
        model: its name.
        manifests: of all its versions, ascending. The newest servable one is described; the others that are servable
            and take and answer the same are listed with it. An empty list of versions makes Triton refuse the model
            ("at least one version must be available under the version policy"), while without a policy it would load
            the newest version, proved or not.
    """
    if not manifests:
        return f"{_NOTHING_SERVABLE}name: {_quoted(model)}\n{_versions([])}"
    described = _described(manifests)
    loadable = described.servable and described.runtime != "tensorrt_rtx"
    alike = [m.version for m in manifests if m.servable and _signature(m) == _signature(described)]
    lines = [
        _NOT_FOR_TRITON if described.runtime == "tensorrt_rtx" else "" if loadable else _NOTHING_SERVABLE,
        f"name: {_quoted(model)}\n",
        f"platform: {_quoted(_PLATFORMS[described.runtime])}\n",
        f"default_model_filename: {_quoted(described.file)}\n",
        f"max_batch_size: {described.max_batch}\n",
        _tensors("input", described.inputs),
        _tensors("output", described.outputs, extra=_label_line() if _has_labels(described) else ""),
        f"instance_group [\n  {{ {_instances(described)} }}\n]\n",
        f"dynamic_batching {{\n  preferred_batch_size: {_preferred(described.max_batch)}\n"
        f"  max_queue_delay_microseconds: {_QUEUE_DELAY_US}\n}}\n",
        _versions(alike if loadable else []),
    ]
    return "".join(lines)


def _described(manifests: Sequence[Manifest]) -> Manifest:
    """Return the newest servable manifest, or the newest where none is."""
    return next((m for m in reversed(manifests) if m.servable), manifests[-1])


def _signature(manifest: Manifest) -> tuple[object, ...]:
    """Return what two versions must share to be served under one configuration."""
    return (
        manifest.file,
        manifest.runtime,
        manifest.inputs,
        manifest.outputs,
        manifest.output,
        manifest.class_names,
        manifest.max_batch,
        _instances(manifest),
    )


def _has_labels(manifest: Manifest) -> bool:
    return not any(end in name for name in manifest.class_names for end in _LINE_ENDS)


def _instances(manifest: Manifest) -> str:
    """Return what an instance is: where it runs, and which optimisation profiles of a plan it may use.

    Without their names Triton takes the first profile alone, which may be that of single images. Of those that are
    named it takes the one that fits a batch best.
    """
    if manifest.file == "model.plan":
        profiles = manifest.build.options.get("profiles")
        named = [f'"{index}"' for index in range(len(profiles))] if isinstance(profiles, list) else []
        return "kind: KIND_GPU" + (f" profile: [{', '.join(named)}]" if named else "")
    if manifest.quantization is not None and manifest.quantization.target == "cpu":
        return "kind: KIND_CPU"
    return "kind: KIND_AUTO"


def _preferred(max_batch: int) -> list[int]:
    """Return the powers of two up to the largest batch, and that: sizes at which a batch is sent without waiting."""
    powers = (1 << exponent for exponent in range(max_batch.bit_length()))
    return sorted({*(size for size in powers if _SMALLEST_PREFERRED <= size <= max_batch), max_batch})


def _versions(versions: list[int]) -> str:
    return f"version_policy {{ specific {{ versions: {versions} }} }}\n"


def _label_line() -> str:
    return f"    label_filename: {_quoted(LABELS)}\n"


def _tensors(field: str, specs: tuple[TensorSpec, ...], *, extra: str = "") -> str:
    entries = (
        f"  {{\n    name: {_quoted(spec.name)}\n    data_type: TYPE_{spec.datatype}\n"
        f"    dims: {list(spec.shape[1:])}\n{extra}  }}"
        for spec in specs
    )
    return f"{field} [\n" + ",\n".join(entries) + "\n]\n"


def _quoted(text: str) -> str:
    """Return a string of the protobuf text format: printable ASCII as it is, every other byte as an octal escape."""
    escaped = (chr(byte) if 0x20 <= byte < 0x7F and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(escaped)}"'
