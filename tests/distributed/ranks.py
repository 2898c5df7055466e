"""Starts the ranks of a job as real processes and collects what they print."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_ranks(
    arguments: list[str],
    *,
    world_size: int,
    environment: dict[str, str] | None = None,
    more: dict[int, list[str]] | None = None,
) -> list[subprocess.Popen[str]]:
    """One process a rank, each `python ARGUMENTS`, wired as torchrun wires its workers.

    In values of `environment` `{rank}` stands for the rank; `more` are arguments of single ranks.
    """
    port = free_port()
    processes = []
    for rank in range(world_size):
        own = {
            name: value.replace("{rank}", str(rank)) for name, value in (environment or {}).items()
        }
        wiring = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments, *(more or {}).get(rank, [])], env={**os.environ, **wiring, **own},
                cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return processes


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


def run_ranks(
    arguments: list[str],
    *,
    world_size: int,
    environment: dict[str, str] | None = None,
    timeout_s: float = 120,
) -> list[Any]:
    """What each rank printed as one line of JSON; a rank that failed fails the test with its
    stderr.
    """
    processes = start_ranks(arguments, world_size=world_size, environment=environment)
    results = finish_ranks(processes, timeout_s=timeout_s)
    for rank, (status, _, stderr) in enumerate(results):
        assert status == 0, f"rank {rank} of {world_size} ended with {status}:\n{stderr}"
    return [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in results]
