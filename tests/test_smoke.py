"""The way of a newcomer, on phantoms: prepare, train with two processes, evaluate, predict."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.training import Finished, call_main
from xrai import evaluate, predict


def test_two_ranks_train_two_epochs_and_their_run_evaluates_and_predicts(
    finished_by_two: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = finished_by_two.folder
    history = (trained / "history.csv").read_text().splitlines()
    assert len(history) == 1 + 2
    assert "accuracy" in finished_by_two.stdout

    run = shutil.copytree(trained, tmp_path / "run")  # evaluate writes into it
    options = [f"--run={run}", f"--dataset={finished_by_two.dataset}"]
    assert call_main(evaluate, *options, "--evaluate.num_bootstrap=50", capsys=capsys) == (0, [])
    (written,) = (run / "evaluate").glob("test-*/metrics.json")
    evaluated, reported = (
        json.loads(path.read_text())["metrics"] for path in (written, trained / "metrics.json")
    )
    for name, metric in reported.items():
        assert evaluated[name]["value"] == pytest.approx(metric["value"], abs=1e-6, nan_ok=True)

    with (trained / "predictions.csv").open(newline="") as file:
        known = {row["source"]: row for row in csv.DictReader(file)}
    files = [str(finished_by_two.phantoms / source) for source in known]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predict", f"--run={run}", f"--out={tmp_path}/out", *files])
        predict.main()
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == files
    for row, source in zip(rows, known, strict=True):
        assert float(row["probability"]) == pytest.approx(float(known[source]["score"]), abs=1e-4)
