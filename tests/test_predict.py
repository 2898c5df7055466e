"""Prediction gives every file a row, scores as training's own evaluation does, and refuses what can not work."""

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xrai import predict
from xrai.config import Config, Images
from xrai.dataset.phantom import make_phantoms
from xrai.errors import CorruptError, RunError, SourceError, UserError
from xrai.learning.predictor import TrainedModel, build_model, load_model, save_model
from xrai.predict import BATCH_SIZE, Prediction, classify, find_files, fit_to_run, format_table, score
from xrai.store import open_store

CPU = torch.device("cpu")
MAX_PIXELS = 20_000


@dataclass(frozen=True)
class Finished:
    """A run that was trained here, and the images that it was trained on."""

    source: Path
    run: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One epoch on 60 phantoms, by the commands."""
    folder = tmp_path_factory.mktemp("finished")
    make_phantoms(folder / "phantoms", num_images=60, seed=3, workers=1)
    for command in (
        ("preprocess", "--source=phantoms", "--dataset=dataset", "--workers=1", "--splits.test_fraction=0.3"),
        ("train", "--dataset=dataset", "--artifacts=submit", "--run_id=tiny", "--train.epochs=1", "--train.threads=1"),
    ):
        command_line = [sys.executable, "-m", f"xrai.{command[0]}", *command[1:]]
        done = subprocess.run(command_line, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    return Finished(folder / "phantoms", folder / "submit/tiny")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of fresh weights, whose model.pt alone is there."""
    folder = tmp_path / "runs" / "fresh"
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    config = Config(images=Images(max_pixels=MAX_PIXELS))
    network = build_model(config.model)
    save_model(
        folder / "model.pt", network, config=config, classes=("NORMAL", "PNEUMONIA"), threshold=0.5, run_id="fresh",
        fingerprint="f" * 64,
    )  # fmt: skip
    return folder


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Two good files, one of them deeper, and five that are none."""
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    noise = np.random.default_rng(5).integers(0, 256, (90, 120), np.uint8)
    Image.fromarray(noise).save(folder / "a, film.png")
    Image.fromarray(noise[:, ::-1]).save(folder / "more" / "b.jpeg")
    (folder / "cut.png").write_bytes((folder / "a, film.png").read_bytes()[:700])
    (folder / "empty.jpg").touch()
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "more" / "notes.txt").write_text("seen by Dr. Who")
    Image.new("L", (200, 101)).save(folder / "vast.png")
    return folder


def call(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    predict.main()


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def model_of(run: Path) -> TrainedModel:
    return load_model(open_store(str(run)), folder=run)


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
def test_files_score_as_they_did_in_the_evaluation_at_the_end_of_training(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = {row["source"]: row for row in read_table(finished.run)}
    paths = [finished.source / source for source in evaluated]
    call("--run", finished.run, *paths, "--out", tmp_path, monkeypatch=monkeypatch)
    predicted = {row["path"]: row for row in read_table(tmp_path)}
    assert len(predicted) == len(evaluated) >= 5
    for path, source in zip(paths, evaluated, strict=True):
        row = predicted[str(path)]
        assert float(row["probability"]) == pytest.approx(float(evaluated[source]["score"]), abs=1e-5)
        assert row["call"] == evaluated[source]["call"]
    threshold = json.loads((finished.run / "summary.json").read_text())["threshold"]
    assert {float(row["threshold"]) for row in predicted.values()} == {threshold}


def test_rows_keep_their_files_across_batches_and_unreadable_ones_between(run: Path, tmp_path: Path) -> None:
    num_files = 2 * BATCH_SIZE + 3
    for number in range(num_files):
        path = tmp_path / "many" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        if number % 5 == 2:
            path.write_bytes(b"no picture")
        else:
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64), np.uint8)).save(path)
    model = model_of(run)
    files = find_files([str(tmp_path / "many")])
    rows = list(classify(model, files, images=fit_to_run(Config().images, model), device=CPU))
    assert [row.path for row in rows] == [str(tmp_path / "many" / f"{number:03d}.png") for number in range(num_files)]
    usable = [number for number in range(num_files) if number % 5 != 2]
    pictures = np.stack([np.random.default_rng(n).integers(0, 256, (1, 64, 64), np.uint8) for n in usable])
    expected = dict(zip(usable, score(model.network, pictures, device=CPU), strict=True))
    for number, row in enumerate(rows):
        if number in expected:
            assert row.probability == pytest.approx(expected[number], abs=1e-6) and row.reason == ""
        else:
            assert row == Prediction(row.path, None, 0.5, "", "is not a JPEG or PNG file")
    assert len(set(expected.values())) > len(usable) / 2


def test_the_threshold_itself_is_called_pneumonia(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)).save(path)
    model = model_of(run)
    images = fit_to_run(Config().images, model)
    [row] = classify(model, find_files([str(path)]), images=images, device=CPU)
    assert row.probability is not None
    for threshold, expected in ((row.probability, "PNEUMONIA"), (np.nextafter(row.probability, 1), "NORMAL")):
        changed = TrainedModel(**{**model.__dict__, "threshold": float(threshold)})
        [row] = classify(changed, find_files([str(path)]), images=images, device=CPU)
        assert (row.call, row.threshold) == (expected, threshold)


# --------------------------------------------------------------------------------------------------------------- rows


def test_every_file_is_a_row_and_an_unreadable_one_has_its_reason(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (films / ".hidden.png").touch()
    call("--run", run, films, "--out", tmp_path / "new" / "out", monkeypatch=monkeypatch)
    rows = read_table(tmp_path / "new" / "out")
    assert list(rows[0]) == ["path", "probability", "threshold", "call", "reason"]
    reasons = {row["path"].removeprefix(f"{films}/"): row["reason"] for row in rows}
    assert reasons.pop("a, film.png") == "" and reasons.pop("more/b.jpeg") == ""
    assert reasons.pop("cut.png").startswith("is cut short or damaged")
    assert reasons == {
        "empty.jpg": "is empty (0 bytes)",
        "gone.png": "can not be read (No such file or directory)",
        "more/notes.txt": "is not a JPEG or PNG file",
        "vast.png": f"declares 200 x 101 pixels, more than images.max_pixels = {MAX_PIXELS}",
    }
    for row in rows:
        assert bool(row["reason"]) == (row["probability"] == "") == (row["call"] == "")
        assert row["threshold"] == "0.5"
    printed = capsys.readouterr()
    assert "1 hidden files" in printed.err
    lines = printed.out.splitlines()
    assert len([line for line in lines if line.startswith(f"{films}/")]) == 7
    assert f"{films}/empty.jpg" in printed.out and "none: is empty (0 bytes)" in printed.out
    assert "+ 5 that could not be read" in printed.out
    assert f"table: {tmp_path}/new/out/predictions.csv  {tmp_path}/new/out/predictions.json" in lines
    assert "No medical device" in lines[-1]


def test_json_holds_the_same_rows_and_what_classified(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("--run", run, films, "--out", tmp_path / "out", monkeypatch=monkeypatch)
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    rows = content.pop("predictions")
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == read_table(tmp_path / "out")
    assert content == {
        "schema_version": 1, "tool_version": content["tool_version"], "note": content["note"], "run_id": "fresh",
        "dataset_fingerprint": "f" * 64, "classes": ["NORMAL", "PNEUMONIA"], "threshold": 0.5, "image_size": 64,
        "fit": "crop", "num_files": 7, "num_unreadable": 5,
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.json"]


def test_without_out_all_rows_are_printed_and_nothing_is_written(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    call("--run", "runs/fresh", "films", monkeypatch=monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("films/")]) == 7
    assert not any("predictions.csv" in line for line in lines)


def test_a_long_table_is_printed_in_part_where_files_hold_all_of_it(run: Path) -> None:
    rows = [Prediction(f"{number}.png", 0.25, 0.5, "NORMAL", "") for number in range(60)]
    lines = format_table(rows, model_of(run), out=open_store("/nowhere"))
    assert len([line for line in lines if line.endswith("NORMAL")]) == 50
    assert "... and 10 more in predictions.csv" in lines
    assert "files: 60 = 60 NORMAL + 0 PNEUMONIA + 0 that could not be read" in lines
    assert len([line for line in format_table(rows, model_of(run), out=None) if line.endswith("NORMAL")]) == 60


def test_names_can_not_steer_the_terminal(run: Path) -> None:
    lines = format_table(
        [Prediction("\x1b[2Jfilm\n.png", None, 0.5, "", "is \x07 odd")], model_of(run), out=None
    )  # fmt: skip
    assert lines[1].startswith("\ufffd[2Jfilm\ufffd.png") and lines[1].endswith("none: is \ufffd odd")


def test_files_folders_and_zips_keep_their_order_and_a_file_named_twice_is_one_row(films: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(films / "a, film.png", "train/x.png")
    named = [str(films / "more" / "b.jpeg"), str(tmp_path / "packed.zip"), f"{films}/"]
    paths = [file.path for file in find_files(named)]
    assert paths[:3] == [f"{films}/more/b.jpeg", f"{tmp_path}/packed.zip/train/x.png", f"{films}/a, film.png"]
    assert len(paths) == 8


def test_a_hidden_file_that_is_named_is_classified(films: Path) -> None:
    shutil.copy(films / "a, film.png", films / ".hidden.png")
    [file] = find_files([str(films / ".hidden.png")])
    assert file.path.endswith(".hidden.png")


def test_the_limit_of_pixels_is_the_runs_unless_another_is_given(run: Path, films: Path) -> None:
    model = model_of(run)
    assert fit_to_run(Images(), model).max_pixels == MAX_PIXELS
    raised = fit_to_run(Images(max_pixels=MAX_PIXELS + 200), model)
    [row] = classify(model, find_files([str(films / "vast.png")]), images=raised, device=CPU)
    assert row.reason == ""


# ----------------------------------------------------------------------------------------------------------- refusals


def test_no_run_and_no_path_are_refused(run: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--run is missing: give the address of a finished run"):
        call(films, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="no PATH given: name JPEG or PNG files or folders of them"):
        call("--run", run, monkeypatch=monkeypatch)


def test_a_path_that_is_missing_or_no_file_is_refused_before_any_work(films: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bare").mkdir()
    for path, message in (
        (tmp_path / "typo.png", "there is no file or folder"),
        (tmp_path / "pipe", "is neither a file nor a folder"),
        (tmp_path / "bare", "holds no files to classify"),
        (tmp_path / "\udcff.png", "is not UTF-8; rename it"),
    ):
        with pytest.raises(UserError, match=message):
            find_files([str(films), str(path)])
    (tmp_path / "no.zip").write_text("no archive")
    with pytest.raises(SourceError, match=r"no\.zip can not be read as a zip archive"):
        find_files([str(tmp_path / "no.zip")])


def test_a_folder_without_a_model_and_a_damaged_one_are_refused(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=r"holds no model\.pt: no such run, or its training has not ended"):
        call("--run", tmp_path / "runs" / "other", films, monkeypatch=monkeypatch)
    (run / "model.pt").write_bytes((run / "model.pt").read_bytes()[:1000])
    with pytest.raises(CorruptError, match=r"model\.pt"):
        call("--run", run, films, monkeypatch=monkeypatch)


def test_another_size_or_fit_than_the_runs_is_refused(run: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, message in (
        ("--images.size=128", "images.size = 128, but run fresh was trained with 64: leave the key out"),
        ("--images.fit=pad", "images.fit = 'pad', but run fresh was trained with 'crop': leave the key out"),
    ):
        with pytest.raises(RunError, match=message):
            call("--run", run, films, option, monkeypatch=monkeypatch)


def test_an_unwritable_place_is_refused_before_any_work(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is not a folder; name another folder or bucket with --out"):
        call("--run", run, films, "--out", tmp_path / "file", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == ""


def test_when_no_file_can_be_read_the_table_says_why_and_the_status_is_2(run: Path, films: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xrai.predict", "--run", run, films / "empty.jpg", films / "cut.png"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "none: is empty (0 bytes)" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        f"xrai: error: none of the 2 files could be read as an image: {films}/empty.jpg is empty (0 bytes)"
    )
