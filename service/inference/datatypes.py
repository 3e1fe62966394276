"""The protocol's datatypes: how each lies in memory, and which typed field carries it.

raw data --BYTES: a length of four bytes before each element--> elements --> raw data
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from service.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Datatype:
    """One of the protocol's datatypes.

    Attributes:
        dtype: how its elements lie in memory, little-endian; objects, each a `bytes`, for BYTES.
        field: of `InferTensorContents`; None where there is none.
    """

    dtype: np.dtype[Any]
    field: str | None


# BF16 is not among them: neither numpy nor any engine here takes it.
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
    "BYTES": Datatype(np.dtype("O"), "bytes_contents"),
}

# How the values of each typed field lie in memory.
FIELD_DTYPES = {
    "bool_contents": np.dtype("?"),
    "int_contents": np.dtype("<i4"),
    "int64_contents": np.dtype("<i8"),
    "uint_contents": np.dtype("<u4"),
    "uint64_contents": np.dtype("<u8"),
    "fp32_contents": np.dtype("<f4"),
    "fp64_contents": np.dtype("<f8"),
    "bytes_contents": np.dtype("O"),
}

_LENGTH = struct.Struct("<I")


def elements_of(raw: memoryview | bytes, *, count: int, owner: str) -> list[memoryview]:
    """Return the elements of a raw BYTES tensor, as slices of it.

    Args:
        raw: the tensor: before each element its length, four bytes, little-endian.
        count: how many elements its shape says.
        owner: whose data it is, for messages.

    Raises:
        InvalidArgument: an element is cut off, or there is more data than `count` elements.
    """
    view = memoryview(raw)
    elements = []
    position = 0
    for index in range(count):
        left = len(view) - position - _LENGTH.size
        if left < 0:
            raise InvalidArgument(
                f"{owner}: expected {count} elements, each after its length of {_LENGTH.size} bytes, "
                f"got {len(view)} bytes that end in element {index}"
            )
        (size,) = _LENGTH.unpack_from(view, position)
        if size > left:
            raise InvalidArgument(
                f"{owner}: expected {size} bytes for element {index}, as the length before it says, got {left}"
            )
        position += _LENGTH.size + size
        elements.append(view[position - size : position])
    if position != len(view):
        raise InvalidArgument(f"{owner}: expected {position} bytes for {count} elements, got {len(view)}")
    return elements


def raw_of(array: Array, datatype: str) -> bytes:
    """Return an array as the raw data of a tensor."""
    if datatype == "BYTES":
        return _joined(array.ravel().tolist())
    return array.astype(DATATYPES[datatype].dtype, copy=False).tobytes()


def _joined(elements: Iterable[bytes]) -> bytes:
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))
