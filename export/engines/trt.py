"""TensorRT engines: one implementation over `tensorrt` and `tensorrt_rtx`, which share their API.

plan --deserialise--> engine --context, stream--> copy in, enqueue, copy out
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from export.engines.base import CannotRunHere, Engine, Images, Logits

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import Manifest


def import_runtime(name: str) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises:
        RuntimeError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = name.replace("_", "-")
        raise CannotRunHere(
            f"runtime {name!r} is not installed here; install it with `pip install tenet[{extra}]`"
        ) from error


def collecting_logger(trt: Any) -> Any:
    """Return a logger that keeps TensorRT's errors in `.errors`: its API returns None where it should raise."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                self.errors.append(message)

    return CollectingLogger()


class TrtEngine(Engine):
    """A TensorRT plan on the current GPU; calls from several threads take turns."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(manifest)
        trt = import_runtime(manifest.runtime)
        self._cuda = _Cuda()
        self._lock = Lock()
        logger = collecting_logger(trt)
        # TensorRT requires that logger and runtime outlive the engine.
        self._runtime = trt.Runtime(logger), logger
        self._engine = self._runtime[0].deserialize_cuda_engine((folder / manifest.file).read_bytes())
        if self._engine is None:
            reason = logger.errors[0] if logger.errors else "no reason given"
            raise ValueError(
                f"{folder / manifest.file}: expected a plan for {manifest.runtime} {trt.__version__}, got one of "
                f"{manifest.build.get('runtime_version', 'an unknown version')}: {reason}; build it again here"
            )
        self._context = _made(self._engine.create_execution_context(), "an execution context", logger)
        self._input, self._output = manifest.inputs[0].name, manifest.outputs[0].name
        self._answers = np.empty((manifest.max_batch, *manifest.outputs[0].shape[1:]), dtype=np.float32)
        image_bytes = np.dtype(np.float32).itemsize * int(np.prod(manifest.image_shape))
        with ExitStack() as made:
            self._stream = self._cuda.call("cudaStreamCreate")
            made.callback(self._cuda.call, "cudaStreamDestroy", self._stream)
            self._device_images = self._allocate(made, manifest.max_batch * image_bytes)
            self._device_answers = self._allocate(made, self._answers.nbytes)
            _made(self._context.set_tensor_address(self._input, int(self._device_images)), self._input, logger)
            _made(self._context.set_tensor_address(self._output, int(self._device_answers)), self._output, logger)
            self._made = made.pop_all()

    def _allocate(self, made: ExitStack, size: int) -> Any:
        pointer = self._cuda.call("cudaMalloc", size)
        made.callback(self._cuda.call, "cudaFree", pointer)
        return pointer

    def _run(self, images: Images) -> Logits:
        images = np.ascontiguousarray(images)
        kinds = self._cuda.api.cudaMemcpyKind
        with self._lock:
            answers = self._answers[: len(images)]
            taken = self._context.set_input_shape(self._input, images.shape)
            to_device = self._device_images, images.ctypes.data, images.nbytes, kinds.cudaMemcpyHostToDevice
            self._cuda.call("cudaMemcpyAsync", *to_device, self._stream)
            if not taken or not self._context.execute_async_v3(int(self._stream)):
                raise RuntimeError(f"{self.manifest.model}: TensorRT could not enqueue a batch of {len(images)}")
            to_host = answers.ctypes.data, self._device_answers, answers.nbytes, kinds.cudaMemcpyDeviceToHost
            self._cuda.call("cudaMemcpyAsync", *to_host, self._stream)
            self._cuda.call("cudaStreamSynchronize", self._stream)
            return answers.copy()

    def close(self) -> None:
        """Free the device's buffers, then the engine; a second call does nothing."""
        with self._lock:
            self._made.close()
            self._context = self._engine = None


def _made(result: Any, what: str, logger: Any) -> Any:
    """Return what TensorRT made; its API returns None or False where it should raise."""
    if not result:
        raise RuntimeError(f"TensorRT could not set up {what}: {'; '.join(logger.errors) or 'no reason given'}")
    return result


class _Cuda:
    """The CUDA runtime through NVIDIA's own bindings, errors as exceptions."""

    def __init__(self) -> None:
        try:
            self.api = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise CannotRunHere("TensorRT engines need NVIDIA's CUDA bindings; `pip install cuda-bindings`") from error
        error_code, count = self.api.cudaGetDeviceCount()
        if int(error_code) != 0 or count == 0:
            raise CannotRunHere(
                f"TensorRT engines need an NVIDIA GPU, and CUDA finds none on this machine ({error_code.name}); "
                "run this on a machine with one, or use the ONNX engine"
            )

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its result."""
        error_code, *results = getattr(self.api, function)(*arguments)
        if int(error_code) != 0:
            raise RuntimeError(f"{function}: CUDA says {error_code.name}")
        return results[0] if results else None
