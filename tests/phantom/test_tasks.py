"""Phantoms of several classes and with findings become data sets, as they are drawn."""

import json
from pathlib import Path

import pytest

from tests.training import call_main
from xrai import preprocess
from xrai.labels import Task
from xrai.phantom import FINDINGS, make_phantoms

pytestmark = pytest.mark.ci

CLASSES = {"multiclass": ("NORMAL", "BACTERIAL", "VIRAL"), "multilabel": FINDINGS}


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_phantoms_of_a_task_are_a_data_set_of_it(
    tmp_path: Path, task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XRAI_PATIENT_KEY", str(tmp_path / "patient.key"))
    images, dataset = tmp_path / "images", tmp_path / "dataset"
    make_phantoms(images, num_images=300, task=task, workers=1)
    options = [f"--source={images}", f"--dataset={dataset}", "--images.size=32"]
    options += ["--splits.val_fraction=0.25", "--splits.test_fraction=0.25"]
    if task == "multilabel":
        options.append(f"--labels={images / 'labels.csv'}")
    status, _ = call_main(preprocess, *options, capsys=capsys)
    assert status == 0
    index = json.loads((dataset / "dataset.json").read_text())
    assert (index["task"], tuple(index["classes"])) == (task, CLASSES[task])
    shards = [shard for shards in index["splits"].values() for shard in shards]
    assert sum(shard["num_rows"] for shard in shards) == 300
    if task == "multilabel":
        unknown = sum(sum(shard["num_unknown_per_class"]) for shard in shards)
        assert unknown / (300 * len(FINDINGS)) == pytest.approx(0.2, abs=0.03)
    else:
        assert sum(sum(shard["num_rows_per_class"]) for shard in shards) == 300
