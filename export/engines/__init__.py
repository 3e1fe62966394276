"""Open an engine and run it, whatever its runtime; never imports torch.

<version>/ --sha256--> manifest --requirements--> ort | trt --warm-up--> Engine: images -> logits
                                  --not met, and allowed--> rebuilt --^
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from export import manifest as manifests
from export import requirements
from export.engines import places
from export.engines.base import CannotRunHere, Engine
from export.engines.threads import budget

if TYPE_CHECKING:
    from export.engines.places import Place
    from export.manifest import Manifest

_log = logging.getLogger(__name__)

Rebuild = Literal["never", "auto"]


def open_engine(
    version_folder: Path,
    *,
    device: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    instances: int = 1,
    rebuild: Rebuild = "never",
    cache: Path | None = None,
) -> Engine:
    """Open the engine of one published version, warmed up.

    Args:
        version_folder: `<repository>/<model>/<version>`.
        device: "cpu", "cuda", or "cuda:N" for GPU N counted from 0. By default where it belongs: the CPU for an ONNX
            file, the first GPU for a plan.
        provider: what runs an ONNX file: "cpu", "cuda", "tensorrt" or "nv_tensorrt_rtx"; the device's own by
            default. A plan has its runtime, whatever is said here.
        threads: CPU threads that one call may use; the process's share of the machine divided by `instances` if None.
        instances: engines that will run at once in this process.
        rebuild: "auto" to build a plan that cannot run here, by its manifest or by what the runtime says of it, again
            from the ONNX file beside it.
        cache: where rebuilt plans, and engines of TensorRT providers, are kept; `default_cache()` if None.

    Raises:
        FileNotFoundError: manifest or engine file is missing.
        ValueError: the sha256 differs from the manifest, the runtime cannot take the file, or there is no such device
            or provider.
        CannotRunHere: this machine lacks what the runtime asked for needs: a GPU, a library, a version; or the runtime
            itself does not take the plan.
        RuntimeError: another runtime would have run it, or the runtime failed.
    """
    place = places.placed(device=device, provider=provider)
    manifest = manifests.verify(version_folder)
    cache = cache or default_cache()
    if manifest.runtime == "onnxruntime":
        requirements.check(manifest)
        engine = _onnx(version_folder, manifest, place=place, threads=threads, instances=instances, cache=cache)
    else:
        ordinal = _gpu(manifest, device)
        engine = _plan(version_folder, manifest, ordinal=ordinal, rebuild=rebuild, cache=cache)
    try:
        engine.warm_up()
    except BaseException:
        # Nobody else knows of it yet: what it holds of a GPU's memory would stay taken.
        engine.close()
        raise
    return engine


def default_cache() -> Path:
    """Return where engines that were made on this machine are kept: `$XDG_CACHE_HOME/tenet/engines`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenet" / "engines"


def _onnx(
    folder: Path, manifest: Manifest, *, place: Place, threads: int | None, instances: int, cache: Path
) -> Engine:
    from export.engines.ort import OrtEngine  # noqa: PLC0415 - each runtime is a heavy import of its own

    return OrtEngine(folder, manifest, place=place, threads=threads or budget(instances), cache=cache)


def _plan(folder: Path, manifest: Manifest, *, ordinal: int, rebuild: Rebuild, cache: Path) -> Engine:
    from export.engines.trt import TrtEngine  # noqa: PLC0415 - as above

    try:
        requirements.check(manifest, ordinal=ordinal)
        return TrtEngine(folder, manifest, ordinal=ordinal, cache=cache)
    except CannotRunHere as refusal:
        if rebuild == "never":
            raise
        _log.info("%s", refusal)
    from export import rebuild as builder  # noqa: PLC0415 - as above, and rare

    folder = builder.rebuilt(folder, manifest, cache=cache, ordinal=ordinal)
    # Once: a plan that was built here and is refused all the same is told as it is.
    return TrtEngine(folder, manifests.verify(folder), ordinal=ordinal, cache=cache)


def _gpu(manifest: Manifest, device: str | None) -> int:
    """Return the number of the GPU that a plan runs on."""
    ordinal = 0 if device is None else places.ordinal_of(device)
    if ordinal is None:
        raise ValueError(
            f"{manifest.model}: expected device 'cuda' for a plan of {manifest.runtime}, got {device!r}; choose a GPU, "
            "or the ONNX model"
        )
    return ordinal
