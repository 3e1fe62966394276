"""Processes beside a server: started again when they die, ended with it, and gone when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

from export.console import console

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# How long a process beside the server may take to end.
_END_SECONDS = 10

# A command's exit code for what its user must mend: a port in use, a folder that somebody else works on.
_BAD_INPUT = 2

# A process that dies at once would otherwise be restarted in a busy loop.
_RESTART_SECONDS = 1

_PARENT_POLL_SECONDS = 1


class Companion:
    """A process beside the server, started again when it dies, ended with the block.

    Attributes:
        refused: it ended with exit code 2, for which this process has been told to end, too.
    """

    def __init__(self, name: str, arguments: list[str], *, end_s: float = _END_SECONDS) -> None:
        self._name = name
        self._end_s = end_s
        self._command = [sys.executable, "-m", "service", *arguments, "--parent", str(os.getpid())]
        self.refused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def _run(self) -> None:
        while not self._stop.is_set():
            process = subprocess.Popen(self._command)  # noqa: S603 - our own command
            while process.poll() is None and not self._stop.wait(_RESTART_SECONDS):
                pass
            if self._stop.is_set():
                _end(process, self._end_s)
            elif process.returncode == _BAD_INPUT:
                # It has said why, and would say so again: the whole command ends, as by Ctrl-C.
                self.refused = True
                os.kill(os.getpid(), signal.SIGTERM)
                return
            else:
                console.print(f"the {self._name} ended with exit code {process.returncode}; starting another")

    def ask_to_end(self) -> None:
        """Have the process ended; the end of the block waits for it."""
        self._stop.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ask_to_end()
        self._thread.join()


def end_with(parent: int | None) -> None:
    """End this process, as by SIGTERM, when the process that started it has gone without ending it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, name="parent", daemon=True).start()


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
