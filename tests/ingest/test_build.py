import dataclasses
import errno
import hashlib
import inspect
import json
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataset.pictures import dicom_file, source_files, write_files
from xrai.config import Config, Images, Shards, Splits
from xrai.dataset.manifest import Row
from xrai.dataset.shards import DatasetIndex, ShardInfo, compute_fingerprint, read_index
from xrai.errors import CorruptError, DatasetError, SourceError, XraiError
from xrai.ingest import build, decode, hashing
from xrai.ingest.build import Builder
from xrai.ingest.decode import Decoded, decode_rows
from xrai.ingest.hashing import hash_source
from xrai.ingest.plan import Plan, list_source, make_plan, shaping_config
from xrai.ingest.sources import FolderSource, Source
from xrai.ingest.unfinished import Part, Unfinished
from xrai.store import Store, open_store

CONFIG = Config(
    images=Images(size=16, max_set_aside=0.2),
    shards=Shards(rows=10),
    splits=Splits(val_fraction=0.3, test_fraction=0.2),
)


class Job:
    """All that building a data set needs, in a temporary folder."""

    def __init__(self, folder: Path, files: dict[str, bytes], config: Config = CONFIG) -> None:
        self.source: Source = FolderSource(write_files(folder / "source", files))
        self.store: Store = open_store(str(folder / "dataset"))
        self.listing = list_source(self.source)
        self.unfinished = Unfinished(self.store, self.listing, shaping_config(config))
        self.plan: Plan = make_plan(
            self.listing,
            hash_source(self.source, self.listing, None, number=0, num_partitions=1),
            config,
        )

    def builder(self, *, num_workers: int = 1) -> Builder:
        return Builder(self.plan, self.source, self.store, self.unfinished, num_workers=num_workers)

    def rows(self) -> list[Row]:
        return [row for shard in self.plan.shards for row in shard.rows]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, {**source_files(), "train/NORMAL/bad.png": b"no picture"})


def no_report(*_: object) -> dict[str, bytes]:
    return {}


# ----------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_images_come_in_the_order_of_rows_whatever_the_number_of_workers(
    job: Job, num_workers: int
) -> None:
    rows = job.rows()
    found = list(decode_rows(job.source, CONFIG.images, rows, num_workers=num_workers))
    assert len(found) == len(rows)
    for row, picture in zip(rows, found, strict=True):
        again = next(iter(decode_rows(job.source, CONFIG.images, [row], num_workers=1)))
        if isinstance(picture, str):
            assert picture == again == "is not a JPEG, PNG or DICOM file"
            assert row.path.endswith("bad.png")
            continue
        assert isinstance(again, Decoded)
        np.testing.assert_array_equal(picture.pixels, again.pixels)
        assert picture.perceptual_hash == again.perceptual_hash


def test_an_image_that_is_kept_stays_as_it_was_when_workers_use_its_memory_again(job: Job) -> None:
    rows = job.rows() * 8
    assert len(rows) > 2 * decode._IMAGES_A_TASK * (2 * decode._TASKS_AHEAD + 1)
    found = list(decode_rows(job.source, CONFIG.images, rows, num_workers=2))
    alone = list(decode_rows(job.source, CONFIG.images, rows, num_workers=1))
    for picture, other in zip(found, alone, strict=True):
        if isinstance(picture, str):
            assert picture == other
            continue
        assert isinstance(other, Decoded)
        np.testing.assert_array_equal(picture.pixels, other.pixels)
        assert (picture.size, picture.perceptual_hash) == (other.size, other.perceptual_hash)


def test_decoding_stays_a_bounded_number_of_images_ahead(job: Job) -> None:
    rows = job.rows() * 40  # 1,800 rows
    pictures = decode_rows(job.source, CONFIG.images, rows, num_workers=2)
    most = 0
    for _ in pictures:
        most = max(most, len(inspect.getgeneratorlocals(pictures).get("ahead", ())))
    assert 2 <= most <= decode._TASKS_AHEAD * 2 + 1


def test_a_worker_that_is_killed_ends_the_work_in_one_line_that_says_what_to_do(job: Job) -> None:
    pictures = decode_rows(job.source, CONFIG.images, job.rows() * 300, num_workers=2)
    next(pictures)
    executor = inspect.getgeneratorlocals(pictures)["executor"]
    os.kill(next(iter(executor._processes)), signal.SIGKILL)
    with pytest.raises(
        XraiError, match=r"a worker process ended abruptly.*fewer --workers, what is stored is kept"
    ):
        list(pictures)


def test_a_reader_that_stops_early_leaves_no_workers(job: Job) -> None:
    pictures = decode_rows(job.source, CONFIG.images, job.rows() * 40, num_workers=2)
    next(pictures)
    processes = list(inspect.getgeneratorlocals(pictures)["executor"]._processes)
    pictures.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_file_that_is_no_longer_the_one_that_was_hashed_stops_the_work(job: Job) -> None:
    row = dataclasses.replace(job.rows()[0], sha256="0" * 64)
    for num_workers in (1, 2):
        with pytest.raises(SourceError, match="was changed while it was read; start again"):
            list(decode_rows(job.source, CONFIG.images, [row] * 40, num_workers=num_workers))


# ------------------------------------------------------------------------------------------ hashing


def test_stored_hashes_are_not_read_again_and_damaged_ones_are(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_FILES_A_GROUP", 10)
    read: list[str] = []
    original = FolderSource.read
    monkeypatch.setattr(
        FolderSource, "read", lambda self, path: read.append(path) or original(self, path)
    )

    def hashed() -> int:
        read.clear()
        rows = hash_source(job.source, job.listing, job.unfinished, number=0, num_partitions=1)
        assert [(row.path, row.sha256) for row in rows] == [
            (row.path, row.sha256) for row in job.plan.rows
        ]
        return len(read)

    assert hashed() == 45
    assert hashed() == 0
    keys = sorted(entry.key for entry in job.store.list() if "hashes" in entry.key)
    assert len(keys) == 5
    job.store.write(keys[1], b"[[")
    job.store.write(keys[3], b"[]")
    job.store.delete(keys[4])
    assert hashed() == 10 + 10 + 5
    assert hashed() == 0


def test_any_flipped_byte_of_stored_hashes_is_noticed(job: Job) -> None:
    rows = hash_source(job.source, job.listing, job.unfinished, number=0, num_partitions=1)
    (key,) = [entry.key for entry in job.store.list() if "hashes" in entry.key]
    data = job.store.read(key)
    for place in range(0, len(data), 97):
        job.store.write(key, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert (
            hash_source(job.source, job.listing, job.unfinished, number=0, num_partitions=1) == rows
        )


def test_machines_side_by_side_read_the_source_about_once_between_them(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_FILES_A_GROUP", 3)
    read: list[str] = []
    original = FolderSource.read

    def slow(self: FolderSource, path: str) -> bytes:
        read.append(path)
        time.sleep(0.01)
        return original(self, path)

    monkeypatch.setattr(FolderSource, "read", slow)
    machines = [
        threading.Thread(
            target=hash_source,
            args=(job.source, job.listing, job.unfinished),
            kwargs={"number": k, "num_partitions": 3},
        )
        for k in range(3)
    ]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert set(read) == {entry.path for entry in job.listing.layout.rows}
    assert len(read) <= 1.5 * 45


# ------------------------------------------------------------------------------------ parts, commit


def test_a_part_reads_back_as_it_was_written_and_anything_else_is_refused() -> None:
    part = Part(
        "ab",
        ShardInfo("train-00000-of-00001.h5", 3, 99, "cd", (1, 2)),
        {"a": "b"},
        [0] * 256,
        bytearray(range(96)),
        ["train/a.png"],
        ["train/b.dcm"],
    )
    hashes = json.loads(part.to_json())["perceptual_hashes"]
    assert hashes == [bytes(range(k, k + 32)).hex() for k in (0, 32, 64)]
    empty = dataclasses.replace(part, shard=None)
    for one in (part, empty):
        assert Part.from_json(one.to_json()) == one
    for data in (
        b"",
        b"[]",
        b"{}",
        b"\xff",
        json.dumps({"shard": 3}).encode(),
        part.to_json()[:-9],
    ):
        with pytest.raises(CorruptError):
            Part.from_json(data)


def test_a_part_that_was_read_takes_little_more_memory_than_its_hashes() -> None:
    info = ShardInfo("train-00000-of-00001.h5", 8192, 99, "cd", (1, 2))
    data = Part("ab", info, {}, [0] * 256, bytearray(32 * 8192), []).to_json()
    tracemalloc.start()
    try:
        part = Part.from_json(data)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(part.perceptual_hashes) == 32 * 8192
    assert held < 40 * 8192  # as texts in a list they took 121 bytes each


def test_nothing_is_committed_while_a_part_is_missing(job: Job) -> None:
    builder = job.builder()
    builder.build(job.plan.shards[:-1])
    assert builder.commit(no_report) is None
    with pytest.raises(DatasetError, match=r"holds no dataset\.json"):
        read_index(job.store)
    builder.build(job.plan.shards)
    index = builder.commit(no_report)
    assert index is not None and read_index(job.store) == index


@pytest.mark.parametrize("num_workers", [1, 2])
def test_images_of_an_unknown_view_are_used_and_counted_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed (the extra `dicom`)")
    samples = np.arange(1024, dtype="<u2").reshape(32, 32)
    views = ("PA", "LLO", "YES")
    files = {
        f"train/NORMAL/{view}.dcm": dicom_file(
            samples + k, ViewPosition=view, leave_out=("PatientID",)
        )
        for k, view in enumerate(views)
    }
    job = Job(tmp_path, {**source_files(), **files})
    job.builder(num_workers=num_workers).build(job.plan.shards)
    index = job.builder().commit(no_report)  # which reads the stored parts
    assert index and index.counts.num_written == len(source_files()) + 3
    (said,) = (record.getMessage() for record in caplog.records if "View" in record.getMessage())
    assert said.startswith("2 images have a ViewPosition of which nothing is known, such as train/")


def test_a_manifest_that_has_no_room_is_told_in_one_line(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.builder().build(job.plan.shards)

    def full(rows: object) -> Iterator[bytes]:
        yield b"{}"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(build, "manifest_lines", full)
        with pytest.raises(
            XraiError, match=r"manifest\.jsonl in .* cannot be written: No space.* make room there"
        ):
            job.builder().commit(no_report)
    assert job.store.size("dataset.json") is None
    index = job.builder().commit(no_report)
    assert index is not None, "what was stored is kept"
    assert {info.name: info.sha256 for info in index.objects} == {
        "manifest.jsonl": hashlib.sha256(job.store.read("manifest.jsonl")).hexdigest()
    }


def test_a_shard_that_is_stored_is_not_made_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.builder().build(job.plan.shards)
    monkeypatch.setattr(FolderSource, "read", lambda self, path: pytest.fail("read"))
    job.builder().build(job.plan.shards)
    assert job.builder().commit(no_report) is not None


@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_a_shard_damaged_before_the_commit_is_named_and_made_anew_at_the_next_start(
    job: Job, how: str
) -> None:
    job.builder().build(job.plan.shards)
    key = job.plan.shards[1].name
    good = job.store.read(key)
    if how == "removed":
        job.store.delete(key)
    else:
        job.store.write(key, good[:-1] if how == "truncated" else good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptError, match=f"{key} is not what was stored there; start again"):
        job.builder().commit(no_report)
    job.builder().build(job.plan.shards)
    assert job.store.read(key) == good
    assert job.builder().commit(no_report) is not None


def test_the_part_of_another_plan_is_not_taken_for_ours(job: Job, tmp_path: Path) -> None:
    job.builder().build(job.plan.shards)
    other = dataclasses.replace(job.plan, sha256="0" * 64)
    assert (
        Builder(other, job.source, job.store, job.unfinished, num_workers=1).commit(no_report)
        is None
    )


def test_a_second_claim_of_the_same_work_is_welcome_and_another_is_refused(job: Job) -> None:
    job.unfinished.claim()
    job.unfinished.claim()
    other = shaping_config(dataclasses.replace(CONFIG, images=Images(size=32)))
    with pytest.raises(DatasetError, match=r"another source, config or version.*--overwrite"):
        Unfinished(job.store, job.listing, other).claim()


def test_mean_and_deviation_are_those_of_all_train_pixels_to_the_last_digit(job: Job) -> None:
    from fractions import Fraction
    from math import isqrt

    from xrai.dataset.shards import open_shard

    job.builder().build(job.plan.shards)
    index = job.builder().commit(no_report)
    assert index is not None
    paths = [job.store.local_path(info.name) for info in index.splits["train"]]
    pixels = np.concatenate([open_shard(path).images.ravel() for path in paths if path]).astype(
        object
    )
    mean = Fraction(int(pixels.sum()), len(pixels))
    variance = Fraction(int((pixels * pixels).sum()), len(pixels)) - mean**2
    assert index.pixel_mean == float(mean)
    deviation = isqrt(int(variance * 10**30)) / 10**15
    assert index.pixel_std == pytest.approx(deviation, rel=1e-14)


def test_it_is_refused_as_soon_as_it_is_sure_that_too_many_are_bad(tmp_path: Path) -> None:
    bad = {f"train/NORMAL/{k}.png": b"\xff\xd8\xff" + bytes([k]) for k in range(30)}
    files = {**source_files(), **bad}
    job = Job(tmp_path, files)
    with pytest.raises(SourceError, match=r"more than images\.max_set_aside = 0\.2"):
        job.builder().build(job.plan.shards)
    assert len([entry for entry in job.store.list() if "part" in entry.key]) < len(job.plan.shards)


FILES = {**source_files(), "train/NORMAL/bad.png": b"no picture"}


@settings(max_examples=12, deadline=None)
@given(
    num_partitions=st.integers(1, 9),
    order=st.randoms(use_true_random=False),
    num_workers=st.sampled_from([1, 1, 1, 2]),
    shards_before=st.integers(0, 5),
)
def test_fingerprint_and_index_do_not_depend_on_partitions_workers_order_or_what_was_there_before(
    tmp_path_factory: pytest.TempPathFactory,
    num_partitions: int,
    order: Random,
    num_workers: int,
    shards_before: int,
) -> None:
    expected = committed(Job(tmp_path_factory.mktemp("whole"), FILES))
    job = Job(tmp_path_factory.mktemp("parts"), FILES)
    job.builder().build(order.sample(job.plan.shards, min(shards_before, len(job.plan.shards))))
    numbers = list(range(num_partitions))
    order.shuffle(numbers)
    for number in numbers:
        job.builder(num_workers=num_workers).build(job.plan.shards[number::num_partitions])
    index = committed(job)
    assert index == expected
    assert compute_fingerprint(index) == expected.fingerprint


def committed(job: Job) -> DatasetIndex:
    job.builder().build(job.plan.shards)
    index = job.builder().commit(no_report)
    assert index is not None
    return index
