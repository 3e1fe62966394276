"""The data of a request's inputs, in whichever form they came.

raw_input_contents | shared memory | contents --one form, as long as the shape says--> array
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from service.errors import InvalidArgument, Unimplemented
from service.inference import parameters
from service.inference.datatypes import DATATYPES, FIELD_DTYPES, Array, elements_of
from service.inference.shared_memory import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.inference import open_inference_pb2 as pb
    from service.inference.shared_memory import Regions
    from service.inference.wire import InferRequest

    InputTensor = pb.ModelInferRequest.InferInputTensor
    Data = memoryview | bytes | Part


def data_of(request: InferRequest, tensors: Sequence[InputTensor], regions: Regions | None) -> Sequence[Data | None]:
    """Return where each input's data are: in the request, or in shared memory; None for a typed input.

    Inputs in shared memory have no entry in `raw_input_contents`: the others have one each, in their order.

    Raises:
        InvalidArgument: an input has data in two forms, or there are too many or too few entries.
        NotFound: an input lies in a region of shared memory that is not registered.
        Unimplemented: an input lies in shared memory, and that is not served.
    """
    raw = request.raw
    entries = iter(raw)
    data: list[Data | None] = []
    for tensor in tensors:
        given = tensor.parameters
        part = part_of(given, regions, owner=f"input {tensor.name!r}") if given else None
        if (raw or part is not None) and tensor.HasField("contents"):
            _check_no_contents(tensor, part)
        data.append(next(entries, None) if part is None else part)
    if raw:
        _check_count(
            len(raw), [tensor.name for tensor, one in zip(tensors, data, strict=True) if type(one) is not Part]
        )
    return data


def part_of(given: parameters.Parameters, regions: Regions | None, *, owner: str) -> Part | None:
    """Return where in shared memory a tensor lies, by its parameters; None if it does not lie there.

    Raises:
        InvalidArgument: the parameters are not sound, or name what is not inside the region.
        NotFound: the region is not registered.
        Unimplemented: shared memory is not served.
    """
    if (place := parameters.place_of(given, owner=owner)) is None:
        return None
    if regions is None:
        raise Unimplemented(f"{owner}: shared memory is not served; send and take plain tensors")
    return regions.part(place.region, offset=place.offset, size=place.size)


def check_length(data: Data | None, *, owner: str, max_bytes: int | None) -> None:
    """Check that what lies in shared memory is no longer than what a request could carry, before it is read.

    A region may be a sparse file, which costs its owner nothing and the server all its memory. For the tensors whose
    length their model leaves open; that of the others is the shape's.

    Args:
        data: where they are.
        owner: whose they are, for the message.
        max_bytes: bytes that a request may have; None where nothing bounds them.

    Raises:
        InvalidArgument: they are longer.
    """
    if max_bytes is not None and isinstance(data, Part) and data.size > max_bytes:
        raise InvalidArgument(
            f"{owner}: expected at most {max_bytes} bytes in shared memory, which is what a request may have, got "
            f"{data.size}; send fewer or smaller images at once"
        )


def array(tensor: InputTensor, data: Data | None, shape: tuple[int, ...]) -> Array:
    """Return an input's data, of a datatype in `DATATYPES`, as an array of its shape; raw ones are read-only views.

    Raises:
        InvalidArgument: they are not as many or as long as the shape says, or not in the datatype's field.
    """
    datatype = tensor.datatype
    if datatype == "BYTES":
        return _objects(elements(tensor, data, shape)).reshape(shape)
    if data is None:
        values = np.array(_typed(tensor, shape), FIELD_DTYPES[_field(tensor)])
        return _narrowed(tensor, values).reshape(shape)
    dtype = DATATYPES[datatype].dtype
    expected = math.prod(shape) * dtype.itemsize
    got = data.size if isinstance(data, Part) else len(data)
    if got != expected:
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {expected} bytes for {datatype} of shape {shape}, got {got}"
        )
    return np.ndarray(shape, dtype, _read(data))


def elements(tensor: InputTensor, data: Data | None, shape: tuple[int, ...]) -> list[memoryview | bytes]:
    """Return the elements of a BYTES input, in one row; raw ones are slices of the data.

    Raises:
        InvalidArgument: they are not as many or as long as the shape and the data say.
    """
    if data is None:
        return [*_typed(tensor, shape)]
    return [*elements_of(_read(data), count=math.prod(shape), owner=f"input {tensor.name!r}")]


def _check_no_contents(tensor: InputTensor, part: Part | None) -> None:
    # Some clients send an empty message there.
    if tensor.contents.ListFields():
        other = "raw_input_contents" if part is None else "shared memory"
        raise InvalidArgument(f"input {tensor.name!r}: expected {other} or typed contents, got both; send one of them")


def _check_count(got: int, names: list[str]) -> None:
    if got != len(names):
        listed = ", ".join(map(repr, names)) or "none"
        raise InvalidArgument(
            f"raw_input_contents: expected {len(names)}, one for each input outside shared memory ({listed}), got {got}"
        )


def _read(data: Data) -> memoryview | bytes:
    return data.read() if isinstance(data, Part) else data


def _typed(tensor: InputTensor, shape: tuple[int, ...]) -> Sequence[Any]:
    """Return an input's values in the one field that its datatype has."""
    field = _field(tensor)
    if wrong := [repr(used.name) for used, _ in tensor.contents.ListFields() if used.name != field]:
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {tensor.datatype} in contents.{field}, got {', '.join(wrong)}"
        )
    values: Sequence[Any] = getattr(tensor.contents, field)
    if len(values) != math.prod(shape):
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {math.prod(shape)} values for shape {shape} in contents.{field} "
            f"(or raw_input_contents), got {len(values)}"
        )
    return values


def _field(tensor: InputTensor) -> str:
    field = DATATYPES[tensor.datatype].field
    if field is None:
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {tensor.datatype} in raw_input_contents, got none there"
        )
    return field


def _objects(rows: list[memoryview | bytes]) -> Array:
    found = np.empty(len(rows), object)
    found[:] = [bytes(row) for row in rows]
    return found


def _narrowed(tensor: InputTensor, values: Array) -> Array:
    """Return values in their own datatype: small integers travel in wider fields, and may not fit."""
    dtype = DATATYPES[tensor.datatype].dtype
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if (lowest := values.min()) < limits.min or (highest := values.max()) > limits.max:
            got = lowest if lowest < limits.min else highest
            raise InvalidArgument(
                f"input {tensor.name!r}: expected {tensor.datatype} values from {limits.min} to {limits.max}, got {got}"
            )
    return values.astype(dtype, copy=False)
