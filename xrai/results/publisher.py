"""A thread that uploads a run's files to a bucket, and never blocks or ends the training."""

import threading
import time
from collections.abc import Iterable
from pathlib import Path

from xrai.errors import StoreAccessError, XraiError
from xrai.log import get_logger
from xrai.store import Store

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_logger = get_logger(__name__)

_Task = tuple[str, bool]  # a file, and whether to upload it or to delete it from the bucket


class Publisher:
    """Uploads files in the order in which they were queued. The first is retried until it works.

    The thread begins with the first file.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.num_failures = 0
        self.last_error: Exception | None = None
        self.stored: dict[str, str] = {}  # name -> SHA-256 of what this process uploaded
        self.is_closed = False
        self._store, self._folder = store, folder
        self._queue: dict[str, _Task] = {}  # in order
        self._attempts = 0  # failed ones since the last success or call to drain
        self._is_failing = False  # since the last success, as the log says
        self._hurry = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="xrai-publisher", daemon=True)

    def announce(self, names: Iterable[str], *, keep: bool) -> None:
        """Append files to keep, or to delete, to the queue; one that waits already moves back."""
        with self._changed:
            for name in names:
                self._queue.pop(name, None)
                self._queue[name] = (name, keep)
            self._changed.notify_all()
            if self._thread.ident is None:
                self._thread.start()

    def drain(self, *, timeout_s: float, max_attempts: int | None = None) -> bool:
        """Wait until the queue is empty.

        False if that takes longer than `timeout_s`, `max_attempts` in a row failed, or the
        publisher is closed.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._attempts, self._hurry = 0, True
            self._changed.notify_all()
            while self._queue:
                left_s = deadline - time.monotonic()
                gave_up = max_attempts is not None and self._attempts >= max_attempts
                if left_s <= 0 or gave_up or self.is_closed or not self._thread.is_alive():
                    return False
                self._changed.wait(min(left_s, 1.0))
            return True

    def waiting(self) -> list[str]:
        """The names that are not stored yet."""
        with self._changed:
            return list(self._queue)

    def close(self) -> None:
        """End the thread after the current transfer."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self.is_closed)
                if self.is_closed:
                    return
                task = name, keep = next(iter(self._queue.values()))
            self.stored.pop(name, None)
            path = self._folder / name
            try:
                if not keep:
                    self._delete(name)
                elif path.exists():  # an old checkpoint may be gone by now
                    self.stored[name] = self._store.upload(name, path)
            except (XraiError, OSError) as error:
                self._pause_after(name, error)
                continue
            with self._changed:
                if self._is_failing:
                    num_left = len(self._queue) - 1
                    _logger.info("%s is stored now; %d more files wait", name, num_left)
                self._attempts, self._is_failing = 0, False
                if self._queue.get(name) is task:  # else it was announced again meanwhile
                    del self._queue[name]
                self._changed.notify_all()

    def _delete(self, name: str) -> None:
        try:
            self._store.delete(name)
        except StoreAccessError as error:  # the bucket's policy may forbid deletion alone
            _logger.warning("%s stays in the bucket: %s", name, error)

    def _pause_after(self, name: str, error: Exception) -> None:
        with self._changed:
            self.num_failures += 1
            self.last_error = error
            self._attempts += 1
            if not self._is_failing:
                self._is_failing = True
                text = f"{name} is not stored yet and will be tried again; the run goes on"
                _logger.warning("%s: %s", text, error)
            self._hurry = False
            self._changed.notify_all()
            pause_s = min(_FIRST_PAUSE_S * 2 ** (self._attempts - 1), _LONGEST_PAUSE_S)
            self._changed.wait_for(lambda: self.is_closed or self._hurry, timeout=pause_s)
