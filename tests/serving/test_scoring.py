"""How the thread that scores uses the machine."""

import io
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

import xrai
from tests.models import phantoms, save_run
from xrai.ingest.find import File
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
def one_reader(
    run: Path, monkeypatch: pytest.MonkeyPatch, *, max_wait_s: float
) -> Iterator[tuple[Scorer, Batches]]:
    """A scorer with a single thread that reads, and its batches."""
    monkeypatch.setattr(scoring, "num_cores", lambda: 1)
    monkeypatch.setattr(scoring, "_NUM_READERS", 1)
    monkeypatch.setattr(scoring, "MAX_WAIT_S", max_wait_s)
    monkeypatch.setattr(scoring, "_WAIT_S", max_wait_s)
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


def test_films_that_queue_to_be_read_are_scored_together(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_reader(run, monkeypatch, max_wait_s=WAIT_S) as (scorer, batches):
        begin = threading.Event()
        found = send(scorer, *[begin] * 5)
        begin.set()
        assert all(each.result(WAIT_S).row.is_readable for each in found)
    assert batches.sizes in ([5], [4, 1])  # the last one may be read meanwhile


def test_the_thread_that_scores_is_not_woken_by_each_film_that_queues(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_reader(run, monkeypatch, max_wait_s=WAIT_S) as (scorer, _):
        scorer.in_background(int).result(WAIT_S)
        wake = mock.Mock(wraps=scorer._changed.notify_all)
        monkeypatch.setattr(scorer._changed, "notify_all", wake)
        begin = threading.Event()
        found = send(scorer, *[begin] * 7)
        begin.set()
        assert all(each.result(WAIT_S).row.is_readable for each in found)
        assert wake.call_count <= 4  # for the first film, and for the last


def test_threads_that_wait_hold_no_film(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = phantoms(1)[0][0]

    class Reading:
        def __call__(self) -> Any:
            return film

    reading = Reading()
    with one_reader(run, monkeypatch, max_wait_s=0.0) as (scorer, _):
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
    with one_reader(run, monkeypatch, max_wait_s=0.05) as (scorer, _):
        begin, pipeline = threading.Event(), scorer.pipeline
        first: Future[bool] = Future()
        scorer._put(scoring.Task(pipeline, first, work=lambda: begin.wait(WAIT_S)))
        scorer.in_background(begin.wait, WAIT_S)
        buffer, name = io.BytesIO(), pipeline.outputs[0].name
        Image.linear_gradient("L").save(buffer, "PNG")
        film = buffer.getvalue()
        assert scorer.explain(pipeline, film, name).cancel()
        assert scorer.in_background(int).cancel()
        begin.set()
        assert first.result(WAIT_S)
        assert scorer.explain(pipeline, film, name).result(WAIT_S).ndim == 2
        assert scorer.in_background(int).result(WAIT_S) == 0


def test_a_film_does_not_wait_long_for_those_that_queue(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_reader(run, monkeypatch, max_wait_s=0.05) as (scorer, batches):
        first, others = threading.Event(), threading.Event()
        found = send(scorer, first, others, others)
        first.set()
        assert found[0].result(WAIT_S).row.is_readable
        assert batches.sizes in ([], [1]) and not found[2].done()
        others.set()


def test_a_film_overtakes_two_that_take_long_to_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "num_cores", lambda: 2)
    scorer = Scorer(xrai.load(str(run)), num_threads=torch.get_num_threads())
    later, ready = threading.Event(), threading.Event()
    ready.set()
    found = send(scorer, later, later, ready)
    assert found[2].result(WAIT_S).row.is_readable and not found[0].done()
    later.set()
    scorer.close()
    assert all(each.result().row.is_readable for each in found)


def test_a_film_alone_waits_for_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_reader(run, monkeypatch, max_wait_s=3600) as (scorer, _):
        ready = threading.Event()
        ready.set()
        (found,) = send(scorer, ready)
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


@pytest.mark.parametrize("is_small", [False, True])
def test_a_film_waits_for_the_thread_that_scores_only_where_the_network_is_small(
    run: Path, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    monkeypatch.setattr(scoring, "num_cores", lambda: 2)
    pipeline, first = xrai.load(str(run)), threading.Event()
    pipeline.trace()
    pipeline.is_small = is_small
    score, names = pipeline.classify_read, list[str]()

    def watched(reads: Any) -> Any:
        names.append(threading.current_thread().name)
        if len(names) == 1:
            assert first.wait(WAIT_S)
        return score(reads)

    monkeypatch.setattr(pipeline, "classify_read", watched)
    scorer = Scorer(pipeline, Batches(), num_threads=1)
    ready = threading.Event()
    ready.set()
    (alone,) = send(scorer, ready)
    while not names:
        threading.Event().wait(0.01)
    (other,) = send(scorer, ready)
    if not is_small:
        assert other.result(WAIT_S).row.is_readable
        assert names == ["score", "score-1"]
    assert not alone.done()
    first.set()
    scorer.close()
    assert alone.result().row.is_readable and other.result().row.is_readable
    assert ("score-1" in names) is not is_small
