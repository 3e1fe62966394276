"""What TensorRT says: its errors come as messages to a logger, and its functions return None where they should raise.

TensorRT --ILogger, one a process--> the listeners of the thread that called it --> errors, build.log
"""

from __future__ import annotations

import functools
import importlib
import logging
import signal
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, current_thread, get_ident, main_thread
from typing import TYPE_CHECKING, Any

from export.engines.base import CannotRunHere

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

_ERRORS = frozenset({"ERROR", "INTERNAL_ERROR"})

# The first cause comes first or last; more than these few lines bury it.
_TOLD = 3


def import_runtime(name: str) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises:
        CannotRunHere: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        extra = name.replace("_", "-")
        raise CannotRunHere(
            f"runtime {name!r} is not installed here, or not whole ({error}); install it with "
            f"`pip install tenet[{extra}]`"
        ) from error


@dataclass(frozen=True)
class Message:
    """One line of the log: TensorRT's name of its severity, and what it says."""

    severity: str
    text: str


# Each is itself alone: two that heard the same are not one, and a listener that leaves must not take another's place.
@dataclass(eq=False)
class Messages:
    """What was said while somebody listened.

    Attributes:
        interrupted: whether Ctrl-C came (`interruptible`).
    """

    all: list[Message] = field(default_factory=list)
    interrupted: bool = False

    @property
    def errors(self) -> list[str]:
        """The errors among them, each once."""
        return list(dict.fromkeys(message.text for message in self.all if message.severity in _ERRORS))

    @property
    def why(self) -> str:
        """The last errors as one line, for the reader of an exception."""
        lines = (" ".join(error.split()) for error in self.errors[-_TOLD:])
        return "; ".join(lines) or "it gave no reason"

    def interrupt(self, *_: object) -> None:
        """Note Ctrl-C: a handler of signals."""
        self.interrupted = True


@contextmanager
def heard(trt: Any) -> Iterator[Messages]:
    """Collect what TensorRT says to this thread, and what it says on threads of its own."""
    messages = Messages()
    entry = get_ident(), messages
    listeners = logger(trt).listeners
    listeners.append(entry)
    try:
        yield messages
    finally:
        listeners.remove(entry)


@contextmanager
def interruptible(messages: Messages) -> Iterator[None]:
    """Note Ctrl-C in `messages` while TensorRT works, and raise it at the end of the block.

    Python handles a signal as soon as it runs, which is when TensorRT calls us; there an exception would be lost.

    Raises:
        KeyboardInterrupt: Ctrl-C came in the meantime.
    """
    # Signals come to the main thread alone. Whoever handles Ctrl-C in a way of their own goes on to do so.
    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours:
        yield
    else:
        signal.signal(signal.SIGINT, messages.interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if messages.interrupted:
        raise KeyboardInterrupt


@functools.cache
def logger(trt: Any) -> Any:
    """Return the logger of `tensorrt` or `tensorrt_rtx` for all of this process.

    The library keeps the first logger that it is given and ignores others as long as anything made with it lives.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listeners: list[tuple[int, Messages]] = []
            self._lock = Lock()

        def log(self, severity: Any, text: str) -> None:
            """Hand a message on; an error that nobody listens to goes to our own log."""
            listening = _listening(self.listeners)
            message = Message(severity.name, text)
            with self._lock:
                for messages in listening:
                    messages.all.append(message)
            if not listening and message.severity in _ERRORS:
                _log.error("TensorRT: %s", text)

    return Logger()


def _listening(listeners: list[tuple[int, Messages]]) -> list[Messages]:
    """Return who listens on this thread; everybody, where TensorRT speaks on a thread of its own."""
    here = get_ident()
    entries = list(listeners)
    return [messages for thread, messages in entries if thread == here] or [messages for _, messages in entries]
