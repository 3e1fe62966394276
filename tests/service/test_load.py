"""A served process under 500 requests a second: what a reload, an end and ten minutes do to it. No client retries."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.processes import Process, address, running
from tests.service.conftest import CLASSES, PIXELS, weights_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.service.conftest import Publish

_RATE = 500  # requests a second
_SHAPE = (1, 3, 4, 4)


@pytest.fixture(params=["grpc", "native"])
def front(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def models(tmp_path: Path, publish: Publish) -> Path:
    publish(tmp_path / "models", "linear", seed=1)
    return tmp_path / "models"


@pytest.fixture
def server(models: Path, tmp_path: Path, front: str) -> Iterator[Process]:
    settings = tmp_path / "serve.toml"
    settings.write_text(
        f'[server]\nport = 0\nfront = "{front}"\ndrain_delay_s = 1\n[models]\nmode = "explicit"\nload = ["*"]\n'
    )
    with running(tmp_path / "log", "serve", "--repository", str(models), "--settings", str(settings)) as process:
        yield process


class Load:
    """Requests at a steady rate, each checked against the weights of the version that it says has answered it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = GRPCInferenceServiceStub(channel)
        self._images = np.random.default_rng(0).random((64, *_SHAPE[1:]), dtype=np.float32)
        self._stop = asyncio.Event()
        self.answered: dict[str, int] = {}

    async def run(self) -> None:
        """Ask until it is stopped; wait for every answer."""
        calls: set[asyncio.Task[None]] = set()
        began, sent = time.monotonic(), 0
        async with asyncio.TaskGroup() as group:
            while not self._stop.is_set():
                while sent < (time.monotonic() - began) * _RATE:
                    call = group.create_task(self._ask(sent % len(self._images)))
                    calls.add(call)
                    call.add_done_callback(calls.discard)
                    sent += 1
                await asyncio.sleep(1 / _RATE)

    def stop(self) -> None:
        self._stop.set()

    async def _ask(self, index: int) -> None:
        image = self._images[index]
        request = pb.ModelInferRequest(model_name="linear", raw_input_contents=[image.tobytes()])
        request.inputs.add(name="images", datatype="FP32", shape=_SHAPE)
        response = await self._stub.ModelInfer(request, timeout=20)
        answer = np.frombuffer(response.raw_output_contents[0], "<f4")
        expected = image.reshape(PIXELS) @ weights_of(int(response.model_version))
        np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
        assert len(answer) == CLASSES
        self.answered[response.model_version] = self.answered.get(response.model_version, 0) + 1


@asynccontextmanager
async def loaded(where: str) -> AsyncIterator[tuple[Load, grpc.aio.Channel]]:
    """A server under load while the block runs; every error of a request is raised at its end."""
    async with grpc.aio.insecure_channel(where) as channel:
        load = Load(channel)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            try:
                yield load, channel
            finally:
                load.stop()


async def test_reloads_lose_none_and_mix_no_versions(server: Process, models: Path, publish: Publish) -> None:
    async with loaded(address(server)) as (load, channel):
        stub = GRPCInferenceServiceStub(channel)
        for version in range(2, 6):
            await asyncio.sleep(0.5)
            publish(models, "linear", seed=version)
            await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="linear"), timeout=20)
        await asyncio.sleep(0.5)
    assert list(load.answered) == ["1", "2", "3", "4", "5"]


async def test_sigterm_loses_none_of_who_heeds_the_health(server: Process) -> None:
    async with loaded(address(server)) as (load, channel):
        watch = HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="linear"))
        seen = [(await watch.read()).status]
        await asyncio.sleep(0.5)
        ended = asyncio.create_task(asyncio.to_thread(server.signal, signal.SIGTERM))
        seen.append((await watch.read()).status)
        # A load balancer needs a moment to turn away.
        await asyncio.sleep(0.3)
        load.stop()
        assert await ended == 0
    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    assert load.answered["1"] > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_ten_minutes_leave_no_memory_behind(server: Process) -> None:
    async with loaded(address(server)):
        await asyncio.sleep(120)
        before = _resident(server.pid)
        await asyncio.sleep(480)
        after = _resident(server.pid)
    assert after - before < 4 << 20, f"{before} bytes after two minutes, {after} after ten"


def _resident(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) << 10
