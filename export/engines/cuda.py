"""One GPU, by NVIDIA's own bindings of the CUDA runtime: errors are exceptions, what is taken is given back.

Gpu: what it is --> Device: streams, memory on both sides, graphs --> TensorRT engines

Nothing here imports the bindings before it needs them, and without a driver there are no GPUs: no error.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from export.engines.base import CannotRunHere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

_BINDINGS = "cuda.bindings.runtime"

# Characters that CUDA may write of a place on the PCI bus, the zero at the end included; it asks for 13 at least.
_BUS_NAME = 32


class CudaError(RuntimeError):
    """CUDA refused a call, or failed in an earlier one."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU is: its name, and its compute capability, such as "8.9"."""

    name: str
    compute_capability: str


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use, in the order of their numbers; none without a driver."""
    api = _bindings()
    if api is None:
        return ()
    failed, count = api.cudaGetDeviceCount()
    return () if failed else tuple(_gpu(api, ordinal) for ordinal in range(count))


def current_gpu() -> Gpu | None:
    """Return the GPU that the calling thread works on, number 0 unless it chose another; None without one."""
    api = _bindings()
    if api is None:
        return None
    failed, ordinal = api.cudaGetDevice()
    return None if failed else _gpu(api, ordinal)


def bus_of(ordinal: int) -> str:
    """Return where on the PCI bus a GPU is, in CUDA's words, such as "0000:65:00.0".

    Raises:
        CudaError: there is no such GPU, or no driver.
    """
    api = _bindings()
    if api is None:
        raise CudaError("cudaDeviceGetPCIBusId: NVIDIA's CUDA bindings are not installed")
    failed, name = api.cudaDeviceGetPCIBusId(_BUS_NAME, ordinal)
    if failed:
        raise CudaError(f"cudaDeviceGetPCIBusId: CUDA says {_words(api, failed)}")
    return str(name.partition(b"\0")[0].decode(errors="replace"))


def driver_version() -> str | None:
    """Return the newest CUDA version that the driver takes, such as "13.0"; None without a driver."""
    api = _bindings()
    if api is None:
        return None
    failed, version = api.cudaDriverGetVersion()
    # Zero is CUDA's way to say that there is no driver.
    return None if failed or not version else f"{version // 1000}.{version % 1000 // 10}"


class Device:
    """One GPU of this machine; its methods work on whatever thread calls them, after `use`."""

    def __init__(self, ordinal: int = 0) -> None:
        api = _bindings()
        if api is None:
            raise CannotRunHere("TensorRT engines need NVIDIA's CUDA bindings; `pip install cuda-bindings`")
        failed, count = api.cudaGetDeviceCount()
        if failed or count == 0:
            reason = _words(api, failed) if failed else "there are none"
            raise CannotRunHere(
                f"TensorRT engines need an NVIDIA GPU, and CUDA finds none on this machine ({reason}); "
                "run this on a machine with one, or use the ONNX engine"
            )
        if not 0 <= ordinal < count:
            raise CannotRunHere(f"device 'cuda:{ordinal}': expected 'cuda:0' to 'cuda:{count - 1}' on this machine")
        self.api = api
        self.ordinal = ordinal
        self.use()

    @property
    def gpu(self) -> Gpu:
        """What the GPU is."""
        return _gpu(self.api, self.ordinal)

    def use(self) -> None:
        """Make it the calling thread's current GPU: CUDA and TensorRT work on that one."""
        self("cudaSetDevice", self.ordinal)

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its result, None where it has none.

        Raises:
            CudaError: with the function's name and CUDA's words.
        """
        failed, *results = getattr(self.api, function)(*arguments)
        if failed:
            raise CudaError(f"{function}: CUDA says {_words(self.api, failed)}")
        return results[0] if results else None

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Make a stream that does not wait for the default one; it is destroyed at the end of the block."""
        stream = self("cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking)
        with self._returning("cudaStreamDestroy", stream):
            yield int(stream)

    @contextmanager
    def memory(self, size: int) -> Iterator[int]:
        """Take `size` bytes of the GPU's memory, at least one."""
        pointer = self("cudaMalloc", max(1, size))
        with self._returning("cudaFree", pointer):
            yield int(pointer)

    @contextmanager
    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[np.ndarray[Any, Any]]:
        """Take host memory that the GPU reads and writes by itself; the array must not be used after the block."""
        size = int(np.prod(shape)) * dtype.itemsize
        pointer = self("cudaHostAlloc", size, self.api.cudaHostAllocPortable)
        with self._returning("cudaFreeHost", pointer):
            content = memoryview((ctypes.c_byte * size).from_address(int(pointer)))
            yield np.frombuffer(content, dtype=dtype).reshape(shape)

    def copy_to_gpu(self, pointer: int, array: np.ndarray[Any, Any], stream: int) -> None:
        """Start to copy pinned memory to the GPU."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, stream)

    def copy_to_host(self, array: np.ndarray[Any, Any], pointer: int, stream: int) -> None:
        """Start to copy from the GPU to pinned memory."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, stream)

    def synchronise(self, stream: int) -> None:
        """Wait until all that was put into the stream is done."""
        self("cudaStreamSynchronize", stream)

    def captured(self, work: Callable[[], None], stream: int) -> Any:
        """Record what `work` puts into the stream, without doing it, as a graph that one call launches.

        Returns:
            The graph, for `launch`, and for `destroy` at last.

        Raises:
            CudaError: something in it cannot be recorded. The stream is as usable as before.
        """
        # Other threads may go on to allocate; in the global mode that would spoil this recording.
        self("cudaStreamBeginCapture", stream, self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            # A recording is always ended, or the stream would stay in it. What was recorded so far is of no use.
            with suppress(CudaError):
                self("cudaGraphDestroy", self("cudaStreamEndCapture", stream))
            raise
        graph = self("cudaStreamEndCapture", stream)
        with self._returning("cudaGraphDestroy", graph):
            return self("cudaGraphInstantiate", graph, 0)

    def launch(self, graph: Any, stream: int) -> None:
        """Start to do what was recorded."""
        self("cudaGraphLaunch", graph, stream)

    def destroy(self, graph: Any) -> None:
        """Give a graph back; what goes wrong is logged."""
        with self._returning("cudaGraphExecDestroy", graph):
            pass

    @contextmanager
    def _returning(self, function: str, thing: Any) -> Iterator[None]:
        """Give a thing back at the end of the block; what goes wrong then is logged, so that the rest goes back too."""
        try:
            yield
        finally:
            try:
                self.use()
                self(function, thing)
            except CudaError as error:
                _log.warning("%s", error)


def _bindings() -> Any:
    try:
        return importlib.import_module(_BINDINGS)
    except ImportError:
        return None


def _gpu(api: Any, ordinal: int) -> Gpu:
    failed, properties = api.cudaGetDeviceProperties(ordinal)
    if failed:
        raise CudaError(f"cudaGetDeviceProperties: CUDA says {_words(api, failed)}")
    return Gpu(properties.name.decode(errors="replace"), f"{properties.major}.{properties.minor}")


def _words(api: Any, error: Any) -> str:
    _, words = api.cudaGetErrorString(error)
    return f"{error.name}: {words.decode(errors='replace')}"
