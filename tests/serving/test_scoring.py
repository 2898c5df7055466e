"""How films share the threads of a server."""

import functools
import io
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import xrai
from tests.models import phantoms, save_run
from xrai.ingest.find import File
from xrai.pipeline import Explained, Pipeline, Read
from xrai.serving import scoring
from xrai.serving.scoring import Observer, Scored, Scorer

WAIT_S = 30.0  # only a hang reaches it


class Batches(Observer):
    """Keeps how large batches were."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def batch(self, num_films: int, seconds: float) -> None:
        self.sizes.append(num_films)


@contextmanager
def one_thread(
    run: Path, monkeypatch: pytest.MonkeyPatch, *, max_wait_s: float = WAIT_S
) -> Iterator[tuple[Scorer, Batches]]:
    """A scorer with a single thread for films, and its batches."""
    monkeypatch.setattr(scoring, "num_cores", lambda: 1)
    monkeypatch.setattr(scoring, "MAX_WAIT_S", max_wait_s)
    batches = Batches()
    scorer = Scorer(xrai.load(str(run)), batches, num_threads=torch.get_num_threads())
    yield scorer, batches
    scorer.close()


def send(scorer: Scorer, *events: threading.Event) -> "list[Future[Scored]]":
    """Films, each of which is read once its event is set."""
    films = phantoms(len(events))[0]

    def reading(number: int) -> Any:
        assert events[number].wait(WAIT_S)
        return films[number]

    return [
        scorer.score(File(f"{number}", lambda number=number: reading(number)))  # type: ignore[misc]
        for number in range(len(events))
    ]


def is_set() -> threading.Event:
    """An event that nobody has to wait for."""
    event = threading.Event()
    event.set()
    return event


def dicom() -> bytes:
    """The beginning of a DICOM file."""
    return bytes(128) + b"DICM"


def png(*, size: int = 64, is_large: bool = False) -> bytes:
    """A film as a file."""
    buffer = io.BytesIO()
    if is_large:  # noise, which PNG cannot make smaller
        size = 2 * math.isqrt(scoring._LARGE_BYTES)
        Image.effect_noise((size, size), 100).save(buffer, "PNG")
        assert buffer.tell() > scoring._LARGE_BYTES
    else:
        Image.linear_gradient("L").resize((size, size)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("max_wait_s", "num_films", "expected"),
    [(WAIT_S, 5, [5]), (WAIT_S, 20, [16, 4]), (0.0, 3, [1, 1, 1])],
)
def test_films_that_queue_are_scored_together_up_to_a_number_and_a_time(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_wait_s: float,
    num_films: int,
    expected: list[int],
) -> None:
    with one_thread(run, monkeypatch, max_wait_s=max_wait_s) as (scorer, batches):
        begin = threading.Event()
        found = send(scorer, *[begin] * num_films)
        begin.set()
        assert all(each.result(WAIT_S).row.is_readable for each in found)
    assert batches.sizes == expected


def test_threads_that_wait_hold_no_film(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = phantoms(1)[0][0]

    class Reading:
        def __call__(self) -> Any:
            return film

    reading = Reading()
    with one_thread(run, monkeypatch) as (scorer, _):
        future = scorer.score(File("a", reading))
        assert future.result(WAIT_S).row.is_readable
        held: list[Callable[[], object]] = [weakref.ref(reading), weakref.ref(future)]
        del reading, future
        end = time.monotonic() + WAIT_S
        while any(each() is not None for each in held) and time.monotonic() < end:
            time.sleep(0.01)
        assert [each() for each in held] == [None, None]


def test_work_that_nobody_waits_for_any_more_ends_no_thread(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_NUM_SLOW", 1)
    with one_thread(run, monkeypatch) as (scorer, _):
        begin, pipeline = threading.Event(), scorer.pipeline
        scorer.in_background(begin.wait, WAIT_S)
        film, name = png(), pipeline.outputs[0].name
        assert scorer.explain(pipeline, film, name).cancel()
        assert scorer.in_background(int).cancel()
        (first,) = send(scorer, begin)
        (second,) = send(scorer, begin)
        assert second.cancel()
        begin.set()
        assert first.result(WAIT_S).row.is_readable
        assert send(scorer, begin)[0].result(WAIT_S).row.is_readable
        assert scorer.explain(pipeline, film, name).result(WAIT_S).ndim == 2
        assert scorer.in_background(int).result(WAIT_S) == 0
        assert scorer.num_waiting == 0


@pytest.mark.parametrize("make_slow", [functools.partial(png, is_large=True), dicom])
def test_films_overtake_those_that_may_take_long_and_what_is_drawn(
    run: Path, monkeypatch: pytest.MonkeyPatch, make_slow: Callable[[], bytes]
) -> None:
    with one_thread(run, monkeypatch) as (scorer, batches):
        pipeline, begin = scorer.pipeline, threading.Event()
        read = pipeline.read

        def slow(file: File) -> Any:
            assert file.path != "slow" or begin.wait(WAIT_S)
            return read(file)

        monkeypatch.setattr(pipeline, "read", slow)
        held = threading.Event()
        (first,) = send(scorer, held)  # so that one batch may hold all that follow
        slow_ones = [scorer.score(File("slow", make_slow)) for _ in range(3)]
        film = scorer.score(File("film", png))
        drawn = scorer.in_background(begin.wait, WAIT_S)
        held.set()
        assert film.result(WAIT_S).row.is_readable and first.result(WAIT_S).row.is_readable
        assert not drawn.done() and not any(each.done() for each in slow_ones)
        begin.set()
        assert all(each.result(WAIT_S) for each in slow_ones)
    assert sum(batches.sizes) == 5


def test_a_film_alone_waits_for_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_thread(run, monkeypatch, max_wait_s=3600) as (scorer, _):
        (found,) = send(scorer, is_set())
        assert found.result(WAIT_S).row.is_readable


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda num: 1.0, 1),  # threads that wait for each other
        (lambda num: 1.0 / num, 8),
        (lambda num: 1.0 / min(num, 2), 2),
        (lambda num: 0.2 + 0.8 / num, 2),  # 1, 0.6, 0.4
        (lambda num: 1.0 if num == 1 else 0.9 / num, 8),
        (lambda num: 1.0 * num, 1),
    ],
)
def test_scoring_takes_threads_only_where_they_save_time(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], expected: int
) -> None:
    clock = [0.0]

    def score(images: Any) -> None:
        clock[0] += seconds(torch.get_num_threads())

    monkeypatch.setattr(scoring, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(scoring, "num_cores", lambda: 8)
    before = torch.get_num_threads()
    try:
        pipeline: Any = SimpleNamespace(squares=[(8, "crop")], score=score)
        assert scoring.fewest_threads(pipeline) == expected
    finally:
        torch.set_num_threads(before)


def test_runs_that_see_other_parts_of_a_film_explain_it_as_xrai_predict_does(
    run: Path, tmp_path: Path
) -> None:
    other = save_run(tmp_path, run_id="whole", size=32, fit="squash", num_steps=5)
    pipeline = xrai.load(str(run), str(other))
    buffer = io.BytesIO()
    Image.fromarray(phantoms(1)[0][0][:60]).save(buffer, "PNG")  # wider than high
    data = buffer.getvalue()
    (expected,) = pipeline.classify([File("film", lambda: data)], explain_side=32)
    scorer = Scorer(pipeline, Batches(), num_threads=1)
    heat = scorer.explain(pipeline, data, "pneumonia").result(WAIT_S)
    scorer.close()
    assert heat == pytest.approx(expected.heats["pneumonia"], abs=1e-6)


def test_films_are_scored_by_the_number_of_threads_that_is_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, seen = xrai.load(str(run)), []
    score = pipeline._score

    def watched(images: Any) -> Any:
        seen.append(torch.get_num_threads())
        return score(images)

    monkeypatch.setattr(pipeline, "_score", watched)
    scorer = Scorer(pipeline, Batches(), num_threads=3)
    film = phantoms(1)[0][0]
    assert scorer.score(File("film", lambda: film)).result(WAIT_S).row.is_readable
    scorer.close()
    assert seen == [3]


class Watched:
    """Stands in for `classify_read`: keeps what it is called with, and waits in its first call."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._score = pipeline.classify_read
        self.sizes: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.num_running = self.most_running = 0

    def __call__(self, reads: Sequence[Read]) -> list[Explained]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self.sizes.append(len(reads))
        if len(self.sizes) == 1:
            self.begun.set()
            assert self.go_on.wait(WAIT_S)
        found = list(self._score(reads))
        self.num_running -= 1
        return found


def test_films_are_scored_side_by_side_where_the_network_allows_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "num_cores", lambda: 2)
    pipeline = xrai.load(str(run))
    pipeline.trace()
    watched = Watched(pipeline)
    monkeypatch.setattr(pipeline, "classify_read", watched)
    scorer = Scorer(pipeline, num_threads=1)
    (first,) = send(scorer, is_set())
    assert watched.begun.wait(WAIT_S)
    (second,) = send(scorer, is_set())
    assert second.result(WAIT_S).row.is_readable and not first.done()
    watched.go_on.set()
    scorer.close()
    assert first.result().row.is_readable


@pytest.mark.parametrize(("is_traced", "num_threads"), [(False, 1), (True, 2)])
def test_a_network_that_scores_for_one_thread_gets_what_all_have_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, is_traced: bool, num_threads: int
) -> None:
    monkeypatch.setattr(scoring, "num_cores", lambda: 3)
    pipeline = xrai.load(str(run))
    if is_traced:
        pipeline.trace()
    watched = Watched(pipeline)
    monkeypatch.setattr(pipeline, "classify_read", watched)
    scorer = Scorer(pipeline, num_threads=num_threads)
    films = send(scorer, is_set())
    assert watched.begun.wait(WAIT_S)
    films += send(scorer, is_set(), is_set())
    end = time.monotonic() + WAIT_S
    while len(scorer._ready) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    watched.go_on.set()
    scorer.close()
    assert all(each.result().row.is_readable for each in films)
    assert watched.sizes == [1, 2] and watched.most_running == 1


def test_models_that_were_replaced_score_the_films_that_came_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_thread(run, monkeypatch) as (scorer, batches):
        begin, before = threading.Event(), scorer.pipeline
        films = send(scorer, begin, begin)
        after = xrai.load(str(save_run(tmp_path, run_id="after", size=32, num_steps=5)))
        scorer.replace(after)
        films += send(scorer, begin)
        begin.set()
        assert [each.result(WAIT_S).pipeline for each in films] == [before, before, after]
    assert batches.sizes == [2, 1]
