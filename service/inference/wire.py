"""Inference requests and responses as bytes: tensors are sliced out of a large request and never copied.

    bytes --top-level fields--> raw_input_contents, as slices of the bytes
                            '-> all other fields --protobuf--> ModelInferRequest
    ModelInferResponse --protobuf--> bytes

Protobuf copies each tensor twice, into its own memory and out of it again, which is most of what a large request costs.
Only requests of the plainest form are sliced: whatever protobuf could read in another way is left to protobuf, so that
both ways accept the same bytes and understand the same by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from protos.inference import open_inference_pb2 as pb
from service.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

# Bytes of a request from which slicing it takes less time than copying its tensors (benchmarks/wire.py).
SLICED_FROM = 32 << 10

# Tags, of one byte each, of the message's fields 1 to 7: strings, messages and bytes, all of them with a length.
_FIELDS = frozenset(number << 3 | 2 for number in range(1, 8))
_RAW = 7 << 3 | 2

# Fields of a request that are looked at one by one: models have few tensors, and a request of millions of empty fields
# must not cost more than protobuf takes for it.
_MOST_FIELDS = 256

# Bytes of a length, seven bits each: they hold the 2 GiB that a message may have.
_LONGEST_LENGTH = 5


@dataclass(slots=True)
class InferRequest:
    """A request for one inference.

    Attributes:
        message: everything but `raw_input_contents`.
        raw: what that field has; slices hold on to the bytes of the whole request.
    """

    message: pb.ModelInferRequest
    raw: Sequence[memoryview | bytes]


def parse(data: bytes) -> InferRequest:
    """Read a request.

    Raises:
        InvalidArgument: protobuf would not read it.
    """
    try:
        if len(data) >= SLICED_FROM:
            sliced = _sliced(data)
            if sliced is not None:
                return sliced
        message = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        raise InvalidArgument(
            f"request: expected a serialised ModelInferRequest, got {len(data)} bytes that protobuf cannot read; "
            "is the client's definition of the protocol the published one?"
        ) from None
    raw = [*message.raw_input_contents]
    message.ClearField("raw_input_contents")
    return InferRequest(message, raw)


def serialise(response: pb.ModelInferResponse) -> bytes:
    """Return a response's bytes."""
    return response.SerializeToString()


def _sliced(data: bytes) -> InferRequest | None:
    """Return a request with its tensors sliced out of it; None if it is not of the plainest form.

    In that form the message is a row of tag, length and content, each tag one byte of a field that the protocol has,
    no content longer than what is left. What protobuf makes of the other fields does not depend on field 7.
    """
    view, end = memoryview(data), len(data)
    others: list[memoryview] = []
    raw: list[memoryview] = []
    position = seen = 0
    for _ in range(_MOST_FIELDS):
        if position + 1 >= end:
            break
        start, tag, size = position, data[position], data[position + 1]
        size, position = (size, position + 2) if size < 0x80 else _length(data, position + 1)
        if tag not in _FIELDS:
            return None
        after = position + size
        if tag == _RAW:
            others.append(view[seen:start])
            raw.append(view[position:after])
            seen = after
        position = after
    # Before the end: too many fields, or half of one. Beyond it: a field that is cut off.
    if position != end:
        return None
    others.append(view[seen:])
    return InferRequest(pb.ModelInferRequest.FromString(b"".join(others)), raw)


def _length(data: bytes, position: int) -> tuple[int, int]:
    """Return a length and where its content begins: beyond the data if the length is cut off or too long."""
    size = 0
    for index, byte in enumerate(data[position : position + _LONGEST_LENGTH]):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return size, position + index + 1
    return size, len(data) + 1
