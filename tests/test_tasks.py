"""Each task from the first command to the last: phantoms, data set, training, evaluation,
prediction and export, which agree with each other.
"""

import csv
import importlib.util
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

import xrai
from tests.training import SMALL, Command, call_main
from xrai import evaluate, export, predict, preprocess, train, verify
from xrai.labels import Task
from xrai.learning.predictor import load_model
from xrai.phantom import __main__ as phantom
from xrai.store import open_store

pytestmark = [pytest.mark.ci, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no extra `export`")
@pytest.mark.parametrize("task", get_args(Task))
def test_all_ways_from_phantoms_to_a_probability_agree(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setenv("XRAI_PATIENT_KEY", str(tmp_path / "patient.key"))
    images, dataset, run = (tmp_path / name for name in ("images", "dataset", "submit/small"))

    def done(module: Command, *arguments: object) -> None:
        assert call_main(module, *map(str, arguments), capsys=capsys) == (0, [])

    done(phantom, "--out", images, f"--task={task}", "--num-images=100", "--workers=1")
    labels = [f"--labels={images}/labels.csv"] if task == "multilabel" else []
    options = ["--images.size=32", "--splits.val_fraction=0.25", "--workers=1", *labels]
    done(preprocess, f"--source={images}", f"--dataset={dataset}", *options)
    done(verify, f"--dataset={dataset}")
    done(train, f"--dataset={dataset}", f"--artifacts={run.parent}", "--run_id=small", *SMALL)
    done(evaluate, f"--run={run}", f"--dataset={dataset}", "--split=val", SMALL[-1])
    out = tmp_path / "predicted"
    done(predict, f"--run={run}", images, f"--out={out}", "--no_overlays")
    done(export, f"--run={run}", f"--out={tmp_path}/exported")

    index = json.loads((dataset / "dataset.json").read_text())
    model = load_model(open_store(str(run)))
    assert (index["task"], index["fingerprint"]) == (task, model.fingerprint)
    assert list(model.labels.classes) == index["classes"]
    names = index["classes"][-model.labels.num_outputs :]

    paths = sorted(images.rglob("*.png"))
    loaded = {row.path: row.probabilities for row in xrai.load(str(run)).predict(paths)}
    with (out / "predictions.csv").open(newline="") as file:
        table = {row["path"]: row for row in csv.DictReader(file) if row["path"] in loaded}
    path = tmp_path / "exported" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert len(loaded) == len(table) == 100
    for name in map(str, paths):
        own = list(loaded[name].values())
        columns = ["probability"] if task == "binary" else [f"probability_{x}" for x in names]
        written = [float(table[name][column]) for column in columns]
        assert written == pytest.approx(own, abs=1e-6)  # other images are in its batch
        film = np.asarray(Image.open(name).convert("L"))
        (graph,) = session.run(["probability"], {"images": film[None]})
        assert own == pytest.approx(graph.reshape(-1), abs=1e-5)

    (folder,) = (run / "evaluate").glob("val-*")
    with (folder / "predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            scores = [row["score"]] if task == "binary" else [row[f"score_{x}"] for x in names]
            own = list(loaded[str(images / row["source"])].values())
            assert own == pytest.approx(list(map(float, scores)), abs=1e-5)
