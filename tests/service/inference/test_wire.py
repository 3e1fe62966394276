"""Requests as bytes: what is sliced out of them is what protobuf would read, and nothing else gets in."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.inference import open_inference_pb2 as pb
from service.errors import InvalidArgument
from service.inference import wire

RAW = 7


def varint(value: int, *, padding: int = 0) -> bytes:
    """Return a varint, `padding` bytes longer than it has to be."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F)
    digits += [0] * padding
    return bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])


def field(number: int, content: bytes, *, tag_padding: int = 0, length_padding: int = 0) -> bytes:
    tag = varint(number << 3 | 2, padding=tag_padding)
    return tag + varint(len(content), padding=length_padding) + content


# A tensor that makes any request large enough to be sliced.
LARGE = field(RAW, bytes(wire.SLICED_FROM))


def sound() -> pb.ModelInferRequest:
    """Return a request with every field of the message set."""
    request = pb.ModelInferRequest(
        model_name="m", model_version="1", id="é", raw_input_contents=[b"abc", b"", b"d" * 200]
    )
    request.parameters["timeout"].int64_param = 5
    request.parameters["x"].string_param = "y"
    for name in ("a", "b"):
        tensor = request.inputs.add(name=name, datatype="FP32", shape=[1, 300])
        tensor.parameters["p"].double_param = 0.5
        tensor.contents.fp32_contents.extend([1, 2])
        tensor.contents.bytes_contents.append(b"\xff")
    request.outputs.add(name="c").parameters["classification"].int64_param = 3
    return request


def check(data: bytes) -> None:
    """Fail unless a request is read just as protobuf reads it."""
    try:
        expected = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        with pytest.raises(InvalidArgument, match=f"got {len(data)} bytes that protobuf cannot read"):
            wire.parse(data)
        return
    request = wire.parse(data)
    assert [*map(bytes, request.raw)] == expected.raw_input_contents
    expected.ClearField("raw_input_contents")
    assert request.message.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


fields = st.builds(
    field,
    st.integers(1, 8) | st.just(RAW) | st.integers(1, 2**29 - 1),
    st.binary(max_size=20) | st.just(bytes(300)),
    tag_padding=st.sampled_from([0, 0, 0, 1, 4, 5, 9]),
    length_padding=st.sampled_from([0, 0, 0, 1, 3, 4, 5, 9]),
)
# Of any wire type, groups and the ones that there are none of among them, with what follows cut off or not.
tagged = st.builds(
    lambda number, kind, rest: varint(number << 3 | kind) + rest,
    st.integers(0, 9) | st.just(RAW),
    st.integers(0, 7),
    st.binary(max_size=10),
)
groups = st.builds(
    lambda number, content: varint(number << 3 | 3) + content + varint(number << 3 | 4),
    st.integers(1, 9),
    fields | st.binary(max_size=4),
)
pieces = st.sampled_from(
    [
        sound().SerializeToString(),
        *(pb.ModelInferRequest(**{name: getattr(sound(), name)}).SerializeToString() for name in ("id", "parameters")),
        LARGE,
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a request with some bytes of it replaced, inserted, removed or sent twice."""
    data = sound().SerializeToString()
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(begin + 20, len(data))))
        new = draw(st.binary(max_size=3) | st.just(data[begin:end] * 2))
        data = data[:begin] + new + data[end:]
    at = draw(st.sampled_from([0, len(data)]) | st.integers(0, len(data)))
    return data[:at] + LARGE + data[at:]


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(pieces | fields | tagged | groups | st.binary(max_size=6), max_size=6), at=st.integers(0, 6))
def test_any_fields_are_read_as_protobuf_reads_them(parts: list[bytes], at: int) -> None:
    check(b"".join(parts))
    check(b"".join([*parts[:at], LARGE, *parts[at:]]))


@settings(max_examples=400, deadline=None)
@given(data=mutated())
def test_any_mutated_request_is_read_as_protobuf_reads_it(data: bytes) -> None:
    check(data)


@settings(max_examples=400, deadline=None)
@given(data=st.binary(max_size=200), cut=st.integers(0, wire.SLICED_FROM))
def test_any_bytes_are_read_as_protobuf_reads_them(data: bytes, cut: int) -> None:
    check(data)
    check(LARGE + data)
    check(data + LARGE)
    check((data + LARGE)[: len(data) + cut])


CASES = {
    "nothing": b"",
    "invalid UTF-8": field(1, b"\xff"),
    "a string as a number": b"\x08\x01",
    "raw as a number": b"\x38\x01",
    "raw as a fixed32": b"\x3d\x01\x02\x03\x04",
    "raw as a group": b"\x3b\x3c",
    "a group without end": b"\x43",
    "an end without group": b"\x44",
    "field 0": b"\x02\x00",
    "an unknown field": field(9, b"abc"),
    "a padded tag": field(RAW, b"abc", tag_padding=1),
    "a tag padded too much": field(RAW, b"abc", tag_padding=9),
    "a padded length": field(RAW, b"abc", length_padding=4),
    "a length padded too much": field(RAW, b"abc", length_padding=9),
    "a length beyond the end": b"\x3a\x05abc",
    "a length of 2 GiB": b"\x3a\xff\xff\xff\xff\x07",
    "a length of 4 GiB and 3": b"\x3a\x83\x80\x80\x80\x10abc",
    "a length cut off": b"\x3a\x80",
    "a tag cut off": b"\x3a",
    "an input that is none": field(5, b"\xff\xff"),
    "names twice": field(1, b"a") + field(RAW, b"x") + field(1, b"b"),
    "more fields than are looked at": field(RAW, b"x") * 1000 + field(1, b"a"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_odd_requests_are_read_as_protobuf_reads_them(case: bytes) -> None:
    for data in (case, LARGE + case, case + LARGE, LARGE + case + LARGE):
        check(data)


def test_tensors_of_large_requests_are_not_copied() -> None:
    expected = sound()
    expected.raw_input_contents.insert(1, bytes(wire.SLICED_FROM))
    data = expected.SerializeToString()
    request = wire.parse(data)
    assert [entry.obj is data for entry in request.raw if isinstance(entry, memoryview)] == [True] * 4
    assert all(entry.readonly for entry in request.raw if isinstance(entry, memoryview))
    assert [*request.raw] == expected.raw_input_contents


def test_a_message_does_not_keep_its_tensors_twice() -> None:
    for data in (sound().SerializeToString(), sound().SerializeToString() + LARGE):
        request = wire.parse(data)
        assert not request.message.raw_input_contents
        assert request.message.inputs[1].name == "b"


def test_responses_are_written_as_protobuf_writes_them() -> None:
    response = pb.ModelInferResponse(model_name="m", raw_output_contents=[b"abc"])
    assert pb.ModelInferResponse.FromString(wire.serialise(response)) == response
