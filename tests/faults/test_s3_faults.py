"""The store before a network and a server at their worst: what may pass is tried again, what is
wrong is told apart.

Each test runs against an S3 in this process (moto), and against a real one where there is one.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3.session
import pytest

from tests.faults.proxy import Kind, Proxy, vanish_for
from xrai.errors import (
    AlreadyExistsError,
    CorruptError,
    ForbiddenError,
    NotFoundError,
    StoreError,
    UnreachableError,
    WrongEndpointError,
)
from xrai.store import Store, open_store, s3

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(2_000_003)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(uri: str, proxy: Proxy) -> Store:
    """A store that waits 1 s for an answer, and at most 15 s for a good one. It holds DATA under
    `key`.
    """
    store = open_store(uri, timeout_s=1, retry_s=15)
    store.write("key", DATA)
    proxy.requests.clear()
    return store


def skip_what_moto_lacks(kind: Kind, request: pytest.FixtureRequest) -> None:
    if kind == "damage" and request.node.callspec.params["server"] == "moto":
        pytest.skip("moto takes damaged bodies as good; a real server checks Content-MD5")


# ------------------------------------------------------------------------------------ what may pass


@pytest.mark.parametrize("kind", ["503", "stall", "reset", "lose", "cut"])
def test_a_read_outlives_faults_that_pass(
    store: Store, proxy: Proxy, kind: Kind, tmp_path: Path
) -> None:
    proxy.fail(kind, path="key", times=2)
    assert store.download("key", tmp_path / "copy") == SHA256
    assert (tmp_path / "copy").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert proxy.count("key") == 3


@pytest.mark.parametrize("kind", ["503", "reset", "lose", "damage"])
def test_a_write_outlives_faults_that_pass(
    store: Store, proxy: Proxy, kind: Kind, request: pytest.FixtureRequest
) -> None:
    skip_what_moto_lacks(kind, request)
    proxy.fail(kind, method="PUT", times=2)
    store.write("new", DATA)
    assert proxy.count("new", "PUT") == 3
    assert store.read("new") == DATA


def test_a_body_that_was_cut_goes_on_where_it_ended(store: Store, proxy: Proxy) -> None:
    proxy.fail("cut", times=1)
    assert store.read("key") == DATA
    assert [request.range for request in proxy.requests] == ["", f"bytes={len(DATA) // 2}-"]


def test_a_server_that_knows_no_ranges_gives_no_byte_twice(store: Store, proxy: Proxy) -> None:
    proxy.fail("cut", times=1)
    proxy.fail("whole", times=1)
    assert store.read("key") == DATA


def test_a_server_that_is_gone_for_seconds_is_waited_for(store: Store, proxy: Proxy) -> None:
    started = time.monotonic()
    back = vanish_for(proxy, 3)
    assert store.read("key") == DATA
    assert time.monotonic() - started >= 3
    back.join(10)


def test_a_read_that_is_under_way_when_the_server_goes_is_ended_when_it_is_back(
    store: Store, proxy: Proxy
) -> None:
    proxy.fail("stall", times=1)
    pieces: list[bytes] = []
    back = None

    def take(piece: bytes) -> None:
        nonlocal back
        if not pieces:
            back = vanish_for(proxy, 2)
        pieces.append(piece)

    store._receive("key", take)  # type: ignore[attr-defined]
    assert b"".join(pieces) == DATA
    assert back is not None
    back.join(10)


def test_a_commit_mark_whose_answer_was_lost_is_known_as_our_own(
    store: Store, proxy: Proxy
) -> None:
    proxy.fail("lose", path="mark", method="PUT", times=1)
    store.write("mark", b"ours", only_if_absent=True)
    assert proxy.count("mark", "PUT") == 2
    proxy.fail("lose", path="mark", method="PUT", times=1)
    with pytest.raises(AlreadyExistsError):
        store.write("mark", b"another's", only_if_absent=True)
    assert store.read("mark") == b"ours"


# ------------------------------------------------------------------------------------ what does not


def test_a_server_that_is_gone_for_good_ends_the_wait_in_time(
    store: Store, proxy: Proxy, uri: str
) -> None:
    proxy.vanish()
    calls: list[Callable[[Store], object]] = [
        lambda store: store.read("key"),
        lambda store: store.write("key", b""),
        lambda store: list(store.list()),
        lambda store: store.size("key"),
        lambda store: store.delete("key"),
    ]
    for call in calls:
        with pytest.raises(
            UnreachableError, match=rf"{uri}.* no success in \d+ tries within 0\.5 s"
        ):
            call(open_store(uri, timeout_s=1, retry_s=0.5))


def test_a_server_that_always_stalls_ends_the_wait_in_time(
    store: Store, proxy: Proxy, uri: str
) -> None:
    proxy.fail("stall", times=1000)
    # each try brings half of what was missing, which is progress, until too little is missing to be
    # halved
    with pytest.raises(UnreachableError, match="key cannot be read"):
        open_store(uri, timeout_s=0.3, retry_s=1).read("key")


def test_a_server_that_is_always_busy_is_told_from_one_that_is_gone(
    store: Store, proxy: Proxy, uri: str
) -> None:
    proxy.fail("503", times=1000)
    with pytest.raises(UnreachableError, match="SlowDown"):
        open_store(uri, retry_s=0.5).read("key")


def test_what_is_forbidden_is_not_tried_again_and_not_missing(store: Store, proxy: Proxy) -> None:
    proxy.fail("forbid", times=1)
    with pytest.raises(ForbiddenError, match=r"/key cannot be read: forbidden \(AccessDenied"):
        store.read("key")
    assert proxy.count("key") == 1


def test_a_web_page_is_no_object(store: Store, proxy: Proxy) -> None:
    proxy.fail("garbage", times=1)
    with pytest.raises(WrongEndpointError, match="does not speak S3"):
        store.read("key")


def test_an_object_that_is_replaced_while_it_is_read_is_no_mixture(
    store: Store, proxy: Proxy
) -> None:
    proxy.fail("cut", times=1)
    pieces: list[bytes] = []

    def take(piece: bytes) -> None:
        if not pieces:
            store.write("key", b"another" * 300_000)
        pieces.append(piece)

    with pytest.raises(CorruptError, match="replaced while it was read"):
        store._receive("key", take)  # type: ignore[attr-defined]


def test_the_hash_of_a_download_is_that_of_what_arrived(
    store: Store, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fail("flip", times=1)
    found = store.download("key", tmp_path / "copy")
    assert found == hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest()
    assert found != SHA256


# ------------------------------------------------------------------------------------ large objects


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that goes up in three parts."""
    monkeypatch.setattr(s3, "_PART_BYTES", 5 * 2**20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(11 * 2**20))
    return path


def unfinished_uploads(server: tuple[str, str]) -> int:
    """How many there are; none as soon as the listing says so within 20 s, for Ceph fixes it a
    moment later.
    """
    client = boto3.session.Session().client("s3", endpoint_url=server[0])
    deadline = time.monotonic() + 20
    try:
        while True:
            number = len(client.list_multipart_uploads(Bucket=server[1]).get("Uploads", []))
            if number == 0 or time.monotonic() > deadline:
                return number
            time.sleep(0.2)
    finally:
        client.close()


@pytest.mark.parametrize("kind", ["503", "reset", "lose", "damage"])
def test_the_parts_of_a_large_object_outlive_faults_that_pass(
    store: Store,
    proxy: Proxy,
    large: Path,
    kind: Kind,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    skip_what_moto_lacks(kind, request)
    proxy.fail(kind, method="PUT", path="partNumber=2", times=1)
    sent = store.upload("large", large)
    assert proxy.count("partNumber=", "PUT") == 4
    assert (
        store.download("large", tmp_path / "copy")
        == sent
        == hashlib.sha256(large.read_bytes()).hexdigest()
    )


def test_a_large_object_whose_last_answer_was_lost_is_there(
    store: Store, proxy: Proxy, large: Path, server: tuple[str, str]
) -> None:
    proxy.fail("lose", method="POST", path="uploadId=", times=1)
    store.upload("large", large)
    assert store.size("large") == large.stat().st_size
    assert unfinished_uploads(server) == 0


def test_an_older_object_of_the_same_size_is_not_taken_for_a_large_one_whose_parts_are_gone(
    store: Store,
    proxy: Proxy,
    large: Path,
    server: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = bytes(large.stat().st_size)
    store.write("large", older)
    client = store._client()  # type: ignore[attr-defined]
    complete = client.complete_multipart_upload

    def complete_too_late(**request: Any) -> Any:
        upload = {name: request[name] for name in ("Bucket", "Key", "UploadId")}
        client.abort_multipart_upload(**upload)  # as a lifecycle rule does
        return complete(**request)

    monkeypatch.setattr(client, "complete_multipart_upload", complete_too_late)
    with pytest.raises(StoreError, match="large cannot be written: NoSuchUpload") as caught:
        store.upload("large", large)
    assert not isinstance(caught.value, NotFoundError)
    assert store.read("large") == older


def test_a_large_object_that_fails_is_not_there_and_keeps_no_room(
    store: Store, proxy: Proxy, large: Path, server: tuple[str, str]
) -> None:
    proxy.fail("forbid", method="PUT", path="partNumber=3", times=1)
    with pytest.raises(ForbiddenError):
        store.upload("large", large)
    assert store.size("large") is None
    assert unfinished_uploads(server) == 0


@pytest.mark.parametrize("num_bytes", [1000, 11 * 2**20])
def test_an_upload_that_is_killed_leaves_what_was_there(
    store: Store, proxy: Proxy, num_bytes: int, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(num_bytes))
    code = (
        "import sys; from pathlib import Path; from xrai.store import open_store, s3;"
        "s3._PART_BYTES = 5 * 2**20; open_store(sys.argv[1]).upload('key', Path(sys.argv[2]))"
    )
    proxy.fail("hold", method="PUT", path="key" if num_bytes == 1000 else "partNumber=2")
    with subprocess.Popen(
        [sys.executable, "-c", code, store.uri, str(tmp_path / "file")]
    ) as writer:
        deadline = time.monotonic() + 20
        while not proxy.held:
            assert time.monotonic() < deadline, "waited 20 s for the upload to begin"
            time.sleep(0.02)
        writer.kill()
    proxy.heal()
    assert store.read("key") == DATA
