"""How many CPU threads one engine may use: what the machine, the scheduler and the control group leave to it.

affinity --smaller of both--> CPUs --shared by the instances--> threads of one engine
cgroup quota (v1, v2) ---^

A container is often given a share of many cores that it can all see. A runtime that starts a thread for each of
them is stopped by the kernel for most of every period: slower than with the threads that the quota pays for.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

# Where the kernel mounts the CPU controller of control groups, version 1; some systems join it with another.
_V1_MOUNTS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")


def budget(instances: int = 1) -> int:
    """Return the CPU threads that each of `instances` engines of this process may use, at least 1.

    Raises:
        ValueError: fewer than one instance.
    """
    if instances < 1:
        raise ValueError(f"instances: expected at least 1, got {instances}")
    return shared(affinity=len(os.sched_getaffinity(0)), quota=quota(Path("/")), instances=instances)


def shared(*, affinity: int, quota: float | None, instances: int) -> int:
    """Divide what is there by the instances: whole threads, at least 1.

    Args:
        affinity: CPUs that the scheduler lets this process run on.
        quota: CPUs' worth of time that the control group has, such as 1.5; None for no limit.
        instances: engines that run at once.
    """
    cpus = affinity if quota is None else min(affinity, math.floor(quota))
    return max(1, cpus // instances)


def quota(root: Path) -> float | None:
    """Return the CPUs' worth of time that this process's control groups have, None without a limit.

    A group has what it says and no more than any of its ancestors.

    Args:
        root: the folder below which `proc` and `sys` are mounted, "/" on a real machine.
    """
    cgroup = root / "sys/fs/cgroup"
    found: list[float | None] = []
    for controllers, path in _groups(root / "proc/self/cgroup"):
        if not controllers:
            found += [_v2(folder / "cpu.max") for folder in _ancestry(cgroup, path)]
        elif "cpu" in controllers.split(","):
            found += [_v1(folder) for mount in _V1_MOUNTS for folder in _ancestry(cgroup / mount, path)]
    return min((cpus for cpus in found if cpus is not None), default=None)


def _groups(file: Path) -> list[tuple[str, str]]:
    """Return (controllers, path) of each line `number:controllers:path`; no controllers mean version 2."""
    lines = (line.split(":", 2) for line in (_read(file) or "").splitlines())
    return [(parts[1], parts[2]) for parts in lines if len(parts) == 3]


def _ancestry(mount: Path, path: str) -> list[Path]:
    """Return the group's folder and those above it, up to the mount.

    Inside a container the path may be that of the host and not be there: then what is mounted is the group itself.
    """
    parts = [part for part in Path(path).parts if part not in {"/", ".."}]
    return [mount.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]


def _v2(file: Path) -> float | None:
    """Read `cpu.max`: "QUOTA PERIOD" in microseconds, "max" for no limit."""
    match (_read(file) or "").split():
        case [limit, period]:
            return _share(limit, period)
    return None


def _v1(folder: Path) -> float | None:
    """Read `cpu.cfs_quota_us`, -1 for no limit, and `cpu.cfs_period_us`."""
    limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return None if limit is None or period is None else _share(limit, period)


def _share(limit: str, period: str) -> float | None:
    try:
        quota_us, period_us = int(limit), int(period)
    except ValueError:  # "max", or a kernel that writes something else
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
