"""What is recorded of a split: predictions, metrics, sheets, and one number everywhere."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.results.many import make_many
from tests.results.small import make_scores, measure_split
from xrai.config import Config
from xrai.errors import RunError
from xrai.results.environment import describe_environment
from xrai.results.folder import RunFolder
from xrai.results.measure import measure
from xrai.results.record import (
    NUM_ERRORS,
    _draw_sheets_of_many,
    metrics_json,
    pick_examples,
    pick_mistakes,
    record_scores,
)
from xrai.results.report import Page, Part, render_report
from xrai.results.summary import Summary, main_results, read_summary, result_lines
from xrai.results.types import Baseline, DatasetFacts, Estimate, SplitResults, TrainedOn, Training
from xrai.tables import to_json

TRAINING = Training(
    "r1", "done", 3, 2, "f", 1.5, TrainedOn("s", 64, "crop", {"train": {"normal": 1}})
)


@pytest.fixture(scope="module")
def results() -> SplitResults:
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 2, 120)
    scores = np.clip(0.25 + 0.5 * labels + 0.25 * generator.standard_normal(120), 0, 1)
    patients = [str(row // 2) for row in range(120)]
    return measure_split(labels, scores, threshold=0.47, patients=patients, num_bootstrap=50)


def summary_of(results: SplitResults) -> Summary:
    return Summary(TRAINING, main_results(results), {"accuracy": 0.5})


def lines_of(summary: Summary, folder: str) -> list[str]:
    return result_lines(summary.main, folder, validation=summary.validation)


def probabilities(logits: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(logits)))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_predictions_say_what_goes_to_a_person_and_what_metrics_say(run: RunFolder) -> None:
    wanted = [0.2, 0.7, 0.9, 0.6, 0.8]
    scores = make_scores(
        [0, 0, 1, 1, 1],
        wanted,
        temperature=2.0,
        atypicality=[0.2, 1.0, 1.01, math.nan, 0.1],
        patients=["IM:1", "file:a/1.png", "virus:2", "virus:3", "lonely"],
    )
    results = record_scores(run, scores, num_bootstrap=10, baselines={})
    rows = rows_of(run.path / "predictions.csv")
    decisions = ["normal", "pneumonia", "review", "review", "pneumonia"]
    assert [row["decision"] for row in rows] == decisions
    assert [row["call"] for row in rows] == ["NORMAL", *["PNEUMONIA"] * 4]
    assert [row["atypicality"] for row in rows] == ["0.2", "1.0", "1.01", "", "0.1"]
    assert [row["group"] for row in rows] == ["IM", "", "virus", "virus", ""]
    assert [float(row["score"]) for row in rows] == pytest.approx(wanted)
    assert results.main.abstention.num_review == decisions.count("review")
    assert results.main.uncalibrated["brier"] != results.main.whole.metrics["brier"]
    stored = json.loads((run.path / "metrics.json").read_text())
    assert stored == json.loads(to_json(metrics_json(results)))
    unknown = make_scores([0, 1], [0.3, 0.7])  # a run that knows no typicality
    record_scores(run, unknown, num_bootstrap=10, baselines={}, folder="plain")
    rows = rows_of(run.path / "plain/predictions.csv")
    assert [row["atypicality"] for row in rows] == ["", ""]
    assert [row["decision"] for row in rows] == ["normal", "pneumonia"]


def test_examples_are_of_both_classes_and_mistakes_begin_with_the_largest_errors() -> None:
    labels = np.array([1, 1, 1, 0, 1, 0], np.uint8)
    scores = np.array([0.9, 0.2, 0.45, 0.7, 0.1, 0.5])
    assert pick_examples(labels, num=4).tolist() == [3, 5, 0, 1]
    assert pick_examples(labels, num=100).tolist() == [3, 5, 0, 1, 2, 4]
    assert pick_examples(np.zeros(3, np.uint8), num=2).tolist() == [0, 1]
    assert pick_mistakes(labels, scores, scores >= 0.4, num=4).tolist() == [4, 1, 3, 5]
    correct = pick_mistakes(labels, scores, scores >= 0.4, num=6).tolist()[4:]
    assert correct == [2, 0]


def test_the_images_in_tensorboard_are_the_files_of_the_run(run: RunFolder) -> None:
    generator = np.random.default_rng(3)
    labels = (np.arange(30) % 3 == 0).astype(np.uint8)
    pixels = generator.integers(0, 256, (30, 16, 16), dtype=np.uint8)
    asked: list[list[int]] = []

    class Images:
        def read(self, rows: np.ndarray) -> np.ndarray:
            asked.append(rows.tolist())
            chosen: np.ndarray = pixels[rows]
            return chosen

        def explain(self, images: np.ndarray, output: int = 0) -> np.ndarray:
            assert (images.shape, images.dtype) == ((12, 16, 16), np.uint8)
            return np.linspace(0, 1, images.size, dtype=np.float32).reshape(images.shape)

    scores = make_scores(labels, probabilities(generator.normal(0, 2, 30)))
    record_scores(
        run, scores, num_bootstrap=10, baselines={}, folder="val", images=Images(), step=7
    )
    run.close_segment()
    found = scores.labelled()
    assert asked == [
        pick_examples(labels).tolist(),
        pick_mistakes(found.labels, found.scores, found.called).tolist(),
    ]
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for name in ("examples", "mistakes", "overlays"):
        (shown,) = events.Images(f"predictions/{name}_val")
        path = run.path / "val" / "plots" / f"{name}.png"
        assert shown.step == 7
        with Image.open(path) as image, Image.open(io.BytesIO(shown.encoded_image_string)) as got:
            assert np.array_equal(np.asarray(got), np.asarray(image.convert("RGB")))


def test_the_same_numbers_stand_in_metrics_summary_report_and_on_the_terminal(
    run: RunFolder, results: SplitResults
) -> None:
    run.write_json("metrics.json", metrics_json(results))
    summary = summary_of(results)
    dataset = DatasetFacts("s", "f", 64, "crop", {"train": {"normal": 1}}, 1)
    environment = describe_environment()
    page = render_report(
        Page(results, TRAINING, dataset, Config().to_mapping(), environment), run.path
    )
    lines = "\n".join(lines_of(summary, run.address))
    assert result_lines(summary.main, run.address)[:5] == lines.splitlines()[:5]
    run.finish(summary.to_mapping())
    stored = json.loads((run.path / "metrics.json").read_text())
    kept = json.loads((run.path / "summary.json").read_text())
    for name in ("accuracy", "sensitivity", "specificity", "auroc"):
        entry = stored["metrics"][name]
        assert kept[name] == entry["value"]
        assert kept["intervals"][name] == [entry["low"], entry["high"]]
        percent = name != "auroc"
        value, low, high = (
            f"{100 * entry[k]:.1f}" if percent else f"{entry[k]:.3f}"
            for k in ("value", "low", "high")
        )
        for text in (lines, page):
            assert f"{value} %" in text if percent else value in text
            assert f"{low}–{high}" in text
    assert kept["counts"] == stored["counts"]
    assert f"{stored['counts']['tp']} of {stored['counts']['tp'] + stored['counts']['fn']}" in lines
    assert kept["threshold"] == stored["threshold"]
    assert "0.470" in lines
    assert "0.470" in page


def test_a_summary_is_read_back_as_it_was_written(results: SplitResults) -> None:
    summary = summary_of(dataclasses.replace(results, split="test"))
    again = read_summary(to_json(summary.to_mapping()).encode(), where="x")
    assert to_json(again.to_mapping()) == to_json(summary.to_mapping())
    assert lines_of(again, "x") == lines_of(summary, "x")
    assert again.training == TRAINING


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"schema_version": 9}', '{"schema_version": 1}', '{"baselines": []}']
)
def test_what_is_no_summary_of_this_version_is_one_clear_line(text: str) -> None:
    with pytest.raises(RunError, match=r"s/r1/summary\.json") as caught:
        read_summary(text.encode(), where="s/r1/summary.json")
    assert "\n" not in str(caught.value)


def test_the_last_lines_say_where_the_plots_are_and_when_they_are_of_phantoms(
    results: SplitResults,
) -> None:
    lines = lines_of(summary_of(results), "submit/r1")
    assert any(
        "submit/r1/curves/loss.png" in line and "submit/r1/curves/accuracy.png" in line
        for line in lines
    )
    assert "phantom" not in "".join(lines)
    phantoms = summary_of(dataclasses.replace(results, is_phantom=True))
    assert "phantoms, not patients" in lines_of(phantoms, "x")[0]


def test_the_last_lines_say_what_goes_to_a_person_and_what_shortcuts_reach(
    results: SplitResults,
) -> None:
    def baseline(auroc: float) -> Baseline:
        return Baseline("", 1, 1, {"auroc": Estimate(auroc)}, "")

    abstention = dataclasses.replace(
        results.main.abstention, num_review=6, metrics={"accuracy": Estimate(0.9)}
    )
    changed = dataclasses.replace(
        results,
        abstention=abstention,
        baselines={"geometry": baseline(0.8125), "border": baseline(math.nan)},
    )
    lines = lines_of(summary_of(changed), "x")
    (review,) = [line for line in lines if line.startswith("review      6 of 120 images")]
    assert "90.0 %" in review
    assert "shortcuts   AUROC of image size alone 0.812, outer border alone –" in lines
    without = lines_of(summary_of(results), "x")
    assert not any(line.startswith(("review", "shortcuts")) for line in without)


def test_an_undefined_result_is_a_dash_on_the_terminal_and_null_in_the_summary() -> None:
    summary = summary_of(measure_split([1, 1], [0.2, 0.9]))
    assert json.loads(to_json(summary.to_mapping()))["specificity"] is None
    lines = lines_of(summary, "x")
    assert any(line.startswith("specificity") and "–" in line for line in lines)


def test_each_of_several_outputs_has_a_sheet_of_errors_under_its_own_heat_maps(
    run: RunFolder,
) -> None:
    scores, results = make_many("multilabel", 14)
    explained: list[tuple[int, int]] = []

    class Images:
        def read(self, rows: np.ndarray) -> np.ndarray:
            return np.repeat(rows.astype(np.uint8), 64).reshape(-1, 8, 8)

        def explain(self, images: np.ndarray, output: int = 0) -> np.ndarray:
            explained.append((output, len(images)))
            found = scores.labelled(output)
            errors = np.abs(found.labels - found.scores)
            is_wrong = found.called != found.labels
            worst = np.sort(errors[is_wrong])[-NUM_ERRORS:]
            rows = images[:, 0, 0]  # `read` writes their numbers
            shown = np.isin(found.rows, rows)
            assert sorted(errors[shown]) == pytest.approx(sorted(worst))
            return np.zeros(images.shape, np.float32)

    plots = run.path / "plots"
    plots.mkdir()
    names = _draw_sheets_of_many(scores, Images(), plots)
    assert explained == [(column, NUM_ERRORS) for column in range(14)]
    assert names == ["examples", *(f"overlays-{number:02d}" for number in results.ranked)]
    assert sorted(path.stem for path in plots.iterdir()) == sorted(names)


@pytest.mark.parametrize(("temperature", "limit"), [(0.05, "lower"), (20.0, "upper"), (1.3, "")])
def test_metrics_and_page_warn_of_a_temperature_at_its_limit(
    temperature: float, limit: str
) -> None:
    results = measure(make_scores([0, 1] * 9, [0.2, 0.7] * 9, temperature=temperature))
    calibration = json.loads(to_json(metrics_json(results)))["calibration"]
    assert calibration["temperature"] == temperature
    notes = " ".join(Part("explorer", 0, results.main).notes)
    if limit:
        assert f"the temperature is at its {limit} limit" in calibration["warning"]
        assert f"The temperature is at its {limit} limit" in notes
    else:
        assert "warning" not in calibration and "temperature" not in notes
