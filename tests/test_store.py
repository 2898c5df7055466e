"""The store's promises, the same for a folder, for an S3 in this process (moto) and for a real
one.
"""

import hashlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dataset.remote import RemoteFolder
from tests.faults.buckets import use_endpoint
from tests.faults.proxy import Proxy
from xrai.errors import (
    AlreadyExistsError,
    ConfigError,
    ForbiddenError,
    NoCredentialsError,
    NoSuchBucketError,
    NotFoundError,
    StoreAccessError,
    StoreError,
    TooLargeError,
    UnreachableError,
    UserError,
    WrongEndpointError,
)
from xrai.files import _remove_stale_temporaries, sha256_of
from xrai.store import S3Store, Store, StoredObject, answers, check_key, open_store, s3

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def moto_uri(moto: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An address in moto that no other test has."""
    use_endpoint(monkeypatch, moto[0])
    return f"s3://{moto[1]}/some/{uuid.uuid4().hex[:8]}"


# ----------------------------------------------------------------------------- what all stores keep


def test_what_is_written_is_read_back_and_may_be_replaced(store: Store) -> None:
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"second"
    assert store.size("a/b.bin") == 6


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.size("empty") == 0


def test_a_missing_object_has_no_size_and_says_its_address_when_read(
    store: Store, tmp_path: Path
) -> None:
    assert store.size("a/missing") is None
    with pytest.raises(NotFoundError, match=f"{store.uri}/a/missing"):
        store.read("a/missing")
    with pytest.raises(NotFoundError):
        store.download("a/missing", tmp_path / "copy")
    assert list(tmp_path.glob("copy*")) == []


def test_the_listing_is_sorted_complete_and_of_one_prefix(store: Store) -> None:
    for key in ("train-1.h5", "report/card.md", "train-0.h5", "trained"):
        store.write(key, key.encode())
    assert list(store.list()) == [
        StoredObject("report/card.md", 14),
        StoredObject("train-0.h5", 10),
        StoredObject("train-1.h5", 10),
        StoredObject("trained", 7),
    ]
    assert [found.key for found in store.list("train-")] == ["train-0.h5", "train-1.h5"]
    assert [found.key for found in store.list("report/")] == ["report/card.md"]
    assert list(store.list("nothing/here")) == []


def test_no_more_than_was_asked_for_is_read_of_a_file_or_a_pipe(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("key", bytes(11))
    assert store.read("key", max_bytes=11) == bytes(11)
    with pytest.raises(TooLargeError, match="key has 11 bytes; at most 10 are read"):
        store.read("key", max_bytes=10)
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(TooLargeError, match="zero has 11 bytes"):
        store.read("zero", max_bytes=10)


def test_a_pipe_in_a_folder_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pt")
    store = open_store(str(tmp_path))
    for read in (
        lambda: store.read("model.pt"),
        lambda: store.download("model.pt", tmp_path / "x"),
    ):
        with pytest.raises(StoreError, match=r"model\.pt cannot be read: it is not a regular file"):
            read()
    with pytest.raises(OSError, match="not a regular file"):
        sha256_of(tmp_path / "model.pt")


def test_deleting_removes_and_may_be_repeated(store: Store) -> None:
    store.write("gone", b"1")
    store.delete("gone")
    store.delete("gone")
    assert store.size("gone") is None


def test_files_go_up_and_down_with_their_hash(store: Store, tmp_path: Path) -> None:
    data = os.urandom(700_001)
    (tmp_path / "file").write_bytes(data)
    assert store.upload("deep/er/file", tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert (
        store.download("deep/er/file", tmp_path / "new" / "copy")
        == hashlib.sha256(data).hexdigest()
    )
    assert (tmp_path / "new" / "copy").read_bytes() == data


def test_a_commit_mark_is_written_once(store: Store) -> None:
    store.write("dataset.json", b"first", only_if_absent=True)
    with pytest.raises(AlreadyExistsError, match=r"dataset\.json exists already"):
        store.write("dataset.json", b"second", only_if_absent=True)
    assert store.read("dataset.json") == b"first"


def test_of_many_writers_of_one_commit_mark_one_wins(
    store: Store, request: pytest.FixtureRequest
) -> None:
    def claim(number: int) -> bool:
        try:
            store.write("mark", str(number).encode(), only_if_absent=True)
        except AlreadyExistsError:
            return False
        return True

    assert store.size("mark") is None
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    if sum(won) != 1 and request.node.callspec.params["store"] == "moto":
        pytest.skip("moto checks and writes in two steps")
    assert sum(won) == 1
    assert store.read("mark") == str(won.index(True)).encode()


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../secret", "a/../../b", "a//b", "a/", ".", "a/.", "a\0b", "a\ud800"],
)
@pytest.mark.parametrize("address", ["/some/folder", "s3://bucket/prefix"])
def test_a_key_that_could_leave_the_store_is_refused(
    address: str, key: str, tmp_path: Path
) -> None:
    store = open_store(address)
    calls: list[Callable[[], Any]] = [
        lambda: store.read(key),
        lambda: store.write(key, b""),
        lambda: store.size(key),
        lambda: store.delete(key),
        lambda: store.local_path(key),
        lambda: store.download(key, tmp_path / "x"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is not a key"):
            call()


def test_a_name_that_is_not_utf_8_is_a_key_of_a_folder_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("film\udcff", b"x")
    assert [found.key for found in store.list()] == ["film\udcff"]
    with pytest.raises(StoreError, match="keys in a bucket are UTF-8"):
        open_store("s3://bucket/prefix").read("film\udcff")


@given(st.text(alphabet="ab./", max_size=12))
def test_a_key_that_is_accepted_stays_below_its_folder(key: str) -> None:
    try:
        check_key(key)
    except StoreError:
        return
    assert os.path.normpath(f"/top/{key}") == f"/top/{key}"


def test_a_store_is_usable_after_pickling_from_threads_and_in_a_forked_child(store: Store) -> None:
    store.write("key", b"value")
    assert pickle.loads(pickle.dumps(store)).read("key") == b"value"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: store.read("key"), range(40))) == {b"value"}
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(store,))
    child.start()
    assert [store.read("key") for _ in range(10)] == [b"value"] * 10
    child.join(timeout=30)
    assert child.exitcode == 0


def _read_in_child(store: Store) -> None:
    assert [store.read("key") for _ in range(10)] == [b"value"] * 10


# ---------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ("/data/set/", "/data/set"),
        ("/data/./x/../set", "/data/set"),
        ("/data/s3:/set", "/data/s3:/set"),
        ("file:///data/my%20set", "/data/my set"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
    ],
)
def test_an_address_has_one_normal_form(address: str, uri: str) -> None:
    assert open_store(address).uri == uri


def test_a_relative_address_is_below_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("data/dataset").uri == str(tmp_path / "data" / "dataset")


@pytest.mark.parametrize(
    "address",
    [
        *("", "s3://", "s3:///key", "s3://b ad/key", "gs://bucket/x", "file://host/x"),
        *("s3:/bucket/x", "s3:bucket", "S3:", "file:/data", "file:data"),
    ],
)
def test_what_is_no_address_is_the_users_mistake(address: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        open_store(address)


def test_a_prefix_may_not_leave_its_bucket() -> None:
    with pytest.raises(StoreError, match="is not a key"):
        open_store("s3://bucket/a/../../other")


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_retry_budget_that_is_no_number_of_seconds_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XRAI_S3_RETRY_S", value)
    with pytest.raises(ConfigError, match=f"XRAI_S3_RETRY_S = '{value}'"):
        open_store("s3://bucket/prefix")


def test_a_folder_never_loads_the_s3_library(tmp_path: Path) -> None:
    code = (
        "import sys; from xrai.store import open_store; s = open_store(sys.argv[1]); "
        "s.write('k', b'1'); s.read('k');"
        "sys.exit(any(name in sys.modules for name in ('boto3', 'botocore', 'torch')))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], timeout=30, check=False
        ).returncode
        == 0
    )


# ------------------------------------------------------------------------------------------ folders


def test_a_writer_that_is_killed_leaves_nothing_to_be_seen(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from xrai.store import open_store
os.fsync = lambda file: (print("written", flush=True), sys.stdin.read())
open_store(sys.argv[1]).write("a/key", b"x" * 1_000_000)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
    store = open_store(str(tmp_path))
    assert list(store.list()) == []
    assert store.size("a/key") is None
    assert len(list((tmp_path / "a").iterdir())) == 1  # what it had written, under another name

    left = next((tmp_path / "a").iterdir())
    store.write("a/key", b"again")
    assert left.exists()  # it might be another writer's, at work
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    _remove_stale_temporaries.cache_clear()  # as in another process
    store.write("a/key", b"again")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["key"]


def test_a_failed_upload_leaves_the_object_as_it_was(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("key", b"before")
    with pytest.raises(StoreError, match="missing"):
        store.upload("key", tmp_path / "missing")
    assert store.read("key") == b"before"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["key"]


@pytest.mark.parametrize("call", ["download", "upload"])
def test_a_source_that_fails_is_not_said_to_be_a_target_that_fails(
    tmp_path: Path, call: str
) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("key", b"data")
    other = tmp_path / "other"
    other.write_bytes(b"data")
    source = {"download": tmp_path / "store" / "key", "upload": other}[call]
    source.unlink()
    source.symlink_to("/proc/self/mem")  # opens, and fails at the first read
    with pytest.raises(StoreError, match=f"{source} cannot be read: Input/output error"):
        getattr(store, call)("key" if call == "download" else "new", other)
    assert not (tmp_path / "store" / "new").exists()
    assert call == "upload" or other.read_bytes() == b"data"


@pytest.mark.parametrize("call", ["download", "upload"])
def test_a_target_that_is_full_is_not_said_to_be_a_source_that_fails(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("key", b"data")
    other = tmp_path / "other"
    other.write_bytes(b"data")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    target = {"download": other, "upload": tmp_path / "store" / "key"}[call]
    with pytest.raises(StoreError, match=f"{target} cannot be written: No space left on device"):
        getattr(store, call)("key", other)


def test_files_get_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        open_store(str(tmp_path)).write("key", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_may_not_be_written_says_so_in_one_line() -> None:
    folder = Path("/proc/xrai")  # nobody, not even root, makes a folder there
    with pytest.raises(StoreError, match="/proc/xrai/key cannot be written: ") as caught:
        open_store(str(folder)).write("key", b"")
    assert "\n" not in str(caught.value)


def test_a_commit_mark_is_written_once_on_a_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")  # as vfat says it

    monkeypatch.setattr(os, "link", link)
    store = open_store(str(tmp_path))
    store.write("mark", b"first", only_if_absent=True)
    with pytest.raises(AlreadyExistsError):
        store.write("mark", b"second", only_if_absent=True)
    assert store.read("mark") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]


def test_a_folder_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match="cannot be written: it is below a file"):
        store.write("key", b"")
    with pytest.raises(NotFoundError):
        store.read("key")
    assert list(store.list()) == []


def test_links_that_lead_nowhere_are_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/key", b"data")
    for name, target in (("loop", "loop"), ("broken", "nowhere"), ("below", "key/of/a/file")):
        (tmp_path / "a" / name).symlink_to(target)
    (tmp_path / "a/good").symlink_to("key")
    assert [*store.list()] == [StoredObject("a/good", 4), StoredObject("a/key", 4)]


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = open_store(str(tmp_path))
    with pytest.raises(
        StoreError, match=r"cannot be written: No space left on device; free some space"
    ):
        store.write("key", b"data")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ buckets


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", ForbiddenError),
        (403, "InvalidAccessKeyId", ForbiddenError),
        (403, "SignatureDoesNotMatch", ForbiddenError),
        (400, "ExpiredToken", ForbiddenError),
        (403, "RequestTimeTooSkewed", ForbiddenError),
        (404, "NoSuchBucket", NoSuchBucketError),
        (404, "NoSuchKey", NotFoundError),
        (301, "PermanentRedirect", WrongEndpointError),
        (400, "AuthorizationHeaderMalformed", WrongEndpointError),
        (400, "EntityTooLarge", StoreError),
        (503, "SlowDown", None),
        (500, "InternalError", None),
        (429, "429", None),
        (400, "RequestTimeout", None),
        (400, "BadDigest", None),
        (409, "ConditionalRequestConflict", None),
    ],
)
def test_each_answer_of_a_server_has_its_own_error_or_is_tried_again(
    status: int, code: str, expected: type[StoreError] | None
) -> None:
    from botocore.exceptions import ClientError

    answer: Any = {
        "Error": {"Code": code, "Message": "words"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    found = answers.explain(
        ClientError(answer, "GetObject"), done="read", where="s3://bucket/key", bucket="bucket"
    )
    assert (None if found is None else type(found)) is expected
    assert found is None or "s3://bucket/key" in str(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:pa@ss@host/x", "http://***@host/x"),
        ("from 'https://u:p@a' to \"u:p@b\"", "from 'https://***@a' to \"***@b\""),
        ("no address", "no address"),
        ("x" * 400_000, "x" * 400_000),  # quadratic time would be minutes
        (f"{'x' * 400_000}://u:p@a", f"{'x' * 400_000}://***@a"),
    ],
    ids=["with an @", "two", "none", "long", "long name"],
)
def test_a_password_is_masked_up_to_the_last_at_sign_of_a_word(text: str, shown: str) -> None:
    assert answers.masked(text) == shown


def test_a_bucket_that_does_not_exist_is_named_and_no_missing_object(moto_uri: str) -> None:
    store = open_store("s3://xrai-no-such-bucket/prefix", retry_s=1)
    for call in (lambda: store.read("key"), lambda: store.size("key"), lambda: list(store.list())):
        with pytest.raises(NoSuchBucketError, match="xrai-no-such-bucket"):
            call()


def test_keys_without_the_right_to_list_can_tell_what_is_missing(
    moto: tuple[str, str], moto_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(moto[0]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        proxy.fail("forbid", path="list-type", times=2)
        store = open_store(moto_uri)
        assert store.size("missing") is None
        with pytest.raises(ForbiddenError):
            list(store.list())


def test_no_keys_are_no_missing_object(moto_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(NoCredentialsError, match="AWS_ACCESS_KEY_ID"):
        open_store(moto_uri).read("key")


def test_an_endpoint_that_is_no_url_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "s3.example.org:8333")
    with pytest.raises(WrongEndpointError, match="AWS_ENDPOINT_URL_S3"):
        open_store("s3://bucket/prefix").read("key")


def test_a_web_server_is_no_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
        store = open_store("s3://bucket/prefix", retry_s=1)
        try:
            for call in (
                lambda: store.read("key"),
                lambda: store.write("key", b""),
                lambda: store.size("key"),
            ):
                with pytest.raises(WrongEndpointError, match="does not speak S3"):
                    call()
        finally:
            server.kill()


def test_an_endpoint_where_nobody_answers_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        use_endpoint(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(
            UnreachableError,
            match=r"s3://bucket/prefix/key cannot be read: no success .* within 1 s",
        ):
            open_store("s3://bucket/prefix", retry_s=1).read("key")
    assert time.monotonic() - started > 0.9


def test_the_retry_budget_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setenv("XRAI_S3_RETRY_S", "0.3")
    with pytest.raises(UnreachableError, match=r"within 0\.3 s"):
        open_store("s3://bucket/prefix").read("key")


def test_a_large_object_goes_up_in_parts(
    moto: tuple[str, str], moto_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 * 2**20)
    data = os.urandom(11 * 2**20)
    (tmp_path / "file").write_bytes(data)
    with Proxy(moto[0]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = open_store(moto_uri, retry_s=10)
        proxy.fail("503", method="PUT", path="partNumber=2")
        assert store.upload("large", tmp_path / "file") == hashlib.sha256(data).hexdigest()
        assert proxy.count("partNumber=", "PUT") == 3 + 1
        assert proxy.count("large", "GET") == 0


def opened(moto_uri: str) -> tuple[S3Store, Any]:
    """A store, and the client that it uses."""
    store = open_store(moto_uri)
    assert isinstance(store, S3Store)
    return store, store._client()


def test_a_server_without_conditional_writes_is_asked_first(
    moto_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    store, client = opened(moto_uri)
    real = client.put_object

    def put_object(**request: Any) -> Any:
        if "IfNoneMatch" in request:
            answer: Any = {
                "Error": {"Code": "NotImplemented"},
                "ResponseMetadata": {"HTTPStatusCode": 501},
            }
            raise ClientError(answer, "PutObject")
        return real(**request)

    monkeypatch.setattr(client, "put_object", put_object)
    store.write("mark", b"1", only_if_absent=True)
    with pytest.raises(AlreadyExistsError):
        store.write("mark", b"2", only_if_absent=True)
    assert store.read("mark") == b"1"


def test_a_mark_that_is_deleted_after_its_refusal_is_still_a_refusal(
    moto_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, client = opened(moto_uri)
    put_object = client.put_object

    def refuse_and_delete(**request: Any) -> Any:
        try:
            return put_object(**request)
        finally:
            client.delete_object(Bucket=request["Bucket"], Key=request["Key"])

    store.write("mark", b"1")
    monkeypatch.setattr(client, "put_object", refuse_and_delete)
    with pytest.raises(AlreadyExistsError, match="mark exists already"):
        store.write("mark", b"2", only_if_absent=True)


def test_a_listing_of_many_pages_is_whole(moto_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, client = opened(moto_uri)
    list_page, num_pages = client.list_objects_v2, 0

    def list_three(**request: Any) -> Any:
        nonlocal num_pages
        num_pages += 1
        return list_page(**request, MaxKeys=3)

    monkeypatch.setattr(client, "list_objects_v2", list_three)
    keys = [f"{number:02d}" for number in range(10)]
    for key in keys:
        store.write(key, b"1")
    bucket, _, prefix = moto_uri.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=f"{prefix}-of-another/key", Body=b"")
    client.put_object(Bucket=bucket, Key=f"{prefix}/folder/", Body=b"")  # as consoles make folders
    assert [found.key for found in store.list()] == keys
    assert num_pages == 4


def test_no_request_carries_a_checksum_that_other_servers_lack(moto_uri: str) -> None:
    store = open_store(moto_uri)
    assert isinstance(store, S3Store)
    config = store._client().meta.config
    assert (
        config.request_checksum_calculation
        == config.response_checksum_validation
        == "when_required"
    )


def test_errors_of_access_are_the_users_mistakes_and_silence_is_not() -> None:
    assert issubclass(StoreAccessError, UserError)
    assert not issubclass(UnreachableError, UserError)
    assert not issubclass(NotFoundError, UserError)


def test_an_object_is_read_as_a_file_in_place_or_as_a_copy_that_vanishes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    store.write("a/b.txt", b"words")
    with store.as_file("a/b.txt") as path:
        assert path == store.local_path("a/b.txt")
    remote = RemoteFolder(tmp_path / "data")
    with remote.as_file("a/b.txt") as copy:
        assert copy.read_bytes() == b"words" and copy != path
    assert not copy.exists() and path.exists()
    for kind in (store, remote):
        with pytest.raises(NotFoundError, match=r"there is no .*missing"), kind.as_file("missing"):
            pass


@pytest.mark.parametrize("address", ["bad\udcff/a", "file:///bad\udcff", "s3://bucket/bad\udcff"])
def test_an_address_that_is_not_utf_8_is_refused(address: str) -> None:
    with pytest.raises(StoreAccessError, match="is not UTF-8; rename it"):
        open_store(address)
