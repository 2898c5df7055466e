"""The outbox: nothing is lost and nothing is another object, whatever is killed or goes away."""

import io
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from pynetdicom import evt
from pynetdicom.pdu import P_DATA_TF

from tests.serving.dicoms import DEVICE, PATIENT, ROW, Archive, read, source_of
from xrai.errors import ConfigError, InUseError
from xrai.serving.dicom import _pacs_tls
from xrai.serving.dicom_result import Result, Source, write_capture, write_report
from xrai.serving.films import FullError
from xrai.serving.outbox import Delivery, Outbox, Waits
from xrai.serving.pacs import AwayError, DimsePacs, Pacs, Session, WebPacs, find_pacs

# pynetdicom leaves the socket open where nobody listens
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
DEADLINE_S = 60.0
QUICK = Waits(first_s=0.02, longest_s=0.1)


def result(number: int) -> Result:
    """The report of a film that does not exist."""
    source = source_of()
    return write_report(
        Source(source.sop_class_uid, f"1.2.3.{number}", "1.2.4", "1.2.5", source.texts), ROW, DEVICE
    )


def put(outbox: Outbox, number: int) -> str:
    found = result(number)
    outbox.put(found.sop_instance_uid, found.data)
    return found.sop_instance_uid


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    found = Outbox(tmp_path / "outbox")
    yield found
    found.close()


@contextmanager
def delivery(outbox: Outbox, pacs: Pacs, waits: Waits = QUICK) -> Iterator[Delivery]:
    """Sends what is in an outbox."""
    found = Delivery(outbox, pacs, waits)
    found.start()
    try:
        yield found
    finally:
        found.stop()


def wait_until_empty(outbox: Outbox) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while outbox.pending():
        assert time.monotonic() < deadline, "the outbox did not become empty"
        time.sleep(0.01)


def uids(archive: Archive) -> list[str]:
    return [str(dataset.SOPInstanceUID) for dataset in archive.stored]


def test_results_reach_the_archive_and_only_their_owner_can_read_them(outbox: Outbox) -> None:
    wanted = [put(outbox, number) for number in range(3)]
    for path in (outbox.folder, *outbox.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    with (
        Archive().running() as archive,
        delivery(outbox, DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")) as sending,
    ):
        wait_until_empty(outbox)
        assert uids(archive) == wanted
        assert sending.state().num_sent == 3


def test_what_was_sent_or_waits_is_not_put_again(outbox: Outbox) -> None:
    first = result(1)
    assert outbox.put(first.sop_instance_uid, first.data)
    assert not outbox.put(first.sop_instance_uid, first.data)
    outbox.was_sent(outbox.pending()[0])
    assert not outbox.put(first.sop_instance_uid, first.data)
    assert outbox.pending() == []


def test_an_archive_that_is_away_gets_everything_when_it_is_back(outbox: Outbox) -> None:
    archive = Archive()
    with archive.running():
        pass  # so that it has a port
    pacs = DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")
    with delivery(outbox, pacs) as sending:
        wanted = {put(outbox, number) for number in range(4)}
        while not sending.state().num_failures:
            time.sleep(0.01)
        assert "does not answer" in sending.state().trouble
        assert sending.state().num_pending == 4
        with archive.running():
            wait_until_empty(outbox)
        assert set(uids(archive)) == wanted
        assert sending.state().trouble == ""


def test_one_refused_result_is_put_aside_with_its_reason_and_others_go_on(outbox: Outbox) -> None:
    bad, good = put(outbox, 1), put(outbox, 2)
    with (
        Archive(statuses={bad: 0xC123}).running() as archive,
        delivery(outbox, DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")) as sending,
    ):
        wait_until_empty(outbox)
        assert uids(archive) == [good]
        assert archive.num_requests == 1 + QUICK.max_refusals
        assert sending.state().num_given_up == 1
    aside = outbox.folder / "given-up" / f"{bad}.dcm"
    assert read(aside).SOPInstanceUID == bad
    assert "C123" in aside.with_suffix(".txt").read_text()
    aside.rename(outbox.folder / "pending" / aside.name)  # a person tries again
    with (
        Archive().running() as archive,
        delivery(outbox, DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")),
    ):
        wait_until_empty(outbox)
        assert uids(archive) == [bad]


def test_results_older_than_the_limit_are_given_up_while_the_archive_is_away(
    outbox: Outbox,
) -> None:
    old = put(outbox, 1)
    (path,) = outbox.pending()
    os.utime(path, (1, 1))
    new = put(outbox, 2)
    with delivery(outbox, DimsePacs("127.0.0.1", 1, "ARCHIVE", "XRAI")) as sending:
        while not sending.state().num_given_up:
            time.sleep(0.01)
    assert [path.stem for path in outbox.pending()] == [new]
    assert (outbox.folder / "given-up" / f"{old}.dcm").exists()


def test_a_file_that_is_gone_before_its_age_is_read_is_no_longer_pending(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gone = put(outbox, 1), put(outbox, 2)
    real = os.scandir

    @contextmanager
    def racing(folder: Path) -> Iterator[list[os.DirEntry[str]]]:
        with real(folder) as entries:
            found = list(entries)
        (outbox.folder / "pending" / f"{gone}.dcm").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", racing)
    assert [path.stem for path in outbox.pending()] == [kept]


def test_what_is_no_result_keeps_none_back(outbox: Outbox) -> None:
    pending = outbox.folder / "pending"
    (pending / "1.2.txt").write_text("why it was given up")
    (pending / "1.1.1.dcm").write_bytes(b"no DICOM")
    sent = put(outbox, 1)
    archive = Archive()
    with (
        archive.running(),
        delivery(
            outbox,
            find_pacs(f"127.0.0.1:{archive.port}:ARCHIVE", calling="XRAI", tls=None, token=""),
        ) as found,
    ):
        deadline = time.monotonic() + DEADLINE_S
        while sent not in uids(archive):
            assert time.monotonic() < deadline, found.state()
            time.sleep(0.01)


class Picky:
    """An archive that breaks the connection over some objects."""

    name = "picky"

    def __init__(self, bad: set[str]) -> None:
        self.bad, self.stored = bad, list[str]()

    @contextmanager
    def open(self) -> Iterator[Session]:
        yield self

    def store(self, file: Path) -> None:
        if file.stem in self.bad:
            raise AwayError("it has ended the association")
        self.stored.append(file.stem)

    def cut(self) -> None:
        pass


def test_a_result_over_which_the_archive_breaks_down_does_not_hold_up_others(
    outbox: Outbox,
) -> None:
    bad, *good = [put(outbox, number) for number in range(4)]
    picky = Picky({bad})
    with delivery(outbox, picky, Waits(first_s=0.0)):  # always due
        while len(outbox.pending()) > 1:
            time.sleep(0.01)
        assert picky.stored == good


def wait_until_given_up(outbox: Outbox, uid: str) -> str:
    """Why a result was given up."""
    deadline = time.monotonic() + DEADLINE_S
    while not (outbox.folder / "given-up" / f"{uid}.dcm").exists():
        assert time.monotonic() < deadline, "the result was not given up"
        time.sleep(0.01)
    return (outbox.folder / "given-up" / f"{uid}.txt").read_text()


def test_a_file_cut_off_after_its_file_meta_is_given_up_and_holds_up_no_other(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    bad, *good = [put(outbox, number) for number in range(4)]
    path = outbox.folder / "pending" / f"{bad}.dcm"
    data = path.read_bytes()
    path.write_bytes(data[: 144 + int.from_bytes(data[140:144], "little")])  # (0002,0000)
    os.utime(path, (1, time.time() - 60))  # still the first in line
    with (
        Archive().running() as archive,
        delivery(outbox, DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")),
    ):
        assert "not a complete DICOM object" in wait_until_given_up(outbox, bad)
        wait_until_empty(outbox)
        assert uids(archive) == good
    assert f"{bad}.dcm" in caplog.text and "not a complete DICOM object" in caplog.text


def wait_until_one_fails(outbox: Outbox, sending: Delivery) -> None:
    """Until one result has failed time and again, and no other waits."""
    deadline = time.monotonic() + DEADLINE_S
    while len(outbox.pending()) > 1 or sending.state().num_failures < 6:
        assert time.monotonic() < deadline, sending.state()
        time.sleep(0.01)


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_a_file_that_cannot_be_read_is_given_up_when_it_is_old_and_holds_up_no_other(
    outbox: Outbox, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    unreadable = outbox.folder / "pending" / "1.1.dcm"
    unreadable.mkdir()  # rights do not stop root
    os.utime(unreadable, (1, 1))
    good = [put(outbox, number) for number in range(3)]
    week_s = 7 * 24 * 3600.0
    with Archive().running() as archive, web(200, STORED) as server:
        dimse = DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")
        pacs = WebPacs(server.address) if way == "STOW-RS" else dimse
        with delivery(
            outbox, pacs, Waits(first_s=0.001, longest_s=0.01, max_age_s=1e12)
        ) as sending:
            wait_until_one_fails(outbox, sending)
            assert sending.state().num_given_up == 0
            assert "Is a directory" in sending.state().trouble
        assert len(server.bodies if way == "STOW-RS" else uids(archive)) == len(good)
        with delivery(outbox, pacs, Waits(max_age_s=week_s)):
            assert "Is a directory" in wait_until_given_up(outbox, "1.1")
    assert "1.1.dcm" in caplog.text


class Clumsy(Picky):
    """A way to an archive that has a mistake over some objects."""

    def store(self, file: Path) -> None:
        if file.stem in self.bad:
            raise UnboundLocalError(PATIENT)
        super().store(file)


def test_a_result_that_nobody_foresaw_waits_alone_and_its_error_is_logged_by_its_place(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    bad, *good = [put(outbox, number) for number in range(4)]
    clumsy = Clumsy({bad})
    with delivery(outbox, clumsy, Waits(first_s=0.001, longest_s=0.01)) as sending:
        wait_until_one_fails(outbox, sending)
        assert clumsy.stored == good
    os.utime(outbox.folder / "pending" / f"{bad}.dcm", (1, 1))
    with delivery(outbox, clumsy):
        assert "UnboundLocalError in test_outbox.py" in wait_until_given_up(outbox, bad)
    assert f"{bad}.dcm" in caplog.text and PATIENT not in caplog.text
    assert caplog.text.count("could not send") == 2  # once a start, not at each attempt


def test_a_full_outbox_and_a_second_process_are_refused(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox", max_bytes=1)
    put(outbox, 1)
    with pytest.raises(FullError):
        put(outbox, 2)
    with pytest.raises(InUseError, match="another process"):
        Outbox(tmp_path / "outbox")
    outbox.close()
    Outbox(tmp_path / "outbox").close()


def test_a_restart_takes_away_what_a_killed_writer_left(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    kept = put(outbox, 1)
    outbox.close()
    half = tmp_path / "outbox" / "pending" / f".x.dcm.{'0' * 12}.tmp"
    half.write_bytes(b"half")
    again = Outbox(tmp_path / "outbox")
    assert [path.stem for path in again.pending()] == [kept]
    assert not half.exists()
    again.close()


WRITER = """
import sys
from pathlib import Path
from tests.serving.test_outbox import put
from xrai.serving.outbox import Delivery, Outbox, Waits
from xrai.serving.pacs import DimsePacs
outbox = Outbox(Path(sys.argv[1]))
Delivery(outbox, DimsePacs("127.0.0.1", int(sys.argv[2]), "ARCHIVE", "XRAI")).start()
for number in range(int(sys.argv[3]), 100000):
    uid = put(outbox, number)
    print(uid, flush=True)
"""


@pytest.mark.ci
def test_kills_lose_nothing_that_was_put(tmp_path: Path, repository: Path) -> None:
    said: list[str] = []
    with Archive().running() as archive:
        for kill in range(3):
            writer = subprocess.Popen(
                [
                    *(sys.executable, "-c", WRITER, str(tmp_path / "outbox")),
                    *(str(archive.port), str(1000 * kill)),
                ],
                cwd=repository,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert writer.stdout is not None
            for _ in range(8 + 3 * kill):
                said.append(writer.stdout.readline().strip())
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.read().split()
            writer.wait()
            writer.stdout.close()
        assert len(said) >= 3 * 8
        outbox = Outbox(tmp_path / "outbox")
        pacs = DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")
        with delivery(outbox, pacs):
            wait_until_empty(outbox)
        outbox.close()
        stored = uids(archive)
        assert set(said) <= set(stored)
        assert len(stored) - len(set(stored)) <= 3  # at most the one in flight at each kill
        assert len(set(stored)) - len(set(said)) <= 3  # put, and killed before it was said


# ------------------------------------------------------------- archives that hang, and stopping


class Hanging(Archive):
    """An archive that hangs over the first object until it is released, and takes all others."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.released, self.is_hanging = how, threading.Event(), threading.Event()

    def _hang(self, event: evt.Event) -> None:
        if not self.is_hanging.is_set():
            self.is_hanging.set()
            if self.how == "half an answer":
                held = event.assoc.dul.socket
                assert held is not None and held.socket is not None
                held.socket.sendall(b"\4\0\0\0\1")
            self.released.wait(DEADLINE_S)

    def _received(self, event: evt.Event) -> None:
        if self.how == "reads no more" and isinstance(event.pdu, P_DATA_TF):
            self._hang(event)  # in the thread that reads

    def _store(self, event: evt.Event) -> int:
        if self.how != "reads no more":
            self._hang(event)
        return super()._store(event)

    def handlers(self) -> list[evt.EventHandlerType]:
        return [*super().handlers(), (evt.EVT_PDU_RECV, self._received)]


@pytest.mark.parametrize(
    "how", ["no answer", "half an answer", pytest.param("reads no more", marks=pytest.mark.ci)]
)
def test_an_archive_that_hangs_over_an_object_holds_it_up_for_a_while_only(
    outbox: Outbox, how: str
) -> None:
    sent = large(outbox) if how == "reads no more" else put(outbox, 1)
    archive = Hanging(how)
    with archive.running():
        pacs = DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI", timeout_s=0.5)
        try:
            with delivery(outbox, pacs) as sending:
                wait_until_empty(outbox)  # by another connection
                assert sending.state().num_failures >= 1
        finally:
            archive.released.set()
        assert set(uids(archive)) == {sent}


def large(outbox: Outbox) -> str:
    """Put an object that does not fit into the buffers of a connection."""
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 3000)).save(buffer, "PNG")
    found = write_capture(source_of(), buffer.getvalue(), DEVICE)
    outbox.put(found.sop_instance_uid, found.data)
    return found.sop_instance_uid


def test_stopping_waits_for_the_archive_and_then_ends_the_connection(outbox: Outbox) -> None:
    sent = put(outbox, 1)
    archive = Hanging("no answer")
    with archive.running():
        pacs = DimsePacs("127.0.0.1", archive.port, "ARCHIVE", "XRAI")
        first = Delivery(outbox, pacs, QUICK)
        first.start()
        assert archive.is_hanging.wait(DEADLINE_S)
        assert first.stop(timeout_s=0.2)
        assert [path.stem for path in outbox.pending()] == [sent]  # for the next start
        archive.released.set()
        with delivery(outbox, pacs):
            wait_until_empty(outbox)
    assert set(uids(archive)) == {sent}  # perhaps twice, but as the same object


class Stubborn(Picky):
    """An archive that cannot be made to let go."""

    def __init__(self) -> None:
        super().__init__(set())
        self.is_asked, self.released = threading.Event(), threading.Event()

    def store(self, file: Path) -> None:
        self.is_asked.set()
        self.released.wait(DEADLINE_S)
        super().store(file)


def test_stopping_says_whether_something_is_still_being_sent(outbox: Outbox) -> None:
    put(outbox, 1)
    archive = Stubborn()
    sending = Delivery(outbox, archive)
    assert sending.stop()  # was not started
    sending = Delivery(outbox, archive)
    sending.start()
    assert archive.is_asked.wait(DEADLINE_S)
    assert not sending.stop(timeout_s=0.05)
    archive.released.set()
    assert sending.stop()
    assert not outbox.pending()


def test_a_host_that_cannot_be_found_counts_as_away(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    put(outbox, 1)
    with delivery(outbox, DimsePacs("pacs.example.org", 104, "ARCHIVE", "XRAI")) as sending:
        while not sending.state().num_failures:
            time.sleep(0.01)
        assert "pacs.example.org" in sending.state().trouble


def test_what_was_kept_long_enough_is_deleted_while_it_runs(outbox: Outbox) -> None:
    day = 24 * 3600
    with delivery(outbox, Picky(set()), Waits(clean_s=0.01)):
        for name, age in (("1.1", 31), ("1.2", 29)):
            for path in (f"sent/{name}", f"given-up/{name}.dcm", f"given-up/{name}.txt"):
                (outbox.folder / path).touch()
                os.utime(outbox.folder / path, (1, time.time() - age * day))
        deadline = time.monotonic() + DEADLINE_S
        while (outbox.folder / "sent/1.1").exists() or len(list(outbox.folder.rglob("1.*"))) > 3:
            assert time.monotonic() < deadline
            outbox.changed.set()
            time.sleep(0.01)
    assert sorted(path.name for path in outbox.folder.rglob("1.*")) == ["1.2", "1.2.dcm", "1.2.txt"]


def test_a_result_that_is_given_up_is_kept_from_then_on(outbox: Outbox) -> None:
    given_up = put(outbox, 1)
    (path,) = outbox.pending()
    os.utime(path, (1, 1))
    outbox.give_up(path, "for a test")
    assert outbox.clean() == 0
    assert (outbox.folder / "given-up" / f"{given_up}.dcm").exists()


# ----------------------------------------------------------------------------------------- STOW-RS


class Web(ThreadingHTTPServer):
    """A STOW-RS service that answers what it is told."""

    def __init__(
        self,
        status: int,
        body: object = None,
        location: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), WebHandler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.status, self.location = status, location
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if body is None:
            self.body = b""
        self.bodies: list[bytes] = []
        self.heads: list[dict[str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class WebHandler(BaseHTTPRequestHandler):
    server: Web

    def do_POST(self) -> None:
        self.server.heads.append(dict(self.headers) | {"path": self.path})
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.end_headers()
        with suppress(OSError):  # nobody reads on
            self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web(
    status: int, body: object = None, location: str = "", tls: ssl.SSLContext | None = None
) -> Iterator[Web]:
    with Web(status, body, location, tls) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()


STORED = {"00081199": {"vr": "SQ", "Value": [{}]}}
PAGE = b"<html><body>Log in</body></html>"


def failed(*reasons: int) -> dict[str, object]:
    """A response that names a result as not stored."""
    items = [{"00081197": {"vr": "US", "Value": [reason]}} for reason in reasons]
    return {"00081198": {"vr": "SQ", "Value": items}}


def as_xml(tag: str, reason: int) -> bytes:
    """The same, or that it is stored, as XML (PS3.19 A.1)."""
    return (
        '<?xml version="1.0"?>'
        '<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM">'
        f'<DicomAttribute tag="{tag}" vr="SQ"><Item number="1">'
        f'<DicomAttribute tag="00081197" vr="US"><Value number="1">{reason}</Value>'
        "</DicomAttribute></Item></DicomAttribute></NativeDicomModel>"
    ).encode()


def test_stow_sends_one_part_with_the_file_and_the_token(outbox: Outbox) -> None:
    sent = result(1)
    put(outbox, 1)
    with web(200, STORED) as server:
        address = f"{server.address}/dicom-web"
        pacs = find_pacs(address, calling="XRAI", tls=None, token="secret")
        with delivery(outbox, pacs):
            wait_until_empty(outbox)
    (head,), (body,) = server.heads, server.bodies
    assert head["path"] == "/dicom-web/studies"
    assert head["Authorization"] == "Bearer secret"
    boundary = head["Content-Type"].partition("boundary=")[2].encode()
    before, part, after = body.split(b"--" + boundary)
    assert (before, after) == (b"", b"--\r\n")
    file = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
    assert read(file).SOPInstanceUID == sent.sop_instance_uid


@pytest.mark.parametrize(
    ("status", "body", "num_given_up"),
    [
        (409, None, 1),
        (409, PAGE, 1),
        (413, None, 1),
        (409, failed(0x0110), 1),
        (409, failed(0x0111, 0x0110), 1),
        (202, {"00081198": {"vr": "SQ", "Value": [{}]}}, 1),
        (202, as_xml("00081198", 0xA900), 1),
        (202, {}, 1),
        (202, None, 1),
        (409, failed(0xA700), 0),
        (409, as_xml("00081198", 0xA700), 0),
        (200, PAGE, 0),
        (200, {"error": "log in"}, 0),
        (200, b"[" * 100_000, 0),
        (200, b"<!DOCTYPE", 0),
        (200, bytes(4 << 20), 0),
        (503, None, 0),
        (401, None, 0),
        (307, None, 0),
    ],
)
def test_stow_refusals_are_given_up_and_the_rest_is_tried_again(
    outbox: Outbox, status: int, body: object, num_given_up: int
) -> None:
    put(outbox, 1)
    with web(status, body) as server:
        pacs = WebPacs(server.address)
        with delivery(outbox, pacs) as sending:
            while len(server.bodies) < 3 or sending.state().num_given_up < num_given_up:
                time.sleep(0.01)
        assert server.address in sending.state().trouble
    assert outbox.num_given_up() == num_given_up
    assert len(outbox.pending()) == 1 - num_given_up


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *((200, STORED), (202, STORED), (200, {}), (200, None)),
        *((200, as_xml("00081199", 0)), (202, as_xml("00081199", 0))),
        *((409, failed(0x0111)), (409, failed(45070)), (409, as_xml("00081198", 0x0111))),
    ],
)
def test_stow_answers_that_the_archive_has_the_result_end_its_wait(
    outbox: Outbox, status: int, body: object
) -> None:
    put(outbox, 1)
    with web(status, body) as server:
        with delivery(outbox, WebPacs(server.address)):
            wait_until_empty(outbox)
        assert len(server.bodies) == 1
    assert outbox.num_given_up() == 0


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_stow_follows_no_redirect_to_another_server(outbox: Outbox, status: int) -> None:
    put(outbox, 1)
    with web(200, STORED) as other, web(status, None, f"{other.address}/studies") as server:
        with delivery(outbox, WebPacs(server.address, token="secret")) as sending:
            while len(server.bodies) < 2:
                time.sleep(0.01)
        assert str(status) in sending.state().trouble
        assert other.bodies == []
    assert len(outbox.pending()) == 1


@pytest.mark.parametrize("said", [b"", b"\0\1\2 no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-"])
def test_stow_servers_that_speak_no_http_or_hang_are_tried_again(
    outbox: Outbox, said: bytes
) -> None:
    put(outbox, 1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pacs = WebPacs(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_s=0.2)
        with delivery(outbox, pacs) as sending:
            for _ in range(2):
                with listening.accept()[0] as connection:
                    connection.sendall(said)
                    connection.settimeout(DEADLINE_S)
                    while connection.recv(1 << 16):  # until it gives up
                        pass
        assert "cannot be reached" in sending.state().trouble
    assert len(outbox.pending()) == 1


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"])
def test_stopping_ends_a_stow_request_that_is_never_answered(outbox: Outbox, said: bytes) -> None:
    put(outbox, 1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pacs = WebPacs(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_s=600.0)
        sending = Delivery(outbox, pacs, QUICK)
        sending.start()
        with listening.accept()[0] as connection:
            assert connection.recv(1 << 16)
            connection.sendall(said)
            assert sending.stop(timeout_s=2.0)
    assert len(outbox.pending()) == 1


# --------------------------------------------------------------------------------------------- TLS


def server_tls(authority: Path, *, asks_for_certificate: bool = False) -> ssl.SSLContext:
    """What an archive shows, and whom it trusts."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    if asks_for_certificate:
        context.load_verify_locations(authority / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def flags_of(authority: Path, *, ca: bool = True, own: bool = False) -> dict[str, object]:
    """The flags of a server that sends results with TLS."""
    return {
        "pacs_tls": True,
        "pacs_ca": str(authority / "ca.pem") if ca else "",
        "dicom_cert": str(authority / "client.pem") if own else "",
        "dicom_key": str(authority / "client.key") if own else "",
        "pacs": "",
    }


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
@pytest.mark.parametrize(
    ("host", "trusts", "is_sent"),
    [
        ("localhost", True, True),
        ("localhost", False, False),  # the authority is a private one
        ("127.0.0.1", True, False),  # the certificate is another host's
    ],
)
def test_results_go_with_tls_to_the_archive_whose_certificate_is_trusted_alone(
    outbox: Outbox, authority: Path, way: str, host: str, trusts: bool, is_sent: bool
) -> None:
    sent, archive, tls = put(outbox, 1), Archive(), server_tls(authority)
    with archive.running(tls) as listening, web(200, STORED, tls=tls) as server:
        address = f"{host}:{listening.port}:ARCHIVE"
        if way == "STOW-RS":
            address = f"https://{host}:{server.server_address[1]}"
        context = _pacs_tls(flags_of(authority, ca=trusts))
        pacs = find_pacs(address, calling="XRAI", tls=context, token="")
        with delivery(outbox, pacs) as sending:
            if is_sent:
                wait_until_empty(outbox)
            while not is_sent and sending.state().num_failures < 2:
                time.sleep(0.01)
            trouble = sending.state().trouble
        reached = [*uids(archive), *(head["path"] for head in server.heads)]
    if is_sent:
        assert reached in ([sent], ["/studies"])
    else:
        assert reached == [] and len(outbox.pending()) == 1
        assert "certificate" in trouble or "SSLError" in trouble


def test_an_archive_that_asks_for_a_certificate_gets_that_of_the_node(
    outbox: Outbox, authority: Path
) -> None:
    sent, archive = put(outbox, 1), Archive()
    with archive.running(server_tls(authority, asks_for_certificate=True)) as listening:
        for own in (False, True):
            context = _pacs_tls(flags_of(authority, own=own))
            pacs = DimsePacs("localhost", listening.port, "ARCHIVE", "XRAI", context)
            with delivery(outbox, pacs) as sending:
                while not own and not sending.state().num_failures:
                    time.sleep(0.01)
                if own:
                    wait_until_empty(outbox)
    assert uids(archive) == [sent]


def test_an_archive_of_a_public_authority_gets_the_certificate_of_the_node(
    outbox: Outbox, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(outbox, 1)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))  # as the system's authorities
    with web(200, STORED, tls=server_tls(authority, asks_for_certificate=True)) as server:
        address = f"https://localhost:{server.server_address[1]}"
        own = {**flags_of(authority, ca=False, own=True), "pacs_tls": False, "pacs": address}
        pacs = find_pacs(address, calling="XRAI", tls=_pacs_tls(own), token="")
        with delivery(outbox, pacs):
            wait_until_empty(outbox)
    assert [head["path"] for head in server.heads] == ["/studies"]


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        *("pacs", "pacs:104", "pacs:x:AET", ":104:AET", "pacs:104:", "http://pacs.example.org/x"),
        *("https://me:secret@pacs.example.org", "pacs:104:AVERYLONGTITLE-17"),
    ],
)
def test_addresses_that_are_none_are_one_line_without_secrets(address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find_pacs(address, calling="XRAI", tls=None, token="")
    assert "secret" not in str(raised.value)


def test_addresses_with_ipv6_and_dicomweb_are_read() -> None:
    pacs = find_pacs("[::1]:104:ARCHIVE", calling="XRAI", tls=None, token="")
    assert pacs == DimsePacs("::1", 104, "ARCHIVE", "XRAI")
    pacs = find_pacs("https://pacs.example.org/dicom-web/", calling="XRAI", tls=None, token="t")
    assert pacs == WebPacs("https://pacs.example.org/dicom-web", None, "t")
