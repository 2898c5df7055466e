"""Memory that decoding may take: one budget over all threads and processes of a command.

A header states how much memory an image will take, before it is decoded. Images wait for each other
where together they would exceed the budget; one that alone exceeds it is decoded by itself.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any, Final

BYTES_PER_WORKER: Final = 1 << 28  # 256 MiB; a DICOM image of 9 million pixels takes 200 MB

_MIN_WORKERS = 2  # that the budget is made for, at least
_UNIT_BYTES = 1 << 23  # what takes less is not counted


class MemoryBudget:
    """A budget for so many threads, or processes of a `multiprocessing` context."""

    def __init__(self, num_workers: int, context: BaseContext | None = None) -> None:
        primitives: Any = context or threading
        self.num_units = max(_MIN_WORKERS, num_workers) * BYTES_PER_WORKER // _UNIT_BYTES
        self._free = primitives.Semaphore(self.num_units)
        self._turn = primitives.Lock()  # only one gathers units: two would each wait for the other

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Take a part of the budget for the block, as soon as it is free."""
        is_small = num_bytes < _UNIT_BYTES
        num_units = 0 if is_small else min(-(-num_bytes // _UNIT_BYTES), self.num_units)
        if num_units:
            with self._turn:
                for _ in range(num_units):
                    self._free.acquire()
        try:
            yield
        finally:
            for _ in range(num_units):
                self._free.release()
