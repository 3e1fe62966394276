"""Tensors between wire and numpy: everything comes back as it went, nothing that does not fit gets in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from export.manifest import TensorSpec
from protos.inference import open_inference_pb2 as pb
from service.errors import InvalidArgument, Unimplemented
from service.inference import tensors
from service.inference.tensors import DATATYPES, Array

MAX_BATCH = 4
SPECS = (
    TensorSpec(name="images", datatype="FP32", shape=(-1, 2, 3)),
    TensorSpec(name="mask", datatype="UINT8", shape=(-1, -1)),
)


def request_of(arrays: dict[str, Array], *, datatypes: dict[str, str], raw: bool = True) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m")
    for name, array in arrays.items():
        datatype = DATATYPES[datatypes[name]]
        tensor = request.inputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        if raw:
            request.raw_input_contents.append(array.astype(datatype.dtype).tobytes())
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


def decode(request: pb.ModelInferRequest) -> dict[str, Array]:
    return tensors.decode_inputs(request, SPECS, max_batch=MAX_BATCH)


@st.composite
def named_arrays(draw: st.DrawFn, datatypes: list[str]) -> tuple[str, Array]:
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(st_numpy.array_shapes(max_dims=4, max_side=MAX_BATCH))
    return datatype, draw(st_numpy.arrays(DATATYPES[datatype].dtype, shape))


@given(named=named_arrays(list(DATATYPES)))
def test_raw_tensors_come_back_bit_for_bit(named: tuple[str, Array]) -> None:
    check_round_trip(*named, raw=True)


@given(named=named_arrays([name for name, datatype in DATATYPES.items() if datatype.field is not None]))
def test_typed_tensors_come_back_bit_for_bit(named: tuple[str, Array]) -> None:
    check_round_trip(*named, raw=False)


def check_round_trip(datatype: str, array: Array, *, raw: bool) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1, *array.shape[1:]))
    request = request_of({"x": array}, datatypes={"x": datatype}, raw=raw)
    assert tensors.is_typed(request) is not raw
    decoded = tensors.decode_inputs(request, [spec], max_batch=MAX_BATCH)["x"]
    assert decoded.dtype == array.dtype
    assert bits(decoded) == bits(array)

    response = pb.ModelInferResponse()
    tensors.encode_outputs(response, {"x": decoded}, [spec], typed=not raw)
    (output,) = response.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("x", datatype, array.shape)
    # What was answered can be asked again.
    again = pb.ModelInferRequest(raw_input_contents=response.raw_output_contents)
    again.inputs.add(name="x", datatype=datatype, shape=output.shape, contents=output.contents)
    assert bits(tensors.decode_inputs(again, [spec], max_batch=MAX_BATCH)["x"]) == bits(array)


def bits(array: Array) -> tuple[Any, bytes]:
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
        "raw_input_contents: expected 2, one for each input ('images', 'mask'), got 1",
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
        tensors.decode_inputs(request, [spec], max_batch=1)
    response = pb.ModelInferResponse()
    tensors.encode_outputs(response, {"x": np.ones(1, np.float16)}, [spec], typed=True)
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
    assert tensors.requested_outputs(request, SPECS) == list(SPECS)
    for name in ("mask", "images", "mask"):
        request.outputs.add(name=name)
    assert tensors.requested_outputs(request, SPECS) == [SPECS[1], SPECS[0]]


def test_an_unknown_output_names_the_known_ones() -> None:
    request = pb.ModelInferRequest()
    request.outputs.add(name="x")
    with pytest.raises(InvalidArgument, match="output 'x': expected one of 'images', 'mask'"):
        tensors.requested_outputs(request, SPECS)


def test_parameters_that_would_change_the_answer_are_refused() -> None:
    request = sound()
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"
    with pytest.raises(Unimplemented, match="input 'images': parameter 'shared_memory_region' is not served"):
        decode(request)
    request.outputs.add(name="images").parameters["classification"].int64_param = 3
    with pytest.raises(Unimplemented, match="output 'images': parameter 'classification' is not served"):
        tensors.requested_outputs(request, SPECS)
