"""Memory that a client shares with its server: the same answers, and nothing left behind."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.client import AsyncClient, Client
from service.errors import InvalidArgument, NotFound, ServiceError
from service.settings import Settings
from tests.service.conftest import Servers

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

    from export.engines.base import Images
    from service.server import Serving
    from tests.service.conftest import GatedEngine, Start

SHARING = Settings.model_validate({"shared_memory": {"enabled": True}})


@pytest.fixture
def sharing(start: Start, repository: Path) -> Serving:
    return start(repository, SHARING)


def regions(serving: Serving) -> set[str]:
    """Return the names of the regions that a server knows, as Triton's client gets them."""
    from tritonclient.grpc import InferenceServerClient

    client: InferenceServerClient = InferenceServerClient(serving.address)
    try:
        return set(client.get_system_shared_memory_status(as_json=True).get("regions", {}))
    finally:
        client.close()


def ours() -> set[Path]:
    return set(Path("/dev/shm").glob("psm_*"))


def mapped() -> set[Path]:
    """Those that this process holds."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]) for line in lines if "/dev/shm/psm_" in line}


@pytest.mark.parametrize("model", ["linear", "stored", "shares"])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_answers_are_those_of_the_wire(sharing: Serving, images: Images, model: str, batch: int | None) -> None:
    with Client(sharing.address) as client:
        expected = client.infer(images, model=model)
        with client.shared_memory(model=model, batch=batch) as infer:
            for _ in range(2):
                np.testing.assert_allclose(infer(images), expected, rtol=1e-5, atol=1e-5)


async def test_the_asynchronous_client_shares_memory_too(sharing: Serving, images: Images) -> None:
    async with AsyncClient(sharing.address) as client:
        expected = await client.infer(images, model="linear")
        async with client.shared_memory(model="linear") as infer:
            np.testing.assert_allclose(await infer(images), expected, rtol=1e-5, atol=1e-5)
    assert regions(sharing) == set()


def test_nothing_is_left_behind(sharing: Serving, images: Images) -> None:
    before = ours()
    with Client(sharing.address) as client:
        with client.shared_memory(model="linear") as infer:
            infer(images)
            assert len(regions(sharing)) == 1
            assert len(ours() - before) == 1
        assert regions(sharing) == set()
        with pytest.raises(RuntimeError, match="ours"), client.shared_memory(model="linear"):
            raise RuntimeError("ours")
    assert regions(sharing) == set()
    assert ours() <= before


def test_a_server_that_shares_nothing_says_so(client: Client) -> None:
    before = ours()
    with pytest.raises(ServiceError, match="shared_memory"), client.shared_memory(model="linear"):
        pass
    assert ours() <= before


def test_an_unknown_model_is_named(sharing: Serving) -> None:
    with Client(sharing.address) as client, pytest.raises(NotFound, match="nobody"):
        client.shared_memory(model="nobody").__enter__()


def test_wrong_images_are_told_and_the_next_ones_answered(sharing: Serving, images: Images) -> None:
    with Client(sharing.address) as client, client.shared_memory(model="linear", batch=2) as infer:
        with pytest.raises(InvalidArgument, match="images"):
            infer(np.zeros((1, 3, 2, 4), np.float32))
        assert infer(images).shape == (len(images), 5)


async def test_a_late_answer_does_not_become_the_next_ones(
    start: Start, repository: Path, images: Images, gated: list[GatedEngine], weights: Any
) -> None:
    serving = start(repository, SHARING)
    async with (
        AsyncClient(serving.address) as client,
        client.shared_memory(model="linear", version=1) as infer,
    ):
        (first,) = regions(serving)
        given_up = asyncio.create_task(infer(images[:1]))
        assert await asyncio.to_thread(gated[0].entered.wait, 10)
        given_up.cancel()
        await asyncio.wait([given_up])
        for engine in gated:
            engine.gate.set()
        answer = await infer(images[1:2])
        np.testing.assert_allclose(answer, images[1:2].reshape(1, -1) @ weights(0), rtol=1e-4, atol=1e-4)
        (second,) = regions(serving)
        assert first != second


def test_a_second_call_at_a_time_is_refused(
    start: Start, repository: Path, images: Images, gated: list[GatedEngine]
) -> None:
    with (
        Client(start(repository, SHARING).address) as client,
        client.shared_memory(model="linear", version=1) as infer,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(infer, images[:1])
        assert gated[0].entered.wait(10)
        with pytest.raises(RuntimeError, match="one call of this shared memory at a time"):
            infer(images[:1])
        for engine in gated:
            engine.gate.set()
        assert first.result(10).shape == (1, 5)


def test_a_server_that_is_gone_leaves_no_memory_behind(loop: asyncio.AbstractEventLoop, repository: Path) -> None:
    servers = Servers(loop)
    before = mapped()
    with Client(servers.start(repository, SHARING).address) as client, client.shared_memory(model="linear"):
        # Other processes' tests make some, too: those that are there now, of which ours must go.
        made = mapped() - before
        servers.stop()
    assert made
    assert not made & ours()
