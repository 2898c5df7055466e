"""Several classes, or findings: the pipeline's rows, the table, overlays and exported files say the
same, each with a probability for every name.
"""

import csv
import importlib.util
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xrai
from tests.models import FINGERPRINT, MAX_PIXELS, phantoms, save_films, save_random_run
from tests.training import call_main
from xrai import export, predict
from xrai.ingest.find import find_files
from xrai.ingest.images import decode
from xrai.labels import LabelSpec
from xrai.learning.export import TOLERANCE, TOLERANCE_ATYPICALITY
from xrai.pipeline import Explained, Pipeline, Prediction
from xrai.store import open_store
from xrai.tables import to_csv

CLASSES = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
FINDINGS = LabelSpec(
    "multilabel",
    (
        *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema"),
        *("Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening"),
        *("Pneumonia", "Pneumothorax"),
    ),
)
NUM_FILMS = 12


@dataclass(frozen=True)
class Run:
    folder: Path
    pipeline: Pipeline
    films: Path  # with NUM_FILMS phantoms, an image of noise, and a file that is none
    labels: LabelSpec


@pytest.fixture(scope="module", params=[CLASSES, FINDINGS], ids=lambda labels: labels.task)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = save_random_run(tmp_path_factory.mktemp("runs"), request.param)
    films = save_films(tmp_path_factory.mktemp("films"), NUM_FILMS)
    return Run(folder, xrai.load(str(folder)), films, request.param)


@pytest.fixture(scope="module")
def rows(run: Run) -> list[Prediction]:
    return run.pipeline.predict(run.films)


def expected_probabilities(run: Run) -> np.ndarray:
    """Of the films, (n, C), from the network itself."""
    model = run.pipeline.model
    images = [
        decode(film, size=64, fit="crop", max_pixels=MAX_PIXELS) for film in phantoms(NUM_FILMS)[0]
    ]
    with torch.no_grad():
        logits = model.network(torch.from_numpy(np.stack(images))[:, None] / 255).double()
    scaled = logits / torch.tensor(model.temperatures).double()
    found = scaled.softmax(dim=1) if run.labels.task == "multiclass" else scaled.sigmoid()
    return np.asarray(found)


# --------------------------------------------------------------------------------------------- rows


def test_each_class_or_finding_has_its_calibrated_probability(
    run: Run, rows: list[Prediction]
) -> None:
    expected = expected_probabilities(run)
    assert expected.std(axis=0).min() > 0.02
    for row, probabilities in zip(rows, expected, strict=False):
        assert tuple(row.probabilities) == run.labels.classes
        assert list(row.probabilities.values()) == pytest.approx(probabilities, abs=1e-5)
        assert row.probability is row.threshold is None
    images = np.stack(
        [decode(film, size=64, fit="crop", max_pixels=MAX_PIXELS) for film in phantoms(3)[0]]
    )
    probabilities, atypicality = run.pipeline.score(images)
    assert probabilities == pytest.approx(expected[:3], abs=1e-5)
    assert probabilities.shape == (3, len(run.labels.classes)) and atypicality.shape == (3,)


def test_the_most_probable_class_is_called_or_all_findings_from_their_thresholds_up(
    run: Run, rows: list[Prediction]
) -> None:
    limits = dict(zip(run.labels.classes, run.pipeline.model.thresholds, strict=False))
    sure = [row for row in rows[:NUM_FILMS] if row.decision != "review"]
    assert len(sure) >= 8 and len({row.calls for row in sure}) >= 3
    for row in sure:
        if run.labels.task == "multiclass":
            expected = [max(row.probabilities, key=row.probabilities.__getitem__)]
        else:
            expected = [name for name, p in row.probabilities.items() if p >= limits[name]]
        assert row.calls == tuple(expected)
        assert row.decision == ("|".join(expected) or "no finding") and row.reason == ""
        assert row.thresholds == limits


def test_what_is_odd_or_no_image_asks_for_review_and_calls_nothing(rows: list[Prediction]) -> None:
    noise, none = rows[-2:]
    assert (none.decision, none.calls, none.probabilities) == ("review", (), {})
    assert none.reason == "is not a JPEG, PNG or DICOM file" and not none.is_readable
    assert (noise.decision, noise.calls) == ("review", ()) and noise.is_readable
    assert noise.reason.startswith("does not look like the training images")


def test_no_finding_is_a_decision(tmp_path: Path) -> None:
    pipeline = xrai.load(str(save_random_run(tmp_path, FINDINGS)))
    row = pipeline._row(np.zeros(14), np.zeros(14, bool), 0.5)
    assert (row.decision, row.calls) == ("no finding", ())


# -------------------------------------------------------------------------------------------- files


def test_the_table_has_a_column_for_each_and_json_the_same(
    run: Run, rows: list[Prediction], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = tmp_path / "out", [f"--run={run.folder}", str(run.films)]
    for options in (["--no_overlays"], ["--no_overlays"], []):  # its own folder is taken again
        status, _ = call_main(predict, *arguments, f"--out={out}", *options, capsys=capsys)
        assert status == 0
    with (out / "predictions.csv").open(newline="") as file:
        header, *table = list(csv.reader(file))
    assert header == [
        *("path", "decision", "reason"),
        *(f"probability_{name}" for name in run.labels.classes),
        "model",
    ]
    content = json.loads((out / "predictions.json").read_text())
    found = content.pop("predictions")
    limits = dict(zip(run.labels.classes, run.pipeline.model.thresholds, strict=False))
    assert content == {
        "schema_version": 2,
        "tool_version": xrai.__version__,
        "note": predict.NOTE,
        "run_id": "tiny",
        "dataset_fingerprint": FINGERPRINT,
        "task": run.labels.task,
        "classes": list(run.labels.classes),
        "thresholds": limits,
        "temperatures": list(run.pipeline.model.temperatures),
        "image_size": 64,
        "fit": "crop",
        "num_files": NUM_FILMS + 2,
        "num_review": sum(row.decision == "review" for row in rows),
        "num_unreadable": 1,
    }
    for row, cells, entry in zip(rows, table, found, strict=True):
        assert cells[:3] == [row.path, row.decision, row.reason] and cells[-1] == "tiny"
        assert [float(cell) for cell in cells[3:-1] if cell] == list(row.probabilities.values())
        overlay = entry.pop("overlay")
        assert (overlay is not None) == row.is_readable
        assert entry == {
            "path": row.path,
            "decision": row.decision,
            "reason": row.reason,
            "calls": list(row.calls),
            "probabilities": dict(row.probabilities),
            "model": "tiny",
        }
    assert all(cell == "" for cell in table[-1][3:-1])  # none.txt


def test_names_are_safe_in_a_spreadsheet_and_a_terminal() -> None:
    names = ("=cmd|' /C calc'!A0", "a;=b", "Ödem, groß", "\x1b[2Jclear", "tab\t=c")
    labels = LabelSpec("multilabel", names)
    probabilities = {name: 0.5 for name in names}
    row = Prediction("a.png", None, None, "|".join(names), "", "m", probabilities, {}, names)
    columns = predict.columns_of(labels)
    text = to_csv(columns, [predict._cells(row, columns)])
    header, cells = list(csv.reader(text.splitlines()))
    assert header[3:-1] == [
        "probability_=cmd|' /C calc'!A0",
        "probability_a;'=b",
        "probability_Ödem, groß",
        "probability_\x1b[2Jclear",
        "probability_tab\t'=c",
    ]
    assert cells[1].startswith("'=cmd") and ";'=b" in cells[1]
    assert all(part[0] not in "=+-@" for line in (header, cells) for part in line if part)
    assert text.startswith('"path"')  # quoted, so that no other separator splits it
    assert predict.short("\x1b[2Jclear") == "\ufffd[2Jclear"


@pytest.mark.parametrize("labels", [CLASSES, FINDINGS, LabelSpec("binary", ("NO", "TB"))])
def test_a_table_whose_cells_are_quoted_is_known_as_the_commands_own(
    labels: LabelSpec, tmp_path: Path
) -> None:
    columns = predict.columns_of(labels)
    store = open_store(str(tmp_path))
    for path in ("a.png", "a;b.png"):
        table = to_csv(columns, [dict.fromkeys(columns, 0.5) | {"path": path}])
        store.write("predictions.csv", table.encode())
        assert predict.is_mark(store, "predictions.csv")
    store.write("predictions.csv", b"source,label,score,call,decision\n")  # that of a run
    assert not predict.is_mark(store, "predictions.csv")
    store.write("predictions.csv", b"\xff\x00\xff")
    assert not predict.is_mark(store, "predictions.csv")


def test_the_printed_table_shows_the_three_highest_and_is_bounded(
    run: Run, rows: list[Prediction], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = call_main(predict, f"--run={run.folder}", str(run.films), capsys=capsys)
    lines = predict.format_table(rows, run.pipeline.model, out=None)
    assert status == 0
    heading, table = lines[0], lines[1 : len(rows) + 1]
    is_called_first = run.labels.task == "multilabel"
    words = "called, then most probable" if is_called_first else "highest probabilities"
    assert re.fullmatch(rf"file +{words} +decision", heading)
    for row, line in zip(rows, table, strict=True):
        assert line.startswith(row.path)
        if row.is_readable:
            shown = re.findall(r"(\S+) (0\.\d{3}|1\.000)(?=,|  )", line)
            called = [name for name in row.highest() if name in row.calls]
            others = [name for name in row.highest() if name not in row.calls]
            assert [name for name, _ in shown] == [*called, *others][:3]
        assert len(line) < len(str(run.films)) + 180
    assert max(map(len, lines[len(rows) + 1 :])) <= 100
    text = " ".join(lines).replace("   ", " ")
    assert f"files: {len(rows)} = " in text and "1 of which could not be read" in text
    if run.labels.task == "multilabel":
        assert "each is called from its threshold of tiny up: Atelectasis 0." in text
    else:
        assert "the class of the highest probability is called; run tiny" in lines


# ----------------------------------------------------------------------------------------- overlays


def test_heat_maps_are_of_what_is_called_the_most_probable_first_or_of_the_highest(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = find_files([str(run.films)])
    found = [
        each for each in run.pipeline.classify(files, explain_side=64) if each.image is not None
    ]
    by_name: dict[str, Explained] = {}
    for explained in found:
        row = explained.prediction
        called = [name for name in row.highest() if name in row.calls][:3]
        if row.decision != "review":
            assert list(explained.heats) == (called or row.highest(1))
        assert 1 <= len(explained.heats) <= 3
        by_name |= {name: explained for name in explained.heats}
        with Image.open(io.BytesIO(predict.draw_overlay(explained))) as panel:
            assert panel.width == (1 + len(explained.heats)) * (64 + 12) + 12
    assert len(by_name) >= 3
    assert run.labels.task == "multiclass" or max(len(each.heats) for each in found) == 3
    for name, explained in by_name.items():  # each output's own gradient
        data = find_files([explained.prediction.path])[0].read()
        image = decode(data, size=64, fit="crop", max_pixels=MAX_PIXELS)
        own = run.pipeline.explain(image[None].copy(), run.labels.classes.index(name))[0]
        assert explained.heats[name] == pytest.approx(own, abs=1e-3)


# ------------------------------------------------------------------------------------------- export


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no extra `export`")
@pytest.mark.parametrize("formats", ["torch", "onnx,torch"])
@pytest.mark.parametrize(
    "run",
    [pytest.param(CLASSES, marks=pytest.mark.ci, id="multiclass"), FINDINGS],
    indirect=True,
    ids=lambda labels: labels.task,
)
def test_exported_files_give_the_same_probabilities_and_say_what_they_are(
    formats: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    out, num = tmp_path / "out", len(run.labels.classes)
    options = [f"--run={run.folder}", f"--out={out}", f"--formats={formats}"]
    status, _ = call_main(export, *options, capsys=capsys)
    assert status == 0
    extra = {"metadata.json": ""}
    network = torch.export.load(out / "model.pt2", extra_files=extra).module()
    metadata = json.loads(extra["metadata.json"])
    session = None
    if "onnx" in formats:
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(out / "model.onnx", providers=providers)
        assert [(each.name, each.shape) for each in session.get_outputs()] == [
            ("probability", ["batch", num]),
            ("atypicality", ["batch"]),
        ]
        stated = session.get_modelmeta().custom_metadata_map
        for key in ("classes", "thresholds", "temperatures"):
            assert json.loads(stated[key]) == metadata[key]
        assert stated["task"] == metadata["task"]
    for film in phantoms(4)[0]:
        image = decode(film, size=64, fit="crop", max_pixels=MAX_PIXELS)
        expected = run.pipeline.score(image[None].copy())
        with torch.inference_mode():
            said = [[each.numpy() for each in network(torch.from_numpy(film)[None])]]
        if session is not None:
            said.append(session.run(None, {"images": film[None]}))
        for probability, atypicality in said:
            assert probability.shape == (1, num)
            np.testing.assert_allclose(probability, expected[0], atol=TOLERANCE, rtol=0)
            limit = TOLERANCE_ATYPICALITY
            np.testing.assert_allclose(atypicality, expected[1], atol=limit, rtol=limit)
    limits = dict(zip(run.labels.classes, run.pipeline.model.thresholds, strict=False))
    for key, value in (
        ("classes", list(run.labels.classes)),
        ("thresholds", limits),
        ("temperatures", list(run.pipeline.model.temperatures)),
    ):
        assert metadata[key] == value
    assert metadata["task"] == run.labels.task
    assert f"(batch, {num}) float32" in metadata["outputs"]["probability"]
    assert "share that the run is calibrated at" in metadata["outputs"]["probability"]
    report = json.loads((out / "export.json").read_text())
    assert all(each["probability"] <= TOLERANCE for each in report["agreement"].values())
    assert report["beside_own_path"]["png_probability"] < TOLERANCE
