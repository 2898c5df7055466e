"""Evaluation as people use it: a finished run, any split of any data set, the same files as
training writes.
"""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.dataset.small import write_dataset
from tests.training import Finished, call_main, run_module
from xrai import evaluate
from xrai.dataset.loader import Loader
from xrai.errors import UserError
from xrai.measuring import read_looks
from xrai.store import LEASE_KEY, open_store, take_lease

pytestmark = pytest.mark.slow
FEW = "--evaluate.num_bootstrap=50"


@pytest.fixture(scope="module")
def dataset(finished: Finished) -> Path:
    return finished.dataset


@pytest.fixture(scope="module")
def run(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(finished.folder, tmp_path_factory.mktemp("evaluate"))


def copy_of(run: Path, folder: Path) -> Path:
    return shutil.copytree(
        run, folder / "submit" / run.name, ignore=shutil.ignore_patterns("evaluate")
    )


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_split_is_measured_by_one_process_at_a_time(
    run: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(run))
    fingerprint = json.loads((dataset / "dataset.json").read_text())["fingerprint"]
    key = f"evaluate/test-{fingerprint[:12]}/{LEASE_KEY}"
    arguments = [f"--run={run}", f"--dataset={dataset}", FEW]
    with take_lease(store, key):
        status, lines = call_main(evaluate, *arguments, "--split=val,test", capsys=capsys)
        assert status == 2 and "is being written by process" in lines[0]
        assert not [found for found in store.list("evaluate/") if found.key != key]
        assert call_main(evaluate, *arguments, "--split=val", capsys=capsys) == (0, [])
    assert not [found for found in store.list() if found.key.endswith(LEASE_KEY)]


def test_several_splits_are_measured_at_once_with_the_files_and_numbers_of_training(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    done = run_module(
        "xrai.evaluate", f"--run={run}", f"--dataset={dataset}", "--split=test, val,test", FEW
    )
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if " split: " in line]
    assert [line.split()[0] for line in heads] == ["test", "val"]  # each once, in their order
    for split, place in (("test", run), ("val", run / "val")):
        (folder,) = (run / "evaluate").glob(f"{split}-*")
        ours, theirs = (
            json.loads((where / "metrics.json").read_text()) for where in (folder, place)
        )
        assert (ours["split"], ours["threshold_source"]) == (split, "that of the run")
        for part in (
            "metrics",
            "counts",
            "threshold",
            "calibration",
            "subtypes",
            "groups",
            "abstention",
            "baselines",
        ):
            assert flat(ours[part]) == pytest.approx(flat(theirs[part]), abs=1e-6, nan_ok=True), (
                part
            )
        trained = {name for name in names_in(place) if name.startswith("plots/")}
        assert {
            "plots/mistakes.png",
            "plots/overlays.png",
            "plots/examples.png",
            "plots/abstention.png",
        } <= trained
        assert names_in(folder) == trained | {
            "config.yaml",
            "metrics.json",
            "predictions.csv",
            "report.html",
        }
        config, trained_with = (
            yaml.safe_load((where / "config.yaml").read_text()) for where in (folder, run)
        )
        assert config["images"] == trained_with["images"] and "model" not in config
        assert config["evaluate"]["num_bootstrap"] == 50
        assert [*config["train"]] == ["threads", "timeout_s"]
        page = (folder / "report.html").read_text()
        assert "evaluation report" in page and f"On the {split} split of" in page


def flat(value: object) -> list[float]:
    """All numbers of a JSON value, in their order; null is NaN."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    if isinstance(value, list):
        return [number for each in value for number in flat(each)]
    return [] if isinstance(value, str) else [float("nan") if value is None else float(value)]  # type: ignore[arg-type]


def test_training_and_evaluation_state_review_and_shortcuts(run: Path, dataset: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    review = [row["decision"] == "review" for row in rows]
    assert review == [not float(row["atypicality"]) <= 1 for row in rows]
    assert metrics["abstention"]["num_review"] == summary["review"]["num_images"] == sum(review)
    for name in ("geometry", "border"):
        entry = metrics["baselines"][name]
        assert entry["num_train"] == Loader(str(dataset), split="train", batch_size=8).num_images
        assert entry["metrics"]["auroc"]["value"] == summary["baselines"][name]["auroc"]
    counts = np.bincount(Loader(str(dataset), split="test", batch_size=8).labels).tolist()
    assert summary["trained_on"]["splits"]["test"] == dict(
        zip(("NORMAL", "PNEUMONIA"), counts, strict=True)
    )


def test_a_data_set_without_a_training_split_is_measured_and_its_shortcuts_are_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = copy_of(run, tmp_path), tmp_path / "elsewhere"
    index = write_dataset(other, {"test": [20, 12]}, size=32, commit=False)
    index = dataclasses.replace(index, config={"images": {"size": 32, "fit": "crop"}})
    (other / "dataset.json").write_text(index.to_json())
    (other / "manifest.jsonl").write_text("")
    status, lines = call_main(
        evaluate, f"--run={run}", f"--dataset={other}", "--split=test", FEW, capsys=capsys
    )
    assert (status, lines) == (0, [])
    (written,) = (run / "evaluate").glob("test-*/metrics.json")
    baselines = json.loads(written.read_text())["baselines"]
    assert "no train split" in baselines["border"]["reason"]
    assert baselines["border"]["metrics"]["auroc"]["value"] is None


def test_a_run_whose_training_has_not_ended_is_measured_without_a_page(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(run, tmp_path)
    (run / "summary.json").unlink()
    status, _ = call_main(
        evaluate, f"--run={run}", f"--dataset={dataset}", "--split=val", FEW, capsys=capsys
    )
    assert status == 0
    (folder,) = (run / "evaluate").iterdir()
    assert "metrics.json" in names_in(folder) and "report.html" not in names_in(folder)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("", "names no split"),
        (" , ", "names no split"),
        ("exam", "has no split 'exam'"),
        ("val,exam", "'exam'"),
    ],
)
def test_a_split_that_is_not_there_is_one_clear_line(
    run: Path, dataset: Path, split: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if split.strip(" ,"):
        arguments = [f"--run={run}", f"--dataset={dataset}", f"--split={split}"]
        status, lines = call_main(evaluate, *arguments, capsys=capsys)
        assert status == 2 and len(lines) == 1 and message in lines[0]
    else:
        with pytest.raises(UserError, match=message):
            evaluate.parse_splits(split)


@pytest.mark.parametrize("limit", [1, 7, 8, 25, 1000])
def test_the_baselines_look_at_no_more_images_than_they_may_and_in_the_order_of_the_rows(
    dataset: Path, limit: int
) -> None:
    loader = Loader(str(dataset), split="train", batch_size=8)
    whole = read_looks(loader, limit=10_000)
    looks = read_looks(loader, limit=limit)
    num = min(limit, loader.num_images)
    assert (
        len(looks.labels) == len(looks.patients) == len(looks.geometry) == len(looks.border) == num
    )
    assert np.array_equal(looks.border, whole.border[:num])
    columns = loader.columns("labels", "patient", "width")
    assert np.array_equal(whole.labels, columns["labels"])
    assert whole.patients == columns["patient"].tolist()
    assert np.allclose(np.exp(whole.geometry[:, 0]), columns["width"])
