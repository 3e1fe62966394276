"""What waits for an engine: first by priority, then by arrival.

push --a deque a priority level, each bounded--> take: a batch, in order, and what came too late
                                            └--> expire, remove: without waiting for an engine
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Literal

from service import calls

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Set

    from export.engines.base import Inputs, Logits

# Why a batch was not made larger: no room, a preferred size reached, an engine free, enough waited, or no room for the
# request that comes next.
ClosedBy = Literal["full", "preferred", "idle", "delay", "next"]

# What made a request too late to start.
Late = Literal["queue_timeout", "deadline"]

# Nanoseconds that no clock reaches.
NEVER = sys.maxsize


class Waiting:
    """One request in a queue."""

    __slots__ = ("answer", "arrived_ns", "call", "images", "level", "size", "start_by_ns", "taken", "too_late")

    def __init__(self, images: Inputs, answer: asyncio.Future[Logits], *, level: int, arrived_ns: int) -> None:
        self.images = images
        self.size = len(images)
        self.answer = answer
        self.level = level
        self.arrived_ns = arrived_ns
        # The call that it is part of, where somebody wants to know what happens to it.
        self.call = calls.told()
        # From when on it is too late to start, by the monotonic clock, and what it is then rejected for.
        self.start_by_ns = NEVER
        self.too_late: Late = "queue_timeout"
        # Whether it is in a batch.
        self.taken = False

    def fill_until_ns(self, delay_ns: int) -> int:
        """Return until when its batch may wait for more: a delay, but at most three quarters of its time.

        The last quarter is for threads that wake late on a busy machine.
        """
        return min(self.arrived_ns + delay_ns, self.start_by_ns - (self.start_by_ns - self.arrived_ns) // 4)


class Queue:
    """Requests in order; whoever shares one between threads locks it.

    Args:
        levels: priorities, 0 the first to be taken.
        bound: requests that may wait in each of them.
    """

    def __init__(self, *, levels: int, bound: int) -> None:
        self._levels: list[deque[Waiting]] = [deque() for _ in range(levels)]
        self._bound = bound
        # Images that wait, of all requests together.
        self.images = 0

    def __iter__(self) -> Iterator[Waiting]:
        for level in self._levels:
            yield from level

    def push(self, waiting: Waiting) -> bool:
        """Add a request behind those of its level; False if there is no place."""
        level = self._levels[waiting.level]
        if len(level) >= self._bound:
            return False
        level.append(waiting)
        self.images += waiting.size
        return True

    def remove(self, waiting: Waiting) -> None:
        """Give a request's place to the next; nothing happens if it is not here."""
        try:
            self._levels[waiting.level].remove(waiting)
        except ValueError:
            return
        self.images -= waiting.size

    @property
    def total(self) -> int:
        """Requests that wait, of all levels."""
        return sum(len(level) for level in self._levels)

    def waiting(self, level: int) -> int:
        """Return how many requests wait in a level."""
        return len(self._levels[level])

    def ahead(self, level: int) -> int:
        """Return how many images would be taken before those of a request that joined a level now."""
        if len(self._levels) == 1:
            return self.images
        return sum(waiting.size for each in self._levels[: level + 1] for waiting in each)

    def take(self, most: int, *, enough: int, now_ns: int) -> tuple[list[Waiting], list[Waiting], ClosedBy]:
        """Take requests in order until there are enough images, or the next request does not fit.

        None is ever passed over for one behind it, or large requests would never be taken.

        Args:
            most: images that there may be.
            enough: images at which to stop, 1 to `most`.
            now_ns: the monotonic clock.

        Returns:
            Requests to run, requests that came too late, and why there are no more to run. Those that were cancelled
            are in neither.
        """
        batch: list[Waiting] = []
        late: list[Waiting] = []
        size = 0
        for level in self._levels:
            while level:
                waiting = level[0]
                if size + waiting.size > most:
                    return batch, late, "next"
                level.popleft()
                self.images -= waiting.size
                if waiting.answer.done():
                    continue
                if waiting.start_by_ns <= now_ns:
                    late.append(waiting)
                    continue
                waiting.taken = True
                batch.append(waiting)
                size += waiting.size
                if size >= enough:
                    return batch, late, "full" if size == most else "idle"
        return batch, late, "idle"

    def fitting(self, most: int, *, preferred: Set[int]) -> tuple[int, ClosedBy | None]:
        """Return how many images a batch should have if one is to be closed before its time.

        Returns:
            The size and why: it is full, or the largest preferred size that is there, or the next request does not fit;
            None as the reason if none of these holds.
        """
        size, best = 0, 0
        for waiting in self:
            if size + waiting.size > most:
                return (best, "preferred") if best else (size, "next")
            size += waiting.size
            if size == most:
                return size, "full"
            if size in preferred:
                best = size
        return (best, "preferred") if best else (size, None)

    def expire(self, now_ns: int) -> list[Waiting]:
        """Take out and return the requests that it is too late to start, the most overdue first."""
        late = sorted((each for each in self if each.start_by_ns <= now_ns), key=lambda each: each.start_by_ns)
        for waiting in late:
            self.remove(waiting)
        return late

    def fill_until_ns(self, delay_ns: int) -> int:
        """Return until when a batch of what waits may wait for more."""
        return min((waiting.fill_until_ns(delay_ns) for waiting in self), default=NEVER)

    def next_expiry_ns(self) -> int:
        """Return when the first of the requests will be too late to start; `NEVER` if none will."""
        return min((waiting.start_by_ns for waiting in self), default=NEVER)
