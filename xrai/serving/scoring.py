"""Films to rows: threads read and decode, and one thread scores what has gathered meanwhile.

A film that comes alone is scored at once. Films that come while others are being scored form the
next batch, which waits briefly while more films queue to be read: one batch of eight takes half the
time of four pairs. Unless the network is small, further threads score the films that come while
the first one is busy. A batch that fails is scored again film by film, so that one film's failure
does not affect the others.
"""

import functools
import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from xrai.errors import ImageError, XraiError
from xrai.files import num_cores
from xrai.ingest.dicom import Window, is_dicom, open_radiograph, stored_values
from xrai.ingest.find import File
from xrai.ingest.images import decode, ratio_of
from xrai.log import get_logger, place_of
from xrai.pipeline import Pipeline, Prediction, Read

MAX_BATCH: Final = 16  # films, so that no film waits long behind a batch
MAX_WAIT_S: Final = 0.01  # that a film waits for others of its batch

_NUM_READERS = 4  # at least, so that a small film does not wait behind two large ones
_WAIT_S = 0.001  # for each film that queues to be read
_FULL_BATCH = 8  # films; a batch of as many does not wait for more
_NUM_TRIALS = 5  # for each number of threads

T = TypeVar("T")
_CLOSING = "the server is stopping"
_logger = get_logger(__name__)


class ClosedError(XraiError):
    """The server is stopping and takes no more films."""


@dataclass(frozen=True)
class Scored:
    """A film's row, and what a viewer needs to show it."""

    row: Prediction
    size: tuple[int, int] | None  # (width, height), pixels; None if it cannot be read
    window: Window | None  # None unless it is DICOM whose stored values are shown
    pipeline: Pipeline  # that scored it
    pixels: str  # SHA-256 of what its networks saw, in hex; "" if it cannot be read


@dataclass(frozen=True)
class Task:
    """What waits for the thread that scores: a film that was read, or any other work."""

    pipeline: Pipeline
    future: "Future[Any]"
    read: Read | None = None
    window: Window | None = None
    work: Callable[[], Any] | None = None
    since: float = field(default_factory=time.monotonic)


class Observer:
    """Is told how long scoring takes; does nothing itself."""

    def batch(self, num_films: int, seconds: float) -> None:
        """A batch was scored."""


class Scorer:
    """Owns the models. Safe to use from several threads."""

    def __init__(
        self, pipeline: Pipeline, observer: Observer | None = None, *, num_threads: int = 0
    ) -> None:
        self._pipeline = pipeline
        self._num_threads = num_threads
        self._observer = observer or Observer()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # for the readers
        self._readers = [
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True)
            for number in range(max(_NUM_READERS, num_cores()))
        ]
        for reader in self._readers:
            reader.start()
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._help_is_wanted = threading.Condition(lock)
        self._tasks: deque[Task] = deque()
        self._num_waiting = 0
        self._num_unread = 0  # films that no thread reads yet
        self._is_closed = False  # takes no more films
        self._is_over = False  # nor are any still being read
        self._thread = threading.Thread(target=self._run, name="score", daemon=True)
        self._helpers = [
            threading.Thread(target=self._help, name=f"score-{number}", daemon=True)
            for number in range(1, num_cores())
        ]
        self._is_helped = False  # whether they score, too
        self._is_busy = False  # the first thread; otherwise it takes the next film
        for thread in (self._thread, *self._helpers):
            thread.start()
        self._use_threads(pipeline)

    @property
    def pipeline(self) -> Pipeline:
        """The models that score new films."""
        return self._pipeline

    @property
    def is_running(self) -> bool:
        """Whether films are taken and scored."""
        return not self._is_closed and self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Films that are not scored yet."""
        return self._num_waiting

    def replace(self, pipeline: Pipeline) -> None:
        """Score films that come from now on with other models."""
        self._use_threads(pipeline)
        self._pipeline = pipeline

    def score(self, file: File) -> "Future[Scored]":
        """Read and score a film. A film that cannot be read is a row that says why.

        Raises `ClosedError` after `close`.
        """
        future: Future[Scored] = Future()
        pipeline = self._pipeline
        with self._changed:
            if self._is_closed:
                raise ClosedError(_CLOSING)
            self._num_waiting += 1
            self._num_unread += 1
            future.add_done_callback(self._note_done)
            self._jobs.put(functools.partial(self._read, Task(pipeline, future), file))
        return future

    def explain(
        self, pipeline: Pipeline, data: bytes, output: str
    ) -> "Future[NDArray[np.float32]]":
        """The heat map (size, size) in [0, 1] of a film for one of its outputs, by the models that
        scored it. Raises `KeyError` if they have no such output.
        """
        number = [each.name for each in pipeline.outputs].index(output)

        def work() -> NDArray[np.float32]:
            images = [
                np.stack([decode(data, size=size, fit=fit, max_pixels=pipeline.max_pixels)])
                for size, fit in pipeline.squares
            ]
            ratios = [ratio_of(data)] if pipeline.needs_ratios else []
            heat: NDArray[np.float32] = pipeline.explain(images, number, ratios=ratios)[0]
            return heat

        future: Future[NDArray[np.float32]] = Future()
        self._put(Task(pipeline, future, work=work))
        return future

    def in_background(self, work: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Run other decoding on the threads that read films."""
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                raise ClosedError(_CLOSING)
            self._jobs.put(functools.partial(_fulfil, future, functools.partial(work, *arguments)))
        return future

    def close(self) -> None:
        """Finish what was begun, and take no more."""
        with self._changed:
            self._is_closed = True
        for _ in self._readers:
            self._jobs.put(None)  # behind all that was begun
        for reader in self._readers:
            reader.join()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
            self._help_is_wanted.notify_all()
        for thread in (self._thread, *self._helpers):
            thread.join()

    def _work(self) -> None:
        """On a reading thread: one job after the other."""
        while (job := self._jobs.get()) is not None:
            job()
            del job  # a thread that waits holds no film

    def _use_threads(self, pipeline: Pipeline) -> None:
        def work() -> None:  # on the thread that scores: torch keeps the number for each thread
            torch.set_num_threads(self._num_threads or fewest_threads(pipeline))
            pipeline.num_threads = 0  # this number
            # Else the threads of torch take the cores, or reading does
            self._is_helped = torch.get_num_threads() == 1 and not pipeline.is_small

        self._put(Task(pipeline, Future(), work=work))

    def _note_done(self, future: "Future[Any]") -> None:
        with self._changed:
            self._num_waiting -= 1

    def _put(self, task: Task) -> None:
        with self._changed:
            self._tasks.append(task)
            if len(self._tasks) == 1 or self._wait_s() == 0:
                self._changed.notify_all()
            if self._wants_help():
                self._help_is_wanted.notify()

    def _read(self, task: Task, file: File) -> None:
        """On a reading thread: decode a film, and hand it on."""
        with self._changed:
            self._num_unread -= 1
            if not self._num_unread and self._tasks:
                self._changed.notify_all()
        if not task.future.set_running_or_notify_cancel():
            return
        try:
            data = file.read()
            read = task.pipeline.read(File(file.path, lambda: data))
            window = None
            if read.own is not None:
                window, size = as_shown(data)
                read = replace(read, size=size or read.size)
        except ImageError as error:  # of reading, such as a damaged member of a zip
            read, window = Read(file.path, reason=str(error)), None
        except BaseException as error:
            task.future.set_exception(error)
            return
        self._put(Task(task.pipeline, task.future, read=read, window=window))

    def _run(self) -> None:
        while tasks := self._next():
            if (work := tasks[0].work) is not None:
                _fulfil(tasks[0].future, work)
            else:
                self._score_batch(tasks)
            del tasks, work  # a thread that waits holds no film

    def _help(self) -> None:
        """On a further thread that scores: take what waits while the first one is busy."""
        torch.set_num_threads(1)
        while True:
            with self._changed:
                while not (self._is_over or self._wants_help()):
                    self._help_is_wanted.wait()
                if self._is_over:  # the first thread scores what is left
                    return
                batch = self._take()
            self._score_batch(batch)
            del batch  # a thread that waits holds no film

    def _score_batch(self, tasks: list[Task]) -> None:
        began = time.monotonic()
        try:
            self._score(tasks)
        except Exception as error:
            _logger.error(
                "a batch of %d films failed (%s); each is scored alone",
                *(len(tasks), place_of(error)),
            )
            for task in tasks:
                if not task.future.done():
                    _fulfil(task.future, functools.partial(self._score_one, task))
        self._observer.batch(len(tasks), time.monotonic() - began)

    def _next(self) -> list[Task]:
        """The next batch of films for one pipeline, or a single other task; empty at the end."""
        with self._changed:
            self._is_busy = False
            while (wait_s := self._wait_s()) != 0:
                self._changed.wait(wait_s)
            self._is_busy = True
            return self._take() if self._tasks else []

    def _take(self) -> list[Task]:
        batch = [self._tasks.popleft()]
        while self._tasks and len(batch) < MAX_BATCH and _go_together(batch[0], self._tasks[0]):
            batch.append(self._tasks.popleft())
        return batch

    def _wants_help(self) -> bool:
        """Whether films wait that a further thread may score."""
        if not (self._is_helped and self._is_busy and self._tasks):
            return False
        first = self._tasks[0]
        return first.work is None and first.pipeline.is_parallel

    def _wait_s(self) -> float | None:
        """Seconds to wait for a fuller batch; None: until a task comes, 0: go on."""
        if not self._tasks:
            return 0 if self._is_over else None
        first = self._tasks[0]
        if first.work or not self._num_unread or len(self._tasks) >= _FULL_BATCH:
            return 0
        limit_s = min(MAX_WAIT_S, _WAIT_S * self._num_unread)
        return max(0.0, first.since + limit_s - time.monotonic())

    def _score(self, tasks: list[Task]) -> None:
        reads = [task.read for task in tasks if task.read is not None]
        pipeline = tasks[0].pipeline
        for task, found in zip(tasks, list(pipeline.classify_read(reads)), strict=True):
            task.future.set_result(_scored(task, found.prediction))

    def _score_one(self, task: Task) -> Scored:
        assert task.read is not None
        (found,) = task.pipeline.classify_read([task.read])
        return _scored(task, found.prediction)


def _go_together(one: Task, other: Task) -> bool:
    """Whether two tasks are films that one batch may hold."""
    return one.work is None and other.work is None and one.pipeline is other.pipeline


def _scored(task: Task, row: Prediction) -> Scored:
    assert task.read is not None
    pixels = b"".join(own.tobytes() for own in task.read.own or ())
    return Scored(
        row,
        task.read.size,
        task.window,
        task.pipeline,
        hashlib.sha256(pixels).hexdigest() if pixels else "",
    )


def fewest_threads(pipeline: Pipeline) -> int:
    """How many threads torch should use to score a film: 1, doubled as long as that takes at most
    two thirds of the time. Changes the calling thread's number.

    A small network is as fast on one thread, and several would busy-wait for each other on cores
    that the next films need.
    """
    best, least_s, num_threads = 1, math.inf, 1
    film = [np.zeros((1, size, size), np.uint8) for size, _ in pipeline.squares]
    while num_threads <= num_cores():
        torch.set_num_threads(num_threads)
        taken = []
        for _ in range(_NUM_TRIALS):
            began = time.perf_counter()
            pipeline.score(film)
            taken.append(time.perf_counter() - began)
        if min(taken) > least_s * 2 / 3:
            break
        best, least_s, num_threads = num_threads, min(taken), 2 * num_threads
    return best


def as_shown(data: "bytes | NDArray[np.uint8]") -> tuple[Window | None, tuple[int, int] | None]:
    """For DICOM, the window in which a viewer shows the stored values, None where the film is shown
    as it is scored; and its (width, height) in square pixels. (None, None) for other films.
    """
    if not isinstance(data, bytes) or not is_dicom(data):
        return None, None
    radiograph = open_radiograph(data)
    size = (radiograph.width, max(1, round(radiograph.height * radiograph.aspect)))
    found = stored_values(radiograph)
    return (found[1], (radiograph.width, radiograph.height)) if found else (None, size)


def _fulfil(future: "Future[Any]", work: Callable[[], Any]) -> None:
    """Do the work of a future, unless whoever waited for it has left."""
    if not future.running() and not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
