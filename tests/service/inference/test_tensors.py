"""Tensors between wire and numpy: everything comes back as it went, nothing that does not fit gets in."""

from __future__ import annotations

import struct
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from tritonclient.grpc import InferResult

from export.manifest import TensorSpec
from protos.inference import open_inference_pb2 as pb
from service.errors import InvalidArgument, NotFound, Unimplemented
from service.inference import tensors, wire
from service.inference.datatypes import DATATYPES, Array, raw_of
from service.inference.shared_memory import Regions

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BATCH = 4
SPECS = (
    TensorSpec(name="images", datatype="FP32", shape=(-1, 2, 3)),
    TensorSpec(name="mask", datatype="UINT8", shape=(-1, -1)),
)
TEXTS = TensorSpec(name="texts", datatype="BYTES", shape=(-1, 2))


def request_of(arrays: dict[str, Array], *, datatypes: dict[str, str], raw: bool = True) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m")
    for name, array in arrays.items():
        datatype = DATATYPES[datatypes[name]]
        tensor = request.inputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        if raw:
            request.raw_input_contents.append(raw_of(array, datatypes[name]))
        else:
            assert datatype.field is not None
            getattr(tensor.contents, datatype.field).extend(array.ravel().tolist())
    return request


def sound(*, raw: bool = True) -> pb.ModelInferRequest:
    arrays: dict[str, Array] = {
        "images": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        "mask": np.ones((1, 2), np.uint8),
    }
    return request_of(arrays, datatypes={"images": "FP32", "mask": "UINT8"}, raw=raw)


def parsed(request: pb.ModelInferRequest) -> wire.InferRequest:
    return wire.parse(request.SerializeToString())


def decode(
    request: pb.ModelInferRequest, specs: tuple[TensorSpec, ...] = SPECS, *, regions: Regions | None = None
) -> dict[str, Array]:
    return tensors.decode_inputs(parsed(request), specs, max_batch=MAX_BATCH, regions=regions)


@st.composite
def named_arrays(draw: st.DrawFn, datatypes: list[str]) -> tuple[str, Array]:
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(st_numpy.array_shapes(max_dims=4, max_side=MAX_BATCH))
    elements = st.binary(max_size=5) if datatype == "BYTES" else None
    return datatype, draw(st_numpy.arrays(DATATYPES[datatype].dtype, shape, elements=elements))


@given(named=named_arrays(list(DATATYPES)))
def test_raw_tensors_come_back_bit_for_bit(named: tuple[str, Array]) -> None:
    check_round_trip(*named, raw=True)


@given(named=named_arrays([name for name, datatype in DATATYPES.items() if datatype.field is not None]))
def test_typed_tensors_come_back_bit_for_bit(named: tuple[str, Array]) -> None:
    check_round_trip(*named, raw=False)


def check_round_trip(datatype: str, array: Array, *, raw: bool) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1, *array.shape[1:]))
    request = request_of({"x": array}, datatypes={"x": datatype}, raw=raw)
    assert tensors.is_typed(parsed(request)) is not raw
    decoded = decode(request, (spec,))["x"]
    assert decoded.dtype == array.dtype
    assert bits(decoded) == bits(array)

    response = pb.ModelInferResponse()
    tensors.encode_outputs(response, {"x": decoded}, [tensors.Wanted(spec)], typed=not raw)
    (output,) = response.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("x", datatype, array.shape)
    # What was answered can be asked again.
    again = pb.ModelInferRequest(raw_input_contents=response.raw_output_contents)
    again.inputs.add(name="x", datatype=datatype, shape=output.shape, contents=output.contents)
    assert bits(decode(again, (spec,))["x"]) == bits(array)


def bits(array: Array) -> tuple[Any, Any]:
    if array.dtype == object:
        return array.shape, array.tolist()
    # One NaN is as good as another: protobuf's typed floats pass through Python's.
    quiet = np.where(np.isnan(array), np.array(np.nan, array.dtype), array) if array.dtype.kind == "f" else array
    return quiet.shape, quiet.tobytes()


@pytest.mark.parametrize("raw", [True, False])
def test_inputs_in_any_order(*, raw: bool) -> None:
    request = sound(raw=raw)
    arrays = decode(request)
    swapped = pb.ModelInferRequest(
        inputs=reversed(request.inputs), raw_input_contents=reversed(request.raw_input_contents)
    )
    for name, array in decode(swapped).items():
        np.testing.assert_array_equal(array, arrays[name])


def clear_contents(request: pb.ModelInferRequest) -> None:
    request.inputs[0].ClearField("contents")


def both_forms(request: pb.ModelInferRequest) -> None:
    request.inputs[0].contents.fp32_contents.extend(range(12))


def set_shape(*shape: int) -> Any:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].shape[:] = shape

    return change


def set_field(**fields: str) -> Any:
    def change(request: pb.ModelInferRequest) -> None:
        for name, value in fields.items():
            setattr(request.inputs[0], name, value)

    return change


def set_raw(index: int, data: bytes) -> Any:
    def change(request: pb.ModelInferRequest) -> None:
        request.raw_input_contents[index] = data

    return change


BAD_RAW = {
    "unknown input": (set_field(name="pictures"), "input 'pictures': expected one of 'images', 'mask'"),
    "one name for two": (set_field(name="mask"), "input 'images': expected in the request, got 'mask', 'mask'"),
    "unnamed input": (set_field(name=""), "input '': expected one of"),
    "duplicate input": (
        lambda request: (request.inputs.append(request.inputs[0]), request.raw_input_contents.append(b"")),
        "input 'images': expected once, got it 2 times",
    ),
    "missing input": (
        lambda request: (request.inputs.pop(0), request.raw_input_contents.pop(0)),
        "input 'images': expected in the request, got 'mask'",
    ),
    "no inputs": (
        lambda request: (request.ClearField("inputs"), request.ClearField("raw_input_contents")),
        "expected in the request, got none",
    ),
    "other datatype": (set_field(datatype="FP64"), "input 'images': expected datatype FP32, got 'FP64'"),
    "unknown datatype": (set_field(datatype="fp32"), "input 'images': expected datatype FP32, got 'fp32'"),
    "no datatype": (set_field(datatype=""), "input 'images': expected datatype FP32, got ''"),
    "bytes": (set_field(datatype="BYTES"), "input 'images': expected datatype FP32, got 'BYTES'"),
    "rank too low": (set_shape(2, 6), "input 'images': expected shape (1 to 4, 2, 3), got (2, 6)"),
    "rank too high": (set_shape(2, 2, 3, 1), "input 'images': expected shape (1 to 4, 2, 3), got (2, 2, 3, 1)"),
    "no shape": (set_shape(), "input 'images': expected shape (1 to 4, 2, 3), got ()"),
    "other dims": (set_shape(2, 3, 2), "input 'images': expected shape (1 to 4, 2, 3), got (2, 3, 2)"),
    "negative dim": (set_shape(2, -2, -3), "input 'images': expected shape (1 to 4, 2, 3), got (2, -2, -3)"),
    "negative batch": (set_shape(-1, 2, 3), "input 'images': expected shape (1 to 4, 2, 3), got (-1, 2, 3)"),
    "empty batch": (set_shape(0, 2, 3), "input 'images': expected shape (1 to 4, 2, 3), got (0, 2, 3)"),
    "batch too large": (set_shape(5, 2, 3), "input 'images': expected shape (1 to 4, 2, 3), got (5, 2, 3)"),
    "short": (set_raw(0, bytes(47)), "input 'images': expected 48 bytes for FP32 of shape (2, 2, 3), got 47"),
    "trailing bytes": (set_raw(0, bytes(52)), "input 'images': expected 48 bytes for FP32 of shape (2, 2, 3), got 52"),
    "empty": (set_raw(0, b""), "input 'images': expected 48 bytes for FP32 of shape (2, 2, 3), got 0"),
    "both forms": (both_forms, "input 'images': expected raw_input_contents or typed contents, got both"),
    "too few raw contents": (
        lambda request: request.raw_input_contents.pop(),
        "raw_input_contents: expected 2, one for each input outside shared memory ('images', 'mask'), got 1",
    ),
    "too many raw contents": (lambda request: request.raw_input_contents.append(b""), "raw_input_contents: expected 2"),
}

BAD_TYPED = {
    "no data": (clear_contents, "input 'images': expected 12 values for shape (2, 2, 3) in contents.fp32_contents"),
    "too few": (lambda request: request.inputs[0].contents.fp32_contents.pop(), "expected 12 values"),
    "too many": (lambda request: request.inputs[0].contents.fp32_contents.append(1), "got 13"),
    "wrong field": (
        lambda request: request.inputs[0].contents.fp64_contents.append(1),
        "input 'images': expected FP32 in contents.fp32_contents, got 'fp64_contents'",
    ),
    "out of range": (
        lambda request: request.inputs[1].contents.uint_contents.__setitem__(0, 256),
        "input 'mask': expected UINT8 values from 0 to 255, got 256",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_RAW.values(), ids=BAD_RAW.keys())
def test_bad_raw_requests_are_told_what_is_wrong(spoil: Any, message: str) -> None:
    request = sound()
    spoil(request)
    with pytest.raises(InvalidArgument) as caught:
        decode(request)
    assert message in str(caught.value)


@pytest.mark.parametrize(("spoil", "message"), BAD_TYPED.values(), ids=BAD_TYPED.keys())
def test_bad_typed_requests_are_told_what_is_wrong(spoil: Any, message: str) -> None:
    request = sound(raw=False)
    spoil(request)
    with pytest.raises(InvalidArgument) as caught:
        decode(request)
    assert message in str(caught.value)


def test_fp16_has_no_typed_field() -> None:
    spec = TensorSpec(name="x", datatype="FP16", shape=(-1,))
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype="FP16", shape=[1]).contents.fp32_contents.append(1)
    with pytest.raises(InvalidArgument, match="expected FP16 in raw_input_contents"):
        decode(request, (spec,))
    response = pb.ModelInferResponse()
    tensors.encode_outputs(response, {"x": np.ones(1, np.float16)}, [tensors.Wanted(spec)], typed=True)
    assert response.raw_output_contents == [np.ones(1, np.float16).tobytes()]


@given(request=st.builds(pb.ModelInferRequest.FromString, st.just(sound().SerializeToString())), data=st.data())
def test_no_request_gets_past_the_checks_or_breaks_them(request: pb.ModelInferRequest, data: st.DataObject) -> None:
    tensor = request.inputs[0]
    tensor.name = data.draw(st.sampled_from(["images", "mask", "x", ""]))
    tensor.datatype = data.draw(st.sampled_from(["FP32", "UINT8", "BYTES", ""]))
    tensor.shape[:] = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 5), max_size=5))
    request.raw_input_contents[:] = data.draw(st.lists(st.binary(max_size=64), max_size=3))
    try:
        arrays = decode(request)
    except InvalidArgument:
        return
    assert arrays["images"].shape[1:] == (2, 3)
    assert arrays["images"].dtype == np.float32


def test_outputs_in_the_order_wanted_and_each_once() -> None:
    request = pb.ModelInferRequest()
    assert specs_of(request) == list(SPECS)
    for name in ("mask", "images", "mask"):
        request.outputs.add(name=name)
    assert specs_of(request) == [SPECS[1], SPECS[0]]


def specs_of(request: pb.ModelInferRequest) -> list[TensorSpec]:
    return [wanted.spec for wanted in tensors.requested_outputs(request, SPECS)]


def test_an_unknown_output_names_the_known_ones() -> None:
    request = pb.ModelInferRequest()
    request.outputs.add(name="x")
    with pytest.raises(InvalidArgument, match="output 'x': expected one of 'images', 'mask'"):
        tensors.requested_outputs(request, SPECS)


def test_an_output_is_not_wanted_in_two_ways() -> None:
    request = pb.ModelInferRequest()
    request.outputs.add(name="images")
    request.outputs.add(name="images").parameters["classification"].int64_param = 1
    with pytest.raises(InvalidArgument, match="output 'images': expected once, got it twice with different parameters"):
        tensors.requested_outputs(request, SPECS)


def test_empty_contents_beside_raw_ones_are_none() -> None:
    request = sound()
    request.inputs[0].contents.SetInParent()
    assert decode(request)["images"].shape == (2, 2, 3)


def test_a_datatype_that_no_engine_takes_is_refused() -> None:
    request = pb.ModelInferRequest(raw_input_contents=[b"ab"])
    request.inputs.add(name="x", datatype="BF16", shape=[1])
    with pytest.raises(Unimplemented, match="input 'x': datatype BF16 is not served"):
        decode(request, (TensorSpec(name="x", datatype="BF16", shape=(-1,)),))


def texts(raw: bytes) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="texts", datatype="BYTES", shape=[1, 2])
    return request


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


BAD_BYTES = {
    "none": (b"", "input 'texts': expected 2 elements, each after its length of 4 bytes, got 0 bytes"),
    "too few": (
        packed(b"a"),
        "expected 2 elements, each after its length of 4 bytes, got 5 bytes that end in element 1",
    ),
    "half a length": (packed(b"a") + b"\0\0", "got 7 bytes that end in element 1"),
    "cut off": (packed(b"a", b"bc")[:-1], "expected 2 bytes for element 1, as the length before it says, got 1"),
    "a length of 4 GiB": (b"\xff" * 4 + b"a", "expected 4294967295 bytes for element 0, as the length before it says"),
    "trailing bytes": (packed(b"a", b"bc") + b"d", "input 'texts': expected 11 bytes for 2 elements, got 12"),
}


@pytest.mark.parametrize(("raw", "message"), BAD_BYTES.values(), ids=BAD_BYTES.keys())
def test_bad_bytes_tensors_are_told_what_is_wrong(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode(texts(raw), (TEXTS,))
    assert message in str(caught.value)


@given(raw=st.binary(max_size=30) | st.lists(st.binary(max_size=5), max_size=3).map(lambda given: packed(*given)))
def test_any_bytes_are_elements_or_refused(raw: bytes) -> None:
    try:
        (elements,) = decode(texts(raw), (TEXTS,))["texts"].tolist()
    except InvalidArgument:
        return
    assert packed(*elements) == raw


def images_as(*shape: int, images: list[bytes], typed: bool = False) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest()
    tensor = request.inputs.add(name="images", datatype="BYTES", shape=shape)
    if typed:
        tensor.contents.bytes_contents.extend(images)
    else:
        request.raw_input_contents.append(packed(*images))
    return request


def encoded(request: pb.ModelInferRequest, *, regions: Regions | None = None) -> list[bytes] | None:
    images = tensors.encoded_images(parsed(request), SPECS[0], max_batch=MAX_BATCH, regions=regions)
    return images if images is None else [*map(bytes, images)]


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_encoded_images_are_found(shape: tuple[int, ...], *, typed: bool) -> None:
    assert encoded(images_as(*shape, images=[b"one", b"two"], typed=typed)) == [b"one", b"two"]


def test_other_requests_have_no_encoded_images() -> None:
    assert encoded(sound()) is None
    alone = sound()
    alone.inputs.pop()
    assert encoded(alone) is None
    assert tensors.encoded_images(parsed(texts(packed(b"a", b"b"))), TEXTS, max_batch=MAX_BATCH) is None


BAD_IMAGES = {
    "of another name": (texts(packed(b"a", b"b")), "input 'texts': expected one of 'images'"),
    "no shape": (images_as(images=[b"a"]), "expected encoded images of shape (1 to 4) or (1 to 4, 1), got ()"),
    "a matrix": (images_as(1, 2, images=[b"a", b"b"]), "expected encoded images of shape (1 to 4) or (1 to 4, 1)"),
    "no image": (images_as(0, images=[]), "expected encoded images of shape (1 to 4) or (1 to 4, 1), got (0,)"),
    "too many": (images_as(5, images=[b"a"] * 5), "expected encoded images of shape (1 to 4) or (1 to 4, 1), got (5,)"),
    "fewer than said": (images_as(2, images=[b"a"]), "input 'images': expected 2 elements"),
    "fewer typed than said": (images_as(2, images=[b"a"], typed=True), "expected 2 values for shape (2,)"),
    "trailing bytes": (images_as(1, images=[b"a", b"b"]), "input 'images': expected 5 bytes for 1 elements, got 10"),
}


@pytest.mark.parametrize(("request_", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_encoded_images_are_told_what_is_wrong(request_: pb.ModelInferRequest, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        encoded(request_)
    assert message in str(caught.value)


REGION_SIZE = 64


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    shared = SharedMemory(create=True, size=REGION_SIZE)
    yield shared
    shared.close()
    shared.unlink()


@pytest.fixture
def memory(shared: SharedMemory) -> Iterator[memoryview]:
    assert shared.buf is not None
    with shared.buf[:] as buffer:
        yield buffer


@pytest.fixture
def regions(shared: SharedMemory) -> Regions:
    known = Regions(enabled=True)
    known.register("region", key=shared.name, offset=0, byte_size=REGION_SIZE)
    return known


def place(tensor: Any, *, size: int, offset: int = 0, region: str = "region") -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def test_inputs_in_shared_memory_have_no_raw_contents(memory: memoryview, regions: Regions) -> None:
    request = sound()
    expected = decode(request)
    memory[8:56] = request.raw_input_contents.pop(0)
    place(request.inputs[0], size=48, offset=8)
    for name, array in decode(request, regions=regions).items():
        np.testing.assert_array_equal(array, expected[name])
    assert not tensors.is_typed(parsed(request))


def test_typed_inputs_beside_one_in_shared_memory(memory: memoryview, regions: Regions) -> None:
    request = sound(raw=False)
    request.inputs[1].ClearField("contents")
    memory[:2] = b"\1\2"
    place(request.inputs[1], size=2)
    assert decode(request, regions=regions)["mask"].tolist() == [[1, 2]]
    assert tensors.is_typed(parsed(request))


def test_inputs_in_shared_memory_alone_are_answered_raw(memory: memoryview, regions: Regions) -> None:
    request = texts(b"")
    request.ClearField("raw_input_contents")
    memory[:11] = packed(b"a", b"bc")
    place(request.inputs[0], size=11)
    assert decode(request, (TEXTS,), regions=regions)["texts"].tolist() == [[b"a", b"bc"]]
    assert not tensors.is_typed(parsed(request))


def test_encoded_images_in_shared_memory(memory: memoryview, regions: Regions) -> None:
    request = images_as(1, images=[])
    request.ClearField("raw_input_contents")
    memory[:7] = packed(b"one")
    place(request.inputs[0], size=7)
    assert encoded(request, regions=regions) == [b"one"]


def test_encoded_images_in_shared_memory_are_no_longer_than_a_request_may_be(
    memory: memoryview, regions: Regions
) -> None:
    request = images_as(1, images=[])
    request.ClearField("raw_input_contents")
    memory[:7] = packed(b"one")
    place(request.inputs[0], size=7)
    found = tensors.encoded_images(parsed(request), SPECS[0], regions=regions, max_bytes=7)
    assert found == [b"one"]
    with pytest.raises(InvalidArgument, match=r"input 'images': expected at most 6 bytes in shared memory, .*, got 7"):
        tensors.encoded_images(parsed(request), SPECS[0], regions=regions, max_bytes=6)


LONG = {
    "of any size": (TensorSpec(name="x", datatype="UINT8", shape=(-1, -1)), [2, 10]),
    "of texts": (TensorSpec(name="x", datatype="BYTES", shape=(-1, 2)), [1, 2]),
}


@pytest.mark.parametrize(("spec", "shape"), LONG.values(), ids=LONG.keys())
def test_tensors_whose_length_the_model_leaves_open_are_no_longer_either(
    regions: Regions, spec: TensorSpec, shape: list[int]
) -> None:
    request = pb.ModelInferRequest()
    place(request.inputs.add(name="x", datatype=spec.datatype, shape=shape), size=20)
    with pytest.raises(InvalidArgument, match=r"input 'x': expected at most 19 bytes in shared memory, .*, got 20"):
        tensors.decode_inputs(parsed(request), (spec,), max_batch=MAX_BATCH, regions=regions, max_bytes=19)


def test_tensors_whose_length_the_model_says_may_be_longer_than_a_request(regions: Regions) -> None:
    spec = TensorSpec(name="x", datatype="UINT8", shape=(-1, 10))
    request = pb.ModelInferRequest()
    place(request.inputs.add(name="x", datatype="UINT8", shape=[2, 10]), size=20)
    found = tensors.decode_inputs(parsed(request), (spec,), max_batch=MAX_BATCH, regions=regions, max_bytes=19)
    assert found["x"].shape == (2, 10)


def placed_input(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents.pop(0)
    place(request.inputs[0], size=48)


def placed_and_typed(request: pb.ModelInferRequest) -> None:
    placed_input(request)
    both_forms(request)


def placed_with(**parameters: Any) -> Any:
    def change(request: pb.ModelInferRequest) -> None:
        placed_input(request)
        for name, value in parameters.items():
            tensor = request.inputs[0]
            tensor.parameters[f"shared_memory_{name}"].CopyFrom(pb.InferParameter(**value))

    return change


def placed_without(name: str) -> Any:
    def change(request: pb.ModelInferRequest) -> None:
        placed_input(request)
        request.inputs[0].parameters.pop(f"shared_memory_{name}")

    return change


BAD_PLACES = {
    "unknown region": (
        placed_with(region={"string_param": "other"}),
        NotFound,
        "shared memory region 'other': expected one that is registered",
    ),
    "raw contents too": (
        lambda request: place(request.inputs[0], size=48),
        InvalidArgument,
        "raw_input_contents: expected 1, one for each input outside shared memory ('mask'), got 2",
    ),
    "typed contents too": (
        placed_and_typed,
        InvalidArgument,
        "input 'images': expected shared memory or typed contents, got both",
    ),
    "short": (
        placed_with(byte_size={"int64_param": 44}),
        InvalidArgument,
        "input 'images': expected 48 bytes for FP32 of shape (2, 2, 3), got 44",
    ),
    "beyond the end": (placed_with(offset={"int64_param": 17}), InvalidArgument, "shared memory region 'region'"),
    "overflow": (placed_with(offset={"int64_param": 2**63 - 1}), InvalidArgument, "shared memory region 'region'"),
    "negative offset": (
        placed_with(offset={"int64_param": -1}),
        InvalidArgument,
        "input 'images': parameter 'shared_memory_offset': expected 0 or more, got -1",
    ),
    "no size": (
        placed_without("byte_size"),
        InvalidArgument,
        "input 'images': parameter 'shared_memory_byte_size': expected beside the other parameters",
    ),
    "no region": (
        placed_without("region"),
        InvalidArgument,
        "input 'images': parameter 'shared_memory_region': expected beside the other parameters",
    ),
    "a region of another type": (
        placed_with(region={"int64_param": 1}),
        InvalidArgument,
        "input 'images': parameter 'shared_memory_region': expected string_param, got int64_param",
    ),
    "an offset without value": (
        placed_with(offset={}),
        InvalidArgument,
        "input 'images': parameter 'shared_memory_offset': expected int64_param, got no value",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_PLACES.values(), ids=BAD_PLACES.keys())
def test_bad_places_are_told_what_is_wrong(spoil: Any, error: type[Exception], message: str, regions: Regions) -> None:
    request = sound()
    spoil(request)
    with pytest.raises(error) as caught:
        decode(request, regions=regions)
    assert message in str(caught.value)


def test_shared_memory_that_is_not_served() -> None:
    request = sound()
    placed_input(request)
    with pytest.raises(Unimplemented, match="input 'images': shared memory is not served"):
        decode(request)
    with pytest.raises(Unimplemented, match="shared memory is off"):
        decode(request, regions=Regions(enabled=False))


LOGITS = TensorSpec(name="logits", datatype="FP32", shape=(-1, 3))
SCORES = np.array([[0.5, 2.25, -1.0], [3.0, 3.0, 4.0]], np.float32)


def answer(
    request: pb.ModelInferRequest, *, typed: bool = False, regions: Regions | None = None, **outputs: Array
) -> pb.ModelInferResponse:
    specs = [LOGITS, *(spec for spec in SPECS if spec.name in outputs)]
    wanted = tensors.requested_outputs(request, specs, regions=regions)
    response = pb.ModelInferResponse()
    names = ("cat", "", "dog")
    tensors.encode_outputs(response, {"logits": SCORES, **outputs}, wanted, typed=typed, class_names=names)
    return response


def wanting(**parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest()
    output = request.outputs.add(name="logits")
    for name, value in parameters.items():
        output.parameters[name].CopyFrom(pb.InferParameter(**value))
    return request


@pytest.mark.parametrize("offset", [0, 16])
def test_outputs_in_shared_memory(memory: memoryview, regions: Regions, offset: int) -> None:
    request = wanting()
    place(request.outputs[0], size=32, offset=offset)
    request.outputs.add(name="mask")
    # Unregistered while the engine is busy: the answer goes where it was promised.
    wanted = tensors.requested_outputs(request, [LOGITS, SPECS[1]], regions=regions)
    regions.unregister()
    response = pb.ModelInferResponse()
    outputs: dict[str, Array] = {"logits": SCORES, "mask": np.ones((1, 2), np.uint8)}
    tensors.encode_outputs(response, outputs, wanted, typed=False)
    assert bytes(memory[offset : offset + SCORES.nbytes]) == SCORES.tobytes()
    # The raw contents of an output are where its clients look for them: at its own place.
    assert [output.name for output in response.outputs] == ["logits", "mask"]
    assert response.raw_output_contents == [b"", b"\1\1"]


def test_an_output_too_large_for_its_shared_memory_names_both_sizes(regions: Regions) -> None:
    request = wanting()
    place(request.outputs[0], size=23)
    with pytest.raises(InvalidArgument, match=r"output 'logits': expected room for 24 bytes .*'region', got .* 23"):
        answer(request, regions=regions)


def test_an_output_in_an_unknown_region_is_refused_before_the_engine_runs(regions: Regions) -> None:
    request = wanting()
    place(request.outputs[0], size=24, region="other")
    with pytest.raises(NotFound, match="shared memory region 'other'"):
        tensors.requested_outputs(request, [LOGITS], regions=regions)


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(("k", "shown"), [(1, 1), (2, 2), (3, 3), (2**40, 3)])
def test_classes_are_given_as_triton_gives_them(k: int, shown: int, *, typed: bool) -> None:
    response = answer(wanting(classification={"int64_param": k}), typed=typed)
    (output,) = response.outputs
    assert (output.datatype, tuple(output.shape)) == ("BYTES", (2, shown))
    expected = [
        [b"2.250000:1", b"0.500000:0:cat", b"-1.000000:2:dog"],
        [b"4.000000:2:dog", b"3.000000:0:cat", b"3.000000:1"],
    ]
    elements = [element for row in expected for element in row[:shown]]
    if typed:
        assert output.contents.bytes_contents == elements
        assert not response.raw_output_contents
    else:
        assert response.raw_output_contents == [packed(*elements)]


def test_tritonclient_reads_classes() -> None:
    result = InferResult(answer(wanting(classification={"int64_param": 1})))
    assert result.as_numpy("logits").tolist() == [[b"2.250000:1"], [b"4.000000:2:dog"]]


BAD_CLASSES = {
    "none": ({"int64_param": 0}, "output 'logits': parameter 'classification': expected 1 or more, got 0"),
    "negative": ({"int64_param": -3}, "expected 1 or more, got -3"),
    "a string": ({"string_param": "3"}, "parameter 'classification': expected int64_param, got string_param"),
    "no value": ({}, "parameter 'classification': expected int64_param, got no value"),
}


@pytest.mark.parametrize(("value", "message"), BAD_CLASSES.values(), ids=BAD_CLASSES.keys())
def test_bad_numbers_of_classes_are_told_what_is_wrong(value: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        answer(wanting(classification=value))
    assert message in str(caught.value)


def test_classes_do_not_go_to_shared_memory(regions: Regions) -> None:
    request = wanting(classification={"int64_param": 1})
    place(request.outputs[0], size=24)
    with pytest.raises(InvalidArgument, match="output 'logits': expected 'classification' or 'shared_memory_region'"):
        answer(request, regions=regions)
