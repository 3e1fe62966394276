"""The server as a process and on the wire: address, health, reflection, errors, shutdown, what it imports."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from protos.audit.v1 import audit_pb2, audit_pb2_grpc
from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.client import Client
from service.errors import NotFound, ResourceExhausted, Unavailable
from service.server import Service, Serving, running, serve
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from export.engines.base import Images
    from tests.service.conftest import GatedEngine, Publish, Start

_ROOT = Path(__file__).parents[2]
_SECONDS = 20
_HEALTH = health_pb2.HealthCheckResponse

# Serves, says where, and at the end what it should not have imported.
_PROGRAM = """
import asyncio, sys
from pathlib import Path
from service.server import serve
from service.settings import Settings

def ready(serving):
    print(serving.port, flush=True)

asyncio.run(serve(Path(sys.argv[1]), Settings().listening(port=0), on_ready=ready))
print("ended;", *sorted({"torch", "torchvision", "foolbox", "training", "dbos"} & sys.modules.keys()), flush=True)
"""

# The same, with an engine that takes a second.
_SLOW_PROGRAM = """
import time
from export.engines.ort import OrtEngine

run = OrtEngine._run

def slow(self, images):
    if images.any():  # a warm-up's are zeros
        print("in flight", flush=True)
        time.sleep(1)
    return run(self, images)

OrtEngine._run = slow
"""


@contextmanager
def process(repository: Path, program: str = _PROGRAM) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, str(repository)]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.fixture
def channel(serving: Serving) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(serving.address) as channel:
        yield channel


# Address


async def test_a_port_in_use_is_told_with_the_way_out(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"^port {port} on 127\.0\.0\.1 is in use; choose another with --port$"):
            await serve(repository, Settings().listening(port=port))


def test_two_servers_do_not_share_a_port(serving: Serving, repository: Path) -> None:
    settings = Settings().listening(port=serving.port)
    with pytest.raises(OSError, match=f"port {serving.port} on 127.0.0.1 is in use"):
        asyncio.run(serve(repository, settings))


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
async def test_a_host_of_somebody_else(repository: Path, host: str) -> None:
    with pytest.raises(OSError, match=rf"^cannot listen on {host}:0: .+; choose a host and port of this machine$"):
        await serve(repository, Settings().listening(host=host, port=0))


async def test_a_missing_repository_is_told_before_anything_is_served(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a model repository here"):
        await serve(tmp_path / "nothing", Settings().listening(port=0))


def test_serving_says_where_and_what(serving: Serving) -> None:
    assert serving.address == f"127.0.0.1:{serving.port}"
    assert serving.models == ("linear", "shares", "stored")


def test_messages_may_be_as_large_as_the_settings_say(start: Start, repository: Path, images: Images) -> None:
    settings = Settings.model_validate({"server": {"max_message_mib": 1}})
    with (
        Client(start(repository, settings).address) as client,
        pytest.raises(ResourceExhausted, match="larger than max"),
    ):
        client.infer(images.repeat(300, axis=0), model="linear", batch=7500)


# Health


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("", _HEALTH.SERVING),
        ("linear", _HEALTH.SERVING),
        ("unproven", _HEALTH.NOT_SERVING),
        ("inference.GRPCInferenceService", _HEALTH.SERVING),
    ],
)
def test_health_of_server_services_and_models(channel: grpc.Channel, name: str, status: int) -> None:
    assert HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)).status == status


def test_health_of_what_is_not_known(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "service 'nobody': expected one of '', " in str(caught.value.details())
    watch = HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert next(watch).status == _HEALTH.SERVICE_UNKNOWN
    watch.cancel()


def test_a_watch_sees_the_end_and_does_not_delay_it(loop: asyncio.AbstractEventLoop, repository: Path) -> None:
    context = running(repository, Settings().listening(port=0))
    serving = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(_SECONDS)
    with grpc.insecure_channel(serving.address) as channel:
        watch = HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="linear"))
        assert next(watch).status == _HEALTH.SERVING
        began = time.monotonic()
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(_SECONDS)
        assert [response.status for response in watch] == [_HEALTH.NOT_SERVING]
    assert time.monotonic() - began < Settings().server.shutdown_grace_s / 2


# Reflection


def test_reflection_describes_every_service(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        "inference.GRPCInferenceService",
        "inference.model_repository.ModelRepositoryService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    pool = DescriptorPool(database)
    inference = pool.FindServiceByName("inference.GRPCInferenceService")
    assert len(inference.methods) == 20
    assert pool.FindMessageTypeByName("inference.ModelInferRequest").fields_by_name["raw_input_contents"].number == 7
    assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Watch"].server_streaming


# Services beside, and errors of any kind


class Audits(audit_pb2_grpc.AuditServiceServicer):
    """Fails in every way that a servicer can."""

    async def _fail(self, request: Any, context: Any) -> Any:
        if request.id == "gone":
            raise NotFound("audit 'gone': not here")
        if request.id == "aborted":
            await context.abort(grpc.StatusCode.ABORTED, "by itself")
        raise KeyError("a secret")

    SubmitAudit = ListAudits = CancelAudit = GetReport = GetAudit = _fail

    async def WatchAudit(self, request: audit_pb2.WatchAuditRequest, context: Any) -> AsyncIterator[Any]:
        del context
        yield audit_pb2.AuditProgress(shards_done=1)
        if request.id == "gone":
            raise NotFound("audit 'gone': not here")
        raise KeyError("a secret")


@pytest.fixture
def audits(start: Start, repository: Path) -> Iterator[grpc.Channel]:
    descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
    add = partial(audit_pb2_grpc.add_AuditServiceServicer_to_server, Audits())
    serving = start(repository, services=(Service(descriptor, add),))
    with grpc.insecure_channel(serving.address) as channel:
        yield channel


def test_a_service_beside_is_served_healthy_and_described(audits: grpc.Channel) -> None:
    name = "tenet.audit.v1.AuditService"
    assert HealthStub(audits).Check(health_pb2.HealthCheckRequest(service=name)).status == _HEALTH.SERVING
    database = ProtoReflectionDescriptorDatabase(audits)
    assert name in database.get_services()
    message = DescriptorPool(database).FindMessageTypeByName("tenet.audit.v1.Audit")
    created = message.fields_by_name["create_time"].message_type
    assert created is not None
    assert created.full_name == "google.protobuf.Timestamp"


@pytest.mark.parametrize(
    ("audit", "status", "message"),
    [
        ("gone", grpc.StatusCode.NOT_FOUND, "audit 'gone': not here"),
        ("other", grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"),
    ],
)
def test_errors_become_statuses(
    audits: grpc.Channel, caplog: pytest.LogCaptureFixture, *, audit: str, status: grpc.StatusCode, message: str
) -> None:
    stub = audit_pb2_grpc.AuditServiceStub(audits)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetAudit(audit_pb2.GetAuditRequest(id=audit))
    assert (caught.value.code(), caught.value.details()) == (status, message)
    stream = stub.WatchAudit(audit_pb2.WatchAuditRequest(id=audit))
    assert next(stream).shards_done == 1
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert (caught.value.code(), caught.value.details()) == (status, message)
    assert caplog.text.count("KeyError: 'a secret'") == (2 if status is grpc.StatusCode.INTERNAL else 0)


def test_a_handlers_own_abort_is_left_alone(audits: grpc.Channel, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        audit_pb2_grpc.AuditServiceStub(audits).GetAudit(audit_pb2.GetAuditRequest(id="aborted"))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.ABORTED, "by itself")
    assert not caplog.records


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelTrain")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Shutdown


def test_the_end_waits_for_what_is_in_flight_and_takes_no_more(
    loop: asyncio.AbstractEventLoop, repository: Path, images: Images, gated: list[GatedEngine]
) -> None:
    context = running(repository, Settings().listening(port=0))
    serving = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(_SECONDS)
    with Client(serving.address) as client, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.infer, images[:1], model="linear", version=2)]
        assert gated[1].entered.wait(_SECONDS)
        answers.append(pool.submit(client.infer, images[:2], model="linear", version=1))
        # The first engine's turn has come, too: nothing is still on its way when the end begins.
        assert gated[0].entered.wait(_SECONDS)
        end = asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop)
        with pytest.raises(futures.TimeoutError):
            end.result(0.3)
        with Client(serving.address) as late:
            assert not late.ready()
            assert not late.ready("linear")
            with pytest.raises(Unavailable, match="the server is shutting down; try again, or elsewhere"):
                late.infer(images[:1], model="linear")
        for engine in gated:
            engine.gate.set()
        assert [len(answer.result(_SECONDS)) for answer in answers] == [1, 2]
        end.result(_SECONDS)


def test_the_end_drops_no_call(
    loop: asyncio.AbstractEventLoop, repository: Path, images: Images, gated: list[GatedEngine]
) -> None:
    context = running(repository, Settings().listening(port=0))
    serving = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(_SECONDS)
    for engine in gated:
        engine.gate.set()
    stop = threading.Event()

    def ask(client: Client) -> Exception | None:
        """Ask until the end; return the first error."""
        while not stop.is_set():
            try:
                client.infer(images[:1], model="linear")
            except Unavailable as error:
                return error
        return None

    with Client(serving.address) as client, ThreadPoolExecutor(8) as pool:
        errors = [pool.submit(ask, client) for _ in range(8)]
        assert gated[1].entered.wait(_SECONDS)
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(_SECONDS)
        stop.set()
        messages = {str(error.result(_SECONDS)) for error in errors}
    # A call that begins after the end reaches nobody; what the server had been sent was answered or refused.
    assert messages <= {
        "linear@2: the server is shutting down; try again, or elsewhere",
        f"cannot reach {serving.address}; is `tenet serve` running there?",
    }


def test_streams_do_not_delay_the_end(loop: asyncio.AbstractEventLoop, repository: Path, images: Images) -> None:
    context = running(repository, Settings().listening(port=0))
    serving = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(_SECONDS)
    with grpc.insecure_channel(serving.address) as own:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request = pb.ModelInferRequest(model_name="linear", id="one", raw_input_contents=[images[:1].tobytes()])
        request.inputs.add(name="images", datatype="FP32", shape=images[:1].shape)
        requests.put(request)
        answers = GRPCInferenceServiceStub(own).ModelStreamInfer(iter(requests.get, None))
        assert next(answers).infer_response.id == "one"
        described = ServerReflectionStub(own).ServerReflectionInfo(iter(queue.SimpleQueue[Any]().get, None))
        began = time.monotonic()
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(_SECONDS)
        assert time.monotonic() - began < Settings().server.shutdown_grace_s / 2
        for stream in (answers, described):
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_end_does_not_wait_longer_than_its_grace(
    loop: asyncio.AbstractEventLoop, repository: Path, images: Images, gated: list[GatedEngine]
) -> None:
    settings = Settings.model_validate({"server": {"port": 0, "shutdown_grace_s": 0.1}})
    context = running(repository, settings)
    serving = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(_SECONDS)
    engine = gated[1]
    with Client(serving.address) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.infer, images[:1], model="linear")
        assert engine.entered.wait(_SECONDS)
        end = asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop)
        assert isinstance(answer.exception(_SECONDS), Unavailable)
        engine.gate.set()
        end.result(_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_normally(repository: Path, number: signal.Signals) -> None:
    with process(repository) as child:
        with Client(f"127.0.0.1:{line(child)}") as client:
            assert client.ready("linear")
        child.send_signal(number)
        out, err = child.communicate(timeout=_SECONDS)
    # Nothing after "ended;": serving imports neither torch nor what needs it.
    assert (out, child.returncode) == ("ended;\n", 0)
    # The one version that is not served; Python's last resort prints warnings.
    assert [text.split(":")[0] for text in err.splitlines()] == ["unproven@1 is not served"]


def test_sigterm_lets_a_call_in_flight_finish(tmp_path: Path, publish: Publish, images: Images) -> None:
    publish(tmp_path, "linear")
    with process(tmp_path, _SLOW_PROGRAM + _PROGRAM) as child, ThreadPoolExecutor(1) as pool:
        with Client(f"127.0.0.1:{line(child)}") as client:
            answer = pool.submit(client.infer, images[:3], model="linear")
            assert line(child) == "in flight"
            child.send_signal(signal.SIGTERM)
            assert answer.result(_SECONDS).shape == (3, 5)
        out, _ = child.communicate(timeout=_SECONDS)
    assert (out, child.returncode) == ("ended;\n", 0)
