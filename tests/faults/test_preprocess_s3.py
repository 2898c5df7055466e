"""Preprocessing from and to a bucket: the same data set as from and to a folder, whatever the
network does.

Each test runs against an S3 in this process (moto), and against a real one where there is one.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zygote
from tests.dataset.pictures import source_files, write_files
from tests.faults.buckets import use_endpoint
from tests.faults.proxy import Kind, Proxy, vanish_for
from xrai.dataset.shards import read_index
from xrai.store import Store, open_store

pytestmark = pytest.mark.timeout(180)

SMALL = (
    "--images.size=64",
    "--shards.rows=8",
    "--splits.val_fraction=0.3",
    "--splits.test_fraction=0.2",
)


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XRAI_S3_RETRY_S", "20")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {**source_files(), "train/NORMAL/bad.png": b"not an image"}


@pytest.fixture(scope="module")
def raw(server: tuple[str, str], files: dict[str, bytes]) -> str:
    """The address of the raw images. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        use_endpoint(patch, server[0])
        store = open_store(f"s3://{server[1]}/raw")
        for key, data in files.items():
            store.write(key, data)
    return store.uri


@pytest.fixture(scope="module")
def expected(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data set made from a folder into a folder. Its source has another name, which card and
    index state.
    """
    folder = tmp_path_factory.mktemp("expected")
    source = write_files(folder / "chest", files)
    done = start(str(source), str(folder / "dataset"))
    assert finish(done) == 0
    return contents(open_store(str(folder / "dataset")))


def start(source: str, dataset: str, *more: str, workers: int = 1) -> zygote.Process:
    command = ["-m", "xrai.preprocess", f"--source={source}", f"--dataset={dataset}"]
    command += [*SMALL, *more, f"--workers={workers}"]
    return zygote.start(command, preload=zygote.PREPARE)


def finish(process: zygote.Process, *, timeout_s: float = 120) -> int | None:
    _, stderr = process.communicate(timeout=timeout_s)
    print(stderr)
    return process.returncode


def contents(store: Store) -> dict[str, bytes]:
    """All objects but those that state the source's name."""
    return {
        entry.key: store.read(entry.key)
        for entry in store.list()
        if not entry.key.endswith((".json", "card.md"))
    }


def assert_whole(uri: str, expected: dict[str, bytes]) -> None:
    """The data set is there, equal to one made without a fault, and nothing unfinished is left."""
    store = open_store(uri)
    assert contents(store) == expected
    listed = {info.name for shards in read_index(store).splits.values() for info in shards}
    listed |= {info.name for info in read_index(store).objects}
    assert {entry.key for entry in store.list()} == {*listed, "dataset.json"}


@pytest.mark.ci  # without the mark: the same, through faults that pass
def test_from_bucket_to_bucket_it_is_the_data_set_made_from_folder_to_folder(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert finish(start(raw, f"{uri}/made", workers=2)) == 0
    assert_whole(f"{uri}/made", expected)
    assert finish(start(raw, f"{uri}/made")) == 0  # nothing to do
    assert finish(start(raw, str(tmp_path / "here"))) == 0
    assert_whole(str(tmp_path / "here"), expected)


def test_a_data_set_inside_its_own_bucket_of_images_is_refused(
    proxy: Proxy, raw: str, files: dict[str, bytes]
) -> None:
    assert finish(start(raw, f"{raw}/made")) == 2
    assert len(list(open_store(raw).list())) == len(files)


def test_faults_that_pass_change_nothing(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes]
) -> None:
    faults: list[tuple[Kind, str, str]] = [
        ("503", "GET", "/raw/"),
        ("cut", "GET", "/raw/train/NORMAL"),
        ("reset", "GET", "/raw/train/PNEUMONIA"),
        ("503", "PUT", "/made/"),
        ("lose", "PUT", "/made/unfinished"),
        ("reset", "PUT", ".h5"),
        ("lose", "PUT", "/made/dataset.json"),
    ]
    for kind, method, path in faults:
        proxy.fail(kind, method=method, path=path, times=3)
    assert finish(start(raw, f"{uri}/made")) == 0
    assert_whole(f"{uri}/made", expected)


@pytest.mark.ci
def test_it_goes_on_when_the_server_was_gone_for_seconds(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes]
) -> None:
    process = start(raw, f"{uri}/made")
    wait_until(lambda: any(request.method == "PUT" for request in proxy.requests))
    vanish_for(proxy, 5)
    assert finish(process) == 0
    assert_whole(f"{uri}/made", expected)


@pytest.mark.ci
def test_a_server_that_is_gone_for_good_ends_it_in_time_with_exit_1_and_a_new_start_goes_on(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XRAI_S3_RETRY_S", "3")
    process = start(raw, f"{uri}/made")
    wait_until(lambda: any(".h5" in request.path for request in proxy.requests))
    proxy.vanish()
    assert finish(process, timeout_s=60) == 1
    proxy.appear()
    assert finish(start(raw, f"{uri}/made")) == 0
    assert_whole(f"{uri}/made", expected)


@pytest.mark.ci
@pytest.mark.parametrize("after", ["train-00000", "hashes", "manifest"])
def test_killed_at_a_stage_and_started_again_it_ends_in_the_same_bytes(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes], after: str
) -> None:
    process = start(raw, f"{uri}/made")
    wait_until(
        lambda: any(after in request.path and request.method == "PUT" for request in proxy.requests)
    )
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert finish(start(raw, f"{uri}/made")) == 0
    assert_whole(f"{uri}/made", expected)


@pytest.mark.ci
def test_partitions_at_once_end_in_the_same_bytes_and_share_the_hashing(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes]
) -> None:
    processes = [start(raw, f"{uri}/made", f"--partition={number}/3") for number in range(3)]
    assert [finish(process) for process in processes] == [0, 0, 0]
    assert_whole(f"{uri}/made", expected)


@pytest.mark.ci
def test_a_stored_shard_that_is_damaged_before_the_commit_is_found_and_made_anew(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes]
) -> None:
    assert finish(start(raw, f"{uri}/made", "--partition=0/2")) == 0
    store = open_store(f"{uri}/made")
    key = next(entry.key for entry in store.list() if entry.key.endswith(".h5"))
    data = bytearray(store.read(key))
    data[5000] ^= 1
    store.write(key, bytes(data))
    assert finish(start(raw, f"{uri}/made", "--partition=1/2")) == 1  # names it, and drops its part
    assert "dataset.json" not in {entry.key for entry in store.list()}
    assert finish(start(raw, f"{uri}/made", "--partition=0/2")) == 0
    assert_whole(f"{uri}/made", expected)


@pytest.mark.ci
def test_verify_and_repair_work_on_a_bucket(
    proxy: Proxy, uri: str, raw: str, expected: dict[str, bytes]
) -> None:
    assert finish(start(raw, f"{uri}/made")) == 0
    store = open_store(f"{uri}/made")
    keys = [entry.key for entry in store.list() if entry.key.startswith("train")][:2]
    store.write(keys[0], store.read(keys[0])[:-7])
    store.delete(keys[1])
    verify = ["-m", "xrai.verify", f"--dataset={uri}/made"]
    process = zygote.start(verify, preload=zygote.PREPARE)
    stdout, _ = process.communicate()
    assert process.returncode == 1
    assert [line.split()[0] for line in stdout.splitlines()] == keys
    repair = [*verify, "--repair", f"--source={raw}"]
    assert finish(zygote.start(repair, preload=zygote.PREPARE)) == 0
    assert_whole(f"{uri}/made", expected)


def wait_until(happened: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)
