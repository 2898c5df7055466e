"""What ranks on one machine say to each other through memory that they share.

gloo sends everything through sockets and threads of its own, even between processes of one machine:
of a step of 20 ms it took 4 to 5 for two ranks and 1.2 MB of gradients, and most of 2 for a single
number (docs/decisions/0010). Here each rank writes into files in memory that all have mapped: how
many words it has left, the words, and its gradients.

Only on x86-64 under Linux, where one process's writes are seen by another in the order in which
they were made.
"""

import math
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORDS: Final = 0
GRADIENTS: Final = 1  # what ranks meet for, see `Neighbours`

_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
_PURPOSES = 2
_WORDS_KEPT = (
    4  # of each rank and purpose: two that are under way, and two that others may have begun since
)
_HALVES = 2
_YIELDS = 20  # while it waits a rank first gives way, then sleeps, then sleeps longer and looks who is still there
_SHORT_SLEEPS = 200
_SHORT_S, _LONG_S = 5e-5, 1e-3
_LOOK_S = 0.1


class MissingRankError(RuntimeError):
    """Another rank has ended, or did not come in time."""


def create_memory(num_bytes: int) -> IO[bytes] | None:
    """A new file of so many bytes in memory, all 0, which is there until it is closed; None
    where that cannot be.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="xrai-", dir=_MEMORY))
            os.posix_fallocate(
                file.fileno(), 0, num_bytes
            )  # else first use of what is missing would end the process
        except OSError:
            return None
        stack.pop_all()
    return file


class Neighbours:
    """Where the ranks of one machine meet. Every rank makes one, of the same file of `num_bytes`
    bytes.

    A rank leaves a word (an integer) and goes on; later it waits until all others have left theirs,
    and hears the largest. Words of different purposes have nothing to do with each other; of one
    purpose two may be under way.
    """

    def __init__(self, path: Path, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Map the file. Raises OSError where that cannot be."""
        numbers = np.frombuffer(_map(path, self.num_bytes(world_size)), np.int64).reshape(
            -1, world_size
        )
        self._processes, self._steps, self._times_ns = numbers[:3]  # (world_size,)
        self._counts = numbers[3 : 3 + _PURPOSES]  # of words that each rank has left
        self._words = numbers[3 + _PURPOSES :].reshape(_PURPOSES, _WORDS_KEPT, world_size)
        self._rank = rank
        self.timeout_s = timeout_s
        self._processes[rank] = os.getpid()

    @staticmethod
    def num_bytes(world_size: int) -> int:
        """The size of the file."""
        return 8 * world_size * (3 + _PURPOSES + _PURPOSES * _WORDS_KEPT)

    def note(self, step: int) -> None:
        """Leave word that this rank has done `step` steps, for the others' messages."""
        self._steps[self._rank], self._times_ns[self._rank] = step, time.time_ns()

    def notes(self) -> dict[int, tuple[int, float]]:
        """The step that each rank has noted, and how many seconds ago; those that have noted
        none are not there.
        """
        now_ns = time.time_ns()
        pairs = enumerate(zip(self._steps.tolist(), self._times_ns.tolist(), strict=True))
        return {
            rank: (step, (now_ns - when_ns) / 1e9) for rank, (step, when_ns) in pairs if when_ns
        }

    def leave(self, word: int, *, purpose: int) -> int:
        """Leave this rank's next word; returns its number, from 1."""
        counts: NDArray[np.int64] = self._counts[purpose]
        number = int(counts[self._rank]) + 1
        self._words[purpose, number % _WORDS_KEPT, self._rank] = word
        counts[self._rank] = number  # after the word, and all that was written before
        return number

    def largest(self, number: int, *, purpose: int) -> int:
        """The largest word of this number, when all have left theirs.

        Raises `MissingRankError` when a rank has ended without, or time is over.
        """
        counts = self._counts[purpose]
        began = looked = time.monotonic()
        tries = 0
        while counts.min() < number:
            tries += 1
            if tries <= _YIELDS:
                os.sched_yield()
                continue
            time.sleep(_SHORT_S if tries <= _SHORT_SLEEPS else _LONG_S)
            now = time.monotonic()
            if now - looked > _LOOK_S:
                looked = now
                late = np.flatnonzero(counts < number).tolist()
                for rank in late:
                    if not self.is_there(rank) and counts[rank] < number:
                        raise MissingRankError(f"rank {rank} has ended")
                if late and now - began > self.timeout_s:
                    raise MissingRankError(f"no word from rank {late[0]} for {now - began:.0f} s")
        return int(self._words[purpose, number % _WORDS_KEPT].max())

    def is_there(self, rank: int) -> bool:
        """Whether a rank's process has not ended; for one that has, as long as nobody else has
        got its number.
        """
        try:
            status = Path(f"/proc/{self._processes[rank]}/stat").read_text()
        except OSError:
            return False
        return (
            status.rpartition(")")[2].split()[0] not in "ZX"
        )  # ended, and its parent has not asked yet


class SharedMean:
    """Means over the ranks of one machine; every rank makes one, of the same file of `num_bytes`
    bytes.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        world_size: int,
        num_values: int,
        dtype: torch.dtype,
        meet: Callable[[], object],
    ) -> None:
        """Map the file. `num_values` are averaged in a step; `meet` returns when all ranks have
        called it.

        Raises OSError where the file cannot be mapped.
        """
        mapped = _map(path, self.num_bytes(world_size, num_values, dtype))
        # Two halves in turn: a rank may write its next values while another still adds up the last
        # ones, but no more
        self._halves = torch.frombuffer(mapped, dtype=dtype).view(_HALVES, world_size, num_values)
        self._rank, self._meet = rank, meet
        self._step = 0
        self._begin = 0  # of the values of this step that come next

    @staticmethod
    def num_bytes(world_size: int, num_values: int, dtype: torch.dtype) -> int:
        """The size of the file."""
        return math.prod((_HALVES, world_size, num_values, dtype.itemsize))

    def form(self, values: Tensor, *, is_last: bool) -> None:
        """Replace `values` (n,) of each rank by their mean over ranks, the same bits on every rank.

        The values of a step may come in several parts, in the same order and of the same sizes on
        every rank; `is_last` marks the last of them. Values are divided first and then added up in
        the order of ranks.
        """
        half = self._halves[
            self._step % _HALVES, :, self._begin : self._begin + len(values)
        ]  # (world_size, n)
        torch.div(values, len(half), out=half[self._rank])
        self._meet()
        torch.add(half[0], half[1], out=values)
        for others in half[2:]:
            values += others
        self._begin += len(values)
        if is_last:
            self._step, self._begin = self._step + 1, 0


def _map(path: Path, size: int) -> mmap.mmap:
    with path.open("r+b") as file:
        if os.fstat(file.fileno()).st_size < size:
            raise OSError(f"{path} is too small for {size} bytes")
        return mmap.mmap(file.fileno(), size)
