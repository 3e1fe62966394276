"""A stand-in for NVIDIA's two libraries: small and strict. It computes, it counts, and it refuses what they refuse.

`Cuda` is the CUDA runtime's bindings: memory is the host's, streams run at once unless they record, and whatever is
taken and not given back stays in `alive`. `Runtime...` and `Engine` are TensorRT's, for plans of a linear classifier.
"""

# ruff: noqa: N815 - NVIDIA's names

from __future__ import annotations

import ctypes
import enum
import json
import threading
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.export.engines import versions

if TYPE_CHECKING:
    from collections.abc import Callable


class Status(enum.IntEnum):
    """CUDA's errors."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Cuda:
    """`cuda.bindings.runtime`: every function returns its error first.

    Attributes:
        failing: functions that fail from now on, with their errors.
        alive: what was taken and not given back, by its kind.
        used: the GPU that each thread chose.
        records: whether work can be recorded as a graph.
    """

    cudaStreamNonBlocking, cudaHostAllocPortable = 1, 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")

    def __init__(self, *, gpus: int = 1) -> None:
        self._gpus = gpus
        self._blocks: dict[int, Any] = {}
        self._things = 0
        self._recording: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self.failing: dict[str, Status] = {}
        self.alive: dict[int, str] = {}
        self.used: dict[int, int] = {}
        self.records = True
        self.launches = 0

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (Status.cudaSuccess, self._gpus) if self._gpus else (Status.cudaErrorNoDevice, 0)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, 13010

    def cudaGetErrorString(self, _: Status) -> tuple[Any, ...]:
        return Status.cudaSuccess, b"in words"

    def cudaGetDeviceProperties(self, ordinal: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, SimpleNamespace(name=f"Imaginary {ordinal}".encode(), major=8, minor=9)

    def cudaDeviceGetPCIBusId(self, length: int, ordinal: int) -> tuple[Any, ...]:
        assert length >= 13
        # The fastest first, which is not the order of the bus.
        return Status.cudaSuccess, f"0000:{0xC1 - 0x40 * ordinal:02X}:00.0\0\0".encode()

    @property
    def here(self) -> int:
        """The GPU that the calling thread works on."""
        return self.used.get(threading.get_ident(), 0)

    def cudaSetDevice(self, ordinal: int) -> tuple[Any, ...]:
        self.used[threading.get_ident()] = ordinal
        return (self.failing.get("cudaSetDevice", Status.cudaSuccess),)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, self.here

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._taken("cudaMalloc", "memory", ctypes.create_string_buffer(size))

    def cudaHostAlloc(self, size: int, _: int) -> tuple[Any, ...]:
        return self._taken("cudaHostAlloc", "pinned", ctypes.create_string_buffer(size))

    def cudaStreamCreateWithFlags(self, _: int) -> tuple[Any, ...]:
        return self._taken("cudaStreamCreateWithFlags", "stream", None)

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        return self._returned("cudaFree", "memory", pointer)

    def cudaFreeHost(self, pointer: int) -> tuple[Any, ...]:
        return self._returned("cudaFreeHost", "pinned", pointer)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return self._returned("cudaStreamDestroy", "stream", stream)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._returned("cudaGraphDestroy", "recording", graph)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._returned("cudaGraphExecDestroy", "graph", graph)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, _: str, stream: int) -> tuple[Any, ...]:
        assert self.alive[stream] == "stream"
        self.put(lambda: ctypes.memmove(to, source, size))
        return (self.failing.get("cudaMemcpyAsync", Status.cudaSuccess),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert self.alive[stream] == "stream"
        assert self._recording is None, "a stream that records cannot be waited for"
        return (self.failing.get("cudaStreamSynchronize", Status.cudaSuccess),)

    def cudaStreamBeginCapture(self, _stream: int, _mode: str) -> tuple[Any, ...]:
        assert self._recording is None
        self._recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, _stream: int) -> tuple[Any, ...]:
        assert self._recording is not None, "the stream does not record"
        work, self._recording = self._recording, None
        status, thing = self._taken("cudaStreamEndCapture", "recording", None)
        self._graphs[thing] = work
        return status, thing

    def cudaGraphInstantiate(self, recording: int, _: int) -> tuple[Any, ...]:
        if not self.records:
            return Status.cudaErrorStreamCaptureUnsupported, None
        status, thing = self._taken("cudaGraphInstantiate", "graph", None)
        self._graphs[thing] = self._graphs[recording]
        return status, thing

    def cudaGraphLaunch(self, graph: int, _stream: int) -> tuple[Any, ...]:
        assert self.alive[graph] == "graph"
        self.launches += 1
        for work in self._graphs[graph]:
            work()
        return (Status.cudaSuccess,)

    def put(self, work: Callable[[], Any]) -> None:
        """Do work of a stream: now, or whenever what is being recorded is launched."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    @property
    def recording(self) -> bool:
        """Whether the stream records."""
        return self._recording is not None

    def _taken(self, function: str, kind: str, block: Any) -> tuple[Any, ...]:
        if status := self.failing.get(function):
            return status, None
        self._things += 1
        thing = ctypes.addressof(block) if block is not None else self._things
        self._blocks[thing] = block
        self.alive[thing] = kind
        return Status.cudaSuccess, thing

    def _returned(self, function: str, kind: str, thing: int) -> tuple[Any, ...]:
        if status := self.failing.get(function):
            return (status,)
        assert self.alive.pop(thing) == kind
        self._graphs.pop(thing, None)
        self._blocks.pop(thing)
        return (Status.cudaSuccess,)


class _Names(enum.Enum):
    """TensorRT's enumerations, as far as they are used."""

    FLOAT, UINT8, HALF, INPUT, OUTPUT = range(5)


class Context:
    """An execution context: refuses work that is not set up as TensorRT asks for it."""

    def __init__(self, engine: Engine, *, needs_memory: bool) -> None:
        self._engine = engine
        self._memory: int | None = None if needs_memory else 0
        self._addresses: dict[str, int] = {}
        self._range: list[int] = []
        self._batch = 0
        self._seen: set[int] = set()
        self._recorded: int | None = None

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size == self._engine.device_memory_size_v2
        self._memory = pointer

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self._range = self._engine.plan["profiles"][index]
        self._engine.profiles_used.append(index)
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._addresses[name] = pointer
        return name in {"images", "logits"}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        self._batch = shape[0]
        # A graph is only good for as long as its context stays as it was.
        assert self._recorded in {None, self._batch}
        return self._range[0] <= shape[0] <= self._range[2]

    def execute_async_v3(self, _stream: int) -> bool:
        cuda, batch = self._engine.cuda, self._batch
        if self._engine.refusing:
            self._engine.say("ERROR", "out of tactics")
            return False
        # Work that is put off to the first time must not be recorded.
        if self._memory is None or (cuda.recording and batch not in self._seen):
            return False
        self._seen.add(batch)
        if cuda.recording:
            self._recorded = batch
        cuda.put(lambda: self._compute(batch))
        return True

    def _compute(self, batch: int) -> None:
        stored = self._engine.plan["inputs"]["images"][0] == "UINT8"
        shape = (batch, *self._engine.plan["inputs"]["images"][1][1:])
        kind = ctypes.c_uint8 if stored else ctypes.c_float
        size = int(np.prod(shape))
        images = np.ctypeslib.as_array((kind * size).from_address(self._addresses["images"])).reshape(shape)
        if stored:
            images = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        answers = versions.answers(np.ascontiguousarray(images))
        ctypes.memmove(self._addresses["logits"], answers.ctypes.data, answers.nbytes)


class Engine:
    """An engine of a plan: JSON that says its tensors and profiles."""

    device_memory_size_v2 = 1024

    def __init__(self, plan: dict[str, Any], cuda: Cuda, say: Callable[[str, str], None]) -> None:
        self.plan = plan
        self.cuda = cuda
        self.say = say
        self.refusing = False
        self.profiles_used: list[int] = []
        self.num_optimization_profiles = len(plan["profiles"])
        self._tensors = {**plan["inputs"], **plan["outputs"]}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        names: list[str] = list(self._tensors)
        return names[index]

    def get_tensor_mode(self, name: str) -> _Names:
        return _Names.INPUT if name in self.plan["inputs"] else _Names.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self._tensors[name][0])

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self._tensors[name][1])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        rest = self._tensors[name][1][1:]
        return [[size, *rest] for size in self.plan["profiles"][index]]

    def create_execution_context(self, strategy: str = "static", *, runtime_config: Any = None) -> Context:
        if runtime_config is not None:
            assert runtime_config.cache is not None
        return Context(self, needs_memory=strategy == "user managed")

    def create_runtime_config(self) -> Any:
        return RuntimeConfig(self.cuda)


class RuntimeConfig:
    """`tensorrt_rtx`'s settings of a context, and its runtime cache, which takes what begins with `kernels`."""

    cuda_graph_strategy = "unset"
    cache: Any = None

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._cuda)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Remembers how often it was taken up again."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._gpu = cuda.here
        self._content = b"kernels"

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(b"kernels"):
            return False
        self._content = content + b"+"
        return True

    def serialize(self) -> bytes:
        assert self._cuda.here == self._gpu, "the kernels are another GPU's"
        if "serialize" in self._cuda.failing:
            raise RuntimeError("the cache cannot be serialised")
        return self._content


class TensorRt(ModuleType):
    """`tensorrt` or `tensorrt_rtx`."""

    __version__ = "11.4.1.5"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")
    EngineValidity = SimpleNamespace(INVALID=2)
    EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})

    class ILogger:
        """What a logger inherits from."""

    def __init__(self, name: str, cuda: Cuda) -> None:
        super().__init__(name)
        self.cuda = cuda
        self.engines: list[Engine] = []
        self.invalid = 0

    def Runtime(self, logger: Any) -> Any:
        """Make what deserialises plans."""
        return SimpleNamespace(
            engine_header_size=8,
            get_engine_validity=lambda _: (2 if self.invalid else 0, self.invalid),
            deserialize_cuda_engine=lambda content: self._deserialised(bytes(content), logger),
        )

    def _deserialised(self, content: bytes, logger: Any) -> Engine | None:
        def say(severity: str, text: str) -> None:
            logger.log(SimpleNamespace(name=severity), text)

        try:
            plan = json.loads(content)
        except ValueError:
            say("ERROR", "Serialization (magic tag does not match)")
            return None
        self.engines.append(Engine(plan, self.cuda, say))
        return self.engines[-1]
