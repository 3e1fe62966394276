"""What is known of a call while it is served, and not afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

import grpc
import pytest

from service import calls
from service.calls import Calls
from service.errors import Cancelled, NotFound, ServiceError

METHOD = "/inference.GRPCInferenceService/ModelInfer"


class Context:
    """What a caller sent beside its request."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return self._metadata


@pytest.fixture(autouse=True)
def _outside_a_call() -> Iterator[None]:
    yield
    every = Calls()
    every.end(every.begin(METHOD, Context()))


def test_the_caller_s_own_request_id_is_kept() -> None:
    call = Calls().begin(METHOD, Context(("x-request-id", "abc"), ("other", b"\x00")))
    call.describe(model="model", version="1", request_id="of the request")
    assert call.request_id == "abc"


def test_the_request_s_id_stands_in_for_it() -> None:
    call = Calls().begin(METHOD, Context())
    call.describe(model="model", version="1", request_id="of the request")
    assert call.request_id == "of the request"


def test_a_call_without_an_id_gets_one_that_stays() -> None:
    first, second = Calls().begin(METHOD, Context()), Calls().begin(METHOD, Context())
    assert first.request_id
    assert first.request_id == first.request_id
    assert first.request_id != second.request_id


@pytest.mark.parametrize("sent", [("x-request-id", "a" * 10_000), ("other", "a")])
def test_a_long_id_is_cut(sent: tuple[str, str]) -> None:
    call = Calls().begin(METHOD, Context(sent))
    call.describe(model="model", version="1", request_id="b" * 10_000)
    assert len(call.request_id) == 128


async def test_each_task_has_its_own_call() -> None:
    every = Calls()

    async def serve(method: str) -> str:
        call = every.begin(method, Context())
        await asyncio.sleep(0)
        try:
            current = calls.current()
            assert current is call
            return current.method
        finally:
            every.end(call)

    methods = [f"/service/{number}" for number in range(8)]
    assert await asyncio.gather(*map(serve, methods)) == methods
    assert calls.current() is None


async def test_what_a_call_starts_and_leaves_behind_is_no_part_of_it() -> None:
    every, ended = Calls(), asyncio.Event()

    async def work() -> calls.Call | None:
        await ended.wait()
        return calls.current()

    call = every.begin(METHOD, Context())
    left_behind = asyncio.create_task(work())
    every.end(call)
    ended.set()
    assert await left_behind is None


def test_only_what_is_told_is_worth_describing() -> None:
    Calls().begin(METHOD, Context())
    assert calls.current() is not None
    assert calls.told() is None
    told = Calls(log=True).begin(METHOD, Context())
    assert calls.told() is told


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, grpc.StatusCode.OK),
        (NotFound("model"), grpc.StatusCode.NOT_FOUND),
        (Cancelled("gone"), grpc.StatusCode.CANCELLED),
        (ServiceError("engine"), grpc.StatusCode.INTERNAL),
        (ZeroDivisionError(), grpc.StatusCode.INTERNAL),
    ],
)
def test_the_status_is_what_the_caller_is_told(error: Exception | None, status: grpc.StatusCode) -> None:
    call = Calls().begin(METHOD, Context())
    if error is not None:
        call.fail(error)
    assert call.status() is status


async def test_a_call_that_its_caller_gives_up_is_cancelled() -> None:
    statuses: list[grpc.StatusCode] = []
    begun = asyncio.Event()

    async def serve() -> None:
        call = Calls().begin(METHOD, Context())
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            statuses.append(call.status())

    task = asyncio.create_task(serve())
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert statuses == [grpc.StatusCode.CANCELLED]
