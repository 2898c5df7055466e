"""Clients that ask or read too slowly lose their connection, and no one else does."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from xrai.serving.connections import Connection

WAIT_S = 30.0  # only a hang reaches it
PART = bytes(1 << 16)


class Impatient(Connection):
    headers_s = 0.3
    reading_s = 0.3


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers /long with 256 MiB, which no buffer holds, anything else with a word."""
    start = {"type": "http.response.start", "status": 200, "headers": []}
    await send(start)
    for _ in range(4096 * (scope["path"] == "/long")):
        await send({"type": "http.response.body", "body": PART, "more_body": True})
    await send({"type": "http.response.body", "body": b"word"})


@pytest.fixture
def server() -> Iterator[uvicorn.Server]:
    """A server of impatient connections."""
    config = uvicorn.Config(
        answer, port=0, http=Impatient, lifespan="off", log_config=None, log_level="critical"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield server
    server.should_exit = True
    thread.join(WAIT_S)
    assert not thread.is_alive()


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


def test_who_asks_and_reads_is_kept(server: uvicorn.Server) -> None:
    """Beyond both deadlines, request after request and part after part."""
    with connect(server) as client:
        for _ in range(5):
            client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            said = b""
            while not said.endswith(b"0\r\n\r\n"):
                said += client.recv(1 << 16)
            assert b"word" in said
            time.sleep(0.1)
        client.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\n\r\n")
        began = time.monotonic()
        while time.monotonic() < began + 1:
            assert client.recv(1 << 16)
            time.sleep(0.01)
