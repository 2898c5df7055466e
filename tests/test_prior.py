"""`--prior` through the program: rows, table, report and `xrai.load` say what scores are for."""

import csv
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import xrai
from tests.models import phantoms, save_films, save_random_run, save_run, without_detail
from tests.training import Finished, call_main
from xrai import evaluate, predict
from xrai.errors import RunError, UserError
from xrai.labels import LabelSpec
from xrai.pipeline import Prediction
from xrai.results.prior import Prior, read_prior
from xrai.results.types import outputs_of

CLASSES = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
FINDINGS = LabelSpec("multilabel", ("Mass", "Edema", "Nodule"))
NUM_FILMS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose scores are calibrated at 60 % pneumonia."""
    return save_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, one image of noise, and a file that is none."""
    return save_films(tmp_path_factory.mktemp("films"), NUM_FILMS)


def log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def calls(rows: list[Prediction]) -> list[tuple[str, tuple[str, ...], str]]:
    return [(row.decision, row.calls, row.reason) for row in rows]


def test_a_given_prior_moves_probabilities_and_threshold_and_no_call(
    run: Path, films: Path
) -> None:
    plain, moved = (xrai.load(str(run), prior=share).predict(films) for share in (None, 0.1))
    assert calls(plain) == calls(moved) and len({row.decision for row in plain}) == 3
    for before, after in zip(plain, moved, strict=True):
        assert (before.prior, before.prior_source) == ({}, "")
        assert (after.prior, after.prior_source) == ({"pneumonia": 0.1}, "given")
        assert after.threshold == pytest.approx(1 / (1 + 0.6 / 0.4 * 0.9 / 0.1))  # of 0.5
        if before.probability is None:
            assert after.probability is None
        else:
            assert after.probability is not None
            shift = log_odds(after.probability) - log_odds(before.probability)
            assert shift == pytest.approx(log_odds(0.1) - log_odds(0.6), rel=1e-6)
            assert after.thresholds == {"pneumonia": after.threshold}


def test_an_estimated_prior_is_that_of_the_films_which_are_not_for_review(
    run: Path, films: Path
) -> None:
    pipeline = xrai.load(str(run), prior="estimate")
    rows, plain = pipeline.predict(films), xrai.load(str(run)).predict(films)
    assert calls(rows) == calls(plain)
    used = [row.probability for row in plain if row.decision != "review"]
    assert {row.prior_source for row in rows} == {f"estimated from {len(used)} images"}
    (share,) = {row.prior["pneumonia"] for row in rows}
    odds = np.array(used) / 0.6 * share + (1 - np.array(used)) / 0.4 * (1 - share)
    assert (np.array(used) / 0.6 * share / odds).mean() == pytest.approx(share, abs=1e-5)
    # each call has its own
    normal = [film for film, label in zip(*phantoms(NUM_FILMS), strict=True) if not label]
    (lower,) = {row.prior["pneumonia"] for row in pipeline.predict(normal * 3)}
    assert lower < share / 2


@pytest.mark.parametrize("labels", [CLASSES, FINDINGS], ids=lambda labels: labels.task)
def test_several_outputs_have_a_column_for_each_share(
    labels: LabelSpec, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_random_run(tmp_path, labels), tmp_path / "out"
    shares = dict(zip(labels.classes, (0.5, 0.25, 0.25), strict=True))
    if labels is FINDINGS:
        del shares["Edema"]
    text = "|".join(f"{name.lower()}={share}" for name, share in shares.items())
    arguments = [f"--run={folder}", f"--prior={text}", f"--out={out}", str(films), "--no_overlays"]
    for _ in range(2):  # its own folder is taken again
        assert call_main(predict, *arguments, capsys=capsys) == (0, [])
    plain = xrai.load(str(folder)).predict(films)
    rows = xrai.load(str(folder), prior=shares).predict(films)
    assert calls(rows) == calls(plain)
    with (out / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    content = json.loads((out / "predictions.json").read_text())
    header = list(table[0])
    at = header.index(f"prior_{labels.classes[0]}")
    expected = [*(f"prior_{name}" for name in shares), "source_of_prior", "model"]
    assert header[at:] == expected
    own = xrai.load(str(folder)).model.priors
    for row, before, cells, entry in zip(rows, plain, table, content["predictions"], strict=True):
        assert row.prior == shares == entry["prior"]
        assert {name: float(cells[f"prior_{name}"]) for name in shares} == shares
        assert cells["source_of_prior"] == entry["source_of_prior"] == "given"
        assert entry["probabilities"] == dict(row.probabilities)
        if labels is FINDINGS and row.is_readable:
            assert row.probabilities["Edema"] == before.probabilities["Edema"]
        elif row.is_readable:
            parts = {
                name: before.probabilities[name] * shares[name] / at
                for name, at in zip(labels.classes, own, strict=True)
            }
            total = sum(parts.values())
            assert row.probabilities == pytest.approx({k: v / total for k, v in parts.items()})
    assert content["prior"] == {
        "shares": shares,
        "source": "given",
        "thresholds": dict(rows[0].thresholds),
        "shares_of_run": dict(zip(labels.classes, own, strict=True)),
    }


def test_the_table_and_its_last_lines_say_the_prior(
    run: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [f"--run={run}", f"--out={out}", str(films / "00.png"), str(films / "none.txt")]
    for options in ([], ["--prior=0.25"]):
        assert call_main(predict, *arguments, *options, capsys=capsys) == (0, [])
    pipeline = xrai.load(str(run), prior=0.25)
    rows = pipeline.predict([films / "00.png", films / "none.txt"])
    with (out / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    content = json.loads((out / "predictions.json").read_text())
    names = ["path", "probability", "threshold", "decision", "reason"]
    assert list(table[0]) == [*names, "prior", "source_of_prior", "model"]
    for row, cells, entry in zip(rows, table, content["predictions"], strict=True):
        assert (cells["prior"], cells["source_of_prior"]) == ("0.25", "given")
        assert (entry["prior"], entry["source_of_prior"]) == (0.25, "given")
        assert float(cells["threshold"]) == entry["threshold"] == row.threshold != 0.5
    assert (content["threshold"], content["prior"]["shares_of_run"]) == (0.5, {"pneumonia": 0.6})
    assert content["prior"]["thresholds"] == {"pneumonia": rows[0].threshold}
    lines = predict.format_table(rows, pipeline.model, out=None)
    limit = f"{rows[0].threshold:.3f} up, the threshold of tiny, moved to the prior"
    assert f"pneumonia is called from a probability of {limit}" in lines
    assert "prior: pneumonia 0.250, given; it changes no call" in lines


def test_a_prior_that_cannot_be_used_is_one_clear_line(
    run: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for prior, message in (
        ("estimate", "1 images that are not for review are too few to estimate shares from"),
        ("2", "prior = '2': '2' is no share"),
    ):
        arguments = [f"--run={run}", f"--prior={prior}", str(films / "00.png")]
        status, (line,) = call_main(predict, *arguments, capsys=capsys)
        assert status == 2 and message in line
    shutil.copytree(run, tmp_path / "old")
    content = torch.load(run / "model.pt", weights_only=True)
    del content["priors"]
    content["typicality"] = without_detail(content["typicality"])
    torch.save({**content, "schema_version": 3}, tmp_path / "old" / "model.pt")
    assert xrai.load(str(tmp_path / "old")).predict(films / "00.png")[0].probability is not None
    with pytest.raises(RunError, match=r"run tiny does not keep the shares .* train it again"):
        xrai.load(str(tmp_path / "old"), prior=0.1)
    with pytest.raises(UserError, match="is no share"):
        xrai.load(str(run), prior=-0.1)


def test_each_prior_has_a_folder_of_its_own() -> None:
    shares = {"A": 0.7, "B": 0.2, "C": 0.1}
    one, same, other = (
        evaluate.prior_suffix(Prior(each, "given"))
        for each in (shares, dict(reversed(shares.items())), {**shares, "A": 0.70001})
    )
    assert one == same != other
    assert re.fullmatch("-prior-[0-9a-f]{8}", one)
    assert evaluate.prior_suffix(None) == "-prior-estimate"
    outputs = outputs_of(LabelSpec("multiclass", ("A", "B", "C")), [1.0], [], "given")
    given = itertools.permutations(("A=0.7", "B=0.2", "C=0.1"))
    read = {evaluate.prior_suffix(read_prior("|".join(each), outputs)) for each in given}
    assert len(read) == 1


@pytest.mark.slow
def test_evaluate_measures_at_a_prior_with_the_same_calls(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished.folder, tmp_path / "submit" / "whole")
    shutil.rmtree(run / "evaluate", ignore_errors=True)
    arguments = [f"--run={run}", f"--dataset={finished.dataset}", "--evaluate.num_bootstrap=50"]
    for options in ([], ["--prior=0.1"], ["--prior=0.2"], ["--prior=pneumonia=0.20"]):
        assert call_main(evaluate, *arguments, *options, capsys=capsys) == (0, [])
    (plain,) = (run / "evaluate").glob("test-????????????")
    contents = {
        path.parent: json.loads(path.read_text())
        for path in plain.parent.glob(f"{plain.name}-prior-*/metrics.json")
    }
    assert sorted(content["prior"]["share"] for content in contents.values()) == [0.1, 0.2]
    moved = next(path for path, each in contents.items() if each["prior"]["share"] == 0.1)
    before, after = (json.loads((each / "metrics.json").read_text()) for each in (plain, moved))
    assert after["counts"] == before["counts"] and "prior" not in before
    own = torch.load(run / "model.pt", weights_only=True)["priors"][0]
    assert after["prior"] == {
        "share": 0.1,
        "source": "given",
        "threshold_of_run": before["threshold"],
    }
    expected = log_odds(before["threshold"]) + log_odds(0.1) - log_odds(own)
    assert log_odds(after["threshold"]) == pytest.approx(expected)
    assert after["threshold_source"] == "that of the run, moved to the prior"
    for name in ("auroc", "sensitivity", "specificity"):
        assert after["metrics"][name] == before["metrics"][name]
    assert after["calibration"]["before"] != before["calibration"]["before"]
    assert after["metrics"]["brier"] != before["metrics"]["brier"]
    page = (moved / "report.html").read_text()
    assert "<dt>Prior</dt><dd>pneumonia 0.100, given; it changes scores and no call</dd>" in page
    status, (line,) = call_main(evaluate, *arguments, "--prior=estimate", capsys=capsys)
    assert status == 2 and "are too few to estimate shares from" in line
