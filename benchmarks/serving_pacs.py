"""Films by C-STORE for a long time, while the archive and the senders are killed now and then: is
any result lost, and does memory grow?

    python -m benchmarks.serving_pacs --minutes 60
    python -m benchmarks.serving_pacs --run URI/ID --minutes 60 --films_s 1 --lives_s 40 160

`xrai serve` is a process of its own, as are an archive (this module with --archive) and two
senders. Every film has a UID of its own. Each sender and the archive is killed in the midst of
what it does after `--lives_s` seconds, and stays away for up to 6. The result of each film that a
sender was told is taken must be in the archive in the end. Of the server, once a minute: memory,
threads and open files.
"""

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pydicom
from pynetdicom import AE, evt

_TITLE = "ARCHIVE"
_ROUND_S = 0.5
_AWAY_S = 6.0  # of what was killed, at most
_SETTLE_S = 600.0  # for what waits in the end
_STUDY = 4  # films of an association, at most


def main() -> None:
    """Read the command line, and be what it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_pacs")
    parser.add_argument("--run", default="", help="the finished run that scores, URI/ID")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--films_s", type=float, default=0.0, help="films a second of each sender; 0: all it can"
    )
    parser.add_argument(
        "--lives_s", type=float, nargs=2, default=(6.0, 22.0), help="seconds until a kill"
    )
    parser.add_argument("--archive", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--sender", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.archive:
        be_archive(given.archive, given.folder)
    elif given.sender:
        be_sender(given.sender, given.folder, given.films_s)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            load = Load(given.minutes * 60, given.films_s, tuple(given.lives_s))
            measure(given.run or _train(Path(folder)), load, Path(folder))


@dataclass(frozen=True)
class Load:
    """What a server bears."""

    seconds: float
    films_s: float  # of each sender; 0: all that it can
    lives_s: tuple[float, float]  # of a process until it is killed, from and to


def be_archive(port: int, folder: Path) -> None:
    """Take objects; each UID is a line of a file before it is answered."""
    from pydicom import uid

    own = AE(ae_title=_TITLE)
    own.add_supported_context(uid.ComprehensiveSRStorage)

    def store(event: evt.Event) -> int:
        report = event.dataset
        study = report.CurrentRequestedProcedureEvidenceSequence[0]
        film = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
        with (folder / "archive").open("a") as file:
            file.write(f"{report.SOPInstanceUID} {film.ReferencedSOPInstanceUID}\n")
        return 0x0000

    own.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, store)])


def be_sender(port: int, folder: Path, films_s: float) -> None:
    """Send films until it is killed, some in each association; each UID that is answered with 0000
    is a line of a file.
    """
    films = [pydicom.dcmread(path) for path in sorted((folder / "films").iterdir())]
    own = AE(ae_title="MODALITY")
    own.add_requested_context(films[0].SOPClassUID)
    while True:
        association = own.associate("127.0.0.1", port, ae_title="XRAI")
        num_films = random.randint(1, _STUDY)
        for _ in range(num_films if association.is_established else 0):
            film = random.choice(films)
            film.SOPInstanceUID = pydicom.uid.generate_uid()
            film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID
            if not association.is_established:
                break
            answer = association.send_c_store(film)
            with (folder / "taken").open("a") as file:
                if answer.get("Status") == 0:
                    file.write(f"{film.SOPInstanceUID}\n")
        if association.is_established:
            association.release()
        time.sleep(num_films / films_s if films_s else 0.2)


def measure(run: str, load: Load, folder: Path) -> None:
    """Run the load, wait until everything is delivered, and print the figures."""
    _draw(folder / "films")
    http_port, node_port, archive_port = (_free_port() for _ in range(3))
    (folder / "archive").touch()
    (folder / "taken").touch()
    serve = [sys.executable, "-m", "xrai.serve", "--run", run, "--port", str(http_port)]
    serve += ["--dicom_port", str(node_port), "--pacs", f"127.0.0.1:{archive_port}:{_TITLE}"]
    serve += ["--outbox", str(folder / "outbox"), "--max_films", "200", "--lifetime_min", "0.05"]
    server = subprocess.Popen(serve)
    others: dict[str, subprocess.Popen[bytes]] = {}
    try:
        _wait_for(node_port)
        process, drawn = psutil.Process(server.pid), random.Random(1)
        minutes: list[tuple[int, int, int]] = []  # MiB, threads and open files of the server
        kills: Counter[str] = Counter()
        due = dict.fromkeys(("archive", "sender 1", "sender 2"), 0.0)
        began = time.monotonic()
        while (now := time.monotonic() - began) < load.seconds:
            assert server.poll() is None, "the server has ended"
            for name, when in due.items():
                if now < when:
                    continue
                if name in others:
                    _kill(others.pop(name))
                    kills[name.split()[0]] += 1
                    due[name] = now + drawn.uniform(0, _AWAY_S)
                else:
                    others[name] = _start(name, folder, (node_port, archive_port), load.films_s)
                    due[name] = now + drawn.uniform(*load.lives_s)
            if now >= 60 * len(minutes):
                held = process.memory_info().rss >> 20
                minutes.append((held, process.num_threads(), process.num_fds()))
            time.sleep(_ROUND_S)
        for each in others.values():
            _kill(each)
        others = {"archive": _start("archive", folder, (node_port, archive_port), 0)}
        deadline = time.monotonic() + _SETTLE_S
        while (waiting := _pending(http_port)) and time.monotonic() < deadline:
            time.sleep(1)
        used = process.cpu_times()
        _report(folder, load, kills, minutes, (waiting, used.user + used.system))
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    finally:
        for each in (*others.values(), server):
            _kill(each)


def _report(
    folder: Path,
    load: Load,
    kills: Counter[str],
    minutes: list[tuple[int, int, int]],
    end: tuple[float, float],
) -> None:
    waiting, processor_s = end
    taken = (folder / "taken").read_text().split()
    pairs = [line.split() for line in (folder / "archive").read_text().splitlines()]
    films = {pair[1] for pair in pairs if len(pair) == 2}
    results = Counter(pair[0] for pair in pairs if pair)
    lost = set(taken) - films
    megabytes, threads, files = zip(*minutes, strict=True)
    figures = {
        "minutes": round(load.seconds / 60, 1),
        "films a second of each sender": load.films_s,
        "kills": dict(kills),
        "films taken": len(taken),
        "results in the archive": len(results),
        "results lost": len(lost),
        "results sent more than once": sum(number > 1 for number in results.values()),
        "results that wait": waiting,
        "given up": len(list((folder / "outbox" / "given-up").glob("*.dcm"))),
        "processor seconds of the server": round(processor_s),
        "server MiB by minute": megabytes,
        "server threads by minute": threads,
        "server open files by minute": files,
    }
    print(json.dumps(figures, indent=1))
    if lost or waiting:
        sys.exit("serving_pacs: results are lost")


def _train(folder: Path) -> str:
    from benchmarks.predict import train_one

    return str(train_one(folder))


def _draw(folder: Path) -> None:
    """Eight films as files."""
    from xrai.phantom import draw_phantom, encode, plan

    folder.mkdir()
    for number, phantom in zip(range(8), plan(11), strict=False):
        data = encode(11, phantom, draw_phantom(11, phantom), image_format="dicom")
        (folder / f"{number}.dcm").write_bytes(data)


def _start(
    name: str, folder: Path, ports: tuple[int, int], films_s: float
) -> "subprocess.Popen[bytes]":
    node_port, archive_port = ports
    word, port = ("--archive", archive_port) if name == "archive" else ("--sender", node_port)
    command = [sys.executable, "-m", "benchmarks.serving_pacs", word, str(port)]
    return subprocess.Popen([*command, "--folder", str(folder), "--films_s", str(films_s)])


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.2)


def _pending(http_port: int) -> float:
    """How many results wait, as the server says it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    (line,) = [line for line in text.splitlines() if line.startswith("xrai_outbox_pending ")]
    return float(line.split()[1])


if __name__ == "__main__":
    main()
