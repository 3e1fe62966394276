"""A stream of inferences: several run at once, and their answers come in the order of their requests.

requests --a task each, a bounded number at once--> tasks in order --the oldest is awaited--> answers
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine

Request = TypeVar("Request")
Answer = TypeVar("Answer")

# Requests of one stream that are in the server at once; the next is left in the connection, whose flow control then
# slows the caller. Enough to fill an engine's batches from one stream, few enough that large tensors do not add up.
IN_FLIGHT = 64


async def in_order(
    requests: AsyncIterator[Request],
    answer: Callable[[Request], Coroutine[Any, Any, Answer]],
    *,
    in_flight: int = IN_FLIGHT,
) -> AsyncGenerator[Answer, None]:
    """Answer requests, several at once, in their order.

    What is not answered when the caller goes away, or when an answer is an error, is cancelled. Where reading a
    request fails, those before it are answered first.

    Args:
        requests: in their order.
        answer: answers one.
        in_flight: how many are read and not yet answered, at most.

    Raises:
        Exception: what `answer`, or reading a request, raised.
    """
    room = asyncio.Semaphore(in_flight)
    tasks: asyncio.Queue[asyncio.Task[Answer] | None] = asyncio.Queue()
    reader = asyncio.create_task(_read(requests, answer, room=room, tasks=tasks))
    try:
        while (task := await tasks.get()) is not None:
            yield await task
            room.release()
        await reader
    finally:
        await _cancel(reader, tasks)


async def _read(
    requests: AsyncIterator[Request],
    answer: Callable[[Request], Coroutine[Any, Any, Answer]],
    *,
    room: asyncio.Semaphore,
    tasks: asyncio.Queue[asyncio.Task[Answer] | None],
) -> None:
    try:
        await room.acquire()
        async for request in requests:
            tasks.put_nowait(asyncio.create_task(answer(request)))
            await room.acquire()
    finally:
        tasks.put_nowait(None)


async def _cancel(reader: asyncio.Task[None], tasks: asyncio.Queue[asyncio.Task[Answer] | None]) -> None:
    """Cancel what is left of a stream, and wait for its end."""
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    left = []
    while not tasks.empty():
        if (task := tasks.get_nowait()) is not None:
            task.cancel()
            left.append(task)
    await asyncio.gather(*left, return_exceptions=True)
