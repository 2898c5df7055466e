"""Starts the ranks of a job as processes of their own and collects what they print."""

import json
import os
import socket
from typing import Any

from tests.zygote import COMMAND, Process, start


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
    preload: tuple[str, ...] = COMMAND,
) -> list[Process]:
    """One process a rank, each `python ARGUMENTS`; `more` are arguments of single ranks."""
    return [
        start([*arguments, *(more or {}).get(rank, [])], environment=variables, preload=preload)
        for rank, variables in enumerate(wiring(world_size=world_size, environment=environment))
    ]


def finish_ranks(
    processes: list[Process], *, timeout_s: float = 120
) -> list[tuple[int | None, str, str]]:
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
    preload: tuple[str, ...] = COMMAND,
) -> list[Any]:
    """What each rank printed as one line of JSON.

    A rank that failed fails the test with its stderr.
    """
    ranks = start_ranks(arguments, world_size=world_size, environment=environment, preload=preload)
    results = finish_ranks(ranks)
    for rank, (status, _, stderr) in enumerate(results):
        assert status == 0, f"rank {rank} of {world_size} ended with {status}:\n{stderr}"
    return [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in results]
