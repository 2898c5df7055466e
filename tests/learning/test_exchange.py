"""Means in shared memory, with threads in the place of ranks; real processes: tests/distributed."""

import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from xrai.learning import exchange
from xrai.learning.exchange import (
    GRADIENTS,
    WORDS,
    MissingRankError,
    Neighbours,
    SharedMean,
    create_memory,
)

NUM, STEPS = 10, 50
needs_memory = pytest.mark.skipif(
    platform.system() != "Linux"
    or platform.machine() != "x86_64"
    or not os.access("/dev/shm", os.W_OK),
    reason="there is shared memory for ranks on x86-64 under Linux alone, in /dev/shm",
)

NEIGHBOUR = """
import sys, time
from pathlib import Path
from xrai.learning.exchange import Neighbours
Neighbours(Path(sys.argv[1]), rank=1, world_size=2, timeout_s=20).note(7)
time.sleep(60)
"""


def new_neighbours(folder: Path, num: int, *, timeout_s: float = 20) -> list[Neighbours]:
    path = folder / "neighbours"
    path.write_bytes(bytes(Neighbours.num_bytes(num)))
    return [Neighbours(path, rank=rank, world_size=num, timeout_s=timeout_s) for rank in range(num)]


def values_of(rank: int, step: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(NUM, generator=torch.Generator().manual_seed(1000 * rank + step), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_all_ranks_come_to_the_mean_bit_for_bit_step_after_step(
    tmp_path: Path, world_size: int, dtype: torch.dtype
):
    path = tmp_path / "memory"
    path.write_bytes(bytes(SharedMean.num_bytes(world_size, NUM, dtype)))
    barrier = threading.Barrier(world_size)

    def run(rank: int) -> list[Tensor]:
        mean = SharedMean(
            path,
            rank=rank,
            world_size=world_size,
            num_values=NUM,
            dtype=dtype,
            meet=lambda: barrier.wait(timeout=20),
        )
        found = []
        for step in range(STEPS):
            values = values_of(rank, step, dtype)
            parts = [values[:3], values[3:]] if step % 2 else [values]
            for part in parts:
                mean.form(part, is_last=part is parts[-1])
            found.append(values)
        return found

    with ThreadPoolExecutor(world_size) as pool:
        of_ranks = list(pool.map(run, range(world_size)))
    for step in range(STEPS):
        expected = torch.stack([values_of(rank, step, dtype) for rank in range(world_size)]).mean(0)
        assert torch.allclose(of_ranks[0][step], expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
        assert all(torch.equal(found[step], of_ranks[0][step]) for found in of_ranks)


@needs_memory
def test_memory_has_its_size_and_is_gone_when_it_is_closed():
    memory = create_memory(1000)
    assert memory is not None
    path = Path(memory.name)
    assert path.parent == Path("/dev/shm") and path.stat().st_size == 1000
    memory.close()
    assert not path.exists()


@needs_memory
def test_without_room_there_is_no_memory_and_no_file_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exchange, "_MEMORY", tmp_path)

    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    assert create_memory(1000) is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(exchange, "_MEMORY", tmp_path / "none")
    assert create_memory(1000) is None


def test_a_file_that_is_not_there_or_too_small_is_refused(tmp_path: Path):
    arguments = {
        "rank": 0,
        "world_size": 2,
        "num_values": NUM,
        "dtype": torch.float32,
        "meet": lambda: None,
    }
    with pytest.raises(OSError, match="No such file"):
        SharedMean(tmp_path / "none", **arguments)  # type: ignore[arg-type]
    (tmp_path / "small").write_bytes(bytes(8))
    with pytest.raises(OSError, match="too small"):
        SharedMean(tmp_path / "small", **arguments)  # type: ignore[arg-type]


def test_on_other_processors_there_is_no_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert create_memory(1000) is None


def test_every_rank_hears_the_largest_of_each_step_however_they_hurry(tmp_path: Path):
    world_size = 3
    near = new_neighbours(tmp_path, world_size)

    def run(rank: int) -> list[int]:
        random = np.random.default_rng(rank)
        heard = []
        for step in range(200):
            if random.random() < 0.1:
                time.sleep(1e-3)
            first = near[rank].leave(10 * step + (rank + step) % world_size, purpose=WORDS)
            second = near[rank].leave(
                -rank - step, purpose=WORDS
            )  # two may be under way, and end in any order
            meeting = near[rank].leave(0, purpose=GRADIENTS)
            heard.append(near[rank].largest(second, purpose=WORDS))
            assert near[rank].largest(meeting, purpose=GRADIENTS) == 0
            heard.append(near[rank].largest(first, purpose=WORDS))
        return heard

    with ThreadPoolExecutor(world_size) as pool:
        of_ranks = list(pool.map(run, range(world_size)))
    expected = [word for step in range(200) for word in (-step, 10 * step + world_size - 1)]
    assert of_ranks == [expected] * world_size


def test_nobody_goes_on_before_all_are_there(tmp_path: Path):
    near = new_neighbours(tmp_path, 2)
    came: list[int] = []

    def wait() -> None:
        near[0].largest(near[0].leave(0, purpose=GRADIENTS), purpose=GRADIENTS)
        came.append(0)

    near[1].leave(0, purpose=WORDS)  # another purpose
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    assert came == []
    near[1].leave(0, purpose=GRADIENTS)
    thread.join(timeout=20)
    assert came == [0]


def test_a_rank_that_does_not_come_is_named_when_time_is_over(tmp_path: Path):
    near = new_neighbours(tmp_path, 3, timeout_s=0.5)
    near[1].leave(0, purpose=WORDS)
    began = time.monotonic()
    with pytest.raises(MissingRankError, match="no word from rank 2 for"):
        near[0].largest(near[0].leave(0, purpose=WORDS), purpose=WORDS)
    assert time.monotonic() - began >= 0.5


def test_a_rank_whose_process_has_ended_is_named_at_once(tmp_path: Path):
    near = new_neighbours(tmp_path, 2, timeout_s=3600)
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(tmp_path / "neighbours")])
    while not near[0].notes():
        time.sleep(0.01)
    process.kill()  # nobody asks for its status before the end of this test
    with pytest.raises(MissingRankError, match="rank 1 has ended"):
        near[0].largest(near[0].leave(0, purpose=WORDS), purpose=WORDS)
    assert near[0].is_there(0)
    assert not near[0].is_there(1)
    process.wait()
    assert not near[0].is_there(1)
    assert {rank: step for rank, (step, _) in near[0].notes().items()} == {1: 7}


def test_what_a_rank_left_before_it_ended_counts(tmp_path: Path):
    near = new_neighbours(tmp_path, 2)
    near[1].leave(5, purpose=WORDS)
    near[1]._processes[1] = 2**22 + 1  # above all numbers of processes
    assert not near[0].is_there(1)
    assert near[0].largest(near[0].leave(3, purpose=WORDS), purpose=WORDS) == 5
