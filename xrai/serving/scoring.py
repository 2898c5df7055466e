"""Films to rows, on threads that each take films as they come: read, decode and score.

A film that comes alone goes through one thread, so that it waits for no other and stays in one
core's caches. A thread that has read a film also reads the ones that queue, briefly, and scores
them together. Films that may take long to decode, and all that a page draws, have threads of their
own, so that others do not wait for them. Where a network can only score for one thread at a time
(on a GPU, or with several threads of torch), whichever thread comes next scores what all have read.
"""

import functools
import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
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
MAX_WAIT_S: Final = 0.01  # that a film which was read waits for others of its batch

_LARGE_BYTES = 1 << 20  # of a film that may take long to decode
_NUM_SLOW = 4  # threads for such films and for drawing, at least
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
class _Engine:
    """Models, and how many threads of torch score a film by them."""

    pipeline: Pipeline
    num_threads: int

    @property
    def is_parallel(self) -> bool:
        """Whether several films are best scored at the same time."""
        return self.num_threads == 1 and self.pipeline.is_parallel


@dataclass(frozen=True, eq=False)
class _Task:
    """A film that came."""

    engine: _Engine
    future: "Future[Scored]"
    file: File


@dataclass(frozen=True)
class _Ready:
    """A film that was read."""

    task: _Task
    read: Read
    window: Window | None


class Observer:
    """Is told how long scoring takes; does nothing itself."""

    def batch(self, num_films: int, seconds: float) -> None:
        """A batch was scored."""


class Scorer:
    """Owns the models. Safe to use from several threads."""

    def __init__(
        self, pipeline: Pipeline, observer: Observer | None = None, *, num_threads: int = 0
    ) -> None:
        self._num_threads = num_threads
        self._observer = observer or Observer()
        self._arrived = threading.Condition(threading.Lock())
        self._tasks: deque[_Task] = deque()  # films that nobody reads yet
        self._ready: deque[_Ready] = deque()  # for whichever thread scores next
        self._scoring = threading.Lock()  # of what scores for one thread at a time
        self._num_waiting = 0
        self._is_closed = False  # takes no more films
        self._slow: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.replace(pipeline)
        self._threads = [
            threading.Thread(target=self._run, name=f"score-{number}", daemon=True)
            for number in range(num_cores())
        ]
        self._slow_threads = [
            threading.Thread(target=self._run_slow, name=f"slow-{number}", daemon=True)
            for number in range(max(_NUM_SLOW, num_cores()))
        ]
        for thread in (*self._threads, *self._slow_threads):
            thread.start()

    @property
    def pipeline(self) -> Pipeline:
        """The models that score new films."""
        return self._engine.pipeline

    @property
    def is_running(self) -> bool:
        """Whether films are taken and scored."""
        threads = (*self._threads, *self._slow_threads)
        return not self._is_closed and all(thread.is_alive() for thread in threads)

    @property
    def num_waiting(self) -> int:
        """Films that are not scored yet."""
        return self._num_waiting

    def replace(self, pipeline: Pipeline) -> None:
        """Score films that come from now on with other models."""
        before = torch.get_num_threads()
        try:
            num_threads = self._num_threads or fewest_threads(pipeline)
        finally:
            torch.set_num_threads(before)
        pipeline.num_threads = 0  # as many as the thread that scores has
        self._engine = _Engine(pipeline, num_threads)

    def score(self, file: File) -> "Future[Scored]":
        """Read and score a film. A film that cannot be read is a row that says why.

        Raises `ClosedError` after `close`.
        """
        future: Future[Scored] = Future()
        with self._arrived:
            if self._is_closed:
                raise ClosedError(_CLOSING)
            self._num_waiting += 1
            future.add_done_callback(self._note_done)
            self._tasks.append(_Task(self._engine, future, file))
            self._arrived.notify()
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
            with self._scoring:
                torch.set_num_threads(self._engine.num_threads)
                heat: NDArray[np.float32] = pipeline.explain(images, number, ratios=ratios)[0]
            return heat

        return self.in_background(work)

    def in_background(self, work: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Run other work, on the threads for what may take long."""
        future: Future[T] = Future()
        with self._arrived:
            if self._is_closed:
                raise ClosedError(_CLOSING)
            self._slow.put(functools.partial(_fulfil, future, functools.partial(work, *arguments)))
        return future

    def close(self) -> None:
        """Finish what was begun, and take no more."""
        with self._arrived:
            self._is_closed = True
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join()
        for _ in self._slow_threads:
            self._slow.put(None)  # behind all that was begun
        for thread in self._slow_threads:
            thread.join()

    def _note_done(self, future: "Future[Any]") -> None:
        with self._arrived:
            self._num_waiting -= 1

    def _run(self) -> None:
        """On a thread for films: take what comes."""
        while (task := self._next()) is not None:
            batch = self._read_batch(task)
            del task
            if batch:
                self._score(batch)
            del batch  # a thread that waits holds no film

    def _run_slow(self) -> None:
        """On a thread for what may take long: one job after the other."""
        while (job := self._slow.get()) is not None:
            job()
            del job  # a thread that waits holds no film

    def _next(self) -> _Task | None:
        """The next film; waits for one, and returns None at the end."""
        with self._arrived:
            while not self._tasks:
                if self._is_closed:
                    return None
                self._arrived.wait()
            return self._tasks.popleft()

    def _next_of(self, engine: _Engine) -> _Task | None:
        """The next film if it is there already, and for these models."""
        with self._arrived:
            is_there = bool(self._tasks) and self._tasks[0].engine is engine
            return self._tasks.popleft() if is_there else None

    def _read_batch(self, task: _Task) -> list[_Ready]:
        """Read a film, and those that queue meanwhile, for a batch."""
        engine, batch = task.engine, []
        began = time.monotonic()
        following: _Task | None = task
        while following is not None:
            if (ready := self._read(following)) is not None:
                batch.append(ready)
            if len(batch) == MAX_BATCH or time.monotonic() - began > MAX_WAIT_S:
                break
            following = self._next_of(engine)
        return batch

    def _read(self, task: _Task) -> _Ready | None:
        """Read and decode a film; None if another thread does, or it has failed."""
        if not task.future.set_running_or_notify_cancel():
            return None
        try:
            data = task.file.read()
        except ImageError as error:  # such as a damaged member of a zip
            return _Ready(task, Read(task.file.path, reason=str(error)), None)
        except BaseException as error:
            task.future.set_exception(error)
            return None
        if _may_take_long(data):
            self._slow.put(functools.partial(self._score_alone, task, data))
            return None
        return self._decode(task, data)

    def _decode(self, task: _Task, data: "bytes | NDArray[np.uint8]") -> _Ready | None:
        try:
            read, window = task.engine.pipeline.read(File(task.file.path, lambda: data)), None
            if read.own is not None:
                window, size = as_shown(data)
                read = replace(read, size=size or read.size)
        except ImageError as error:
            return _Ready(task, Read(task.file.path, reason=str(error)), None)
        except BaseException as error:
            task.future.set_exception(error)
            return None
        return _Ready(task, read, window)

    def _score_alone(self, task: _Task, data: "bytes | NDArray[np.uint8]") -> None:
        if (ready := self._decode(task, data)) is not None:
            self._score([ready])

    def _score(self, batch: list[_Ready]) -> None:
        """Score films that were read, for the same models."""
        engine = batch[0].task.engine
        if engine.is_parallel:
            self._score_now(batch)
            return
        self._ready.extend(batch)
        while not all(each.task.future.done() for each in batch):
            with self._scoring:
                if found := self._take():
                    self._score_now(found)

    def _take(self) -> list[_Ready]:
        """The next films that were read, for the same models."""
        batch: list[_Ready] = []
        while self._ready and len(batch) < MAX_BATCH:
            if batch and self._ready[0].task.engine is not batch[0].task.engine:
                break
            batch.append(self._ready.popleft())
        return batch

    def _score_now(self, batch: Sequence[_Ready]) -> None:
        began = time.monotonic()
        engine = batch[0].task.engine
        if torch.get_num_threads() != engine.num_threads:  # torch keeps it for each thread
            torch.set_num_threads(engine.num_threads)
        try:
            reads = [each.read for each in batch]
            rows = [found.prediction for found in engine.pipeline.classify_read(reads)]
        except Exception as error:
            _logger.error(
                "a batch of %d films failed (%s); each is scored alone",
                *(len(batch), place_of(error)),
            )
            for each in batch:
                _fulfil(each.task.future, functools.partial(_score_one, each))
        else:
            for each, row in zip(batch, rows, strict=True):
                each.task.future.set_result(_scored(each, row))
        self._observer.batch(len(batch), time.monotonic() - began)


def _may_take_long(data: "bytes | NDArray[np.uint8]") -> bool:
    """Whether a film may take long to decode. DICOM may be compressed in ways that take 100 times
    as long as JPEG, and is decoded at its full size.
    """
    return isinstance(data, bytes) and (len(data) > _LARGE_BYTES or is_dicom(data))


def _score_one(ready: _Ready) -> Scored:
    (found,) = ready.task.engine.pipeline.classify_read([ready.read])
    return _scored(ready, found.prediction)


def _scored(ready: _Ready, row: Prediction) -> Scored:
    pixels = b"".join(own.tobytes() for own in ready.read.own or ())
    return Scored(
        row,
        ready.read.size,
        ready.window,
        ready.task.engine.pipeline,
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
