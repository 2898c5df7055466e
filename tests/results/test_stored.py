"""The files of a run keep their keys, their order and their numbers: compared with stored ones."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.results import stored_input as given
from xrai.results.baselines import Looks, measure_baselines
from xrai.results.folder import RunFolder
from xrai.results.record import record_scores

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


def test_metrics_and_predictions_are_written_as_they_were(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "r1")
    run.open()
    seen = Looks(given.LABELS, given.PATIENTS, given.GEOMETRY, given.BORDER)
    record_scores(
        run, split="test", labels=given.LABELS, logits=given.LOGITS, temperature=given.TEMPERATURE,
        sources=given.SOURCES, patients=given.PATIENTS, subtypes=given.SUBTYPES, threshold=given.THRESHOLD,
        threshold_source="chosen on augmented validation images", classes=("NORMAL", "PNEUMONIA"),
        num_bootstrap=40, is_phantom=False, atypicality=given.ATYPICALITY,
        baselines=measure_baselines(seen, seen, split="test", num_bootstrap=20),
    )  # fmt: skip
    found = json.loads((run.path / "metrics.json").read_text())
    same(found, json.loads((STORED / "metrics.json").read_text()))
    rows, stored = (
        list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
        for folder in (run.path, STORED)
    )
    assert rows == stored
