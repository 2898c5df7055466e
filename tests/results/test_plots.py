"""Pictures are there, whole, the same each time, and say when they show phantoms."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xrai.results import plots
from xrai.results.metrics import evaluate_scores

HISTORY: list[dict[str, Any]] = [
    {"epoch": 1, "train_loss": 0.7, "val_loss": 0.6, "train_accuracy": 0.6, "val_accuracy": 0.7},
    {"epoch": 2, "train_loss": 0.5, "val_loss": math.nan, "train_accuracy": 0.7, "val_accuracy": None},
    {"epoch": 3, "train_loss": 0.4, "val_loss": 0.3, "train_accuracy": 0.8, "val_accuracy": 0.9},
]
HISTORY = [{**row, "shifted_accuracy": row["val_accuracy"] and row["val_accuracy"] - 0.1} for row in HISTORY]


def results(labels: list[int], scores: list[float]) -> dict[str, Any]:
    return evaluate_scores(
        labels, scores, threshold=0.5, patients=np.arange(len(labels)), subtypes=[""] * len(labels), split="val",
        threshold_source="given", num_bootstrap=10,
    )  # fmt: skip


def test_curves_show_train_and_validation_and_are_redrawn_in_place(tmp_path: Path) -> None:
    plots.draw_curves(HISTORY[:1], tmp_path)
    first = {name: (tmp_path / "curves" / name).read_bytes() for name in ("loss.png", "accuracy.png")}
    plots.draw_curves(HISTORY, tmp_path, best_epoch=3)
    for name, before in first.items():
        path = tmp_path / "curves" / name
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 400
        assert path.read_bytes() != before
    for colour in (plots.TRAIN, plots.VALIDATION, plots.SHIFTED):
        assert has_colour(tmp_path / "curves/accuracy.png", colour)
    assert not has_colour(tmp_path / "curves/loss.png", plots.SHIFTED)
    assert sorted(path.name for path in (tmp_path / "curves").iterdir()) == ["accuracy.png", "loss.png"]


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        ([0, 0, 1, 1, 1], [0.1, 0.6, 0.4, 0.8, 0.99]),
        ([1, 1], [0.2, 0.9]),  # one class: no curve, but a picture
        ([0], [0.5]),
        ([0, 1], [0.5, 0.5]),
        ([0, 1], [0.0, 1.0]),
        ([], []),
    ],
)
def test_every_plot_is_drawn_for_any_scores_the_same_each_time(
    tmp_path: Path, labels: list[int], scores: list[float]
) -> None:
    metrics = results(labels, scores)
    for folder in ("a", "b"):
        plots.draw_plots(labels, scores, metrics, tmp_path / folder)
    names = ["abstention.png", "calibration.png", "confusion.png", "precision_recall.png", "roc.png", "scores.png"]
    assert sorted(path.name for path in (tmp_path / "a/plots").iterdir()) == names
    for name in names:
        data = (tmp_path / "a/plots" / name).read_bytes()
        assert data == (tmp_path / "b/plots" / name).read_bytes()
        assert b"Software" not in data
        assert b"tIME" not in data


def test_phantoms_are_named_as_phantoms_in_every_picture(tmp_path: Path) -> None:
    labels, scores = [0, 1, 1], [0.2, 0.4, 0.9]
    metrics = results(labels, scores)
    for is_phantom in (False, True):
        folder = tmp_path / str(is_phantom)
        plots.draw_curves(HISTORY, folder, is_phantom=is_phantom)
        plots.draw_plots(labels, scores, metrics, folder, is_phantom=is_phantom)
        plots.draw_sheet([np.zeros((8, 8), np.uint8)], ["a"], folder / "sheet.png", is_phantom=is_phantom)
        plots.draw_class_counts({"train": {"normal": 1}}, folder / "counts.png", is_phantom=is_phantom)
    paths = [path.relative_to(tmp_path / "True") for path in (tmp_path / "True").rglob("*.png")]
    assert len(paths) == 10
    for path in paths:
        assert (tmp_path / "True" / path).read_bytes() != (tmp_path / "False" / path).read_bytes(), path


def test_the_reliability_plot_shows_the_scores_before_calibration_where_it_changed_them(tmp_path: Path) -> None:
    labels, before, after = [0, 0, 1, 1] * 9, [0.1, 0.9, 0.2, 0.95] * 9, [0.3, 0.6, 0.4, 0.7] * 9
    metrics = results(labels, after)
    plots.draw_calibration(labels, after, metrics, tmp_path / "same.png", uncalibrated=before)
    metrics["calibration"]["temperature"] = 2.0
    plots.draw_calibration(labels, after, metrics, tmp_path / "other.png", uncalibrated=before)
    assert (tmp_path / "same.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    assert has_colour(tmp_path / "other.png", "#848e9e")  # TRAIN, let through a little
    assert not has_colour(tmp_path / "same.png", "#848e9e")


def test_the_abstention_plot_marks_what_the_run_left_to_a_person(tmp_path: Path) -> None:
    labels, scores = [0, 0, 1, 1] * 9, [0.1, 0.9, 0.2, 0.95] * 9
    for name, atypicality in (("with", np.linspace(0, 1.2, 36)), ("without", None)):
        metrics = evaluate_scores(
            labels, scores, threshold=0.5, patients=np.arange(36), subtypes=[""] * 36, split="val",
            threshold_source="given", num_bootstrap=10, atypicality=atypicality,
        )  # fmt: skip
        plots.draw_abstention(metrics, tmp_path / f"{name}.png")
        assert has_colour(tmp_path / f"{name}.png", plots.CURVE)
        for colour in (plots.SHIFTED, plots.PNEUMONIA):
            assert has_colour(tmp_path / f"{name}.png", colour) == (name == "with")


def test_a_sheet_shows_coloured_pictures_beside_grey_ones(tmp_path: Path) -> None:
    grey = np.full((32, 32), 77, np.uint8)
    plots.draw_sheet([grey, np.full((32, 32, 3), (200, 30, 60), np.uint8)], ["a", "b"], tmp_path / "sheet.png")
    assert has_colour(tmp_path / "sheet.png", "#4d4d4d")
    assert has_colour(tmp_path / "sheet.png", "#c81e3c")


def test_a_sheet_shows_the_grey_values_of_its_images_and_any_name(tmp_path: Path) -> None:
    images = [np.full((32, 32), grey, np.uint8) for grey in (0, 77, 255, 77, 77, 77, 77)]
    titles = ["a.png", "$\\frac{b$_{.png", "x" * 200, "日本.png", "line\nbreak\x00", "", "ok"]
    plots.draw_sheet(images, titles, tmp_path / "deep/er/sheet.png", heading="$h_", note="n$")
    assert has_colour(tmp_path / "deep/er/sheet.png", "#4d4d4d")
    plots.draw_sheet([], [], tmp_path / "empty.png")
    with pytest.raises(ValueError, match="7 images and 1 titles"):
        plots.draw_sheet(images, ["a"], tmp_path / "wrong.png")
    assert not (tmp_path / "wrong.png").exists()


def test_class_counts_are_drawn_in_the_colours_of_their_classes(tmp_path: Path) -> None:
    counts = {"train": {"normal": 1341, "pneumonia": 3875}, "val": {"normal": 0, "pneumonia": 0}}
    plots.draw_class_counts(counts, tmp_path / "counts.png")
    with Image.open(tmp_path / "counts.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    blue = (pixels[..., 2].astype(int) - pixels[..., 0] > 100).sum()
    orange = (pixels[..., 0].astype(int) - pixels[..., 2] > 150).sum()
    assert orange / blue == pytest.approx(3875 / 1341, rel=0.1)
    plots.draw_class_counts({}, tmp_path / "none.png")


def test_drawing_leaves_matplotlib_as_it_was_and_opens_no_display() -> None:
    program = (
        "import sys, pathlib, tempfile, matplotlib as mpl; from xrai.results import plots\n"
        "before = mpl.rcParams.copy()\n"
        "plots.draw_class_counts({'train': {'a': 1}}, pathlib.Path(tempfile.mkdtemp()) / 'x.png')\n"
        "assert mpl.rcParams.copy() == before\n"
        "assert not {'matplotlib.pyplot', 'tkinter', 'torch', 'tensorboard'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def has_colour(path: Path, colour: str) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((pixels == wanted).all(axis=1).sum() >= 5)
