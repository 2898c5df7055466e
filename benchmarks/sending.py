"""Sends films to a server as requests that are prepared beforehand, from one thread without an HTTP
library: 0.1 ms of processor time for a film in place of 0.4, so that the cores that server and
client share are the server's. Used by `benchmarks.serving`.
"""

import random
import re
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack

_ANSWER_S = 60.0
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
_BOUNDARY = "film-5f2c1d7e9a"
_BOTH = selectors.EVENT_READ | selectors.EVENT_WRITE


def request_of(film: bytes) -> bytes:
    """The request that sends a film."""
    head = "POST /v1/films HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
    return f"{head}Content-Length: {len(film)}\r\n\r\n".encode() + film


def request_of_several(films: Sequence[bytes]) -> bytes:
    """The request that sends several films, as a form."""
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="film"; filename="{number}.jpeg"'
        "\r\nContent-Type: image/jpeg\r\n\r\n"
        for number in range(len(films))
    )
    parts = [each.encode() + film + b"\r\n" for each, film in zip(head, films, strict=True)]
    body = b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()
    start = "POST /v1/films HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    start += f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n"
    return f"{start}Content-Length: {len(body)}\r\n\r\n".encode() + body


def send_all(port: int, requests: Sequence[bytes], num_requests: int, *, clients: int) -> float:
    """Send requests, again and again, by so many connections at once; the seconds that it took."""
    began = time.perf_counter()
    _send(port, requests, [began] * num_requests, clients)
    return time.perf_counter() - began


def send_at_random(
    port: int, requests: Sequence[bytes], num_films: int, *, clients: int, per_s: float
) -> list[float]:
    """Send requests at random times, so many a second, each by a connection that is free; the
    seconds of each, from when it was due to its answer.
    """
    chance, due = random.Random(0), [time.perf_counter()]
    while len(due) < num_films:
        due.append(due[-1] + chance.expovariate(per_s))
    return _send(port, requests, due, clients)


class _Connection:
    """A connection, and the film that it sends."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = 0
        self.unsent = memoryview(b"")
        self._answer = b""

    def begin(self, number: int, request: bytes) -> None:
        self.number, self.unsent, self._answer = number, memoryview(request), b""
        self.send()

    def send(self) -> None:
        """Send as much as the other side takes."""
        self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def is_answered(self) -> bool:
        """Take what has come; whether the answer is whole. Raises `OSError` for any but 201."""
        part = self.socket.recv(1 << 16)
        self._answer += part
        head, _, body = self._answer.partition(b"\r\n\r\n")
        if not part or (body and not head.startswith(b"HTTP/1.1 201 ")):
            raise OSError(f"no film: {self._answer[:300]!r}")
        length = _LENGTH.search(head + b"\r\n")
        return bool(body) and length is not None and len(body) == int(length[1])


def _send(port: int, requests: Sequence[bytes], due: Sequence[float], clients: int) -> list[float]:
    """Send a request at each time, or when a connection is free; the seconds until the answer."""
    taken, num_sent, num_answered = [0.0] * len(due), 0, 0
    with (
        ExitStack() as stack,
        selectors.SelectSelector() as selector,
    ):  # the others wait whole milliseconds
        free = [_Connection(port) for _ in range(clients)]
        for connection in free:
            stack.enter_context(connection.socket)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        while num_answered < len(due):
            while num_sent < len(due) and free and due[num_sent] <= time.perf_counter():
                connection = free.pop()
                connection.begin(num_sent, requests[num_sent % len(requests)])
                if connection.unsent:
                    selector.modify(connection.socket, _BOTH, connection)
                num_sent += 1
            timeout = _ANSWER_S
            if num_sent < len(due) and free:
                timeout = max(0.0, due[num_sent] - time.perf_counter())
            ready = selector.select(timeout)
            if not ready and timeout == _ANSWER_S:
                raise TimeoutError("no answer")
            for key, events in ready:
                connection = key.data
                if events & selectors.EVENT_WRITE:
                    connection.send()
                    if not connection.unsent:
                        selector.modify(connection.socket, selectors.EVENT_READ, connection)
                if events & selectors.EVENT_READ and connection.is_answered():
                    taken[connection.number] = time.perf_counter() - due[connection.number]
                    num_answered += 1
                    free.append(connection)
    return taken
