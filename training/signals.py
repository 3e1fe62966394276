"""How a run is asked to stop: Ctrl-C and SIGTERM once are a request, a second time an order.

SIGINT | SIGTERM -> Request -> the loop saves after the iteration under way -> exit status 130 | 143
"""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STATUS_OF_SIGNALS = 128  # what shells add to a signal's number for the exit status of what it ended


@dataclass
class Request:
    """A request to stop, once `made` is set; `status` is the exit status that tells of it."""

    made: threading.Event = field(default_factory=threading.Event)
    status: int = 0


@contextlib.contextmanager
def requests() -> Iterator[Request]:
    """Take SIGINT and SIGTERM for a request to stop; the handlers before are back afterwards.

    A second signal raises KeyboardInterrupt at once.
    """
    request = Request()

    def take(number: int, _frame: FrameType | None) -> None:
        if request.made.is_set():
            raise KeyboardInterrupt
        request.status = STATUS_OF_SIGNALS + number
        request.made.set()

    before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
