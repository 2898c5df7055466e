"""Connections that do not wait for their clients without end.

uvicorn 0.54 closes an idle connection after an answer. But it waits as long as a client likes for a
request that does not come, or comes a byte at a time, and for an answer to be read. With a few
hundred such connections one client would keep all others out.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 20.0  # for a request's line and headers, from its first byte or from the connection
READING_S = 60.0  # for the next part of an answer to be read


class Connection(H11Protocol):
    """One connection; closed where its client takes too long to ask or to read."""

    headers_s = HEADERS_S
    reading_s = READING_S
    _deadline: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request, not longer than `headers_s`."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came; it may end a request's headers, or begin those of the next one."""
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        """Wait for the client to read, not longer than `reading_s`."""
        super().pause_writing()
        self._reading = self.loop.call_later(self.reading_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
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
        # IDLE: h11 has no whole request yet, so the deadline of its first byte holds on
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.headers_s, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
