"""Whatever is sent to any method, the server answers with a status that is the caller's, and goes on serving.

Bytes of all kinds go over a real channel, unparsed: arbitrary ones, good requests with a few bytes broken, and good
requests with something else in a few fields.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from protos.inference import model_repository_pb2
from protos.inference import open_inference_pb2 as pb
from service.settings import Settings
from tests.service.conftest import PIXELS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
    from google.protobuf.message import Message

    from tests.service.conftest import Publish

_SECONDS = 20

# Examples of each kind for each method: a few seconds all together.
_EXAMPLES = 25

_METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (pb.DESCRIPTOR, model_repository_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}

# The model that is asked. No literal has its name, since Hypothesis makes text of literals: nobody is to unload it.
_MODEL = f"served-{PIXELS}"

# What is not of the caller's making, or no status at all.
_NEVER = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}


def _inference(**parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=_MODEL, id="good")
    request.inputs.add(name="images", datatype="FP32", shape=[1, 3, 4, 4])
    request.raw_input_contents.append(np.ones(PIXELS, "<f4").tobytes())
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(value)
    return request


def _typed() -> pb.ModelInferRequest:
    request = _inference()
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend([1.0] * PIXELS)
    return request


def _encoded() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=_MODEL)
    request.inputs.add(name="images", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\x04\0\0\0\xff\xd8\xff\xe0")
    return request


def _shared() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=_MODEL)
    tensor = request.inputs.add(name="images", datatype="FP32", shape=[1, 3, 4, 4])
    tensor.parameters["shared_memory_region"].string_param = "mine"
    tensor.parameters["shared_memory_byte_size"].int64_param = 4 * PIXELS
    request.outputs.add(name="logits").parameters["classification"].int64_param = 2
    return request


_REQUESTS: list[Message] = [
    _inference(),
    # So large that its tensors are sliced out of it.
    _inference(large=pb.InferParameter(string_param="x" * 20_000)),
    _inference(priority=pb.InferParameter(int64_param=1), timeout=pb.InferParameter(int64_param=10**6)),
    _typed(),
    _encoded(),
    _shared(),
]

# Good requests, to be broken; methods without one get what has a name or nothing.
_SEEDS: dict[str, list[Message]] = {
    "ModelInfer": [*_REQUESTS],
    "ModelStreamInfer": [*_REQUESTS],
    # Of a model that nothing else here needs.
    "RepositoryModelLoad": [pb.RepositoryModelLoadRequest(model_name="shares")],
    "RepositoryModelUnload": [pb.RepositoryModelUnloadRequest(model_name="shares")],
    "SystemSharedMemoryRegister": [pb.SystemSharedMemoryRegisterRequest(name="mine", key="/tenet-none", byte_size=64)],
    "LogSettings": [
        pb.LogSettingsRequest(settings={"log_verbose_level": pb.LogSettingsRequest.SettingValue(uint32_param=0)})
    ],
    "TraceSetting": [pb.TraceSettingRequest(settings={"trace_rate": pb.TraceSettingRequest.SettingValue(value=["1"])})],
    "ServerReflectionInfo": [reflection_pb2.ServerReflectionRequest(list_services="")],
}

_WORDS = (
    "",
    "shares",
    "1",
    "9" * 5000,
    "../shares",
    "images",
    "logits",
    "FP32",
    "BF16",
    "BYTES",
    "priority",
    "timeout",
    "sequence_id",
    "triton_enable_empty_final_response",
    "classification",
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
    "binary_data",
    "config",
    "log_verbose_level",
    "log_info",
    "trace_rate",
    "trace_level",
    "\0",
    "ü\u2028",
)
# Messages within messages: as deep as any here.
_DEEPEST = 4

_WHOLE = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 8, 9, 48]), st.integers())
_TEXT = st.one_of(st.sampled_from(_WORDS), st.text(max_size=12))
_BYTES = st.binary(max_size=40)


def _seeds(path: str) -> list[Any]:
    method = _METHODS[path]
    kind: Any = GetMessageClass(method.input_type)
    usual = [kind(name=_MODEL)] if "name" in method.input_type.fields_by_name else [kind()]
    return _SEEDS.get(method.name, usual)


@st.composite
def broken(draw: st.DrawFn, seeds: list[Message]) -> bytes:
    """A good request with a few bytes changed, cut out, put in or doubled."""
    data = bytearray(draw(st.sampled_from(seeds)).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        first, second = (draw(st.integers(0, len(data))) for _ in range(2))
        low, high = min(first, second), max(first, second)
        match draw(st.sampled_from(["cut off", "cut out", "change", "put in", "double"])):
            case "cut off":
                del data[high:]
            case "cut out":
                del data[low:high]
            case "change":
                data[low : low + 1] = draw(st.binary(min_size=1, max_size=1))
            case "put in":
                data[low:low] = draw(_BYTES)
            case "double":
                data[low:low] = data[low:high]
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, seeds: list[Message]) -> Message:
    """A good request with something else in a few of its fields, well-formed all the same."""
    message = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        _alter(draw, message)
    return message


def _alter(draw: st.DrawFn, message: Any) -> None:
    fields = [*message.DESCRIPTOR.fields]
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    inner = _inside(message, field)
    # Mostly deeper down: what is there is more than what is looked at first.
    deeper = draw(st.integers(0, 3))
    if inner and deeper:
        _alter(draw, draw(st.sampled_from(inner)))
        return
    if draw(st.booleans()):
        message.ClearField(field.name)
    _fill(draw, message, field, depth=0)


def _inside(message: Any, field: FieldDescriptor) -> list[Any]:
    """Return the messages that a field has."""
    value, kind = getattr(message, field.name), field.message_type
    if kind is None:
        return []
    if kind.GetOptions().map_entry:
        return [value[key] for key in value] if kind.fields_by_name["value"].message_type else []
    if field.is_repeated:
        return [*value]
    return [value] if message.HasField(field.name) else []


@st.composite
def _messages(draw: st.DrawFn, descriptor: Descriptor, depth: int) -> Any:
    message: Any = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if depth < _DEEPEST and draw(st.booleans()):
            _fill(draw, message, field, depth=depth)
    return message


def _fill(draw: st.DrawFn, message: Any, field: FieldDescriptor, *, depth: int) -> None:
    """Put something arbitrary into a field, beside what is there already if there can be several."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        value: Any = kind.fields_by_name["value"].message_type
        for key in draw(st.lists(_TEXT, max_size=3)):
            getattr(message, field.name)[key].CopyFrom(draw(_messages(value, depth + 1)))
    elif field.is_repeated:
        items = _messages(kind, depth + 1) if kind is not None else _scalar(field)
        getattr(message, field.name).extend(draw(st.lists(items, max_size=4)))
    elif kind is not None:
        getattr(message, field.name).CopyFrom(draw(_messages(kind, depth + 1)))
    else:
        setattr(message, field.name, draw(_scalar(field)))


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    bits = {field.CPPTYPE_INT32: 31, field.CPPTYPE_INT64: 63, field.CPPTYPE_UINT32: 32, field.CPPTYPE_UINT64: 64}
    if field.cpp_type in bits:
        signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
        limit = 1 << bits[field.cpp_type]
        return _WHOLE.map(lambda number: min(max(number, -limit if signed else 0), limit - 1))
    if field.type == field.TYPE_BYTES:
        return _BYTES
    if field.type == field.TYPE_STRING:
        return _TEXT
    if field.cpp_type == field.CPPTYPE_BOOL:
        return st.booleans()
    return st.floats(width=32 if field.cpp_type == field.CPPTYPE_FLOAT else 64)


@pytest.fixture(scope="module")
def channel(
    loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory, publish: Publish
) -> Iterator[grpc.Channel]:
    """A server on which everything is switched on that a client can switch or use."""
    from tests.service.conftest import Servers

    folder: Path = tmp_path_factory.mktemp("fuzzed")
    publish(folder, _MODEL)
    publish(folder, "shares", output="probabilities")
    chosen = {
        "models": {"mode": "explicit", "load": [_MODEL]},
        "shared_memory": {"enabled": True},
        "cache": {"enabled": True},
        "batching": {"priority_levels": 3},
    }
    level = logging.getLogger().level
    servers = Servers(loop)
    with grpc.insecure_channel(servers.start(folder, Settings.model_validate(chosen)).address) as channel:
        yield channel
    servers.stop()
    logging.getLogger().setLevel(level)


def ending(channel: Any, path: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Send bytes to a method, and a second time if it takes a stream; return how that ended."""
    method = _METHODS[path]
    try:
        if method.client_streaming:
            answers = channel.stream_stream(path)(iter([data, data]), timeout=_SECONDS)
            _check_answers(path, list(answers))
        elif method.server_streaming:
            answers = channel.unary_stream(path)(data, timeout=_SECONDS)
            next(answers)
            answers.cancel()
        else:
            channel.unary_unary(path)(data, timeout=_SECONDS)
    except grpc.RpcError as error:
        return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


def _check_answers(path: str, answers: list[bytes]) -> None:
    """Errors inside a stream of inferences are as much the caller's as others."""
    if path.endswith("/ModelStreamInfer"):
        told = [pb.ModelStreamInferResponse.FromString(answer).error_message for answer in answers]
        assert not [message for message in told if "internal error" in message]


def still_serves(channel: Any) -> bool:
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    answer = pb.ModelInferResponse.FromString(infer(_inference().SerializeToString(), timeout=_SECONDS))
    return list(answer.outputs[0].shape) == [1, 5]


def check(channel: grpc.Channel, path: str, data: bytes) -> None:
    status, details = ending(channel, path, data)
    assert status not in _NEVER, details
    # That is what the client itself says where nobody answers.
    assert (status, details) != (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    assert still_serves(channel)


_settings = settings(
    max_examples=_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.parametrize("path", _METHODS)
@_settings
@given(data=st.binary(max_size=200))
@example(data=b"")
@example(data=b"\xff" * 11)
def test_arbitrary_bytes(channel: grpc.Channel, path: str, data: bytes) -> None:
    check(channel, path, data)


@pytest.mark.parametrize("path", _METHODS)
@_settings
@given(data=st.data())
def test_good_requests_with_something_broken(channel: grpc.Channel, path: str, data: st.DataObject) -> None:
    check(channel, path, data.draw(broken(_seeds(path))))


@pytest.mark.parametrize("path", _METHODS)
@_settings
@given(data=st.data())
def test_well_formed_messages_of_other_content(channel: grpc.Channel, path: str, data: st.DataObject) -> None:
    check(channel, path, data.draw(altered(_seeds(path))).SerializeToString())


@pytest.mark.slow
@settings(parent=_settings, max_examples=5000)
@given(data=st.one_of(broken(_REQUESTS), altered(_REQUESTS).map(lambda request: request.SerializeToString())))
def test_many_inferences_that_are_not_quite_good(channel: grpc.Channel, data: bytes) -> None:
    check(channel, "/inference.GRPCInferenceService/ModelInfer", data)
