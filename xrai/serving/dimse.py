"""pynetdicom, kept quiet and within limits: its one home is here.

pynetdicom 3.0 trusts its peers: it reads a PDU of any stated length, waits for its bytes without a
limit, does TLS handshakes in the thread that accepts connections, and collects the data of messages
while others wait. `GuardedServer` limits all of that, and `associate` what an archive may do.
"""

import logging
import math
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from weakref import WeakKeyDictionary

from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

MAX_PDU_BYTES: Final = 1 << 17  # the largest PDU that we ask peers to send

_NOWHERE = logging.NullHandler()
_MAX_READ_BYTES = 1 << 20  # of one PDU: an A-ASSOCIATE-RQ with all contexts is smaller
_CHUNK_BYTES = 1 << 16
_OVERHEAD = 1.25  # bytes received per byte of an object that comes in small fragments
_MAX_QUEUED = 4  # unhandled messages of a peer that does not wait for answers
_LOCAL_LIMIT = (0x02, 0x03, 0x02)  # rejected for now, by the provider: local limit exceeded
_MAX_ANSWER_BYTES = 1 << 16  # of an archive's answer to what we send
_SILENT = 4  # connections without a request yet, for each association that is allowed
_SILENT_DELAY_S = 0.02  # between polls of such a connection; pynetdicom polls every millisecond
_DELAY_S = 0.001


@dataclass(frozen=True)
class Limits:
    """How much peers may send, and how long they may take."""

    max_object_bytes: int = 1 << 28
    num_associations: int = 8
    idle_timeout_s: float = 60.0
    pdu_timeout_s: float = 30.0  # from the first to the last byte of a PDU
    object_timeout_s: float = 300.0  # from the first to the last byte of an object
    kept_idle_s: float = 5.0  # an association idle for longer gives way where there are too many


def silence() -> None:
    """Silence the logs and warnings of the DICOM packages for the rest of this process: they quote
    names, identifiers and whole data sets.
    """
    for name in ("pydicom", "pynetdicom", "highdicom"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.addHandler(_NOWHERE)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False


def entity(ae_title: str, *, timeout_s: float) -> AE:
    """An application entity that waits no longer than this for answers."""
    silence()
    found = AE(ae_title=ae_title)
    found.acse_timeout = found.dimse_timeout = found.network_timeout = timeout_s
    found.maximum_pdu_size = MAX_PDU_BYTES
    return found


class Guard:
    """Counts and times what one peer sends, in place of `AssociationSocket.recv`.

    What it raises ends the connection: `OSError` is what pynetdicom expects there.
    """

    def __init__(self, sock: socket.socket, limits: Limits, refuse: Callable[[str], None]) -> None:
        self._socket, self._limits, self._refuse = sock, limits, refuse
        self._num_bytes, self._since = 0, 0.0  # of the message under way, and when it began
        self._num_queued, self._has_ended = 0, False
        self._num_unanswered, self._idle_since = 0, math.inf

    def recv(self, nr_bytes: int) -> bytearray:
        """Receive `nr_bytes` bytes, or fewer where the peer has closed the connection."""
        num_bytes, now = nr_bytes, time.monotonic()
        self._since = self._since if self._num_bytes else now
        self._num_bytes += num_bytes
        most = self._limits.max_object_bytes * _OVERHEAD + _MAX_READ_BYTES
        if num_bytes > _MAX_READ_BYTES or self._num_bytes > most:
            self._end("too_large")
        if self._num_queued > _MAX_QUEUED:
            self._end("too_many")
        deadline = min(
            now + self._limits.pdu_timeout_s, self._since + self._limits.object_timeout_s
        )
        found = bytearray()
        while len(found) < num_bytes:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._end("too_slow")
            self._socket.settimeout(left_s)
            try:
                part = self._socket.recv(min(_CHUNK_BYTES, num_bytes - len(found)))
            except TimeoutError:
                continue
            if not part:
                break
            found += part
        self._socket.settimeout(self._limits.pdu_timeout_s)  # now for sending
        return found

    def message_ends(self, event: evt.Event) -> None:
        """Begin a new count after a whole message; note how many wait to be handled."""
        self._num_bytes = 0
        self._num_unanswered += 1
        self._num_queued = event.assoc.dimse.msg_queue.qsize()

    def established(self, event: evt.Event) -> None:
        """Begin to count anew after the request of the association, which is idle now."""
        self._num_bytes, self._idle_since = 0, time.monotonic()

    def answered(self, event: evt.Event) -> None:
        """Note that an answer is sent."""
        self._num_unanswered -= 1
        self._idle_since = time.monotonic()

    @property
    def idle_since(self) -> float:
        """When the association became idle; infinite while a message arrives or is handled."""
        return math.inf if self._num_bytes or self._num_unanswered else self._idle_since

    def leave(self) -> None:
        """Count as busy from now on, since the association ends."""
        self._num_unanswered += 1

    def _end(self, reason: str) -> NoReturn:
        if not self._has_ended:  # what else the peer sends is read until it closes the connection
            self._has_ended = True
            self._refuse(reason)
        raise OSError(f"the peer is {reason}")


class _Handler(RequestHandler):
    """Gives each association a guard."""

    server: "GuardedServer"

    def _create_association(self) -> Association:
        association = super()._create_association()
        assert isinstance(self.request, socket.socket) and association.dul.socket is not None
        guard = Guard(self.request, self.server.limits, self.server.refuse)
        association.dul.socket.recv = guard.recv  # type: ignore[method-assign]
        association.bind(evt.EVT_DIMSE_RECV, guard.message_ends)
        association.bind(evt.EVT_ESTABLISHED, guard.established)
        association.bind(evt.EVT_DIMSE_SENT, guard.answered)
        self.server.guards[association] = guard
        association.dul._run_loop_delay = _SILENT_DELAY_S
        association.bind(evt.EVT_REQUESTED, self._requested)
        association.bind(evt.EVT_CONN_CLOSE, self._closed)
        return association

    def _requested(self, event: evt.Event) -> None:
        """Reject an association where there are too many and none gives way. pynetdicom's own limit
        would count connections that have asked for nothing yet.
        """
        self.server.has_spoken(self.request)
        event.assoc.dul._run_loop_delay = _DELAY_S
        established = sum(each.is_established for each in self.server.active_associations)
        is_full = established >= self.server.limits.num_associations
        if is_full and not self.server.make_room():
            self.server.refuse("too_many")
            event.assoc.acse.send_reject(*_LOCAL_LIMIT)
            event.assoc.kill()

    def _closed(self, event: evt.Event) -> None:
        """Close the socket, which pynetdicom leaves open if the peer closed it first, and wake the
        thread of a peer that has not asked for an association.
        """
        self.request.close()
        if event.assoc.requestor.primitive is None:
            event.assoc.dul.to_user_queue.put(None)  # type: ignore[arg-type]


def associate(
    own: AE, address: tuple[str, int], called: str, *, tls: ssl.SSLContext | None
) -> Association:
    """An association that we ask for, whether it is established or not.

    pynetdicom waits without limit where a peer stops in the middle of a PDU, or reads none of what
    is sent; here the connection ends after the time-out of `own`. Raises `OSError` or `ValueError`
    for a host that cannot be found.
    """
    timeout_s = own.network_timeout
    assert timeout_s is not None
    limits = Limits(max_object_bytes=_MAX_ANSWER_BYTES, pdu_timeout_s=timeout_s)

    def limit(event: evt.Event) -> None:
        association = event.assoc
        held = association.dul.socket
        assert held is not None and held.socket is not None
        held.socket.settimeout(timeout_s)  # for sending, too
        guard = Guard(held.socket, limits, lambda reason: None)
        held.recv = guard.recv  # type: ignore[method-assign]
        association.bind(evt.EVT_DIMSE_RECV, guard.message_ends)

    return own.associate(
        *address,
        ae_title=called,
        tls_args=(tls, address[0]) if tls else None,
        evt_handlers=[(evt.EVT_CONN_OPEN, limit)],
    )


def cut(association: Association) -> None:
    """End a connection at once, from any thread: what waits for the peer fails."""
    held = association.dul.socket
    if held is not None and held.socket is not None:
        shut(held.socket)


def shut(connection: socket.socket) -> None:
    """End a connection from any thread: what waits for the peer fails."""
    with suppress(OSError):  # is closed already
        # not SSLSocket.shutdown, which drops the TLS state that another thread is using
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def close_socket(association: Association) -> None:
    """Close the socket of an association that has ended; pynetdicom leaves it open if the peer
    closed it first, or rejected the association.
    """
    held = association.dul.socket
    if held is not None and held.socket is not None:
        held.socket.close()


class GuardedServer(ThreadedAssociationServer):
    """Accepts connections, and gives each a thread, which also does the TLS handshake.

    Where too many have not asked for an association yet, the oldest of these is closed: otherwise a
    peer that opens connections and stays silent would keep all others out.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that are not accepted yet

    def __init__(
        self,
        own: AE,
        address: tuple[str, int],
        handlers: list[evt.EventHandlerType],
        *,
        tls: ssl.SSLContext | None,
        limits: Limits,
        refuse: Callable[[str], None],
    ) -> None:
        """Listen. `refuse` is called with a one-word reason for each peer that is turned away."""
        self.limits, self.refuse = limits, refuse
        self._lock = threading.Lock()
        self._silent: dict[socket.socket, None] = {}  # the oldest first
        self.guards: WeakKeyDictionary[Association, Guard] = WeakKeyDictionary()
        super().__init__(
            own, address, own.ae_title, own.supported_contexts, tls, handlers, _Handler
        )
        own._servers.append(self)  # which `shutdown` takes back

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection, before its TLS handshake. Raises `OSError` if the peer has closed it."""
        assert self.socket is not None
        connection, address = self.socket.accept()
        connection.settimeout(self.limits.pdu_timeout_s)
        if self.ssl_context is not None:
            try:
                connection = self.ssl_context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            except OSError:  # the peer has closed it already
                self.refuse("handshake")
                connection.close()
                raise
        with self._lock:
            self._silent = {each: None for each in self._silent if each.fileno() >= 0}
            self._silent[connection] = None
            oldest = next(iter(self._silent))
            if len(self._silent) <= _SILENT * self.limits.num_associations:
                return connection, address
            del self._silent[oldest]
        self.refuse("too_many")
        shut(oldest)
        return connection, address

    def has_spoken(self, connection: socket.socket) -> bool:
        """Note that a connection asks for an association, or fails; False if it was not silent, or
        was closed as the oldest.
        """
        with self._lock:
            return connection in self._silent and self._silent.pop(connection) is None

    def make_room(self) -> bool:
        """End the association that has been idle for the longest; False if all are in use, or were
        a moment ago.
        """
        latest = time.monotonic() - self.limits.kept_idle_s
        with self._lock:
            open_now = [each for each in self.active_associations if each.is_established]
            if not open_now:
                return True
            oldest = min(open_now, key=lambda each: self.guards[each].idle_since)
            if self.guards[oldest].idle_since > latest:
                return False
            self.guards[oldest].leave()
        self.refuse("idle")
        oldest.abort(block=False)
        return True

    def end(self, *, timeout_s: float) -> None:
        """Abort all associations, and end the connections of peers that do not react in time."""
        with self._lock:
            silent, self._silent = list(self._silent), {}
        for connection in silent:
            shut(connection)
        associations = self.active_associations
        for association in associations:
            if association.is_established:
                association.abort(block=False)
        deadline = time.monotonic() + timeout_s
        for association in associations:
            association.join(max(0.0, deadline - time.monotonic()))
            cut(association)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Do the TLS handshake, and begin to listen to the peer."""
        try:
            if isinstance(request, ssl.SSLSocket):
                request.do_handshake()
            self.finish_request(request, client_address)
        except (OSError, ValueError):  # ssl.SSLError; ValueError: the socket was closed
            if self.has_spoken(request):
                self.refuse("handshake")
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count what went wrong; socketserver would print it, with what the peer sent."""
        self.refuse("error")
