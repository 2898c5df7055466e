"""`xrai serve` as a process: its address, its signals, and clients that do not behave."""

import http.client
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.dataset.pictures import huge_png
from tests.models import phantoms
from xrai.errors import ConfigError, UserError
from xrai.serve import check_flags, checked_token, listen, read_proxies

TOKEN = "0123456789abcdef"


@dataclass(frozen=True)
class Server:
    """A process that serves."""

    process: "subprocess.Popen[str]"
    port: int
    scratch: Path  # its folder for temporary files

    @property
    def rss_mib(self) -> float:
        """Its memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def open_below(self, folder: Path) -> list[str]:
        """The files in a folder that the process has open, those without a name, too."""
        targets = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                targets.append(str(link.readlink()))
        return [target for target in targets if target.startswith(str(folder))]

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "image/png") -> int:
        """The status of the answer to a request with the token."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as client:
            client.request(
                method, path, body, {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
            )
            return client.getresponse().status


@contextmanager
def running(run: Path, folder: Path, *flags: str) -> Iterator[Server]:
    """A server of a run, which has ended after the block."""
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "xrai.serve", f"--run={run}", "--port=0", "--engine=torch"]
    command += flags
    environment = {**os.environ, "XRAI_SERVE_TOKEN": TOKEN, "TMPDIR": str(scratch)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"served at http://127\.0\.0\.1:(\d+)/", line)
        assert found, line + process.stderr.read()
        yield Server(process, int(found[1]), scratch)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that several tests share."""
    with running(run, tmp_path_factory.mktemp("server"), "--max_body_mib=32") as server:
        yield server


def film(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(phantoms(4)[0][number]).save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("host", "token", "words"),
    [
        ("0.0.0.0", "", "set XRAI_SERVE_TOKEN"),
        ("192.0.2.1", "", "is reached from other machines"),
        ("::", "", "is reached from other machines"),
        ("ward.example", "", "is reached from other machines"),
        ("127.0.0.1", "short", "16 printable ASCII characters"),
        ("127.0.0.1", "sixteen-ü-or-more", "printable ASCII characters"),
        ("127.0.0.1", f"{TOKEN}\n", "holds a line break"),
        ("127.0.0.1", f"{TOKEN}\x7f", "holds a line break"),
        ("127.0.0.1", f"{TOKEN} {TOKEN}", "a space"),
    ],
)
def test_an_address_that_others_reach_needs_a_token(host: str, token: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        checked_token(host, token)
    assert checked_token(host, TOKEN) == TOKEN


@pytest.mark.parametrize("text", ["proxy.example", "10.0.0.7/8", "*", "10.0.0.0/8;10.1.0.0/16"])
def test_proxies_are_addresses_or_networks(text: str) -> None:
    with pytest.raises(ConfigError, match="give addresses or networks"):
        read_proxies(text)
    assert read_proxies("10.0.0.0/8, ::1") == ["10.0.0.0/8", "::1/128"]
    assert read_proxies("") == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.9"])
def test_this_machine_alone_needs_none(host: str) -> None:
    assert checked_token(host, "") == ""


@pytest.mark.parametrize(
    ("name", "value"), [("port", 70000), ("lifetime_min", 0.0), ("max_gib", 0), ("stop_s", -1)]
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    usual = {
        **{"port": 0, "lifetime_min": 1.0, "max_films": 1, "max_gib": 1.0},
        **{"max_body_mib": 1, "stop_s": 1, "engine": "auto"},
    }
    check_flags(usual)
    with pytest.raises(UserError, match=f"--{name} = {value} is not allowed"):
        check_flags({**usual, name: value})


def test_no_part_of_an_answer_waits_for_the_one_before() -> None:
    """40 ms, for Nagle's algorithm and the delayed acknowledgement of the client."""
    with listen("127.0.0.1", 0) as found, socket.create_connection(found.getsockname()):
        connection, _ = found.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host=0.0.0.0"], "set XRAI_SERVE_TOKEN"),
        (["--run={tmp}/none"], "holds no model.pt"),
        (["--prior=estimate"], "needs all films at once"),
        (["--trusted_proxies=ingress"], "give addresses or networks"),
        (["XRAI_PACS_TOKEN=two\nlines"], "XRAI_PACS_TOKEN holds a line break"),
        (["--port={taken}"], "Address already in use"),
    ],
)
def test_mistakes_end_in_one_line(run: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = [flag.format(tmp=tmp_path, taken=port) for flag in flags]
        runs = [] if any("--run" in flag for flag in given) else [f"--run={run}"]
        names = {flag.partition("=")[0]: flag.partition("=")[2] for flag in given}
        secrets = {name: value for name, value in names.items() if not name.startswith("--")}
        given = [flag for flag in given if flag.startswith("--")]
        found = subprocess.run(
            [sys.executable, "-m", "xrai.serve", *runs, *given],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | secrets,
        )
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.splitlines()
    assert words in line


# ------------------------------------------------------------------------------------------ process


@pytest.mark.ci
def test_what_the_interface_says_of_itself_holds(server: Server, tmp_path: Path) -> None:
    """Schemathesis asks what openapi.yaml allows and what it does not."""
    for number in range(2):
        assert server.ask("POST", "/v1/films", film(number)) == 201
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "run"),
        f"http://127.0.0.1:{server.port}/openapi.json",
        *("--header", f"Authorization: Bearer {TOKEN}"),
        *("--max-examples", "20", "--seed", "1", "--no-color"),
    ]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stdout[-6000:]
    assert "Tested: 13" in found.stdout, found.stdout[-2000:]
    assert server.ask("GET", "/readyz") == 200


@pytest.mark.ci
def test_nothing_is_written_to_disk(server: Server) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2500), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    edge = b"--edge\r\nContent-Disposition: form-data; name=file; filename=a.png\r\n\r\n"
    body = edge + buffer.getvalue() + b"\r\n--edge--\r\n"
    with closing(socket.create_connection(("127.0.0.1", server.port))) as client:
        head = (
            f"POST /v1/films HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Type: multipart/form-data; boundary=edge\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body[:-9])
        deadline = time.monotonic() + 30
        while not (spooled := server.open_below(server.scratch)) and time.monotonic() < deadline:
            if server.ask("GET", "/readyz") == 200 and time.monotonic() > deadline - 29:
                break  # the body came in meanwhile
        client.sendall(body[-9:])
        assert b"201 Created" in client.recv(4096)
    assert spooled == []
    assert not list(server.scratch.rglob("*"))


@pytest.mark.ci
def test_bombs_and_cut_films_leave_the_server_as_it_was(server: Server) -> None:
    assert server.ask("POST", "/v1/films", film()) == 201
    before = server.rss_mib
    zeros = io.BytesIO()
    with (
        zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("zeros.png", "w", force_zip64=True) as member,
    ):
        for _ in range(512):
            member.write(bytes(1 << 20))
    bombs = {
        "image/png": huge_png(60_000, 60_000),
        "application/zip": zeros.getvalue(),
        "application/dicom": b"\0" * 128 + b"DICM" + os.urandom(4096),
        "image/jpeg": film()[:300],
    }
    for kind, body in bombs.items():
        assert server.ask("POST", "/v1/films", body, kind) == 201, kind
    assert server.rss_mib - before < 300
    assert server.ask("POST", "/v1/films", film()) == 201


@pytest.mark.ci
def test_clients_that_leave_or_stall_hold_nobody_up(server: Server) -> None:
    head = (
        f"POST /v1/films HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Content-Type: image/png\r\nContent-Length: 10000000\r\n\r\n"
    ).encode()
    stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(12)]
    try:
        for client in stalled:
            client.sendall(head + bytes(5_000_000))
        answers = [server.ask("POST", "/v1/films", film()) for _ in range(3)]
        assert {201, 503} >= set(answers)  # what they hold is bounded
    finally:
        for client in stalled:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()  # with a reset
    deadline = time.monotonic() + 30
    while (status := server.ask("POST", "/v1/films", film())) != 201:
        assert status in (429, 503) and time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.ci
def test_a_server_that_is_stopped_answers_what_it_has_begun(run: Path, tmp_path: Path) -> None:
    with running(run, tmp_path) as server:
        data = film()
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as client:
            client.putrequest("POST", "/v1/films")
            client.putheader("Authorization", f"Bearer {TOKEN}")
            client.putheader("Content-Type", "image/png")
            client.putheader("Content-Length", str(len(data)))
            client.endheaders(data[:100])
            time.sleep(0.5)  # the request is under way
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            client.send(data[100:])
            assert client.getresponse().status == 201
        assert server.process.wait(30) == -signal.SIGTERM
        assert server.process.stderr is not None
        assert "Traceback" not in server.process.stderr.read()
