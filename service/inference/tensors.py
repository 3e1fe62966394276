"""Tensors between wire and numpy, by the model's own description of them.

    ModelInferRequest --names, form, datatype, shape, length--> arrays      arrays --raw | typed--> ModelInferResponse

Whatever does not fit is an `InvalidArgument` that names the tensor, what was expected and what came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from protos.inference import open_inference_pb2 as pb
from service.errors import InvalidArgument, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from export.manifest import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]

# Parameters that would change what the answer is: refused, since to ignore them is to answer something else.
_UNSERVED_PARAMETERS = ("shared_memory_region", "classification")


@dataclass(frozen=True)
class Datatype:
    """How one of the protocol's datatypes lies in memory, and which typed field carries it (FP16 has none)."""

    dtype: np.dtype[Any]
    field: str | None


DATATYPES = {
    "BOOL": Datatype(np.dtype("?"), "bool_contents"),
    "INT8": Datatype(np.dtype("<i1"), "int_contents"),
    "INT16": Datatype(np.dtype("<i2"), "int_contents"),
    "INT32": Datatype(np.dtype("<i4"), "int_contents"),
    "INT64": Datatype(np.dtype("<i8"), "int64_contents"),
    "UINT8": Datatype(np.dtype("<u1"), "uint_contents"),
    "UINT16": Datatype(np.dtype("<u2"), "uint_contents"),
    "UINT32": Datatype(np.dtype("<u4"), "uint_contents"),
    "UINT64": Datatype(np.dtype("<u8"), "uint64_contents"),
    "FP16": Datatype(np.dtype("<f2"), None),
    "FP32": Datatype(np.dtype("<f4"), "fp32_contents"),
    "FP64": Datatype(np.dtype("<f8"), "fp64_contents"),
}

# What a caller who has images, and not the model's datatype, may not know.
_HINTS = {"UINT8": "; the model takes images as they are stored: (N, H, W, C), values from 0 to 255"}

# How each typed field's values lie in memory.
_FIELD_DTYPES = {
    "bool_contents": "?",
    "int_contents": "<i4",
    "int64_contents": "<i8",
    "uint_contents": "<u4",
    "uint64_contents": "<u8",
    "fp32_contents": "<f4",
    "fp64_contents": "<f8",
}


def decode_inputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec], *, max_batch: int) -> dict[str, Array]:
    """Return a request's inputs by name; raw ones are read-only views of the request.

    Raises:
        InvalidArgument: an input is missing, unknown, given twice, or not of the model's datatype and shape; its
            data is in two forms, in the wrong field, or not as long as its shape says.
        Unimplemented: an input lies in shared memory.
    """
    _check_input_names([tensor.name for tensor in request.inputs], specs)
    by_name = {spec.name: spec for spec in specs}
    return {
        tensor.name: _array(tensor, raw, by_name[tensor.name], max_batch=max_batch)
        for tensor, raw in zip(request.inputs, _raw_contents(request), strict=True)
    }


def requested_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the outputs that a request wants, in its order and each once; all of them if it names none.

    Raises:
        InvalidArgument: the model has no such output.
        Unimplemented: an output is wanted as classes or in shared memory.
    """
    by_name = {spec.name: spec for spec in specs}
    for wanted in request.outputs:
        if wanted.name not in by_name:
            raise InvalidArgument(
                f"output {wanted.name!r}: expected one of {_names(by_name)}; the model has no such output"
            )
        _check_parameters("output", wanted.name, wanted.parameters)
    return [by_name[name] for name in dict.fromkeys(wanted.name for wanted in request.outputs)] or list(specs)


def encode_outputs(
    response: pb.ModelInferResponse, outputs: Mapping[str, Array], specs: Sequence[TensorSpec], *, typed: bool
) -> None:
    """Write outputs into a response, raw or in typed fields; raw if one of them has no typed field."""
    fields = [DATATYPES[spec.datatype].field for spec in specs]
    typed = typed and None not in fields
    for spec, field in zip(specs, fields, strict=True):
        array = outputs[spec.name]
        tensor = response.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if typed and field is not None:
            getattr(tensor.contents, field).extend(array.ravel().tolist())
        else:
            data = array.astype(DATATYPES[spec.datatype].dtype, copy=False).tobytes()
            response.raw_output_contents.append(data)


def is_typed(request: pb.ModelInferRequest) -> bool:
    """Return whether a request carries its data in typed fields."""
    return not request.raw_input_contents


def _check_input_names(given: list[str], specs: Sequence[TensorSpec]) -> None:
    expected = [spec.name for spec in specs]
    for name in given:
        if name not in expected:
            raise InvalidArgument(f"input {name!r}: expected one of {_names(expected)}; the model has no such input")
    for name in expected:
        if name not in given:
            raise InvalidArgument(f"input {name!r}: expected in the request, got {_names(given)}")
        if (count := given.count(name)) > 1:
            raise InvalidArgument(f"input {name!r}: expected once, got it {count} times")


def _raw_contents(request: pb.ModelInferRequest) -> Sequence[bytes | None]:
    """Return each input's raw data, or None for each if the request is typed."""
    if is_typed(request):
        return [None] * len(request.inputs)
    for tensor in request.inputs:
        if tensor.contents.ListFields():
            raise InvalidArgument(
                f"input {tensor.name!r}: expected raw_input_contents or typed contents, got both; send one of them"
            )
    if len(request.raw_input_contents) != len(request.inputs):
        names = _names(tensor.name for tensor in request.inputs)
        raise InvalidArgument(
            f"raw_input_contents: expected {len(request.inputs)}, one for each input ({names}), "
            f"got {len(request.raw_input_contents)}"
        )
    return request.raw_input_contents


def _array(
    tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, spec: TensorSpec, *, max_batch: int
) -> Array:
    _check_parameters("input", spec.name, tensor.parameters)
    if tensor.datatype != spec.datatype:
        hint = _HINTS.get(spec.datatype, "")
        raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.datatype}, got {tensor.datatype!r}{hint}")
    shape = tuple(tensor.shape)
    _check_shape(shape, spec, max_batch=max_batch)
    values = _typed_values(tensor, shape) if raw is None else _raw_values(tensor, raw, shape)
    return values.reshape(shape)


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, *, max_batch: int) -> None:
    expected = (f"1 to {max_batch}", *("any" if size == -1 else str(size) for size in spec.shape[1:]))
    fits = len(shape) == len(spec.shape) and all(
        size == wanted or (wanted == -1 and size >= 1) for size, wanted in zip(shape[1:], spec.shape[1:], strict=True)
    )
    if not fits or not 1 <= shape[0] <= max_batch:
        raise InvalidArgument(f"input {spec.name!r}: expected shape ({', '.join(expected)}), got {shape}")


def _raw_values(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes, shape: tuple[int, ...]) -> Array:
    dtype = DATATYPES[tensor.datatype].dtype
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {expected} bytes for {tensor.datatype} of shape {shape}, got {len(raw)}"
        )
    return np.frombuffer(raw, dtype)


def _typed_values(tensor: pb.ModelInferRequest.InferInputTensor, shape: tuple[int, ...]) -> Array:
    datatype = DATATYPES[tensor.datatype]
    used = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if datatype.field is None:
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {tensor.datatype} in raw_input_contents, got none there"
        )
    if wrong := [name for name in used if name != datatype.field]:
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {tensor.datatype} in contents.{datatype.field}, got {_names(wrong)}"
        )
    values = getattr(tensor.contents, datatype.field)
    if len(values) != math.prod(shape):
        raise InvalidArgument(
            f"input {tensor.name!r}: expected {math.prod(shape)} values for shape {shape} in contents.{datatype.field} "
            f"(or raw_input_contents), got {len(values)}"
        )
    return _narrowed(tensor, np.array(values, _FIELD_DTYPES[datatype.field]), datatype.dtype)


def _narrowed(tensor: pb.ModelInferRequest.InferInputTensor, values: Array, dtype: np.dtype[Any]) -> Array:
    """Return values in their own datatype: small integers travel in wider fields, and may not fit."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if (lowest := values.min()) < limits.min or (highest := values.max()) > limits.max:
            got = lowest if lowest < limits.min else highest
            raise InvalidArgument(
                f"input {tensor.name!r}: expected {tensor.datatype} values from {limits.min} to {limits.max}, got {got}"
            )
    return values.astype(dtype, copy=False)


def _check_parameters(kind: str, name: str, parameters: Iterable[str]) -> None:
    for parameter in _UNSERVED_PARAMETERS:
        if parameter in parameters:
            raise Unimplemented(f"{kind} {name!r}: parameter {parameter!r} is not served; send and take plain tensors")


def check_request_parameters(request: pb.ModelInferRequest) -> None:
    """Refuse parameters of a request that are reserved, or of another type than the protocol's.

    Raises:
        InvalidArgument: names the parameter, what was expected and what came.
        Unimplemented: one of a sequence's: models here have no state.
    """
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if name in {"priority", "timeout"} and kind not in {"int64_param", "uint64_param"}:
            raise InvalidArgument(f"parameter {name!r}: expected int64_param, got {kind or 'no value'}")
        if name.startswith("triton_") and name != "triton_enable_empty_final_response":
            raise InvalidArgument(f"parameter {name!r}: names that begin with 'triton_' are reserved; choose another")
        if name.startswith("sequence_"):
            raise Unimplemented(f"parameter {name!r}: sequences are not served; leave it out")


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
