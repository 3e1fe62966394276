"""Real processes of the command line, for tests: started, read, signalled, and never left behind."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Starting Python, torch and a server takes seconds; a busy machine may need many of them.
PATIENCE_SECONDS = 120

TENET = [sys.executable, "-m", "service"]


def tenet(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*TENET, *arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=cwd, check=False
    )


class Process:
    """A command that goes on, its output in a file."""

    def __init__(self, log: Path, command: list[str]) -> None:
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        return self._process.pid

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first match in the output, waiting for it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.text(), re.MULTILINE):
                return match
            assert self._process.poll() is None, f"ended with {self._process.returncode}: {self.text()}"
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} never came: {self.text()}")

    def signal(self, number: int) -> int:
        """Send a signal and return the exit code."""
        self._process.send_signal(number)
        return self._process.wait(PATIENCE_SECONDS)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextmanager
def running(log: Path, *arguments: str, command: list[str] | None = None) -> Iterator[Process]:
    """Run `tenet` with arguments, or another command, while the block runs."""
    process = Process(log, command or [*TENET, *arguments])
    try:
        yield process
    finally:
        process.stop()


def address(server: Process) -> str:
    """Return HOST:PORT of a server, once it answers."""
    return server.wait_for(r"^serving \d+ models on (\S+):")[1]
