"""Plots of results: curves, ROC, precision-recall, confusion, calibration, scores, abstention.

The one home of matplotlib, by its object-oriented API: no pyplot, no global figure, no display. A
PNG is written whole or not at all, with the same bytes for the same input and version of
matplotlib. Numbers in a plot are those of the results.
"""

import gc
import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from xrai.files import write_atomically
from xrai.labels import Task
from xrai.results import style
from xrai.results.calibration import calibrated
from xrai.results.history import EpochRow
from xrai.results.intervals import wilson_interval
from xrai.results.lettering import short_names, shortened
from xrai.results.metrics import (
    METRICS,
    calibration_bins,
    cumulative_calls,
    format_interval,
    format_value,
    precision_recall,
)
from xrai.results.style import CURVE, INK, MUTED, NORMAL, PAPER, PNEUMONIA, note_line
from xrai.results.types import (
    Abstention,
    Estimate,
    Labelled,
    OutputResults,
    Scores,
    SplitResults,
    told_images,
)

_Look = dict[str, Any]  # options of matplotlib, which documents plain values

_DEFAULTS: _Look = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so plots look alike on all machines
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # file names are shown as they are, dollar signs too
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#b6bdc9",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": style.RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
_SQUARE = (5.6, 5.6)  # inches
_PANEL, _PANELS = 1.85, 5  # inches from one small plot to the next, and of them in a row
_SQUARE_AXES = (0.13, 0.105, 0.81, 0.74)
_CHANCE: _Look = {"color": MUTED, "linewidth": 1, "linestyle": (0, (2, 3))}
_AREA: _Look = {"color": CURVE, "alpha": 0.08, "linewidth": 0}
_POINT: _Look = {"markersize": 9, "markeredgecolor": PAPER, "markeredgewidth": 1.5, "zorder": 5}
_SMALL: _Look = {"fontsize": 8.5, "color": MUTED}
_TOP: _Look = {"xycoords": ("data", "axes fraction")}  # of a note at (x, 1)
_PERCENT = ticker.FuncFormatter(lambda value, _: f"{100 * value:.0f} %")
_SERIES = {  # the lines of each plot: name, colour and column of history.csv
    "loss": (("train", style.TRAIN, "train_loss"), ("validation", style.VALIDATION, "val_loss")),
    "accuracy": (
        ("train", style.TRAIN, "train_accuracy"),
        ("validation", style.VALIDATION, "val_accuracy"),
        ("validation,\naugmented", style.SHIFTED, "shifted_accuracy"),
    ),
    "auroc": (
        ("validation", style.VALIDATION, "val_auroc"),
        ("validation,\naugmented", style.SHIFTED, "shifted_auroc"),
        ("the worst", style.PNEUMONIA, "val_auroc_worst"),
    ),
}
_HEAT_OPACITY = 0.65  # of a heat map where it is 1


def draw_curves(
    history: Sequence[EpochRow],
    folder: Path,
    *,
    task: Task = "binary",
    best_epoch: int | None = None,
    is_phantom: bool = False,
) -> list[str]:
    """Write `folder`/loss.png and accuracy.png: training and validation by epoch. With several
    outputs also auroc.png: their macro mean, and the worst of each epoch. Return the names.

    A value that is NaN leaves a gap.
    """
    epochs = [row.epoch for row in history]
    units = {"loss": "cross-entropy, nats", "accuracy": "share of images correctly classified"}
    if task == "multilabel":
        units["accuracy"] = "share of known labels that are correct"
    if any(math.isfinite(row.val_auroc_worst) for row in history):
        noun = "finding" if task == "multilabel" else "class"
        units["auroc"] = f"macro mean, and the worst {noun} of each epoch"
    for kind, unit in units.items():
        note = note_line(unit, is_phantom=is_phantom)
        title = f"{'AUROC' if kind == 'auroc' else kind.capitalize()} by epoch"
        with _figure(folder / f"{kind}.png", title, note, size=(6.2, 4.3)) as figure:
            axes = figure.add_subplot()
            figure.subplots_adjust(left=0.1, right=0.745, top=0.795, bottom=0.12)
            _draw_series(axes, history, kind)
            if best_epoch is not None:
                axes.axvline(best_epoch, zorder=1, **_CHANCE)
                is_late = best_epoch > (epochs[0] + epochs[-1]) / 2
                side: _Look = {"ha": "right" if is_late else "left", "va": "top"}
                _note(axes, "saved", (best_epoch, 1), (-4 if is_late else 4, -2), **_TOP, **side)
    gc.collect()  # figures are full of cycles: a training grew by 5 MiB an epoch
    return [f"{kind}.png" for kind in units]


def draw_plots(scores: Scores, results: SplitResults, folder: Path) -> None:
    """Write all plots of one split; those of several outputs show them side by side."""
    note = told_images(results.num_images, results.num_patients, results.num_without_patient)
    note = note_line(f"{results.split} split", note, is_phantom=results.is_phantom)
    if results.task == "binary":
        for name, (title, size, draw) in _PLOTS.items():
            with _figure(folder / f"{name}.png", title, note, size=size) as figure:
                draw(figure, scores.labelled(), results.main)
    else:
        noun = "class" if results.task == "multiclass" else "finding"
        for name, (title, draw_all, size_of) in _PLOTS_OF_MANY.items():
            size = size_of(len(results.outputs))
            with _figure(folder / f"{name}.png", f"{title} by {noun}", note, size=size) as figure:
                draw_all(figure, scores, results)
        title, size, _ = _PLOTS["abstention"]
        with _figure(folder / "abstention.png", title, note, size=size) as figure:
            _draw_abstention(figure, results.abstention)
    gc.collect()  # as above, once for all of them: it takes longer than drawing one


def _draw_roc(figure: Figure, found: Labelled, main: OutputResults) -> None:
    output, metrics = main.output, main.whole.metrics
    x = f"1 - specificity: {output.opposite} images called {output.name}"
    axes = _square_axes(figure, x, f"sensitivity: {output.name} images found")
    axes.plot([0, 1], [0, 1], **_CHANCE)
    tp, fp = cumulative_calls(found.labels, found.scores)
    if tp[-1] and fp[-1]:
        axes.fill_between(fp / fp[-1], tp / tp[-1], **_AREA)
        axes.plot(fp / fp[-1], tp / tp[-1], color=CURVE, linewidth=2.2)
        place = 1 - metrics["specificity"].value, metrics["sensitivity"].value
        _mark_threshold(axes, place, output.threshold)
    _print_metric(axes, "auroc", "AUROC", metrics["auroc"])


def _draw_precision_recall(figure: Figure, found: Labelled, main: OutputResults) -> None:
    """The precision-recall curve, with the share of positive images as chance."""
    output, metrics = main.output, main.whole.metrics
    y = f"precision: calls of {output.name} that are correct"
    axes = _square_axes(figure, f"recall: {output.name} images found", y)
    tp, fp = cumulative_calls(found.labels, found.scores)
    if tp[-1] and fp[-1]:
        share = float(found.labels.mean())
        axes.axhline(share, **_CHANCE)
        _note(axes, f"chance {share:.2f}", (0.02, share), (0, -4), va="top")
        recall, precision = precision_recall(tp, fp)
        axes.fill_between(recall, precision, **_AREA)
        axes.plot(recall, precision, color=CURVE, linewidth=2.2)
        if not metrics["ppv"].is_undefined:
            place = metrics["sensitivity"].value, metrics["ppv"].value
            _mark_threshold(axes, place, output.threshold)
    _print_metric(axes, "average_precision", "average precision", metrics["average_precision"])


def _draw_confusion(figure: Figure, found: Labelled, main: OutputResults) -> None:
    """The four counts: a row is a label, a column a call, tinted by the share of the row."""
    counts, names = main.whole.counts, [main.output.opposite, main.output.name]
    cells = (
        ((counts.tn, "correct", NORMAL), (counts.fp, "false alarm", PNEUMONIA)),
        ((counts.fn, "missed", PNEUMONIA), (counts.tp, "correct", NORMAL)),
    )
    shape: _Look = {"boxstyle": "round,pad=0,rounding_size=0.05", "edgecolor": "none"}
    centred: _Look = {"ha": "center", "va": "center"}
    axes = figure.add_axes((0.17, 0.07, 0.79, 0.74))
    axes.set(xlim=(0, 2), ylim=(2, 0), xticks=[0.5, 1.5], yticks=[0.5, 1.5])
    axes.set_xticklabels([f"called {name}" for name in names], color=INK)
    axes.set_yticklabels(names, color=INK, rotation=90, va="center")
    axes.xaxis.tick_top()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for row, entries in enumerate(cells):
        num_row = sum(num for num, _, _ in entries)
        for column, (num, word, colour) in enumerate(entries):
            share = num / num_row if num_row else 0.0
            tint: _Look = {"facecolor": colour, "alpha": 0.06 + 0.44 * share}
            corner = (column + 0.05, row + 0.05)
            axes.add_patch(mpl.patches.FancyBboxPatch(corner, 0.9, 0.9, **tint, **shape))
            x, note = column + 0.5, f"{word} · {100 * share:.1f} % of row" if num_row else word
            axes.text(x, row + 0.47, f"{num:,}", fontsize=26, fontweight="bold", **centred)
            axes.text(x, row + 0.70, note, fontsize=8.5, color="#3d4757", **centred)


def _draw_calibration(figure: Figure, found: Labelled, main: OutputResults) -> None:
    """The reliability plot: observed share of positive images against mean score, by bin.

    If the temperature is not 1, a thin line shows the scores at temperature 1.
    """
    output, metrics = main.output, main.whole.metrics
    bins = calibration_bins(found.labels, found.scores, found.patient_of)
    before = calibration_bins(found.labels, calibrated(found.logits + output.offset))
    thin: _Look = {"color": style.TRAIN, "linewidth": 1.1, "markersize": 3.5, "alpha": 0.85}
    thick: _Look = {"color": CURVE, "linewidth": 1.4, "markersize": 6, "markeredgecolor": PAPER}
    lines = [
        ("temperature 1", before, {**thin, "zorder": 1.5}),
        (f"temperature {output.temperature:.2f}", bins, thick),
    ]
    axes = figure.add_axes((0.13, 0.34, 0.81, 0.50))
    axes.plot([0, 1], [0, 1], **_CHANCE)
    for each in bins:  # shows how little a bin of few patients says; their images are alike
        if each.num_patients:
            ends = wilson_interval(each.share_positive, each.num_patients)
            axes.plot([each.mean_score] * 2, ends, color=CURVE, linewidth=1.6, alpha=0.45)
    for label, shown, look in lines if output.temperature != 1 else lines[1:]:
        points = [(each.mean_score, each.share_positive) for each in shown if each.num_images]
        axes.plot(*np.reshape(points, (-1, 2)).T, marker="o", label=label, **look)
    if output.temperature != 1:
        place: _Look = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.985), "ncols": 2}
        size: _Look = {"fontsize": 8.5, "columnspacing": 1.2, "handlelength": 1.6}
        axes.legend(labelcolor=MUTED, **place, **size)
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel=f"observed share of {output.name}")
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.tick_params(labelbottom=False)
    _print_metric(axes, "ece", "ECE", metrics["ece"])
    brier = f"Brier score {format_value('brier', metrics['brier'].value)}"
    axes.text(0.97, 0.04, brier, transform=axes.transAxes, ha="right", va="center", **_SMALL)
    below = figure.add_axes((0.13, 0.105, 0.81, 0.17), sharex=axes)
    below.set(xlabel=f"score: predicted probability of {output.name}", ylabel="images")
    heights = [each.num_images for each in bins]
    centres = [(each.low + each.high) / 2 for each in bins]
    below.bar(centres, heights, width=0.09, color=CURVE, alpha=0.35)
    below.set_ylim(0, max(1, *heights) * 1.3)
    below.xaxis.set_major_formatter(_PERCENT)
    below.yaxis.set_major_locator(ticker.MaxNLocator(3, integer=True))
    for centre, height in zip(centres, heights, strict=True):
        _note(below, f"{height:,}", (centre, height), (0, 2), ha="center", fontsize=7)


def _draw_scores(figure: Figure, found: Labelled, main: OutputResults) -> None:
    """The histogram of scores by class; solid bars are on the wrong side of the threshold."""
    output, counts = main.output, main.whole.counts
    names = [output.opposite, output.name]
    small: _Look = {"fontsize": 8.5}
    for label, bottom, colour, num_wrong in (
        (0, 0.49, NORMAL, counts.fp),
        (1, 0.125, PNEUMONIA, counts.fn),
    ):
        axes = figure.add_axes((0.185, bottom, 0.785, 0.32))
        own, is_wrong = found.labels == label, found.called != bool(label)
        parts = [found.scores[own & is_wrong], found.scores[own & ~is_wrong]]
        red, green, blue = (1 - 0.4 * (1 - part) for part in to_rgb(colour))
        colours = [to_rgb(colour), (red, green, blue)]
        edges = np.linspace(0, 1, 51).tolist()
        axes.hist(parts, edges, stacked=True, linewidth=0, color=colours)
        # a few mistakes next to a thousand correct calls stay visible
        axes.set_yscale("symlog", linthresh=2, linscale=0.5)
        axes.set(xlim=(0, 1), ylim=(0, max(2.0, axes.get_ylim()[1])))
        axes.yaxis.set_major_locator(ticker.FixedLocator([10**power for power in range(6)]))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_formatter(_PERCENT)
        if output.threshold is not None:
            axes.axvline(output.threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        bold: _Look = {"color": colour, "fontsize": 11, "fontweight": "bold"}
        for height, text, look in (
            (0.78, names[label], bold),
            (0.58, f"{own.sum():,} images", {"color": colour, **small}),
            (0.40, f"{num_wrong:,} called {names[1 - label]}", small),
        ):
            figure.text(0.022, bottom + 0.32 * height, text, va="center", **look)
        if label == 1:
            axes.set_xlabel(f"score: predicted probability of {output.name}")
            continue
        axes.tick_params(labelbottom=False)
        if output.threshold is not None:
            shift, side = (-5, "right") if output.threshold > 0.75 else (5, "left")
            text, place = f"threshold {output.threshold:.3f}", (output.threshold, 1)
            _note(axes, text, place, (shift, 5), ha=side, color=INK, **_TOP)


def _draw_abstention(figure: Figure, abstention: Abstention) -> None:
    """The accuracy of the images that are kept as more and more are left to a person."""
    axes = _square_axes(figure, "share of images left to a person", "accuracy on the others")
    lowest = 1.0
    for name, colour, order in (
        ("least certain first", CURVE, "by_doubt"),
        ("least typical first", style.SHIFTED, "by_atypicality"),
    ):
        values = [getattr(point, order) for point in abstention.curve]
        if values and None not in values:
            lowest = min(lowest, *values)
            shares = [1 - point.coverage for point in abstention.curve]
            look: _Look = {"linewidth": 2, "marker": "o", "markersize": 4}
            axes.plot(shares, values, color=colour, label=name, **look)
    kept = abstention.metrics.get("accuracy", Estimate())
    if not kept.is_undefined:
        lowest = min(lowest, kept.value)
        label = f"this run's review: {abstention.num_review:,}"
        point: _Look = {"color": PNEUMONIA, "clip_on": False, "label": label, **_POINT}
        axes.plot([abstention.share_review], [kept.value], "o", **point)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8.5, labelcolor=MUTED)
    axes.set_xlim(0, np.fmax(0.5, abstention.share_review))
    axes.set_ylim(max(0.0, math.floor(20 * lowest - 0.2) / 20), 1.002)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))


_PLOTS = {  # title, size in inches, and what draws it
    "roc": ("ROC curve", _SQUARE, _draw_roc),
    "precision_recall": ("Precision and recall", _SQUARE, _draw_precision_recall),
    "confusion": ("Calls against labels", _SQUARE, _draw_confusion),
    "calibration": ("Calibration", _SQUARE, _draw_calibration),
    "scores": ("Scores by class", (10.4, 4.4), _draw_scores),
    "abstention": (
        "Leaving images to a person",
        _SQUARE,
        lambda figure, _, main: _draw_abstention(figure, main.abstention),
    ),
}


def _draw_overview(figure: Figure, scores: Scores, results: SplitResults) -> None:
    """AUROC with its interval: the means on top, then each output, the lowest first."""
    rows = [
        (title, means["auroc"], INK)
        for title, means in (("macro mean", results.macro), ("micro mean", results.micro))
        if "auroc" in means
    ]
    names = short_names([found.output.name for found in results.outputs], 26)
    rows += [
        (names[number], results.outputs[number].whole.metrics["auroc"], CURVE)
        for number in results.ranked
    ]
    height = figure.get_size_inches()[1]
    bottom = 0.35 / height
    axes = figure.add_axes((0.30, bottom, 0.45, 1 - 0.80 / height - bottom))
    values = [each.value for _, each, _ in rows if not each.is_undefined]
    axes.set_xlim(math.floor(10 * min([0.4, *values])) / 10, 1.005)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0.5, **_CHANCE)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], color=INK)
    axes.grid(axis="y", visible=False)
    for row, (_, each, colour) in enumerate(rows):
        text = each.reason or "undefined"
        if not each.is_undefined:
            axes.plot([each.low, each.high], [row] * 2, color=colour, linewidth=5, alpha=0.4)
            axes.plot([each.value], [row], "o", color=colour, markersize=4.5)
            interval = format_interval("auroc", each.low, each.high)
            text = f"{format_value('auroc', each.value)}  {interval}"
        place: _Look = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5}
        axes.text(1.03, row, shortened(text, 44), color=INK if row < 2 else MUTED, **place)


def _draw_matrix(figure: Figure, scores: Scores, results: SplitResults) -> None:
    """How many images with a label (row) got each call (column), tinted by the share of the row."""
    names = short_names([found.output.name for found in results.outputs], 20)
    counts = (scores.labels == 1).T.astype(np.int64) @ scores.called.astype(np.int64)  # (C, C)
    totals = np.maximum((scores.labels == 1).sum(axis=0), 1)
    width, height = figure.get_size_inches()
    side = _cell_of(len(names)) * len(names)
    axes = figure.add_axes((1.75 / width, 0.15 / height, side / width, side / height))
    axes.set(xlim=(0, len(names)), ylim=(len(names), 0))
    middles = np.arange(len(names)) + 0.5
    axes.set_xticks(middles, names, color=INK, rotation=90, fontsize=8)
    axes.set_yticks(middles, names, color=INK, fontsize=8)
    axes.xaxis.tick_top()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    centred: _Look = {"ha": "center", "va": "center", "fontsize": 7.5}
    for (row, column), num in np.ndenumerate(counts):
        share, is_right = num / totals[row], row == column
        tint: _Look = {"facecolor": NORMAL if is_right else PNEUMONIA, "linewidth": 0}
        if num:
            box = mpl.patches.Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, **tint)
            box.set_alpha(0.06 + 0.5 * share)
            axes.add_patch(box)
        weight = "bold" if is_right else "normal"
        colour = INK if num else MUTED
        axes.text(column + 0.5, row + 0.52, f"{num:,}", color=colour, weight=weight, **centred)


def _draw_panels(
    figure: Figure, scores: Scores, results: SplitResults, draw: "_DrawPanel", metric: str
) -> None:
    """A small plot of each output, the one with the lowest AUROC first, under its name and value
    of `metric`.
    """
    columns = min(_PANELS, len(results.outputs))
    rows = math.ceil(len(results.outputs) / columns)
    width, height = figure.get_size_inches()
    side = _PANEL - 0.62
    names = short_names([found.output.name for found in results.outputs], 21)
    for place, number in enumerate(results.ranked):
        found = results.outputs[number]
        row, column = divmod(place, columns)
        left = 0.5 + column * _PANEL
        bottom = height - 1.2 - row * (_PANEL + 0.1) - side
        box = (left / width, bottom / height, side / width, side / height)
        axes = figure.add_axes(box)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.tick_params(
            labelsize=7, labelleft=column == 0, labelbottom=place >= columns * (rows - 1)
        )
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)
        value = format_value(metric, found.whole.metrics[metric].value)
        head: _Look = {"transform": axes.transAxes, "va": "bottom"}
        axes.text(0, 1.13, names[number], fontsize=8, weight="bold", **head)
        axes.text(0, 1.02, f"{METRICS[metric].title} {value}", fontsize=7, color=MUTED, **head)
        draw(axes, scores.labelled(number), found)
        if (estimate := found.whole.metrics[metric]).is_undefined:
            reason = textwrap.fill(estimate.reason, 20)
            axes.text(0.5, 0.5, reason, ha="center", va="center", fontsize=7, color=MUTED)


def _panel_roc(axes: Axes, found: Labelled, own: OutputResults) -> None:
    axes.plot([0, 1], [0, 1], **_CHANCE)
    tp, fp = cumulative_calls(found.labels, found.scores)
    if tp[-1] and fp[-1]:
        axes.plot(fp / fp[-1], tp / tp[-1], color=CURVE, linewidth=1.5)
        rates = (own.whole.metrics[name].value for name in ("specificity", "sensitivity"))
        specificity, sensitivity = rates
        axes.plot([1 - specificity], [sensitivity], "o", color=PNEUMONIA, markersize=4.5)


def _panel_precision_recall(axes: Axes, found: Labelled, own: OutputResults) -> None:
    tp, fp = cumulative_calls(found.labels, found.scores)
    if tp[-1] and fp[-1]:
        axes.axhline(float(found.labels.mean()), **_CHANCE)
        axes.plot(*precision_recall(tp, fp), color=CURVE, linewidth=1.5)
        if not own.whole.metrics["ppv"].is_undefined:
            place = [[own.whole.metrics[name].value] for name in ("sensitivity", "ppv")]
            axes.plot(*place, "o", color=PNEUMONIA, markersize=4.5)


def _panel_calibration(axes: Axes, found: Labelled, own: OutputResults) -> None:
    axes.plot([0, 1], [0, 1], **_CHANCE)
    bins = calibration_bins(found.labels, found.scores, found.patient_of)
    bins = [each for each in bins if each.num_images]
    for each in bins:
        ends = wilson_interval(each.share_positive, each.num_patients)
        axes.plot([each.mean_score] * 2, ends, color=CURVE, linewidth=1.4, alpha=0.45)
    means, shares = [each.mean_score for each in bins], [each.share_positive for each in bins]
    axes.plot(means, shares, "o-", color=CURVE, linewidth=1, markersize=3.5)


def _panels(draw: "_DrawPanel", metric: str) -> "_DrawAll":
    return lambda figure, scores, results: _draw_panels(figure, scores, results, draw, metric)


def _panels_size(num: int) -> tuple[float, float]:
    columns = min(_PANELS, num)
    width = 0.55 + columns * _PANEL
    return max(width, 4.6), 0.95 + math.ceil(num / columns) * (_PANEL + 0.1)


def _matrix_size(num: int) -> tuple[float, float]:
    side = _cell_of(num) * num
    return max(1.95 + side, 4.6), 2.4 + side


def _cell_of(num: int) -> float:
    return min(0.75, max(0.36, 3.6 / num))  # the side of a cell, inches


def _overview_size(num: int) -> tuple[float, float]:
    return 7.6, 1.2 + 0.24 * (num + 2)


_DrawPanel = Callable[[Axes, Labelled, OutputResults], None]
_DrawAll = Callable[[Figure, Scores, SplitResults], None]
_PLOTS_OF_MANY: dict[str, tuple[str, _DrawAll, Callable[[int], tuple[float, float]]]] = {
    # title, what draws it, and its size in inches
    "overview": ("AUROC", _draw_overview, _overview_size),
    "roc": ("ROC curves", _panels(_panel_roc, "auroc"), _panels_size),
    "precision_recall": (
        "Precision and recall",
        _panels(_panel_precision_recall, "average_precision"),
        _panels_size,
    ),
    "calibration": ("Calibration", _panels(_panel_calibration, "ece"), _panels_size),
    "confusion": ("Calls against labels", _draw_matrix, _matrix_size),
}


def overlay(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """An image (H, W) under its heat map in [0, 1], of any size, as (H, W, 3) uint8.

    Where the heat map is 0 the image is unchanged. Colours are matplotlib's inferno without its
    dark end, so that they differ in brightness, too.
    """
    bilinear = Image.Resampling.BILINEAR
    scaled = Image.fromarray(np.asarray(heat, np.float32)).resize(image.shape[::-1], bilinear)
    level = _levels_of_heat(np.asarray(scaled))
    opacity, inferno = _heat_table()
    mixed = (1 - opacity)[level] * image[..., None] + (opacity * 255 * inferno)[level]
    result: npt.NDArray[np.uint8] = np.rint(mixed).astype(np.uint8)
    return result


def heat_colors(heat: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """A heat map (H, W) in [0, 1] as colours (H, W, 4) with opacity, to be laid over its image:
    those of `overlay`.
    """
    opacity, inferno = _heat_table()
    table = np.rint(np.hstack([inferno, opacity]) * 255).astype(np.uint8)  # (256, 4)
    colors: npt.NDArray[np.uint8] = table[_levels_of_heat(heat)]
    return colors


def _levels_of_heat(heat: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    levels: npt.NDArray[np.uint8] = np.rint(heat.clip(0, 1) * 255).astype(np.uint8)
    return levels


def _heat_table() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Opacity (256, 1) and colour (256, 3), in [0, 1], of each level of heat."""
    opacity = np.linspace(0, _HEAT_OPACITY, 256, dtype=np.float32)[:, None]
    inferno = mpl.colormaps["inferno"](np.linspace(0.35, 0.95, 256))[:, :3].astype(np.float32)
    return opacity, inferno


@contextmanager
def _figure(path: Path, title: str, note: str, *, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure with its heading, written to `path` when the block ends without an error."""
    with mpl.rc_context(_DEFAULTS):  # type: ignore[arg-type]  # its stubs name each key
        figure = Figure(figsize=size, dpi=style.DPI)
        left, height = 0.15 / size[0] + 0.015, size[1]
        bold: _Look = {"fontsize": style.TITLE_SIZE, "fontweight": "bold", "va": "center"}
        small: _Look = {"fontsize": style.NOTE_SIZE, "color": MUTED, "va": "center"}
        figure.text(left, 1 - style.TITLE_DOWN / height, title, **bold)
        figure.text(left, 1 - style.NOTE_DOWN / height, note, **small)
        yield figure
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # a file name in a script that the font lacks
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            # neither version nor date inside: the same input gives the same bytes
            figure.savefig(buffer, format="png", metadata={"Software": None})
        figure.clear()
    write_atomically(path, buffer.getvalue())


def _draw_series(axes: Axes, history: Sequence[EpochRow], kind: str) -> None:
    """Draw the lines of `_SERIES` with their names and last values at the right."""
    is_share, epochs = kind != "loss", [row.epoch for row in history]
    ends: list[tuple[float, str, str]] = []
    shown: list[float] = []
    for name, colour, column in _SERIES[kind]:
        values = [float(getattr(row, column)) for row in history]
        if known := [value for value in values if math.isfinite(value)]:
            marker = "o" if len(known) <= 40 else None
            look: _Look = {"linewidth": 2, "marker": marker, "markersize": 3.5}
            axes.plot(epochs, values, color=colour, label=name, **look)
            text = f"{100 * known[-1]:.1f} %" if kind == "accuracy" else f"{known[-1]:.3f}"
            ends.append((known[-1], f"{name}\n{text}", colour))
            shown += known
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    if kind == "accuracy":
        axes.yaxis.set_major_formatter(_PERCENT)
    if is_share:
        axes.set_ylim(max(0.0, math.floor(20 * min(shown, default=0.0) - 0.1) / 20), 1)
    else:
        axes.set_ylim(0, 1.08 * max(shown, default=1.0))
    if len(epochs) > 1:
        axes.set_xlim(epochs[0], epochs[-1])
    elif epochs:
        axes.set(xlim=(epochs[0] - 1, epochs[0] + 1), xticks=epochs)
    low, high = axes.get_ylim()
    heights = _spread([(value - low) / (high - low) for value, _, _ in ends], gap=0.15)
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        place: _Look = {"transform": axes.transAxes, "va": "center", "fontsize": 8.5}
        axes.text(1.02, height, text, color=colour, **place)


def _spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """The heights, in their order, moved apart by at least `gap`, within 0 and 1."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    for previous, index in itertools.pairwise(order):
        placed[index] = max(placed[index], placed[previous] + gap)
    above = max([0.0, *(height - 1 for height in placed)])
    placed = [height - above for height in placed]
    for following, index in itertools.pairwise(reversed(order)):
        placed[index] = min(placed[index], placed[following] - gap)
    return placed


def _square_axes(figure: Figure, xlabel: str, ylabel: str) -> Axes:
    axes = figure.add_axes(_SQUARE_AXES)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    return axes


def _mark_threshold(axes: Axes, place: tuple[float, float], threshold: float | None) -> None:
    x, y = place
    text = "calls" if threshold is None else f"threshold {threshold:.3f}"
    axes.plot([x], [y], "o", color=PNEUMONIA, **_POINT)
    side, shift = ("left", 10) if x < 0.55 else ("right", -10)
    look: _Look = {"color": PNEUMONIA, "ha": side, "va": "center"}
    _note(axes, text, (x, y), (shift, -14 if y > 0.25 else 12), **look)


def _note(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], **look: object
) -> None:
    """Write a small text near a point, shifted by some typographic points."""
    axes.annotate(text, at, xytext=shift, textcoords="offset points", **{**_SMALL, **look})


def _print_metric(axes: Axes, name: str, title: str, estimate: Estimate) -> None:
    """Print a metric large in the lower right corner, with its interval below."""
    place: _Look = {"transform": axes.transAxes, "ha": "right", "va": "center"}
    value = format_value(name, estimate.value)
    axes.text(0.97, 0.20, value, fontsize=22, fontweight="bold", color=CURVE, **place)
    interval = format_interval(name, estimate.low, estimate.high)
    line = title + (f", 95 % interval {interval}" if interval else "")
    axes.text(0.97, 0.11, line, **place, **_SMALL)
