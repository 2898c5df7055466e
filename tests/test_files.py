"""Local files and what the machine offers."""

import os
from pathlib import Path

import pytest

from xrai.files import num_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V1 = "11:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/"
CPU = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1600000 100000"}, 8),
        (
            {
                "proc/self/cgroup": "0::/pod/job",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000",
                "sys/fs/cgroup/pod/job/cpu.max": "max 100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                f"{CPU}/cpu.cfs_quota_us": "250000",
                f"{CPU}/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                f"{CPU}/docker/a/cpu.cfs_quota_us": "-1",
                f"{CPU}/docker/a/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_every_quota_rounded_up(
    tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    assert num_cores(write(tmp_path, files)) == cores
