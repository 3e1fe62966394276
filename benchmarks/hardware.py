"""What a benchmark ran on, for the last line of what it prints."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def hardware() -> str:
    """Return what the numbers were measured on, one line."""
    names = {line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")}
    cpu = ", ".join(sorted(names)) or platform.processor() or "unknown CPU"
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
