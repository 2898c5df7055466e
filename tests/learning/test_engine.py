"""ONNX Runtime scores as the network does, or is not used."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import xrai
from tests.models import phantoms, save_random_run, save_run
from xrai.labels import LabelSpec
from xrai.learning import engine
from xrai.learning.tracing import Whole, agrees
from xrai.pipeline import Pipeline, Prediction

CLASSES = LabelSpec("multiclass", ("Normal", "Bacterial", "Viral"))


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Give torch back the threads that it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(pipeline: Pipeline) -> list[Prediction]:
    """Rows of films that come alone, and in batches of several sizes."""
    films = list(phantoms(32)[0])
    return [row for some in (films[:1], films[1:6], films) for row in pipeline.predict(some)]


def differences(rows: list[Prediction], others: list[Prediction]) -> float:
    """The largest difference of a probability; all else must be the same."""
    worst = 0.0
    for row, other in zip(rows, others, strict=True):
        numbers: dict[str, Any] = {"probability": None, "probabilities": {}, "disagreement": None}
        assert replace(row, **numbers) == replace(other, **numbers)
        own, its = (
            [*each.probabilities.values(), each.disagreement or 0.0] for each in (row, other)
        )
        worst = max(worst, float(np.abs(np.subtract(own, its)).max()))
    return worst


@pytest.mark.parametrize("kind", ["two classes", "several classes", "two runs"])
def test_graphs_give_the_rows_that_torch_gives(kind: str, tmp_path: Path) -> None:
    if kind == "several classes":
        runs = [save_random_run(tmp_path, CLASSES)]
    else:
        runs = [save_run(tmp_path, num_steps=5)]
    if kind == "two runs":
        runs.append(save_run(tmp_path, run_id="small", size=32, num_steps=5))
    pipeline = xrai.load(*map(str, runs))
    limit = 1e-5 if kind == "several classes" else 1e-6  # random weights magnify rounding
    before = rows_of(pipeline)
    assert pipeline.use_graphs([engine.write_graph(packed) for packed in pipeline.pack()])
    assert pipeline.is_parallel
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        assert differences(before, rows_of(pipeline)) <= limit


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run and its graph."""
    run = save_run(tmp_path_factory.mktemp("engine"), num_steps=5)
    (packed,) = xrai.load(str(run)).pack()
    return run, engine.write_graph(packed)


def test_a_graph_that_gives_other_results_is_not_used(
    made: tuple[Path, bytes], tmp_path: Path
) -> None:
    pipeline = xrai.load(str(save_run(tmp_path, run_id="other", num_steps=6)))
    before = rows_of(pipeline)
    assert not pipeline.use_graphs([made[1]])
    assert not pipeline.is_parallel and rows_of(pipeline) == before


@pytest.mark.parametrize(("error", "expected"), [(4e-6, True), (4e-5, False)])
def test_rounding_is_no_difference(made: tuple[Path, bytes], error: float, expected: bool) -> None:
    (member,) = xrai.load(str(made[0]))._members
    whole, images = Whole(member._network, member._typicality).eval(), member._made_up()

    def near_0(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, atypicality = whole(images)
        return logits * 0 + error, atypicality

    def at_0(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, atypicality = whole(images)
        return logits * 0, atypicality

    assert agrees(at_0, near_0, images) is expected


def test_a_session_has_as_many_threads_as_torch(made: tuple[Path, bytes]) -> None:
    look, images = engine._Sessions(made[1]), torch.rand(2, 1, 64, 64)
    for num_threads in (2, 1):
        torch.set_num_threads(num_threads)
        look(images)
        number, session = look._session
        assert number == session.get_session_options().intra_op_num_threads == num_threads
        look(images)
        assert look._session[1] is session


def test_the_process_writes_the_graph_and_nothing_else(made: tuple[Path, bytes]) -> None:
    (packed,) = xrai.load(str(made[0])).pack()
    command = [sys.executable, "-m", engine.__name__]
    done = subprocess.run(command, input=packed, capture_output=True, check=True)
    graph = onnx.load_from_string(done.stdout).graph
    assert [value.name for value in graph.output] == ["logits", "atypicality"]
    assert not graph.node[0].doc_string
    failed = subprocess.run(command, input=packed[:-100], capture_output=True, check=False)
    assert failed.returncode and not failed.stdout and failed.stderr
