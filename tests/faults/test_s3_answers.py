"""The store before servers that answer otherwise than S3 does, or too slowly: one line that says
what it may be, never a traceback, never "nothing there", and always an end.
"""

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from botocore.awsrequest import AWSResponse

from tests.faults.buckets import use_endpoint
from xrai.errors import (
    ForbiddenError,
    SourceError,
    StoreAccessError,
    StoreError,
    TooLargeError,
    UnreachableError,
    UserError,
    WrongEndpointError,
    XraiError,
)
from xrai.ingest.sources import open_source
from xrai.results.folder import RunFolder
from xrai.store import S3Store, Store, open_store, s3

pytestmark = pytest.mark.timeout(60)

LOGIN = b"<!doctype html><html><head><title>Log in</title></head><body>please log in</body></html>"
PAGE = b"<ListBucketResult>%s</ListBucketResult>"
OBJECT = b"<Contents><Key>f/a</Key><Size>1</Size></Contents>"


class Answer(NamedTuple):
    """What a server says to one request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {"ETag": '"1"'}  # noqa: RUF012, never changed
    drip_s: float = 0.0  # pause before each two bytes of all that is sent
    keeps_length: bool = True


class Server(ThreadingHTTPServer):
    """Gives each request what `answer(method, path)` says."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.answer: Callable[[str, str], Answer] = lambda method, path: Answer()
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that left


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body, headers, drip_s, keeps_length = self.server.answer(self.command, self.path)
        lines = [
            f"HTTP/1.1 {status} Words",
            "Connection: close",
            *(f"{name}: {headers[name]}" for name in headers),
        ]
        if keeps_length:
            lines.append(f"Content-Length: {len(body)}")
        data = "\r\n".join([*lines, "", ""]).encode() + (b"" if self.command == "HEAD" else body)
        step = 2 if drip_s else len(data)
        for place in range(0, len(data), step):
            if drip_s and self.server.ended.wait(drip_s):
                break
            self.wfile.write(data[place : place + step])
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815, the base class calls them so

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def _endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, server.url)


@pytest.fixture(scope="module")
def store(server: Server) -> Store:
    return open_store("s3://bucket/f", timeout_s=5, retry_s=10)


@pytest.fixture(scope="module")
def hurried(server: Server) -> Store:
    return open_store("s3://bucket/f", timeout_s=0.5, retry_s=0.5)


def reason(code: str, status: int, more: str = "") -> Callable[[str, str], Answer]:
    """A refusal as S3 words it: a HEAD gets the status alone."""
    body = f"<Error><Code>{code}</Code><Message>words</Message>{more}</Error>".encode()
    return lambda method, path: Answer(status, b"" if method == "HEAD" else body)


def always(answer: Answer) -> Callable[[str, str], Answer]:
    return lambda method, path: answer


CALLS: dict[str, Callable[[Store], Any]] = {
    "read": lambda store: store.read("key"),
    "size": lambda store: store.size("key"),
    "write": lambda store: store.write("key", b"1"),
    "create": lambda store: store.write("key", b"1", only_if_absent=True),
    "list": lambda store: list(store.list()),
}


# ----------------------------------------------------------------------------- what a refusal means


@pytest.mark.parametrize(
    ("code", "status", "kind", "words"),
    [
        ("ExpiredToken", 400, ForbiddenError, "have expired; get new ones"),
        ("TokenRefreshRequired", 400, ForbiddenError, "have expired"),
        ("InvalidToken", 400, ForbiddenError, "AWS_SESSION_TOKEN is wrong"),
        ("RequestTimeTooSkewed", 403, ForbiddenError, "clock differs"),
        ("RequestTimeTooSkewed", 400, ForbiddenError, "clock differs"),
        ("InvalidAccessKeyId", 403, ForbiddenError, "does not know this access key"),
        ("SignatureDoesNotMatch", 403, ForbiddenError, "AWS_SECRET_ACCESS_KEY is not"),
        ("AccessDenied", 403, ForbiddenError, "these keys lack s3:"),
        ("InvalidObjectState", 403, StoreAccessError, "it is archived"),
        ("AuthorizationHeaderMalformed", 400, WrongEndpointError, "wrong region or endpoint"),
    ],
)
def test_each_refusal_says_what_it_is_to_a_head_too(
    store: Store, server: Server, code: str, status: int, kind: type[XraiError], words: str
) -> None:
    server.answer = reason(code, status)
    for call in CALLS.values():
        with pytest.raises(kind, match=words) as caught:
            call(store)
        text = str(caught.value)
        assert type(caught.value) is kind
        assert code in text
        assert "\n" not in text
        assert ("region" in text) == (code == "AuthorizationHeaderMalformed")
        assert ("clock" in text) == (code == "RequestTimeTooSkewed")


@pytest.mark.parametrize("status", [400, 401, 403])
@pytest.mark.parametrize(
    "body",
    [b"", LOGIN, b"Client sent an HTTP request to an HTTPS server."],
    ids=["empty", "login", "text"],
)
def test_a_refusal_without_a_reason_blames_neither_keys_nor_clock_nor_region(
    store: Store, server: Server, status: int, body: bytes
) -> None:
    server.answer = lambda method, path: Answer(status, b"" if method == "HEAD" else body)
    for call in CALLS.values():
        with pytest.raises(StoreAccessError, match=r"proxy|does not speak S3") as caught:
            call(store)
        assert not any(word in str(caught.value) for word in ("clock", "region", "keys"))


# --------------------------------------------------------------------------- what is no S3's answer


@pytest.mark.parametrize("body", [b"", LOGIN, b"{}"], ids=["empty", "login", "json"])
@pytest.mark.parametrize("status", [200, 301, 302, 303, 307, 308])
def test_an_empty_answer_and_a_login_page_are_no_object_no_success_and_no_empty_listing(
    store: Store, server: Server, status: int, body: bytes
) -> None:
    server.answer = always(Answer(status, body, {"Location": "/login"}))
    for call in CALLS.values():
        with pytest.raises(WrongEndpointError, match=r"s3://bucket/f.* does not speak S3"):
            call(store)


@pytest.mark.parametrize("step", ["uploads", "partNumber=", "uploadId="])
def test_an_empty_answer_at_any_step_of_a_large_upload_is_no_success(
    store: Store, server: Server, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 1000)
    (tmp_path / "file").write_bytes(bytes(2500))
    started = (
        b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
    )

    def answer(method: str, path: str) -> Answer:
        if step in path and (step != "uploadId=" or method == "POST"):
            return Answer(200, b"", {})
        return Answer(200, started if method == "POST" else b"")

    server.answer = answer
    with pytest.raises(StoreError, match=r"s3://bucket/f/key"):
        store.upload("key", tmp_path / "file")


@pytest.mark.parametrize(
    "page",
    [
        PAGE % (b"<IsTruncated>true</IsTruncated>" + OBJECT),  # as ListObjects version 1
        PAGE % (b"<IsTruncated>true</IsTruncated><NextContinuationToken>1</NextContinuationToken>"),
        PAGE % b"<IsTruncated>false</IsTruncated><Contents><Key>f/a</Key></Contents>",
        PAGE % b"<IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents>",
        PAGE % b"<IsTruncated>false</IsTruncated><Contents><Key>f/a</Key><Size>x</Size></Contents>",
        PAGE % b"<IsTruncated>false</IsTruncated><Contents>words</Contents>",
        PAGE % OBJECT,
        b"<ListBucketResult/>",
        b"<ListBucketResult>",
    ],
)
def test_a_listing_that_cannot_be_read_to_its_end_is_no_s3(
    store: Store, server: Server, page: bytes
) -> None:
    server.answer = always(Answer(200, page))
    with pytest.raises(WrongEndpointError, match="s3://bucket/f cannot be listed"):
        list(store.list())


def test_a_chunked_body_has_an_end_of_its_own(store: Store, server: Server) -> None:
    data = os.urandom(70_000)
    chunks = b"11170\r\n" + data + b"\r\n0\r\n\r\n"
    headers = {"ETag": '"1"', "Transfer-Encoding": "chunked"}
    bodies = [chunks[:50_000], chunks]
    paths = []

    def answer(method: str, path: str) -> Answer:
        paths.append(path)
        return Answer(200, bodies[min(len(paths), 2) - 1], headers, keeps_length=False)

    server.answer = answer
    assert store.read("key") == data
    assert len(paths) == 2
    with pytest.raises(TooLargeError):
        store.read("key", max_bytes=len(data) - 1)


def test_a_body_without_length_or_end_is_no_object(store: Store, server: Server) -> None:
    server.answer = always(Answer(200, b"1234", keeps_length=False))
    for call in (CALLS["read"], CALLS["size"]):
        with pytest.raises(WrongEndpointError, match="does not speak S3"):
            call(store)


def test_https_to_a_port_of_http_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, server.url.replace("http:", "https:"))
    with pytest.raises(WrongEndpointError, match="begins with http://") as caught:
        open_store("s3://bucket/f").read("key")
    assert "AWS_CA_BUNDLE" not in str(caught.value)


# ---------------------------------------------------------------------------------- slow for ever


@pytest.mark.parametrize("call", CALLS)
def test_two_bytes_now_and_then_do_not_hold_a_call_beyond_its_deadline(
    hurried: Store, server: Server, call: str
) -> None:
    headers = {"ETag": '"1"'}
    for slow in (
        Answer(200, bytes(4000), headers, 0.05),
        Answer(200, b"", {"X": "y" * 4000}, 0.05),
    ):
        server.answer = always(slow)
        with pytest.raises(UnreachableError, match=r"s3://bucket/f.* within 0\.5 s"):
            CALLS[call](hurried)


def test_a_body_of_a_few_bytes_at_each_try_is_no_progress(hurried: Store, server: Server) -> None:
    data = bytes(100_000)
    num_tries = 0

    def answer(method: str, path: str) -> Answer:
        nonlocal num_tries
        num_tries += 1
        headers = {"ETag": '"1"', "Content-Length": str(len(data) - 2 * (num_tries - 1))}
        headers["Content-Range"] = f"bytes {2 * (num_tries - 1)}-99999/100000"
        return Answer(206 if num_tries > 1 else 200, b"00", headers, keeps_length=False)

    server.answer = answer
    with pytest.raises(UnreachableError, match="cannot be read"):
        hurried.read("key")


def test_a_slow_server_is_no_fault_while_it_goes_on(server: Server) -> None:
    server.answer = always(Answer(200, bytes(100), drip_s=0.01))
    store = open_store("s3://bucket/f", timeout_s=0.3, retry_s=20)
    assert store.read("key") == bytes(100)


# -------------------------------------------------------------------------------------- passwords


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://user:s3cr3t@127.0.0.1:1",
        "http://user:s3cr3t/s3cr3t@127.0.0.1:1",
        "https://user:s3cr3t@@127.0.0.1:1",
        "user:s3cr3t@127.0.0.1:1",
        "http://s3cr3t@[x",
    ],
)
def test_no_password_of_the_endpoint_stands_in_an_error_or_a_warning(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_endpoint(monkeypatch, endpoint)
    for call in CALLS.values():
        with pytest.raises(StoreError) as caught:
            call(open_store("s3://bucket/f", timeout_s=0.2, retry_s=0.2))
        assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize(
    "address", ["s3://KEY:s3cr3t@bucket/f", "s3://KEY:s3cr3t/+@bucket/f", "https://u:s3cr3t@host/b"]
)
def test_no_password_of_an_address_that_is_refused_is_repeated(address: str) -> None:
    for refuse in (open_store, open_source):
        with pytest.raises(UserError, match=r"\*\*\*@") as caught:
            refuse(address)
        assert "s3cr3t" not in str(caught.value)


# ---------------------------------------------------------------------------- rights and names


def test_keys_without_the_right_to_delete_leave_no_object_of_the_check(server: Server) -> None:
    written = []

    def answer(method: str, path: str) -> Answer:
        if method == "DELETE":
            return reason("AccessDenied", 403)(method, path)
        if method == "PUT":
            written.append(path)
        return Answer()

    server.answer = answer
    with pytest.raises(ForbiddenError, match=r"\.write-check-.* these keys lack s3:DeleteObject"):
        RunFolder.check_writable("s3://bucket/f")
    assert written == []


@pytest.mark.parametrize("sign", [":", "/"])
def test_an_access_point_is_asked_at_its_own_host(
    sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    arn = f"arn:aws:s3:eu-west-1:123456789012:accesspoint{sign}films"
    store = open_store(f"s3://{arn}/some/data")
    assert isinstance(store, S3Store) and store.uri == f"s3://{arn}/some/data"
    asked: list[str] = []

    def answer(request: Any, **_: Any) -> Any:
        asked.append(request.url)
        raw = SimpleNamespace(stream=lambda *_: iter([b""]), read=lambda *_: b"")
        headers: Any = {"Content-Length": "7", "ETag": '"1"'}
        return AWSResponse(request.url, 200, headers, raw)

    store._client().meta.events.register("before-send.s3", answer)
    assert store.size("a.h5") == 7
    host = "films-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"
    assert asked == [f"https://{host}/some/data/a.h5"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "s3://arn:aws:s3:eu-west-1:123456789012:bucket/films/f",
            "an access point is s3://arn:.*:accesspoint/NAME/prefix",
        ),
        ("s3://bucket/a//b", "impossible prefix.*'//'"),
        ("s3://bucket/a/../b", "impossible prefix"),
    ],
)
def test_an_address_that_cannot_be_used_says_what_to_give(address: str, words: str) -> None:
    for refuse in (open_store, open_source):
        with pytest.raises(StoreAccessError, match=words):
            refuse(address)


def test_an_empty_folder_name_in_a_listing_is_named_in_one_line(
    store: Store, server: Server
) -> None:
    entry = b"<Contents><Key>f/NORMAL//a.png</Key><Size>1</Size></Contents>"
    server.answer = always(Answer(200, PAGE % (b"<IsTruncated>false</IsTruncated>" + entry)))
    with pytest.raises(SourceError, match=r"unsafe name 'NORMAL//a\.png' .*rename it"):
        open_source("s3://bucket/f").files()
