"""The files of a run keep their keys, their order and their numbers: compared with stored ones."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.results import stored_input as given
from xrai.results.baselines import Looks, measure_baselines
from xrai.results.folder import RunFolder
from xrai.results.measure import measure
from xrai.results.metrics import HEADLINES
from xrai.results.record import metrics_json, record_scores
from xrai.results.summary import Summary, main_results, result_lines
from xrai.results.types import Output, Scores, SplitResults, TrainedOn, Training
from xrai.tables import to_json

STORED = Path(__file__).with_name("stored")


def same(found: Any, stored: Any, where: str = "") -> None:
    """Keys in the same order, the same texts, numbers within 1e-12."""
    if isinstance(stored, dict):
        assert list(found) == list(stored), where
        for key, value in stored.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for number, value in enumerate(stored):
            same(found[number], value, f"{where}[{number}]")
    elif isinstance(stored, float):
        assert found == pytest.approx(stored, rel=1e-12, abs=1e-12), where
    else:
        assert (type(found), found) == (type(stored), stored), where


def scores(rows: slice = slice(None), **changes: Any) -> Scores:
    output = Output(
        "pneumonia",
        "normal",
        given.TEMPERATURE,
        given.THRESHOLD,
        "chosen on augmented validation images",
    )
    values = {
        "split": "test",
        "task": "binary",
        "outputs": (output,),
        "labels": given.LABELS[rows, None].astype(np.int8),
        "logits": given.LOGITS[rows, None],
        "patients": given.PATIENTS[rows],
        "sources": given.SOURCES[rows],
        "subtypes": given.SUBTYPES[rows],
        "atypicality": given.ATYPICALITY[rows],
    }
    return Scores(classes=("NORMAL", "PNEUMONIA"), **{**values, **changes})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SplitResults]:
    run = RunFolder(str(tmp_path_factory.mktemp("stored")), "r1")
    run.open()
    seen = Looks(given.LABELS, given.PATIENTS, given.GEOMETRY, given.BORDER)
    baselines = measure_baselines(seen, seen, split="test", num_bootstrap=20)
    return run.path, record_scores(run, scores(), num_bootstrap=40, baselines=baselines)


def stored(name: str) -> Any:
    return json.loads((STORED / name).read_text())


def test_metrics_and_predictions_are_written_as_they_were(
    recorded: tuple[Path, SplitResults],
) -> None:
    run, _ = recorded
    same(json.loads((run / "metrics.json").read_text()), stored("metrics.json"))
    rows, expected = (
        list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
        for folder in (run, STORED)
    )
    for row, other in zip(rows, expected, strict=True):  # exp() differs between processors
        assert float(row.pop("score")) == pytest.approx(float(other.pop("score")), rel=1e-12)
    assert rows == expected


def test_metrics_of_one_class_without_typicality_are_written_as_they_were() -> None:
    one = np.flatnonzero(given.LABELS == 1)[:3]
    found = scores(
        slice(0, 3),
        split="val",
        outputs=(Output("pneumonia", "normal", 1.0, 0.5, "given"),),
        labels=np.ones((3, 1), np.int8),
        logits=given.LOGITS[one, None],
        patients=["a", "b", "c"],
        subtypes=[""] * 3,
        atypicality=None,
    )
    written = to_json(metrics_json(measure(found, num_bootstrap=10)))
    same(json.loads(written), stored("metrics_of_one_class.json"))


def test_the_summary_and_the_last_lines_are_those_of_the_results(
    recorded: tuple[Path, SplitResults],
) -> None:
    _, results = recorded
    splits = {"train": {"NORMAL": 40, "PNEUMONIA": 60}}
    training = Training(
        "r1",
        "finished",
        24,
        22,
        "0123abcd",
        95.25,
        TrainedOn("data/chest_xray", 64, "crop", splits),
    )
    validation = {name: results.main.whole.metrics[name].value for name in HEADLINES}
    summary = Summary(training, main_results(results), validation)
    whole = {**summary.to_mapping(), "num_failed_uploads": 0, "files": {"report.html": "00"}}
    same(json.loads(to_json(whole)), stored("summary.json"))
    lines = "\n".join(result_lines(summary.main, "submit/r1", validation=validation)) + "\n"
    assert lines == (STORED / "lines.txt").read_text()
