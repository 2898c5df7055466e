"""A server has the graphs of its models written by another process, and goes on without them."""

import io
import logging
import subprocess
import threading
from pathlib import Path
from queue import Queue

import pytest
from PIL import Image

import xrai
from tests.models import phantoms, save_run
from tests.serving.conftest import make_service
from xrai.ingest.find import File
from xrai.learning import engine
from xrai.pipeline import Pipeline
from xrai.serving.engine import GraphWriter
from xrai.serving.service import Service

WAIT_S = 240.0  # only a hang reaches it


def end_of(name: str) -> None:
    """Wait for a thread's end."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def png() -> bytes:
    """A film as a file."""
    buffer = io.BytesIO()
    Image.fromarray(phantoms(1)[0][0]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """A model of its own, whose engine may change."""
    return xrai.load(str(save_run(tmp_path, num_steps=5)))


def test_films_are_scored_by_the_graph_once_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    given = make_service(save_run(tmp_path, num_steps=5))
    service = Service(
        *(given.models, given.runs, given.load, given.worklist), num_threads=1, wants_graphs=True
    )
    film = png()
    before = service.add(File("film", lambda: film), source="upload").result(WAIT_S)
    end_of("graphs")
    assert "films are scored by ONNX Runtime from now on" in caplog.text
    (member,) = service.models.pipeline._members
    assert isinstance(member._look, engine._Sessions)
    after = service.add(File("film", lambda: film), source="upload").result(WAIT_S)
    assert after.row.probability == pytest.approx(before.row.probability, abs=1e-6)
    assert after.pipeline is before.pipeline
    service.close()
    given.close()


def test_only_the_latest_models_get_graphs(tmp_path: Path) -> None:
    used: Queue[Pipeline] = Queue()
    writer = GraphWriter(used.put)
    first, second = (
        xrai.load(str(save_run(tmp_path, run_id=name, size=32, num_steps=1))) for name in "ab"
    )
    writer.start(first)
    writer.start(second)
    assert used.get(timeout=WAIT_S) is second
    end_of("graphs")
    assert used.empty()


def test_graphs_that_are_being_tried_are_not_used_after_a_stop(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    used: Queue[Pipeline] = Queue()
    begun, go_on = threading.Event(), threading.Event()

    def try_graphs(graphs: list[bytes]) -> bool:
        begun.set()
        return go_on.wait(WAIT_S)

    monkeypatch.setattr(GraphWriter, "_write", lambda *_: b"")
    monkeypatch.setattr(pipeline, "use_graphs", try_graphs)
    writer = GraphWriter(used.put)
    writer.start(pipeline)
    assert begun.wait(WAIT_S)
    stopping = threading.Thread(target=writer.stop)
    stopping.start()
    while writer._wanted is not None:
        threading.Event().wait(0.01)
    assert stopping.is_alive()  # the interpreter must not end while torch scores
    go_on.set()
    stopping.join(WAIT_S)
    assert not stopping.is_alive()
    assert used.empty() and not caplog.records


def test_other_models_are_taken_when_no_graph_can_come_into_use_any_more(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, models_at_stop = make_service(run), []
    before = service.models

    def stop(writer: GraphWriter) -> None:
        models_at_stop.append(service.models)

    monkeypatch.setattr(GraphWriter, "stop", stop)
    service.reload([])
    assert models_at_stop == [before] and service.models is not before
    service.close()


def test_a_server_that_stops_does_not_wait_for_graphs(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    used: Queue[Pipeline] = Queue()
    writer = GraphWriter(used.put)
    writer.start(pipeline)
    while writer._process is None:
        threading.Event().wait(0.01)
    writer.stop()
    end_of("graphs")
    assert writer._process.returncode == -9
    assert used.empty() and not caplog.records


@pytest.mark.parametrize("fault", ["packages", "process", "results", "machine"])
def test_without_graphs_films_are_still_scored_by_torch(
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes: /patients/Doe")

    caplog.set_level(logging.INFO)
    used: Queue[Pipeline] = Queue()
    if fault == "packages":
        monkeypatch.setattr(engine, "is_installed", lambda: False)
    elif fault == "process":
        monkeypatch.setattr(pipeline, "pack", lambda: [b"no models"])
    elif fault == "results":
        monkeypatch.setattr(GraphWriter, "_write", lambda *_: b"")
        monkeypatch.setattr(pipeline, "use_graphs", lambda graphs: False)
    else:
        monkeypatch.setattr(subprocess, "Popen", refuse)
    GraphWriter(used.put).start(pipeline)
    end_of("graphs")
    said = {
        "packages": "films are scored by torch: faster would need onnx, onnxscript, onnxruntime",
        "process": "films are still scored by torch: their graph cannot be written (1: ",
        "results": "films are still scored by torch: ONNX Runtime gives other results",
        "machine": "films are still scored by torch: OSError in ",
    }[fault]
    assert said in caplog.text and "Doe" not in caplog.text
    assert used.empty() and pipeline.predict(phantoms(1)[0][0])[0].is_readable
