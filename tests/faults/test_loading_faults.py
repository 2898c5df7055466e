"""Loading from a real S3 server while the network, the server, the objects and the cache fail
for real.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dataset.remote import flip_byte
from tests.dataset.small import write_dataset
from tests.faults.buckets import new_bucket, use_endpoint
from tests.faults.proxy import Kind, Proxy
from tests.faults.reader import digest
from xrai.dataset.loader import Loader, LoaderOptions
from xrai.errors import CorruptError, DatasetError, NotFoundError, UnreachableError
from xrai.store import open_store

pytestmark = [pytest.mark.s3, pytest.mark.timeout(120)]

ROWS = [64] * 6
NUM_BATCHES = 24
OPTIONS = {"window": 2, "threads": 2, "prefetch": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 64 x 64 pixels, 270 KiB each: more than the store takes from the network at
    once.
    """
    path = tmp_path_factory.mktemp("faults") / "data"
    write_dataset(path, {"train": ROWS}, size=64)
    return path


@pytest.fixture(scope="module")
def good(folder: Path) -> list[str]:
    """What an epoch gives where nothing fails."""
    return [digest(batch) for batch in make_loader(str(folder), None).epoch(0)]


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """All s3:// addresses lead through it. A request may be a second without an answer."""
    with Proxy(s3_server) as made:
        use_endpoint(monkeypatch, made.url)
        monkeypatch.setenv("XRAI_S3_TIMEOUT_S", "1")
        monkeypatch.setenv("XRAI_S3_RETRY_S", "15")
        yield made


@pytest.fixture
def address(folder: Path, s3_server: str, proxy: Proxy) -> Iterator[str]:
    """The data set in a bucket behind the proxy."""
    with new_bucket(s3_server) as bucket:
        upload(folder, f"s3://{bucket}/chest")
        proxy.requests.clear()
        yield f"s3://{bucket}/chest"


def upload(folder: Path, address: str) -> None:
    store = open_store(address)
    for path in sorted(folder.glob("*.h5")):
        store.upload(path.name, path)
    store.write("dataset.json", (folder / "dataset.json").read_bytes())


def make_loader(address: str, cache: Path | None, **changes: float) -> Loader:
    options = LoaderOptions(**{"cache_dir": cache, **OPTIONS, **changes})  # type: ignore[arg-type]
    return Loader(address, split="train", batch_size=16, shuffle=True, options=options)


def read(address: str, cache: Path, **changes: float) -> list[str]:
    return [digest(batch) for batch in make_loader(address, cache, **changes).epoch(0)]


def start_reader(address: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.reader", address, str(cache)]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome_of(
    reader: subprocess.Popen[str], *, timeout_s: float = 60
) -> tuple[int, list[str], list[str]]:
    """Exit status, batches, and the lines of its error."""
    try:
        stdout, stderr = reader.communicate(timeout=timeout_s)
    finally:
        reader.kill()
    return (
        reader.returncode,
        stdout.splitlines(),
        [line for line in stderr.splitlines() if line.startswith("xrai:")],
    )


# --------------------------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("kind", ["503", "stall", "reset", "cut", "flip", "lose"])
def test_a_fault_that_passes_changes_nothing(
    kind: Kind, address: str, proxy: Proxy, tmp_path: Path, good: list[str]
) -> None:
    proxy.fail(kind, path="train-00002", times=2)
    proxy.fail(kind, path="train-00004", times=1)
    assert read(address, tmp_path) == good
    assert proxy.count("train-00002") >= 3


def test_every_request_that_fails_now_and_then_changes_nothing(
    address: str, proxy: Proxy, tmp_path: Path, good: list[str]
) -> None:
    for kind in ("503", "reset", "cut"):
        for shard in range(6):
            proxy.fail(kind, path=f"train-0000{shard}")
    assert read(address, tmp_path) == good


@pytest.mark.parametrize("kind", ["flip", "cut", "503", "reset"])
def test_an_index_that_arrives_damaged_is_read_again(
    kind: Kind, address: str, proxy: Proxy, tmp_path: Path, good: list[str]
) -> None:
    proxy.fail(kind, path="dataset.json", times=2)
    assert read(address, tmp_path) == good
    assert proxy.count("dataset.json") >= 3


@pytest.mark.slow
def test_loading_goes_on_when_the_server_was_gone_for_twenty_seconds(
    address: str, proxy: Proxy, tmp_path: Path, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XRAI_S3_TIMEOUT_S")
    monkeypatch.delenv("XRAI_S3_RETRY_S")
    batches = make_loader(address, tmp_path).epoch(0)
    seen = [digest(next(batches))]
    proxy.vanish()
    back = threading.Timer(20, proxy.appear)
    started = time.monotonic()
    back.start()
    seen += [digest(batch) for batch in batches]
    assert time.monotonic() - started > 19
    assert seen == good
    back.join()


# ------------------------------------------------------------------------------- faults that do not


def test_a_server_that_is_gone_for_good_ends_the_job_in_time_with_the_shard_and_the_cause(
    address: str, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fail("stall", path="train-00003", times=1000)
    reader = start_reader(address, tmp_path, XRAI_S3_TIMEOUT_S="1", XRAI_S3_RETRY_S="4")
    deadline = time.monotonic() + 20
    while not proxy.count("train-00003"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    proxy.vanish()
    status, batches, (line,) = outcome_of(reader)
    assert status == 1
    assert len(batches) < NUM_BATCHES
    assert line.startswith("xrai: error: rank 0 of 1, train split: ")
    shard = re.search(
        rf"{address}/train-0000\d-of-00006.h5 cannot be read: no success in \d+ tries within 4 s",
        line,
    )
    assert shard, line
    assert f"(endpoint {proxy.url}): Could not connect to the endpoint URL" in line


def test_a_shard_that_stalls_for_ever_is_named_in_time(
    address: str, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fail("stall", path="train-00001", times=1000)
    with pytest.raises(
        UnreachableError,
        match=r"rank 0 of 1, train split: no batch within 3 s; waiting for shard train-0",
    ):
        read(address, tmp_path, timeout_s=3)


def test_an_object_that_always_arrives_damaged_is_an_error_each_time(
    address: str, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fail("flip", path="train-00003", times=1000)
    for attempt in (1, 2):  # MosaicML streaming reads it as good the second time
        with pytest.raises(
            CorruptError,
            match=rf"{address}/train-00003-of-00006.h5 is damaged: in 3 fetches its sha256",
        ):
            read(address, tmp_path)
        assert proxy.count("train-00003") == 3 * attempt
    assert list(tmp_path.glob("*/train-00003*")) == []


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_object_is_named_with_exit_status_1(
    folder: Path, address: str, tmp_path: Path, damage: str
) -> None:
    copy = tmp_path / "copy.h5"
    copy.write_bytes((folder / "train-00005-of-00006.h5").read_bytes())
    flip_byte(copy) if damage == "flip" else os.truncate(copy, 100_000)
    open_store(address).upload("train-00005-of-00006.h5", copy)
    for _ in range(2):
        status, batches, (line,) = outcome_of(start_reader(address, tmp_path / "cache"))
        assert (status, len(batches) < NUM_BATCHES) == (1, True)
        assert f"shard {address}/train-00005-of-00006.h5 is damaged" in line
        assert f"`xrai verify --dataset {address} --repair --source SOURCE`" in line


def test_a_damaged_index_is_named_with_exit_status_1(
    folder: Path, address: str, tmp_path: Path
) -> None:
    copy = tmp_path / "dataset.json"
    copy.write_bytes((folder / "dataset.json").read_bytes())
    flip_byte(copy)
    open_store(address).upload("dataset.json", copy)
    status, batches, (line,) = outcome_of(start_reader(address, tmp_path / "cache"))
    assert (status, batches) == (1, [])
    assert f"{address}/dataset.json" in line


def test_a_lost_object_is_named(address: str, tmp_path: Path) -> None:
    open_store(address).delete("train-00002-of-00006.h5")
    with pytest.raises(NotFoundError, match=rf"there is no {address}/train-00002-of-00006.h5"):
        read(address, tmp_path)


def test_keys_that_lost_their_right_in_mid_epoch_are_the_users_mistake(
    address: str, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fail("forbid", path="train-00004", times=1000)
    # nothing is tried again: that would take the ten minutes
    status, _, (line,) = outcome_of(start_reader(address, tmp_path, XRAI_S3_RETRY_S="600"))
    assert status == 2
    assert f"{address}/train-00004-of-00006.h5 cannot be read: forbidden (AccessDenied" in line


# --------------------------------------------------------------------------------- another data set


def test_a_data_set_replaced_while_it_is_read_is_said_to_be(
    address: str, proxy: Proxy, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "new", {"train": ROWS}, size=64, seed=1)
    loader = make_loader(address, tmp_path / "cache")
    upload(tmp_path / "new", address)
    with pytest.raises(
        DatasetError, match=rf"the data set at {address} was replaced while it was read"
    ):
        list(loader.epoch(0))


def test_a_cache_filled_from_the_data_set_before_is_not_read(
    address: str, tmp_path: Path, good: list[str]
) -> None:
    assert read(address, tmp_path / "cache") == good
    write_dataset(tmp_path / "new", {"train": ROWS}, size=64, seed=1)
    upload(tmp_path / "new", address)
    seen = read(address, tmp_path / "cache")
    assert seen == read(str(tmp_path / "new"), tmp_path / "cache")
    assert set(seen).isdisjoint(good)


def test_data_sets_with_alike_shard_names_share_a_cache_without_mixing(
    s3_server: str, address: str, tmp_path: Path, good: list[str]
) -> None:
    """WebDataset keeps objects whose names share a last part in one file."""
    write_dataset(tmp_path / "other", {"train": ROWS}, size=64, seed=1)
    with new_bucket(s3_server) as bucket:
        upload(tmp_path / "other", f"s3://{bucket}/chest")
        for _ in range(2):
            assert read(address, tmp_path / "cache") == good
            other = read(f"s3://{bucket}/chest", tmp_path / "cache")
            assert set(other).isdisjoint(good)


# ------------------------------------------------------------------------------- one cache for many


def test_processes_download_a_shard_once_and_see_the_same(
    address: str, proxy: Proxy, tmp_path: Path, good: list[str]
) -> None:
    readers = [start_reader(address, tmp_path / "cache") for _ in range(3)]
    for reader in readers:
        status, batches, errors = outcome_of(reader)
        assert (status, errors) == (0, [])
        assert batches == [f"{step} {batch}" for step, batch in enumerate(good)]
    assert [proxy.count(f"train-0000{shard}") for shard in range(6)] == [1] * 6


def test_a_run_after_the_first_asks_for_nothing_but_the_index(
    address: str, proxy: Proxy, tmp_path: Path, good: list[str]
) -> None:
    assert read(address, tmp_path) == good
    proxy.requests.clear()
    assert read(address, tmp_path) == good
    assert [request.path.rpartition("/")[2] for request in proxy.requests] == ["dataset.json"]


def test_a_process_that_cannot_fetch_leaves_the_others_reading(
    s3_server: str, address: str, proxy: Proxy, tmp_path: Path, good: list[str]
) -> None:
    """MosaicML streaming's other ranks wait for ever where the one that downloads fails."""
    proxy.fail("stall", path="train-0000", times=1000)
    bad = start_reader(address, tmp_path / "cache", XRAI_S3_TIMEOUT_S="1", XRAI_S3_RETRY_S="3")
    deadline = time.monotonic() + 20
    while not proxy.count("train-0000"):  # it holds the lock of the first shard
        assert time.monotonic() < deadline
        time.sleep(0.01)
    well = start_reader(address, tmp_path / "cache", AWS_ENDPOINT_URL_S3=s3_server)
    status, _, (line,) = outcome_of(bad)
    assert status == 1
    assert "cannot be read: no success in" in line
    assert outcome_of(well)[:2] == (0, [f"{step} {batch}" for step, batch in enumerate(good)])


@pytest.mark.parametrize("fault", [None, "cut", "flip"])
def test_a_cache_smaller_than_the_data_set_gives_the_same_batches(
    fault: Kind | None, folder: Path, address: str, proxy: Proxy, tmp_path: Path, good: list[str]
) -> None:
    room = 4 * max(path.stat().st_size for path in folder.glob("*.h5"))
    for shard in range(6):
        if fault:
            proxy.fail(fault, path=f"train-0000{shard}")
    assert read(address, tmp_path, cache_max_gib=room / 2**30) == good
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*/*.h5")) <= room
