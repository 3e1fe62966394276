"""One inference, whichever way its request came.

InferRequest --find--> version --options, raw | typed | shared memory | pictures--> inputs --infer--> logits --encode-->
ModelInferResponse, in the form in which it was asked
"""

from __future__ import annotations

from asyncio import get_running_loop
from time import perf_counter_ns
from typing import TYPE_CHECKING

from protos.inference import open_inference_pb2 as pb
from service import calls
from service.errors import DeadlineExceeded
from service.inference import tensors

if TYPE_CHECKING:
    from export.engines.base import Inputs
    from service.inference.models import Models, ServedVersion
    from service.inference.pictures import Pictures
    from service.inference.shared_memory import Regions
    from service.inference.wire import InferRequest


class Inference:
    """Answers requests with the models, and counts them.

    Args:
        models: that answer.
        pictures: decodes images.
        regions: shared memory.
        max_bytes: bytes that a request may have, and so what lies in shared memory in place of a part of it.
    """

    __slots__ = ("_max_bytes", "_models", "_pictures", "_regions")

    def __init__(self, models: Models, *, pictures: Pictures, regions: Regions, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._models = models
        self._pictures = pictures
        self._regions = regions

    async def answer(self, request: InferRequest, *, left_s: float | None = None) -> pb.ModelInferResponse:
        """Answer one request.

        Args:
            request: as it came.
            left_s: seconds until the caller no longer waits; None where it waits for ever.

        Raises:
            NotFound: the model, its version or a region of shared memory is not here.
            InvalidArgument: the request does not fit the model.
            ResourceExhausted: the queue is full.
            Unavailable: the server is shutting down.
            DeadlineExceeded: there was, or would be, no answer in time.
        """
        began = perf_counter_ns()
        message = request.message
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded(f"model {message.model_name!r}: the deadline had passed when the request came")
        version = self._models.find(message.model_name, message.model_version)
        try:
            response = await self._answer(request, version, left_s=left_s)
        except BaseException as error:
            version.statistics.failed(perf_counter_ns() - began, error)
            raise
        version.statistics.succeeded(perf_counter_ns() - began)
        return response

    async def _answer(
        self, request: InferRequest, version: ServedVersion, *, left_s: float | None
    ) -> pb.ModelInferResponse:
        message = request.message
        deadline = None if left_s is None else get_running_loop().time() + left_s
        name, manifest, call = message.model_name, version.manifest, calls.current()
        number = str(manifest.version)
        if call is not None:
            call.describe(model=name, version=number, request_id=message.id)
        options = tensors.request_options(message)
        wanted = tensors.requested_outputs(message, (version.output,), regions=self._regions)
        inputs = await self._inputs(request, version)
        if call is not None:
            # A stream is one call.
            call.images += len(inputs)
        answers = await version.infer(inputs, priority=options.priority, timeout_s=options.timeout_s, deadline=deadline)
        response = pb.ModelInferResponse(model_name=name, model_version=number, id=message.id)
        tensors.encode_outputs(
            response,
            {version.output.name: answers},
            wanted,
            typed=tensors.is_typed(request),
            class_names=manifest.class_names,
        )
        return response

    async def _inputs(self, request: InferRequest, version: ServedVersion) -> Inputs:
        spec, max_batch, regions, max_bytes = version.input, version.max_batch, self._regions, self._max_bytes
        encoded = tensors.encoded_images(request, spec, max_batch=max_batch, regions=regions, max_bytes=max_bytes)
        if encoded is not None:
            return await self._pictures.decode(encoded, version.manifest)
        inputs = tensors.decode_inputs(request, (spec,), max_batch=max_batch, regions=regions, max_bytes=max_bytes)
        return inputs[spec.name]
