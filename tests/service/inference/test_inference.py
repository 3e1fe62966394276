"""One inference, as its caller and its operator meet it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import grpc
import pytest
from tritonclient.grpc import InferenceServerClient

from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service import logs
from service.client import Client, RequestOptions, encoding
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.engines.base import Images
    from tests.service.conftest import Start

_MIB = 1 << 20
_SECONDS = 20


@pytest.fixture
def sparse() -> Iterator[str]:
    """A shared memory object of 2 MiB that takes no memory; its key."""
    path = Path("/dev/shm", f"test-{uuid4().hex}")
    with path.open("xb") as file:
        os.truncate(file.fileno(), 2 * _MIB)
    yield path.name
    path.unlink()


def test_images_in_shared_memory_are_not_read_if_they_are_more_than_a_request_may_have(
    start: Start, repository: Path, sparse: str
) -> None:
    settings = Settings.model_validate({"server": {"max_message_mib": 1}, "shared_memory": {"enabled": True}})
    address = start(repository, settings).address
    request = pb.ModelInferRequest(model_name="linear")
    tensor = request.inputs.add(name="images", datatype="BYTES", shape=[1])
    tensor.parameters["shared_memory_region"].string_param = "sparse"
    tensor.parameters["shared_memory_byte_size"].int64_param = 2 * _MIB
    triton: InferenceServerClient = InferenceServerClient(address)
    with grpc.insecure_channel(address) as channel:
        triton.register_system_shared_memory("sparse", sparse, 2 * _MIB)
        with pytest.raises(grpc.RpcError) as raised:
            GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=_SECONDS)
        triton.close()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"expected at most {_MIB} bytes in shared memory" in str(raised.value.details())


def test_the_line_of_a_stream_counts_the_images_of_all_its_requests(
    start: Start, repository: Path, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    address = start(repository, Settings.model_validate({"logging": {"calls": True}})).address
    with Client(address) as client, grpc.insecure_channel(address) as channel:
        described = client.metadata("linear")
        requests = [
            pb.ModelInferRequest.FromString(
                encoding.with_images(images[:n], described, version="", options=RequestOptions(request_id=f"s{n}"))
            )
            for n in (1, 2)
        ]
        with caplog.at_level(logging.INFO, "service.calls"):
            stream = GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests), timeout=_SECONDS)
            assert [answer.infer_response.id for answer in stream] == ["s1", "s2"]
    (line,) = [json.loads(logs.Json().format(record)) for record in caplog.records if "Stream" in record.getMessage()]
    assert (line["status"], line["images"]) == ("OK", 3)
