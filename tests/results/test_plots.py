"""Pictures are there, whole, the same each time, and say when they show phantoms."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.results.many import KINDS, make_many
from tests.results.small import make_scores
from xrai.labels import Task
from xrai.results import plots, sheets, style
from xrai.results.calibration import calibrated
from xrai.results.history import EpochRow
from xrai.results.intervals import wilson_interval
from xrai.results.measure import measure
from xrai.results.metrics import calibration_bins
from xrai.results.types import Scores, SplitResults

_FIRST = {"train_loss": 0.7, "val_loss": 0.6, "train_accuracy": 0.6, "val_accuracy": 0.7}
_LAST = {"train_loss": 0.4, "val_loss": 0.3, "train_accuracy": 0.8, "val_accuracy": 0.9}
HISTORY = [
    EpochRow(epoch=1, step=1, shifted_accuracy=0.6, **_FIRST),
    EpochRow(epoch=2, step=2, train_loss=0.5, train_accuracy=0.7),  # the rest is NaN
    EpochRow(epoch=3, step=3, shifted_accuracy=0.8, **_LAST),
]


def measured(labels: Any, scores: Any, **options: Any) -> tuple[Scores, SplitResults]:
    made = make_scores(labels, scores, **options)
    return made, measure(made, num_bootstrap=10)


def test_curves_show_train_and_validation_and_are_redrawn_in_place(tmp_path: Path) -> None:
    plots.draw_curves(HISTORY[:1], tmp_path / "curves")
    first = {
        name: (tmp_path / "curves" / name).read_bytes() for name in ("loss.png", "accuracy.png")
    }
    plots.draw_curves(HISTORY, tmp_path / "curves", best_epoch=3)
    for name, before in first.items():
        path = tmp_path / "curves" / name
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 400
        assert path.read_bytes() != before
    for colour in (style.TRAIN, style.VALIDATION, style.SHIFTED):
        assert has_colour(tmp_path / "curves/accuracy.png", colour)
    assert not has_colour(tmp_path / "curves/loss.png", style.SHIFTED)
    assert sorted(path.name for path in (tmp_path / "curves").iterdir()) == [
        "accuracy.png",
        "loss.png",
    ]


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
    folders = ("a", "b") if len(labels) == 5 else ("a",)
    for folder in folders:
        plots.draw_plots(*measured(labels, scores), tmp_path / folder / "plots")
    names = [
        "abstention.png",
        "calibration.png",
        "confusion.png",
        "precision_recall.png",
        "roc.png",
        "scores.png",
    ]
    assert sorted(path.name for path in (tmp_path / "a/plots").iterdir()) == names
    for name in names:
        data = (tmp_path / "a/plots" / name).read_bytes()
        assert data == (tmp_path / folders[-1] / "plots" / name).read_bytes()
        assert b"Software" not in data
        assert b"tIME" not in data


def test_phantoms_are_named_as_phantoms_in_every_figure(tmp_path: Path) -> None:
    labels, scores = [0, 1, 1], [0.2, 0.4, 0.9]
    for is_phantom in (False, True):
        folder = tmp_path / str(is_phantom)
        plots.draw_curves(HISTORY, folder, is_phantom=is_phantom)
        plots.draw_plots(*measured(labels, scores, is_phantom=is_phantom), folder)
        note = style.note_line(is_phantom=is_phantom)
        sheets.draw_sheet([np.zeros((8, 8), np.uint8)], ["a"], folder / "sheet.png", note=note)
        sheets.draw_class_counts({"train": {"normal": 1}}, folder / "counts.png", note=note)
    paths = [path.relative_to(tmp_path / "True") for path in (tmp_path / "True").rglob("*.png")]
    assert len(paths) == 10
    for path in paths:
        assert (tmp_path / "True" / path).read_bytes() != (
            tmp_path / "False" / path
        ).read_bytes(), path


def test_the_reliability_plot_shows_the_scores_before_calibration_where_it_changed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "_PLOTS", {"calibration": plots._PLOTS["calibration"]})
    labels, scores = [0, 0, 1, 1] * 9, [0.3, 0.6, 0.4, 0.7] * 9
    for name, temperature in (("same", 1.0), ("other", 2.0)):
        found = measured(labels, scores, temperature=temperature)
        plots.draw_plots(*found, tmp_path / name)
    same, other = (tmp_path / name / "calibration.png" for name in ("same", "other"))
    assert same.read_bytes() != other.read_bytes()
    assert has_colour(other, "#848e9e")  # TRAIN, let through a little
    assert not has_colour(same, "#848e9e")


def test_the_reliability_plot_shows_both_temperatures_at_the_prior() -> None:
    labels, figure = np.array([0, 0, 1, 1] * 9), Figure()
    scores, _ = measured(labels, [0.3, 0.6, 0.4, 0.7] * 9, temperature=2.0)
    moved = scores.outputs[0].move(0.1, -2.0, "given")
    scores = replace(scores, outputs=(moved,))
    plots._draw_calibration(figure, scores.labelled(), measure(scores, num_bootstrap=10).main)
    (thin,) = (line for line in figure.axes[0].lines if line.get_label() == "temperature 1")
    bins = calibration_bins(labels, calibrated(scores.logits[:, 0] - 2.0))
    assert thin.get_xdata() == pytest.approx([each.mean_score for each in bins if each.num_images])


def test_the_bars_of_the_reliability_plot_count_patients_and_not_their_images() -> None:
    labels = np.repeat([0, 1, 1, 0], 6)  # four patients with six images each, in one bin
    scores = make_scores(labels, [0.55] * 24, patients=np.repeat([*"abcd"], 6).tolist())
    found, results, figure = scores.labelled(), measure(scores, num_bootstrap=10).main, Figure()
    plots._draw_calibration(figure, found, results)
    panel = Figure().subplots()
    plots._panel_calibration(panel, found, results)
    for axes in figure.axes[0], panel:
        lines = [np.asarray(line.get_data()) for line in axes.lines]  # (2, n)
        (bar,) = [ends for x, ends in lines if len(x) == 2 and np.ptp(x) == 0]
        assert tuple(bar) == pytest.approx(wilson_interval(0.5, 4))


def test_the_abstention_plot_marks_what_goes_to_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "_PLOTS", {"abstention": plots._PLOTS["abstention"]})
    labels, scores = [0, 0, 1, 1] * 9, [0.1, 0.9, 0.2, 0.95] * 9
    for name, atypicality in (("with", np.linspace(0, 1.2, 36)), ("without", None)):
        found = measured(labels, scores, atypicality=atypicality)
        plots.draw_plots(*found, tmp_path / name)
        path = tmp_path / name / "abstention.png"
        assert has_colour(path, style.CURVE)
        for colour in (style.SHIFTED, style.PNEUMONIA):
            assert has_colour(path, colour) == (name == "with")


def test_drawing_leaves_matplotlib_as_it_was_and_opens_no_display() -> None:
    program = (
        "import sys, pathlib, tempfile, matplotlib as mpl; from xrai.results import plots\n"
        "before = mpl.rcParams.copy()\n"
        "plots.draw_curves([], pathlib.Path(tempfile.mkdtemp()))\n"
        "assert mpl.rcParams.copy() == before\n"
        "assert not {'matplotlib.pyplot', 'tkinter', 'torch', 'tensorboard'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def has_colour(path: Path, colour: str) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((pixels == wanted).all(axis=1).sum() >= 5)


@pytest.mark.parametrize(
    ("task", "num"), [KINDS[0], *(pytest.param(*kind, marks=pytest.mark.ci) for kind in KINDS[1:])]
)
def test_several_outputs_are_drawn_side_by_side_in_a_bounded_number_of_figures(
    tmp_path: Path, task: Task, num: int
) -> None:
    plots.draw_plots(*make_many(task, num), tmp_path)
    names = ["abstention", "calibration", "confusion", "overview", "precision_recall", "roc"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert max(image.size) < 1700, path.name
    for name in ("overview", "roc", "precision_recall", "calibration"):
        assert has_colour(tmp_path / f"{name}.png", style.CURVE)


def test_several_outputs_look_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        plots.draw_plots(*make_many("multilabel", 2), tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
