"""A TCP relay that stands between a client and a server: it adds a latency and counts what the
server sends.

    with Relay("http://127.0.0.1:7480", latency_s=0.02) as relay:
        relay.url                     # what the client is told
        read_counts(relay.counts)     # bytes from the server and requests so far; from any process

The latency is that of one round trip, and is added where a client waits for one: to each new
connection, for the handshake, and to each request, before its first byte goes on to the server. A
request begins with the first bytes that a client sends after an answer (HTTP/1.1 without
pipelining). Nothing limits the rate, and there is no slow start: what is measured is the cost of
round trips alone. The relay is a process of its own, which moves the bytes of answers inside the
kernel (`splice`), so that it takes little of the processor from what is measured.
"""

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

_COUNTS = struct.Struct("<QQ")
_CHUNK_BYTES = 1 << 18


class Counts(NamedTuple):
    """What went through a relay since it began."""

    num_bytes: int  # from the server, headers included
    num_requests: int


def read_counts(path: str | Path) -> Counts:
    """The counts of the relay that writes `path`."""
    return Counts(*_COUNTS.unpack(Path(path).read_bytes()))


class Relay:
    """Runs until the block ends. `url` stands for `upstream`, and `counts` is the file for
    `read_counts`.
    """

    def __init__(self, upstream: str, *, latency_s: float) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.counts = str(Path(self._folder.name) / "counts")
        Path(self.counts).write_bytes(_COUNTS.pack(0, 0))
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.latency",
                urlsplit(upstream).netloc,
                str(latency_s),
                self.counts,
            ],
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self._process:  # closes its pipe
            self._process.kill()
        self._folder.cleanup()


# ---------------------------------------------------------------------------- inside of the process


class _Counter:
    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _COUNTS.size)
        self._lock = threading.Lock()

    def add(self, num_bytes: int, num_requests: int) -> None:
        with self._lock:
            found = _COUNTS.unpack(self._map[:])
            self._map[:] = _COUNTS.pack(found[0] + num_bytes, found[1] + num_requests)


def serve(upstream: str, latency_s: float, counts: str) -> None:
    """Print the port, then relay until the end of the process."""
    host, _, port = upstream.partition(":")
    counter = _Counter(counts)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _ = listener.accept()
        connection = _Connection(client, (host, int(port or 80)), latency_s, counter)
        threading.Thread(target=connection.relay, daemon=True).start()


class _Connection:
    def __init__(
        self, client: socket.socket, upstream: tuple[str, int], latency_s: float, counter: _Counter
    ) -> None:
        self._client, self._upstream, self._latency_s, self._counter = (
            client,
            upstream,
            latency_s,
            counter,
        )
        self._answered = True  # whether the next bytes of the client begin a request

    def relay(self) -> None:
        """Move bytes both ways until one side ends."""
        time.sleep(self._latency_s)
        with self._client, socket.create_connection(self._upstream) as server:
            for side in (self._client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=self._move_answers, args=(server,), daemon=True)
            answers.start()
            with contextlib.suppress(OSError):
                while data := self._client.recv(_CHUNK_BYTES):
                    if self._answered:
                        self._answered = False
                        self._counter.add(0, 1)
                        time.sleep(self._latency_s)
                    server.sendall(data)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            answers.join()

    def _move_answers(self, server: socket.socket) -> None:
        read_end, write_end = os.pipe()
        try:
            while num := os.splice(server.fileno(), write_end, _CHUNK_BYTES):
                self._answered = True
                self._counter.add(num, 0)
                while num:
                    num -= os.splice(read_end, self._client.fileno(), num)
        except OSError:
            pass  # one side broke the connection; the other sees its end
        finally:
            os.close(read_end)
            os.close(write_end)
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]), sys.argv[3])
