"""The DICOM node: every object gets the answer that it deserves, and no peer can stop it."""

import io
import logging
import random
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, uid
from pynetdicom import evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode

from tests.serving.dicoms import PATIENT, association, changed, film, read, send
from xrai.errors import ConfigError, ImageError
from xrai.serving.dicom_result import Source
from xrai.serving.dimse import Limits
from xrai.serving.films import FullError
from xrai.serving.guard import is_loopback
from xrai.serving.node import Node, NodeOptions, Outcome, refuse_open, tls_context

# pynetdicom, here the client's, leaves sockets open that a peer has closed
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
DEADLINE_S = 30.0


class Taken:
    """Takes films and remembers their UIDs."""

    def __init__(self, error: Exception | None = None) -> None:
        self.uids: list[str] = []
        self.error = error

    def __call__(self, data: bytes, source: Source) -> None:
        if self.error:
            raise self.error
        assert str(read(data).SOPInstanceUID) == source.sop_instance_uid
        self.uids.append(source.sop_instance_uid)


@contextmanager
def node_of(
    take: Callable[[bytes, Source], None] | None = None, **options: object
) -> Iterator[tuple[Node, int]]:
    """A node that listens on a free port."""
    node = Node(replace(NodeOptions(port=0), **options), take or Taken())  # type: ignore[arg-type]
    port = node.start()
    try:
        yield node, port
    finally:
        node.stop()


def wait_for(met: Callable[[], bool]) -> None:
    """Wait until something holds; a hang is a failure."""
    done = threading.Event()
    for _ in range(int(DEADLINE_S / 0.02)):
        if met():
            return
        done.wait(0.02)
    raise AssertionError("it did not happen")


def test_a_film_is_taken_and_an_echo_answered() -> None:
    taken = Taken()
    with node_of(taken) as (node, port):
        with association(port) as opened:
            assert opened.send_c_echo().Status == 0
        assert send(port, film("a")) == (0x0000, "")
        assert taken.uids == [read(film("a")).SOPInstanceUID]
        assert node.state().objects["scored"] == 1
        assert node.state().num_echoes == 1


def coded(value: str) -> Dataset:
    """An item of a sequence of codes."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = value, "SCT"
    return item


@pytest.mark.parametrize(
    ("data", "outcome", "comment"),
    [
        (film(BodyPartExamined="HAND"), Outcome.OTHER, "another part of the body"),
        (film(BodyPartExamined="LSPINE"), Outcome.OTHER, "another part of the body"),
        (film(ViewPosition="LL"), Outcome.OTHER, "from the side"),
        (film(ViewCodeSequence=[coded("399173006")]), Outcome.OTHER, "from the side"),
        (film(ViewCodeSequence=[coded("399348003")]), Outcome.SCORED, ""),
        (film(Modality="ES"), Outcome.OTHER, "modality ES"),
        (film(PresentationIntentType="FOR PROCESSING"), Outcome.OTHER, "raw detector data"),
        (changed(film(), PixelData=None), Outcome.UNREADABLE, "without an image"),
        (changed(film(), PixelData=b"\0\1"), Outcome.SCORED, ""),  # a taker decodes, not the node
        (changed(film(), StudyInstanceUID=None), Outcome.UNREADABLE, "StudyInstanceUID"),
    ],
)
def test_each_object_is_answered_with_its_status(
    data: bytes, outcome: Outcome, comment: str
) -> None:
    with node_of() as (node, port):
        status, said = send(port, data)
        assert status == outcome.status
        assert comment in said
        assert node.state().objects[outcome.word] == 1


@pytest.mark.parametrize("part", ["CHEST", "", "THORAX", "PA ERECT"])
def test_a_film_of_a_chest_or_of_an_unknown_part_is_scored(part: str) -> None:
    with node_of() as (_, port):
        assert send(port, film(BodyPartExamined=part))[0] == 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (FullError("the list is full"), Outcome.FULL),
        (ImageError("is cut short or damaged"), Outcome.UNREADABLE),
        (KeyError(PATIENT), Outcome.FAILED),
    ],
)
def test_what_goes_wrong_while_scoring_is_a_status_of_its_own(
    error: Exception, outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    with node_of(Taken(error)) as (_, port), caplog.at_level(logging.DEBUG):
        status, comment = send(port, film())
    assert status == outcome.status
    assert PATIENT not in comment
    assert "Zebra" not in caplog.text
    assert ("KeyError in test_node.py" in caplog.text) == (outcome is Outcome.FAILED)


def test_other_uids_than_the_request_says_are_a_mismatch() -> None:
    data = read(film())
    encoded = encode(data, False, True)
    assert encoded is not None
    with node_of() as (_, port), association(port) as opened:
        request = C_STORE()
        request.MessageID, request.Priority = 7, 2
        request.AffectedSOPClassUID = data.SOPClassUID
        request.AffectedSOPInstanceUID = "1.2.3.6"
        request.DataSet = io.BytesIO(encoded)
        context = next(
            each for each in opened.accepted_contexts if each.abstract_syntax == data.SOPClassUID
        )
        opened._reactor_checkpoint.clear()  # as `send_c_store` does
        opened.dimse.send_msg(request, context.context_id)
        _, answer = opened.dimse.get_msg(block=True)
        opened._reactor_checkpoint.set()
        assert answer.Status == Outcome.MISMATCH.status


def test_only_callers_of_the_list_get_in() -> None:
    with node_of(callers=frozenset({"MODALITY"})) as (node, port):
        with association(port, calling="STRANGER") as opened:
            assert opened.is_rejected
        with association(port, called="OTHER") as opened:
            assert opened.is_rejected
        with association(port) as opened:
            assert opened.is_established
        assert node.state().refused["rejected"] == 2


def test_other_kinds_of_objects_are_not_agreed_on() -> None:
    with node_of() as (_, port), association(port) as opened:
        accepted = {context.abstract_syntax for context in opened.accepted_contexts}
        assert uid.DigitalXRayImageStorageForPresentation in accepted
        assert uid.CTImageStorage not in accepted


@pytest.mark.parametrize(
    ("host", "is_refused"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("::", True)]
)
def test_an_open_node_listens_to_this_machine_alone(host: str, is_refused: bool) -> None:
    assert is_loopback(host) != is_refused
    refuse_open(host, callers=["CT1"], has_tls=False)
    refuse_open(host, callers=[], has_tls=True)
    if is_refused:
        with pytest.raises(ConfigError, match="--dicom_allow"):
            refuse_open(host, callers=[], has_tls=False)
    else:
        refuse_open(host, callers=[], has_tls=False)


def test_a_port_that_is_taken_is_one_line() -> None:
    with node_of() as (_, port), pytest.raises(ConfigError, match="--dicom_port"):
        Node(NodeOptions(port=port), Taken()).start()


# ------------------------------------------------------------------------------------------ limits


def connected(port: int) -> socket.socket:
    """A connection that says what a test wants."""
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)


def is_closed(connection: socket.socket) -> bool:
    """Wait for the other end to close."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_an_object_above_the_limit_is_answered_or_ends_the_connection() -> None:
    size = 3000  # fewer than the pixels take
    with node_of(limits=Limits(max_object_bytes=size)) as (node, port):
        assert send(port, film())[0] == Outcome.TOO_LARGE.status
    with node_of(limits=Limits(max_object_bytes=size)) as (node, port):
        large = changed(film(), PixelData=bytes(4 << 20))
        with association(port) as opened:
            assert "Status" not in opened.send_c_store(read(large))
        assert node.state().refused == {"too_large": 1}
        assert send(port, film("b", BodyPartExamined="HAND"))[0]  # others go on


def test_a_pdu_that_claims_4_gib_ends_the_connection() -> None:
    with node_of() as (node, port), connected(port) as connection:
        connection.sendall(struct.pack(">BBL", 4, 0, 0xFFFFFFFF) + b"x" * 100)
        assert is_closed(connection)
        assert node.state().refused == {"too_large": 1}


def test_slow_and_silent_peers_are_dropped_and_others_go_on() -> None:
    limits = Limits(pdu_timeout_s=0.3, idle_timeout_s=0.5)
    with node_of(limits=limits) as (node, port):
        with connected(port) as slow, connected(port) as second:
            slow.sendall(b"\1\0\0")  # half a header
            second.sendall(struct.pack(">BBL", 1, 0, 500) + b"x")  # a PDU that does not go on
            assert send(port, film())[0] == 0
            assert is_closed(slow) and is_closed(second)
        assert node.state().refused == {"too_slow": 2}


def test_too_many_connections_and_associations_are_turned_away() -> None:
    with node_of(limits=Limits(num_associations=1)) as (node, port):
        with association(port) as first, association(port) as second:
            assert first.is_established and second.is_rejected
        idle = [connected(port) for _ in range(12)]
        wait_for(lambda: node.state().refused.get("too_many", 0) > 0)
        for each in idle:
            each.close()
        wait_for(lambda: not any("Acceptor" in each.name for each in threading.enumerate()))
        assert send(port, film())[0] == 0


def is_open(connection: socket.socket) -> bool:
    """Whether the other end has not closed a connection."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_peers_that_say_nothing_keep_nobody_out(is_encrypted: bool, certificates: Path) -> None:
    own, trusted = None, None
    if is_encrypted:
        cert, key = str(certificates / "cert.pem"), str(certificates / "key.pem")
        own, trusted = tls_context(cert, key, ""), client_tls(certificates, shows_own=False)
    with node_of(limits=Limits(num_associations=2), tls=own) as (node, port):
        before = threading.active_count()
        silent = [connected(port) for _ in range(200)]
        wait_for(lambda: node.state().refused.get("too_many", 0) >= 192)
        assert threading.active_count() - before <= 2 * 2 * 8 + 8  # two of each, and of the last
        options: dict[str, Any] = {"tls_args": (trusted, "localhost")} if is_encrypted else {}
        with association(port, **options) as opened:
            assert opened.is_established
            assert opened.send_c_store(read(film())).Status == 0
        assert sum(map(is_open, silent)) <= 8
        assert "handshake" not in node.state().refused
        for each in silent:
            each.close()


def request_of_an_association(port: int) -> bytes:
    """What a peer sends first."""
    sent: list[bytes] = []
    handler = (evt.EVT_DATA_SENT, lambda event: sent.append(event.data))
    with association(port, evt_handlers=[handler]) as opened:
        assert opened.is_established
    return sent[0]


def test_associations_that_are_never_used_are_refused_or_end() -> None:
    limits = Limits(num_associations=3, idle_timeout_s=1.0)
    with node_of(limits=limits) as (node, port):
        request = request_of_an_association(port)
        wait_for(lambda: node.state().num_associations == 0)
        idle = [connected(port) for _ in range(60)]
        for each in idle:
            with suppress(OSError):  # has given way
                each.sendall(request)
        wait_for(lambda: node.state().num_associations == 3)
        assert all(is_closed(each) for each in idle)  # at the end of its time
        assert send(port, film())[0] == 0
        for each in idle:
            each.close()


def test_an_idle_association_gives_its_place_to_another_but_not_one_in_use() -> None:
    handling, released = threading.Event(), threading.Event()

    def take(data: bytes, source: Source) -> None:
        handling.set()
        assert released.wait(DEADLINE_S)

    limits = Limits(num_associations=2, idle_timeout_s=600.0, kept_idle_s=0.0)
    with node_of(take, limits=limits) as (node, port), association(port) as busy:
        answers: list[int] = []
        sending = threading.Thread(
            target=lambda: answers.append(busy.send_c_store(read(film())).Status)
        )
        sending.start()
        assert handling.wait(DEADLINE_S)
        with association(port) as idle:
            assert idle.is_established
            with association(port) as other:
                wait_for(lambda: not idle.is_established)
                assert other.send_c_echo().Status == 0
        released.set()
        sending.join(DEADLINE_S)
        assert answers == [0]
        assert node.state().refused == {"idle": 1}


def test_an_association_that_was_used_a_moment_ago_keeps_its_place() -> None:
    with node_of(limits=Limits(num_associations=1, kept_idle_s=600.0)) as (node, port):
        with association(port) as first, association(port) as second:
            assert second.is_rejected and first.send_c_echo().Status == 0
        assert node.state().refused == {"too_many": 1}


def test_stopping_does_not_wait_for_peers_that_hang() -> None:
    with node_of() as (node, port):
        request = request_of_an_association(port)
        hanging = [connected(port) for _ in range(3)]
        hanging[0].sendall(b"\1\0\0")
        hanging[1].sendall(request)
        wait_for(lambda: node.state().num_associations == 1)
        hanging[1].sendall(struct.pack(">BBL", 4, 0, 500) + b"half")
        stopping = threading.Thread(target=node.stop)
        stopping.start()
        stopping.join(Limits().pdu_timeout_s / 2)
        assert not stopping.is_alive()
        assert all(is_closed(each) for each in hanging)
        for each in hanging:
            each.close()


def test_garbage_before_an_association_harms_nobody() -> None:
    drawn = random.Random(3)
    with node_of() as (_, port):
        for _ in range(8):
            with connected(port) as connection:
                head = struct.pack(">BBL", drawn.randrange(10), 0, drawn.randrange(300))
                connection.sendall(head + drawn.randbytes(300))
        assert send(port, film())[0] == 0


# --------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem and key.pem for localhost, signed by themselves."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def client_tls(certificates: Path, *, shows_own: bool) -> ssl.SSLContext:
    """What a modality trusts and shows."""
    context = ssl.create_default_context(cafile=str(certificates / "cert.pem"))
    if shows_own:
        context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    return context


def test_tls_with_and_without_certificates_of_clients(certificates: Path) -> None:
    cert, key = str(certificates / "cert.pem"), str(certificates / "key.pem")
    with node_of(tls=tls_context(cert, key, cert)) as (node, port):
        with connected(port) as silent:  # a handshake that never comes delays nobody
            with association(
                port, tls_args=(client_tls(certificates, shows_own=True), "localhost")
            ) as a:
                assert a.is_established
                assert a.send_c_store(read(film())).Status == 0
            silent.close()
        with association(
            port, tls_args=(client_tls(certificates, shows_own=False), "localhost")
        ) as a:
            assert not a.is_established
        with association(port) as a:
            assert not a.is_established
        wait_for(lambda: node.state().refused.get("handshake", 0) >= 2)


def first_of_a_handshake(context: ssl.SSLContext) -> bytes:
    """What a client sends first."""
    sent = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


def test_handshakes_that_are_cut_harm_nobody(certificates: Path) -> None:
    cert, key = str(certificates / "cert.pem"), str(certificates / "key.pem")
    trusted = client_tls(certificates, shows_own=False)
    hello = first_of_a_handshake(trusted)
    parts = [hello[:3], hello[:50], hello, hello[:40] + bytes(400), b"GET / HTTP/1.1\r\n\r\n"]
    with node_of(tls=tls_context(cert, key, "")) as (node, port):
        for said in parts:
            with connected(port) as connection:
                connection.sendall(said)
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # a reset
        wait_for(lambda: node.state().refused.get("handshake", 0) == len(parts))
        with association(port, tls_args=(trusted, "localhost")) as opened:
            assert opened.send_c_store(read(film())).Status == 0
    assert not [each for each in threading.enumerate() if "process_request" in each.name]


def test_a_missing_certificate_and_an_encrypted_key_are_one_line(
    tmp_path: Path, certificates: Path
) -> None:
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        tls_context(str(tmp_path / "missing.pem"), "", "")
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", str(certificates / "key.pem"), "-aes256"]
    command += ["-passout", "pass:word", "-out", str(locked)]
    subprocess.run(command, check=True)
    with pytest.raises(ConfigError, match=r"locked\.key"):  # and nobody is asked for the word
        tls_context(str(certificates / "cert.pem"), str(locked), "")
