"""Images in memory that client and server share, for servers on this machine: only names and sizes travel.

images --copied--> region: | inputs | outputs | --read by--> server
logits <--copied-- region                       <--written by--
"""

from __future__ import annotations

import math
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING

import numpy as np

from protos.inference import open_inference_pb2 as pb
from service.client import encoding, operations
from service.client.operations import Call
from service.errors import DeadlineExceeded, Unavailable

if TYPE_CHECKING:
    from google.protobuf.internal.containers import MessageMap

    from export.engines.base import Images, Inputs, Logits, Stored
    from service.client.description import ModelMetadata, TensorMetadata
    from service.client.encoding import RequestOptions
    from service.client.operations import Operations, Steps, Version

# Images a request where the caller does not say.
_BATCH = 64

# Bytes to which tensors are aligned: a cache line.
_ALIGNMENT = 64


class Region:
    """A piece of this machine's memory under a name of its own: a batch of inputs, and behind it their answers."""

    def __init__(self, *, input_bytes: int, output_bytes: int) -> None:
        self.output_offset = -(-input_bytes // _ALIGNMENT) * _ALIGNMENT
        self.output_bytes = output_bytes
        self._memory = SharedMemory(create=True, size=self.output_offset + output_bytes)

    @property
    def name(self) -> str:
        """Under which it is registered; no other region of this machine has it."""
        return self._memory.name

    @property
    def key(self) -> str:
        """By which the server opens it (`shm_open`)."""
        return f"/{self._memory.name}"

    @property
    def byte_size(self) -> int:
        """Bytes of the whole."""
        return self.output_offset + self.output_bytes

    def put(self, inputs: Inputs, *, datatype: str) -> int:
        """Copy inputs into it, and return how many bytes they take."""
        held = np.ndarray(inputs.shape, encoding.WIRE[datatype], buffer=self._memory.buf)
        held[...] = inputs
        return held.nbytes

    def take(self, shape: tuple[int, ...]) -> Logits:
        """Return a copy of the answers in it."""
        return np.ndarray(shape, "<f4", buffer=self._memory.buf, offset=self.output_offset).copy()

    def close(self) -> None:
        """Give it back; a server that has it registered keeps its pages until it is told otherwise."""
        self._memory.close()
        self._memory.unlink()


class Lane:
    """Inferences of one model through a region, one after another.

    What a call that got no answer may still write must not become the answer of the next: that one gets a new region.
    """

    def __init__(
        self, known: Operations, *, model: str, version: Version, batch: int | None, options: RequestOptions
    ) -> None:
        self._operations = known
        self._model = model
        self._version = version
        self._batch = batch
        self._options = options
        self._described: ModelMetadata | None = None
        self._region: Region | None = None
        self._busy = False
        # Whether a call through the region may still be running on the server.
        self._stale = False

    def open(self) -> Steps[None]:
        """Make the region, and register it."""
        self._described = yield from self._operations.metadata(self._model, version=self._version)
        if self._described.inputs[0].datatype not in encoding.WIRE or _bytes(self._described.inputs[0]) < 1:
            raise ValueError(
                f"{self._model}: expected a model that takes FP32 or UINT8 images of one size, got one that takes "
                f"{self._described.inputs[0].datatype} {self._described.inputs[0].shape}; it cannot share memory"
            )
        yield from self._make(self._described)

    def infer(self, images: Images | Stored) -> Steps[Logits]:
        """Have images classified, a region full at a time."""
        if self._busy:
            raise RuntimeError("expected one call of this shared memory at a time, got a second; make another for it")
        assert self._described is not None
        inputs = encoding.as_inputs(images, self._described)
        self._busy = True
        try:
            size = self._size(self._described)
            parts = []
            for start in range(0, len(inputs), size):
                part = yield from self._infer(inputs[start : start + size], self._described)
                parts.append(part)
            return np.concatenate(parts)
        finally:
            self._busy = False

    def close(self) -> Steps[None]:
        """Unregister the region, and give it back."""
        region, self._region, self._stale = self._region, None, False
        if region is None:
            return
        try:
            # A server that is gone has taken its side along.
            with suppress(Unavailable, DeadlineExceeded):
                yield Call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=region.name))
        finally:
            region.close()

    def _infer(self, inputs: Inputs, described: ModelMetadata) -> Steps[Logits]:
        if self._stale:
            yield from self.close()
        if self._region is None:
            yield from self._make(described)
        region = self._region
        assert region is not None
        call = self._call(region, inputs, described)
        self._stale = True
        response: pb.ModelInferResponse = yield call
        self._stale = False
        shape = tuple(response.outputs[0].shape)
        return region.take(shape) if region.output_bytes else encoding.logits_of(response)

    def _make(self, described: ModelMetadata) -> Steps[None]:
        size = self._size(described)
        region = Region(
            input_bytes=size * _bytes(described.inputs[0]), output_bytes=size * max(0, _bytes(described.outputs[0]))
        )
        try:
            yield Call("SystemSharedMemoryRegister", _registration(region))
        except BaseException:
            region.close()
            raise
        self._region = region

    def _size(self, described: ModelMetadata) -> int:
        """Return how many images the region holds."""
        return self._batch or int(described.properties.get("max_batch_size", _BATCH))

    def _call(self, region: Region, inputs: Inputs, described: ModelMetadata) -> Call:
        (spec,) = described.inputs
        version = operations.pinned_version(described, self._version)
        request = encoding.request_of(described, version=version, options=self._options)
        tensor = request.inputs.add(name=spec.name, datatype=spec.datatype, shape=inputs.shape)
        _lies(tensor.parameters, region, offset=0, size=region.put(inputs, datatype=spec.datatype))
        if region.output_bytes:
            size = len(inputs) * _bytes(described.outputs[0])
            _lies(request.outputs[0].parameters, region, offset=region.output_offset, size=size)
        return Call("ModelInfer", request.SerializeToString(), timeout_s=self._options.timeout_s)


def _bytes(spec: TensorMetadata) -> int:
    """Return how many bytes one image, or one answer, takes; negative if it may be of any size."""
    if min(spec.shape[1:]) < 0:
        return -1
    return math.prod(spec.shape[1:]) * np.dtype(encoding.WIRE[spec.datatype]).itemsize


def _registration(region: Region) -> pb.SystemSharedMemoryRegisterRequest:
    return pb.SystemSharedMemoryRegisterRequest(name=region.name, key=region.key, byte_size=region.byte_size)


def _lies(parameters: MessageMap[str, pb.InferParameter], region: Region, *, offset: int, size: int) -> None:
    """Say where a tensor lies."""
    parameters["shared_memory_region"].string_param = region.name
    parameters["shared_memory_offset"].int64_param = offset
    parameters["shared_memory_byte_size"].int64_param = size
