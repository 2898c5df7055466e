"""HTTP connections with limits on how long they wait for a client and on the headers they hold.

uvicorn 0.54 closes a connection that stays idle after an answer. But it waits without limit for a
first request, for one that comes a byte at a time, and for a client to read its answer: with a few
hundred such connections one client would keep all others out. With the faster of its two parsers,
httptools, which is used here, it also accepts headers of any length.
"""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEADERS_S = 20.0  # for the request line and headers, from connecting or from their first byte
READING_S = 60.0  # for the client to read the next part of an answer
MAX_HEAD_BYTES: Final = 1 << 16  # of the request line and headers, and of the trailers of a body
MAX_AHEAD: Final = 16  # pipelined requests that wait for the answer to an earlier one


class _Joining:
    """A transport that sends the headers of an answer together with the first part of its body: one
    call into the system, and one wake-up of the client, in place of two.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport
        self._head: bytes | None = None  # of the answer, until it is sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, or keep the headers until the next part."""
        cycle = self._cycle
        if self._head is None and cycle.response_started and cycle.scope["method"] != "HEAD":
            self._head = data
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def close(self) -> None:
        """Send what is kept, and close."""
        if self._head:
            self._transport.write(self._head)
        self._transport.close()


class Connection(HttpToolsProtocol):
    """One connection, closed if its client takes too long to send a request or read an answer."""

    headers_s = HEADERS_S
    reading_s = READING_S
    _deadline: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _is_asking = True  # the headers of a request are still incomplete
    _num_head_bytes = 0  # received since the last byte of a body

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request, not longer than `headers_s`."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came; it may end a request's headers, or begin those of the next one."""
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")
        self._watch()

    def on_message_begin(self) -> None:
        """Note that a request has begun."""
        super().on_message_begin()
        self._is_asking = True

    def on_headers_complete(self) -> None:
        """Pass a request on. Raises `ValueError` where `MAX_AHEAD` of them wait already."""
        if len(self.pipeline) >= MAX_AHEAD:
            raise ValueError("too many requests before the first one's answer")
        super().on_headers_complete()
        self.cycle.transport = _Joining(self.cycle)  # type: ignore[assignment]
        self._is_asking, self._num_head_bytes = False, 0

    def on_body(self, body: bytes) -> None:
        """A part of a request's body."""
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        self._num_head_bytes = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Wait for the client to read, not longer than `reading_s`."""
        super().pause_writing()
        self._reading = self.loop.call_later(self.reading_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the deadline: the client has read."""
        if self._reading is not None:
            self._reading.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._stop_watching()
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        # uvicorn has its own time-out for an idle connection, but ends it at the next byte
        if not self._is_asking and not self.cycle.response_complete:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.headers_s, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
