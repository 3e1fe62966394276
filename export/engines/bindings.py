"""I/O binding: batches to a GPU and back through buffers that stay, instead of new ones at every call.

host array --copy--> device buffer --session--> device buffer --copy--> host array
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from export.engines.failures import one_line

if TYPE_CHECKING:
    from export.engines.base import Inputs, Logits
    from export.manifest import Manifest

# Batch sizes whose buffers are kept: those that are usual, and not one for each size that ever came.
_KEPT = 8


@dataclass(frozen=True)
class _Buffers:
    binding: Any
    images: Any
    answers: Any


class DeviceBinding:
    """Buffers on the device for each batch size; for the providers that share ONNX Runtime's CUDA allocator."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, *, ordinal: int) -> None:
        self._session = session
        self._model = manifest.model
        self._ordinal = ordinal
        self._input, self._output = manifest.inputs[0].name, manifest.outputs[0].name
        self._answer_shape = manifest.outputs[0].shape[1:]
        self._kept: OrderedDict[int, _Buffers] = OrderedDict()
        self._lock = Lock()

    def run(self, inputs: Inputs) -> Logits:
        """Return the answers to a batch; callers take turns.

        Raises:
            RunFailed: the runtime failed, in one line.
        """
        with self._lock, one_line(self._model):
            buffers = self._buffers(inputs)
            buffers.images.update_inplace(inputs)
            self._session.run_with_iobinding(buffers.binding)
            return buffers.answers.numpy()  # type: ignore[no-any-return]

    def _buffers(self, inputs: Inputs) -> _Buffers:
        size = len(inputs)
        if size in self._kept:
            self._kept.move_to_end(size)
        else:
            self._kept[size] = self._made(inputs)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[size]

    def _made(self, inputs: Inputs) -> _Buffers:
        made = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        images = made(inputs.shape, inputs.dtype, "cuda", self._ordinal)
        answers = made((len(inputs), *self._answer_shape), np.float32, "cuda", self._ordinal)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, images)
        binding.bind_ortvalue_output(self._output, answers)
        return _Buffers(binding, images, answers)


class HostBinding:
    """Bound host arrays, which the provider copies itself; for a plug-in, which has an allocator of its own."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, *, ordinal: int) -> None:
        del ordinal  # the session knows
        self._session = session
        self._model = manifest.model
        self._input, self._output = manifest.inputs[0].name, manifest.outputs[0].name
        self._lock = Lock()

    def run(self, inputs: Inputs) -> Logits:
        """Return the answers to a batch; callers take turns.

        Raises:
            RunFailed: the runtime failed, in one line.
        """
        with self._lock, one_line(self._model):
            binding = self._session.io_binding()
            binding.bind_cpu_input(self._input, np.ascontiguousarray(inputs))
            binding.bind_output(self._output)
            self._session.run_with_iobinding(binding)
            (answers,) = binding.copy_outputs_to_cpu()
        return answers  # type: ignore[no-any-return]
