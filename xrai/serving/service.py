"""What a server does with a film, however it arrives: reserve room, score, list, count."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from weakref import WeakKeyDictionary

from xrai.errors import RunError, UserError, XraiError
from xrai.ingest.find import File
from xrai.log import get_logger
from xrai.pipeline import Pipeline
from xrai.serving.engine import GraphWriter
from xrai.serving.films import Film, Source, Worklist
from xrai.serving.metrics import Metrics
from xrai.serving.models import Models
from xrai.serving.scoring import Scored, Scorer

_FOLDER_MARKS: Final = ("/", "\\", "..", ":")
_logger = get_logger(__name__)


@dataclass
class Service:
    """The films and the models of a server. Safe to use from several threads."""

    models: Models
    runs: tuple[str, ...]  # their addresses
    load: Callable[[Sequence[str]], Models]
    worklist: Worklist
    num_threads: int = 0  # of torch, for a batch; 0: as many as make it faster
    wants_graphs: bool = False  # whether ONNX Runtime scores, where that is possible
    metrics: Metrics = field(default_factory=Metrics)
    closers: list[Callable[[], None]] = field(default_factory=list)  # are called when it closes
    # By name, whether a further part runs that has to run as long as the server does
    parts: dict[str, Callable[[], bool]] = field(default_factory=dict)

    # SHA-256 of the model.pt of each run, of every pipeline that scored a film
    hashes: WeakKeyDictionary[Pipeline, tuple[str, ...]] = field(default_factory=WeakKeyDictionary)

    def __post_init__(self) -> None:
        self.hashes[self.models.pipeline] = self.models.hashes
        self.scorer = Scorer(self.models.pipeline, self.metrics, num_threads=self.num_threads)
        # Graphs may be best on another number of threads
        self._graphs = GraphWriter(self.scorer.replace)
        self.metrics.watch(self.worklist, self.scorer)
        self.metrics.use(self.models.pipeline.run_id)
        self._write_graphs()

    def add(self, file: File, *, source: Source) -> "Future[Film]":
        """Score a film and list it. One that cannot be read is listed with the reason.

        Raises `ClosedError`; the future raises `FullError` where the list has no room.
        """
        kept, held = ExitStack(), [b""]

        def read() -> bytes:
            data = file.read()
            assert isinstance(data, bytes)
            kept.enter_context(self.worklist.reserve(len(data)))
            held[0] = data
            return data

        listed: Future[Film] = Future()
        scored = self.scorer.score(File(file.path, read))
        scored.add_done_callback(partial(self._list, file.path, source, held, kept, listed))
        return listed

    def reload(self, names: Sequence[str]) -> Models:
        """Load the runs again, or the runs of these names from the same place, and score new films
        with them.

        Raises `UserError` for an invalid name, `RunError` where a run cannot be loaded; the models
        then stay as they were, and the log says why. The messages hold no address.
        """
        runs = self.runs
        if names:
            for name in names:
                is_plain = name.isprintable() and not any(mark in name for mark in _FOLDER_MARKS)
                if not name or not is_plain:
                    raise UserError(f"{name!r} is not the name of a run")
            parent = self.runs[0].rpartition("/")[0]
            runs = tuple(f"{parent}/{name}" if parent else name for name in names)
        try:
            models = self.load(runs)
        except XraiError as error:
            _logger.warning("no other run is taken: %s", error)
            shown = ", ".join(run.rpartition("/")[2] for run in runs)
            raise RunError(
                f"{shown} cannot be loaded, the server's log says why; films are scored by "
                f"{self.models.pipeline.run_id} as before"
            ) from error
        self._graphs.stop()  # else those of the earlier models might come into use later
        self.hashes[models.pipeline] = models.hashes
        self.models, self.runs = models, runs
        self.scorer.replace(models.pipeline)
        self.metrics.use(models.pipeline.run_id)
        self._write_graphs()
        _logger.info("films are scored by %s from now on", models.pipeline.run_id)
        return models

    def close(self) -> None:
        """Finish the films that are being scored, and take no more."""
        self._graphs.stop()
        for close in self.closers:
            close()
        self.scorer.close()

    def _write_graphs(self) -> None:
        if self.wants_graphs:
            self._graphs.start(self.models.pipeline)

    def _list(
        self,
        name: str,
        source: Source,
        held: list[bytes],
        kept: ExitStack,
        listed: "Future[Film]",
        scored: "Future[Scored]",
    ) -> None:
        with kept:
            try:
                found = scored.result()
                film = self.worklist.add(name, held[0], found, source=source)
            except BaseException as error:
                listed.set_exception(error)
                return
        self.metrics.count(film)
        listed.set_result(film)


class Answers:
    """Films on their way from the threads that score to an event loop, which is woken once for all
    that come before it looks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: list[tuple[asyncio.Future[Film | BaseException], Future[Film]]] = []

    async def get(self, future: "Future[Film]") -> Film | BaseException:
        """The film, or the error in its place, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Film | BaseException] = loop.create_future()

        def note(done: "Future[Film]") -> None:
            with self._lock:
                self._done.append((waiter, done))
                if len(self._done) > 1:  # it is woken already
                    return
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver)

        future.add_done_callback(note)
        return await waiter

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for waiter, future in done:
            if not waiter.done():  # the request was cancelled
                waiter.set_result(future.exception() or future.result())
