"""TensorRT engines: one implementation over `tensorrt` and `tensorrt_rtx`, which share their API.

plan --deserialise, compare with the manifest--> engine --tightest profile--> context
batch --> pinned memory --stream: copy, kernels, copy--> pinned memory --> answers

`tensorrt` has a CUDA graph of that for each batch size, recorded when the size is first used. `tensorrt_rtx` records
graphs itself, because its compiler goes on to replace kernels, and keeps what it compiled in a runtime cache.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from export.engines import plans
from export.engines.base import DTYPES, CannotRunHere, Engine, Inputs, Logits
from export.engines.cuda import CudaError, Device
from export.engines.messages import heard, import_runtime
from export.store import atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from export.engines.messages import Messages
    from export.engines.plans import Plan, Profile
    from export.manifest import Manifest

_log = logging.getLogger(__name__)

# Batch sizes with a graph of their own: all of an engine of the usual largest batch. A graph takes some megabytes.
MAX_GRAPHS = 64


class TrtEngine(Engine):
    """A TensorRT plan on one GPU; calls from several threads take turns."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        ordinal: int = 0,
        graphs: bool = True,
        cache: Path | None = None,
    ) -> None:
        """Open a plan whose sha256 and requirements have been checked.

        Args:
            folder: the version's.
            manifest: what lies in it.
            ordinal: the GPU's number.
            graphs: whether CUDA graphs are used.
            cache: a folder where `tensorrt_rtx` keeps what it compiles; None compiles again at each start.

        Raises:
            CannotRunHere: the runtime or the GPU is missing, or the runtime does not take the plan here.
            ValueError: the plan is empty, or is not what the manifest says.
            RuntimeError: CUDA or TensorRT failed, for want of memory, say.
        """
        super().__init__(manifest)
        self._lock = Lock()
        self._trt = import_runtime(manifest.runtime)
        self._device = Device(ordinal)
        self._runner: _Runner | None = None
        with self._named() as messages, ExitStack() as made:
            plan = plans.opened(self._trt, folder / manifest.file, manifest, messages)
            self._stream = made.enter_context(self._device.stream())
            self._buffers = made.enter_context(_buffers(self._device, manifest))
            work = _Work(plan, self._device, self._stream, self._buffers)
            if manifest.runtime == "tensorrt_rtx":
                kernels = None if cache is None else cache / _cache_name(manifest, self._device)
                self._runner = _Compiling(self._trt, work, graphs=graphs, kernels=kernels)
            else:
                memory = made.enter_context(self._device.memory(plan.engine.device_memory_size_v2))
                self._runner = _Recording(self._trt, work, memory, limit=MAX_GRAPHS if graphs else 0)
            made.callback(self._drop)
            self._made = made.pop_all()

    def warm_up(self, sizes: Sequence[int] = ()) -> None:
        """Run batches of these sizes, by default of one image and of the most: their graphs are recorded now.

        `tensorrt` records another size in the first call that brings it, which takes about as long as a few calls; name
        here what will come, if no caller shall wait for that.
        """
        for size in sizes or sorted({1, self.manifest.max_batch}):
            self(np.zeros((size, *self._shape), dtype=self._dtype))
        with self._lock, self._named():
            if self._runner is not None:
                self._runner.keep()

    def _run(self, inputs: Inputs) -> Logits:
        with self._lock, self._named():
            if self._runner is None:
                raise RuntimeError("the engine is closed; open it again")
            self._device.use()
            batch = len(inputs)
            np.copyto(self._buffers.host_inputs[:batch], inputs)
            self._runner.start(batch)
            self._device.synchronise(self._stream)
            return self._buffers.host_answers[:batch].copy()

    def close(self) -> None:
        """Free graphs, contexts, engine and memory, whatever failed before; a second call does nothing."""
        with self._lock, self._named():
            self._made.close()

    def _drop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is None:
            return
        try:
            # Whoever closes may have worked on another GPU, and what TensorRT frees and saves is the current one's.
            self._device.use()
        except CudaError as error:
            _log.warning("%s", error)
        runner.close()

    @contextmanager
    def _named(self) -> Iterator[Messages]:
        """Name the model in errors of CUDA and TensorRT, and add what TensorRT says of them."""
        with heard(self._trt) as messages:
            try:
                yield messages
            except CannotRunHere:
                raise
            except RuntimeError as error:
                said = f"; TensorRT says: {messages.why}" if messages.errors else ""
                name = f"{self.manifest.model}@{self.manifest.version}"
                raise RuntimeError(f"{name}: {error}{said}") from error


class _Runner(Protocol):
    """Puts a batch's work into the stream, in a way of its own."""

    def start(self, batch: int) -> None:
        """Start to answer the `batch` inputs that lie in pinned memory."""

    def keep(self) -> None:
        """Save what the next start may use."""

    def close(self) -> None:
        """Let go of contexts and graphs, and of the engine."""


@dataclass(frozen=True)
class _Buffers:
    """Names and memory of input and output, for the largest batch, on both sides."""

    input: str
    output: str
    host_inputs: np.ndarray[Any, Any]
    host_answers: np.ndarray[Any, Any]
    inputs: int
    answers: int


@contextmanager
def _buffers(device: Device, manifest: Manifest) -> Iterator[_Buffers]:
    specs = manifest.inputs[0], manifest.outputs[0]
    shapes = [(spec.datatype, (manifest.max_batch, *spec.shape[1:])) for spec in specs]
    with ExitStack() as made:
        host = [made.enter_context(device.pinned(shape, DTYPES[datatype])) for datatype, shape in shapes]
        inputs, answers = (made.enter_context(device.memory(array.nbytes)) for array in host)
        yield _Buffers(
            input=manifest.inputs[0].name,
            output=manifest.outputs[0].name,
            host_inputs=host[0],
            host_answers=host[1],
            inputs=inputs,
            answers=answers,
        )


class _Work:
    """What a batch takes, in order: copy in, kernels, copy out."""

    def __init__(self, plan: Plan, device: Device, stream: int, buffers: _Buffers) -> None:
        self.plan = plan
        self.device = device
        self.stream = stream
        self._buffers = buffers

    def bound(self, context: Any, profile: Profile) -> Any:
        """Return a new execution context with its profile and its buffers, by the tensors' names."""
        buffers = self._buffers
        done = (
            context is not None
            and context.set_optimization_profile_async(profile.index, self.stream)
            and context.set_tensor_address(buffers.input, buffers.inputs)
            and context.set_tensor_address(buffers.output, buffers.answers)
        )
        if not done:
            raise RuntimeError("TensorRT could not set up an execution context")
        # The profile's own copies must be done before work that relies on them is recorded.
        self.device.synchronise(self.stream)
        return context

    def start(self, context: Any, batch: int) -> None:
        """Put the work into the stream, and wait for nothing."""
        buffers, stream = self._buffers, self.stream
        inputs, answers = buffers.host_inputs[:batch], buffers.host_answers[:batch]
        taken = context.set_input_shape(buffers.input, inputs.shape)
        self.device.copy_to_gpu(buffers.inputs, inputs, stream)
        if not taken or not context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT could not enqueue a batch of {batch}")
        self.device.copy_to_host(answers, buffers.answers, stream)


class _Recording:
    """`tensorrt`: CUDA graphs of the last batch sizes, recorded by us.

    A graph is good for as long as its context stays as it was; so each has a context of its own, and all contexts share
    one block of memory, because they take turns.
    """

    def __init__(self, trt: Any, work: _Work, memory: int, *, limit: int) -> None:
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._work: _Work | None = work
        self._memory = memory
        self._limit = limit
        self._plain: dict[Profile, Any] = {}
        self._graphs: OrderedDict[int, tuple[Any, Any]] = OrderedDict()

    def start(self, batch: int) -> None:
        """Launch the batch size's graph; record it if there is none yet; do without, where that is impossible."""
        assert self._work is not None
        if batch in self._graphs:
            self._graphs.move_to_end(batch)
            self._work.device.launch(self._graphs[batch][1], self._work.stream)
        elif not self._limit or not self._recorded(self._work, batch):
            profile = plans.tightest(self._work.plan.profiles, batch)
            if profile not in self._plain:
                self._plain[profile] = self._context(self._work, profile)
            self._work.start(self._plain[profile], batch)

    def keep(self) -> None:
        """Do nothing: a graph cannot be saved."""

    def close(self) -> None:
        """Destroy the graphs before the contexts, and those before the engine."""
        while self._graphs:
            self._forget_oldest()
        self._plain.clear()
        self._work = None

    def _recorded(self, work: _Work, batch: int) -> bool:
        """Answer the batch that is waiting, and record how; False where it cannot be recorded."""
        try:
            context = self._context(work, plans.tightest(work.plan.profiles, batch))
            # TensorRT puts off some work to the first time that it sees a shape; that must not be in the record.
            work.start(context, batch)
            work.device.synchronise(work.stream)
            graph = work.device.captured(lambda: work.start(context, batch), work.stream)
        except RuntimeError as error:
            _log.warning("CUDA graphs are off for this engine, it runs without: %s", error)
            self._limit = 0
            return False
        self._graphs[batch] = context, graph
        if len(self._graphs) > self._limit:
            self._forget_oldest()
        return True

    def _context(self, work: _Work, profile: Profile) -> Any:
        context = work.plan.engine.create_execution_context(self._strategy)
        if context is not None:
            context.set_device_memory(self._memory, work.plan.engine.device_memory_size_v2)
        return work.bound(context, profile)

    def _forget_oldest(self) -> None:
        assert self._work is not None
        _, (_, graph) = self._graphs.popitem(last=False)
        self._work.device.destroy(graph)


class _Compiling:
    """`tensorrt_rtx`: it compiles kernels for this GPU while it runs, and records graphs of them by itself.

    There is one context for each profile that was used, and each has scratch memory of its own.
    """

    def __init__(self, trt: Any, work: _Work, *, graphs: bool, kernels: Path | None) -> None:
        self._work: _Work | None = work
        self._config = work.plan.engine.create_runtime_config()
        strategies = trt.CudaGraphStrategy
        self._config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
        # The configuration does not keep the cache alive: we do, longer than the contexts.
        self._cache = self._config.create_runtime_cache()
        self._kernels = kernels
        self._kept = b""
        if kernels is not None and kernels.is_file():
            self._kept = kernels.read_bytes()
            # One of another GPU, driver or version is refused by TensorRT itself, and replaced when we close.
            self._cache.deserialize(self._kept)
        self._config.set_runtime_cache(self._cache)
        self._contexts: dict[Profile, Any] = {}

    def start(self, batch: int) -> None:
        """Put the batch's work into the stream."""
        assert self._work is not None
        profile = plans.tightest(self._work.plan.profiles, batch)
        if profile not in self._contexts:
            context = self._work.plan.engine.create_execution_context(runtime_config=self._config)
            self._contexts[profile] = self._work.bound(context, profile)
        self._work.start(self._contexts[profile], batch)

    def keep(self) -> None:
        """Save the kernels compiled so far; without room on the disk they are compiled again next time."""
        if self._kernels is None:
            return
        compiled = bytes(self._cache.serialize() or b"")
        if not compiled or compiled == self._kept:
            return
        try:
            self._kernels.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(self._kernels, compiled)
            self._kept = compiled
        except OSError as error:
            _log.warning("compiled kernels could not be kept: %s", error)

    def close(self) -> None:
        """Save the kernels, then let go of contexts, cache and engine in that order."""
        try:
            self.keep()
        finally:
            self._contexts.clear()
            self._config = self._cache = self._work = None


def _cache_name(manifest: Manifest, device: Device) -> str:
    gpu = device.gpu
    parts = manifest.sha256, manifest.requires.runtime, gpu.name, gpu.compute_capability
    return f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.kernels"
