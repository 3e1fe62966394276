"""Retirement: a version that is taken out answers whoever found it before, and then gives its memory back.

    ServedVersion --taken out--> nobody finds it --the last who holds it lets go--> queue answered --> engines freed

Who finds a version holds it until the answer: that is the lease, and nobody has to give it back.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from contextlib import suppress
from typing import Protocol

from service import memory

# Seconds. A call that failed leaves references in a circle (its error, the frames that it came through), which only
# the garbage collector breaks: it is asked after the first pause, and less and less often.
_FIRST_PAUSE_S = 0.5
# Seconds after which a version is closed whoever still holds it: no request takes that long between finding its
# version and handing its images to it. What has been handed over is answered all the same.
_LONGEST_LEASE_S = 60.0

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What a version answers with."""

    async def close(self) -> None:
        """Refuse more, answer what waits, and free everything."""


class Retirement:
    """The end of one version.

    Args:
        version: what callers hold; not kept alive by this.
        backend: what is closed once nobody holds the version.
    """

    def __init__(self, version: object, backend: Backend) -> None:
        self._name = str(version)
        self._backend = backend
        self._released = asyncio.Event()
        # Whoever lets go last may be another thread: one that has read the statistics.
        weakref.finalize(version, _tell, asyncio.get_running_loop(), self._released).atexit = False

    def hurry(self) -> None:
        """Wait for nobody who has not handed in images yet."""
        self._released.set()

    async def run(self) -> None:
        """Wait until nobody holds the version, close it, and give its memory back to the system."""
        await self._let_go()
        try:
            await self._backend.close()
        except Exception:  # a runtime that cannot even be closed must not keep others from it
            logger.exception("%s could not be closed", self._name)
        await asyncio.to_thread(memory.give_back)

    async def _let_go(self) -> None:
        loop = asyncio.get_running_loop()
        end, pause = loop.time() + _LONGEST_LEASE_S, _FIRST_PAUSE_S
        while not self._released.is_set() and loop.time() < end:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), min(pause, end - loop.time()))
            if not self._released.is_set():
                gc.collect()
                pause *= 2


def _tell(loop: asyncio.AbstractEventLoop, released: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        loop.call_soon_threadsafe(released.set)
