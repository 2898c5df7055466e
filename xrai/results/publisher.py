"""A thread that stores a run's files in a bucket, and never blocks or ends the training."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xrai.errors import StoreAccessError, XraiError
from xrai.log import get_logger
from xrai.store import Store

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0

_logger = get_logger(__name__)


class Publisher:
    """Stores announced files in order, in a thread of its own. The first in line is tried until
    it works.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.num_failures = 0
        self.last_error: Exception | None = None
        self.stored: dict[str, str] = {}  # name -> SHA-256 of what the bucket got from here
        self._store, self._folder = store, folder
        self._line: dict[str, _Task] = {}
        self._attempts = 0  # failed ones since the last success or call to drain
        self._hurry = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="xrai-publisher", daemon=True)
        self._thread.start()

    def announce(self, tasks: Iterable[tuple[str, bool]]) -> None:
        """Put (name, whether to keep it) at the end of the line; a name that waits already moves
        there.
        """
        with self._changed:
            for name, keep in tasks:
                self._line.pop(name, None)
                self._line[name] = _Task(name, keep)
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will be stored."""
        return self._closed

    def drain(self, *, timeout_s: float, max_attempts: int | None = None) -> bool:
        """Wait for the line to empty; False when time is over, `max_attempts` failed in a row,
        or it was closed.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._attempts, self._hurry = 0, True
            self._changed.notify_all()
            while self._line:
                left_s = deadline - time.monotonic()
                gave_up = max_attempts is not None and self._attempts >= max_attempts
                if left_s <= 0 or gave_up or self._closed or not self._thread.is_alive():
                    return False
                self._changed.wait(min(left_s, 1.0))
            return True

    def waiting(self) -> list[str]:
        """The names that are not stored yet."""
        with self._changed:
            return list(self._line)

    def close(self) -> None:
        """End the thread after the transfer it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                task = next(iter(self._line.values()))
            try:
                digest = self._do(task)
            except (XraiError, OSError) as error:
                self._pause_after(task, error)
                continue
            with self._changed:
                if self._attempts:
                    _logger.info(
                        "%s is stored now; %d more files wait", task.name, len(self._line) - 1
                    )
                self._attempts = 0
                if digest is not None:
                    self.stored[task.name] = digest
                if self._line.get(task.name) is task:  # else it was announced once more meanwhile
                    del self._line[task.name]
                self._changed.notify_all()

    def _do(self, task: "_Task") -> str | None:
        if task.keep:
            path = self._folder / task.name
            return (
                self._store.upload(task.name, path) if path.exists() else None
            )  # gone since, as old checkpoints are
        self.stored.pop(task.name, None)
        try:
            self._store.delete(task.name)
        except StoreAccessError as error:  # a bucket may take files and let none be deleted
            _logger.warning("%s stays in the bucket: %s", task.name, error)
        return None

    def _pause_after(self, task: "_Task", error: Exception) -> None:
        with self._changed:
            self.num_failures += 1
            self.last_error = error
            self._attempts += 1
            if self._attempts == 1:
                _logger.warning(
                    "%s is not stored yet and will be tried again; the run goes on: %s",
                    task.name,
                    error,
                )
            self._hurry = False
            self._changed.notify_all()
            pause_s = min(_FIRST_PAUSE_S * 2 ** (self._attempts - 1), _LONGEST_PAUSE_S)
            self._changed.wait_for(lambda: self._closed or self._hurry, timeout=pause_s)


@dataclass(eq=False)
class _Task:
    name: str
    keep: bool  # store it, or delete it from the bucket
