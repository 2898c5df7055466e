"""Results on their way to an archive, on disk until it has them.

`Outbox` is the folder, `Delivery` the thread that empties it. A result is on disk, whole, before
its film counts as taken, and stays there until the archive confirms it: a restart, a kill or an
unreachable archive loses nothing. Files are named by their SOP Instance UID, which is derived from
film and models, so an object that is sent again is the same one.

    outbox/pending/UID.dcm    waits to be sent
    outbox/sent/UID           empty; marks what was sent, so that no result is sent twice
    outbox/given-up/UID.dcm   refused or damaged, time and again, or too old; UID.txt says why. To
                              try again, move it back to pending/

What is in sent/ and given-up/ is deleted after 30 days.

Files hold patients' names: only their owner may read them.
"""

import errno
import fcntl
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xrai.errors import InUseError, UserError
from xrai.files import is_temporary, write_atomically
from xrai.log import get_logger, place_of
from xrai.serving.films import FullError
from xrai.serving.pacs import AwayError, Pacs, RefusedError, Session

MAX_BYTES: Final = 1 << 32  # 4 GiB

_LOCK = ".lock"
_PENDING, _SENT, _GIVEN_UP = "pending", "sent", "given-up"
_KEPT_S = 30 * 24 * 3600.0  # for marks of what was sent, and for what was given up
_AWAY = 2  # failures in a row after which the archive counts as away
_BATCH = 64  # objects of one connection
_SCAN_S = 30.0  # between two looks at the folder while nothing is put into it
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Waits:
    """How long, and how often, a delivery is tried."""

    first_s: float = 1.0  # after a failure; the next one is twice as long
    longest_s: float = 300.0
    max_age_s: float = 7 * 24 * 3600.0  # since it was put into the outbox; older ones are given up
    max_refusals: int = 5  # of one object
    clean_s: float = 3600.0  # between two looks for what was kept long enough

    def after(self, num_failures: int) -> float:
        """Seconds to wait after so many failures in a row, a random part less."""
        wait_s = min(self.longest_s, self.first_s * 2.0 ** min(num_failures - 1, 30))
        return wait_s * random.uniform(0.5, 1.0)


class Outbox:
    """The folder. One process uses it at a time."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Open or create it. Raises `InUseError` where another process has it open, `UserError`
        where it cannot be written.
        """
        self.folder, self._max_bytes = folder, max_bytes
        self.changed = threading.Event()  # something was put into it
        self._lock = threading.Lock()
        try:
            for name in ("", _PENDING, _SENT, _GIVEN_UP):
                (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
                (folder / name).chmod(0o700)
            self._owner = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"--outbox {folder} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._owner)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"--outbox {folder} is on a disk without locks") from error
            raise InUseError(f"--outbox {folder} is used by another process") from error
        self._num_bytes = 0
        for path in (folder / _PENDING).iterdir():
            if is_temporary(path.name):
                path.unlink()  # a writer was killed; its film was not taken either
            else:
                self._num_bytes += path.stat().st_size

    def close(self) -> None:
        """Let others open it."""
        os.close(self._owner)

    def refuse_full(self) -> None:
        """Raise `FullError` where nothing more fits."""
        if self._num_bytes >= self._max_bytes:
            raise FullError(f"the outbox holds {self._num_bytes} bytes, its limit")

    def knows(self, uid: str) -> bool:
        """Whether an object waits, or was sent."""
        return (self.folder / _SENT / uid).exists() or (
            self.folder / _PENDING / f"{uid}.dcm"
        ).exists()

    def put(self, uid: str, data: bytes) -> bool:
        """Keep an object until it is sent; False where it waits or was sent already.

        On return it is on disk. Raises `FullError` where there is no room.
        """
        self.refuse_full()
        name = f"{uid}.dcm"
        with self._lock:
            if self.knows(uid):
                return False
            try:
                write_atomically(self.folder / _PENDING / name, data, mode=0o600)
                _sync_folder(self.folder / _PENDING)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise FullError("the disk of the outbox is full") from error
                raise
            self._num_bytes += len(data)
        self.changed.set()
        return True

    def pending(self) -> list[Path]:
        """The files that wait, the oldest first."""
        found = []
        with os.scandir(self.folder / _PENDING) as entries:
            for entry in entries:
                if entry.name.endswith(".dcm") and not is_temporary(entry.name):
                    with suppress(FileNotFoundError):  # sent by now
                        found.append((entry.stat().st_mtime_ns, entry.path))
        return [Path(path) for _, path in sorted(found)]

    def num_given_up(self) -> int:
        """How many objects will not be tried again."""
        return sum(path.suffix == ".dcm" for path in (self.folder / _GIVEN_UP).iterdir())

    def was_sent(self, file: Path) -> None:
        """Mark a file as sent, and delete it."""
        mark = os.open(self.folder / _SENT / file.stem, os.O_WRONLY | os.O_CREAT, 0o600)
        os.close(mark)
        self._remove(file)

    def give_up(self, file: Path, reason: str) -> None:
        """Move a file to the folder of those that are not tried again, with the reason."""
        target = self.folder / _GIVEN_UP / file.name
        write_atomically(target.with_suffix(".txt"), f"{reason}\n".encode(), mode=0o600)
        size = file.stat().st_size
        with suppress(PermissionError):  # another user's, kept from when it was put
            os.utime(file)  # it is kept from now on
        file.replace(target)
        with self._lock:
            self._num_bytes -= size

    def clean(self) -> int:
        """Delete what was sent or given up more than 30 days ago; returns how many of these results
        had been given up.
        """
        num_results, oldest = 0, time.time() - _KEPT_S
        for name in (_SENT, _GIVEN_UP):
            for path in (self.folder / name).iterdir():
                with suppress(FileNotFoundError):  # moved back by a person
                    if path.is_file() and path.stat().st_mtime < oldest:
                        path.unlink()
                        num_results += path.suffix == ".dcm"
        return num_results

    def _remove(self, file: Path) -> None:
        size = file.stat().st_size
        file.unlink()
        with self._lock:
            self._num_bytes -= size


@dataclass
class _Tries:
    """How often a file has failed, and when it is due again."""

    failures: int = 0
    refusals: int = 0
    due: float = 0.0  # on the monotonic clock


@dataclass(frozen=True)
class Delivered:
    """The state of a delivery, for metrics."""

    num_pending: int
    num_given_up: int
    num_sent: int  # since the start
    num_failures: int  # since the start
    oldest_s: float  # age of the object that waits longest; 0 where none does
    trouble: str  # why the last attempt failed, "" where it did not


class Delivery:
    """Sends what an outbox holds, in a thread of its own."""

    def __init__(self, outbox: Outbox, pacs: Pacs, waits: Waits | None = None) -> None:
        self._outbox, self._pacs, self._waits = outbox, pacs, waits or Waits()
        self._stopping = threading.Event()
        self._tries: dict[str, _Tries] = {}
        self._num_sent = self._num_failures = self._num_away = 0
        self._trouble = ""
        self._session: Session | None = None  # while it is open
        self._clean_at = 0.0  # on the monotonic clock
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether the thread runs; without it, results stay in the outbox."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> bool:
        """Stop after the object that is being sent. Where the archive takes longer than
        `timeout_s` to answer, the connection ends. What is left waits for the next start.

        Returns whether nothing is sent any more; until then, nobody else may open the outbox.
        """
        self._stopping.set()
        self._outbox.changed.set()
        if self._thread.ident is None:  # was not started
            return True
        self._thread.join(timeout_s)
        if self._thread.is_alive() and (session := self._session):
            session.cut()
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def state(self) -> Delivered:
        """Counts, the age of the oldest result, and the last failure."""
        waiting, oldest_s = self._outbox.pending(), 0.0
        if waiting:
            with suppress(FileNotFoundError):  # sent by now
                oldest_s = max(0.0, time.time() - waiting[0].stat().st_mtime)
        num_given_up = self._outbox.num_given_up()
        numbers = (len(waiting), num_given_up, self._num_sent, self._num_failures)
        return Delivered(*numbers, oldest_s, self._trouble)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._outbox.changed.clear()
            try:
                self._clean()
                wait_s = self._round()
            except OSError as error:  # of the outbox's own disk
                self._fails(f"the outbox cannot be read or written ({error.strerror})")
                wait_s = self._waits.after(self._num_away)
            except Exception as error:  # nobody else would notice that this thread ends
                self._fails(f"sending failed inside xrai ({type(error).__name__})")
                wait_s = self._waits.after(self._num_away)
            if wait_s and not self._stopping.is_set():
                if self._num_away:  # new objects do not bring an archive back
                    self._stopping.wait(wait_s)
                else:
                    self._outbox.changed.wait(wait_s)

    def _round(self) -> float:
        """Send what is due; returns the seconds until more may be due."""
        now = time.monotonic()
        waiting = self._outbox.pending()
        known = {path.name for path in waiting}
        self._tries = {name: tries for name, tries in self._tries.items() if name in known}
        due = [path for path in waiting if self._tries_of(path).due <= now]
        due.sort(key=lambda path: self._tries_of(path).failures)  # one that fails holds up no other
        if not due:
            later = [tries.due - now for tries in self._tries.values()]
            return min([_SCAN_S, *later])
        try:
            with self._pacs.open() as session:
                self._session = session
                for path in due[:_BATCH]:
                    if self._stopping.is_set():
                        return 0.0
                    if not self._send(session, path):
                        break  # open another connection, for the others
                else:
                    return 0.0
        except AwayError as error:
            for path in due:
                self._give_up_if_old(path, str(error))
            self._fails(str(error))
        finally:
            self._session = None
        return self._waits.after(self._num_away)

    def _clean(self) -> None:
        """Delete what was kept long enough, now and then."""
        now = time.monotonic()
        if now >= self._clean_at:
            self._clean_at = now + self._waits.clean_s
            if num_results := self._outbox.clean():
                _logger.warning("deleted %d results, given up 30 days ago", num_results)

    def _send(self, session: Session, path: Path) -> bool:
        """Send one file; False where the connection is of no more use.

        Whatever goes wrong with a file, it alone waits longer each time.
        """
        try:
            session.store(path)
            self._num_sent += 1
            self._recovers()
            self._outbox.was_sent(path)
        except AwayError as error:
            self._delay(path, str(error), is_away=True)
            return False
        except RefusedError as error:
            self._delay(path, str(error), is_refused=True)
        except OSError as error:
            self._delay(path, f"its file cannot be read or marked as sent ({error.strerror})")
        except Exception as error:  # such as of pynetdicom, which no file is known to cause
            self._delay(path, f"sending it failed inside xrai ({place_of(error)})")
            return False
        return True

    def _delay(
        self, path: Path, reason: str, *, is_away: bool = False, is_refused: bool = False
    ) -> None:
        """Note that a file failed: it waits for its next attempt, or is given up."""
        tries = self._tries_of(path)
        tries.failures += 1
        tries.refusals += is_refused
        tries.due = time.monotonic() + self._waits.after(tries.failures)
        self._fails(reason, is_away=is_away)
        if tries.failures == 1 and not is_away:
            _logger.warning("could not send %s: %s", path.name, reason)
        if tries.refusals >= self._waits.max_refusals:
            self._give_up(path, reason)
        else:
            self._give_up_if_old(path, reason)

    def _tries_of(self, path: Path) -> _Tries:
        return self._tries.setdefault(path.name, _Tries())

    def _give_up_if_old(self, path: Path, reason: str) -> None:
        with suppress(FileNotFoundError):  # given up already
            if time.time() - path.stat().st_mtime > self._waits.max_age_s:
                self._give_up(path, reason)

    def _give_up(self, path: Path, reason: str) -> None:
        self._outbox.give_up(path, reason)
        _logger.warning("gave up %s after all attempts: %s", path.name, reason)

    def _fails(self, reason: str, *, is_away: bool = True) -> None:
        self._num_failures += 1
        self._trouble = reason
        self._num_away = self._num_away + 1 if is_away else 0
        if self._num_away == _AWAY:
            _logger.warning("results wait in the outbox: %s", reason)

    def _recovers(self) -> None:
        if self._num_away >= _AWAY:
            _logger.info("results are sent again to %s", self._pacs.name)
        self._num_away, self._trouble = 0, ""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
