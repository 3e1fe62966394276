"""Streams: answers in the order of their requests, several at once, bounded, and gone when the caller is."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from service.inference.streams import in_order

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Desk:
    """Answers each request once it is let."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[int] = asyncio.Queue()
        self.gone: asyncio.Queue[int] = asyncio.Queue()
        self.gates: dict[int, asyncio.Event] = {}

    def gate(self, number: int) -> asyncio.Event:
        return self.gates.setdefault(number, asyncio.Event())

    async def answer(self, number: int) -> str:
        self.came.put_nowait(number)
        try:
            await self.gate(number).wait()
        finally:
            self.gone.put_nowait(number)
        if number < 0:
            raise LookupError(str(number))
        return f"answer {number}"


async def numbers(*given: int) -> AsyncIterator[int]:
    for number in given:
        yield number


async def unending() -> AsyncIterator[int]:
    number = 0
    while True:
        yield number
        number += 1
        await asyncio.sleep(0)


async def first(queue: asyncio.Queue[int], n: int) -> list[int]:
    return [await asyncio.wait_for(queue.get(), 5) for _ in range(n)]


async def settled() -> None:
    """Let every task that can go on do so, many times over."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_answers_come_in_order_whatever_finishes_first() -> None:
    desk = Desk()
    stream = in_order(numbers(0, 1, 2), desk.answer)
    following = asyncio.ensure_future(anext(stream))
    # All three are at work before the first is answered.
    assert await first(desk.came, 3) == [0, 1, 2]
    desk.gate(2).set()
    desk.gate(1).set()
    assert sorted(await first(desk.gone, 2)) == [1, 2]
    await settled()
    assert not following.done()
    desk.gate(0).set()
    assert [await following, *[answer async for answer in stream]] == ["answer 0", "answer 1", "answer 2"]


async def test_no_more_than_the_bound_are_read() -> None:
    desk = Desk()
    async with aclosing(in_order(unending(), desk.answer, in_flight=3)) as stream:
        following = asyncio.ensure_future(anext(stream))
        assert await first(desk.came, 3) == [0, 1, 2]
        await settled()
        assert desk.came.empty()
        desk.gate(0).set()
        assert await following == "answer 0"
        # Its place is free once its answer has been taken.
        await settled()
        assert desk.came.empty()
        following = asyncio.ensure_future(anext(stream))
        assert await first(desk.came, 1) == [3]
        desk.gate(1).set()
        assert await following == "answer 1"


async def test_the_caller_going_away_cancels_what_waits() -> None:
    desk = Desk()
    stream = in_order(unending(), desk.answer, in_flight=3)
    following = asyncio.ensure_future(anext(stream))
    assert await first(desk.came, 3) == [0, 1, 2]
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    assert sorted(await first(desk.gone, 3)) == [0, 1, 2]
    await settled()
    assert desk.came.empty()


async def test_a_stream_that_is_closed_between_answers_cancels_what_waits() -> None:
    desk = Desk()
    stream = in_order(unending(), desk.answer, in_flight=3)
    following = asyncio.ensure_future(anext(stream))
    assert await first(desk.came, 3) == [0, 1, 2]
    desk.gate(0).set()
    assert await following == "answer 0"
    await stream.aclose()
    assert sorted(await first(desk.gone, 3)) == [0, 1, 2]


async def test_an_answer_that_is_an_error_ends_the_stream_and_what_waits() -> None:
    desk = Desk()
    desk.gate(-1).set()
    desk.gate(0).set()
    stream = in_order(numbers(0, -1, 2), desk.answer)
    assert await anext(stream) == "answer 0"
    with pytest.raises(LookupError):
        await anext(stream)
    assert sorted(await first(desk.gone, 3)) == [-1, 0, 2]


async def test_what_was_read_before_reading_failed_is_answered() -> None:
    async def breaking() -> AsyncIterator[int]:
        yield 0
        yield 1
        raise ArithmeticError("no message")

    desk = Desk()
    desk.gate(0).set()
    desk.gate(1).set()
    stream = in_order(breaking(), desk.answer)
    assert [await anext(stream), await anext(stream)] == ["answer 0", "answer 1"]
    with pytest.raises(ArithmeticError):
        await anext(stream)


async def test_an_empty_stream_has_no_answers() -> None:
    assert [answer async for answer in in_order(numbers(), Desk().answer)] == []
