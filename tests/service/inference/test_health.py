"""Health of server, services and models, as load balancers and kubelets ask for it, through every change of a model."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tritonclient.grpc import InferenceServerClient

from service.server import running
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service.server import Serving
    from tests.service.conftest import Start

_SECONDS = 20
_Status = health_pb2.HealthCheckResponse

_EXPLICIT = {"models": {"mode": "explicit", "load": ["linear"]}}


@contextmanager
def health_of(address: str) -> Iterator[HealthStub]:
    with grpc.insecure_channel(address) as channel:
        yield HealthStub(channel)


def check(health: HealthStub, name: str) -> int:
    status: int = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=_SECONDS).status
    return status


class Watch:
    """Reads a watch in a thread, so that a test can wait for what it says, and not for ever."""

    def __init__(self, health: HealthStub, name: str) -> None:
        self._call = health.Watch(health_pb2.HealthCheckRequest(service=name))
        self._told: queue.Queue[int | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._told.put(response.status)
        except grpc.RpcError:
            pass
        self._told.put(None)

    def next(self) -> int | None:
        """Return the next status; None at the end."""
        return self._told.get(timeout=_SECONDS)

    def cancel(self) -> None:
        self._call.cancel()
        self._reader.join(_SECONDS)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("", _Status.SERVING),
        ("linear", _Status.SERVING),
        ("unproven", _Status.NOT_SERVING),
        ("inference.GRPCInferenceService", _Status.SERVING),
        ("inference.model_repository.ModelRepositoryService", _Status.SERVING),
    ],
)
def test_server_models_and_services_have_a_health(serving: Serving, name: str, status: int) -> None:
    with health_of(serving.address) as health:
        assert check(health, name) == status


def test_what_is_not_known_is_not_found_and_is_told_what_is(serving: Serving) -> None:
    with health_of(serving.address) as health:
        with pytest.raises(grpc.RpcError) as caught:
            check(health, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert str(caught.value.details()).startswith("service 'nobody': expected one of '', ")
        assert "'linear'" in str(caught.value.details())
        watch = Watch(health, "nobody")
        assert watch.next() == _Status.SERVICE_UNKNOWN
        watch.cancel()


def test_a_watch_sees_a_model_go_and_come_back(start: Start, repository: Path) -> None:
    serving = start(repository, Settings.model_validate(_EXPLICIT))
    with health_of(serving.address) as health, InferenceServerClient(serving.address) as triton:
        watch, other = Watch(health, "linear"), Watch(health, "inference.GRPCInferenceService")
        assert (watch.next(), other.next()) == (_Status.SERVING, _Status.SERVING)
        triton.unload_model("linear")
        assert watch.next() == _Status.NOT_SERVING
        assert check(health, "linear") == _Status.NOT_SERVING
        triton.load_model("linear")
        assert watch.next() == _Status.SERVING
        assert check(health, "linear") == _Status.SERVING
        watch.cancel()
        # Nothing was told of a service that went on as it was.
        other.cancel()
        assert other.next() is None


def test_a_watch_of_a_model_that_comes_later_sees_it_come(start: Start, repository: Path) -> None:
    serving = start(repository, Settings.model_validate(_EXPLICIT))
    with health_of(serving.address) as health, InferenceServerClient(serving.address) as triton:
        watch = Watch(health, "shares")
        assert watch.next() in (_Status.SERVICE_UNKNOWN, _Status.NOT_SERVING)
        triton.load_model("shares")
        assert watch.next() == _Status.SERVING
        watch.cancel()


def test_a_watch_sees_the_end_of_the_server_and_ends_itself(loop: asyncio.AbstractEventLoop, repository: Path) -> None:
    context = running(repository, Settings().listening(port=0))
    serving = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(_SECONDS)
    with health_of(serving.address) as health:
        watches = [Watch(health, name) for name in ("", "linear", "inference.GRPCInferenceService")]
        assert [watch.next() for watch in watches] == [_Status.SERVING] * 3
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(_SECONDS)
        assert [watch.next() for watch in watches] == [_Status.NOT_SERVING] * 3
        assert [watch.next() for watch in watches] == [None] * 3
