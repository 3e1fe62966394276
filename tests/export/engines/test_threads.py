"""The CPU threads of an engine, from files as the kernel writes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.engines import threads

if TYPE_CHECKING:
    from pathlib import Path

V1 = """12:cpuset:/docker/4e5f
4:cpu,cpuacct:/docker/4e5f
3:memory:/docker/4e5f
0::/
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents)
    return root


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        # As in a container of its own cgroup namespace.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        # A limit of an ancestor holds for its descendants.
        (
            {
                "proc/self/cgroup": "0::/kubepods.slice/pod1/app\n",
                "sys/fs/cgroup/kubepods.slice/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/kubepods.slice/pod1/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/kubepods.slice/pod1/app/cpu.max": "max 100000\n",
            },
            2,
        ),
        # The groups of others are no concern of ours.
        (
            {
                "proc/self/cgroup": "0::/mine\n",
                "sys/fs/cgroup/mine/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
            },
            4,
        ),
        # A path of the host, seen from inside.
        ({"proc/self/cgroup": "0::/../../pod1\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/4e5f/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/4e5f/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "nonsense\n\n0::/\n", "sys/fs/cgroup/cpu.max": "many\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
    ],
)
def test_a_quota_is_that_of_the_tightest_group_above(tmp_path: Path, files: dict[str, str], cpus: float | None) -> None:
    assert threads.quota(write(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("affinity", "quota", "instances", "expected"),
    [(8, None, 1, 8), (8, 2.0, 1, 2), (2, 6.0, 1, 2), (8, 0.5, 1, 1), (8, 1.9, 1, 1), (8, None, 3, 2), (2, None, 5, 1)],
)
def test_instances_share_the_smaller_of_affinity_and_quota(
    affinity: int, quota: float | None, instances: int, expected: int
) -> None:
    assert threads.shared(affinity=affinity, quota=quota, instances=instances) == expected


@given(
    affinity=st.integers(1, 512),
    quota=st.none() | st.floats(0.01, 512),
    instances=st.integers(1, 64),
)
def test_every_instance_has_a_thread_and_together_they_stay_within_bounds(
    affinity: int, quota: float | None, instances: int
) -> None:
    each = threads.shared(affinity=affinity, quota=quota, instances=instances)
    assert each >= 1
    assert each == 1 or each * instances <= min(affinity, quota or affinity)


def test_the_budget_of_this_machine() -> None:
    assert 1 <= threads.budget() <= len(os.sched_getaffinity(0))
    assert threads.budget(10_000) == 1
    with pytest.raises(ValueError, match="instances: expected at least 1, got 0"):
        threads.budget(0)
