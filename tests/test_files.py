"""Local files and what the machine offers."""

import errno
import os
from pathlib import Path

import pytest

from xrai.errors import StoreError, UserError
from xrai.files import explaining, num_cores


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


REFUSED = [errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR]


@pytest.mark.parametrize("number", [*REFUSED, errno.ENOSPC, errno.EIO])
def test_a_file_that_the_program_chose_is_no_mistake_of_the_user(number: int) -> None:
    with (
        pytest.raises(StoreError, match=r"run/x cannot be written: .*; free some space") as caught,
        explaining("written", "run/x", hint="free some space", is_address=False),
    ):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is StoreError and caught.value.exit_status == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_an_address_that_cannot_be_written_is_a_mistake_of_the_user(number: int) -> None:
    with pytest.raises(UserError) as caught, explaining("written", "out/x"):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_status == 2
