"""The execution providers of ONNX Runtime: what each needs, and is told.

Place --require: GPU? libraries?--> --device_options: shapes, cache--> what an InferenceSession is given

ONNX Runtime itself says why a provider cannot be had on stderr alone, and runs the model on the CPU instead. So what
can be missing is looked for beforehand, and told as `CannotRunHere`.

All of them would round fp32 products to the 10 bits of TensorFloat-32 unless they are told not to: what an engine was
proved with is fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import io
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from functools import cache as once
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from export import manifest as manifests
from export.engines import cuda
from export.engines.base import CannotRunHere
from export.engines.places import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from export.engines.places import Place
    from export.manifest import TensorSpec

_log = logging.getLogger(__name__)

# With "0" here no library of NVIDIA's uses TensorFloat-32. ONNX Runtime's TensorRT providers have no option for it.
_TF32 = "NVIDIA_TF32_OVERRIDE"

# The module of the package onnxruntime-ep-nv-tensorrt-rtx-cu13.
_RTX_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
_RTX_LIBRARY = "libtensorrt_rtx.so.1"

# What each TensorRT provider calls the smallest, the usual and the largest shape of an input.
_PROFILE_OPTIONS = {"tensorrt": "trt_profile_{}_shapes", "nv_tensorrt_rtx": "nv_profile_{}_shapes"}


@dataclass(frozen=True)
class Profile:
    """What TensorRT wants to know before it builds: shapes that come later would make it build again, at that call.

    Attributes:
        image: the input.
        max_batch: the largest batch that will come.
    """

    image: TensorSpec
    max_batch: int


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
        return device | {"use_tf32": "0"}
    built = {} if profile is None else _built(place.provider, profile)
    if cache is None:
        return device | built
    key = {
        "provider": place.provider,
        "onnxruntime": onnxruntime.__version__,
        **asdict(hardware),
        "options": built,
        _TF32: os.environ.get(_TF32),
    }
    return device | built | _cached(place.provider, _folder(cache, {"sha256": manifests.sha256_of(path), **key}))


def _built(provider: str, profile: Profile) -> dict[str, str]:
    """Return the options that engines depend on.

    Neither `trt_fp16_enable` nor `trt_int8_enable` is among them: each makes ONNX Runtime build a network that is not
    strongly typed, and TensorRT may then run in fp16 what was kept in fp32. Without them the graph's types are the
    engine's.
    """

    def shape(batch: int) -> str:
        return f"{profile.image.name}:{'x'.join(map(str, (batch, *profile.image.shape[1:])))}"

    sizes = {"min": 1, "opt": profile.max_batch, "max": profile.max_batch}
    return {_PROFILE_OPTIONS[provider].format(size): shape(batch) for size, batch in sizes.items()}


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
    return nvinfer(int(named[1]), installed=_installed("tensorrt"))


def nvinfer(major: int, *, installed: str | None) -> Any:
    """Load TensorRT's library of a major version, from NVIDIA's package or from the system.

    Args:
        major: the version that ONNX Runtime was built for.
        installed: the version of NVIDIA's package, None if it is not installed.

    Raises:
        CannotRunHere: it is not here; another major version may be.
    """
    name = f"libnvinfer.so.{major}"
    without_tf32(name)
    if installed is not None and installed.partition(".")[0] == str(major):
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt")  # it finds and loads its own libraries
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        found = f"found TensorRT {installed}" if installed else str(error)
        raise CannotRunHere(
            f"provider 'tensorrt': expected TensorRT {major}, for which this ONNX Runtime was built, {found}; choose "
            f"provider 'cuda' or a plan, or install `tensorrt=={major}.*` in an environment without tenet[tensorrt], "
            "whose plans are of a later TensorRT: one environment holds one of them"
        ) from None


def without_tf32(library: str) -> None:
    """Tell NVIDIA's libraries in this process not to use TensorFloat-32, before one of them is loaded and asks.

    Args:
        library: the one that will be loaded, such as "libnvinfer.so.10".
    """
    said = os.environ.get(_TF32)
    if said is not None and said != "0":
        _log.warning("%s is %s: products of fp32 may be rounded to 10 bits; set it to 0 for those of fp32", _TF32, said)
    elif said is None:
        if _loaded(library):
            _log.warning(
                "%s was loaded before it could be told not to round products of fp32 to 10 bits; start this program "
                "with %s=0 in its environment",
                library,
                _TF32,
            )
        os.environ[_TF32] = "0"


def _loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@once
def _rtx_module() -> Any:
    """Load NVIDIA's plug-in and make its provider known to ONNX Runtime, which takes it once a process."""
    without_tf32(_RTX_LIBRARY)
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
        CannotRunHere: the plug-in is missing, or TensorRT for RTX does not support that GPU.
    """
    _rtx_module()
    name = NAMES["nv_tensorrt_rtx"]
    return on_gpu([device for device in onnxruntime.get_ep_devices() if device.ep_name == name], ordinal)


def on_gpu(devices: Sequence[Any], ordinal: int) -> Any:
    """Return the handle of one GPU, by its place on the PCI bus.

    ONNX Runtime lists the GPUs that a provider supports in an order of its own, which is not CUDA's: that leaves out
    what CUDA_VISIBLE_DEVICES hides and may begin with the fastest.

    Args:
        devices: ONNX Runtime's handles of the GPUs that the provider supports.
        ordinal: CUDA's number of the GPU.

    Raises:
        CannotRunHere: none of them is that GPU, or they do not say where they are.
    """
    place = _numbers(cuda.bus_of(ordinal))
    for device in devices:
        if _numbers(_bus(device)) == place:
            return device
    if len(devices) == len(cuda.gpus()) == 1 and not _bus(devices[0]):
        # In a virtual machine that hides the bus; there is no other that it could be.
        return devices[0]
    raise CannotRunHere(
        f"provider 'nv_tensorrt_rtx': expected that TensorRT for RTX supports GPU {ordinal} at {cuda.bus_of(ordinal)}, "
        f"ONNX Runtime lists {_listed(devices)}; choose another device, or provider 'cuda'"
    )


def _bus(device: Any) -> str:
    return str(device.device.metadata.get("pci_bus_id", ""))


def _numbers(bus: str) -> tuple[int, ...]:
    """Return domain, bus, device and function: some write a domain of four digits, and some of eight."""
    found = re.fullmatch(r"([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\.([0-9a-f]+)", bus, re.IGNORECASE)
    return tuple(int(part, 16) for part in found.groups()) if found else ()


def _listed(devices: Sequence[Any]) -> str:
    return ", ".join(_bus(device) or "one whose place it does not know" for device in devices) or "none"


_LIBRARIES: dict[str, Callable[[], str]] = {
    "cuda": _cuda_libraries,
    "tensorrt": _tensorrt_libraries,
    "nv_tensorrt_rtx": _rtx_libraries,
}
