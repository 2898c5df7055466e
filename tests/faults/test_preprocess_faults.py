"""Preprocessing killed, starved and raced for real: whatever happens, a new start ends in the
same bytes.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from tests.dataset.pictures import source_files, write_files
from xrai import preprocess
from xrai.command import run_command
from xrai.dataset.shards import read_index
from xrai.dataset.verify import find_faults
from xrai.ingest.sources import FolderSource
from xrai.store import LEASE_KEY, FolderStore, lease, open_store

SMALL = (
    "--images.size=16",
    "--shards.rows=10",
    "--splits.val_fraction=0.3",
    "--splits.test_fraction=0.2",
)
KILLED = -signal.SIGKILL


def all_files(folder: Path) -> dict[str, str]:
    """Every file below a folder by its hash, hidden and half-written ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def objects(folder: Path) -> dict[str, str]:
    """The objects of a store by hash: all files but the hidden ones that kill -9 leaves, a lease
    and what a write begins with.
    """
    found = all_files(folder).items()
    return {key: digest for key, digest in found if not key.rpartition("/")[2].startswith(".")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw images, one of them bad."""
    return write_files(
        tmp_path_factory.mktemp("source"), {**source_files(), "train/NORMAL/bad.png": b"no picture"}
    )


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the data set, made without a fault."""
    dataset = tmp_path_factory.mktemp("expected") / "dataset"
    assert wait(start(source, dataset)) == 0
    return all_files(dataset)


def start(
    source: Path, dataset: Path, *more: str, before: Callable[[], object] = lambda: None
) -> int:
    """Run the command in a child process, after `before`; returns its process id. What it says
    goes to `.log`.
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        log = os.open(dataset.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115, it lives as long as the child
        sys.argv = [
            "preprocess",
            f"--source={source}",
            f"--dataset={dataset}",
            *SMALL,
            "--workers=1",
            *more,
        ]
        lease.RENEW_S, lease.SETTLE_S = 600, 0  # so that each start has the same steps
        before()
        run_command(preprocess.main)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, *, timeout_s: float = 60) -> int:
    """How a child ended: its exit status, or minus the signal."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the command did not end within {timeout_s} s")


# ------------------------------------------------------------------------------------------ kill -9


class Steps:
    """Counts what the command does to source and destination, or one kind of it, and calls `act`
    at one such step.
    """

    def __init__(
        self,
        *,
        at: int = -1,
        only: str = "",
        act: Callable[[], object] = lambda: None,
        log: Path | None = None,
    ) -> None:
        self._at, self._only, self._act, self._log, self._count = at, only, act, log, 0

    def watch(self) -> None:
        for owner, name in (
            (FolderSource, "read"),
            (FolderStore, "read"),
            (FolderStore, "write"),
            (FolderStore, "upload"),
            (FolderStore, "delete"),
            (os, "fsync"),
        ):
            setattr(
                owner, name, self._wrapped(getattr(owner, name), name=f"{owner.__name__}.{name}")
            )

    def _wrapped(self, function: Callable[..., object], *, name: str) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if self._log:
                with self._log.open("a") as file:
                    key = next((argument for argument in args if isinstance(argument, str)), "")
                    file.write(f"{name} {key}\n")
            if self._only in name:
                if self._count == self._at:
                    self._act()
                self._count += 1
            return function(*args, **kwargs)

        return wrapped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def steps(
    source: Path, expected: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """All steps of one whole run in order: the operation and the key."""
    folder = tmp_path_factory.mktemp("steps")
    assert wait(start(source, folder / "dataset", before=Steps(log=folder / "steps").watch)) == 0
    assert all_files(folder / "dataset") == expected
    return (folder / "steps").read_text().splitlines()


def test_the_steps_that_are_killed_at_cover_the_whole_work(steps: list[str]) -> None:
    kinds = {step.split()[0] for step in steps}
    assert (
        kinds
        == {
            "FolderSource.read",
            "FolderStore.read",
            "FolderStore.write",
            "FolderStore.upload",
            "FolderStore.delete",
            "posix.fsync",
        }
        or "os.fsync" in kinds
    )
    assert (
        sum(step.startswith("FolderSource.read") for step in steps) >= 2 * 45 - 1
    )  # hashing, and decoding
    text = "\n".join(steps)
    for key in (
        "claim",
        "hashes",
        "part",
        "train-0",
        "manifest.jsonl",
        "dataset.json",
        "report/card.md",
    ):
        assert key in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "sixth", [0, *(pytest.param(k, marks=pytest.mark.ci) for k in range(1, 6))]
)
def test_killed_at_any_step_and_started_again_it_ends_in_the_same_bytes(
    source: Path, expected: dict[str, str], steps: list[str], tmp_path: Path, sixth: int
) -> None:
    reads = [k for k, step in enumerate(steps) if step.startswith("FolderSource.read")]
    chosen = sorted({*range(len(steps))} - {*reads} | {*reads[::15]})
    for step in chosen[sixth::6]:
        dataset = tmp_path / f"{step}"
        assert wait(start(source, dataset, before=Steps(at=step, act=die).watch)) == KILLED, steps[
            step
        ]
        if (dataset / "dataset.json").exists():  # then it is whole, whatever else lies about
            assert expected.items() <= all_files(dataset).items()
        assert wait(start(source, dataset)) == 0, (
            steps[step],
            dataset.with_suffix(".log").read_text(),
        )
        assert objects(dataset) == expected, steps[step]


def test_killed_again_and_again_it_still_ends_and_does_not_begin_anew_each_time(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    for _ in range(60):
        ended = wait(start(source, dataset, before=Steps(at=60, act=die).watch))
        if ended == 0:
            break
        assert ended == KILLED
    assert objects(dataset) == expected


@pytest.mark.ci
def test_a_data_set_that_is_replaced_is_whole_at_any_step_that_is_killed_at(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    log, old = tmp_path / "steps", tmp_path / "old"
    assert wait(start(source, old, "--shards.rows=3")) == 0
    shutil.copytree(old, tmp_path / "once")
    ended = wait(start(source, tmp_path / "once", "--overwrite", before=Steps(log=log).watch))
    assert ended == 0 and all_files(tmp_path / "once") == expected
    steps = log.read_text().splitlines()
    reads = [k for k, step in enumerate(steps) if step.startswith("FolderSource.read")]
    for step in sorted({*range(len(steps))} - {*reads} | {*reads[::15]})[::4]:
        dataset = tmp_path / f"{step}"
        shutil.copytree(old, dataset)
        ended = wait(start(source, dataset, "--overwrite", before=Steps(at=step, act=die).watch))
        assert ended == KILLED, steps[step]
        store = open_store(str(dataset))
        faults = [
            fault for fault in find_faults(store, read_index(store)) if "list" not in fault.words
        ]
        assert faults == [], steps[step]
        assert wait(start(source, dataset, "--overwrite")) == 0, dataset.with_suffix(".log")
        assert objects(dataset) == expected, steps[step]


def test_a_replacement_that_was_killed_leaves_the_old_data_set_and_goes_on(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset, log = tmp_path / "dataset", tmp_path / "dataset.log"
    assert wait(start(source, dataset, "--shards.rows=3")) == 0
    old = all_files(dataset)
    at = Steps(at=9, only="upload", act=die)
    assert wait(start(source, dataset, "--overwrite", "--shards.rows=4", before=at.watch)) == KILLED
    assert old.items() <= all_files(dataset).items()
    assert wait(start(source, dataset)) == 2
    assert "holds a data set of shards.rows = 3" in log.read_text()
    assert all_files(dataset) == old  # what the killed job left is removed
    at = Steps(at=3, only="upload", act=die)
    assert wait(start(source, dataset, "--overwrite", before=at.watch)) == KILLED
    assert wait(start(source, dataset, "--overwrite")) == 0
    assert "shards are stored already" in log.read_text()
    assert objects(dataset) == expected


@pytest.mark.slow
def test_the_workers_of_a_killed_command_end_too(source: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "many", source_files(600, 600))
    command = [
        sys.executable,
        "-m",
        "xrai.preprocess",
        f"--source={tmp_path / 'many'}",
        f"--dataset={tmp_path / 'd'}",
    ]
    with subprocess.Popen([*command, *SMALL, "--workers=2"], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "d").glob("train-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        family = descendants(process.pid)
        assert len(family) >= 2
        process.kill()
    deadline = time.monotonic() + 20
    while left := [child for child in family if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)
    assert not (tmp_path / "d" / "dataset.json").exists()


def descendants(parent: int) -> list[int]:
    """Process ids of children, and of theirs."""
    children = [
        int(text) for text in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def test_sigterm_ends_it_with_143_and_keeps_what_is_stored(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert wait(start(source, dataset, before=Steps(at=120, act=stop).watch)) == 143
    assert "Traceback" not in dataset.with_suffix(".log").read_text()
    assert list(dataset.iterdir()) and not (dataset / "dataset.json").exists()
    assert wait(start(source, dataset)) == 0
    assert all_files(dataset) == expected


# --------------------------------------------------------------------------- several at one address


@pytest.mark.parametrize("attempt", range(3))
def test_of_three_at_one_address_one_makes_the_data_set_and_the_others_are_refused(
    source: Path, expected: dict[str, str], tmp_path: Path, attempt: int
) -> None:
    dataset = tmp_path / "dataset"
    children = [
        start(source, dataset, before=partial(time.sleep, 0.07 * k * attempt)) for k in range(3)
    ]
    ends = [wait(child) for child in children]
    said = dataset.with_suffix(".log").read_text()
    assert 0 in ends and set(ends) <= {0, 2}, said
    assert said.count("is being written by process") == ends.count(2)
    assert "Traceback" not in said
    assert all_files(dataset) == expected


@pytest.mark.parametrize("pause_step", ["hashes", "train-0", "dataset.json"])
@pytest.mark.parametrize("others", [(), ("--images.fit=pad", "--overwrite")])
def test_who_comes_while_another_works_is_refused_and_disturbs_nothing(
    source: Path,
    expected: dict[str, str],
    steps: list[str],
    tmp_path: Path,
    pause_step: str,
    others: tuple[str, ...],
) -> None:
    at = next(k for k, step in enumerate(steps) if pause_step in step and "write" in step)
    dataset, reached = tmp_path / "dataset", tmp_path / "reached"

    def sleep() -> None:
        reached.touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    slow = start(source, dataset, before=Steps(at=at, act=sleep).watch)
    deadline = time.monotonic() + 30
    while not reached.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert wait(start(source, dataset, *others)) == 2
    assert f"is being written by process {slow} on" in dataset.with_suffix(".log").read_text()
    os.kill(slow, signal.SIGCONT)
    assert wait(slow) == 0, dataset.with_suffix(".log").read_text()
    assert all_files(dataset) == expected


def test_who_has_lost_the_address_to_another_machine_stores_nothing_more(
    source: Path, steps: list[str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    at = next(k for k, step in enumerate(steps) if "train-0" in step)

    def lose() -> None:
        lease.RENEW_S = 0.05
        other = replace(lease.Holder(), host="node-7", machine="another", owner="other")
        dataset.joinpath(LEASE_KEY).write_text(json.dumps(asdict(other)))
        time.sleep(0.5)

    def watch() -> None:
        lease.RENEW_S = 0.05
        Steps(at=at, act=lose).watch()

    assert wait(start(source, dataset, before=watch)) == 2
    said = dataset.with_suffix(".log").read_text()
    assert "is being written by process" in said and "on node-7" in said
    assert not (dataset / "dataset.json").exists()
    assert json.loads((dataset / LEASE_KEY).read_text())["owner"] == "other"


def test_a_partition_whose_source_is_bad_leaves_what_the_others_made(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset, own = tmp_path / "dataset", tmp_path / "own"
    shutil.copytree(source, own)
    assert wait(start(own, dataset, "--partition=0/3")) == 0
    before = objects(dataset)
    assert any(name.startswith("train-") for name in before)
    damaged = sorted(own.rglob("*.png"))[::2]
    for path in damaged:  # of the same size, so that only reading tells
        path.write_bytes(bytes(path.stat().st_size))
    assert wait(start(own, dataset, "--partition=1/3")) == 2
    assert before.items() <= objects(dataset).items()
    for path in damaged:
        shutil.copy(source / path.relative_to(own), path)
    for number in (1, 2):
        assert wait(start(own, dataset, f"--partition={number}/3")) == 0
    shards = {name: digest for name, digest in expected.items() if name.endswith((".h5", ".jsonl"))}
    assert shards.items() <= objects(dataset).items()  # the card names another source


def test_a_shard_that_goes_while_the_data_set_is_committed_is_noticed(
    source: Path, expected: dict[str, str], steps: list[str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    at = next(k for k, step in enumerate(steps) if step == "FolderStore.write dataset.json")

    def lose() -> None:
        next(dataset.glob("train-*")).unlink()

    assert wait(start(source, dataset, before=Steps(at=at, act=lose).watch)) == 1
    assert "changed while the data set was committed" in dataset.with_suffix(".log").read_text()
    assert not (dataset / "dataset.json").exists()
    assert wait(start(source, dataset)) == 0
    assert objects(dataset) == expected


def test_another_config_at_the_address_of_unfinished_work_is_refused_and_disturbs_nothing(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    assert wait(start(source, dataset, before=Steps(at=120, act=die).watch)) == KILLED
    before = objects(dataset)
    assert wait(start(source, dataset, "--images.fit=pad")) == 2
    assert "holds the beginning of a data set" in dataset.with_suffix(".log").read_text()
    assert objects(dataset) == before
    assert wait(start(source, dataset)) == 0
    assert objects(dataset) == expected


def test_what_a_killed_command_left_in_tmpdir_is_gone_after_the_next_start(
    source: Path, tmp_path: Path
) -> None:
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a long name has no room for sockets
    words = ("preprocess", f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
    command = [sys.executable, "-m", "xrai", *words, "--workers=2"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(temporary.glob("xrai-*/pymp-*/listener-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait(60)
        assert len(list(temporary.iterdir())) == 1
    done = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    assert b"Traceback" not in done.stderr
    assert list(temporary.iterdir()) == []
    temporary.rmdir()


@pytest.mark.parametrize("length", [70, 150])
def test_the_name_of_tmpdir_may_be_too_long_for_sockets(
    source: Path, expected: dict[str, str], tmp_path: Path, length: int
) -> None:
    temporary = tmp_path / ("x" * max(length - len(str(tmp_path)), 1))
    temporary.mkdir()
    words = ("preprocess", f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
    command = [sys.executable, "-m", "xrai", *words, "--workers=2"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    assert all_files(tmp_path / "dataset") == expected
    assert list(temporary.iterdir()) == []


# --------------------------------------------------------------------------------------- partitions


@pytest.mark.parametrize("num_partitions", [1, 2, 3, 7, 20])
def test_any_number_of_partitions_in_any_order_ends_in_the_same_bytes(
    source: Path, expected: dict[str, str], tmp_path: Path, num_partitions: int
) -> None:
    dataset = tmp_path / "dataset"
    order = sorted(
        range(num_partitions), key=lambda k: hashlib.sha256(bytes([k, num_partitions])).digest()
    )
    for place, number in enumerate(order):
        assert not (dataset / "dataset.json").exists()
        assert wait(start(source, dataset, f"--partition={number}/{num_partitions}")) == 0
        assert (dataset / "dataset.json").exists() == (place == num_partitions - 1)
    assert all_files(dataset) == expected


def test_partitions_that_run_at_once_end_in_the_same_bytes(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    children = [start(source, dataset, f"--partition={number}/4") for number in range(4)]
    assert [wait(child) for child in children] == [0] * 4, dataset.with_suffix(".log").read_text()
    assert all_files(dataset) == expected


def test_a_partition_that_was_killed_is_the_only_one_to_start_again(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    assert wait(start(source, dataset, "--partition=0/3")) == 0
    assert (
        wait(start(source, dataset, "--partition=1/3", before=Steps(at=20, act=die).watch))
        == KILLED
    )
    assert wait(start(source, dataset, "--partition=2/3")) == 0
    assert not (dataset / "dataset.json").exists()
    assert wait(start(source, dataset, "--partition=1/3")) == 0
    assert objects(dataset) == expected


def test_a_partition_of_another_number_of_partitions_fits_in(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    assert wait(start(source, dataset, "--partition=1/2")) == 0
    assert wait(start(source, dataset)) == 0
    assert all_files(dataset) == expected


@pytest.mark.ci
def test_findings_end_in_the_same_bytes_after_kills_and_in_partitions(
    source: Path, tmp_path: Path
) -> None:
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    cells = ("1,0", "0,1", "1,", "0,0", ",1")
    rows = [f"{path.as_posix()},{cells[k % 5]}" for k, path in enumerate(files)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,Edema,Nodule", *rows]))
    labels = f"--labels={table}"
    whole, killed, parts = (tmp_path / name for name in ("whole", "killed", "parts"))
    assert wait(start(source, whole, labels)) == 0
    assert read_index(open_store(str(whole))).labels.task == "multilabel"
    for number in (2, 0, 1):
        assert wait(start(source, parts, labels, f"--partition={number}/3")) == 0
    ends: list[int] = []
    while not ends or (ends[-1] == KILLED and len(ends) < 9):
        ends.append(wait(start(source, killed, labels, before=Steps(at=70, act=die).watch)))
    assert len(ends) > 2 and ends[-1] == 0
    assert objects(killed) == all_files(parts) == all_files(whole)


# ------------------------------------------------------------------------------ a disk that is full


def test_a_file_that_may_not_grow_ends_it_in_one_line_and_a_new_start_goes_on(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"

    def starve() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    assert wait(start(source, dataset, before=starve)) == 1
    said = dataset.with_suffix(".log").read_text()
    assert said.count("xrai: error:") == 1 and "Traceback" not in said
    assert not [
        path for path in dataset.rglob("*") if path.name.endswith((".h5", ".tmp", ".json.tmp"))
    ]
    assert wait(start(source, dataset)) == 0
    assert all_files(dataset) == expected


def test_a_full_disk_ends_it_in_one_line_and_a_new_start_goes_on(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip(
            "only root can mount a small disk; the test above starves it by a limit instead"
        )
    try:
        dataset = disk / "dataset"
        log = tmp_path / "log"
        command = [
            sys.executable,
            "-m",
            "xrai.preprocess",
            f"--source={source}",
            f"--dataset={dataset}",
            *SMALL,
        ]
        done = subprocess.run(
            [*command, "--workers=1"], capture_output=True, text=True, timeout=60, check=False
        )
        log.write_text(done.stderr)
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("xrai: error:") == 1 and "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (dataset / "dataset.json").exists()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        sys.stderr.flush()
        assert wait(start(source, dataset)) == 0
        assert all_files(dataset) == expected
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------- what was stored was damaged since


@pytest.mark.parametrize("what", ["train-0", "unfinished-part", "unfinished-hashes"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_what_was_damaged_between_two_starts_is_made_anew(
    source: Path, expected: dict[str, str], steps: list[str], tmp_path: Path, what: str, how: str
) -> None:
    dataset = tmp_path / "dataset"
    at = next(k for k, step in enumerate(steps) if "manifest" in step)
    assert wait(start(source, dataset, before=Steps(at=at, act=die).watch)) == KILLED
    path = sorted(dataset.glob(f"{what}*"))[0]
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    else:
        half = len(data) // 2
        path.write_bytes(
            data[:half]
            if how == "truncated"
            else data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        )
    ended = wait(start(source, dataset))
    if ended == 1:  # noticed at the last moment, with one line that says what to do
        assert "start again" in dataset.with_suffix(".log").read_text()
        ended = wait(start(source, dataset))
    assert ended == 0, dataset.with_suffix(".log").read_text()
    assert objects(dataset) == expected


def test_a_source_that_changes_between_two_starts_is_noticed_and_the_next_start_takes_it_as_it_is(
    tmp_path: Path,
) -> None:
    source = write_files(tmp_path / "source", source_files())
    dataset = tmp_path / "dataset"
    assert (
        wait(start(source, dataset, before=Steps(at=60, act=die).watch)) == KILLED
    )  # hashed, not yet decoded
    path = sorted((source / "train" / "NORMAL").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # the same size
    assert wait(start(source, dataset)) == 2
    said = dataset.with_suffix(".log").read_text()
    assert f"{path.name} in source source was changed while it was read; start again" in said
    assert all_files(dataset) == {}
    assert wait(start(source, dataset)) == 0
    assert hashlib.sha256(path.read_bytes()).hexdigest() in (dataset / "manifest.jsonl").read_text()
