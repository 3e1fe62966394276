"""How far a TensorRT build is: its phases, told to a callback, and Ctrl-C told to the build.

TensorRT, on any of its threads --IProgressMonitor--> progress(phase, step, steps)
Ctrl-C --> False --> the build stops cleanly
"""

from __future__ import annotations

import logging
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.engines.messages import Messages

_log = logging.getLogger(__name__)


def monitor(trt: Any, progress: Callable[[str, int, int], None] | None, messages: Messages) -> Any:
    """Return what a builder's configuration takes as its `progress_monitor`; keep it until the build is over.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        progress: is told a phase's name, its step (0 when it starts) and how many there are; called by one thread at a
            time. If it raises, that is logged and it is called no more: the build goes on.
        messages: where Ctrl-C is noted; whoever collects them raises it when the build has stopped.
    """
    telling = _Telling(progress, messages)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called by TensorRT, through which no exception may pass."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            telling.start(phase, steps)

        def phase_finish(self, phase: str) -> None:
            telling.finish(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            telling.step(phase, step + 1)
            return not messages.interrupted

    return Monitor()


class _Telling:
    """Knows the open phases and how many steps each has."""

    def __init__(self, progress: Callable[[str, int, int], None] | None, messages: Messages) -> None:
        self._progress = progress
        self._messages = messages
        self._steps: dict[str, int] = {}
        self._lock = Lock()

    def start(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self._tell(phase, 0)

    def step(self, phase: str, step: int) -> None:
        self._tell(phase, step)

    def finish(self, phase: str) -> None:
        self._tell(phase, self._steps.get(phase, 0))

    def _tell(self, phase: str, step: int) -> None:
        try:
            with self._lock:
                if self._progress is not None and not self._messages.interrupted:
                    self._progress(phase, step, self._steps.get(phase, step))
        except KeyboardInterrupt:
            self._messages.interrupted = True
        except Exception:  # noqa: BLE001 - the callback is anybody's
            self._progress = None
            _log.exception("the progress of a build cannot be shown; the build goes on")
