"""The whole server with TLS, tokens, certificates and a port for operators: real sockets, real clients."""

from __future__ import annotations

import hashlib
import queue
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.settings import Settings
from tests.service.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path

    from service.server import Serving
    from tests.service.conftest import Start

_METADATA = pb.ModelMetadataRequest(name="linear")
_LOAD = pb.RepositoryModelLoadRequest(model_name="linear")


def _token(name: str, secret: str, *roles: str) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), "roles": roles}


def _bearer(secret: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {secret}"),)


def _status(call: Any, *arguments: Any, **options: Any) -> grpc.StatusCode:
    try:
        call(*arguments, timeout=10, **options)
    except grpc.RpcError as error:
        status: grpc.StatusCode = error.code()
        return status
    return grpc.StatusCode.OK


def _started(start: Start, repository: Path, tables: dict[str, Any]) -> Serving:
    return start(repository, Settings.model_validate(tables))


def test_tokens_open_what_their_roles_allow(start: Start, repository: Path) -> None:
    tokens = (_token("app", "one", "predict"), _token("operator", "two", "admin"))
    serving = _started(start, repository, {"auth": {"tokens": tokens}, "models": {"mode": "explicit", "load": ("*",)}})
    with grpc.insecure_channel(serving.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert _status(stub.ModelMetadata, _METADATA) is grpc.StatusCode.UNAUTHENTICATED
        assert _status(stub.ModelMetadata, _METADATA, metadata=_bearer("three")) is grpc.StatusCode.UNAUTHENTICATED
        assert _status(stub.ModelMetadata, _METADATA, metadata=_bearer("one")) is grpc.StatusCode.OK
        assert _status(stub.RepositoryModelLoad, _LOAD, metadata=_bearer("one")) is grpc.StatusCode.PERMISSION_DENIED
        assert _status(stub.RepositoryModelLoad, _LOAD, metadata=_bearer("two")) is grpc.StatusCode.OK
        # Kubelets have no token.
        assert _status(stub.ServerReady, pb.ServerReadyRequest()) is grpc.StatusCode.OK
        assert _status(HealthStub(channel).Check, health_pb2.HealthCheckRequest()) is grpc.StatusCode.OK


def test_streams_are_asked_who_they_are_too(start: Start, repository: Path) -> None:
    serving = _started(start, repository, {"auth": {"tokens": (_token("app", "one", "predict"),)}})
    with grpc.insecure_channel(serving.address) as channel:
        answers = GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([pb.ModelInferRequest()]), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_certificates_open_what_their_roles_allow(start: Start, repository: Path, tmp_path: Path) -> None:
    authority = Authority()
    tls = authority.server().write(tmp_path, client_ca=authority.certificate)
    certificates = ({"name": "app.example", "roles": ("predict",)},)
    tables = {"tls": tls.model_dump(), "auth": {"certificates": certificates}}
    serving = _started(start, repository, tables)
    for name, status in {
        "app.example": grpc.StatusCode.OK,
        "other.example": grpc.StatusCode.PERMISSION_DENIED,
    }.items():
        pair = authority.client(name, dns=(name,))
        credentials = grpc.ssl_channel_credentials(authority.certificate, pair.key, pair.certificate)
        with grpc.secure_channel(f"localhost:{serving.port}", credentials) as channel:
            assert _status(GRPCInferenceServiceStub(channel).ModelMetadata, _METADATA) is status


def test_operators_have_a_port_of_their_own(start: Start, repository: Path, tmp_path: Path) -> None:
    authority = Authority()
    tls = authority.server().write(tmp_path)
    serving = _started(start, repository, {"tls": tls.model_dump(), "server": {"admin_port": 0}})
    assert serving.admin_port
    credentials = grpc.ssl_channel_credentials(authority.certificate)
    with (
        grpc.secure_channel(f"localhost:{serving.port}", credentials) as callers,
        grpc.secure_channel(f"localhost:{serving.admin_port}", credentials) as operators,
    ):
        index = pb.RepositoryIndexRequest()
        assert _status(GRPCInferenceServiceStub(callers).ModelMetadata, _METADATA) is grpc.StatusCode.OK
        assert _status(GRPCInferenceServiceStub(callers).RepositoryIndex, index) is grpc.StatusCode.UNIMPLEMENTED
        # Operators' tools ask for both.
        assert _status(GRPCInferenceServiceStub(operators).ModelMetadata, _METADATA) is grpc.StatusCode.OK
        assert _status(GRPCInferenceServiceStub(operators).RepositoryIndex, index) is grpc.StatusCode.OK
        for channel in (callers, operators):
            assert _status(HealthStub(channel).Check, health_pb2.HealthCheckRequest()) is grpc.StatusCode.OK


def test_requests_of_too_many_bytes_are_told_when_to_come_again(start: Start, repository: Path) -> None:
    serving = _started(start, repository, {"server": {"max_in_flight_mib": 1}})
    with grpc.insecure_channel(serving.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        large = pb.ModelInferRequest(model_name="linear", raw_input_contents=[bytes(2 << 20)])
        assert _status(stub.ModelInfer, large) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert _status(stub.ModelMetadata, _METADATA) is grpc.StatusCode.OK


def test_a_stream_with_too_many_bytes_waits_for_its_own_answers(start: Start, repository: Path) -> None:
    # Each request waits a while for others to fill its batch, and two of this size are all that there is room for.
    tables = {"server": {"max_in_flight_mib": 1}, "batching": {"max_queue_delay_ms": 300}}
    serving = _started(start, repository, tables)
    image = pb.ModelInferRequest.InferInputTensor(name="images", datatype="FP32", shape=(1, 3, 4, 4))
    names = [str(number) * 400_000 for number in range(6)]
    with grpc.insecure_channel(serving.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        requests = (
            pb.ModelInferRequest(model_name="linear", id=name, inputs=[image], raw_input_contents=[bytes(4 * 48)])
            for name in names
        )
        answers = stub.ModelStreamInfer(requests, timeout=30)
        statuses = set()
        while grpc.StatusCode.RESOURCE_EXHAUSTED not in statuses and answers.is_active():
            statuses.add(_status(stub.ModelMetadata, _METADATA))
        assert grpc.StatusCode.RESOURCE_EXHAUSTED in statuses
        assert [(answer.infer_response.id[:1], answer.error_message) for answer in answers] == [
            (name[:1], "") for name in names
        ]
        assert _status(stub.ModelMetadata, _METADATA) is grpc.StatusCode.OK


def test_connections_beyond_the_limit_are_closed(start: Start, repository: Path) -> None:
    serving = _started(start, repository, {"server": {"max_connections": 1}})
    # Channels of equal options share a connection; these do not.
    first, second = (grpc.insecure_channel(serving.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(2))
    with first, second:
        assert _status(GRPCInferenceServiceStub(first).ModelMetadata, _METADATA) is grpc.StatusCode.OK
        assert _status(GRPCInferenceServiceStub(second).ModelMetadata, _METADATA) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("front", ["grpc", "native"])
def test_one_call_too_many_is_told_when_to_come_again(start: Start, repository: Path, front: str) -> None:
    serving = _started(start, repository, {"server": {"max_concurrent_calls": 1, "front": front}})
    with grpc.insecure_channel(serving.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        requests: queue.SimpleQueue[pb.ModelInferRequest | None] = queue.SimpleQueue()
        requests.put(pb.ModelInferRequest(id="held"))
        held = stub.ModelStreamInfer(iter(requests.get, None))
        next(held)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelMetadata(_METADATA, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata: Any = caught.value.trailing_metadata()
        (packed,) = Status.FromString(dict(metadata)["grpc-status-details-bin"]).details
        info = RetryInfo()
        assert packed.Unpack(info)
        assert info.retry_delay.ToMilliseconds() == 100
        # The native core has no place for gRPC's own key.
        assert dict(metadata).get("grpc-retry-pushback-ms") == {"grpc": "100", "native": None}[front]
        # Whether the server lives is told all the same.
        assert _status(stub.ServerLive, pb.ServerLiveRequest()) is grpc.StatusCode.OK
        requests.put(None)
        assert not list(held)
