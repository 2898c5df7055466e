"""The logic of benchmarks/load.py, benchmarks/latency.py and benchmarks/peers.py; no timing, and
no peer.
"""

import http.server
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import Report, Run
from benchmarks.latency import Relay, read_counts
from benchmarks.load import RATE, rate_of, read_best
from benchmarks.peers import _parts


@pytest.mark.parametrize(
    ("num", "parts", "expected"), [(5, 2, [2, 3]), (2, 4, [1, 1]), (3, 1, [3]), (3, 0, [3])]
)
def test_paths_are_divided_among_writers_without_loss(
    num: int, parts: int, expected: list[int]
) -> None:
    paths = [str(number) for number in range(num)]
    found = _parts(paths, parts)
    assert [len(part) for part in found] == expected
    assert [path for part in found for path in part] == paths


def test_a_peers_best_number_of_workers_is_that_of_its_larger_median(tmp_path: Path) -> None:
    runs = [Run("h5py, 0 workers", k, {"images_per_s": 10.0}) for k in range(3)]
    runs += [
        Run("h5py, 2 workers", k, {"images_per_s": rate})
        for k, rate in enumerate((5.0, 11.0, 12.0))
    ]
    runs += [
        Run("files, 0 workers", 0, {"images_per_s": 3.0}),
        Run("files, 2 workers", 0, {}, "broken"),
    ]
    report = Report("load_warm", settings={})
    report.add_table("warm", "Warm", runs, figures=[RATE])
    report.save(tmp_path)
    assert read_best(tmp_path / "load_warm.json") == {
        "streaming": 0,
        "litdata": 0,
        "webdataset": 0,
        "h5py": 2,
        "files": 0,
    }


def test_a_rate_is_taken_over_as_many_epochs_as_it_takes() -> None:
    made = []

    class Loader:
        def __iter__(self) -> Iterator[tuple[np.ndarray, None]]:
            for number in range(3):
                made.append(number)
                yield np.empty((4, 1, 2, 2), np.uint8), None

    epoch = iter(Loader())
    next(epoch)
    assert rate_of(epoch, Loader(), seconds=0.0, batches=7) > 0
    assert len(made) == 1 + 7


def test_the_relay_passes_requests_on_counts_them_and_takes_its_time() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"x" * 300_000
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with Relay(f"http://127.0.0.1:{server.server_address[1]}", latency_s=0.05) as relay:
            for number in (1, 2):
                began = time.perf_counter()
                assert len(urllib.request.urlopen(relay.url, timeout=10).read()) == 300_000
                assert time.perf_counter() - began >= 0.1  # the handshake and the request
                assert read_counts(relay.counts).num_requests == number
                assert 300_000 * number < read_counts(relay.counts).num_bytes < 301_000 * number
    finally:
        server.shutdown()
        server.server_close()
