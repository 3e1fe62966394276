"""Tensors between wire and numpy, by the model's own description of them.

    InferRequest --names, form, datatype, shape, length--> arrays, or encoded images
    arrays --raw | typed | shared memory | classes--> ModelInferResponse

Whatever does not fit is an `InvalidArgument` that names the tensor, what was expected and what came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.manifest import LARGEST_BATCH
from service.errors import InvalidArgument, Unimplemented
from service.inference import contents, parameters
from service.inference.classification import top_classes
from service.inference.datatypes import DATATYPES, Array, raw_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from export.manifest import TensorSpec
    from protos.inference import open_inference_pb2 as pb
    from service.inference.contents import Data
    from service.inference.parameters import Options
    from service.inference.shared_memory import Part, Regions
    from service.inference.wire import InferRequest

    InputTensor = pb.ModelInferRequest.InferInputTensor

# What a caller who has images, and not the model's datatype, may not know.
_HINTS = {"UINT8": "; the model takes images as they are stored: (N, H, W, C), values from 0 to 255"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that a request wants.

    Attributes:
        spec: the output.
        classes: how many of the classes with the highest scores are wanted; None where the values are.
        part: where in shared memory it goes; None where it goes into the response.
    """

    spec: TensorSpec
    classes: int | None = None
    part: Part | None = None


def decode_inputs(
    request: InferRequest,
    specs: Sequence[TensorSpec],
    *,
    max_batch: int,
    regions: Regions | None = None,
    max_bytes: int | None = None,
) -> dict[str, Array]:
    """Return a request's inputs by name; raw ones are read-only views of the request or of shared memory.

    Args:
        request: as it was parsed.
        specs: the model's inputs.
        max_batch: the largest batch that the model takes.
        regions: shared memory; None where it is not served.
        max_bytes: bytes that an input whose length the model leaves open may have in shared memory.

    Raises:
        InvalidArgument: an input is missing, unknown, given twice, or not of the model's datatype and shape; its
            data is in two forms, in the wrong field, or not as long as its shape says; or it is too long.
        NotFound: an input lies in a region of shared memory that is not registered.
        Unimplemented: an input lies in shared memory, and that is not served; or no engine here takes its datatype.
    """
    tensors = [*request.message.inputs]
    ordered = _named([tensor.name for tensor in tensors], specs)
    found = contents.data_of(request, tensors, regions)
    return {
        spec.name: _array(tensor, data, spec, max_batch=max_batch, max_bytes=max_bytes)
        for spec, tensor, data in zip(ordered, tensors, found, strict=True)
    }


def encoded_images(
    request: InferRequest,
    spec: TensorSpec,
    *,
    max_batch: int = LARGEST_BATCH,
    regions: Regions | None = None,
    max_bytes: int | None = None,
) -> list[memoryview | bytes] | None:
    """Return the images of a request that sends them encoded, as BYTES; None if it does not.

    Args:
        request: as it was parsed.
        spec: the model's only input.
        max_batch: the largest batch that the model takes.
        regions: shared memory; None where it is not served.
        max_bytes: bytes that they may have there, all together.

    Raises:
        InvalidArgument: they are not of shape (N) or (N, 1), not as many or as long as the request says, or too long.
        NotFound: they lie in a region of shared memory that is not registered.
        Unimplemented: they lie in shared memory, and that is not served.
    """
    tensors = request.message.inputs
    if len(tensors) != 1 or tensors[0].datatype != "BYTES" or spec.datatype == "BYTES":
        return None
    tensor = tensors[0]
    _named([tensor.name], [spec])
    shape = tuple(tensor.shape)
    if shape[1:] not in {(), (1,)} or not shape or not 1 <= shape[0] <= max_batch:
        raise InvalidArgument(
            f"input {spec.name!r}: expected encoded images of shape (1 to {max_batch}) or (1 to {max_batch}, 1), "
            f"got {shape}"
        )
    (data,) = contents.data_of(request, [tensor], regions)
    contents.check_length(data, owner=f"input {spec.name!r}", max_bytes=max_bytes)
    return contents.elements(tensor, data, shape)


def requested_outputs(
    message: pb.ModelInferRequest, specs: Sequence[TensorSpec], *, regions: Regions | None = None
) -> list[Wanted]:
    """Return the outputs that a request wants, in its order and each once; all of them if it names none.

    Args:
        message: the request.
        specs: the model's outputs.
        regions: shared memory; None where it is not served.

    Raises:
        InvalidArgument: the model has no such output; it is wanted in two ways; or its parameters are not sound.
        NotFound: an output is wanted in a region of shared memory that is not registered.
        Unimplemented: an output is wanted in shared memory, and that is not served.
    """
    if not message.outputs:
        return [Wanted(spec) for spec in specs]
    by_name = {spec.name: spec for spec in specs}
    wanted: dict[str, Wanted] = {}
    for output in message.outputs:
        if output.name not in by_name:
            raise InvalidArgument(
                f"output {output.name!r}: expected one of {_names(by_name)}; the model has no such output"
            )
        one = _wanted(output, by_name[output.name], regions)
        if wanted.setdefault(output.name, one) != one:
            raise InvalidArgument(f"output {output.name!r}: expected once, got it twice with different parameters")
    return [*wanted.values()]


def encode_outputs(
    response: pb.ModelInferResponse,
    outputs: Mapping[str, Array],
    wanted: Sequence[Wanted],
    *,
    typed: bool,
    class_names: Sequence[str] = (),
) -> None:
    """Write outputs into a response, raw or in typed fields; raw if one of them has no typed field.

    Args:
        response: gets the outputs, in the order of `wanted`.
        outputs: the model's, by name.
        wanted: what `requested_outputs` gave.
        typed: whether to use typed fields.
        class_names: of the model's classes, for outputs that are wanted as classes.

    Raises:
        InvalidArgument: an output does not fit where the request wants it.
        ResourceExhausted: there is no shared memory left.
    """
    typed = typed and all(one.classes or DATATYPES[one.spec.datatype].field for one in wanted)
    for one in wanted:
        array, datatype = outputs[one.spec.name], one.spec.datatype
        if one.classes is not None:
            array, datatype = top_classes(array, one.classes, class_names=class_names), "BYTES"
        tensor = response.outputs.add(name=one.spec.name, datatype=datatype, shape=array.shape)
        field = DATATYPES[datatype].field
        if one.part is not None:
            _write(raw_of(array, datatype), one.part, name=one.spec.name)
            if not typed:
                # Clients count: the third output's data are the third, wherever those of the others went.
                response.raw_output_contents.append(b"")
        elif typed and field is not None:
            getattr(tensor.contents, field).extend(array.ravel().tolist())
        else:
            response.raw_output_contents.append(raw_of(array, datatype))


def is_typed(request: InferRequest) -> bool:
    """Return whether a request carries its data in typed fields."""
    return not request.raw and any(tensor.HasField("contents") for tensor in request.message.inputs)


def request_options(message: pb.ModelInferRequest) -> Options:
    """Return how a request wants to be queued.

    Raises:
        InvalidArgument: a parameter is reserved, of another type than the protocol's, or negative.
        Unimplemented: one is a sequence's: models here have no state.
    """
    return parameters.options_of(message.parameters)


def _named(given: list[str], specs: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    """Return the inputs in the order in which a request names them: all of them, each once."""
    expected = [spec.name for spec in specs]
    if given == expected:
        return specs
    for name in given:
        if name not in expected:
            raise InvalidArgument(f"input {name!r}: expected one of {_names(expected)}; the model has no such input")
    for name in expected:
        if name not in given:
            raise InvalidArgument(f"input {name!r}: expected in the request, got {_names(given)}")
        if (count := given.count(name)) > 1:
            raise InvalidArgument(f"input {name!r}: expected once, got it {count} times")
    return [specs[expected.index(name)] for name in given]


def _wanted(
    output: pb.ModelInferRequest.InferRequestedOutputTensor, spec: TensorSpec, regions: Regions | None
) -> Wanted:
    if not output.parameters:
        return Wanted(spec)
    owner = f"output {spec.name!r}"
    part = contents.part_of(output.parameters, regions, owner=owner)
    classes = parameters.classes_of(output.parameters, owner=owner)
    if part is not None and classes is not None:
        raise InvalidArgument(f"{owner}: expected 'classification' or 'shared_memory_region', got both; choose one")
    return Wanted(spec, classes, part)


def _array(tensor: InputTensor, data: Data | None, spec: TensorSpec, *, max_batch: int, max_bytes: int | None) -> Array:
    datatype = tensor.datatype
    if datatype != spec.datatype:
        hint = _HINTS.get(spec.datatype, "")
        raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.datatype}, got {datatype!r}{hint}")
    if datatype not in DATATYPES:
        raise Unimplemented(f"input {spec.name!r}: datatype {datatype} is not served; no engine here takes it")
    shape = tuple(tensor.shape)
    _check_shape(shape, spec, max_batch=max_batch)
    if datatype == "BYTES" or -1 in spec.shape[1:]:
        contents.check_length(data, owner=f"input {spec.name!r}", max_bytes=max_bytes)
    return contents.array(tensor, data, shape)


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, *, max_batch: int) -> None:
    if shape[1:] == spec.shape[1:] and shape and 1 <= shape[0] <= max_batch and -1 not in shape:
        return
    expected = (f"1 to {max_batch}", *("any" if size == -1 else str(size) for size in spec.shape[1:]))
    fits = len(shape) == len(spec.shape) and all(
        size == wanted or (wanted == -1 and size >= 1) for size, wanted in zip(shape[1:], spec.shape[1:], strict=True)
    )
    if not fits or not 1 <= shape[0] <= max_batch:
        raise InvalidArgument(f"input {spec.name!r}: expected shape ({', '.join(expected)}), got {shape}")


def _write(data: bytes, part: Part, *, name: str) -> None:
    if len(data) > part.size:
        raise InvalidArgument(
            f"output {name!r}: expected room for {len(data)} bytes in shared memory region {part.region!r}, "
            f"got shared_memory_byte_size {part.size}"
        )
    part.write(data)


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
