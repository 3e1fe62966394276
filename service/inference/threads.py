"""Threads that a process does not wait for when it ends.

event loop --work--> a daemon thread of its own --result, error--> event loop

An executor's threads are joined when the interpreter ends: a server that was told to stop while it builds an engine,
or asks a store that does not answer, would go on for minutes.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


def engines_run() -> bool:
    """Return whether a daemon thread still works: to end the interpreter then would abort the process inside of C++."""
    return any("@" in thread.name for thread in threading.enumerate() if thread.daemon)


async def in_thread(work: Callable[[], Result], *, name: str) -> Result:
    """Return what some work returns, or raise what it raises; whoever is cancelled leaves it to run."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(settler: Callable[[], None]) -> None:
        if not future.done():
            settler()

    def run() -> None:
        settler: Callable[[], None]
        try:
            result = work()
        except BaseException as failure:  # noqa: BLE001 - it is raised where the result is waited for
            error = RuntimeError(repr(failure)) if isinstance(failure, StopIteration) else failure
            settler = partial(future.set_exception, error)
        else:
            settler = partial(future.set_result, result)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, settler)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future
