"""The DICOM side with programs of others: dcmtk sends and takes, dciodvfy checks, Orthanc stores.

.ci/run installs them as root; elsewhere tests whose program is missing skip.
"""

import io
import json
import random
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import uid
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pynetdicom.dimse_primitives import C_STORE

from tests.serving.conftest import make_service
from tests.serving.dicoms import association, film, film_of, phantoms, read
from tests.serving.test_dicom import dicom_side, free_port
from tests.serving.test_outbox import wait_until_empty
from xrai.serving.dicom_result import _FORMS
from xrai.serving.service import Service

pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings(
        "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
DEADLINE_S = 60.0
DICOM_WEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
ODD = 500


def needs(*programs: str) -> None:
    """Skip a test where a program is missing."""
    for program in programs:
        if shutil.which(program) is None and not Path(f"/usr/sbin/{program}").exists():
            pytest.skip(f"{program} is not installed")


def run_program(*command: str | Path) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def save(folder: Path, number: int) -> list[Path]:
    """Drawn films as files."""
    paths = [folder / f"film{place}.dcm" for place in range(number)]
    for path, data in zip(paths, phantoms(number), strict=True):
        path.write_bytes(data)
    return paths


# ------------------------------------------------------------------------------------------- dcmtk


def test_dcmtk_sends_films_in_several_encodings(service: Service, tmp_path: Path) -> None:
    needs("echoscu", "storescu", "dcmcjpeg", "dcmcrle")
    first, second, third = save(tmp_path, 3)
    lossless, run_length = tmp_path / "lossless.dcm", tmp_path / "rle.dcm"
    run_program("dcmcjpeg", second, lossless)
    run_program("dcmcrle", third, run_length)
    with dicom_side(service) as (side, port):
        where = ("-aec", "XRAI", "127.0.0.1", str(port))
        run_program("echoscu", *where)
        run_program("storescu", *where, first)
        run_program("storescu", "-xs", *where, lossless)
        run_program("storescu", "-xr", *where, run_length)
        state = side._node.state()
    assert (state.num_echoes, state.objects["scored"]) == (1, 3)
    rows = {listed.name: listed.row for listed in service.worklist.films()}
    for path in (first, second, third):
        (expected,) = service.models.pipeline.predict(path)
        found = rows[str(read(path).SOPInstanceUID)]
        assert found.probability == pytest.approx(expected.probability, abs=1e-5)


def test_dcmtk_takes_results_that_hold_to_the_standard(service: Service, tmp_path: Path) -> None:
    needs("storescp", "storescu", "dsrdump", "dciodvfy")
    received = tmp_path / "received"
    received.mkdir()
    port = free_port()
    archive = subprocess.Popen(["storescp", "-od", received, "-aet", "ARCHIVE", str(port)])
    try:
        (path,) = save(tmp_path, 1)
        options: dict[str, Any] = {
            "pacs": f"127.0.0.1:{port}:ARCHIVE",
            "outbox": str(tmp_path / "outbox"),
        }
        with dicom_side(service, result="both", **options) as (side, node_port):
            run_program("storescu", "-aec", "XRAI", "127.0.0.1", str(node_port), path)
            assert side._outbox is not None
            wait_until_empty(side._outbox)
    finally:
        archive.kill()
        archive.wait()
    files = sorted(received.iterdir())
    assert sorted(read(file).Modality for file in files) == ["OT", "SR"]
    for file in files:
        checked = subprocess.run(["dciodvfy", file], capture_output=True, text=True).stderr
        assert "Error" not in checked, checked
        if read(file).Modality == "SR":
            dumped = run_program("dsrdump", "+U8", file)
            for words in ("Imaging Measurement Report", "Probability", "233604007,SCT"):
                assert words in dumped


def test_dcmtk_sends_and_takes_with_tls_and_certificates_of_both_ends(
    service: Service, tmp_path: Path, authority: Path
) -> None:
    needs("storescp", "storescu")
    received = tmp_path / "received"
    received.mkdir()
    port = free_port()
    ca = ["+cf", f"{authority}/ca.pem"]
    own = {
        name: ["+tls", f"{authority}/{name}.key", f"{authority}/{name}.pem", *ca]
        for name in ("server", "client")
    }
    archive = subprocess.Popen(
        ["storescp", *own["server"], "-od", received, "-aet", "ARCHIVE", str(port)]
    )
    try:
        (path,) = save(tmp_path, 1)
        options: dict[str, Any] = {
            "pacs": f"localhost:{port}:ARCHIVE",
            "pacs_tls": True,
            "pacs_ca": str(authority / "ca.pem"),
            "outbox": str(tmp_path / "outbox"),
            "dicom_cert": str(authority / "server.pem"),
            "dicom_key": str(authority / "server.key"),
            "dicom_client_ca": str(authority / "ca.pem"),
        }
        with dicom_side(service, **options) as (side, node_port):
            where = ("-aec", "XRAI", "localhost", str(node_port), path)
            stranger = subprocess.run(["storescu", "+tla", *ca, *where], capture_output=True)
            assert stranger.returncode != 0  # shows no certificate
            assert subprocess.run(["storescu", *where], capture_output=True).returncode != 0
            run_program("storescu", *own["client"], *where)
            assert side._outbox is not None
            wait_until_empty(side._outbox)
    finally:
        archive.kill()
        archive.wait()
    (file,) = received.iterdir()
    assert read(file).Modality == "SR"


# ----------------------------------------------------------------------------------------- Orthanc


class Orthanc:
    """An archive that can be killed and started again on the same ports and files."""

    def __init__(self, folder: Path, node_port: int) -> None:
        self.dicom_port, self.http_port = free_port(), free_port()
        self._folder = folder
        folder.mkdir()
        content = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": self.http_port,
            "DicomPort": self.dicom_port,
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomModalities": {"xrai": ["XRAI", "127.0.0.1", node_port]},
            "Plugins": [str(DICOM_WEB)] if DICOM_WEB.exists() else [],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(content))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, self._folder / "orthanc.json"], stdout=log, stderr=log
            )
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                self.ask("/system")
                return
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, (self._folder / "log").read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def ask(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data=body)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def modalities(self) -> Counter[str]:
        """How many objects of each modality it holds."""
        return Counter(
            self.ask(f"/instances/{each}/simplified-tags")["Modality"]
            for each in self.ask("/instances")
        )


@contextmanager
def orthanc(folder: Path, node_port: int) -> Iterator[Orthanc]:
    needs("Orthanc")
    found = Orthanc(folder, node_port)
    found.start()
    try:
        yield found
    finally:
        found.kill()


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_orthanc_sends_films_and_gets_results_even_after_it_was_killed(
    way: str, run: Path, tmp_path: Path
) -> None:
    if way == "STOW-RS" and not DICOM_WEB.exists():
        pytest.skip("orthanc-dicomweb is not installed")
    port = free_port()
    with orthanc(tmp_path / "orthanc", port) as archive:
        address = f"127.0.0.1:{archive.dicom_port}:ORTHANC"
        if way == "STOW-RS":
            address = f"http://127.0.0.1:{archive.http_port}/dicom-web"
        service = make_service(run)
        films = phantoms(4)
        sent = [archive.ask("/instances", data)["ID"] for data in films]
        options: dict[str, Any] = {"pacs": address, "outbox": str(tmp_path / "outbox")}
        with dicom_side(service, result="both", port=port, **options) as (side, _):
            assert side._outbox is not None
            archive.ask("/modalities/xrai/store", sent[0].encode())
            wait_until_empty(side._outbox)
            assert archive.modalities() == {"DX": 4, "SR": 1, "OT": 1}
            archive.kill()  # and films from elsewhere go on
            for data in films[1:3]:
                with association(port) as opened:
                    assert opened.send_c_store(read(data)).Status == 0
            assert len(side._outbox.pending()) == 4
            archive.start()
            archive.ask("/modalities/xrai/store", sent[3].encode())
            wait_until_empty(side._outbox)
        assert archive.modalities() == {"DX": 4, "SR": 4, "OT": 4}
        assert len(archive.ask("/studies")) == len({read(data).StudyInstanceUID for data in films})


# --------------------------------------------------------------------------------------------- odd


def odd_films(number: int) -> Iterator[tuple[bytes, str, bool]]:
    """Damaged films, the UID that each began with, and whether it is whole after all."""
    drawn = random.Random(18)
    whole = phantoms(3)
    seeds = [*whole, film("seed", BodyPartExamined="CHEST"), film("other", Modality="CR")]
    uids = [str(read(seed).SOPInstanceUID) for seed in seeds]
    for place in range(number):
        if place % 10 == 0:
            yield whole[place // 10 % 3], uids[place // 10 % 3], True
            continue
        chosen = drawn.randrange(len(seeds))
        data = bytearray(seeds[chosen])
        for _ in range(drawn.choice([1, 1, 2, 5, 40])):
            start = drawn.randrange(132, min(len(data), 2000))
            match drawn.randrange(5):
                case 0:
                    data[start] = drawn.randrange(256)
                case 1:
                    del data[start : start + drawn.randrange(1, 40)]
                case 2:
                    data[start:start] = drawn.randbytes(drawn.randrange(1, 40))
                case 3:
                    data[start : start + 4] = b"\xff\xff\xff\xff"
                case 4:
                    del data[start + drawn.randrange(len(data) - start) :]
            if len(data) < 200:
                break
        yield bytes(data), uids[chosen], False


# What headers hold that nobody should have written there
ODD_TEXTS = (
    *(b"", b"\0", b"\xff\xfe", b"a\\b\\c", b"^^^^", b"\r\n\t\x0b", b" lead", b"trail ", b"\0Zebra"),
    *(b"\x1b$B;3ED=", b"\x1b$)C\xc8\xab", "M\u00fcller".encode(), "\u202e\a".encode()),
    *(b"x" * 64, b"x" * 66, b"=".join([b"y"] * 6), b"<script>", b"\xed\xa0\x80"),
    *(b"20261127", b"2026-11-27", b"99999999", b"101112.1234567", b"24", b"235960", b"m", b"M"),
)
ODD_CHARSETS = (
    *("ISO_IR 100", "ISO_IR 192", "\\ISO 2022 IR 87", "GB18030", "ISO_IR 999", "", "x" * 40),
    "ISO 2022 IR 149\\ISO_IR 192",
)


def odd_headers(number: int) -> Iterator[tuple[bytes, str]]:
    """Intact films whose patient and study are described by odd texts, and the UID of each."""
    drawn = random.Random(7)
    seeds = phantoms(3)
    for place in range(number):
        dataset = read(seeds[place % 3])
        texts = {name: drawn.choice(ODD_TEXTS) for name in sorted(_FORMS) if drawn.random() < 0.5}
        texts["SpecificCharacterSet"] = drawn.choice(ODD_CHARSETS).encode()
        texts["SOPInstanceUID"] = f"1.2.3.{place}".encode()
        for name, text in texts.items():
            tag = Tag(name)
            value = text + b" " * (len(text) % 2)
            vr = dictionary_VR(tag)
            dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        yield buffer.getvalue(), f"1.2.3.{place}"


def answers_to(port: int, films: Iterable[tuple[bytes, str]]) -> Iterator[int]:
    """Send films as they are, damaged or not, on one association: the status of each."""
    with association(port) as opened:
        context = next(
            each
            for each in opened.accepted_contexts
            if each.abstract_syntax == uid.DigitalXRayImageStorageForPresentation
            and each.transfer_syntax == [uid.ExplicitVRLittleEndian]
        )
        opened._reactor_checkpoint.clear()  # as `send_c_store` does
        for data, name in films:
            request = C_STORE()
            request.MessageID, request.Priority = 1, 2
            request.AffectedSOPClassUID = context.abstract_syntax
            request.AffectedSOPInstanceUID = name
            request.DataSet = io.BytesIO(without_meta(data))
            opened.dimse.send_msg(request, context.context_id)
            _, answer = opened.dimse.get_msg(block=True)
            assert answer is not None, "no answer"
            yield answer.Status
        opened._reactor_checkpoint.set()


def test_odd_films_are_each_answered_and_the_good_ones_among_them_scored(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(run, max_films=ODD)
    cases = Path(__file__).parents[3] / "shared" / "cases"
    others = [path.read_bytes() for path in sorted(cases.rglob("*.dcm"))] if cases.exists() else []
    films = [*odd_films(ODD), *((data, "1.2", False) for data in others)]
    outbox = tmp_path / "outbox"
    with dicom_side(service, pacs="127.0.0.1:1:ARCHIVE", outbox=str(outbox)) as (side, port):
        found = list(answers_to(port, ((data, name) for data, name, _ in films)))
        state = side._node.state()
    answers = Counter(found)
    assert all(status == 0 for status, film in zip(found, films, strict=True) if film[2])
    assert sum(is_whole for _, _, is_whole in films) == ODD // 10 <= state.objects["scored"]
    assert sum(answers.values()) == sum(state.objects.values()) == ODD + len(others)
    assert set(answers) <= {0, 0xB006, 0xC000, 0xA900}, answers
    assert state.objects["failed"] == 0
    assert "Zebra" not in caplog.text
    listed = {each.name for each in service.worklist.films()}
    assert {film_of(read(path)) for path in (outbox / "pending").iterdir()} == listed


def test_films_with_odd_headers_have_results_that_hold_to_the_standard(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs("dciodvfy")
    service, outbox = make_service(run), tmp_path / "outbox"
    with dicom_side(service, pacs="127.0.0.1:1:ARCHIVE", outbox=str(outbox)) as (_, port):
        assert set(answers_to(port, odd_headers(60))) == {0}
    reports = sorted((outbox / "pending").iterdir())
    assert {film_of(read(path)) for path in reports} == {f"1.2.3.{place}" for place in range(60)}
    for path in reports:
        checked = subprocess.run(["dciodvfy", path], capture_output=True).stderr
        assert b"Error" not in checked, checked
    assert "Zebra" not in caplog.text


def without_meta(data: bytes) -> bytes:
    """The data set of a file, as C-STORE carries it; an even number of bytes."""
    length = int.from_bytes(data[140:144], "little")  # of group 2
    rest = data[144 + length :] if data[128:132] == b"DICM" and length < 1000 else data[132:]
    return (rest or b"\0") + b"\0" * (len(rest or b"\0") % 2)
