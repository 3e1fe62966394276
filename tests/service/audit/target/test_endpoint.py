"""A model behind an endpoint: our server, and others of the protocol that say less of themselves."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from export.mapping import Mapping
from export.repository import Repository
from protos.inference import open_inference_pb2 as pb
from protos.inference import open_inference_pb2_grpc
from protos.inference.model_config_pb2 import ModelConfig
from service.audit.target.base import TargetFailed
from service.audit.target.endpoint import EndpointTarget
from service.audit.target.engine import EngineTarget
from service.client import NO_RETRIES
from service.errors import PUSHBACK
from tests.service.client.answering import Answering, Refusal
from tests.service.client.answering import serving as answering_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from export.engines.base import Images
    from service.server import Serving

    Open = Callable[..., EndpointTarget]

WIRE = {"FP32": "<f4", "UINT8": "u1"}


@dataclass
class Foreign(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """A server that knows no properties: it answers each image's first three numbers, as it got them."""

    datatype: str = "FP32"
    shape: tuple[int, ...] = (-1, 4, 5, 3)
    inputs: tuple[str, ...] = ("x",)
    outputs: tuple[str, ...] = ("scores",)
    output_shape: tuple[int, ...] = (-1, 3)
    output_datatype: str = "FP32"
    answers: int = 3
    max_batch_size: int = 0
    asked: list[pb.ModelInferRequest] = field(default_factory=list)

    def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        if request.name != "foreign":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        response = pb.ModelMetadataResponse(name=request.name, versions=["2", "10"], platform="other")
        for name in self.inputs:
            response.inputs.add(name=name, datatype=self.datatype, shape=self.shape)
        for name in self.outputs:
            response.outputs.add(name=name, datatype=self.output_datatype, shape=self.output_shape)
        return response

    def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        if self.max_batch_size == 0:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such extension")
        return pb.ModelConfigResponse(config=ModelConfig(name=request.name, max_batch_size=self.max_batch_size))

    def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        del context
        self.asked.append(request)
        (tensor,) = request.inputs
        values = np.frombuffer(request.raw_input_contents[0], WIRE[tensor.datatype]).reshape(tensor.shape[0], -1)
        response = pb.ModelInferResponse(model_name="foreign", model_version=request.model_version)
        response.outputs.add(name=request.outputs[0].name, datatype="FP32", shape=(len(values), self.answers))
        response.raw_output_contents.append(values[:, : self.answers].astype("<f4").tobytes())
        return response


@pytest.fixture
def foreign() -> Foreign:
    return Foreign()  # type: ignore[abstract]  # what it does not implement, nobody asks


@pytest.fixture
def opened(foreign: Foreign) -> Iterator[Open]:
    """Open the foreign server's model, as it is set by then."""
    with answering_at(foreign) as address:
        targets: list[EndpointTarget] = []

        def opened(*, model: str = "foreign", **options: Any) -> EndpointTarget:
            targets.append(target := EndpointTarget(address, model=model, **options))
            return target

        yield opened
        for target in targets:
            target.close()


@pytest.mark.parametrize("model", ["linear", "stored", "shares"])
def test_our_server_answers_as_its_engine_does(serving: Serving, repository: Path, images: Images, model: str) -> None:
    version = Repository(repository).find(model)
    with EngineTarget.opened(version) as engine, EndpointTarget(serving.address, model=model) as endpoint:
        for each in ("name", "class_names", "image_shape", "domain", "batch_sizes"):
            assert getattr(endpoint, each) == getattr(engine, each)
        np.testing.assert_allclose(endpoint(images), engine(images), rtol=1e-5, atol=1e-5)
        assert endpoint.queries == len(images)
        assert endpoint(images[:0]).shape == (0, len(endpoint.class_names))


def test_a_version_can_be_chosen_and_stays(serving: Serving, images: Images) -> None:
    ask = partial(EndpointTarget, serving.address, model="linear")
    with ask(version=1) as first, ask() as latest:
        assert (first.name, latest.name) == ("linear@1", "linear@2")
        assert (first(images) != latest(images)).any()


def test_several_requests_are_on_their_way_at_once() -> None:
    answering = Answering()  # type: ignore[abstract]
    images = np.random.default_rng(0).random((16, 3, 2, 2), dtype=np.float32)
    with answering_at(answering) as address, EndpointTarget(address, model="m", in_flight=4) as target:
        assert target.batch_sizes == (1, 2, 4)
        answering.gate.clear()
        opener = threading.Thread(target=open_when_four_wait, args=(answering,))
        opener.start()
        np.testing.assert_allclose(target(images)[:, 0], images.mean(axis=(1, 2, 3)), rtol=1e-5)
        opener.join()
        assert (answering.most_running, len(answering.requests), target.version) == (4, 4, "7")


def open_when_four_wait(answering: Answering) -> None:
    until = time.monotonic() + 5
    while answering.running < 4 and time.monotonic() < until:
        time.sleep(0.01)
    answering.gate.set()


def test_a_refusal_is_waited_for_and_is_no_query() -> None:
    answering = Answering()  # type: ignore[abstract]
    images = np.zeros((4, 3, 2, 2), np.float32)
    with answering_at(answering) as address, EndpointTarget(address, model="m") as target:
        answering.refusals.append(Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, metadata=((PUSHBACK, "300"),)))
        target(images)
        first, second = answering.times
        assert second - first >= 0.3
        assert target.queries == 4


def test_an_endpoint_that_dies_in_the_middle_is_a_failure_of_the_target() -> None:
    images = np.zeros((4, 3, 2, 2), np.float32)
    with answering_at(Answering()) as address:  # type: ignore[abstract]
        target = EndpointTarget(address, model="m", retries=NO_RETRIES)
        target(images)
    with target, pytest.raises(TargetFailed, match=rf"m@7: .*{address}"):
        target(images)


def test_a_request_that_takes_too_long_is_a_failure_of_the_target() -> None:
    answering = Answering()  # type: ignore[abstract]
    with answering_at(answering) as address, EndpointTarget(address, model="m", timeout_s=0.2) as target:
        answering.gate.clear()
        with pytest.raises(TargetFailed, match=r"did not answer within 0\.2 s"):
            target(np.zeros((1, 3, 2, 2), np.float32))
        answering.gate.set()


def test_an_endpoint_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(ConnectionError, match=r"^target\.endpoint: 127\.0\.0\.1:9, model 'm': cannot reach 127"):
        EndpointTarget("127.0.0.1:9", model="m")


def test_an_unknown_model_or_version_is_one_clear_error(serving: Serving, opened: Open) -> None:
    with pytest.raises(ValueError, match=rf"^target\.endpoint: {serving.address}, model 'nobody': "):
        EndpointTarget(serving.address, model="nobody")
    with pytest.raises(ValueError, match=r"model 'linear'.*99"):
        EndpointTarget(serving.address, model="linear", version=99)
    with pytest.raises(ValueError, match="unknown model: 'other'"):
        opened(model="other")


def test_a_server_that_says_little_is_understood_by_its_shapes(foreign: Foreign, opened: Open) -> None:
    target = opened(labels=("cat", "dog", "eel"))
    assert (target.name, target.image_shape, target.class_names) == ("foreign@10", (3, 4, 5), ("cat", "dog", "eel"))
    assert (target.domain.kind, target.batch_sizes[-1]) == ("float32", 64)
    images = np.random.default_rng(0).random((3, 3, 4, 5), dtype=np.float32)
    # Channels last: the first three numbers are the first pixel's.
    np.testing.assert_array_equal(target(images), images[:, :, 0, 0])
    assert foreign.asked[0].model_version == "10"
    assert opened().class_names == ("0", "1", "2")


def test_a_mapping_says_how_images_become_the_input(foreign: Foreign, opened: Open) -> None:
    mapping = Mapping(layout="NHWC", channels="BGR", range=255, mean=(0.5, 0.4, 0.3), std=(0.2,), probabilities=True)
    foreign.shape = (-1, -1, -1, 3)
    target = opened(mapping=mapping.model_copy(update={"image_size": (4, 5), "labels": ("cat", "dog", "eel")}))
    assert (target.image_shape, target.class_names) == ((3, 4, 5), ("cat", "dog", "eel"))
    images = np.full((1, 3, 4, 5), 0.9, np.float32)
    got = np.exp(target(images))
    np.testing.assert_allclose(got, [[0.6 / 0.2 * 255, 0.5 / 0.2 * 255, 0.4 / 0.2 * 255]], rtol=1e-5)


def test_classes_that_the_server_leaves_open_are_those_of_the_labels(foreign: Foreign, opened: Open) -> None:
    foreign.output_shape = (-1, -1)
    assert opened(labels=("cat", "dog", "eel"))(np.zeros((1, 3, 4, 5), np.float32)).shape == (1, 3)


def test_grey_images_need_no_mapping(foreign: Foreign, opened: Open) -> None:
    foreign.shape = (-1, 1, 4, 5)
    for mapping in (None, Mapping(), Mapping(channels="L")):
        target = opened(mapping=mapping)
        assert target.image_shape == (1, 4, 5)
        np.testing.assert_array_equal(target(np.full((1, 1, 4, 5), 0.5, np.float32)), [[0.5] * 3])


def test_bytes_are_sent_to_a_model_that_takes_them(foreign: Foreign, opened: Open) -> None:
    foreign.datatype, foreign.shape = "UINT8", (-1, 3, 4, 5)
    target = opened()
    assert target.domain.kind == "uint8"
    levels = np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5)
    np.testing.assert_array_equal(target(levels / np.float32(255)), [[0, 1, 2]])


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ({"datatype": "INT64"}, {}, r"expected input 'x' of datatype FP32 or UINT8, got INT64"),
        ({"output_datatype": "FP16"}, {}, r"expected output 'scores' of datatype FP32, got FP16"),
        ({"shape": (-1, 60)}, {}, r"expected input 'x' to take images, with 4 dimensions, got shape \(-1, 60\)"),
        ({"shape": (-1, 7, 4, 5)}, {}, "expected images of 1 or 3 channels, got 7"),
        ({"shape": (-1, 3, -1, -1)}, {}, r"expected one size of images, got any .*give target\.mapping\.image_size"),
        ({}, {"mapping": Mapping(image_size=(8, 8))}, r"expected 4 x 5 as foreign takes, got 8 x 8"),
        ({"shape": (16, 3, 4, 5)}, {}, "expected a model that takes any number of images, got one that takes 16"),
        ({"inputs": ("x", "y")}, {}, r"expected one among its inputs, which are x, y; name one as target\.mapping\.in"),
        ({"outputs": ()}, {}, "expected one among its outputs, which are none"),
        ({}, {"mapping": Mapping(output="logits")}, "expected 'logits' among its outputs, which are scores"),
        ({"output_shape": (-1, -1)}, {}, r"expected output 'scores' of shape \(batch, classes\).*target\.labels"),
        ({"output_shape": (-1, 7, 7, 3)}, {}, r"of shape \(batch, classes\), .*got \(-1, 7, 7, 3\)"),
        ({}, {"labels": ("cat", "dog")}, r"target\.labels: expected 3 names as foreign has classes, got 2"),
        ({}, {"mapping": Mapping(channels="L")}, r"target\.mapping\.channels: .*3 channels, got L"),
        ({}, {"mapping": Mapping(mean=(0.1, 0.2))}, r"target\.mapping\.mean: expected 1 or 3 numbers, got 2"),
        ({"datatype": "UINT8"}, {"mapping": Mapping(std=(0.2,))}, "expected no mean and std for foreign"),
        ({"datatype": "UINT8"}, {"wanted": "float32"}, r"target\.input: expected 'uint8'"),
    ],
)
def test_what_does_not_fit_is_said_before_a_query_is_spent(
    foreign: Foreign, opened: Open, server: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    for name, value in server.items():
        setattr(foreign, name, value)
    with pytest.raises(ValueError, match=message):
        opened(**options)
    assert not foreign.asked


def test_answers_of_another_shape_than_promised_are_a_failure_of_the_target(foreign: Foreign, opened: Open) -> None:
    target = opened()
    foreign.answers = 2
    with pytest.raises(TargetFailed, match="foreign@10: "):
        target(np.zeros((2, 3, 4, 5), np.float32))


def test_names_and_sizes_are_those_of_the_properties_where_there_are_some() -> None:
    answering = Answering()  # type: ignore[abstract]
    answering.properties = {
        "max_batch_size": "6",
        "class_names": json.dumps(["a", "b", "c"]),
        "output": "probabilities",
    }
    with answering_at(answering) as address, EndpointTarget(address, model="m") as target:
        assert (target.batch_sizes, target.class_names) == ((1, 2, 4, 6), ("a", "b", "c"))
        np.testing.assert_allclose(target(np.ones((1, 3, 2, 2), np.float32)), [[0, 0, 0]], atol=1e-6)


def test_the_largest_batch_is_that_of_the_configuration_where_the_properties_do_not_tell(
    foreign: Foreign, opened: Open
) -> None:
    foreign.max_batch_size = 3
    target = opened()
    assert target.batch_sizes == (1, 2, 3)
    target(np.zeros((7, 3, 4, 5), np.float32))
    # Several are on their way at once, and may arrive in any order.
    assert sorted(request.inputs[0].shape[0] for request in foreign.asked) == [1, 3, 3]


def test_a_fixed_batch_of_one_is_kept(foreign: Foreign, opened: Open) -> None:
    foreign.shape = (1, 3, 4, 5)
    opened()(np.zeros((2, 3, 4, 5), np.float32))
    assert [request.inputs[0].shape[0] for request in foreign.asked] == [1, 1]
