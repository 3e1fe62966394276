"""Anybody's ONNX file -> one checked model in memory, or one line that says what is wrong with it.

file --size, first bytes, protobuf--> model --external data, functions--> one graph --operators, weights,
checker, shape inference--> model
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from google.protobuf.message import DecodeError

from export.graph import external_data, limits, onnx_parts
from export.manifest import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import Precision

# Names that every graph of ours has, whatever they were in the file that it came from.
INPUT = "images"

# The newest opset that both ONNX Runtime and TensorRT's parser take in full.
OPSET = 20

# ONNX Runtime runs nothing older.
OLDEST_OPSET = 7

# Quantised weights per channel, and a Softmax that is one over its own axis, came with it. Converted to it from 7 to
# 12, torchvision's classifiers answered bit by bit as before.
BASE_OPSET = 13

# Bytes: protobuf holds no more in one message.
LIMIT = onnx.checker.MAXIMUM_PROTOBUF

# Old enough for every ONNX Runtime that we take, new enough for every type of tensor that they know.
_IR_VERSION = 10

_DOMAINS = {"", "ai.onnx.ml", "com.microsoft"}

# What files of other kinds begin with, at which byte, and what to do with them.
_OTHERS = (
    (0, b"PK\x03\x04", "a zip archive (PyTorch and Keras save such)"),
    (0, b"\x80\x02", "a pickle (PyTorch saved such)"),
    (0, b"\x89HDF", "an HDF5 file (Keras saves such)"),
    (0, b"ftrt", "a TensorRT plan"),
    (0, b"ptrt", "a TensorRT plan"),
    (0, b"version https://git-lfs", "a Git LFS pointer; fetch the file with `git lfs pull`"),
    (0, b"<", "a web page or XML"),
    (4, b"ORTM", "a file of ONNX Runtime's own format"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (8, b'{"', "a safetensors file; export it with `tenet export --factory ... --weights FILE`"),
)

_DATATYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.DOUBLE: "FP64",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.UINT16: "UINT16",
    onnx.TensorProto.INT16: "INT16",
    onnx.TensorProto.UINT32: "UINT32",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.UINT64: "UINT64",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.STRING: "BYTES",
}

# Beginnings of the names of operators that compute with integers or hold their weights as such.
_INTEGER_OPERATORS = (
    "QuantizeLinear",
    "DequantizeLinear",
    "QLinear",
    "QGemm",
    "QAttention",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantize",
    "MatMulNBits",
)

_HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file that anybody made.

    The model answers as the file does: its external data and its functions are inside the graph, its inputs are those
    that have no default, and its outputs have the shapes that were inferred.

    Raises:
        FileNotFoundError: the file, or a file of its external data, is missing.
        ValueError: it is no sound ONNX model that ONNX Runtime could run; one line says why.
    """
    try:
        model = _parsed(path)
        external_data.fold(model, path.parent, limit=LIMIT - path.stat().st_size)
        return _checked(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def upgraded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of at least `BASE_OPSET` that computes the same.

    Raises:
        ValueError: an operator cannot be converted.
    """
    opset = _opset(model)
    if opset >= BASE_OPSET:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, BASE_OPSET)
        converted.ir_version = model.ir_version
        onnx.checker.check_model(converted, full_check=True)
    except Exception as error:
        raise ValueError(
            f"opset {opset}: expected {BASE_OPSET} or newer, and conversion failed: {onnx_parts.reason(error)}; "
            f"export the model again with opset {BASE_OPSET} to {OPSET}"
        ) from error
    return converted


def specs(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of a model, -1 for named and unknown dimensions; initialisers are no inputs.

    Raises:
        ValueError: one of them is no tensor, or has no shape.
    """
    return tuple(map(_spec, _inputs(model))), tuple(map(_spec, model.graph.output))


def precision_of(model: onnx.ModelProto) -> Precision:
    """Return what a graph computes in: "int8" if any of it is quantised, else what most of its float weights are of."""
    if any(node.op_type.startswith(_INTEGER_OPERATORS) for node in onnx_parts.nodes(model.graph)):
        return "int8"
    sizes = [(tensor.data_type, math.prod(tensor.dims)) for _, tensor in onnx_parts.tensors(model)]
    half = sum(size for element, size in sizes if element in _HALF)
    return "fp16" if 2 * half > sum(size for element, size in sizes if element in _FLOATS) else "fp32"


def write(model: onnx.ModelProto, path: Path) -> None:
    """Write a model: the same bytes for the same model.

    Raises:
        ValueError: it is larger than an ONNX file can be.
    """
    check_size(model.ByteSize())
    path.write_bytes(model.SerializeToString(deterministic=True))


def check_size(size: int) -> None:
    """Refuse, by a ValueError, a model of more bytes than one ONNX file holds."""
    if size > LIMIT:
        raise ValueError(
            f"expected a model of at most 2 GiB, the limit of an ONNX file with its weights inside, got "
            f"{size / 2**30:.2f} GiB; take a smaller model, or store its weights as float16"
        )


def strip(model: onnx.ModelProto) -> None:
    """Drop, in place, the exporter's notes: they can hold stack traces with another machine's paths."""
    for graph in onnx_parts.subgraphs(model.graph):
        parts: list[Any] = [graph, *graph.node, *graph.value_info]
        if isinstance(graph, onnx.GraphProto):
            parts += [*graph.input, *graph.output, *graph.initializer]
        for part in parts:
            del part.metadata_props[:]
            part.doc_string = ""
    for node in onnx_parts.nodes(model.graph):
        for attribute in node.attribute:
            attribute.doc_string = ""
    del model.metadata_props[:]
    del model.training_info[:]
    model.doc_string = ""


def _parsed(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise FileNotFoundError("expected an ONNX file here, found none; check the path")
    if not path.is_file():
        raise ValueError("expected an ONNX file, got a folder or a device; name the file itself")
    if not (size := path.stat().st_size):
        raise ValueError("expected an ONNX file, got an empty one; copy or export it again")
    check_size(size)
    with path.open("rb") as file:
        _check_kind(file.read(32))
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(
            "expected an ONNX file, got one that is truncated or of another kind; copy or export it again"
        ) from error
    limits.check_nodes(model)
    if any(isinstance(text, bytes) for text in onnx_parts.texts(model)):
        raise ValueError("expected an ONNX file, got one with a name that is not UTF-8; copy or export it again")
    if not model.graph.node or not model.graph.output:
        raise ValueError("expected an ONNX model, got one without a graph; copy or export it again")
    return model


def _check_kind(head: bytes) -> None:
    for offset, start, kind in _OTHERS:
        if head[offset:].startswith(start):
            raise ValueError(f"expected an ONNX file, got {kind}")


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    check_size(model.ByteSize())
    _check_opset(model)
    model = _inlined(model)
    _check_operators(model)
    _check_weights(model)
    _drop_defaults(model)
    # An IR version says what the file may hold, not what it computes; runtimes refuse those newer than themselves.
    model.ir_version = max(_IR_VERSION, onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True))
    try:
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ValueError(f"not a valid ONNX model: {onnx_parts.reason(error)}; export it again") from error
    limits.check_tensors(inferred.graph)
    for value, better in zip(model.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(better)
    return model


def _opset(model: onnx.ModelProto) -> int:
    versions = [opset.version for opset in model.opset_import if opset.domain in {"", "ai.onnx"}]
    # Before opset_import existed there was one opset, the first.
    return max(versions, default=1)


def _check_opset(model: onnx.ModelProto) -> None:
    opset, newest = _opset(model), onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        age = "old" if opset < OLDEST_OPSET else "new"
        raise ValueError(
            f"opset {opset} is too {age}: expected {OLDEST_OPSET} to {newest}; export it again with opset {OPSET}"
        )


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:
        raise ValueError(f"its functions cannot be inlined: {onnx_parts.reason(error)}; export it again") from error


def _check_operators(model: onnx.ModelProto) -> None:
    opset = _opset(model)
    for node in onnx_parts.nodes(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        where = f"operator {node.op_type!r} of node {onnx_parts.label(node)!r}"
        if domain not in _DOMAINS:
            raise ValueError(
                f"{where} is of the domain {domain!r}: expected ai.onnx, ai.onnx.ml or com.microsoft; "
                "export the model without custom operators"
            )
        if domain == "" and not onnx.defs.has(node.op_type, opset):
            raise ValueError(f"{where} does not exist in opset {opset}; export the model with a newer opset")


def _check_weights(model: onnx.ModelProto) -> None:
    for name, tensor in onnx_parts.tensors(model):
        if tensor.data_type == onnx.TensorProto.STRING:
            continue
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise ValueError(
                f"constant {name!r} cannot be read: {onnx_parts.reason(error)}; export the model again"
            ) from error
        if tensor.data_type in _FLOATS and (fault := _fault(np.atleast_1d(values))):
            raise ValueError(f"constant {name!r} holds {fault}; mend the weights and export the model again")


def _fault(values: np.ndarray) -> str | None:
    """Return what is wrong with a constant's numbers; None for sound ones.

    Infinity alone is a bound or a value for padding, and zeros with minus infinity are a mask: both are sound.
    """
    wide = values if values.dtype in {np.dtype("f4"), np.dtype("f8")} else values.astype(np.float32)
    if np.isfinite(wide).all():
        return None
    if np.isnan(wide).any():
        return f"NaN in {np.isnan(wide).sum()} of {wide.size} places"
    if wide.size == 1 or np.isin(wide, (0, -np.inf)).all():
        return None
    return f"infinity in {np.isinf(wide).sum()} of {wide.size} places"


def _drop_defaults(model: onnx.ModelProto) -> None:
    """Make constants of initialisers that are listed as inputs, as files of IR version 3 list all of theirs."""
    inputs = _inputs(model)
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in _DATATYPES:
        raise ValueError(f"{value.name!r}: expected a tensor of numbers, got another type; export the model without it")
    if not tensor.HasField("shape"):
        raise ValueError(f"{value.name!r}: expected a tensor with a shape, got none; export the model with shapes")
    return TensorSpec(name=value.name, datatype=_DATATYPES[tensor.elem_type], shape=onnx_parts.shape_of(value))
