"""The README's commands and programs, run in order, with the output that it shows.

`UPDATE_README=1 pytest tests/test_readme.py` writes the real output into the README.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

# Where the README's server listens; the test takes a free port instead.
PORT = "8001"

_SECONDS = 240
_MARK = "@@@ command"

_BLOCKS = re.compile(r"```console\n(.*?)```|```python\n(.*?)```(?:\n\n```text output\n(.*?)```)?", re.DOTALL)

# Lines of output that a reader is spared: one of each epoch or shard is enough.
_PROGRESS = re.compile(r"^\w[^:]*: \d+/\d+: ")


@dataclass
class Command:
    """A command or a program of the README, with the lines of output shown below it."""

    script: str
    shown: list[str] = field(default_factory=list)


def parse(text: str) -> list[Command]:
    commands: list[Command] = []
    for console, program, output in _BLOCKS.findall(text):
        if program:
            commands.append(Command(f"python3 - <<'END'\n{program}END", output.splitlines()))
        for line in console.splitlines():
            if line.startswith("$ "):
                commands.append(Command(line[2:]))
            else:
                commands[-1].shown.append(line)
    return commands


def run(commands: list[Command], folder: Path) -> list[list[str]]:
    """Run all in one shell; return the lines that each printed."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    script = ["trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT", "set -e"]
    for command in commands:
        script += [f"echo '{_MARK}'", _foreground(command.script).replace(PORT, port)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    shell = subprocess.Popen(
        ["bash"], cwd=folder, env=environment, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, complaints = shell.communicate("\n".join(script), timeout=_SECONDS)
    finally:
        # The shell's own trap ends the server; after a time-out nobody else would.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, printed + complaints
    outputs = printed.replace(port, PORT).split(f"{_MARK}\n")[1:]
    return [[line.rstrip() for line in output.splitlines()] for output in outputs]


def _foreground(script: str) -> str:
    """Let a command in the background say that it is ready before the next begins."""
    if not script.endswith("&"):
        return script
    return (
        f"{script[:-1]} > up.log 2> up.err &\nuntil grep -q working up.log; do kill -0 $!; sleep 0.1; done; cat up.log"
    )


def _shorten(configs: Path) -> None:
    """Train and attack for a shorter time than the README does: the same lines, other numbers."""
    for name, full, short in (
        ("digits", "epochs = 20", "epochs = 8"),
        ("audit-digits-int8", "steps = 150", "steps = 20"),
    ):
        path = configs / f"{name}.toml"
        assert full in path.read_text(), f"{path.name} has changed; say here how to shorten it"
        path.write_text(path.read_text().replace(full, short))


def shape(line: str) -> str:
    """Return what of a line is the same in every run: no measured numbers, no ids, no spacing."""
    line = re.sub(r"\b(queued|running)\b", "STATE", line)
    line = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|\b[0-9a-f]{12}\b", "ID", line)
    # The first cell of a table's row is its label, with an epsilon perhaps: that stays as it is.
    label, bar, rest = line.rpartition("│ ")[0].partition(" │") if line.startswith("│") else ("", "", line)
    return label + bar + re.sub(r"[\s─━═┃┏┓┡┩╇┳]+", " ", re.sub(r"\d+([.,]\d+)?(e-?\d+)?", "#", rest)).strip()


def test_the_readme_s_commands_do_what_it_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    if not os.environ.get("UPDATE_README"):
        _shorten(tmp_path / "configs")
    commands = parse(README.read_text())
    outputs = run(commands, tmp_path)
    if os.environ.get("UPDATE_README"):
        README.write_text(_updated(README.read_text(), outputs))
        return
    for command, output in zip(commands, outputs, strict=True):
        real = {shape(line) for line in output}
        for line in command.shown:
            if line not in {"", "..."}:
                assert shape(line) in real, f"{command.script}: the README shows {line!r}, it printed {output}"


def _updated(text: str, outputs: list[list[str]]) -> str:
    remaining = iter(outputs)

    def block(match: re.Match[str]) -> str:
        if program := match[2]:
            return f"```python\n{program}```\n\n```text output\n{_joined(next(remaining))}```"
        commands = [line for line in match[1].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{line}\n{_joined(next(remaining))}" for line in commands) + "```"

    return _BLOCKS.sub(block, text)


def _joined(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in _short(lines))


def _short(lines: list[str]) -> list[str]:
    progress = [index for index, line in enumerate(lines) if _PROGRESS.match(line)]
    if len(progress) < 4:
        return lines
    return [*lines[: progress[1]], "...", *lines[progress[-1] :]]
