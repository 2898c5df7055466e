"""The loader: the same batches for everyone, each image once, no wait without an end."""

import gc
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataset.remote import RemoteFolder, flip_byte
from tests.dataset.small import FINDINGS, labels_at, place_of, write_dataset
from xrai.dataset.loader import Batch, Loader, LoaderOptions, _Buffers
from xrai.dataset.order import EpochOrder, plan_windows
from xrai.errors import (
    ConfigError,
    CorruptError,
    DatasetError,
    NotFoundError,
    UnreachableError,
    XraiError,
)

pytestmark = pytest.mark.timeout(60)

WORLD_SIZES = (1, 2, 3, 4, 8)
ROWS = [7, 3, 12, 5, 1, 9]  # 37
NUM = sum(ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that no test changes."""
    path = tmp_path_factory.mktemp("loader") / "data"
    write_dataset(path, {"train": ROWS, "val": [4], "test": [6, 5]})
    return path


def make_loader(
    dataset: Any,
    *,
    split: str = "train",
    batch_size: int = 8,
    shuffle: bool = False,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> Loader:
    return Loader(
        str(dataset) if isinstance(dataset, Path) else dataset,
        split=split,
        batch_size=batch_size,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
        options=LoaderOptions(**options),
    )


def rows_of(batches: Iterator[Batch]) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


def expected_batches(
    rows: list[int],
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    window: int = 64,
    shuffle: bool = True,
) -> list[list[int]]:
    """The reference: the order as a whole, cut by a plain loop."""
    whole = (
        EpochOrder(rows, seed=seed, epoch=epoch, window=window, shuffle=shuffle)
        .rows(0, sum(rows))
        .tolist()
    )
    return [whole[start : start + batch_size] for start in range(0, len(whole), batch_size)]


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("xrai-")]


def wait_until(condition: Any, *, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


# ----------------------------------------------------------------------------- the order of batches


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(1, 45),
    window=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
    prefetch=st.integers(1, 4),
    threads=st.integers(1, 6),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_global_batch_k_is_the_same_for_every_world_size_threads_and_restart(
    folder: Path,
    batch_size: int,
    window: int,
    seed: int,
    epoch: int,
    prefetch: int,
    threads: int,
    shuffle: bool,
    data: st.DataObject,
) -> None:
    expected = expected_batches(
        ROWS, batch_size, seed=seed, epoch=epoch, window=window, shuffle=shuffle
    )
    world_size = data.draw(st.sampled_from(WORLD_SIZES))
    start = data.draw(st.integers(0, len(expected)))
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "window": window,
        "seed": seed,
        "shuffle": shuffle,
    }
    ranks = [
        list(
            make_loader(
                folder,
                rank=rank,
                world_size=world_size,
                prefetch=prefetch,
                threads=threads,
                **options,
            ).epoch(epoch, start=start)
        )
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {
        len(expected) - start
    }  # DDP hangs where ranks differ
    for k, parts in enumerate(zip(*ranks, strict=True), start=start):
        assert [row for part in parts for row in part.rows.tolist()] == expected[k]
        assert {part.step for part in parts} == {k}
        assert {part.num_global for part in parts} == {len(expected[k])}
        sizes = [len(part.rows) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for part in parts:
            assert place_of(part.images).tolist() == part.rows.tolist()
            assert (part.labels == part.rows % 2).all()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_restart_at_any_step_goes_on_with_the_same_batches(folder: Path, world_size: int) -> None:
    options: dict[str, Any] = {
        "shuffle": True,
        "seed": 5,
        "window": 2,
        "rank": world_size - 1,
        "world_size": world_size,
    }
    whole = rows_of(make_loader(folder, **options).epoch(3))
    assert len(whole) == 5
    for start in range(6):
        assert rows_of(make_loader(folder, **options).epoch(3, start=start)) == whole[start:]


@pytest.mark.parametrize(("world_size", "start"), [(1, 0), (2, 2), (4, 0)])
def test_findings_are_those_of_their_images_for_every_world_size_and_restart(
    tmp_path: Path, world_size: int, start: int
) -> None:
    write_dataset(tmp_path, {"train": ROWS}, labels=FINDINGS)
    loaders = [
        make_loader(tmp_path, batch_size=12, shuffle=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    everything = labels_at(np.arange(NUM), FINDINGS)
    ranks = [list(loader.epoch(0, start=start)) for loader in loaders]
    expected = expected_batches(ROWS, 12)[start:]
    for rows, parts in zip(expected, zip(*ranks, strict=True), strict=True):
        assert np.concatenate([part.rows for part in parts]).tolist() == rows
        labels = np.concatenate([part.labels for part in parts])  # (12, 3), at last (1, 3)
        assert labels.dtype == np.int8 and np.array_equal(labels, everything[rows])
    assert ranks[0][-1].labels.shape == (int(world_size == 1), 3)
    loader = loaders[-1]
    assert loader.index.labels == FINDINGS and np.array_equal(loader.labels, everything)
    assert np.array_equal(loader.columns("labels", start=5, stop=30)["labels"], everything[5:30])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("batch_size", [1, 4, 5, 11, 100])
def test_evaluation_counts_each_image_once(folder: Path, world_size: int, batch_size: int) -> None:
    loaders = [
        make_loader(folder, split="test", batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [rows_of(iter(loader)) for loader in loaders]
    assert sorted(row for batches in seen for batch in batches for row in batch) == list(range(11))
    assert {len(batches) for batches in seen} == {math.ceil(11 / batch_size)}


def test_four_shards_on_three_ranks_give_every_rank_the_same_number_of_batches(
    tmp_path: Path,
) -> None:
    """WebDataset gives 7, 5 and 5, and training hangs."""
    write_dataset(tmp_path, {"train": [20] * 4})
    counts = [
        len(
            list(
                make_loader(tmp_path, batch_size=12, shuffle=True, rank=rank, world_size=3).epoch(0)
            )
        )
        for rank in range(3)
    ]
    assert counts == [7, 7, 7]


def test_the_last_batch_may_leave_ranks_without_images(folder: Path) -> None:
    parts = [
        list(make_loader(folder, batch_size=12, shuffle=True, rank=rank, world_size=4).epoch(0))[-1]
        for rank in range(4)
    ]
    assert [len(part.rows) for part in parts] == [0, 0, 0, 1]
    assert [part.images.shape for part in parts] == [(0, 1, 16, 16)] * 3 + [(1, 1, 16, 16)]
    assert all(part.num_global == 1 and part.step == 3 for part in parts)


def test_batches_are_plain_arrays_of_their_own(folder: Path) -> None:
    (batch,) = make_loader(folder, split="val", batch_size=10).epoch(0)
    assert (batch.images.shape, batch.images.dtype) == ((4, 1, 16, 16), np.uint8)
    assert (batch.labels.dtype, batch.rows.dtype) == (np.uint8, np.int64)
    assert batch.images.flags.c_contiguous
    batch.images[:] = 0  # nobody else's
    (again,) = make_loader(folder, split="val", batch_size=10).epoch(0)
    assert again.images.any()


def test_the_images_are_the_stored_bytes(folder: Path) -> None:
    loader = make_loader(folder, shuffle=True, window=2)
    with h5py.File(folder / loader.index.splits["train"][2].name) as file:
        stored = file["images"][:]
    images = np.concatenate([batch.images[:, 0] for batch in loader.epoch(0)])
    rows = np.concatenate([batch.rows for batch in loader.epoch(0)])
    assert np.array_equal(images[np.argsort(rows)][10:22], stored)


def test_iterating_goes_from_epoch_to_epoch(folder: Path) -> None:
    loader = make_loader(folder, shuffle=True, seed=2)
    seen = [rows_of(iter(loader)) for _ in range(3)]
    assert seen == [expected_batches(ROWS, 8, seed=2, epoch=epoch) for epoch in range(3)]
    assert loader.num_batches == 5
    assert rows_of(loader.epoch(1)) == seen[1]


def test_two_epochs_may_be_read_at_once(folder: Path) -> None:
    loader = make_loader(folder, shuffle=True, window=2)
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert [pair[0].rows.tolist() for pair in pairs] == expected_batches(ROWS, 8, epoch=0, window=2)
    assert [pair[1].rows.tolist() for pair in pairs] == expected_batches(ROWS, 8, epoch=1, window=2)


def test_columns_belong_to_the_rows(folder: Path) -> None:
    loader = make_loader(folder)
    assert loader.num_images == NUM
    assert loader.labels.tolist() == [row % 2 for row in range(NUM)]
    columns = loader.columns("source", "patient", "subtype", "width", "height")
    assert columns["source"].tolist() == [f"train/{row}.png" for row in range(NUM)]
    assert columns["patient"].tolist() == [f"IM/{row}" for row in range(NUM)]
    assert columns["subtype"].tolist() == ["bacterial" if row % 2 else "" for row in range(NUM)]
    assert columns["width"].tolist() == [1000 + row for row in range(NUM)]
    assert columns["height"].tolist() == [800 + row for row in range(NUM)]
    assert columns["width"].dtype == columns["height"].dtype == np.uint32


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 5), (7, 31), (NUM - 1, NUM), (NUM - 3, NUM + 10)]
)
def test_columns_of_some_rows_open_the_shards_of_these_alone_once_each_and_keep_nothing(
    tmp_path: Path, start: int, stop: int | None
) -> None:
    write_dataset(tmp_path / "data", {"train": ROWS})
    bucket = RemoteFolder(tmp_path / "data")
    loader = make_loader(bucket, cache_dir=tmp_path / "cache")
    columns = loader.columns("labels", "source", "width", start=start, stop=stop)
    places = range(NUM)[start:stop]
    assert columns["labels"].tolist() == [row % 2 for row in places]
    assert columns["source"].tolist() == [f"train/{row}.png" for row in places]
    assert columns["width"].tolist() == [1000 + row for row in places]
    firsts = np.cumsum([0, *ROWS[:-1]])
    used = [
        first < places.stop and first + rows > start
        for first, rows in zip(firsts, ROWS, strict=True)
    ]
    names = [
        shard.name
        for shard, is_used in zip(loader.index.splits["train"], used, strict=True)
        if is_used
    ]
    assert bucket.downloads() == names
    assert not {"labels", "source", "width"} & set(vars(loader))


@pytest.mark.parametrize(
    ("names", "start", "stop", "words"),
    [
        (
            ["labels", "images"],
            0,
            None,
            "no column 'images'; the columns are labels, source, patient",
        ),
        (["labels"], NUM, None, f"no rows {NUM} to {NUM} in a split of {NUM} images"),
        (["labels"], 3, 3, "no rows 3 to 3"),
        (["labels"], -1, 3, "no rows -1 to 3"),
    ],
)
def test_columns_and_rows_that_are_not_there_are_refused(
    folder: Path, names: list[str], start: int, stop: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_loader(folder).columns(*names, start=start, stop=stop)


def test_labels_are_read_without_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("no text is needed")

    monkeypatch.setattr(h5py.Dataset, "asstr", refuse)
    assert make_loader(folder).labels.tolist() == [row % 2 for row in range(NUM)]


# ----------------------------------------------------------------------------------- ahead, in time


def test_the_first_batch_needs_one_shard(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": [8, 8]})
    ((first,), (second,)) = plan_windows(2, seed=0, epoch=0, window=64, shuffle=True)
    store = RemoteFolder(tmp_path / "data", slow_key=f"train-0000{second}")
    batches = make_loader(store, shuffle=True, cache_dir=tmp_path / "cache").epoch(0)
    assert set(next(batches).rows.tolist()) == set(range(8 * first, 8 * first + 8))
    store.open_gate()
    assert len(list(batches)) == 1


def test_shards_are_fetched_ahead_of_their_use_several_at_once_after_the_first(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path / "data", {"train": [8] * 12})
    seed = next(
        k
        for k in range(99)
        if plan_windows(12, seed=k, epoch=0, window=64, shuffle=True)[0] == (11,)
    )
    store = RemoteFolder(tmp_path / "data", slow_key="train")
    batches = make_loader(
        store, shuffle=True, seed=seed, threads=3, cache_dir=tmp_path / "cache"
    ).epoch(0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, batches)
        try:
            wait_until(lambda: store.num_downloads() == 1)
            time.sleep(0.1)
            assert store.downloads() == ["train-00011-of-00012.h5"]  # it has the network to itself
        finally:
            store.open_gate()
        assert len(first.result(timeout=10).rows) == 8
    batches.close()

    store = RemoteFolder(tmp_path / "data", slow_key="train-0000")
    store.log.unlink()
    store.close_gate()
    batches = make_loader(
        store, shuffle=True, seed=seed, threads=3, cache_dir=tmp_path / "other"
    ).epoch(0)
    next(batches)
    try:
        wait_until(lambda: store.num_downloads("train-0000") == 3)
        time.sleep(0.1)
        assert store.num_downloads("train-0000") == 3
    finally:
        store.open_gate()
    assert len(list(batches)) == 11
    assert store.num_downloads() == 12


def test_an_epoch_of_shards_that_are_mapped_needs_no_threads_that_fetch(
    folder: Path, tmp_path: Path
) -> None:
    store = RemoteFolder(folder)
    for limit, expected in ((0.0, False), (1.0, True)):
        loader = make_loader(
            store, shuffle=True, batch_size=4, cache_dir=tmp_path / str(limit), cache_max_gib=limit
        )
        list(loader.epoch(0))
        with closing(loader.epoch(1)) as batches:
            next(batches)
            names = [thread.name for thread in threading.enumerate()]
            assert "xrai-assemble" in names
            assert any(name.startswith("xrai-fetch") for name in names) is expected
        del loader, batches
        assert opened_now(tmp_path) == set()  # nothing waits for the garbage collector


def test_a_mapped_shard_that_left_the_cache_is_fetched_again_by_a_thread_that_fetches(
    folder: Path, tmp_path: Path
) -> None:
    store = RemoteFolder(folder)
    loader = make_loader(store, cache_dir=tmp_path / "cache")
    expected = [batch.images.tolist() for batch in loader.epoch(0)]
    store.log.unlink()
    lost = next((tmp_path / "cache").rglob("train-00001*.h5"))
    lost.unlink()
    fetchers = set()
    found = []
    for batch in loader.epoch(0):
        fetchers |= {
            thread.name for thread in threading.enumerate() if thread.name.startswith("xrai-fetch")
        }
        found.append(batch.images.tolist())
    assert found == expected
    assert [name.split("-of-")[0] for name in store.downloads()] == ["train-00001"]
    assert fetchers


def test_no_more_batches_are_made_ahead_than_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = Loader._batches

    def counted(self: Loader, *arguments: Any) -> Iterator[Batch]:
        for batch in original(self, *arguments):
            made.append(batch.step)
            yield batch

    monkeypatch.setattr(Loader, "_batches", counted)
    batches = make_loader(folder, batch_size=1, prefetch=3).epoch(0)
    next(batches)
    wait_until(lambda: len(made) >= 5)
    time.sleep(0.1)  # to make another one, if it would
    assert made == [0, 1, 2, 3, 4]  # one is used, three are ready, one waits for room
    batches.close()


def test_the_pixels_do_not_go_through_h5py(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_loader(folder, batch_size=1, shuffle=True, prefetch=1, threads=6).epoch(0)
    next(batches)
    wait_until(lambda: len(opened_now(folder)) == len(ROWS))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("h5py on the hot path")

    monkeypatch.setattr(h5py, "File", refuse)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    with closing(batches):
        for batch in islice(batches, 6):
            assert place_of(batch.images).tolist() == batch.rows.tolist()


def opened_now(folder: Path) -> set[str]:
    """Shards below a folder that this process has mapped. Errors of earlier tests may hold others
    in their tracebacks.
    """
    return {
        name
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(".h5") and (name := line.split()[-1]).startswith(f"{folder}/")
    }


def test_what_the_wait_was_for_is_measured(folder: Path, tmp_path: Path) -> None:
    store = RemoteFolder(folder, slow_key="\0")
    loader = make_loader(store, cache_dir=tmp_path / "cache")
    assert set(loader.timings()) == {"fetch", "verify", "assemble", "wait"}
    list(loader.epoch(0))
    timings = loader.timings()
    assert min(timings["fetch"], timings["assemble"], timings["wait"]) > 0
    loader.epoch(1)
    assert loader.timings() == dict.fromkeys(timings, 0.0)


# ------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_closing_early_ends_the_threads_and_lets_the_files_go(
    folder: Path, num_read: int, tmp_path: Path
) -> None:
    own = shutil.copytree(folder, tmp_path / "data")
    batches = make_loader(own, batch_size=1, shuffle=True).epoch(0)
    list(islice(batches, num_read))
    batches.close()
    assert our_threads() == []
    assert opened_now(own) == set()


def test_leaving_the_loop_ends_the_threads(folder: Path) -> None:
    for _ in make_loader(folder, batch_size=1, shuffle=True):
        assert our_threads() != []
        break
    assert our_threads() == []


def test_many_epochs_leave_no_file_thread_or_shared_memory_behind(
    folder: Path, tmp_path: Path
) -> None:
    def held() -> tuple[int, list[str]]:
        gc.collect()  # what earlier tests have left open
        return len(os.listdir("/proc/self/fd")), our_threads()  # noqa: PTH208

    loader = make_loader(RemoteFolder(folder), shuffle=True, cache_dir=tmp_path / "cache")
    list(loader.epoch(0))
    before, shared = held(), {*Path("/dev/shm").iterdir()}
    for epoch in range(1, 6):
        list(islice(loader.epoch(epoch), epoch))
    assert held() == before
    deadline = time.monotonic() + 30  # tests beside this one share memory for a while
    while (left := {*Path("/dev/shm").iterdir()} - shared) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_a_child_after_fork_reads_the_same(folder: Path) -> None:
    loader = make_loader(folder, shuffle=True)
    first = rows_of(loader.epoch(0))
    child = os.fork()
    if child == 0:
        os._exit(0 if rows_of(loader.epoch(0)) == first else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_forked_in_an_epoch_ends_and_leaves_the_epoch_to_its_parent(
    folder: Path, tmp_path: Path
) -> None:
    size_bytes = max(path.stat().st_size for path in folder.glob("train*.h5"))
    options: dict[str, Any] = {
        "cache_dir": tmp_path,
        "cache_max_gib": 5 * size_bytes / 2**30,
        "batch_size": 1,
    }
    batches = make_loader(RemoteFolder(folder), prefetch=1, **options).epoch(0)
    first = next(batches)
    child = os.fork()
    if child == 0:
        batches.close()
        os._exit(0)
    wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child)
    (in_use,) = tmp_path.glob("*/train-00000*.h5")
    other = make_loader(RemoteFolder(folder), split="test", **options, timeout_s=5)
    assert len(list(other.epoch(0))) == 11  # in the room that the open shards leave
    assert in_use.exists()
    assert [first.rows[0], *(batch.rows[0] for batch in batches)] == list(range(NUM))


LEAVES_EARLY = """
import sys
from pathlib import Path
from tests.dataset.remote import RemoteFolder
from xrai.dataset.loader import Loader, LoaderOptions
store = RemoteFolder(Path(sys.argv[1]), slow_key="train-00001")
options = LoaderOptions(cache_dir=sys.argv[2], threads=6)
batches = iter(Loader(store, split="train", batch_size=1, options=options))
for _ in range(7):
    next(batches)
print("left")
if sys.argv[3] == "raise":
    raise SystemExit(7)
"""


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("raise", 7)])
def test_a_process_ends_though_a_shard_is_still_waited_for(
    folder: Path, tmp_path: Path, repository: Path, how: str, status: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_EARLY, folder, tmp_path, how],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("left\n", "", status)


LEAVES_AT_ONCE = """
import sys
from pathlib import Path
from tests.dataset.remote import RemoteFolder
from tests.dataset.small import write_dataset
from xrai.dataset.loader import Loader, LoaderOptions
folder = Path(sys.argv[1])
write_dataset(folder / "data", {"train": [40] * 20})
options = LoaderOptions(cache_dir=folder / "cache", threads=8)
batches = iter(Loader(RemoteFolder(folder / "data"), split="train", batch_size=1, options=options))
next(batches)
"""


def test_a_process_that_leaves_while_shards_are_opened_neither_crashes_nor_hangs(
    tmp_path: Path, repository: Path
) -> None:
    for run in range(5):  # without care every second one hangs or crashes
        done = subprocess.run(
            [sys.executable, "-c", LEAVES_AT_ONCE, tmp_path / str(run)],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------- faults


@pytest.fixture
def spoiled(folder: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    return shutil.copytree(folder, tmp_path / "spoiled")


def failure_of(batches: Iterator[Batch]) -> tuple[int, XraiError]:
    """How many batches came, and the error that ended them."""
    num = 0
    try:
        for _ in batches:
            num += 1
    except XraiError as error:
        return num, error
    raise AssertionError("it did not fail")


def test_an_error_in_the_background_comes_to_the_front_with_rank_split_shard_and_cause(
    spoiled: Path,
) -> None:
    flip_byte(spoiled / "train-00002-of-00006.h5")
    loader = make_loader(spoiled, batch_size=5, rank=1, world_size=2)
    num, error = failure_of(loader.epoch(0))
    assert isinstance(error, CorruptError)
    assert num == 2  # the shard begins at row 10
    assert str(error).startswith("rank 1 of 2, train split: ")
    assert f"{spoiled}/train-00002-of-00006.h5 is damaged: its sha256 is" in str(error)
    assert our_threads() == []
    assert isinstance(failure_of(loader.epoch(0))[1], CorruptError)  # the second time too


def test_a_shard_that_cannot_be_fetched_is_named(folder: Path, tmp_path: Path) -> None:
    store = RemoteFolder(folder, failing="train-00003")
    num, error = failure_of(make_loader(store, cache_dir=tmp_path).epoch(0))
    assert (num, type(error)) == (2, UnreachableError)
    assert "rank 0 of 1, train split" in str(error)
    assert "train-00003-of-00006.h5 cannot be read: nobody answers" in str(error)


def test_an_error_of_a_shard_that_nobody_asks_for_is_none(folder: Path, tmp_path: Path) -> None:
    store = RemoteFolder(folder, failing="train-00003")
    batches = make_loader(store, cache_dir=tmp_path, prefetch=1).epoch(0)
    with closing(batches):
        assert [batch.step for batch in islice(batches, 2)] == [0, 1]


def test_a_wait_for_a_shard_has_a_deadline_and_names_the_shard(
    folder: Path, tmp_path: Path
) -> None:
    store = RemoteFolder(folder, slow_key="train-00001")
    batches = make_loader(store, cache_dir=tmp_path, timeout_s=0.5).epoch(0)
    with pytest.raises(
        UnreachableError,
        match=r"rank 0 of 1, train split: no batch within 1 s; waiting for shard "
        r"train-00001-of-00006.h5",
    ):
        list(batches)
    store.open_gate()
    wait_until(lambda: our_threads() == [])


def test_a_data_set_replaced_between_epochs_is_said_to_be(spoiled: Path) -> None:
    loader = make_loader(spoiled)
    list(loader.epoch(0))
    shutil.rmtree(spoiled)
    write_dataset(spoiled, {"train": ROWS}, seed=9)
    _, error = failure_of(loader.epoch(1))
    assert isinstance(error, DatasetError)
    assert "was replaced while it was read" in str(error)
    assert "start again" in str(error)


def test_a_lost_shard_is_named(spoiled: Path) -> None:
    (spoiled / "train-00001-of-00006.h5").unlink()
    num, error = failure_of(make_loader(spoiled, batch_size=7).epoch(0))
    assert (num, type(error)) == (1, NotFoundError)
    assert "train-00001-of-00006.h5" in str(error)


@pytest.mark.parametrize("place", [5, 100, 1000, -10])
def test_a_flipped_byte_in_the_index_is_refused(spoiled: Path, place: int) -> None:
    flip_byte(spoiled / "dataset.json", place)
    with pytest.raises(CorruptError, match=f"{spoiled}/dataset.json is"):
        make_loader(spoiled)


@pytest.mark.parametrize(("num_bad", "num_reads"), [(2, 3), (9, 3)])
def test_an_index_of_a_bucket_that_arrives_damaged_is_read_again(
    folder: Path, num_bad: int, num_reads: int
) -> None:
    reads = 0

    class Noisy(RemoteFolder):
        def read(self, key: str, **limits: int) -> bytes:
            nonlocal reads
            reads += 1
            data = super().read(key, **limits)
            return data[:-9] if reads <= num_bad else data

    if num_bad < num_reads:
        assert make_loader(Noisy(folder)).num_images == NUM
    else:
        with pytest.raises(CorruptError, match=f"{folder}/dataset.json is"):
            make_loader(Noisy(folder))
    assert reads == num_reads


def test_no_index_is_no_data_set(spoiled: Path) -> None:
    (spoiled / "dataset.json").unlink()
    with pytest.raises(
        DatasetError, match=rf"{spoiled} holds no dataset.json, so no data set; `xrai prep"
    ):
        make_loader(spoiled)


def test_an_unknown_split_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": [3], "val": [2]})
    with pytest.raises(DatasetError, match="has no split 'test'; it holds train, val"):
        make_loader(tmp_path, split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0 is not allowed"),
        ({"threads": 0}, "threads = 0 is not allowed"),
        ({"window": -1}, "window = -1 is not allowed"),
        ({"prefetch": 0}, "prefetch = 0 is not allowed"),
        ({"rank": 2, "world_size": 2}, "rank = 2 of 2"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loader(folder, **options)


@pytest.mark.parametrize("start", [-1, 6])
def test_a_step_that_is_not_there_is_refused(folder: Path, start: int) -> None:
    with pytest.raises(ConfigError, match=f"epoch 0 has no step {start}: steps go from 0 to 5"):
        make_loader(folder).epoch(0, start=start)


# -------------------------------------------------------- a cache that is smaller than the data set


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty shards of 40 rows, about 18 KiB each."""
    path = tmp_path_factory.mktemp("many") / "data"
    write_dataset(path, {"train": [40] * 20})
    return path


def gib_for(many: Path, num_shards: int) -> float:
    return num_shards * max(path.stat().st_size for path in many.glob("*.h5")) / 2**30


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files, some of which another thread may be removing."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_small_cache_gives_the_same_batches_within_its_limit(
    many: Path, tmp_path: Path, world_size: int
) -> None:
    options: dict[str, Any] = {
        "batch_size": 16,
        "shuffle": True,
        "window": 2,
        "threads": 2,
        "prefetch": 1,
    }
    limit = gib_for(many, 4 if world_size == 1 else 7)
    store = RemoteFolder(many)
    step = threading.Barrier(
        world_size, timeout=30
    )  # ranks that train wait for each other at every step

    def read(rank: int) -> list[list[int]]:
        loader = make_loader(
            store,
            rank=rank,
            world_size=world_size,
            cache_dir=tmp_path,
            cache_max_gib=limit,
            timeout_s=20,
            **options,
        )
        seen = []
        for batch in loader.epoch(0):
            step.wait()
            assert place_of(batch.images).tolist() == batch.rows.tolist()
            assert size_of(tmp_path.glob("*/*.h5")) <= limit * 2**30
            seen.append(batch.rows.tolist())
        return seen

    with ThreadPoolExecutor(world_size) as pool:
        ranks = list(pool.map(read, range(world_size)))
    joined = [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]
    assert joined == expected_batches([40] * 20, 16, window=2)


@pytest.mark.parametrize(("world_size", "num_held"), [(1, 4), (2, 6), (3, 6)])
def test_a_cache_too_small_for_its_windows_is_refused_before_any_work(
    many: Path, tmp_path: Path, world_size: int, num_held: int
) -> None:
    options: dict[str, Any] = {
        "shuffle": True,
        "window": 2,
        "threads": 2,
        "world_size": world_size,
        "cache_dir": tmp_path,
    }
    make_loader(RemoteFolder(many), cache_max_gib=gib_for(many, num_held), **options)
    with pytest.raises(
        ConfigError,
        match=rf"cache.max_gib = .* is too small for the train split of {many}, of which up to "
        rf"{num_held} shards are "
        r"held at once; give at least .*, or lower loader.window or loader.threads",
    ):
        make_loader(RemoteFolder(many), cache_max_gib=gib_for(many, num_held) * 0.99, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_needs_no_cache_and_so_no_room(many: Path) -> None:
    assert len(list(make_loader(many, shuffle=True, cache_max_gib=1e-9).epoch(0))) == 100


def test_memory_of_a_batch_is_used_again_only_when_no_view_of_it_is_held() -> None:
    buffers = _Buffers(4)
    first = buffers.take(3)
    view = first[1:].reshape(-1)
    address = first.ctypes.data
    del first
    assert buffers.take(3).ctypes.data != address
    del view
    assert address in {batch.ctypes.data for batch in [buffers.take(3), buffers.take(2)]}


@pytest.mark.parametrize(
    "hold",
    [
        lambda images: images,
        lambda images: images[:, 0],
        lambda images: images.reshape(-1).view(np.int8),
        memoryview,
        torch.from_numpy,
        lambda images: torch.from_numpy(images)[:, 0].unsqueeze(1).permute(0, 2, 3, 1),
        torch.utils.dlpack.from_dlpack,
    ],
    ids=["itself", "view", "view of a view", "memoryview", "tensor", "view of a tensor", "dlpack"],
)
def test_images_stay_as_they_are_while_anything_of_their_batch_is_held(
    folder: Path, hold: Any
) -> None:
    loader = make_loader(folder, batch_size=2, shuffle=True)
    held, expected = [], []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            expected.append(batch.images.tobytes())
            held.append(hold(batch.images))
    assert len(held) > 3 * 8, "more than the memory that is kept for reuse"
    flat = [np.ascontiguousarray(kept).tobytes() for kept in held]
    assert [sorted(found) for found in flat] == [sorted(found) for found in expected]
    assert len({np.asarray(kept).__array_interface__["data"][0] for kept in held}) == len(held)
