"""Local files and what the machine offers."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from xrai import files
from xrai.errors import StoreAccessError, StoreError, UserError
from xrai.files import (
    explaining,
    explaining_disk,
    num_cores,
    read_once,
    replacing,
    write_atomically,
)


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


def test_a_file_that_could_not_be_written_is_named_by_its_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(OSError, match="No space") as caught, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path) and list(tmp_path.iterdir()) == []


def test_many_files_in_a_folder_do_not_list_it_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Path] = []

    def iterdir(folder: Path) -> Iterator[Path]:
        listed.append(folder)
        return iter([])

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(Path, "glob", lambda folder, _: iterdir(folder))
    for number in range(20):
        write_atomically(tmp_path / f"{number}.png", b"pixels")
    assert listed == [tmp_path]


def test_a_stale_file_that_cannot_be_removed_does_not_prevent_a_write(tmp_path: Path) -> None:
    stale = tmp_path / ".other.png.0123456789ab.tmp"
    stale.mkdir()  # no file, so that even root cannot unlink it
    os.utime(stale, (0, 0))
    write_atomically(tmp_path / "image.png", b"pixels")
    assert (tmp_path / "image.png").read_bytes() == b"pixels"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space", "r/a.pt"), "r/a.pt cannot be used: No space; free some"),
        (OSError(errno.EFBIG, "File too large"), "a file cannot be used: File too large; free"),
        (PermissionError(errno.EACCES, "Denied", "r/a"), "r/a cannot be used: Denied; check that"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory"), "No usable temporary"),
    ],
)
def test_a_disk_that_fails_anywhere_is_one_line(error: OSError, said: str) -> None:
    with pytest.raises(StoreError, match=said), explaining_disk():
        raise error
    with pytest.raises(BrokenPipeError), explaining_disk():
        raise BrokenPipeError(errno.EPIPE, "of a socket, say")


# ------------------------------------------------------------------------------- temporary folders

USES_SCRATCH = "from xrai.files import scratch_folder; print(scratch_folder(), flush=True); input()"


def test_folders_of_killed_processes_are_cleared_and_those_of_others_never(tmp_path: Path) -> None:
    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", USES_SCRATCH],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    others = {tmp_path / "xrai-2024-results", tmp_path / "pymp-abcdefgh", tmp_path / "xrai-old"}
    for other in others:
        other.mkdir()
    (killed, left), (living, used) = start(), start()
    killed.kill()
    killed.communicate(timeout=60)
    assert set(tmp_path.iterdir()) == {left, used, *others}
    third, own = start()
    assert set(tmp_path.iterdir()) == {own, used, *others}
    for process in (third, living):
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert set(tmp_path.iterdir()) == others


def test_a_fork_does_not_remove_the_folder_of_its_parent(tmp_path: Path) -> None:
    script = """
import os, sys
from xrai.files import scratch_folder, temporary_folder
folder = scratch_folder()
if os.fork() == 0:
    sys.exit()
os.wait()
with temporary_folder() as inside:
    assert os.path.dirname(inside) == str(folder)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_read_once_in_as_many_parts_as_its_writer_makes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with (tmp_path / "pipe").open("wb", buffering=0) as file:
            for part in (b"a" * 100_000, b"b" * 100_000):
                file.write(part)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_once(tmp_path / "pipe", max_bytes=1 << 20) == b"a" * 100_000 + b"b" * 100_000
    writer.join()
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_once(tmp_path / "file", max_bytes=4) == b"0123"
    assert read_once(Path("/dev/null"), max_bytes=4) == b""
    with pytest.raises(IsADirectoryError):
        read_once(tmp_path, max_bytes=4)


def test_a_pipe_without_a_writer_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files, "_SILENCE_S", 0.05)
    with (
        pytest.raises(StoreAccessError, match=r"pipe cannot be read: nothing was written into it"),
        explaining("read", "pipe"),
    ):
        read_once(tmp_path / "pipe", max_bytes=4)
