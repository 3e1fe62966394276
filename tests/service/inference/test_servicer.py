"""Inference as clients of the field ask for it: status codes, raw and typed, ids, outputs, batches, streams."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.client import Client
from service.inference.batching import Batcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tritonclient.grpc import InferenceServerClient as Triton

    from export.engines.base import Images, Logits
    from service.server import Serving
    from tests.service.conftest import GatedEngine, Start

_SECONDS = 20


@pytest.fixture
def stub(serving: Serving) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(serving.address) as channel:
        yield GRPCInferenceServiceStub(channel)


def triton_input(images: Images) -> InferInput:
    tensor = InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    return tensor


def request_of(images: Images, *, model: str = "linear", version: str = "") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    request.inputs.add(name="images", datatype="FP32", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    return request


def refusal(call: Any, request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=_SECONDS)
    return caught.value.code(), str(caught.value.details())


def test_triton_client_finds_server_and_model(triton: Triton) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("linear")
    assert triton.is_model_ready("linear", "1")
    assert not triton.is_model_ready("linear", "3")
    assert not triton.is_model_ready("nobody")
    assert triton.get_server_metadata().name == "tenet"


def test_triton_client_reads_metadata(triton: Triton) -> None:
    metadata = triton.get_model_metadata("linear", as_json=True)
    assert metadata["versions"] == ["1", "2"]
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": ["-1", "3", "4", "4"]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": ["-1", "5"]}]


def test_triton_client_infers(triton: Triton, images: Images) -> None:
    result = triton.infer(
        "linear",
        [triton_input(images[:3])],
        model_version="1",
        outputs=[InferRequestedOutput("logits")],
        request_id="my-request",
    )
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("my-request", "linear", "1")
    assert result.as_numpy("logits").shape == (3, 5)


def test_triton_client_is_told_of_unknown_outputs(triton: Triton, images: Images) -> None:
    with pytest.raises(InferenceServerException, match="output 'probabilities': expected one of 'logits'"):
        triton.infer("linear", [triton_input(images[:1])], outputs=[InferRequestedOutput("probabilities")])


def stored_input(stored: np.ndarray[Any, np.dtype[np.uint8]]) -> InferInput:
    tensor = InferInput("images", list(stored.shape), "UINT8")
    tensor.set_data_from_numpy(stored)
    return tensor


def test_triton_client_infers_with_a_model_that_takes_uint8(triton: Triton, weights: Any) -> None:
    metadata = triton.get_model_metadata("stored", as_json=True)
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": ["-1", "4", "4", "3"]}]
    stored = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    answers = triton.infer("stored", [stored_input(stored)]).as_numpy("logits")
    images = stored.transpose(0, 3, 1, 2).reshape(5, -1) / np.float32(255)
    np.testing.assert_allclose(answers, images @ weights(0), rtol=1e-4, atol=1e-4)


def test_floats_for_a_model_that_takes_uint8_are_refused_with_the_way_out(triton: Triton, images: Images) -> None:
    with pytest.raises(InferenceServerException) as caught:
        triton.infer("stored", [triton_input(images[:1])])
    assert caught.value.message() == (
        "input 'images': expected datatype UINT8, got 'FP32'; the model takes images as they are stored: (N, H, W, C), "
        "values from 0 to 255"
    )


def test_stored_images_in_the_order_of_others_are_refused(triton: Triton) -> None:
    with pytest.raises(InferenceServerException, match=r"expected shape \(1 to 8, 4, 4, 3\), got \(1, 3, 4, 4\)"):
        triton.infer("stored", [stored_input(np.zeros((1, 3, 4, 4), np.uint8))])


def test_stored_images_may_come_in_typed_fields(stub: GRPCInferenceServiceStub) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    request = pb.ModelInferRequest(model_name="stored")
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=stored.shape)
    request.raw_input_contents.append(stored.tobytes())
    raw = stub.ModelInfer(request)
    request.ClearField("raw_input_contents")
    tensor.contents.uint_contents.extend(stored.ravel().tolist())
    typed = stub.ModelInfer(request)
    assert np.array(typed.outputs[0].contents.fp32_contents, "<f4").tobytes() == raw.raw_output_contents[0]
    tensor.contents.uint_contents[7] = 256
    assert refusal(stub.ModelInfer, request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "input 'images': expected UINT8 values from 0 to 255, got 256",
    )


def test_requests_with_uint8_share_calls(start: Start, repository: Path, *, gated: list[GatedEngine]) -> None:
    address = start(repository).address
    engine = next(engine for engine in gated if engine.manifest.model == "stored")
    stored = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    with Client(address) as client, ThreadPoolExecutor(len(stored)) as pool:
        parts = [stored[index : index + 1] for index in range(len(stored))]
        answers = [pool.submit(client.infer, part, model="stored") for part in parts]
        assert engine.entered.wait(_SECONDS)
        engine.gate.set()
        alone = np.concatenate([answer.result(_SECONDS) for answer in answers])
        np.testing.assert_allclose(alone, client.infer(stored, model="stored"), rtol=1e-4, atol=1e-4)


def test_no_version_is_the_latest_and_is_named(stub: GRPCInferenceServiceStub, images: Images) -> None:
    assert stub.ModelInfer(request_of(images[:1])).model_version == "2"


def test_typed_requests_get_typed_answers(stub: GRPCInferenceServiceStub, images: Images) -> None:
    raw = stub.ModelInfer(request_of(images[:2]))
    request = request_of(images[:2])
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp32_contents.extend(images[:2].ravel().tolist())
    typed = stub.ModelInfer(request)
    assert not typed.raw_output_contents
    assert np.array(typed.outputs[0].contents.fp32_contents, "<f4").tobytes() == raw.raw_output_contents[0]
    assert not raw.outputs[0].HasField("contents")


@pytest.mark.parametrize("n", range(1, 9))
def test_every_batch_size_up_to_the_largest(stub: GRPCInferenceServiceStub, images: Images, n: int) -> None:
    assert list(stub.ModelInfer(request_of(images[:n])).outputs[0].shape) == [n, 5]


@pytest.mark.parametrize("call", ["ModelMetadata", "ModelConfig", "ModelInfer"])
@pytest.mark.parametrize(
    ("model", "version", "status", "message"),
    [
        ("nobody", "", grpc.StatusCode.NOT_FOUND, "model 'nobody': not served here; the models are: linear"),
        ("", "", grpc.StatusCode.NOT_FOUND, "model '': not served here; the models are: linear"),
        ("linear", "9", grpc.StatusCode.NOT_FOUND, "model 'linear' has no version 9; the versions are: 1, 2"),
        (
            "unproven",
            "",
            grpc.StatusCode.NOT_FOUND,
            "model 'unproven' has no version that can be served; version 1: unproven: its proof of parity has not run",
        ),
        ("linear", "foo", grpc.StatusCode.INVALID_ARGUMENT, "model version 'foo': expected a whole number"),
        ("../linear", "", grpc.StatusCode.NOT_FOUND, "model '../linear': not served here; the models are: linear"),
    ],
)
def test_models_that_are_not_served(
    stub: GRPCInferenceServiceStub,
    images: Images,
    *,
    call: str,
    model: str,
    version: str,
    status: grpc.StatusCode,
    message: str,
) -> None:
    requests: dict[str, object] = {
        "ModelMetadata": pb.ModelMetadataRequest(name=model, version=version),
        "ModelConfig": pb.ModelConfigRequest(name=model, version=version),
        "ModelInfer": request_of(images[:1], model=model, version=version),
    }
    code, details = refusal(getattr(stub, call), requests[call])
    assert code is status
    assert details.startswith(message)


@pytest.mark.parametrize(("name", "version"), [("linear", "foo"), ("linear", "-1"), ("linear", "9" * 5000)])
def test_readiness_of_what_cannot_be(stub: GRPCInferenceServiceStub, name: str, version: str) -> None:
    code, _ = refusal(stub.ModelReady, pb.ModelReadyRequest(name=name, version=version))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_bad_tensors_are_invalid_arguments(stub: GRPCInferenceServiceStub, images: Images) -> None:
    request = request_of(images[:9])
    assert refusal(stub.ModelInfer, request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "input 'images': expected shape (1 to 8, 3, 4, 4), got (9, 3, 4, 4)",
    )


def test_a_message_that_quotes_a_long_input_still_arrives(stub: GRPCInferenceServiceStub, images: Images) -> None:
    request = request_of(images[:1])
    request.inputs[0].name = "ü" * 100_000
    code, details = refusal(stub.ModelInfer, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("input 'üüü")
    assert details.endswith("…")


class Submissions:
    """Counts the requests that come to a batcher and those that leave it, answered or not."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self.left = threading.Semaphore(0)


@pytest.fixture
def submissions(monkeypatch: pytest.MonkeyPatch) -> Submissions:
    counted = Submissions()
    submit = Batcher.submit

    async def count(batcher: Batcher, images: Images, **options: Any) -> Logits:
        counted.came.release()
        try:
            return await submit(batcher, images, **options)
        finally:
            counted.left.release()

    monkeypatch.setattr(Batcher, "submit", count)
    return counted


def test_concurrent_requests_share_calls_and_get_their_own_answers(
    start: Start,
    repository: Path,
    images: Images,
    *,
    gated: list[GatedEngine],
    weights: Any,
    submissions: Submissions,
) -> None:
    address = start(repository).address
    engine = gated[1]
    n = len(images)
    with Client(address) as client, ThreadPoolExecutor(n) as pool:
        answers = [pool.submit(client.infer, images[index : index + 1], model="linear") for index in range(n)]
        assert all(submissions.came.acquire(timeout=_SECONDS) for _ in range(n))
        engine.gate.set()
        logits = np.concatenate([answer.result(_SECONDS) for answer in answers])
    np.testing.assert_allclose(logits, images.reshape(n, -1) @ weights(0), rtol=1e-5, atol=1e-5)
    assert sum(engine.batches) == n
    # What came while the engine worked on the first few: full batches.
    assert len(engine.batches) <= n / max(engine.batches) + 2


def test_a_call_cancelled_while_it_waits_never_runs(
    start: Start, repository: Path, images: Images, gated: list[GatedEngine], submissions: Submissions
) -> None:
    address = start(repository).address
    engine = gated[1]
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        running = stub.ModelInfer.future(request_of(images[:1]))
        assert engine.entered.wait(_SECONDS)
        cancelled = stub.ModelInfer.future(request_of(images[:3]))
        assert all(submissions.came.acquire(timeout=_SECONDS) for _ in range(2))
        cancelled.cancel()
        assert submissions.left.acquire(timeout=_SECONDS)
        after = stub.ModelInfer.future(request_of(images[:2]))
        engine.gate.set()
        assert running.result(_SECONDS).outputs[0].shape[0] == 1
        assert after.result(_SECONDS).outputs[0].shape[0] == 2
    assert engine.batches == [1, 2]


def test_a_request_whose_deadline_passes_while_it_waits_never_runs(
    start: Start, repository: Path, images: Images, gated: list[GatedEngine], submissions: Submissions
) -> None:
    address = start(repository).address
    engine = gated[1]
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        running = stub.ModelInfer.future(request_of(images[:1]))
        assert engine.entered.wait(_SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request_of(images[:3]), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert submissions.left.acquire(timeout=_SECONDS)
        after = stub.ModelInfer.future(request_of(images[:2]))
        engine.gate.set()
        assert running.result(_SECONDS).outputs[0].shape[0] == 1
        assert after.result(_SECONDS).outputs[0].shape[0] == 2
    assert engine.batches == [1, 2]


def test_a_stream_that_is_cancelled_takes_its_waiting_requests_with_it(
    start: Start, repository: Path, images: Images, gated: list[GatedEngine], submissions: Submissions
) -> None:
    address = start(repository).address
    engine = gated[1]
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        running = stub.ModelInfer.future(request_of(images[:1]))
        assert engine.entered.wait(_SECONDS)
        ended = threading.Event()

        def requests() -> Iterator[pb.ModelInferRequest]:
            yield from (request_of(images[:3]) for _ in range(3))
            ended.wait(_SECONDS)

        stream = stub.ModelStreamInfer(requests())
        # All of them are at work, though none has been answered.
        assert all(submissions.came.acquire(timeout=_SECONDS) for _ in range(4))
        stream.cancel()
        assert all(submissions.left.acquire(timeout=_SECONDS) for _ in range(3))
        ended.set()
        after = stub.ModelInfer.future(request_of(images[:2]))
        engine.gate.set()
        assert running.result(_SECONDS).outputs[0].shape[0] == 1
        assert after.result(_SECONDS).outputs[0].shape[0] == 2
    assert engine.batches == [1, 2]


def test_a_stream_answers_in_order_whichever_model_is_quicker(
    start: Start, repository: Path, images: Images, gated: list[GatedEngine]
) -> None:
    address = start(repository).address
    slow, quick = gated[0], gated[1]
    quick.gate.set()
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        first, second = request_of(images[:1], version="1"), request_of(images[:1], version="2")
        stream = stub.ModelStreamInfer(iter([first, second]))
        assert slow.entered.wait(_SECONDS)
        # The second has been run while the first still is.
        assert quick.entered.wait(_SECONDS)
        slow.gate.set()
        assert [answer.infer_response.model_version for answer in stream] == ["1", "2"]


def test_errors_in_a_stream_name_their_request_and_are_short(stub: GRPCInferenceServiceStub, images: Images) -> None:
    bad = request_of(images[:1])
    bad.id = "bad"
    bad.inputs[0].name = "x" * 100_000
    good = request_of(images[:1])
    good.id = "good"
    first, second = stub.ModelStreamInfer(iter([bad, good]), timeout=_SECONDS)
    assert first.error_message.startswith("input 'xxx")
    assert len(first.error_message) < 5000
    assert (first.infer_response.id, first.infer_response.model_name) == ("bad", "linear")
    assert not first.infer_response.outputs
    assert (second.error_message, second.infer_response.id) == ("", "good")
    assert [answer.infer_response.parameters["triton_final_response"].bool_param for answer in (first, second)] == [
        True,
        True,
    ]


def test_bytes_that_are_no_message_end_a_stream_after_what_came_before(serving: Serving, images: Images) -> None:
    with grpc.insecure_channel(serving.address) as channel:
        call: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        stream = call(iter([request_of(images[:1]).SerializeToString(), b"\xff\xff"]), timeout=_SECONDS)
        answer = pb.ModelStreamInferResponse.FromString(next(stream))
        assert answer.infer_response.model_name == "linear"
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_engine_that_fails_is_an_error_of_its_request_in_a_stream_and_no_more(
    start: Start,
    repository: Path,
    images: Images,
    gated: list[GatedEngine],
    *,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = start(repository).address

    def fail(images: Images) -> None:
        del images
        raise ArithmeticError("a secret")

    monkeypatch.setattr(gated[1], "_run", fail)
    gated[0].gate.set()
    with grpc.insecure_channel(address) as channel:
        requests = [request_of(images[:1], version=version) for version in ("2", "1")]
        failed, answered = GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests), timeout=_SECONDS)
    assert failed.error_message == "internal error; the server's log has the details"
    assert answered.infer_response.model_version == "1"
    assert "a secret" in caplog.text


def test_an_engine_that_fails_is_an_internal_error_and_no_more(
    start: Start,
    repository: Path,
    images: Images,
    gated: list[GatedEngine],
    *,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = start(repository).address

    def fail(images: Images) -> None:
        del images
        raise ArithmeticError("a secret")

    monkeypatch.setattr(gated[1], "_run", fail)
    gated[0].gate.set()
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert refusal(stub.ModelInfer, request_of(images[:1])) == (
            grpc.StatusCode.INTERNAL,
            "internal error; the server's log has the details",
        )
        assert stub.ModelInfer(request_of(images[:1], version="1")).model_version == "1"
    assert "/inference.GRPCInferenceService/ModelInfer failed" in caplog.text
    assert "a secret" in caplog.text
