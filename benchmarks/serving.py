"""What `xrai serve` costs beside `pipeline.predict`: latency, throughput, memory, and a long load.

    python -m benchmarks.serving  # networks trained briefly on phantoms: speed is the same
    python -m benchmarks.serving --run submit/ID --source DIR --minutes 60
    python -m benchmarks.serving --parts load --minutes 5

The server, its clients (`benchmarks.sending`) and what it is compared with run on the same cores.
Two networks are served: that of the reference recipe, and the small one of the defaults, beside
which all that a server does for a film weighs most.

    throughput  films a second: `xrai.load(run).predict` on files, and the same files sent to a
                server by `--clients` connections, a film a request, and 16 films a request
    latency     one film a request while the server is half busy: films come at random times
                (Poisson), half as many as the server takes from `--clients` connections. Each
                film's time is counted from when it was due, also where no connection is free, and
                compared with its own scoring time: that of `predict` with this one file, alone on
                the machine, at such random times, the median of three passes over all files. (One
                file right after the other, caches are warm and a file takes less: given, too.) What
                the machine adds by itself is seen from each time that `predict` took over the
                median of the same file
    drop        films that are sent at once, as the page sends a folder: how much more memory the
                server takes
    load        `--minutes` of films, damaged films, reads and deletions, and clients that leave in
                the middle of a body or of an answer. In the end nothing may wait, each film that
                was answered for must be counted, and memory must not have grown since the beginning

Memory is what no file holds, of the server alone.
"""

import argparse
import contextlib
import http.client
import json
import math
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import xrai
from benchmarks.data import FULL_SIZE, PUBLIC, find_public, source_or_phantoms
from benchmarks.harness import (
    OWN_PAGES,
    ROOT,
    Contender,
    Figure,
    Report,
    count_kib,
    ratio,
    run_in_turn,
    say,
    values_of,
    watch_memory,
)
from benchmarks.predict import train_one
from benchmarks.sending import request_of, request_of_several, send_all, send_at_random
from xrai.pipeline import Pipeline

PARTS = ("throughput", "latency", "drop", "load")
PREDICT, SERVE, SERVE_SEVERAL = "predict", "serve", "serve, 16 films a request"
RATE = Figure("images_per_s", "images/s")
SCORING = Figure("scoring_ms", "predict, one file, median, ms", "lower", 1)
IN_ROW = Figure("in_row_ms", "predict, one file right after the other, median, ms", "lower", 1)
TIMES = Figure("times", "99th percentile of latency over a film's own scoring time", "lower", 2)
ALONE = Figure("alone_times", "99th percentile of predict alone, over the same", "lower", 2)
MEDIAN = Figure("median_ms", "median, ms", "lower", 1)
P99 = Figure("p99_ms", "99th percentile, ms", "lower", 1)
MORE = Figure("more_mib", "more memory, MiB", "lower")
_ENGINE = re.compile(r"films are (still )?scored by (torch|ONNX Runtime)")  # the one that stays
_ADDRESS = re.compile(r"is served at http://127\.0\.0\.1:(\d+)/")
_SEVERAL = 16  # films of a request
_START_S = 120.0
_ANSWER_S = 60.0


def main() -> None:
    """Measure, print the tables and save them."""
    parser = argparse.ArgumentParser(description="xrai serve beside predict.")
    parser.add_argument(
        "--run", default="", help="a finished run; if not given, one is trained on phantoms"
    )
    parser.add_argument("--source", default=find_public(PUBLIC), help="folder of JPEG files")
    parser.add_argument(
        "--full_size", default=find_public(FULL_SIZE), help="folder of full-size JPEG files"
    )
    parser.add_argument("--films", type=int, default=1000, help="of a measurement, and of a drop")
    parser.add_argument("--clients", type=int, default=16, help="connections that send films")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        runs = {"": flags.run} if flags.run else train_both(place)
        settings = {
            "films": flags.films,
            "clients": flags.clients,
            "minutes": flags.minutes if "load" in flags.parts else 0,
            "rounds": flags.rounds,
        }
        report = Report("serving", settings=settings)
        sources = {"films": flags.source, "full_size": flags.full_size}
        arguments: dict[str, object] = {}
        for name, source in sources.items():
            if name == "full_size" and not source:
                say("no full-size files: give a folder by --full_size")
                continue
            found, what = source_or_phantoms(source, place / name, num_phantoms=flags.films)
            paths = [str(path) for path in islice(sorted(Path(found).rglob("*.*g")), flags.films)]
            listed = place / f"{name}.txt"
            random.Random(0).shuffle(paths)  # large and small ones come together in a folder
            listed.write_text("\n".join(paths))
            arguments = {"listed": str(listed), "num_films": flags.films, "clients": flags.clients}
            for network, run in runs.items():
                words = f"{what}, {network}" if network else what
                key = f"{name}_{network.replace(' ', '_')}" if network else name
                compare(report, key, words, {**arguments, "run": run}, flags)
        arguments["run"] = next(iter(runs.values()))
        if "load" in flags.parts:
            bear(report, {**arguments, "minutes": flags.minutes})
    report.save()


def train_both(place: Path) -> dict[str, str]:
    """Short runs, by what their networks are called in the tables."""
    found = {}
    for name, config in (("reference recipe", "pneumonia"), ("small network", "")):
        folder = place / name.replace(" ", "_")
        found[name] = str(train_one(folder, config))
    return found


def compare(
    report: Report, name: str, what: str, arguments: dict[str, object], flags: argparse.Namespace
) -> None:
    """Throughput, latency and a drop of the files of one source."""
    module, title = "benchmarks.serving", f"{arguments['num_films']} films of {what}"
    if "throughput" in flags.parts:
        contenders = [
            Contender(PREDICT, f"{module}:measure_predict", arguments),
            Contender(SERVE, f"{module}:measure_throughput", arguments),
            Contender(
                SERVE_SEVERAL,
                f"{module}:measure_throughput",
                {**arguments, "films_a_request": _SEVERAL},
            ),
        ]
        runs = run_in_turn(contenders, rounds=flags.rounds)
        report.add_table(f"{name}_rate", f"Throughput, {title}", runs, ours=SERVE, figures=[RATE])
        share = ratio(runs, SERVE, PREDICT, RATE.key)["median"]
        report.demand(f"{what}: films/s over predict's", share, at_least=0.8)
        share = ratio(runs, SERVE_SEVERAL, PREDICT, RATE.key)["median"]
        words = f"{what}: films/s over predict's, {_SEVERAL} films a request"
        report.demand(words, share, at_least=0.8)
    if "latency" in flags.parts:
        contender = Contender(SERVE, f"{module}:measure_latency", arguments)
        runs = run_in_turn([contender], rounds=flags.rounds)
        figures = [TIMES, ALONE, P99, MEDIAN, SCORING, IN_ROW, RATE]
        report.add_table(f"{name}_latency", f"One film, half load, {title}", runs, figures=figures)
        times = values_of(runs, SERVE, TIMES.key)
        measured = statistics.median(times.values())
        report.demand(f"{what}: p99 of latency over scoring time", measured, at_most=3)
    if "drop" in flags.parts:
        contender = Contender(SERVE, f"{module}:measure_drop", arguments)
        runs = run_in_turn([contender], rounds=min(flags.rounds, 2))
        report.add_table(f"{name}_drop", f"A drop, {title}", runs, figures=[MORE, RATE])
        more = max(values_of(runs, SERVE, MORE.key).values())
        report.demand(f"{what}: more memory for a drop, MiB", more, at_most=1024, digits=0)


def bear(report: Report, arguments: dict[str, object]) -> None:
    """The long load, once."""
    timeout_s = 60 * float(str(arguments["minutes"])) + 600
    contender = Contender(SERVE, "benchmarks.serving:measure_load", arguments)
    runs = run_in_turn([contender], rounds=1, timeout_s=timeout_s)
    figures = [
        Figure("films", "films"),
        Figure("left", "clients that left"),
        Figure("growth_mib", "growth, MiB", "lower"),
        Figure("lost", "films lost", "lower"),
        Figure("errors", "answers of 500", "lower"),
    ]
    title = f"{arguments['minutes']:g} minutes of load, clients that leave among it"
    report.add_table("load", title, runs, figures=figures)
    found = runs[0].figures
    report.demand("load: films lost", found.get("lost", float("inf")), at_most=0, digits=0)
    report.demand("load: answers of 500", found.get("errors", float("inf")), at_most=0, digits=0)
    growth = found.get("growth_mib", float("inf"))
    report.demand("load: growth after the first tenth, MiB", growth, at_most=64, digits=0)


# ----------------------------------------------------------------------------------------- a server


@dataclass
class Server:
    """A server that runs until the block ends, and what it has said."""

    run: str
    options: Sequence[str] = ()
    port: int = 0
    log: list[str] = field(default_factory=list)

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "xrai.serve", "--run", self.run, "--port=0", *self.options],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._is_up, self._has_engine = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._is_up.wait(_START_S) or not self.port:
            self.process.kill()
            raise OSError(f"the server did not start: {self.log[-3:]}")
        if not self._has_engine.wait(_START_S):
            raise OSError(f"the server does not say what scores films: {self.log[-3:]}")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, kind: int = signal.SIGTERM) -> int:
        """End the server by a signal; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(kind)
        status = self.process.wait(_ANSWER_S)
        self._reader.join()
        return status

    def connect(self) -> http.client.HTTPConnection:
        """A connection to it."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)

    def own_mib(self) -> float:
        """What it holds in memory that no file does."""
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return count_kib(rollup, OWN_PAGES) / 1024

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.log.append(line.rstrip())
                if found := _ADDRESS.search(line):
                    self.port = int(found[1])
                    self._is_up.set()
                if _ENGINE.search(line):
                    self._has_engine.set()
        self._is_up.set()  # it has ended
        self._has_engine.set()


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    """Status and body of an answer; a body is a film."""
    headers = {"Content-Type": "image/jpeg"} if body else {}
    connection.request(method, path, body or None, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def forget_all(server: Server) -> None:
    """Delete all films of the list."""
    with contextlib.closing(server.connect()) as connection:
        for film in json.loads(ask(connection, "GET", "/v1/films")[1])["films"]:
            ask(connection, "DELETE", f"/v1/films/{film['id']}")


def read_films(listed: str) -> list[bytes]:
    """The files that a list names."""
    return [Path(path).read_bytes() for path in Path(listed).read_text().split("\n")]


# --------------------------------------------------------------------------------------- contenders


def measure_predict(
    *, scratch: Path, run: str, listed: str, num_films: int, clients: int
) -> dict[str, float]:
    """`xrai.load(run).predict` on as many files."""
    pipeline = xrai.load(run)
    paths = Path(listed).read_text().split("\n")
    pipeline.predict(paths[:64])
    began = time.perf_counter()
    num_done = 0
    while num_done < num_films:
        num_done += len(pipeline.predict(paths[: num_films - num_done]))
    return {RATE.key: num_films / (time.perf_counter() - began)}


def measure_throughput(
    *, scratch: Path, run: str, listed: str, num_films: int, clients: int, films_a_request: int = 1
) -> dict[str, float]:
    """The same files sent to a server, each request with as many films."""
    films = read_films(listed)
    if films_a_request == 1:
        requests = [request_of(film) for film in films]
    else:  # whole ones alone
        starts = range(0, len(films) - films_a_request + 1, films_a_request)
        requests = [request_of_several(films[k : k + films_a_request]) for k in starts]
    with Server(run) as server:
        send_all(server.port, requests, -(-64 // films_a_request), clients=clients)
        num_requests = num_films // films_a_request
        seconds = send_all(server.port, requests, num_requests, clients=clients)
        return {RATE.key: num_requests * films_a_request / seconds}


def measure_latency(
    *, scratch: Path, run: str, listed: str, num_films: int, clients: int
) -> dict[str, float]:
    """One film a request while the server is half busy."""
    paths = Path(listed).read_text().split("\n")
    requests = [request_of(film) for film in read_films(listed)]
    with Server(run) as server:
        send_all(server.port, requests, 64, clients=clients)
        rate = num_films / send_all(server.port, requests, num_films, clients=clients)
        forget_all(server)
        taken = send_at_random(server.port, requests, num_films, clients=clients, per_s=rate / 2)
    pipeline = xrai.load(run)
    in_row = [statistics.median(each) for each in time_each(pipeline, paths)]
    passes = time_each(pipeline, paths, per_s=rate / 2)
    scoring = [statistics.median(each) for each in passes]
    alone = [t / own for each, own in zip(passes, scoring, strict=True) for t in each]
    times = [each / scoring[number % len(scoring)] for number, each in enumerate(taken)]
    return {
        TIMES.key: statistics.quantiles(times, n=100)[98],
        ALONE.key: statistics.quantiles(alone, n=100)[98],
        P99.key: 1000 * statistics.quantiles(taken, n=100)[98],
        MEDIAN.key: 1000 * statistics.median(taken),
        SCORING.key: 1000 * statistics.median(scoring),
        IN_ROW.key: 1000 * statistics.median(in_row),
        RATE.key: rate / 2,
    }


def time_each(
    pipeline: Pipeline, paths: Sequence[str], *, per_s: float = math.inf
) -> list[tuple[float, ...]]:
    """The seconds of `predict` with each file alone, at random times, so many a second, or right
    after the other; in three passes over all of them, so that a spell in which the machine is slow
    meets a file once at most.
    """
    chance = random.Random(0)

    def time_one(path: str) -> float:
        if per_s < math.inf:
            time.sleep(chance.expovariate(per_s))
        began = time.perf_counter()
        pipeline.predict(path)
        return time.perf_counter() - began

    for path in paths[:64]:
        time_one(path)
    return list(zip(*([time_one(path) for path in paths] for _ in range(3)), strict=True))


def measure_drop(
    *, scratch: Path, run: str, listed: str, num_films: int, clients: int
) -> dict[str, float]:
    """So many films at once, each as a request of its own, as the page sends them."""
    requests = [request_of(film) for film in read_films(listed)]
    with Server(run) as server:
        send_all(server.port, requests, 64, clients=clients)
        forget_all(server)
        before = server.own_mib()
        with watch_memory(server.process.pid, pages=OWN_PAGES) as memory:
            seconds = send_all(server.port, requests, num_films, clients=clients)
        with contextlib.closing(server.connect()) as connection:
            listed_films = json.loads(ask(connection, "GET", "/v1/films")[1])["films"]
        assert len(listed_films) == num_films
        return {MORE.key: memory.peak_mib - before, RATE.key: num_films / seconds}


# ------------------------------------------------------------------------------------- a long load


@dataclass
class Load:
    """What the clients of a load have seen."""

    server: Server
    films: Sequence[bytes]
    until: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def work(self, seed: int) -> None:
        """Be one client until the time is over."""
        chance = random.Random(seed)
        while time.monotonic() < self.until:
            with contextlib.closing(self.server.connect()) as connection:
                for _ in range(chance.randint(1, 20)):
                    act = chance.choices(
                        [self.post, self.look, self.leave_body, self.leave_answer], [70, 15, 8, 7]
                    )[0]
                    if not act(connection, chance):
                        break

    def post(self, connection: http.client.HTTPConnection, chance: random.Random) -> bool:
        """Send a film, now and then a damaged one."""
        film = chance.choice(self.films)
        if chance.random() < 0.1:
            film = film[: chance.randint(1, len(film) - 1)]
        status, said = ask(connection, "POST", "/v1/films", film)
        with self.lock:
            self.answers[status] += 1
            self.counts["films"] += len(json.loads(said)["films"]) if status == 201 else 0
        return True

    def look(self, connection: http.client.HTTPConnection, chance: random.Random) -> bool:
        """Look at the list and at a film of it, and delete some of it."""
        status, said = ask(connection, "GET", "/v1/films")
        found = json.loads(said)["films"] if status == 200 else []
        readable = [film for film in found if film["probabilities"]]
        if readable:
            address = f"/v1/films/{chance.choice(readable)['id']}"
            part = chance.choice(["", "/image", "/thumbnail.png", "/heat.png"])
            status, _ = ask(connection, "GET", address + part)
            with self.lock:
                self.answers[status] += 1
        for film in found[100:]:
            ask(connection, "DELETE", f"/v1/films/{film['id']}")
        return True

    def leave_body(self, connection: http.client.HTTPConnection, chance: random.Random) -> bool:
        """Leave in the middle of a body."""
        film = chance.choice(self.films)
        connection.putrequest("POST", "/v1/films")
        connection.putheader("Content-Type", "image/jpeg")
        connection.putheader("Content-Length", str(len(film)))
        connection.endheaders(film[: chance.randint(0, len(film) - 1)])
        return self._leave(connection)

    def leave_answer(self, connection: http.client.HTTPConnection, chance: random.Random) -> bool:
        """Leave before the answer."""
        headers = {"Content-Type": "image/jpeg"}
        connection.request("POST", "/v1/films", chance.choice(self.films), headers)
        return self._leave(connection)

    def _leave(self, connection: http.client.HTTPConnection) -> bool:
        if connection.sock is not None:  # as the end of a process does it: with a reset
            option = struct.pack("ii", 1, 0)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        connection.close()
        with self.lock:
            self.counts["left"] += 1
        return False


def measure_load(
    *, scratch: Path, run: str, listed: str, num_films: int, clients: int, minutes: float
) -> dict[str, float]:
    """A load with clients that leave."""
    films = read_films(listed)[:200]
    with Server(run) as server:
        load = Load(server, films, time.monotonic() + 60 * minutes)
        threads = [threading.Thread(target=load.work, args=(seed,)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        first, last = watch_halves(server, seconds=60 * minutes)
        for thread in threads:
            thread.join()
        counted, waiting = settle(server)
        assert server.stop() in (0, 143, -signal.SIGTERM), server.log[-5:]
    # Whoever left before an answer may have been counted, too; nobody else
    lost = max(0.0, load.counts["films"] - counted) + waiting
    return {
        "films": load.counts["films"],
        "left": load.counts["left"],
        "growth_mib": last - first,
        "lost": lost,
        "errors": load.answers[500],
    }


def watch_halves(server: Server, *, seconds: float) -> tuple[float, float]:
    """The largest memory, MiB, in the second tenth of the time, and in the last."""
    began, seen = time.monotonic(), ([0.0], [0.0])
    while (elapsed := time.monotonic() - began) < seconds:
        if 0.1 <= elapsed / seconds < 0.2:
            seen[0].append(server.own_mib())
        elif elapsed / seconds >= 0.9:
            seen[1].append(server.own_mib())
        time.sleep(min(0.5, seconds / 100))
    return max(seen[0]), max(seen[1])


def settle(server: Server) -> tuple[float, float]:
    """Films that the server has counted, and that still wait, once none do or after a minute."""
    deadline = time.monotonic() + _ANSWER_S
    with contextlib.closing(server.connect()) as connection:
        while True:
            text = ask(connection, "GET", "/metrics")[1].decode()
            waiting = sum(metric(text, "xrai_waiting_films"))
            if waiting == 0 or time.monotonic() > deadline:
                return sum(metric(text, "xrai_films_total")), waiting
            time.sleep(0.2)


def metric(text: str, name: str) -> Iterator[float]:
    """The values of a metric, of all its labels, in Prometheus' text format."""
    for line in text.splitlines():
        if line.startswith((f"{name} ", f"{name}{{")):
            yield float(line.rpartition(" ")[2])


if __name__ == "__main__":
    main()
