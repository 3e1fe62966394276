"""The execution providers of ONNX Runtime: what each needs, and is told.

Place --require: GPU? libraries?--> --device_options: shapes, cache--> what an InferenceSession is given

ONNX Runtime itself says why a provider cannot be had on stderr alone, and runs the model on the CPU instead. So what
can be missing is looked for beforehand, and told as `CannotRunHere`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import io
import json
import re
from dataclasses import asdict, dataclass
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from export import manifest as manifests
from export.engines import cuda
from export.engines.base import CannotRunHere
from export.engines.places import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.engines.places import Place
    from export.manifest import Precision, TensorSpec

# The module of the package onnxruntime-ep-nv-tensorrt-rtx-cu13.
_RTX_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"

# What each TensorRT provider calls the smallest, the usual and the largest shape of an input.
_PROFILE_OPTIONS = {"tensorrt": "trt_profile_{}_shapes", "nv_tensorrt_rtx": "nv_profile_{}_shapes"}


@dataclass(frozen=True)
class Profile:
    """What TensorRT wants to know before it builds: shapes that come later would make it build again, at that call.

    Attributes:
        image: the input.
        max_batch: the largest batch that will come.
        precision: of the graph.
    """

    image: TensorSpec
    max_batch: int
    precision: Precision


@dataclass(frozen=True)
class Hardware:
    """What engines are built for: a GPU, and the version of the TensorRT that builds them, if any does."""

    gpu: str
    tensorrt: str


def require(place: Place) -> Hardware:
    """Return what is here, once everything that a provider on a GPU needs has been found.

    Raises:
        CannotRunHere: names what is missing.
    """
    gpu = _gpu_at(place)
    return Hardware(gpu, _LIBRARIES[place.provider]())


def device_options(
    path: Path, place: Place, *, cache: Path | None, profile: Profile | None, hardware: Hardware
) -> dict[str, str]:
    """Return the options of a provider on a GPU.

    Args:
        path: the model's file.
        place: the provider and the GPU.
        cache: where engines that TensorRT builds are kept; None to build at every start.
        profile: the shapes that will come; None to let TensorRT find out.
        hardware: what is here.
    """
    device = {} if place.provider == "nv_tensorrt_rtx" else {"device_id": str(place.ordinal)}
    if place.provider == "cuda":
        return device
    built = {} if profile is None else _built(place.provider, profile)
    if cache is None:
        return device | built
    key = {"provider": place.provider, "onnxruntime": onnxruntime.__version__, **asdict(hardware), "options": built}
    return device | built | _cached(place.provider, _folder(cache, {"sha256": manifests.sha256_of(path), **key}))


def _built(provider: str, profile: Profile) -> dict[str, str]:
    """Return the options that engines depend on."""

    def shape(batch: int) -> str:
        return f"{profile.image.name}:{'x'.join(map(str, (batch, *profile.image.shape[1:])))}"

    sizes = {"min": 1, "opt": profile.max_batch, "max": profile.max_batch}
    options = {_PROFILE_OPTIONS[provider].format(size): shape(batch) for size, batch in sizes.items()}
    if provider == "tensorrt":
        # TensorRT 10 takes a lower precision only if it is told so, even where the graph asks for it.
        options["trt_fp16_enable"] = str(int(profile.precision == "fp16"))
        options["trt_int8_enable"] = str(int(profile.precision == "int8"))
    return options


def _folder(cache: Path, key: dict[str, Any]) -> Path:
    """Return a folder for the engines of one model, on one kind of GPU, with one software: made if it is missing.

    The providers tell engines apart by the names in a graph and not by its weights: in a folder that is shared, a
    model that was trained again would get the engine of its predecessor.
    """
    text = json.dumps(key, indent=2, sort_keys=True)
    folder = cache / "onnxruntime" / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key.json").write_text(text + "\n")
    return folder


def _cached(provider: str, folder: Path) -> dict[str, str]:
    if provider == "nv_tensorrt_rtx":
        return {"nv_runtime_cache_path": str(folder)}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _gpu_at(place: Place) -> str:
    found = cuda.gpus()
    if place.ordinal < len(found):
        return f"{found[place.ordinal].name}, compute capability {found[place.ordinal].compute_capability}"
    if not found:
        raise CannotRunHere(
            f"provider {place.provider!r}: expected an NVIDIA GPU, and CUDA finds none on this machine; choose device "
            "'cpu', or run this on a machine with a GPU, its driver and `pip install tenet[gpu]`"
        )
    raise CannotRunHere(
        f"device 'cuda:{place.ordinal}': expected 'cuda:0' to 'cuda:{len(found) - 1}' on this machine; choose one of "
        "them"
    )


@once
def _cuda_libraries() -> str:
    """Load the CUDA libraries, from NVIDIA's packages or the system, as the provider's own loading does not."""
    if NAMES["cuda"] not in onnxruntime.get_available_providers():
        raise CannotRunHere("provider 'cuda': this build of ONNX Runtime has no CUDA; install onnxruntime-gpu")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    if failed := re.search(r"^Failed to load \S+?: (.+)$", said.getvalue(), re.MULTILINE):
        raise CannotRunHere(
            f"provider 'cuda': the CUDA libraries are not complete: {failed[1]}; "
            "install them with `pip install tenet[gpu]`"
        )
    return ""


def _tensorrt_libraries() -> str:
    _cuda_libraries()
    return str(_nvinfer().getInferLibVersion())


def _rtx_libraries() -> str:
    return str(_rtx_module().__version__)


@once
def _nvinfer() -> Any:
    """Load the library of the very TensorRT that this ONNX Runtime was built for."""
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    named = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes()) if library.is_file() else None
    if named is None:
        raise CannotRunHere("provider 'tensorrt': this build of ONNX Runtime has no TensorRT; choose provider 'cuda'")
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt")  # NVIDIA's package finds and loads its own libraries
    try:
        return ctypes.CDLL(named[0].decode())
    except OSError as error:
        major = named[1].decode()
        raise CannotRunHere(
            f"provider 'tensorrt': expected TensorRT {major}, for which this ONNX Runtime was built: {error}; "
            f"install `tensorrt=={major}.*`, or choose provider 'cuda'"
        ) from None


@once
def _rtx_module() -> Any:
    """Load NVIDIA's plug-in and make its provider known to ONNX Runtime, which takes it once a process."""
    try:
        module = importlib.import_module(_RTX_MODULE)
    except ImportError:
        raise CannotRunHere(
            "provider 'nv_tensorrt_rtx': its plug-in is not installed; "
            "install it with `pip install tenet[tensorrt-rtx-provider]`"
        ) from None
    try:
        onnxruntime.register_execution_provider_library(NAMES["nv_tensorrt_rtx"], module.get_library_path())
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions have no class in common
        # Somebody else in this process may have registered it.
        if "already registered" not in str(error).lower():
            reason = str(error).splitlines()[0]
            raise CannotRunHere(f"provider 'nv_tensorrt_rtx': its plug-in cannot be loaded: {reason}") from None
    return module


def rtx_device(ordinal: int) -> Any:
    """Return ONNX Runtime's handle of a GPU for the plug-in provider.

    Raises:
        CannotRunHere: the plug-in or such a GPU is missing.
    """
    _rtx_module()
    name = NAMES["nv_tensorrt_rtx"]
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if len(devices) <= ordinal:
        raise CannotRunHere(
            f"provider 'nv_tensorrt_rtx': expected a GPU of number {ordinal} that TensorRT for RTX supports, counted "
            f"from 0, found {len(devices)}; choose provider 'cuda'"
        )
    return devices[ordinal]


_LIBRARIES: dict[str, Callable[[], str]] = {
    "cuda": _cuda_libraries,
    "tensorrt": _tensorrt_libraries,
    "nv_tensorrt_rtx": _rtx_libraries,
}
