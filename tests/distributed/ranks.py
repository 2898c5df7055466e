"""Starts the ranks of a job as real processes and collects what they print."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wiring(*, world_size: int, environment: dict[str, str] | None = None) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun gives it to its workers.

    In values of `environment` `{rank}` stands for the rank.
    """
    port = free_port()
    job = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    more = environment or {}
    return [
        {**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        | {name: value.replace("{rank}", str(rank)) for name, value in more.items()}
        for rank in range(world_size)
    ]


def start_ranks(
    arguments: list[str],
    *,
    world_size: int,
    environment: dict[str, str] | None = None,
    more: dict[int, list[str]] | None = None,
) -> list[subprocess.Popen[str]]:
    """One process a rank, each `python ARGUMENTS`; `more` are arguments of single ranks."""
    return [
        subprocess.Popen(
            [sys.executable, *arguments, *(more or {}).get(rank, [])],
            env=variables,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, variables in enumerate(wiring(world_size=world_size, environment=environment))
    ]


def finish_ranks(
    processes: list[subprocess.Popen[str]], *, timeout_s: float = 120
) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each rank; all are killed when one does not end in time."""
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, stdout, stderr)
        for process, (stdout, stderr) in zip(processes, outputs, strict=True)
    ]


def fork_ranks(
    arguments: list[str],
    *,
    world_size: int,
    environment: dict[str, str] | None = None,
    timeout_s: float = 120,
) -> list[tuple[int, str, str]]:
    """As `finish_ranks(start_ranks(…))`, by forks of one process that has torch loaded."""
    with tempfile.TemporaryDirectory() as folder:
        zygote = _zygote()
        assert zygote.stdin is not None and zygote.stdout is not None
        outputs = [Path(folder, str(rank)) for rank in range(world_size)]
        request = [
            {"arguments": arguments, "environment": variables, "output": str(output)}
            for variables, output in zip(
                wiring(world_size=world_size, environment=environment), outputs, strict=True
            )
        ]
        late = threading.Timer(timeout_s, lambda: os.killpg(zygote.pid, signal.SIGKILL))
        late.start()
        try:
            zygote.stdin.write(json.dumps(request) + "\n")
            zygote.stdin.flush()
            statuses = json.loads(zygote.stdout.readline())
        except BaseException:  # a time-out of the test, too: the next test needs another zygote
            with contextlib.suppress(ProcessLookupError):
                os.killpg(zygote.pid, signal.SIGKILL)
            _zygote.cache_clear()
            raise
        finally:
            late.cancel()
        return [
            (status, *(output.with_suffix(f".{kind}").read_text() for kind in ("stdout", "stderr")))
            for status, output in zip(statuses, outputs, strict=True)
        ]


@functools.cache
def _zygote() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.zygote"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its ranks are in its process group
    )
    atexit.register(process.communicate)  # which closes its stdin: it ends
    return process


def run_ranks(
    arguments: list[str],
    *,
    world_size: int,
    environment: dict[str, str] | None = None,
    timeout_s: float = 120,
) -> list[Any]:
    """What each rank printed as one line of JSON.

    A rank that failed fails the test with its stderr.
    """
    results = fork_ranks(
        arguments, world_size=world_size, environment=environment, timeout_s=timeout_s
    )
    for rank, (status, _, stderr) in enumerate(results):
        assert status == 0, f"rank {rank} of {world_size} ended with {status}:\n{stderr}"
    return [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in results]
