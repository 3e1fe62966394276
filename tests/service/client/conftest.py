"""Both clients behind one face, so that every promise is tested of both."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from service.client import AsyncClient, Client
from tests.service.client.answering import Answering, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Ask = Callable[..., Any]


@pytest.fixture
def answering() -> Answering:
    return Answering()  # type: ignore[abstract]  # what it does not implement, nobody asks


@pytest.fixture
def address(answering: Answering) -> Iterator[str]:
    with serving(answering) as address:
        yield address


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Connect, call one method, and close: ask(address, method, *arguments, client={...}, **keywords)."""

    def blocking(address: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **kw: Any) -> Any:
        with Client(address, **(client or {})) as connected:
            answer = getattr(connected, method)(*arguments, **kw)
            return list(answer) if method == "infer_many" else answer

    def asynchronous(
        address: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **kw: Any
    ) -> Any:
        async def run() -> Any:
            async with AsyncClient(address, **(client or {})) as connected:
                answer = getattr(connected, method)(*arguments, **kw)
                return [each async for each in answer] if method == "infer_many" else await answer

        return asyncio.run(run())

    return blocking if request.param == "sync" else asynchronous
