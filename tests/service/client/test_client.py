"""Our client against a real server, beside Triton's in the same process."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from PIL import Image

from service import errors
from service.client import NO_RETRIES, AsyncClient, Client, ModelMetadata, Retries, TensorMetadata
from service.errors import DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted, ServiceError, Unavailable
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import tritonclient.grpc

    from export.engines.base import Images
    from service.server import Serving
    from tests.service.conftest import GatedEngine, Start


def test_server_is_ready(client: Client) -> None:
    assert client.ready()


@pytest.mark.parametrize(
    ("model", "version", "expected"),
    [
        ("linear", None, True),
        ("linear", 1, True),
        ("linear", 9, False),
        ("unproven", None, False),
        ("nobody", None, False),
        ("", None, True),
    ],
)
def test_models_are_ready_or_not(client: Client, model: str, version: int | None, *, expected: bool) -> None:
    assert client.ready(model or None, version=version) is expected


def test_metadata_describes_the_engine(client: Client, repository: Path) -> None:
    metadata = client.metadata("linear")
    assert metadata.versions == ("1", "2")
    assert metadata.platform == "onnxruntime_onnx"
    assert [(spec.name, spec.datatype, spec.shape) for spec in metadata.inputs] == [("images", "FP32", (-1, 3, 4, 4))]
    assert [(spec.name, spec.datatype, spec.shape) for spec in metadata.outputs] == [("logits", "FP32", (-1, 5))]
    assert metadata.class_names == ("plane", "car", "bird", "cat", "deer")
    assert metadata.properties["runtime"] == "onnxruntime"
    assert metadata.properties["precision"] == "fp32"
    assert metadata.image_shape == (3, 4, 4)
    assert not metadata.channels_last
    assert not metadata.answers_probabilities
    assert metadata.properties["version"] == "2"
    assert metadata.properties["sha256"] in (repository / "linear" / "2" / "manifest.json").read_text()


@pytest.mark.parametrize(("version", "seed"), [(None, 1), (1, 0), (2, 1)])
def test_logits_are_those_of_the_version(
    client: Client, images: Images, weights: Callable[[int], np.ndarray], version: int | None, seed: int
) -> None:
    logits = client.infer(images, model="linear", version=version)
    np.testing.assert_allclose(logits, images.reshape(len(images), -1) @ weights(seed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_triton_client_gets_the_same_bits(
    client: Client, triton: tritonclient.grpc.InferenceServerClient, images: Images, n: int
) -> None:
    from tritonclient.grpc import InferInput

    tensor = InferInput("images", list(images[:n].shape), "FP32")
    tensor.set_data_from_numpy(images[:n])
    theirs = triton.infer("linear", [tensor]).as_numpy("logits")
    ours = client.infer(images[:n], model="linear")
    assert ours.tobytes() == theirs.tobytes()


def test_non_contiguous_images_are_sent_as_they_look(client: Client, images: Images) -> None:
    flipped = images[:4, :, :, ::-1]
    expected = client.infer(np.ascontiguousarray(flipped), model="linear")
    np.testing.assert_array_equal(client.infer(flipped, model="linear"), expected)


def grey_levels(images: Images) -> Images:
    """Return images in steps of 1/255: what uint8 can hold."""
    return np.asarray(np.rint(images * 255) / np.float32(255))


def test_a_model_that_takes_uint8_is_described_as_such(client: Client) -> None:
    metadata = client.metadata("stored")
    assert [(spec.name, spec.datatype, spec.shape) for spec in metadata.inputs] == [("images", "UINT8", (-1, 4, 4, 3))]
    assert metadata.channels_last
    assert metadata.image_shape == (3, 4, 4)


def test_images_for_a_model_that_takes_uint8_are_rounded_to_what_can_be_sent(
    client: Client, images: Images, weights: Callable[[int], np.ndarray]
) -> None:
    expected = grey_levels(images).reshape(len(images), -1) @ weights(0)
    # More images than a request of it may have.
    np.testing.assert_allclose(client.infer(images, model="stored"), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_takes_uint8_is_sent_stored_images_as_they_are(client: Client, images: Images) -> None:
    stored = np.ascontiguousarray(np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(client.infer(stored, model="stored"), client.infer(images, model="stored"))


def test_stored_images_are_not_sent_to_a_model_that_takes_others(client: Client) -> None:
    with pytest.raises(ValueError, match=r"linear: expected float32 images in \[0, 1\] .*, got uint8 \(1, 4, 4, 3\)"):
        client.infer(np.zeros((1, 4, 4, 3), np.uint8), model="linear")


def test_images_that_uint8_cannot_hold_are_not_sent(client: Client, images: Images) -> None:
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got .*; scale the images"):
        client.infer(images * 255, model="stored")


def test_a_model_may_answer_with_probabilities_and_says_so(client: Client, images: Images) -> None:
    assert client.metadata("shares").answers_probabilities
    shares = client.infer(images, model="shares")
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(shares.argmax(axis=1), client.infer(images, model="linear", version=1).argmax(axis=1))


@pytest.mark.parametrize(
    ("name", "properties", "expected"),
    [
        ("logits", {}, False),
        ("probabilities", {}, True),
        ("scores", {"output": "probabilities"}, True),
        ("probabilities", {"output": "logits"}, False),
    ],
)
def test_what_a_server_says_of_its_answers_counts_more_than_their_name(
    name: str, properties: dict[str, str], *, expected: bool
) -> None:
    spec = TensorMetadata(name, "FP32", (-1, 5))
    metadata = ModelMetadata("m", ("1",), "", (TensorMetadata("images", "FP32", (-1, 3, 4, 4)),), (spec,), properties)
    assert metadata.answers_probabilities is expected


def test_a_given_batch_is_respected(start: Start, repository: Path, images: Images, gated: list[GatedEngine]) -> None:
    serving = start(repository)
    for engine in gated:
        engine.gate.set()
    with Client(serving.address) as client:
        client.infer(images[:7], model="linear", version=1, batch=3)
    assert gated[0].batches == [3, 3, 1]


def test_batches_fit_the_server(start: Start, repository: Path, images: Images, gated: list[GatedEngine]) -> None:
    serving = start(repository, Settings.model_validate({"batching": {"max_batch_size": 2}}))
    for engine in gated:
        engine.gate.set()
    with Client(serving.address) as client:
        client.infer(images[:5], model="linear", version=1)
    assert gated[0].batches == [2, 2, 1]


def test_unknown_model_names_the_known_ones(client: Client, images: Images) -> None:
    with pytest.raises(NotFound, match=r"model 'nobody': not served here; the models are: linear"):
        client.infer(images, model="nobody")


def test_unknown_version_names_the_known_ones(client: Client, images: Images) -> None:
    with pytest.raises(NotFound, match="no version 9; the versions are: 1, 2"):
        client.infer(images, model="linear", version=9)


def test_wrong_shape_is_told_by_the_server(client: Client) -> None:
    with pytest.raises(
        InvalidArgument, match=r"input 'images': expected shape \(1 to 8, 3, 4, 4\), got \(1, 3, 5, 4\)"
    ):
        client.infer(np.zeros((1, 3, 5, 4), np.float32), model="linear")


@pytest.mark.parametrize(
    "images", [np.zeros((0, 3, 4, 4), np.float32), np.zeros((3, 4, 4), np.float32), np.zeros((1, 3, 4, 4))]
)
def test_what_are_no_images_is_not_sent(client: Client, images: Images) -> None:
    with pytest.raises(
        ValueError, match=r"expected float32 images of shape \(N, C, H, W\), or uint8 ones .*, got float"
    ):
        client.infer(images, model="linear")


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with (
        Client(f"127.0.0.1:{port}") as client,
        pytest.raises(Unavailable, match=rf"^cannot reach 127.0.0.1:{port}; is `tenet serve` running there\?$"),
    ):
        client.ready()


def test_no_answer_in_time(start: Start, repository: Path, images: Images, gated: list[GatedEngine]) -> None:
    serving = start(repository)
    with (
        Client(serving.address, timeout=0.2) as client,
        pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.2 s"),
    ):
        client.infer(images[:1], model="linear")
    for engine in gated:
        engine.gate.set()


def test_one_client_serves_many_threads(client: Client, images: Images) -> None:
    expected = client.infer(images, model="linear")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: client.infer(images[index : index + 1], model="linear"), range(16)))
    np.testing.assert_allclose(np.concatenate(answers), expected[:16], rtol=1e-5)


@pytest.mark.parametrize("kind", ServiceError.__subclasses__())
def test_every_status_comes_back_as_its_error(kind: type[ServiceError]) -> None:
    error = errors.error_from_status(kind.status, "why")
    assert type(error) is kind
    assert str(error) == "why"


def test_other_statuses_are_service_errors() -> None:
    assert type(errors.error_from_status(grpc.StatusCode.DATA_LOSS, "why")) is ServiceError


def test_a_full_queue_is_told_at_once(start: Start, repository: Path, images: Images, gated: list[GatedEngine]) -> None:
    address = start(repository, Settings.model_validate({"batching": {"max_queue_size": 1}})).address
    engine = gated[1]
    with Client(address, retries=NO_RETRIES) as client, ThreadPoolExecutor(3) as pool:
        running = pool.submit(client.infer, images[:1], model="linear")
        assert engine.entered.wait(10)
        # One of these waits in the queue's only place; the other is refused while the engine still works.
        others = [pool.submit(client.infer, images[:1], model="linear") for _ in range(2)]
        refused, waiting = futures.wait(others, timeout=10, return_when=futures.FIRST_COMPLETED)
        engine.gate.set()
        assert isinstance(refused.pop().exception(), ResourceExhausted)
        assert running.result(10).shape == waiting.pop().result(10).shape == (1, 5)


def test_a_full_queue_is_tried_again(start: Start, repository: Path, images: Images, gated: list[GatedEngine]) -> None:
    address = start(repository, Settings.model_validate({"batching": {"max_queue_size": 1}})).address
    engine = gated[1]
    with Client(address, retries=Retries(attempts=100)) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.infer, images[:1], model="linear") for _ in range(8)]
        assert engine.entered.wait(10)
        engine.gate.set()
        assert all(each.result(20).shape == (1, 5) for each in asked)


def test_the_server_says_what_it_is(client: Client) -> None:
    metadata = client.server_metadata()
    assert metadata.name == "tenet"
    assert "statistics" in metadata.extensions


def test_the_configuration_is_told(client: Client) -> None:
    config = client.config("linear")
    assert config.name == "linear"
    assert config.max_batch_size == 8


def test_the_index_names_every_version_and_why_it_does_not_answer(client: Client) -> None:
    index = {(entry.name, entry.version): entry for entry in client.index()}
    assert index["linear", "1"].state == index["linear", "2"].state == "READY"
    assert index["unproven", "1"].state == "UNAVAILABLE"
    assert "parity" in index["unproven", "1"].reason
    assert ("unproven", "1") not in {(entry.name, entry.version) for entry in client.index(ready=True)}


def test_statistics_count_what_was_answered(start: Start, repository: Path, images: Images) -> None:
    with Client(start(repository).address) as client:
        client.infer(images, model="linear", version=1)
        (counted,) = client.statistics("linear", version=1)
        assert {(each.name, each.version) for each in client.statistics()} >= {("linear", "1"), ("stored", "1")}
    assert (counted.requests, counted.succeeded.count, counted.failed.count) == (4, 4, 0)
    assert counted.images == len(images)
    assert counted.executions == 4
    assert counted.mean_batch == len(images) / 4
    assert counted.compute.mean_ms is not None
    assert counted.compute.mean_ms > 0


def test_models_are_unloaded_and_loaded(start: Start, repository: Path, images: Images) -> None:
    settings = Settings.model_validate({"models": {"mode": "explicit", "load": ["*"]}})
    with Client(start(repository, settings).address) as client:
        client.unload("stored")
        assert not client.ready("stored")
        with pytest.raises(NotFound):
            client.infer(images, model="stored")
        client.load("stored")
        assert client.infer(images[:1], model="stored").shape == (1, 5)


async def test_the_asynchronous_client_does_the_same(serving: Serving, client: Client, images: Images) -> None:
    async with AsyncClient(serving.address) as asynchronous:
        assert await asynchronous.ready("linear")
        assert await asynchronous.metadata("linear") == client.metadata("linear")
        assert await asynchronous.server_metadata() == client.server_metadata()
        assert await asynchronous.config("linear") == client.config("linear")
        assert await asynchronous.index() == client.index()
        found = await asynchronous.infer(images, model="linear")
        np.testing.assert_allclose(found, client.infer(images, model="linear"), rtol=1e-5, atol=1e-5)
        with pytest.raises(NotFound, match="model 'nobody': not served here"):
            await asynchronous.infer(images, model="nobody")


def encoded(images: Images, kind: str = "PNG") -> list[bytes]:
    """Return images as files."""
    files = []
    for image in np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1):
        file = BytesIO()
        Image.fromarray(image).save(file, kind, lossless=True)
        files.append(file.getvalue())
    return files


@pytest.mark.parametrize("model", ["linear", "stored"])
@pytest.mark.parametrize("kind", ["PNG", "WebP"])
def test_encoded_images_are_answered_as_their_pixels_are(client: Client, images: Images, model: str, kind: str) -> None:
    # More images than a request may have; of the model's own size, so that nothing is resized.
    found = client.infer_encoded(iter(encoded(images, kind)), model=model)
    np.testing.assert_allclose(found, client.infer(grey_levels(images), model=model), rtol=1e-4, atol=1e-4)


async def test_encoded_images_get_the_names_of_their_classes(client: Client, serving: Serving, images: Images) -> None:
    found = client.classify(encoded(images), model="linear", top=2)
    answers = client.infer(grey_levels(images), model="linear")
    names = client.metadata("linear").class_names
    assert [first.name for first, _ in found] == [names[index] for index in answers.argmax(axis=1)]
    assert all(1 >= first.probability >= second.probability >= 0 for first, second in found)
    async with AsyncClient(serving.address) as asynchronous:
        assert await asynchronous.classify(encoded(images), model="linear", top=2) == found


def test_what_is_no_image_is_the_callers_fault(client: Client, images: Images) -> None:
    with pytest.raises(InvalidArgument):
        client.infer_encoded([*encoded(images[:1]), b"no image"], model="linear")


_BESIDE = """
{imports}
import sys
import numpy as np
address = sys.argv[1]
images = np.ones((2, 3, 4, 4), np.float32)
tensor = InferInput("images", [2, 3, 4, 4], "FP32")
tensor.set_data_from_numpy(images)
theirs = InferenceServerClient(address).infer("linear", [tensor]).as_numpy("logits")
with Client(address) as client:
    assert client.infer(images, model="linear").tobytes() == theirs.tobytes()
    assert client.config("linear").name == "linear"
print("both")
"""


@pytest.mark.parametrize("ours_first", [True, False])
def test_both_clients_live_in_one_process(serving: Serving, *, ours_first: bool) -> None:
    imports = ["from service.client import Client", "from tritonclient.grpc import InferenceServerClient, InferInput"]
    program = _BESIDE.format(imports="\n".join(imports if ours_first else reversed(imports)))
    done = subprocess.run([sys.executable, "-c", program, serving.address], capture_output=True, text=True, check=False)
    assert done.stdout == "both\n", done.stderr
