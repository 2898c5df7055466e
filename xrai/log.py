"""Log lines, progress, a sign of life, and standard streams that cannot end a job.

On a terminal, long work shows a bar; elsewhere (a file, a container's log) it logs a line now and
then. Lines and steps also touch the file that XRAI_HEARTBEAT names, if it names one: a container's
liveness check looks at the age of that file.
"""

import errno
import io
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

from xrai.errors import ConfigError

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_LINE_EVERY_S = 10.0
_BEAT_EVERY_S = 1.0


def setup_logging(*, rank: int = 0) -> None:
    """Send xrai's log lines to stderr; of ranks other than 0 only warnings, with the rank in front.

    Raises `ConfigError` where XRAI_HEARTBEAT names a file that cannot be written.
    """
    heartbeat = Heartbeat()
    heartbeat.start()
    logger = logging.getLogger("xrai")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_LineFormatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.addHandler(_BeatHandler(heartbeat))
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def get_logger(name: str) -> logging.Logger:
    """The logger of one module: `get_logger(__name__)`."""
    return logging.getLogger(name)


def counted(num: int, noun: str, verb: str = "") -> str:
    """A number, a noun and perhaps a verb that agrees, for people: "1 image", "2 classes are"."""
    if num == 1:
        words = noun, {"are": "is", "have": "has", "use": "uses", "look": "looks"}.get(verb, verb)
    else:
        words = f"{noun}es" if noun.endswith("s") else f"{noun}s", verb
    return " ".join([str(num), *filter(None, words)])


def printable(text: str) -> str:
    """Text from outside as one line that cannot control a terminal."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


class _LineFormatter(logging.Formatter):
    """A record is one line, whatever its message holds."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def guard_streams() -> None:
    """From now on, what is printed to stdout and stderr cannot fail, nor control a terminal.

    A character that the encoding lacks is written as its escape. A stream that is closed, or whose
    reader has gone, takes everything. `finish_streams` tells of other failures.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # its descriptor was closed when Python started
            raw, encoding = _Lenient(os.devnull, "wb"), "utf-8"
        elif stream is getattr(sys, f"__{name}__"):
            raw, encoding = _Lenient(stream.fileno(), "wb", closefd=False), stream.encoding
        else:  # of a test, or guarded already
            continue
        options = (encoding, "backslashreplace")
        setattr(sys, name, _Shown(io.BufferedWriter(raw), *options, line_buffering=True))


def finish_streams(status: int) -> int:
    """Flush both, and return `status`; if some of stdout could not be written, say so and return a
    failure.
    """
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Lenient) and raw.failure:
        print(f"xrai: error: stdout cannot be written: {raw.failure}", file=sys.stderr)
        status = status or 1
    sys.stderr.flush()
    return status


class _Lenient(io.FileIO):
    """A descriptor to which each write succeeds, and the reason of the first that did not."""

    failure = ""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another process made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):  # nobody reads it
                self.failure = self.failure or error.strerror or str(error)
            return len(data)
        return written


class _Shown(io.TextIOWrapper):
    """Text without control characters, except those that end a line or draw a progress bar."""

    def write(self, text: str) -> int:
        super().write(re.sub(r"[^\n\r\t]+", lambda found: printable(found[0]), text))
        return len(text)


class Heartbeat:
    """Touches the file that XRAI_HEARTBEAT names, if any, at most once a second."""

    def __init__(self) -> None:
        name = os.environ.get("XRAI_HEARTBEAT", "")
        self._path = Path(name) if name else None
        self._last = float("-inf")

    def start(self) -> None:
        """Touch the file for the first time. Raises `ConfigError` where that is impossible."""
        try:
            self._touch()
        except OSError as error:
            raise ConfigError(
                f"XRAI_HEARTBEAT = {self._path} cannot be written ({error.strerror}): name a file "
                "in a writable folder, or leave it empty"
            ) from error

    def beat(self) -> None:
        """Report that the job is alive. A touch that fails counts as no sign of life."""
        if self._path is not None and time.monotonic() - self._last >= _BEAT_EVERY_S:
            with suppress(OSError):
                self._touch()

    def _touch(self) -> None:
        self._last = time.monotonic()
        if self._path is not None:
            self._path.touch()


class _BeatHandler(logging.Handler):
    """Touches the heartbeat at each log line."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        super().__init__()
        self._heartbeat = heartbeat

    def emit(self, record: logging.LogRecord) -> None:
        self._heartbeat.beat()


class Progress(Protocol):
    """What long work reports to."""

    def update(self, amount: int = 1) -> object:
        """Report that `amount` more units are done."""


class _Lines:
    """Progress as log lines, at most one every ten seconds and one at the end."""

    def __init__(self, description: str, total: int | None, unit: str, done: int) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._done_before, self._start = done, done, time.monotonic()
        self._last = self._start

    def update(self, amount: int = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_S:
            self._last = now
            self.log()

    def log(self) -> None:
        elapsed_s = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._done_before) / elapsed_s
        total = "" if self._total is None else f"/{self._total}"
        left = ""
        if self._total is not None and rate and self._done < self._total:
            left = f", {(self._total - self._done) / rate:.0f} s left"
        done = f"{self._description}: {self._done}{total} {self._unit}"
        digits = 0 if rate >= 10 else 1 if rate >= 1 else 2
        speed = f"{elapsed_s:.1f} s, {rate:.{digits}f} {self._unit}/s"
        get_logger("xrai.progress").info("%s in %s%s", done, speed, left)


class _Beating:
    """Progress that also touches the heartbeat."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self._heartbeat = shown, Heartbeat()

    def update(self, amount: int = 1) -> None:
        self._heartbeat.beat()
        self._shown.update(amount)


class _Ignored(threading.local):
    """In place of the pattern of a filter of warnings: `match` is that of a pattern of each thread.

    It is no function of ours, because CPython must run no Python code while it looks through the
    filters: another thread may then replace their list, which it has only borrowed.
    """

    match: Callable[[str], re.Match[str] | None] = re.compile(r"(?!)").match  # matches nothing


_ignored = _Ignored()
_ignored_filter = ("ignore", None, Warning, _ignored, 0)
_filters_lock = threading.Lock()


@contextmanager
def ignore_warnings(modules: str = "") -> Iterator[None]:
    """Ignore warnings of modules whose names match a pattern, in this thread and no other.

    `warnings.catch_warnings` would replace the filters of all threads, so that only one at a time
    could be in such a block. Instead one filter, which outside of such blocks ignores nothing,
    stays before those of the program.
    """
    if getattr(sys.flags, "context_aware_warnings", 0):  # Python 3.14: they are each thread's own
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=modules)
            yield
        return
    before, _ignored.match = _ignored.match, re.compile(modules).match
    try:
        _put_first(cast(list[Any], warnings.filters))
        yield
    finally:
        _ignored.match = before


def _put_first(filters: list[Any]) -> None:
    """Put our filter before all others, at no moment without it."""
    if filters and filters[0] is _ignored_filter:
        return
    with _filters_lock:
        filters.insert(0, _ignored_filter)
        for place in reversed(range(1, len(filters))):
            if filters[place] is _ignored_filter:
                del filters[place]


def place_of(error: BaseException) -> str:
    """The type and the place of an error, without its message, which may quote what is private."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


@contextmanager
def progress(
    description: str, *, total: int | None, unit: str, closing_line: bool = True, done: int = 0
) -> Iterator[Progress]:
    """A bar with rate and time left on a terminal, log lines elsewhere.

    `total` is the number of units of work, None where it is unknown, and `done` how many of them
    were done by an earlier process. Without `closing_line`, work of less than ten seconds logs
    nothing.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        unit = f" {unit}"
        with tqdm(
            total=total,
            desc=description,
            unit=unit,
            dynamic_ncols=True,
            leave=closing_line,
            initial=done,
        ) as bar:
            yield _Beating(bar)
        return
    lines = _Lines(description, total, unit, done)
    yield _Beating(lines)
    if closing_line:
        lines.log()
