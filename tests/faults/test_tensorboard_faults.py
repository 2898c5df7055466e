"""TensorBoard over a bucket that goes away: it ends, and is not taken for ready meanwhile."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.proxy import Proxy
from xrai.results.tensorboard import Events
from xrai.store import open_store

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def serving(proxy: Proxy, uri: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """TensorBoard on one run of the bucket, and its heartbeat."""
    events = Events("one")
    events.add_scalars(1, {"loss/train": 0.5})
    written = events.take(purge_step=None)
    assert written is not None
    open_store(uri).write("one/tensorboard/events.out.tfevents.000000.xrai", written)
    heartbeat = tmp_path / "heartbeat"
    program = str(REPOSITORY / "docker/serve_tensorboard.py")
    command = [sys.executable, program, f"--logdir={uri}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--reload_interval=1"],
        env={**os.environ, "XRAI_HEARTBEAT": str(heartbeat), "AWS_MAX_ATTEMPTS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process, heartbeat
    finally:
        process.kill()
        process.communicate(timeout=20)


def wait_for_reading(heartbeat: Path, since: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not heartbeat.exists() or heartbeat.stat().st_mtime < since:
        assert process.poll() is None and time.monotonic() < deadline, process.returncode
        time.sleep(0.05)


@pytest.mark.ci
def test_it_tells_that_it_reads_runs_and_ends_when_the_bucket_is_gone(
    proxy: Proxy, serving: tuple[subprocess.Popen[str], Path]
) -> None:
    process, heartbeat = serving
    wait_for_reading(heartbeat, 0.0, process)
    assert any("events.out.tfevents" in request.path for request in proxy.requests)
    wait_for_reading(heartbeat, time.time(), process)  # it goes on to read
    proxy.vanish()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "xrai: error: the runs cannot be read: " in said
