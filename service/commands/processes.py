"""`tenet serve` as several processes: each has engines of its own, and the kernel spreads connections among them.

parent: holds the port, starts the processes, starts one again that dies, passes SIGTERM on
"""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from export.console import console
from service.commands.companion import Companion
from service.fronts import address, check_address

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from service import settings as settings_module
    from service.settings import Settings

# Seconds that a process may take beyond its drain delay and its grace period.
_SLACK_S = 5


def serve_in_processes(arguments: Sequence[str], settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        arguments: of `tenet serve`, without --port.
        settings: for where, and how many.

    Raises:
        ValueError: what is asked for would reach one of the processes alone.
        OSError: the port is in use.
    """
    where = settings.server
    _check(settings)
    stop = threading.Event()
    end_s = where.drain_delay_s + where.shutdown_grace_s + _SLACK_S
    with _held(where) as port, ExitStack() as ends:
        processes = [
            Companion(
                f"server process {index}",
                ["serve", *arguments, "--port", str(port), "--process", str(index)],
                end_s=end_s,
            )
            for index in range(where.processes)
        ]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        for process in processes:
            ends.enter_context(process)
        console.print(f"{where.processes} processes on {address(where.host, port)}", markup=False, soft_wrap=True)
        stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for process in processes:
            process.ask_to_end()
    if any(process.refused for process in processes):
        raise RuntimeError("stopped, because a process of it cannot run; its message is above")


def _check(settings: Settings) -> None:
    where = settings.server
    if settings.models.mode == "explicit":
        raise ValueError(
            'models.mode: expected "none" or "poll" with server.processes above 1, got "explicit"; a client that loads '
            "a model would reach one of the processes alone"
        )
    for name, given in {
        "shared_memory.enabled": settings.shared_memory.enabled,
        "server.admin_port": where.admin_port is not None,
        'server.front = "native"': where.front == "native",
    }.items():
        if given:
            raise ValueError(
                f"{name}: expected server.processes = 1 with it, got {where.processes}; choose one of them"
            )


@contextmanager
def _held(where: settings_module.Server) -> Iterator[int]:
    """Hold the port against every other server, and yield it; connections come to those who listen, as we do not."""
    check_address(where.host, where.port)
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((where.host, where.port))
        yield holder.getsockname()[1]
