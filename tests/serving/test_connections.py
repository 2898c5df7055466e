"""Clients that ask or read too slowly lose their connection, and no one else does."""

import asyncio
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Literal

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.serving.conftest import LIMITS
from xrai.serve import server_settings
from xrai.serving.connections import MAX_AHEAD, MAX_HEAD_BYTES, Connection
from xrai.serving.http import make_app
from xrai.serving.logs import log_others
from xrai.serving.service import Service

TOKEN = "0123456789abcdef"

WAIT_S = 30.0  # only a hang reaches it
PART = bytes(1 << 16)


class Patient(Connection):
    headers_s = 3600.0


class Impatient(Connection):
    headers_s = 0.3
    reading_s = 0.3


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers /long with 256 MiB, which no buffer holds, anything else with a word; reads the body
    of /body first.
    """
    while scope["path"] == "/body" and (await receive()).get("more_body"):
        pass
    start = {"type": "http.response.start", "status": 200, "headers": []}
    await send(start)
    for _ in range(4096 * (scope["path"] == "/long")):
        await send({"type": "http.response.body", "body": PART, "more_body": True})
    await send({"type": "http.response.body", "body": b"word"})


@contextmanager
def serving(
    app: ASGIApp,
    protocol: type[Connection],
    *,
    lifespan: Literal["on", "off"],
    log_level: str = "critical",
) -> Iterator[uvicorn.Server]:
    """A server in a thread of this process, until the block ends."""
    config = uvicorn.Config(
        app, port=0, http=protocol, lifespan=lifespan, log_config=None, log_level=log_level
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield server
    server.should_exit = True
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[uvicorn.Server]:
    """A server of impatient connections."""
    with serving(answer, Impatient, lifespan="off") as server:
        yield server


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connect(server: uvicorn.Server) -> socket.socket:
    return socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=WAIT_S)


@pytest.mark.parametrize("sent", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: here\r\n"])
def test_a_request_that_does_not_come_ends_its_connection(
    server: uvicorn.Server, sent: bytes
) -> None:
    with connect(server) as client:
        client.sendall(sent)
        assert client.recv(1) == b""


def test_a_byte_now_and_then_does_not_keep_a_connection(server: uvicorn.Server) -> None:
    with connect(server) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        client.settimeout(0.05)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                assert client.recv(1) == b""
                return
            except TimeoutError:
                client.sendall(b"X")
            except ConnectionError:
                return
        raise AssertionError("the connection is kept")


def test_an_answer_that_is_not_read_ends_its_connection(server: uvicorn.Server) -> None:
    with connect(server) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\n\r\n")
        assert client.recv(1) == b"H"
        until(lambda: not server.server_state.connections)


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nX: ",
        b"POST /body HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
    ids=["address", "headers", "trailers"],
)
def test_what_has_no_end_is_not_held(begun: bytes) -> None:
    """The parser itself has no limit."""
    with serving(answer, Patient, lifespan="off") as server, connect(server) as client:
        with suppress(ConnectionError):  # what is unread resets the connection
            client.sendall(begun + b"a: b\r\n" * MAX_HEAD_BYTES)
            while client.recv(1 << 12):
                pass
        until(lambda: not server.server_state.connections)


def test_small_parts_of_a_large_body_are_no_headers(server: uvicorn.Server) -> None:
    with connect(server) as client:
        client.sendall(b"POST /body HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            client.sendall(b"1\r\na\r\n" * (MAX_HEAD_BYTES // 12))
        client.sendall(b"0\r\n\r\n")
        assert b" 200 OK" in client.recv(1 << 12)


def test_requests_may_be_sent_ahead_up_to_a_number(server: uvicorn.Server) -> None:
    request = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
    with connect(server) as client:
        client.sendall(request * MAX_AHEAD)
        found = b""
        while found.count(b" 200 OK") < MAX_AHEAD:
            part = client.recv(1 << 16)
            assert part
            found += part
    with connect(server) as client:
        client.sendall(request * 100 * MAX_AHEAD)
        with suppress(ConnectionError):  # what is unread resets the connection
            while client.recv(1 << 16):
                pass
    until(lambda: not server.server_state.connections)
    assert server.server_state.total_requests < 10 * MAX_AHEAD


class _Transport(asyncio.Transport):
    """Takes everything, and keeps what was written in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        (b"GET / HTTP/1.1\r\n", [b"200 OK word"]),
        (b"HEAD / HTTP/1.1\r\n", [b"200 OK"]),
        (b"GET /fails HTTP/1.1\r\n", [b"200 OK"]),
        (
            b"POST /body HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 0\r\n",
            [b"100 Continue", b"200 OK word"],
        ),
    ],
    ids=["plain", "without a body", "that fails", "that waits"],
)
def test_headers_and_body_of_an_answer_are_sent_in_one_piece(
    asked: bytes, written: list[bytes]
) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/fails":
            await answer(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("of the application")

    loop = asyncio.new_event_loop()
    config = uvicorn.Config(failing, lifespan="off", log_config=None, log_level="critical")
    config.load()
    transport = _Transport()
    connection = Connection(config, uvicorn.server.ServerState(), {}, loop)
    connection.connection_made(transport)
    connection.data_received(asked + b"\r\n")
    loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop)))
    found = [
        b" ".join(word for word in (b"100 Continue", b"200 OK", b"word") if word in piece)
        for piece in transport.written
    ]
    assert found == written
    assert transport.is_closed == (b"fails" in asked)
    connection.connection_lost(None)
    loop.close()


def test_who_asks_and_reads_is_kept() -> None:
    """No deadline holds on once a request's headers are whole, or an answer is read again."""
    loop = asyncio.new_event_loop()
    config = uvicorn.Config(answer, lifespan="off", log_config=None)
    config.load()
    connection = Connection(config, uvicorn.server.ServerState(), {}, loop)
    connection.connection_made(_Transport())
    first = connection._deadline
    assert first is not None
    connection.data_received(b"POST / HTTP/1.1\r\nHost: here\r\n")
    assert connection._deadline is first and not first.cancelled()
    connection.data_received(b"Content-Length: 9\r\n\r\n12")
    assert connection._deadline is None and first.cancelled()
    connection.pause_writing()
    reading = connection._reading
    assert reading is not None and not reading.cancelled()
    connection.resume_writing()
    assert reading.cancelled()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_an_error_is_logged_by_its_place_alone() -> None:
    """uvicorn and concurrent.futures would log its message, which may quote a film's name."""

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("Doe^Jane.png")

    written, hook = io.StringIO(), threading.excepthook
    handler = log_others(written)
    try:
        with (
            serving(fail, Connection, lifespan="off", log_level="warning") as server,
            connect(server) as client,
        ):
            client.sendall(b"GET /Doe^John HTTP/1.1\r\nHost: here\r\n\r\n")
            assert b" 500 " in client.recv(1 << 12)
        done: Future[str] = Future()
        done.add_done_callback(lambda future: fail_with(future.result()))
        done.set_result("Doe^Jim.png")
        thread = threading.Thread(target=fail_with, args=["Doe^Jack.png"], name="last")
        thread.start()
        thread.join()
        logging.getLogger("python_multipart.multipart").warning("of Doe^Jill.png, no form")
    finally:
        logging.getLogger().removeHandler(handler)
        threading.excepthook = hook
    assert "Doe" not in written.getvalue()
    assert "uvicorn.error failed: ValueError in test_connections.py:" in written.getvalue()
    assert "concurrent.futures failed: ValueError in" in written.getvalue()


def fail_with(name: str) -> None:
    raise ValueError(name)


def test_a_proxy_that_is_trusted_says_whose_request_it_is() -> None:
    async def who(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(scope["client"][0])(scope, receive, send)

    async def beat() -> None:
        pass

    def clients(proxies: list[str]) -> str:
        settings = server_settings(who, proxies=proxies, stop_s=1, beat=beat)
        settings.load()
        wrapped = TestClient(settings.loaded_app, client=("10.0.0.7", 1))
        return str(wrapped.get("/", headers={"X-Forwarded-For": "192.0.2.9, 10.0.0.8"}).text)

    assert clients([]) == clients(["172.16.0.0/12"]) == "10.0.0.7"
    assert clients(["10.0.0.0/8"]) == "192.0.2.9"


@pytest.mark.parametrize(
    ("token", "kind", "status"),
    [("", "text/plain", 415), ("", "multipart/form-data; boundary=x", 400), (TOKEN, "", 401)],
)
def test_a_client_that_sends_more_than_is_read_hears_why(
    service: Service, token: str, kind: str, status: int
) -> None:
    """A connection closed with bytes unread is reset, and the answer with it is lost."""
    app = make_app(service, token=token, limits=LIMITS)
    with serving(app, Connection, lifespan="on") as server, connect(server) as client:
        size = 12 << 20
        head = f"POST /v1/films HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
        client.sendall(head.encode() + f"Content-Type: {kind}\r\n\r\n".encode())
        client.sendall(b"--x\r\n" * 100 + bytes(size - 500))
        assert f" {status} ".encode() in client.recv(1 << 12)
