"""Clients of the field over real sockets: Triton's (sync, asyncio, stream), KServe's and MLServer's messages.

The second half is the table of a real Triton's status codes, each row with what this server answers; where that
differs, the row says from what.
"""

from __future__ import annotations

import asyncio
import io
import queue
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.unknown_fields import UnknownFieldSet
from PIL import Image
from tritonclient.grpc import InferenceServerClient as Triton
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult
from tritonclient.grpc import aio as triton_aio
from tritonclient.utils import InferenceServerException

from protos.inference import model_repository_pb2, model_repository_pb2_grpc
from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.settings import Settings
from tests.service.conftest import CLASSES, PIXELS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from export.engines.base import Images
    from service.server import Serving
    from tests.service.conftest import GatedEngine, Publish, Start

_SECONDS = 20

Code = grpc.StatusCode


@pytest.fixture
def stub(serving: Serving) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(serving.address) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def explicit_repository(tmp_path_factory: pytest.TempPathFactory, publish: Publish) -> Path:
    folder = tmp_path_factory.mktemp("explicit")
    publish(folder, "linear", seed=0)
    publish(folder, "shares", output="probabilities")
    publish(folder, "broken")
    (folder / "broken" / "1" / "model.onnx").write_bytes(b"not what was published")
    return folder


@pytest.fixture
def explicit(start: Start, explicit_repository: Path) -> Serving:
    """A server whose clients load and unload; `linear` is loaded."""
    return start(explicit_repository, Settings.model_validate({"models": {"mode": "explicit", "load": ["linear"]}}))


def triton_input(images: Images) -> InferInput:
    tensor = InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    return tensor


def request_of(images: Images, *, model: str = "linear", version: str = "", identity: str = "") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=identity)
    request.inputs.add(name="images", datatype="FP32", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    return request


def refusal(call: Any, request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=_SECONDS)
    return caught.value.code(), str(caught.value.details())


# Triton's clients


def test_triton_client_reads_what_the_server_is(triton: Triton) -> None:
    metadata = triton.get_server_metadata()
    assert metadata.name == "tenet"
    assert set(metadata.extensions) >= {"statistics", "model_configuration", "classification", "logging", "trace"}
    # What is not served, or not switched on, is not claimed.
    assert not {"sequence", "cuda_shared_memory", "system_shared_memory"} & set(metadata.extensions)


def test_triton_client_reads_statistics_whose_counts_agree(start: Start, repository: Path, images: Images) -> None:
    serving = start(repository)
    with Triton(serving.address) as triton:
        for n in (1, 3, 3):
            triton.infer("linear", [triton_input(images[:n])], model_version="1")
        with pytest.raises(InferenceServerException):
            triton.infer("linear", [triton_input(images[:9])], model_version="1")
        (told,) = triton.get_inference_statistics("linear", "1").model_stats
        both = triton.get_inference_statistics("linear").model_stats
        every = triton.get_inference_statistics().model_stats
    assert (told.name, told.version) == ("linear", "1")
    assert (told.inference_count, told.execution_count) == (7, 3)
    counted = told.inference_stats
    assert counted.success.count == counted.queue.count == 3
    assert counted.compute_input.count == counted.compute_infer.count == counted.compute_output.count == 3
    assert counted.fail.count == 1
    assert 0 < counted.compute_infer.ns <= counted.success.ns
    assert {each.batch_size: each.compute_infer.count for each in told.batch_stats} == {1: 1, 3: 2}
    assert [(each.name, each.version) for each in both] == [("linear", "1"), ("linear", "2")]
    assert {each.name for each in every} == {"linear", "shares", "stored"}


def test_triton_client_gets_classes(triton: Triton, images: Images) -> None:
    outputs = [InferRequestedOutput("logits", class_count=2)]
    classes = triton.infer("linear", [triton_input(images[:3])], outputs=outputs).as_numpy("logits")
    logits = triton.infer("linear", [triton_input(images[:3])]).as_numpy("logits")
    assert classes.shape == (3, 2)
    scores, indices, names = zip(*(text.decode().split(":") for text in classes[:, 0]), strict=True)
    assert [int(index) for index in indices] == logits.argmax(axis=1).tolist()
    assert [float(score) for score in scores] == pytest.approx(logits.max(axis=1).tolist(), abs=1e-5)
    assert set(names) <= {"plane", "car", "bird", "cat", "deer"}


def test_triton_client_gives_priority_timeout_and_parameters(triton: Triton, images: Images) -> None:
    result = triton.infer(
        "linear", [triton_input(images[:1])], priority=1, timeout=5_000_000, parameters={"mine": "value", "also": 1}
    )
    assert result.as_numpy("logits").shape == (1, CLASSES)


def test_triton_client_calls_back(triton: Triton, images: Images) -> None:
    answers: queue.Queue[tuple[InferResult | None, Exception | None]] = queue.Queue()
    triton.async_infer("linear", [triton_input(images[:2])], lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=_SECONDS)
    assert error is None
    assert result is not None
    assert result.as_numpy("logits").shape == (2, CLASSES)


async def test_triton_asyncio_client_asks_many_at_once(serving: Serving, images: Images, weights: Any) -> None:
    async with triton_aio.InferenceServerClient(serving.address) as client:
        assert await client.is_server_ready()
        results = await asyncio.gather(
            *(client.infer("linear", [triton_input(images[i : i + 1])], model_version="1") for i in range(20))
        )
    answers = np.concatenate([result.as_numpy("logits") for result in results])
    np.testing.assert_allclose(answers, images[:20].reshape(20, -1) @ weights(0), rtol=1e-4, atol=1e-4)


async def test_triton_asyncio_client_streams(serving: Serving, images: Images) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(5):
            yield {
                "model_name": "linear",
                "inputs": [triton_input(images[number : number + 1])],
                "request_id": str(number),
            }

    async with triton_aio.InferenceServerClient(serving.address) as client:
        answers = [answer async for answer in client.stream_infer(requests())]
    assert [error for _, error in answers] == [None] * 5
    assert [result.get_response().id for result, _ in answers] == ["0", "1", "2", "3", "4"]


def test_triton_client_streams_and_a_bad_request_ends_itself_alone(triton: Triton, images: Images) -> None:
    answers: queue.Queue[tuple[InferResult | None, Exception | None]] = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)))
    triton.async_stream_infer("linear", [triton_input(images[:1])], request_id="first")
    triton.async_stream_infer("linear", [triton_input(images[:9])], request_id="too many")
    triton.async_stream_infer("linear", [triton_input(images[:2])], request_id="last")
    told = [answers.get(timeout=_SECONDS) for _ in range(3)]
    triton.stop_stream()
    (first, _), (_, error), (last, _) = told
    assert first is not None
    assert last is not None
    assert first.get_response().id == "first"
    assert first.get_response().parameters["triton_final_response"].bool_param
    assert str(error).endswith("input 'images': expected shape (1 to 8, 3, 4, 4), got (9, 3, 4, 4)")
    assert last.as_numpy("logits").shape == (2, CLASSES)


def test_triton_client_ends_a_stream_by_an_error_if_it_asks_for_that(triton: Triton, images: Images) -> None:
    answers: queue.Queue[tuple[InferResult | None, Exception | None]] = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)), headers={"triton_grpc_error": "true"})
    triton.async_stream_infer("linear", [triton_input(images[:1])])
    triton.async_stream_infer("nobody", [triton_input(images[:1])])
    (result, _), (_, error) = answers.get(timeout=_SECONDS), answers.get(timeout=_SECONDS)
    triton.stop_stream()
    assert result is not None
    assert isinstance(error, InferenceServerException)
    assert error.status() == "StatusCode.NOT_FOUND"


def test_triton_client_loads_lists_and_unloads(explicit: Serving, images: Images) -> None:
    with Triton(explicit.address) as triton:
        assert triton.is_server_ready()
        assert not triton.is_model_ready("shares")
        triton.load_model("shares")
        assert triton.is_model_ready("shares")
        index = triton.get_model_repository_index()
        states = {(model.name, model.version): model.state for model in index.models}
        assert states[("shares", "1")] == states[("linear", "1")] == "READY"
        assert states[("broken", "1")] == "UNAVAILABLE"
        triton.unload_model("shares", unload_dependents=True)
        assert not triton.is_model_ready("shares")
        with pytest.raises(InferenceServerException, match="model 'shares' has no version that can be served"):
            triton.infer("shares", [triton_input(images[:1])])


def test_triton_client_sets_the_log(triton: Triton) -> None:
    before = triton.get_log_settings(as_json=True)["settings"]
    assert set(before) == {
        "log_file",
        "log_info",
        "log_warning",
        "log_error",
        "log_verbose_level",
        "log_format",
    }
    try:
        after = triton.update_log_settings({"log_info": True, "log_verbose_level": 1}, as_json=True)["settings"]
        assert after["log_verbose_level"] == {"uint32_param": 1}
        after = triton.update_log_settings({"log_verbose_level": 0, "log_info": False}, as_json=True)["settings"]
        assert after["log_info"] == {"bool_param": False}
        assert after["log_warning"] == {"bool_param": True}
    finally:
        triton.update_log_settings(
            {
                "log_info": before["log_info"]["bool_param"],
                "log_warning": True,
                "log_error": True,
                "log_verbose_level": 0,
            }
        )


def test_triton_client_reads_trace_settings(triton: Triton) -> None:
    told = triton.get_trace_settings(as_json=True)["settings"]
    assert told["trace_level"] == {"value": ["OFF"]}
    assert told["trace_mode"] == {"value": ["opentelemetry"]}
    assert triton.get_trace_settings("linear", as_json=True)["settings"] == told
    assert triton.update_trace_settings(settings={"trace_level": None, "trace_rate": "4"}, as_json=True)["settings"][
        "trace_rate"
    ] == {"value": ["4"]}
    assert triton.update_trace_settings(settings={"trace_rate": None}, as_json=True)["settings"] == told


def test_triton_client_sends_encoded_images(triton: Triton) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    encoded = np.array([png(image) for image in stored], object)
    pictures = InferInput("images", [3], "BYTES")
    pictures.set_data_from_numpy(encoded)
    images = (stored.transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)
    np.testing.assert_allclose(
        triton.infer("linear", [pictures]).as_numpy("logits"),
        triton.infer("linear", [triton_input(images)]).as_numpy("logits"),
        rtol=1e-4,
        atol=1e-4,
    )
    spoilt = InferInput("images", [2], "BYTES")
    spoilt.set_data_from_numpy(np.array([encoded[0], b"no image"], object))
    with pytest.raises(InferenceServerException, match="element 1"):
        triton.infer("linear", [spoilt])


def png(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


# KServe's and MLServer's dialects


def test_metadata_leave_the_field_alone_that_dialects_disagree_on(serving: Serving) -> None:
    """Its type is a map of strings in the specification, and a map of messages at MLServer."""
    with grpc.insecure_channel(serving.address) as channel:
        call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
        answer: bytes = call(pb.ModelMetadataRequest(name="linear").SerializeToString(), timeout=10)
    # To a message without fields all are unknown.
    unknown: Any = UnknownFieldSet(pb.ServerLiveRequest.FromString(answer))
    numbers = {field.field_number for field in unknown}
    assert {1, 2, 3, 4, 5} <= numbers
    assert 6 not in numbers


def test_kserves_load_and_unload_name_the_model_first(explicit: Serving) -> None:
    with grpc.insecure_channel(explicit.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        # KServe's request is {1: model_name}: the bytes of our message with that field alone.
        loaded = stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(repository_name="shares"), timeout=_SECONDS)
        assert (loaded.model_name, loaded.isLoaded) == ("shares", True)
        assert stub.ModelReady(pb.ModelReadyRequest(name="shares")).ready
        gone = stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(repository_name="shares"), timeout=_SECONDS)
        assert (gone.model_name, gone.isUnloaded) == ("shares", True)
        assert not stub.ModelReady(pb.ModelReadyRequest(name="shares")).ready


def test_mlservers_repository_is_a_service_of_its_own(explicit: Serving) -> None:
    messages = model_repository_pb2
    with grpc.insecure_channel(explicit.address) as channel:
        repository = model_repository_pb2_grpc.ModelRepositoryServiceStub(channel)
        index = repository.RepositoryIndex(messages.RepositoryIndexRequest(ready=True), timeout=_SECONDS)
        assert [(each.name, each.version, each.state) for each in index.models] == [("linear", "1", "READY")]
        repository.RepositoryModelLoad(messages.RepositoryModelLoadRequest(model_name="shares"), timeout=_SECONDS)
        index = repository.RepositoryIndex(messages.RepositoryIndexRequest(), timeout=_SECONDS)
        states = {each.name: (each.state, each.reason) for each in index.models}
        assert states["shares"] == ("READY", "")
        assert states["broken"][0] == "UNAVAILABLE"
        repository.RepositoryModelUnload(messages.RepositoryModelUnloadRequest(model_name="shares"), timeout=_SECONDS)
        index = repository.RepositoryIndex(messages.RepositoryIndexRequest(ready=True), timeout=_SECONDS)
        assert [each.name for each in index.models] == ["linear"]


# The table of status codes: models


@pytest.mark.parametrize(
    ("name", "version"), [("nobody", ""), ("unproven", ""), ("linear", "9"), ("unproven", "1"), ("", "")]
)
def test_what_is_not_there_is_not_ready(stub: GRPCInferenceServiceStub, name: str, version: str) -> None:
    assert not stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready


def test_readiness_of_no_version(stub: GRPCInferenceServiceStub) -> None:
    code, _ = refusal(stub.ModelReady, pb.ModelReadyRequest(name="linear", version="foo"))
    assert code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("call", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer"])
@pytest.mark.parametrize(("name", "version"), [("nobody", ""), ("linear", "9"), ("unproven", ""), ("unproven", "1")])
def test_what_is_not_there_is_not_found(
    stub: GRPCInferenceServiceStub, images: Images, *, call: str, name: str, version: str
) -> None:
    """Triton answers INVALID_ARGUMENT for ModelStatistics; here it is as everywhere else."""
    kinds = {
        "ModelMetadata": pb.ModelMetadataRequest,
        "ModelConfig": pb.ModelConfigRequest,
        "ModelStatistics": pb.ModelStatisticsRequest,
    }
    request: Any = request_of(images[:1], model=name, version=version)
    if call in kinds:
        request = kinds[call](name=name, version=version)
    code, details = refusal(getattr(stub, call), request)
    assert code is Code.NOT_FOUND
    assert name in details


# The table of status codes: tensors


def _both(request: pb.ModelInferRequest) -> None:
    request.inputs[0].contents.fp32_contents.extend([0.0] * PIXELS)


def _wrong_field(request: pb.ModelInferRequest) -> None:
    del request.raw_input_contents[:]
    request.inputs[0].contents.int_contents.extend([0] * PIXELS)


def _no_data(request: pb.ModelInferRequest) -> None:
    del request.raw_input_contents[:]


def _raw_of(size: int) -> Callable[[pb.ModelInferRequest], None]:
    def change(request: pb.ModelInferRequest) -> None:
        request.raw_input_contents[0] = bytes(size)

    return change


def _datatype(datatype: str) -> Callable[[pb.ModelInferRequest], None]:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].datatype = datatype

    return change


def _shape(*shape: int) -> Callable[[pb.ModelInferRequest], None]:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].shape[:] = shape

    return change


def _renamed(request: pb.ModelInferRequest) -> None:
    request.inputs[0].name = "pictures"


def _missing(request: pb.ModelInferRequest) -> None:
    del request.inputs[:]
    del request.raw_input_contents[:]


def _twice(request: pb.ModelInferRequest) -> None:
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def _unknown_output(request: pb.ModelInferRequest) -> None:
    request.outputs.add(name="probabilities")


def _parameter(name: str, **value: Any) -> Callable[[pb.ModelInferRequest], None]:
    def change(request: pb.ModelInferRequest) -> None:
        request.parameters[name].CopyFrom(pb.InferParameter(**value))

    return change


def _output_parameter(name: str, **value: Any) -> Callable[[pb.ModelInferRequest], None]:
    def change(request: pb.ModelInferRequest) -> None:
        request.outputs.add(name="logits").parameters[name].CopyFrom(pb.InferParameter(**value))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(_both, ["'images'", "both"], id="raw and contents both"),
        pytest.param(_wrong_field, ["'images'", "fp32_contents", "int_contents"], id="wrong typed field"),
        pytest.param(_no_data, ["'images'", str(PIXELS)], id="no data"),
        pytest.param(_raw_of(PIXELS * 4 - 1), ["'images'", "192", "191"], id="short raw"),
        pytest.param(_raw_of(PIXELS * 4 + 3), ["'images'", "192", "195"], id="long raw"),
        pytest.param(_datatype("INT32"), ["'images'", "FP32", "INT32"], id="wrong datatype"),
        pytest.param(_datatype("FP31"), ["'images'", "FP32", "FP31"], id="unknown datatype"),
        pytest.param(_datatype(""), ["'images'", "FP32", "''"], id="empty datatype"),
        pytest.param(_shape(1, PIXELS), ["'images'", "(1 to 8, 3, 4, 4)", f"(1, {PIXELS})"], id="wrong rank"),
        pytest.param(_shape(1, 4, 4, 3), ["'images'", "(1 to 8, 3, 4, 4)", "(1, 4, 4, 3)"], id="wrong dimensions"),
        pytest.param(_shape(9, 3, 4, 4), ["'images'", "(1 to 8, 3, 4, 4)", "(9, 3, 4, 4)"], id="batch too large"),
        pytest.param(_shape(0, 3, 4, 4), ["'images'", "(1 to 8, 3, 4, 4)", "(0, 3, 4, 4)"], id="empty batch"),
        pytest.param(_shape(-1, 3, 4, 4), ["'images'", "(1 to 8, 3, 4, 4)", "(-1, 3, 4, 4)"], id="negative batch"),
        pytest.param(_renamed, ["'pictures'", "'images'"], id="unknown input"),
        pytest.param(_missing, ["'images'"], id="missing input"),
        pytest.param(_twice, ["'images'", "2 times"], id="duplicate input"),
        pytest.param(_unknown_output, ["'probabilities'", "'logits'"], id="unknown output"),
        pytest.param(_parameter("triton_x", bool_param=True), ["'triton_x'", "reserved"], id="reserved"),
        pytest.param(_parameter("priority", string_param="1"), ["'priority'", "int64"], id="type of priority"),
        pytest.param(_parameter("timeout", double_param=1.0), ["'timeout'", "int64"], id="type of timeout"),
        pytest.param(
            _output_parameter("classification", string_param="2"), ["'classification'", "int64"], id="type of classes"
        ),
    ],
)
def test_requests_that_can_never_work(
    stub: GRPCInferenceServiceStub,
    images: Images,
    *,
    change: Callable[[pb.ModelInferRequest], None],
    words: list[str],
) -> None:
    request = request_of(images[:1])
    change(request)
    code, details = refusal(stub.ModelInfer, request)
    assert code is Code.INVALID_ARGUMENT
    assert [word for word in words if word not in details] == [], details


def _output_twice(request: pb.ModelInferRequest) -> None:
    request.outputs.add(name="logits")
    request.outputs.add(name="logits")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_output_twice, id="duplicate requested output"),
        pytest.param(_parameter("priority", uint64_param=100), id="priority above the levels"),
        pytest.param(_parameter("anything", string_param="else"), id="custom parameter"),
        pytest.param(_parameter("large", string_param="x" * (5 << 20)), id="a request above gRPC's usual 4 MiB"),
    ],
)
def test_requests_that_work(
    stub: GRPCInferenceServiceStub, images: Images, change: Callable[[pb.ModelInferRequest], None]
) -> None:
    request = request_of(images[:1])
    change(request)
    response = stub.ModelInfer(request, timeout=_SECONDS)
    assert [list(output.shape) for output in response.outputs] == [[1, CLASSES]]


# The table of status codes: the queue


@dataclass
class Busy:
    """A server whose engine for `linear` is busy with one request, and the calls that wait behind it."""

    stub: GRPCInferenceServiceStub
    engine: GatedEngine
    running: Any


@pytest.fixture
def busy(
    request: pytest.FixtureRequest,
    start: Start,
    explicit_repository: Path,
    images: Images,
    gated: list[GatedEngine],
) -> Iterator[Busy]:
    settings = {"models": {"mode": "explicit", "load": ["linear"]}, "batching": getattr(request, "param", {})}
    address = start(explicit_repository, Settings.model_validate(settings)).address
    (engine,) = gated
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        running = stub.ModelInfer.future(request_of(images[:1]))
        assert engine.entered.wait(_SECONDS)
        yield Busy(stub, engine, running)
        engine.gate.set()
        running.exception(_SECONDS)


def until_queued(stub: GRPCInferenceServiceStub, images: Images) -> tuple[Any, Any]:
    """Send requests until one is refused, and so another waits; return the two."""
    waiting = [stub.ModelInfer.future(request_of(images[:1])) for _ in range(2)]
    refused: queue.Queue[Any] = queue.Queue()
    for call in waiting:
        call.add_done_callback(refused.put)
    first = refused.get(timeout=_SECONDS)
    return next(call for call in waiting if call is not first), first.exception()


@pytest.mark.parametrize(
    ("busy", "status"),
    [
        pytest.param({"max_queue_size": 1}, Code.RESOURCE_EXHAUSTED, id="by default"),
        pytest.param({"max_queue_size": 1, "full_queue": "UNAVAILABLE"}, Code.UNAVAILABLE, id="as Triton"),
    ],
    indirect=["busy"],
)
def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(
    busy: Busy, images: Images, status: grpc.StatusCode
) -> None:
    waits, refused = until_queued(busy.stub, images)
    assert refused.code() is status
    assert "queue" in str(refused.details())
    trailing: dict[str, Any] = dict(refused.trailing_metadata())
    assert int(trailing["grpc-retry-pushback-ms"]) > 0
    assert b"RetryInfo" in trailing["grpc-status-details-bin"]
    busy.engine.gate.set()
    assert waits.result(_SECONDS).outputs[0].shape[0] == 1


def test_a_queue_timeout_fires_at_its_time_and_the_request_never_runs(busy: Busy, images: Images) -> None:
    """Triton answers UNAVAILABLE, and only when its instance is free again."""
    request = request_of(images[:3])
    request.parameters["timeout"].int64_param = 50_000  # microseconds
    # The engine is busy all the while: nothing but the timeout itself can answer.
    assert refusal(busy.stub.ModelInfer, request)[0] is Code.DEADLINE_EXCEEDED
    busy.engine.gate.set()
    busy.running.result(_SECONDS)
    assert busy.engine.batches == [1]


# The table of status codes: the repository


def test_an_index_of_a_named_repository_is_not_served(stub: GRPCInferenceServiceStub) -> None:
    request = pb.RepositoryIndexRequest(repository_name="mine")
    assert refusal(stub.RepositoryIndex, request)[0] is Code.UNIMPLEMENTED


@pytest.mark.parametrize("call", ["Load", "Unload"])
def test_clients_load_and_unload_only_where_they_may(stub: GRPCInferenceServiceStub, call: str) -> None:
    """Triton answers UNAVAILABLE."""
    request = getattr(pb, f"RepositoryModel{call}Request")(model_name="linear")
    code, details = refusal(getattr(stub, f"RepositoryModel{call}"), request)
    assert code is Code.FAILED_PRECONDITION
    assert "'explicit'" in details


@pytest.mark.parametrize(
    ("fields", "parameters", "status", "words"),
    [
        # Triton: INTERNAL.
        pytest.param({"model_name": "nobody"}, {}, Code.NOT_FOUND, ["'nobody'", "linear"], id="unknown model"),
        pytest.param({"repository_name": "nobody"}, {}, Code.NOT_FOUND, ["'nobody'"], id="unknown, KServe's"),
        # Triton: INTERNAL.
        pytest.param({}, {}, Code.INVALID_ARGUMENT, ["model_name"], id="no model"),
        pytest.param({"model_name": "../linear"}, {}, Code.INVALID_ARGUMENT, ["'../linear'"], id="no name"),
        # Triton: UNIMPLEMENTED.
        pytest.param(
            {"repository_name": "mine", "model_name": "linear"}, {}, Code.UNIMPLEMENTED, ["'mine'"], id="repository"
        ),
        # Triton: INVALID_ARGUMENT, with the traceback.
        pytest.param({"model_name": "broken"}, {}, Code.FAILED_PRECONDITION, ["'broken'", "sha256"], id="broken"),
        # Triton: OK, and it is heeded by later loads, too; INTERNAL where it is no JSON.
        pytest.param(
            {"model_name": "linear"}, {"config": {"string_param": "{}"}}, Code.UNIMPLEMENTED, ["'config'"], id="config"
        ),
        pytest.param(
            {"model_name": "linear"},
            {"file:1/model.onnx": {"bytes_param": b"x"}},
            Code.UNIMPLEMENTED,
            ["'file:1/model.onnx'"],
            id="files",
        ),
        pytest.param(
            {"model_name": "linear"}, {"mine": {"int64_param": 1}}, Code.INVALID_ARGUMENT, ["'mine'"], id="parameter"
        ),
    ],
)
def test_loads_that_are_refused(
    explicit: Serving,
    images: Images,
    *,
    fields: dict[str, Any],
    parameters: dict[str, Any],
    status: grpc.StatusCode,
    words: list[str],
) -> None:
    request = pb.RepositoryModelLoadRequest(**fields)
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(pb.ModelRepositoryParameter(**value))
    with grpc.insecure_channel(explicit.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        code, details = refusal(stub.RepositoryModelLoad, request)
        assert code is status
        assert [word for word in words if word not in details] == [], details
        # What was served still is.
        assert stub.ModelInfer(request_of(images[:1]), timeout=_SECONDS).model_version == "1"


def test_an_unload_of_an_unknown_model_is_no_error(explicit: Serving) -> None:
    with Triton(explicit.address) as triton:
        triton.unload_model("nobody")


def test_an_unload_with_an_unknown_parameter_is_refused(explicit: Serving) -> None:
    request = pb.RepositoryModelUnloadRequest(model_name="linear")
    request.parameters["mine"].bool_param = True
    with grpc.insecure_channel(explicit.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert refusal(stub.RepositoryModelUnload, request)[0] is Code.INVALID_ARGUMENT
        assert stub.ModelReady(pb.ModelReadyRequest(name="linear")).ready


def test_an_unload_lets_what_is_running_finish(busy: Busy) -> None:
    busy.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="linear"), timeout=_SECONDS)
    assert not busy.stub.ModelReady(pb.ModelReadyRequest(name="linear")).ready
    busy.engine.gate.set()
    assert busy.running.result(_SECONDS).outputs[0].shape[0] == 1


# The table of status codes: shared memory

_BYTES = PIXELS * 4
_ANSWER_BYTES = CLASSES * 4


@dataclass
class Memory:
    """A server that serves shared memory, and a shared memory object of room for one image and its answer."""

    triton: Triton
    stub: GRPCInferenceServiceStub
    object: SharedMemory

    def register(self, name: str = "mine", **changes: Any) -> grpc.StatusCode:
        fields: dict[str, Any] = {
            "name": name,
            "key": f"/{self.object.name}",
            "offset": 0,
            "byte_size": self.object.size,
        } | changes
        try:
            self.stub.SystemSharedMemoryRegister(pb.SystemSharedMemoryRegisterRequest(**fields), timeout=_SECONDS)
        except grpc.RpcError as error:
            return error.code()
        return Code.OK


@pytest.fixture
def memory(start: Start, explicit_repository: Path) -> Iterator[Memory]:
    settings = {"shared_memory": {"enabled": True}, "models": {"mode": "explicit", "load": ["linear"]}}
    address = start(explicit_repository, Settings.model_validate(settings)).address
    shared = SharedMemory(create=True, size=_BYTES + _ANSWER_BYTES)
    with Triton(address) as triton, grpc.insecure_channel(address) as channel:
        yield Memory(triton, GRPCInferenceServiceStub(channel), shared)
    shared.close()
    shared.unlink()


def shared_input(region: str, *, size: int = _BYTES, offset: int = 0) -> InferInput:
    tensor = InferInput("images", [1, 3, 4, 4], "FP32")
    tensor.set_shared_memory(region, size, offset)
    return tensor


def test_tensors_go_through_shared_memory(memory: Memory, images: Images) -> None:
    assert "system_shared_memory" in memory.triton.get_server_metadata().extensions
    size = memory.object.size
    memory.triton.register_system_shared_memory("mine", f"/{memory.object.name}", size)
    assert memory.object.buf is not None
    memory.object.buf[:_BYTES] = images[:1].tobytes()
    output = InferRequestedOutput("logits")
    output.set_shared_memory("mine", _ANSWER_BYTES, _BYTES)
    result = memory.triton.infer("linear", [shared_input("mine")], outputs=[output])
    # The answer is there and nowhere else.
    assert b"".join(result.get_response().raw_output_contents) == b""
    answer = np.frombuffer(bytes(memory.object.buf[_BYTES : _BYTES + _ANSWER_BYTES]), np.float32)
    plain = memory.triton.infer("linear", [triton_input(images[:1])]).as_numpy("logits")
    np.testing.assert_allclose(answer, plain[0], rtol=1e-5, atol=1e-5)
    status = memory.triton.get_system_shared_memory_status("mine").regions["mine"]
    assert (status.name, status.key, status.offset, status.byte_size) == ("mine", f"/{memory.object.name}", 0, size)
    memory.triton.unregister_system_shared_memory("mine")
    assert not memory.triton.get_system_shared_memory_status().regions


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        pytest.param({}, Code.ALREADY_EXISTS, id="name in use"),
        # Triton: INTERNAL, all of them.
        pytest.param({"name": "other", "key": "/nobodys"}, Code.NOT_FOUND, id="missing key"),
        pytest.param({"name": "other", "byte_size": 1 << 40}, Code.INVALID_ARGUMENT, id="out of range"),
        pytest.param({"name": "other", "byte_size": 0}, Code.INVALID_ARGUMENT, id="size 0"),
        pytest.param({"name": "other", "key": "/../etc/passwd"}, Code.INVALID_ARGUMENT, id="no key"),
        pytest.param({"name": "other", "offset": 2**64 - 1, "byte_size": 2}, Code.INVALID_ARGUMENT, id="overflow"),
    ],
)
def test_regions_that_are_refused(memory: Memory, changes: dict[str, Any], status: grpc.StatusCode) -> None:
    assert memory.register() is Code.OK
    assert memory.register(**changes) is status


def test_regions_that_are_not_there(memory: Memory) -> None:
    status = pb.SystemSharedMemoryStatusRequest(name="nobodys")
    assert refusal(memory.stub.SystemSharedMemoryStatus, status)[0] is Code.NOT_FOUND
    memory.triton.unregister_system_shared_memory("nobodys")
    with pytest.raises(InferenceServerException) as caught:
        memory.triton.infer("linear", [shared_input("nobodys")])
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_tensors_that_do_not_fit_their_region(memory: Memory, images: Images) -> None:
    assert memory.register() is Code.OK
    output = InferRequestedOutput("logits")
    # Triton: INTERNAL.
    output.set_shared_memory("mine", _ANSWER_BYTES - 1, _BYTES)
    for inputs, outputs in (
        ([shared_input("mine", offset=1 << 40)], None),
        ([shared_input("mine", offset=2**63 - 1)], None),
        ([shared_input("mine", size=_BYTES - 4)], None),
        ([triton_input(images[:1])], [output]),
    ):
        with pytest.raises(InferenceServerException) as caught:
            memory.triton.infer("linear", inputs, outputs=outputs)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_shared_memory_is_off_unless_it_is_switched_on(triton: Triton) -> None:
    with pytest.raises(InferenceServerException) as caught:
        triton.register_system_shared_memory("mine", "/mine", 64)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    with pytest.raises(InferenceServerException) as caught:
        triton.infer("linear", [shared_input("mine")])
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    # Clients tidy up before they begin, whether there is anything or not.
    triton.unregister_system_shared_memory()


# The table of status codes: settings


@pytest.mark.parametrize(
    ("name", "value", "status", "words"),
    [
        # Triton: OK.
        ("log_colour", {"bool_param": True}, Code.INVALID_ARGUMENT, ["'log_colour'", "log_info", "log_verbose_level"]),
        ("log_info", {"string_param": "yes"}, Code.INVALID_ARGUMENT, ["'log_info'", "bool_param", "string_param"]),
        ("log_verbose_level", {"bool_param": True}, Code.INVALID_ARGUMENT, ["'log_verbose_level'", "uint32_param"]),
        ("log_file", {"string_param": "/etc/passwd"}, Code.INVALID_ARGUMENT, ["'log_file'", "[logging]"]),
        ("log_format", {"string_param": "ISO8601"}, Code.INVALID_ARGUMENT, ["'log_format'", "[logging]"]),
        ("log_error", {"bool_param": False}, Code.INVALID_ARGUMENT, ["'log_error'"]),
    ],
)
def test_log_settings_that_are_refused_change_nothing(
    stub: GRPCInferenceServiceStub, *, name: str, value: dict[str, Any], status: grpc.StatusCode, words: list[str]
) -> None:
    before = stub.LogSettings(pb.LogSettingsRequest())
    request = pb.LogSettingsRequest()
    request.settings["log_verbose_level"].uint32_param = 0
    request.settings[name].CopyFrom(pb.LogSettingsRequest.SettingValue(**value))
    code, details = refusal(stub.LogSettings, request)
    assert code is status
    assert [word for word in words if word not in details] == [], details
    assert stub.LogSettings(pb.LogSettingsRequest()) == before


@pytest.mark.parametrize(
    ("name", "values", "status", "words"),
    [
        # Triton: OK.
        ("trace_colour", ["red"], Code.INVALID_ARGUMENT, ["'trace_colour'", "trace_level", "trace_rate"]),
        ("trace_level", ["TENSORS"], Code.INVALID_ARGUMENT, ["TIMESTAMPS", "TENSORS"]),
        ("trace_level", ["TIMESTAMPS"], Code.FAILED_PRECONDITION, ["OFF", "[tracing]"]),
        ("trace_rate", ["often"], Code.INVALID_ARGUMENT, ["'trace_rate'", "'often'"]),
        ("trace_rate", ["1", "2"], Code.INVALID_ARGUMENT, ["'trace_rate'"]),
        ("trace_rate", ["-1"], Code.INVALID_ARGUMENT, ["'trace_rate'"]),
        ("trace_rate", ["9" * 5000], Code.INVALID_ARGUMENT, ["'trace_rate'"]),
        ("trace_count", ["5"], Code.INVALID_ARGUMENT, ["'trace_count'", "'-1'"]),
        ("trace_file", ["/etc/passwd"], Code.INVALID_ARGUMENT, ["'trace_file'"]),
    ],
)
def test_trace_settings_that_are_refused_change_nothing(
    stub: GRPCInferenceServiceStub, *, name: str, values: list[str], status: grpc.StatusCode, words: list[str]
) -> None:
    before = stub.TraceSetting(pb.TraceSettingRequest())
    request = pb.TraceSettingRequest()
    request.settings["log_frequency"].value.append("0")
    request.settings[name].value.extend(values)
    code, details = refusal(stub.TraceSetting, request)
    assert code is status
    assert [word for word in words if word not in details] == [], details
    assert stub.TraceSetting(pb.TraceSettingRequest()) == before


def test_trace_settings_of_one_model_are_not_served(stub: GRPCInferenceServiceStub) -> None:
    request = pb.TraceSettingRequest(model_name="linear")
    request.settings["trace_rate"].value.append("10")
    assert refusal(stub.TraceSetting, request)[0] is Code.UNIMPLEMENTED
    assert refusal(stub.TraceSetting, pb.TraceSettingRequest(model_name="nobody"))[0] is Code.NOT_FOUND
