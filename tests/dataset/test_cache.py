"""The cache: what it hands out is what the index says, whoever shares the folder and whatever
befalls it.
"""

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO
from unittest.mock import Mock

import numpy as np
import pytest

from tests.dataset.remote import RemoteFolder, flip_byte
from tests.dataset.small import place_of, write_dataset
from xrai.dataset.cache import ShardCache
from xrai.dataset.shards import DatasetIndex, Layout, Shard, map_shard, open_shard
from xrai.errors import CorruptError, DatasetError, StoreError, UnreachableError, UserError
from xrai.files import cache_folder
from xrai.store import Store, open_store

pytestmark = pytest.mark.timeout(60)

_fork = multiprocessing.get_context("fork")


@pytest.fixture
def bucket(tmp_path: Path) -> RemoteFolder:
    return RemoteFolder(tmp_path / "bucket")


@pytest.fixture
def index(bucket: RemoteFolder) -> DatasetIndex:
    """Five shards of equal size in a bucket."""
    return write_dataset(Path(bucket.uri), {"train": [20] * 5})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_and_close(cache: ShardCache, index: DatasetIndex, *numbers: int) -> None:
    for number in numbers:
        cache.open(index.splits["train"][number]).close()


def in_child(work: Callable[[], object]) -> ForkProcess:
    child = _fork.Process(target=work)
    child.start()
    return child


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited 20 s for {what}"
        time.sleep(0.01)


def files_of(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )


# ------------------------------------------------------------------------------------- what it does


def test_a_shard_is_fetched_once_and_found_by_later_runs(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    for _ in range(2):
        with closing(
            ShardCache(bucket, index, folder=folder).open(index.splits["train"][0])
        ) as opened:
            assert opened.shard.images.shape == (20, 16, 16)
            assert opened.shard.source[3] == "train/3.png"
    assert bucket.downloads() == ["train-00000-of-00005.h5"]
    assert len(files_of(folder)) == 1  # no lock, no part, no temporary file stays


def test_a_shard_of_a_folder_is_used_where_it_is(tmp_path: Path, folder: Path) -> None:
    index = write_dataset(tmp_path / "set", {"train": [20]})
    opened = ShardCache(open_store(str(tmp_path / "set")), index, folder=folder).open(
        index.splits["train"][0]
    )
    assert opened.shard.images.shape == (20, 16, 16)
    assert not folder.exists()


def test_a_data_set_in_a_folder_needs_no_home_for_a_cache(
    tmp_path: Path, bucket: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_dataset(tmp_path / "set", {"train": [20]})
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    open_and_close(ShardCache(open_store(str(tmp_path / "set")), index), index, 0)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        open_and_close(ShardCache(bucket, index), index, 0)


def test_what_cannot_be_locked_counts_as_in_use(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = index.splits["train"][0]
    flock = fcntl.flock

    def nfs_flock(file: BinaryIO, kind: int) -> None:
        if kind & fcntl.LOCK_EX and not file.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, kind)

    cache = ShardCache(
        bucket, index, folder=folder, max_bytes=info.size_bytes * 3 // 2, timeout_s=1
    )
    open_and_close(cache, index, 0)
    (left,) = folder.rglob("*.h5")
    monkeypatch.setattr(fcntl, "flock", nfs_flock)
    open_and_close(cache, index, 1)
    assert not left.exists() and len(list(folder.rglob("*.h5"))) == 1

    def no_flock(file: BinaryIO, kind: int) -> None:
        if Path(file.name).suffix == ".h5":
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(StoreError, match=r"waited 1 s for room .* is full of shards in use"):
        cache.open(index.splits["train"][2])


def test_a_cache_on_a_file_system_without_locks_is_one_line(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_and_close(ShardCache(bucket, index, folder=folder), index, 0)
    refusal = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=refusal))
    for number in (0, 1):  # one that is there, and one to fetch
        with pytest.raises(StoreError, match=r"No locks available; .*--cache\.dir=FOLDER"):
            open_and_close(ShardCache(bucket, index, folder=folder), index, number)


def test_of_many_processes_one_fetches_a_shard(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    start = _fork.Barrier(4)

    def work() -> None:
        start.wait(20)
        open_and_close(ShardCache(bucket, index, folder=folder), index, 0, 1, 2)

    children = [in_child(work) for _ in range(4)]
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert sorted(bucket.downloads()) == [shard.name for shard in index.splits["train"][:3]]


def test_of_many_threads_one_fetches_a_shard(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    cache = ShardCache(bucket, index, folder=folder)
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(cache.open, [index.splits["train"][0]] * 8))
    assert len(bucket.downloads()) == 1
    for one in opened:
        assert np.array_equal(one.shard.images, opened[0].shard.images)
        one.close()


def test_of_more_shards_than_stay_mapped_those_that_stay_are_used_in_each_epoch(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the least recently used one let go, none would be there when its turn comes."""
    found: list[str] = []

    def note_open(path: Path) -> Shard:
        found.append(f"open {path.name[6:11]}")
        return open_shard(path)

    def note_map(path: Path, layout: Layout) -> Shard:
        found.append(f"map {path.name[6:11]}")
        return map_shard(path, layout)

    monkeypatch.setattr("xrai.dataset.cache._MAX_KEPT", 3)
    noting = SimpleNamespace(open_shard=note_open, map_shard=note_map)
    monkeypatch.setattr("xrai.dataset.cache.shards", noting)
    cache = ShardCache(bucket, index, folder=folder)
    for _ in range(3):
        open_and_close(cache, index, *range(5))
    assert found == [f"open {number:05d}" for number in range(5)] + ["map 00003", "map 00004"] * 2
    assert len(mapped_now(folder)) == 3


def test_shards_stay_mapped_only_as_the_limits_of_files_and_of_the_cache_allow(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = ShardCache(bucket, index, folder=folder, max_bytes=10**9)
    open_and_close(limited, index, *range(5), *range(5))
    assert mapped_now(folder) == set()
    monkeypatch.setattr("resource.getrlimit", lambda _: (16, 16))
    cache = ShardCache(bucket, index, folder=folder)
    open_and_close(cache, index, *range(5), *range(5))
    assert len(mapped_now(folder)) == 2


def test_a_file_that_was_replaced_is_mapped_anew_and_takes_no_further_room(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrai.dataset.cache._MAX_KEPT", 2)
    cache = ShardCache(bucket, index, folder=folder)
    open_and_close(cache, index, 0)
    for _ in range(3):
        file = next(folder.rglob("train-00000*.h5"))
        file.unlink()
        with closing(cache.open(index.splits["train"][0])) as opened:
            assert place_of(opened.shard.images[:, None]).tolist() == list(range(20))
    open_and_close(cache, index, 1)
    assert mapped_now(folder) == {str(path) for path in folder.rglob("*.h5")}


def mapped_now(folder: Path) -> set[str]:
    """Files below a folder that this process has mapped."""
    found = {
        line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()
    }
    return {path for path in found if path.startswith(str(folder))}


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/xrai")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/xrai")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        cache_folder()


# ----------------------------------------------------------------------------------- damaged shards


@pytest.mark.parametrize("place", ["folder", "bucket"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_refused_each_time_it_is_read(
    place: str, damage: str, tmp_path: Path, folder: Path
) -> None:
    index = write_dataset(tmp_path / "set", {"train": [20, 20]})
    store = (
        RemoteFolder(tmp_path / "set") if place == "bucket" else open_store(str(tmp_path / "set"))
    )
    path = tmp_path / "set" / "train-00001-of-00002.h5"
    if damage == "flip":
        flip_byte(path)
    else:
        path.write_bytes(path.read_bytes()[: -100 if damage == "cut" else 0])
    cache = ShardCache(store, index, folder=folder)
    for _ in range(3):  # a reader that keeps what it has fetched reads it as good the second time
        with pytest.raises(
            CorruptError, match=r"train-00001-of-00002\.h5 is damaged: .*xrai verify .* --repair"
        ):
            cache.open(index.splits["train"][1])
    open_and_close(cache, index, 0)
    assert (
        len(files_of(folder)) == (1 if place == "bucket" else 0)
        if folder.exists()
        else place == "folder"
    )


def test_a_shard_that_is_damaged_on_its_way_is_fetched_again(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    class Noisy(RemoteFolder):
        def download(self, key: str, path: Path) -> str:
            super().download(key, path)
            if len(self.downloads()) < 3:
                flip_byte(path)
            return open_store(str(path.parent)).upload(path.name, path)

    noisy = Noisy(Path(bucket.uri))
    open_and_close(ShardCache(noisy, index, folder=folder), index, 0)
    assert len(noisy.downloads()) == 3


def test_a_shard_that_was_damaged_in_the_cache_is_fetched_again(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    open_and_close(ShardCache(bucket, index, folder=folder), index, 0)
    flip_byte(next(folder.rglob("*.h5")))
    with closing(ShardCache(bucket, index, folder=folder).open(index.splits["train"][0])) as opened:
        assert opened.shard.source[0] == "train/0.png"
    assert len(bucket.downloads()) == 2


def test_a_file_that_changes_while_a_run_goes_on_is_checked_again(
    tmp_path: Path, folder: Path
) -> None:
    index = write_dataset(tmp_path / "set", {"train": [20]})
    cache = ShardCache(open_store(str(tmp_path / "set")), index, folder=folder)
    open_and_close(cache, index, 0)
    flip_byte(tmp_path / "set" / "train-00000-of-00001.h5")
    with pytest.raises(CorruptError):
        cache.open(index.splits["train"][0])


# ------------------------------------------------------------------------------- not the same shard


def test_two_data_sets_with_the_same_names_do_not_meet_in_the_cache(
    tmp_path: Path, folder: Path
) -> None:
    buckets = [RemoteFolder(tmp_path / name / "chest") for name in ("one", "two")]
    indices = [
        write_dataset(Path(store.uri), {"train": [20]}, seed=k) for k, store in enumerate(buckets)
    ]
    for _ in range(2):
        for store, index in zip(buckets, indices, strict=True):
            with closing(
                ShardCache(store, index, folder=folder).open(index.splits["train"][0])
            ) as opened:
                expected = index.splits["train"][0].sha256
                assert opened.shard.sha256[0] == sha256_of_first_row(store)
                assert any(expected[:16] in name for name in files_of(folder))
    assert [len(store.downloads()) for store in buckets] == [1, 1]


def sha256_of_first_row(store: RemoteFolder) -> str:
    return str(open_shard(Path(store.uri) / "train-00000-of-00001.h5").sha256[0])


def test_a_data_set_that_was_replaced_is_not_read_from_the_old_cache(
    tmp_path: Path, folder: Path
) -> None:
    bucket = RemoteFolder(tmp_path / "bucket")
    old = write_dataset(Path(bucket.uri), {"train": [20, 20]}, seed=0)
    cache = ShardCache(bucket, old, folder=folder)
    open_and_close(cache, old, 0)
    new = write_dataset(Path(bucket.uri), {"train": [20, 20]}, seed=1)

    with closing(ShardCache(bucket, new, folder=folder).open(new.splits["train"][0])) as opened:
        assert opened.shard.sha256[0] != old.splits["train"][0].sha256
    assert len(bucket.downloads()) == 2
    with pytest.raises(
        DatasetError, match=r"was replaced while it was read \(its fingerprint was .*start again"
    ):
        cache.open(old.splits["train"][1])


# ---------------------------------------------------------------------------------------- its limit


def test_the_least_recently_used_shard_goes_first(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    size_bytes = index.splits["train"][0].size_bytes
    cache = ShardCache(bucket, index, folder=folder, max_bytes=3 * size_bytes)
    open_and_close(cache, index, 0, 1, 2, 0, 3)  # 1 has not been used for longest
    assert [name.split(".")[0] for name in files_of(folder)] == [
        "train-00000-of-00005",
        "train-00002-of-00005",
        "train-00003-of-00005",
    ]


def test_a_shard_in_use_is_never_removed(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    cache = ShardCache(
        bucket, index, folder=folder, max_bytes=2 * index.splits["train"][0].size_bytes
    )
    with closing(cache.open(index.splits["train"][0])) as held:
        before = held.shard.images.copy()
        open_and_close(cache, index, 1, 2, 3, 4)
        assert "train-00000-of-00005" in {name.split(".")[0] for name in files_of(folder)}
        np.testing.assert_array_equal(held.shard.images, before)
    open_and_close(cache, index, 1)
    assert "train-00000-of-00005" not in {name.split(".")[0] for name in files_of(folder)}


def test_the_limit_holds_for_several_processes_together(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    """Processes of different data sets too: the limit is the folder's."""
    other = RemoteFolder(Path(bucket.uri).with_name("other"))
    other_index = write_dataset(Path(other.uri), {"train": [20] * 5}, seed=1)
    limit = 4 * index.splits["train"][0].size_bytes

    def work(store: RemoteFolder, of: DatasetIndex, seed: int) -> None:
        cache = ShardCache(store, of, folder=folder, max_bytes=limit)
        for number in np.random.default_rng(seed).integers(0, 5, 20).tolist():
            open_and_close(cache, of, number)

    children = [
        in_child(partial(work, store, of, seed))
        for seed, (store, of) in enumerate([(bucket, index), (other, other_index)] * 2)
    ]
    largest = 0
    wait_until((folder / ".lock").exists, "the first shard")
    while any(child.is_alive() for child in children):
        largest = max(largest, size_of(folder))
        time.sleep(0.02)
    assert [child.exitcode for child in children] == [0] * 4
    assert 0 < largest <= limit


def size_of(folder: Path) -> int:
    """Bytes of all shards in a cache. Nothing is removed meanwhile, so that none is counted
    beside its successor.
    """
    with (folder / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.glob("*/*.h5"))


def test_a_shard_in_use_by_another_process_is_never_removed(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    limit = 2 * index.splits["train"][0].size_bytes
    opened = _fork.Event()

    def hold() -> None:
        with closing(
            ShardCache(bucket, index, folder=folder, max_bytes=limit).open(index.splits["train"][0])
        ):
            opened.set()
            time.sleep(60)

    holder = in_child(hold)
    assert opened.wait(20)
    cache = ShardCache(bucket, index, folder=folder, max_bytes=limit)
    for number in (1, 2, 3, 4):
        open_and_close(cache, index, number)
        assert files_of(folder)[0].startswith("train-00000")
    holder.kill()
    holder.join(10)
    open_and_close(cache, index, 1, 2)
    assert not files_of(folder)[0].startswith("train-00000")


def test_room_is_taken_as_soon_as_another_lets_go(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    cache = ShardCache(bucket, index, folder=folder, max_bytes=index.splits["train"][0].size_bytes)
    timer = threading.Timer(0.5, cache.open(index.splits["train"][0]).close)
    started = time.monotonic()
    timer.start()
    open_and_close(cache, index, 1)
    assert time.monotonic() - started > 0.4
    timer.join()


def test_a_cache_full_of_shards_in_use_says_so_in_time(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    cache = ShardCache(
        bucket,
        index,
        folder=folder,
        max_bytes=int(1.5 * index.splits["train"][0].size_bytes),
        timeout_s=0.3,
    )
    with (
        closing(cache.open(index.splits["train"][0])),
        pytest.raises(
            StoreError, match=r"waited 0\.3 s for room for train-00001.*cache\.max_gib.*raise it"
        ),
    ):
        cache.open(index.splits["train"][1])


def test_a_limit_below_one_shard_is_refused(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    with pytest.raises(UserError, match=r"cache\.max_gib"):
        ShardCache(bucket, index, folder=folder, max_bytes=100).open(index.splits["train"][0])


# ----------------------------------------------------------------- when something dies or goes away


class Slow(RemoteFolder):
    """A bucket that stands still in the middle of a download."""

    def download(self, key: str, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{path.name}.0123456789ab.tmp").write_bytes(
            b"half"
        )  # as the store's own temporary file
        with self.log.open("a") as log:
            log.write("begun\n")
        time.sleep(60)
        return super().download(key, path)


def test_a_fetch_that_is_killed_leaves_the_others_free(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    slow = Slow(Path(bucket.uri))
    first = in_child(lambda: open_and_close(ShardCache(slow, index, folder=folder), index, 0))
    wait_until(lambda: slow.downloads() == ["begun"], "the first process to begin")
    second = in_child(lambda: open_and_close(ShardCache(bucket, index, folder=folder), index, 0))
    time.sleep(0.3)
    assert second.is_alive()  # it waits for the first
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second.join(10)
    assert second.exitcode == 0
    assert len(files_of(folder)) == 1  # what the first left is gone
    first.join(10)


def test_a_fetch_that_fails_leaves_the_others_free(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    begun, fail = threading.Event(), threading.Event()

    class Broken(RemoteFolder):
        def download(self, key: str, path: Path) -> str:
            begun.set()
            assert fail.wait(20)
            raise UnreachableError(f"{key} cannot be read")

    broken = ShardCache(Broken(Path(bucket.uri)), index, folder=folder)
    good = ShardCache(bucket, index, folder=folder)
    with ThreadPoolExecutor(3) as pool:
        failing = pool.submit(broken.open, index.splits["train"][0])
        assert begun.wait(20)
        waiting = [pool.submit(good.open, index.splits["train"][0]) for _ in range(2)]
        fail.set()
        with pytest.raises(UnreachableError, match="train-00000"):
            failing.result(20)
        for done in waiting:
            with closing(done.result(20)) as opened:
                assert opened.shard.images.shape == (20, 16, 16)


def test_a_fetch_that_stands_still_is_waited_for_only_so_long(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    slow = Slow(Path(bucket.uri))
    first = in_child(lambda: open_and_close(ShardCache(slow, index, folder=folder), index, 0))
    try:
        wait_until(lambda: slow.downloads() == ["begun"], "the first process to begin")
        with pytest.raises(
            StoreError,
            match=r"waited 0\.5 s for another process to fetch .*train-00000-of-00005\.h5",
        ):
            ShardCache(bucket, index, folder=folder, timeout_s=0.5).open(index.splits["train"][0])
    finally:
        first.kill()
        first.join(10)


def test_a_forked_child_keeps_no_lock_of_its_parent(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    started, end = threading.Event(), _fork.Event()

    class Forking(RemoteFolder):
        def download(self, key: str, path: Path) -> str:
            self.child = in_child(lambda: end.wait(30))
            started.set()
            return super().download(key, path)

    forking = Forking(Path(bucket.uri))
    size_bytes = index.splits["train"][0].size_bytes
    try:
        cache = ShardCache(forking, index, folder=folder, max_bytes=size_bytes)
        open_and_close(cache, index, 0)
        open_and_close(
            ShardCache(bucket, index, folder=folder, max_bytes=size_bytes, timeout_s=1), index, 1, 0
        )
    finally:
        end.set()
        forking.child.join(10)


def test_a_child_that_closes_a_shard_of_its_parent_leaves_it_to_the_parent(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    cache = ShardCache(
        bucket, index, folder=folder, max_bytes=2 * index.splits["train"][0].size_bytes
    )
    with closing(cache.open(index.splits["train"][0])) as opened:
        child = in_child(opened.close)
        child.join(20)
        assert child.exitcode == 0
        open_and_close(cache, index, 1, 2, 3)
        assert files_of(folder)[0].startswith("train-00000")


def test_room_that_a_killed_fetch_had_taken_is_free_again(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    slow, size_bytes = Slow(Path(bucket.uri)), index.splits["train"][0].size_bytes
    first = in_child(
        lambda: open_and_close(
            ShardCache(slow, index, folder=folder, max_bytes=size_bytes), index, 0
        )
    )
    wait_until(lambda: slow.downloads() == ["begun"], "the first process to begin")
    cache = ShardCache(bucket, index, folder=folder, max_bytes=size_bytes, timeout_s=0.3)
    with pytest.raises(StoreError, match=r"waited 0\.3 s for room"):  # two would not fit
        cache.open(index.splits["train"][1])
    first.kill()
    first.join(10)
    open_and_close(cache, index, 1)
    assert len(files_of(folder)) == 1


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder below one that every user of the machine may enter."""
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        yield Path(top) / "cache"


def as_nobody(work: Callable[[], None]) -> None:
    """Run in a child that has no rights beyond what everybody has."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setegid(65534)
            os.seteuid(65534)
        work()

    child = in_child(run)
    child.join(30)
    assert child.exitcode == 0


def test_a_cache_folder_that_is_read_only_serves_what_it_has_and_names_itself(
    index: DatasetIndex, bucket: RemoteFolder, open_folder: Path
) -> None:
    open_and_close(ShardCache(bucket, index, folder=open_folder), index, 0)
    for path in [open_folder, *open_folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work() -> None:
        cache = ShardCache(bucket, index, folder=open_folder)
        open_and_close(cache, index, 0)
        with pytest.raises(
            UserError, match=r"cache folder .*/cache cannot be written: .* --cache\.dir=FOLDER"
        ) as caught:
            open_and_close(cache, index, 1)
        assert "\n" not in str(caught.value)

    as_nobody(work)
    open_folder.chmod(0o755)
    for path in open_folder.rglob("*"):
        path.chmod(0o755)


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from tests.dataset.remote import RemoteFolder
from xrai.dataset.cache import ShardCache
from xrai.dataset.shards import read_index
from xrai.store import open_store
folder = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", folder], check=True)
index = read_index(open_store(sys.argv[1]))
cache = ShardCache(RemoteFolder(Path(sys.argv[1])), index, folder=folder)
try:
    for info in index.splits["train"]:
        cache.open(info).close()
except Exception as error:
    print(type(error).__name__, error)
print([path.name for path in folder.glob("*/*") if path.suffix != ".h5"])
"""


def test_a_disk_that_is_full_names_the_shard_and_keeps_nothing_half_written(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path, repository: Path
) -> None:
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    ):
        pytest.skip("a small disk takes the right to mount one")
    folder.mkdir()
    done = subprocess.run(  # in a name space of its own, where nobody else sees the disk
        ["unshare", "-m", sys.executable, "-c", ON_A_SMALL_DISK, bucket.uri, folder],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()
    assert re.match(
        rf"StoreError {folder}/.*/train-00001-of-00005.* cannot be written: No space left on "
        rf"device; free",
        error,
    )
    assert left == "[]"


def test_a_cache_folder_that_cannot_be_made_is_the_users_mistake(
    bucket: RemoteFolder, index: DatasetIndex, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        UserError,
        match=rf"cache folder {tmp_path}/file/cache cannot be written.*--cache\.dir=FOLDER",
    ):
        open_and_close(ShardCache(bucket, index, folder=tmp_path / "file" / "cache"), index, 0)


def test_a_store_without_the_shard_says_which(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    bucket.delete("train-00002-of-00005.h5")
    store: Store = bucket
    with pytest.raises(StoreError, match=r"there is no .*train-00002-of-00005\.h5"):
        ShardCache(store, index, folder=folder).open(index.splits["train"][2])


def test_a_folder_that_was_replaced_while_it_was_read_says_so(tmp_path: Path, folder: Path) -> None:
    old = write_dataset(tmp_path / "set", {"train": [20, 20]}, seed=0)
    cache = ShardCache(open_store(str(tmp_path / "set")), old, folder=folder)
    open_and_close(cache, old, 0)
    write_dataset(tmp_path / "set", {"train": [20, 20]}, seed=1)
    with pytest.raises(
        DatasetError, match=rf"the data set at {tmp_path}/set was replaced while it was read"
    ):
        cache.open(old.splits["train"][1])


def test_arrays_stay_valid_after_closing_and_cannot_be_written(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    opened = ShardCache(bucket, index, folder=folder).open(index.splits["train"][1])
    opened.close()
    opened.close()  # twice is once
    shutil.rmtree(folder)
    assert place_of(opened.shard.images[:, None]).tolist() == list(range(20, 40))
    with pytest.raises(ValueError, match="read-only"):
        opened.shard.images[0, 0, 0] = 1


def test_a_shard_that_does_not_have_the_rows_of_its_index_is_refused(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path
) -> None:
    wrong = dataclasses.replace(index.splits["train"][0], num_rows=21)
    with pytest.raises(
        CorruptError, match=r"train-00000.* holds images of \(20, 16, 16\), not the 21 of its index"
    ):
        ShardCache(bucket, index, folder=folder).open(wrong)


def test_settling_sees_the_last_thread_out_of_hdf5_and_lets_none_in(
    bucket: RemoteFolder, index: DatasetIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(bucket, index, folder=folder)
    inside, leave = threading.Event(), threading.Event()
    num_opened = 0

    def slow_open_shard(path: Path) -> Shard:
        nonlocal num_opened
        num_opened += 1
        inside.set()
        assert leave.wait(20)
        return open_shard(path)

    monkeypatch.setattr("xrai.dataset.shards.open_shard", slow_open_shard)
    threads = [
        threading.Thread(target=open_and_close, args=(cache, index, number), daemon=True)
        for number in range(3)
    ]
    threads[0].start()
    assert inside.wait(20)
    started = time.monotonic()
    threading.Timer(0.3, leave.set).start()
    cache.settle()
    assert time.monotonic() - started > 0.2
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.3)
    assert num_opened == 1
    cache._mapping_lock().release()
    for thread in threads:
        thread.join(20)
    assert num_opened == 3


def test_a_cache_folder_that_is_a_link_to_nowhere_is_named_with_what_to_do(
    index: DatasetIndex, bucket: RemoteFolder, tmp_path: Path
) -> None:
    (tmp_path / "cache").symlink_to(tmp_path / "not-mounted")
    cache = ShardCache(bucket, index, folder=tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"cache folder .*/cache cannot be written: .* --cache\.dir=FOLDER"
    ):
        cache.open(index.splits["train"][0])
