"""A proxy in front of an S3 server that fails on request: the network and the server at their
worst, for real.

    with Proxy("http://127.0.0.1:7480") as proxy:
        proxy.fail("cut", path="train-00000", times=2)  # its next two GETs stop half way
        proxy.vanish()  # nobody listens, and open connections break
        proxy.appear()

Headers pass unchanged, Host too, so that the server's check of the signature holds.
"""

import contextlib
import http.client
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

Kind = Literal[
    "503",  # SlowDown, as S3 says it
    "stall",  # the head and half of the body, then silence
    "hold",  # silence; the server never sees the request
    "hang",  # no answer until faults are healed, then as "reset"
    "reset",  # the connection breaks before any answer; the server never saw the request
    "lose",  # the server did what was asked, and the answer is lost
    "cut",  # the body ends half way
    "flip",  # one bit of the body is not what the server sent
    "damage",  # one bit of the request's body is not what the client sent
    "whole",  # a request for a range gets the whole object, as it was when it was last read
    "garbage",  # an answer that is no S3 server's
    "forbid",  # 403
]


@dataclass
class _Fault:
    kind: Kind
    method: str
    path: str
    times: int


class Request(NamedTuple):
    """One request as it came."""

    method: str
    path: str
    range: str


class Proxy:
    """Listens on a port of its own until it is closed. `requests` lists all that came, those
    that failed too.
    """

    def __init__(self, upstream: str) -> None:
        self.requests: list[Request] = []
        self.last_whole: tuple[int, dict[str, str], bytes] = (
            500,
            {},
            b"",
        )  # the last good answer to a GET
        self.held = False  # whether a request has come that is held
        self._upstream = urlsplit(upstream).netloc
        self._faults: list[_Fault] = []
        self.healed = threading.Event()  # of the requests that hang now
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0
        self.appear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def fail(self, kind: Kind, *, path: str = "", method: str = "GET", times: int = 1) -> None:
        """Let the next `times` requests of this method whose path contains `path` fail so."""
        with self._lock:
            self._faults.append(_Fault(kind, method, path, times))

    def heal(self) -> None:
        """Forget all faults that are still to come; requests that hang end."""
        with self._lock:
            self._faults.clear()
            self.healed.set()
            self.healed = threading.Event()

    def count(self, path: str, method: str = "GET") -> int:
        """How many requests of this method have come, whose path contains `path`."""
        return sum(path in request.path and method == request.method for request in self.requests)

    def vanish(self) -> None:
        """Stop listening and break all connections."""
        self.healed.set()
        if self._server is not None:
            self._server.end()
            self._server = None

    def appear(self) -> None:
        """Listen again, on the same port."""
        if self._server is None:
            self._server = _Server(self, self._port)
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.vanish()

    def next_fault(self, request: Request) -> Kind | None:
        """Note a request, and say what is to happen to it."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if (
                    fault.times > 0
                    and fault.method == request.method
                    and fault.path in request.path
                ):
                    fault.times -= 1
                    return fault.kind
        return None

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """The server's own answer: status, headers and body."""
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read()
        if method == "GET" and answer.status == 200:
            self.last_whole = found
        return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self, proxy: Proxy, port: int) -> None:
        self.proxy = proxy
        self.ended = threading.Event()
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        self.close_request(request)  # without a polite end, which would hide a reset

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that left; the tests look at the client's side

    def end(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = dict(self.headers.items())
        fault = self.server.proxy.next_fault(
            Request(self.command, self.path, headers.get("Range", ""))
        )
        if fault == "hang":
            self.server.proxy.healed.wait(timeout=300)
        if fault in ("hang", "reset"):
            return self._reset()
        if fault == "hold":
            self.server.proxy.held = True
            self.server.ended.wait(timeout=60)
            self.close_connection = True
            return None
        if fault == "503":
            return self._send(
                503,
                {},
                b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>",
            )
        if fault == "forbid":
            return self._send(
                403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            )
        if fault == "garbage":
            return self._send(200, {}, b"<!doctype html><p>Welcome to our wiki")
        if fault == "damage":
            body = _flip(body)
        if fault == "whole":  # a changed header would not fit the signature
            return self._send(*self.server.proxy.last_whole)
        status, headers, data = self.server.proxy.forward(self.command, self.path, headers, body)
        if fault == "lose":
            return self._reset()
        if fault == "flip":
            data = _flip(data)
        if fault in ("cut", "stall"):
            self._send_head(status, headers, len(data))
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.ended.wait(timeout=60)
            self.close_connection = True
            return None
        self._send(status, headers, data)
        return None

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815, the base class calls them so

    def _reset(self) -> None:
        """End the connection as a machine does that has lost its power."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self._send_head(status, headers, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if self.command == "HEAD":
            length = int(headers.get("Content-Length", headers.get("content-length", 0)))
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _flip(data: bytes) -> bytes:
    """The same with one bit changed, in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :] if data else data


def vanish_for(proxy: Proxy, seconds: float) -> threading.Thread:
    """Let the server be gone for a while; the thread ends when it is back."""
    proxy.vanish()

    def come_back() -> None:
        time.sleep(seconds)
        proxy.appear()

    thread = threading.Thread(target=come_back, daemon=True)
    thread.start()
    return thread
