"""What goes over the wire: options, forms of images, how many are on their way, who is asking."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tritonclient.utils import deserialize_bytes_tensor

from protos.inference import open_inference_pb2 as pb
from service.client import AsyncClient, Client, ModelMetadata, RequestOptions, Retries, TensorMetadata, Tls, encoding
from service.errors import ServiceError, Unavailable, Unimplemented
from tests.service.certificates import Authority
from tests.service.client.answering import Answering, Refusal, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Ask = Callable[..., Any]

IMAGES = np.zeros((2, 3, 2, 2), np.float32)


def numbered(n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return images whose answers are 0, 1/255, 2/255, ..."""
    return np.broadcast_to((np.arange(n, dtype=np.float32) / 255)[:, None, None, None], (n, 3, 2, 2))


def described(**properties: str) -> ModelMetadata:
    tensor, answer = TensorMetadata("images", "FP32", (-1, 3, 2, 2)), TensorMetadata("logits", "FP32", (-1, 3))
    return ModelMetadata("m", ("1",), "", (tensor,), (answer,), properties)


def test_options_travel_as_the_protocol_has_them(ask: Ask, address: str, answering: Answering) -> None:
    options = RequestOptions(request_id="7f", priority=2, queue_timeout_s=0.25)
    ask(address, "infer", IMAGES, model="m", options=options)
    (request,) = answering.requests
    assert request.id == "7f"
    assert request.parameters["priority"].int64_param == 2
    assert request.parameters["timeout"].int64_param == 250_000


def test_what_is_not_wanted_does_not_travel(ask: Ask, address: str, answering: Answering) -> None:
    ask(address, "infer", IMAGES, model="m")
    (request,) = answering.requests
    assert request.id == ""
    assert not request.parameters
    assert "authorization" not in answering.metadata[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"priority": -1}, "priority: expected 1"),
        ({"queue_timeout_s": 0}, "queue_timeout_s: expected more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s: expected more than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RequestOptions(**arguments)


def test_images_are_cut_as_the_server_takes_them_and_all_go_to_one_version(
    ask: Ask, address: str, answering: Answering
) -> None:
    answers = ask(address, "infer", numbered(10), model="m")
    np.testing.assert_array_equal(answers[:, 0], numbered(10)[:, 0, 0, 0])
    assert [request.inputs[0].shape[0] for request in answering.requests] == [4, 4, 2]
    assert {request.model_version for request in answering.requests} == {"7"}


def test_a_model_is_described_once_for_many_small_calls(address: str, answering: Answering) -> None:
    with Client(address) as client:
        for _ in range(5):
            client.infer(IMAGES, model="m")
    assert answering.descriptions == 1
    assert len(answering.requests) == 5


def test_a_model_that_has_changed_is_described_again(address: str, answering: Answering) -> None:
    """A reload may bring a version that takes uint8 where the one before took float32."""
    with Client(address) as client:
        before = client.infer(numbered(3), model="m")
        answering.datatype = "UINT8"
        after = client.infer(numbered(3), model="m")
    np.testing.assert_array_equal(after, np.rint(before * 255))
    assert [request.inputs[0].datatype for request in answering.requests] == ["FP32", "FP32", "UINT8"]


@pytest.mark.parametrize("status", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND])
def test_what_a_model_that_has_not_changed_refuses_is_sent_once(
    address: str, answering: Answering, status: grpc.StatusCode
) -> None:
    with Client(address) as client:
        client.infer(IMAGES, model="m")
        answering.refusals.append(Refusal(status, "no"))
        with pytest.raises(ServiceError, match=r"^no$") as raised:
            client.infer(IMAGES, model="m")
    assert raised.value.status is status
    assert len(answering.requests) == 2


def test_classes_have_the_names_of_the_version_that_answered(address: str, answering: Answering) -> None:
    """The client is shared, and the model loaded again with other classes while images are on their way."""
    answering.datatype = "BYTES"
    answering.gate.clear()
    with Client(address) as client, ThreadPoolExecutor(1) as pool:
        found = pool.submit(client.classify, [b"file"], model="m", top=3)
        while not answering.running:
            assert not found.done()
        answering.properties = {"version": "8", "class_names": json.dumps(["x", "y"])}
        assert client.metadata("m").class_names == ("x", "y")
        answering.gate.set()
        (classes,) = found.result(10)
    assert [each.name for each in classes] == ["a", "b", "c"]


def test_a_service_that_is_not_here_is_told_with_the_server(ask: Ask, address: str) -> None:
    with pytest.raises(Unimplemented, match=rf"^{address} does not serve this method; has it a port for operators"):
        ask(address, "audits", limit=1)


def test_so_many_requests_are_on_their_way_and_no_more(address: str, answering: Answering) -> None:
    answering.gate.clear()
    batches = (numbered(255)[number : number + 1] for number in range(20))
    with Client(address) as client, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: list(client.infer_many(batches, model="m", in_flight=3)))
        while answering.running < 3:
            assert not answers.done()
        answering.gate.set()
        found = [float(answer[0, 0]) for answer in answers.result(10)]
    assert found == [float(np.float32(number) / 255) for number in range(20)]
    assert answering.most_running == 3


async def test_so_many_tasks_are_on_their_way_and_no_more(address: str, answering: Answering) -> None:
    batches = (numbered(255)[number : number + 1] for number in range(20))
    async with AsyncClient(address) as client:
        found = [float(answer[0, 0]) async for answer in client.infer_many(batches, model="m", in_flight=3)]
    assert found == [float(np.float32(number) / 255) for number in range(20)]
    assert answering.most_running <= 3


def test_batches_are_read_as_there_is_room(address: str) -> None:
    read: list[int] = []

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        for number in range(100):
            read.append(number)
            yield numbered(1)

    with Client(address) as client:
        answers = client.infer_many(batches(), model="m", in_flight=4)
        next(answers)
        assert len(read) <= 5
        answers.close()  # type: ignore[attr-defined]


def test_no_requests_at_once_are_none(ask: Ask, address: str) -> None:
    with pytest.raises(ValueError, match="in_flight: expected 1 request on its way, or more, got 0"):
        ask(address, "infer", numbered(9), model="m", in_flight=0)


async def test_who_leaves_early_waits_for_nothing_that_is_on_its_way(address: str, answering: Answering) -> None:
    answering.gate.clear()
    async with AsyncClient(address) as client:
        answers = client.infer_many([IMAGES] * 3, model="m", in_flight=3)
        first = asyncio.ensure_future(anext(answers))
        while answering.running < 3:
            await asyncio.sleep(0)
        began = time.monotonic()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        # The gate opens by itself after 10 seconds.
        assert time.monotonic() - began < 5
        # And the server is told of each.
        assert all([await asyncio.to_thread(answering.left.acquire, timeout=5) for _ in range(3)])
        answering.gate.set()


async def test_a_cancelled_task_cancels_its_call(address: str, answering: Answering) -> None:
    answering.gate.clear()
    async with AsyncClient(address) as client:
        task = asyncio.create_task(client.infer(IMAGES, model="m"))
        while not answering.running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        answering.gate.set()
        assert await client.ready()


def test_many_tasks_share_a_client(address: str, answering: Answering) -> None:
    async def run() -> tuple[Any, ...]:
        async with AsyncClient(address) as client:
            return tuple(await asyncio.gather(*(client.infer(numbered(16)[n : n + 1], model="m") for n in range(16))))

    answers = asyncio.run(run())
    assert [float(answer[0, 0]) for answer in answers] == [float(np.float32(number) / 255) for number in range(16)]
    assert len(answering.requests) == 16


def test_encoded_images_are_one_tensor_of_bytes(ask: Ask, address: str, answering: Answering) -> None:
    answering.datatype = "BYTES"
    files = [b"first", b"", b"third one"]
    with pytest.raises(ServiceError):  # the small server does not decode
        ask(address, "infer_encoded", files, model="m")
    (request,) = answering.requests
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("images", "BYTES", [3])
    content = b"".join(struct.pack("<I", len(each)) + each for each in files)
    assert list(request.raw_input_contents) == [content]


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=9))
def test_requests_are_what_protobuf_reads(files: list[bytes]) -> None:
    sent = encoding.with_encoded(files, described(), version="1", options=RequestOptions(priority=1))
    request = pb.ModelInferRequest.FromString(sent)
    assert request.SerializeToString(deterministic=True) == sent
    assert request.inputs[0].shape == [len(files)]
    assert deserialize_bytes_tensor(request.raw_input_contents[0]).tolist() == files


@given(arrays(np.float32, array_shapes(min_dims=4, max_dims=4, max_side=5), elements=st.floats(0, 1, width=32)))
def test_a_batch_travels_as_it_looks(images: np.ndarray[Any, Any]) -> None:
    flipped = images[:, :, ::-1]
    sent = encoding.with_images(flipped, described(), version="1", options=RequestOptions())
    request = pb.ModelInferRequest.FromString(sent)
    assert tuple(request.inputs[0].shape) == images.shape
    assert request.raw_input_contents == [flipped.tobytes()]


def test_what_is_sent_again_is_what_was_sent(address: str, answering: Answering) -> None:
    """A caller may use one buffer for all its batches."""
    answering.refusals.append(Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED))
    buffer = np.empty((1, 3, 2, 2), np.float32)

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        for number in range(8):
            buffer.fill(number / 8)
            yield buffer

    with Client(address, retries=Retries(initial_s=0.01)) as client:
        found = [float(answer[0, 0]) for answer in client.infer_many(batches(), model="m", in_flight=4)]
    assert found == [number / 8 for number in range(8)]


def test_no_images_are_no_request(ask: Ask, address: str) -> None:
    with pytest.raises(ValueError, match="expected at least 1 image, got none"):
        ask(address, "infer_encoded", [], model="m")


@given(st.lists(st.integers(0, 5 << 20), max_size=12), st.integers(1, 5))
def test_encoded_images_are_cut_into_requests_that_servers_take(sizes: list[int], most: int) -> None:
    images = [memoryview(bytearray(size)) for size in sizes]
    parts = list(encoding.parts_of(images, described(max_batch_size=str(most)), batch=None))  # type: ignore[arg-type]
    assert [each for part in parts for each in part] == images
    assert all(1 <= len(part) <= most for part in parts)
    assert all(len(part) == 1 or sum(map(len, part)) <= 8 << 20 for part in parts)


def test_probabilities_are_named_the_first_first() -> None:
    metadata = described(class_names='["cat", "dog", "bird"]')
    answers = np.log(np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], np.float32))
    first, second = metadata.predictions(answers, top=2)
    assert [(each.name, each.index) for each in first] == [("dog", 1), ("bird", 2)]
    assert [each.probability for each in first] == pytest.approx([0.5, 0.3])
    # Of equals the first class wins.
    assert [each.name for each in second] == ["cat", "dog"]


def test_more_classes_than_there_are_are_all() -> None:
    (found,) = described().predictions(np.zeros((1, 3), np.float32), top=9)
    assert [(each.name, each.index) for each in found] == [("0", 0), ("1", 1), ("2", 2)]
    assert sum(each.probability for each in found) == pytest.approx(1)
    with pytest.raises(ValueError, match="top: expected at least 1"):
        described().predictions(np.zeros((1, 3), np.float32), top=0)


def test_a_token_is_shown_with_every_call(ask: Ask, address: str, answering: Answering) -> None:
    tokens = iter(["first", "second", "third", "fourth"])
    ask(address, "infer", numbered(8), model="m", client={"token": lambda: next(tokens)})
    # The description took the first.
    assert [each["authorization"] for each in answering.metadata] == ["Bearer second", "Bearer third"]


@pytest.mark.parametrize("token", ["", "two words", "line\n", "ключ"])
def test_a_token_that_is_none_is_refused_and_not_told(ask: Ask, address: str, token: str) -> None:
    with pytest.raises(ValueError, match=r"^token: expected printable ASCII without spaces, got \d+ characters"):
        ask(address, "ready", client={"token": token})


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def encrypted(answering: Answering, authority: Authority) -> Iterator[str]:
    """A server that asks for clients' certificates."""
    server = authority.server()
    credentials = grpc.ssl_server_credentials(
        [(server.key, server.certificate)], root_certificates=authority.certificate, require_client_auth=True
    )
    with serving(answering, credentials=credentials) as address:
        yield address


def test_both_sides_show_their_certificates(ask: Ask, encrypted: str, authority: Authority, tmp_path: Path) -> None:
    pair = authority.client("us")
    for name, content in (("ca", authority.certificate), ("cert", pair.certificate), ("key", pair.key)):
        (tmp_path / name).write_bytes(content)
    tls = Tls(ca=tmp_path / "ca", cert=tmp_path / "cert", key=tmp_path / "key")
    assert ask(encrypted, "ready", client={"tls": tls}) is True


def test_a_server_that_nobody_vouches_for_is_not_talked_to(ask: Ask, encrypted: str, tmp_path: Path) -> None:
    (tmp_path / "ca").write_bytes(Authority().certificate)
    with pytest.raises(Unavailable, match=rf"^{encrypted}: no TLS connection: .*; check the certificates"):
        ask(encrypted, "ready", client={"tls": Tls(ca=tmp_path / "ca")})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "ca: .*: expected a PEM file here, found none"), (b"no PEM", "ca: .*: expected a PEM file, with a line")],
)
def test_a_file_that_is_no_certificate_is_named(
    ask: Ask, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "ca").write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=complaint):
        ask("127.0.0.1:1", "ready", client={"tls": Tls(ca=tmp_path / "ca")})


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key: expected a file, as there is a cert, got none"):
        Tls(cert=tmp_path / "cert")


def test_threads_share_a_client(address: str, answering: Answering) -> None:
    ready = threading.Barrier(4)

    def classify(number: int) -> float:
        ready.wait(10)
        return float(client.infer(numbered(255)[number : number + 1], model="m")[0, 0])

    with Client(address) as client, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(classify, range(16)))
    assert found == [float(np.float32(number) / 255) for number in range(16)]
    assert len(answering.requests) == 16
