"""Plots of results: curves, ROC, precision-recall, confusion, calibration, scores, abstention.

The one home of matplotlib, by its object-oriented API on the Agg canvas: no pyplot, no global
figure, no display. Each function writes a PNG whole or not at all, with the same bytes for the same
input and version of matplotlib. Numbers in a plot are those of the results.
"""

import gc
import io
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from xrai.files import write_atomically
from xrai.results.calibration import calibrated
from xrai.results.history import EpochRow
from xrai.results.intervals import wilson_interval
from xrai.results.metrics import calibration_bins, cumulative_calls, format_interval, format_value
from xrai.results.style import (
    CURVE,
    DPI,
    INK,
    MUTED,
    NORMAL,
    NOTE_DOWN,
    NOTE_SIZE,
    PAPER,
    PNEUMONIA,
    RULE,
    SHIFTED,
    TITLE_DOWN,
    TITLE_SIZE,
    TRAIN,
    VALIDATION,
    note_line,
)
from xrai.results.types import Estimate, Scores, SplitResults

_Style = dict[str, Any]  # options of matplotlib, which documents plain values

_STYLE: _Style = {
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
    "grid.color": RULE,
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
_SQUARE_AXES = (0.13, 0.105, 0.81, 0.74)
_CHANCE: _Style = dict(color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
_POINT: _Style = dict(markersize=9, markeredgecolor=PAPER, markeredgewidth=1.5, zorder=5)
_AREA: _Style = dict(color=CURVE, alpha=0.08, linewidth=0)
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")
_HEAT_OPACITY = 0.65  # of a heat map where it is 1


def draw_curves(
    history: Sequence[EpochRow],
    folder: Path,
    *,
    best_epoch: int | None = None,
    is_phantom: bool = False,
) -> None:
    """Write `folder`/loss.png and accuracy.png: training and validation by epoch.

    A value that is NaN leaves a gap.
    """
    lines = [("train", TRAIN, "train"), ("validation", VALIDATION, "val")]
    shifted = ("validation,\naugmented", SHIFTED, "shifted")
    for kind, unit, shown in (
        ("loss", "cross-entropy, nats", lines),
        ("accuracy", "share of images correctly classified", [*lines, shifted]),
    ):
        note = note_line(unit, is_phantom=is_phantom)
        with _figure(folder / f"{kind}.png", f"{kind.capitalize()} by epoch", note) as figure:
            axes = figure.add_subplot()
            figure.subplots_adjust(left=0.1, right=0.745, top=0.795, bottom=0.12)
            series = [
                (name, colour, [_number(getattr(row, f"{key}_{kind}")) for row in history])
                for name, colour, key in shown
            ]
            epochs = [row.epoch for row in history]
            _draw_series(axes, epochs, series, is_share=kind == "accuracy")
            if best_epoch is not None:
                axes.axvline(best_epoch, zorder=1, **_CHANCE)
                is_late = best_epoch > (epochs[0] + epochs[-1]) / 2
                axes.annotate(
                    "saved",
                    (best_epoch, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(-4 if is_late else 4, -2),
                    textcoords="offset points",
                    fontsize=8,
                    color=MUTED,
                    va="top",
                    ha="right" if is_late else "left",
                )


def draw_plots(scores: Scores, results: SplitResults, folder: Path) -> None:
    """Write all plots of one split, of its first output."""
    for name, draw in (
        ("roc", draw_roc),
        ("precision_recall", draw_precision_recall),
        ("confusion", draw_confusion),
        ("calibration", draw_calibration),
        ("scores", draw_scores),
        ("abstention", draw_abstention),
    ):
        draw(scores, results, folder / f"{name}.png")


def draw_roc(scores: Scores, results: SplitResults, path: Path) -> None:
    """Write the ROC curve with the operating point."""
    found, metrics = scores.labelled(), results.main.whole.metrics
    output = results.main.output
    with _split_figure(path, "ROC curve", results) as figure:
        axes = _square_axes(
            figure,
            f"1 - specificity: {output.opposite} images called {output.name}",
            f"sensitivity: {output.name} images found",
        )
        axes.plot([0, 1], [0, 1], **_CHANCE)
        tp, fp = cumulative_calls(found.labels, found.scores)
        if tp[-1] and fp[-1]:
            axes.fill_between(fp / fp[-1], tp / tp[-1], **_AREA)
            axes.plot(fp / fp[-1], tp / tp[-1], color=CURVE, linewidth=2.2)
            x, y = 1 - metrics["specificity"].value, metrics["sensitivity"].value
            _mark_threshold(axes, x, y, output.threshold)
        _print_metric(axes, "auroc", "AUROC", metrics["auroc"])


def draw_precision_recall(scores: Scores, results: SplitResults, path: Path) -> None:
    """Write the precision-recall curve, with the share of positive images as chance."""
    found, metrics = scores.labelled(), results.main.whole.metrics
    output = results.main.output
    with _split_figure(path, "Precision and recall", results) as figure:
        axes = _square_axes(
            figure,
            f"recall: {output.name} images found",
            f"precision: calls of {output.name} that are correct",
        )
        tp, fp = cumulative_calls(found.labels, found.scores)
        if tp[-1] and fp[-1]:
            share = float(found.labels.mean())
            axes.axhline(share, **_CHANCE)
            axes.annotate(
                f"chance {share:.2f}",
                (0.02, share),
                xytext=(0, -4),
                textcoords="offset points",
                color=MUTED,
                fontsize=8,
                va="top",
            )
            precision = np.append((tp[:0:-1] / (tp + fp)[:0:-1]), 1.0)
            recall = tp[::-1] / tp[-1]
            axes.fill_between(recall, precision, step="pre", **_AREA)
            axes.step(recall, precision, color=CURVE, linewidth=2.2, where="pre")
            if not metrics["ppv"].is_undefined:
                x, y = metrics["sensitivity"].value, metrics["ppv"].value
                _mark_threshold(axes, x, y, output.threshold)
        _print_metric(axes, "average_precision", "average precision", metrics["average_precision"])


def draw_confusion(scores: Scores, results: SplitResults, path: Path) -> None:
    """Write the four counts: a row is a label, a column a call, tinted by the share of the row."""
    counts, output = results.main.whole.counts, results.main.output
    cells = (
        ((counts.tn, "correct", NORMAL), (counts.fp, "false alarm", PNEUMONIA)),
        ((counts.fn, "missed", PNEUMONIA), (counts.tp, "correct", NORMAL)),
    )
    names = [output.opposite, output.name]
    centred = _style(ha="center", va="center")
    with _split_figure(path, "Calls against labels", results) as figure:
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
                box = mpl.patches.FancyBboxPatch(
                    (column + 0.05, row + 0.05),
                    0.9,
                    0.9,
                    boxstyle="round,pad=0,rounding_size=0.05",
                    facecolor=colour,
                    alpha=0.06 + 0.44 * share,
                    edgecolor="none",
                )
                axes.add_patch(box)
                x, note = column + 0.5, f"{word} · {100 * share:.1f} % of row" if num_row else word
                axes.text(x, row + 0.47, f"{num:,}", fontsize=26, fontweight="bold", **centred)
                axes.text(x, row + 0.70, note, fontsize=8.5, color="#3d4757", **centred)


def draw_calibration(scores: Scores, results: SplitResults, path: Path) -> None:
    """Write the reliability plot: observed share of positive images against mean score, by bin.

    A temperature other than 1 has the line of the scores before calibration beside it, thin.
    """
    found, output, metrics = scores.labelled(), results.main.output, results.main.whole.metrics
    bins = calibration_bins(found.labels, found.scores)
    with _split_figure(path, "Calibration", results) as figure:
        axes = figure.add_axes((0.13, 0.34, 0.81, 0.50))
        axes.plot([0, 1], [0, 1], **_CHANCE)
        if output.temperature != 1:
            before = calibration_bins(found.labels, calibrated(found.logits))
            full = [each for each in before if each.num_images]
            axes.plot(
                [each.mean_score for each in full],
                [each.share_positive for each in full],
                color=TRAIN,
                linewidth=1.1,
                marker="o",
                markersize=3.5,
                alpha=0.85,
                zorder=1.5,
                label="before calibration",
            )
        full = [each for each in bins if each.num_images]
        for each in full:  # shows how little a bin of few images says
            ends = wilson_interval(each.share_positive, each.num_images)
            axes.plot([each.mean_score] * 2, ends, color=CURVE, linewidth=1.6, alpha=0.45)
        axes.plot(
            [each.mean_score for each in full],
            [each.share_positive for each in full],
            color=CURVE,
            linewidth=1.4,
            marker="o",
            markersize=6,
            markeredgecolor=PAPER,
            label=f"temperature {output.temperature:.2f}",
        )
        if len(axes.get_legend_handles_labels()[0]) > 1:
            place = _style(loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=2)
            axes.legend(
                fontsize=8.5, labelcolor=MUTED, columnspacing=1.2, handlelength=1.6, **place
            )
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel=f"observed share of {output.name}")
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.tick_params(labelbottom=False)
        _print_metric(axes, "ece", "calibration error (ECE)", metrics["ece"])
        brier = f"Brier score {format_value('brier', metrics['brier'].value)}"
        _print_small(axes, 0.04, brier)
        below = figure.add_axes((0.13, 0.105, 0.81, 0.17), sharex=axes)
        heights = [each.num_images for each in bins]
        _draw_bins(below, [(each.low + each.high) / 2 for each in bins], heights)
        below.set_xlabel(f"score: predicted probability of {output.name}")


def draw_scores(scores: Scores, results: SplitResults, path: Path) -> None:
    """Write the histogram of scores by class; solid bars are on the wrong side of the threshold."""
    found, output, counts = scores.labelled(), results.main.output, results.main.whole.counts
    is_called = found.scores >= output.threshold
    edges = np.linspace(0, 1, 51).tolist()
    names = [output.opposite, output.name]
    with _split_figure(path, "Scores by class", results, size=(10.4, 4.4)) as figure:
        for label, bottom, colour, num_wrong in (
            (0, 0.49, NORMAL, counts.fp),
            (1, 0.125, PNEUMONIA, counts.fn),
        ):
            axes = figure.add_axes((0.185, bottom, 0.785, 0.32))
            own, is_wrong = found.labels == label, is_called != bool(label)
            axes.hist(
                [found.scores[own & is_wrong], found.scores[own & ~is_wrong]],
                edges,
                stacked=True,
                linewidth=0,
                color=[colour, _lighter(colour)],
            )
            # a few mistakes beside a thousand correct calls stay visible
            axes.set_yscale("symlog", linthresh=2, linscale=0.5)
            axes.set(xlim=(0, 1), ylim=(0, max(2.0, axes.get_ylim()[1])))
            axes.yaxis.set_major_locator(FixedLocator([10**power for power in range(6)]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_major_formatter(_PERCENT)
            axes.axvline(output.threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            wrong = f"{num_wrong:,} called {names[1 - label]}"
            for height, text, style in (
                (0.78, names[label], _style(color=colour, fontsize=11, fontweight="bold")),
                (0.58, f"{own.sum():,} images", _style(color=colour, fontsize=8.5)),
                (0.40, wrong, _style(color=INK, fontsize=8.5)),
            ):
                figure.text(0.022, bottom + 0.32 * height, text, va="center", **style)
            if label == 1:
                axes.set_xlabel(f"score: predicted probability of {output.name}")
                continue
            axes.tick_params(labelbottom=False)
            shift, side = (-5, "right") if output.threshold > 0.75 else (5, "left")
            axes.annotate(
                f"threshold {output.threshold:.3f}",
                (output.threshold, 1),
                xycoords=("data", "axes fraction"),
                xytext=(shift, 5),
                textcoords="offset points",
                fontsize=8.5,
                ha=side,
            )


def draw_abstention(scores: Scores, results: SplitResults, path: Path) -> None:
    """Write the accuracy of the images that are kept as more and more are left to a person."""
    abstention = results.main.abstention
    shares = [1 - point.coverage for point in abstention.curve]
    lines = (
        ("least certain first", CURVE, [point.by_doubt for point in abstention.curve]),
        ("least typical first", SHIFTED, [point.by_atypicality for point in abstention.curve]),
    )
    with _split_figure(path, "Leaving images to a person", results) as figure:
        axes = figure.add_axes(_SQUARE_AXES)
        lowest, style = 1.0, _style(linewidth=2, marker="o", markersize=4)
        for name, colour, line in lines:
            values = [value for value in line if value is not None]
            if values:
                lowest = min(lowest, *values)
                axes.plot(shares, values, color=colour, label=name, **style)
        kept = abstention.metrics.get("accuracy", Estimate())
        if not kept.is_undefined:
            lowest = min(lowest, kept.value)
            label = f"this run's review: {abstention.num_review:,}"
            point = _style(color=PNEUMONIA, clip_on=False, label=label, **_POINT)
            axes.plot([abstention.share_review], [kept.value], "o", **point)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", fontsize=8.5, labelcolor=MUTED)
        axes.set(xlabel="share of images left to a person", ylabel="accuracy on the others")
        axes.set_xlim(0, max(0.5, _number(abstention.share_review) or 0.0))
        axes.set_ylim(max(0.0, math.floor(20 * lowest - 0.2) / 20), 1.002)
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)


def overlay(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """An image (H, W) under its heat map in [0, 1], of any size, as (H, W, 3) uint8.

    Where the heat map is 0 the image is unchanged. Colours are matplotlib's inferno without its
    dark end, so that they differ in brightness, too.
    """
    bilinear = Image.Resampling.BILINEAR
    scaled = Image.fromarray(np.asarray(heat, np.float32)).resize(image.shape[::-1], bilinear)
    level = np.rint(np.asarray(scaled).clip(0, 1) * 255).astype(np.uint8)  # (H, W)
    opacity = np.linspace(0, _HEAT_OPACITY, 256, dtype=np.float32)[:, None]  # (256, 1)
    inferno = mpl.colormaps["inferno"](np.linspace(0.35, 0.95, 256))[:, :3].astype(np.float32)
    colours = opacity * 255 * inferno
    mixed: npt.NDArray[np.uint8] = np.rint(
        (1 - opacity)[level] * image[..., None] + colours[level]
    ).astype(np.uint8)
    return mixed


@contextmanager
def _figure(
    path: Path, title: str, note: str, *, size: tuple[float, float] = (6.2, 4.3)
) -> Iterator[Figure]:
    """A figure with its heading, written to `path` when the block ends without an error."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # its stubs name each key
        figure = Figure(figsize=size, dpi=DPI)
        FigureCanvasAgg(figure)
        left = 0.15 / size[0] + 0.015
        bold = _style(fontsize=TITLE_SIZE, fontweight="bold", va="center")
        small = _style(fontsize=NOTE_SIZE, color=MUTED, va="center")
        figure.text(left, 1 - TITLE_DOWN / size[1], title, **bold)
        figure.text(left, 1 - NOTE_DOWN / size[1], note, **small)
        yield figure
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # a file name in a script that the font lacks
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            # neither version nor date inside: the same input gives the same bytes
            figure.savefig(buffer, format="png", metadata={"Software": None})
        figure.clear()
        del figure
        gc.collect()  # figures are full of cycles: a training grew by 5 MiB an epoch
    write_atomically(path, buffer.getvalue())


@contextmanager
def _split_figure(
    path: Path, title: str, results: SplitResults, *, size: tuple[float, float] = _SQUARE
) -> Iterator[Figure]:
    """A figure about one split."""
    note = f"{results.num_images:,} images of {results.num_patients:,} patients"
    note = note_line(f"{results.split} split", note, is_phantom=results.is_phantom)
    with _figure(path, title, note, size=size) as figure:
        yield figure


def _draw_series(
    axes: Axes,
    epochs: Sequence[int],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    *,
    is_share: bool,
) -> None:
    """Draw lines (name, colour, values by epoch) with their names and last values at the right."""
    ends: list[tuple[float, str, str]] = []
    known = [[value for value in values if value is not None] for _, _, values in series]
    for (name, colour, values), shown in zip(series, known, strict=True):
        if not shown:
            continue
        style = _style(linewidth=2, marker="o" if len(shown) <= 40 else None, markersize=3.5)
        gaps = [math.nan if value is None else value for value in values]
        axes.plot(epochs, gaps, color=colour, label=name, **style)
        text = f"{100 * shown[-1]:.1f} %" if is_share else f"{shown[-1]:.3f}"
        ends.append((shown[-1], f"{name}\n{text}", colour))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    everything = list(itertools.chain.from_iterable(known))
    if is_share:
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set_ylim(max(0.0, math.floor(20 * min(everything, default=0.0) - 0.1) / 20), 1)
    else:
        axes.set_ylim(0, 1.08 * max(everything, default=1.0))
    if len(epochs) > 1:
        axes.set_xlim(epochs[0], epochs[-1])
    elif epochs:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.set_xticks(epochs)
    low, high = axes.get_ylim()
    heights = _spread([(value - low) / (high - low) for value, _, _ in ends], gap=0.15)
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        style = _style(transform=axes.transAxes, color=colour, va="center", fontsize=8.5)
        axes.text(1.02, height, text, **style)


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


def _draw_bins(axes: Axes, centres: Sequence[float], heights: Sequence[int]) -> None:
    """Draw how many images each bin has."""
    axes.bar(centres, heights, width=0.09, color=CURVE, alpha=0.35)
    axes.set(ylabel="images", ylim=(0, max(1, *heights) * 1.3))
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    style = _style(textcoords="offset points", ha="center", fontsize=7, color=MUTED)
    for centre, height in zip(centres, heights, strict=True):
        axes.annotate(f"{height:,}", (centre, height), xytext=(0, 2), **style)


def _mark_threshold(axes: Axes, x: float, y: float, threshold: float) -> None:
    axes.plot([x], [y], "o", color=PNEUMONIA, **_POINT)
    is_left = x < 0.55
    axes.annotate(
        f"threshold {threshold:.3f}",
        (x, y),
        xytext=(10 if is_left else -10, -14 if y > 0.25 else 12),
        textcoords="offset points",
        color=PNEUMONIA,
        fontsize=8.5,
        ha="left" if is_left else "right",
        va="center",
    )


def _print_metric(axes: Axes, name: str, title: str, estimate: Estimate) -> None:
    """Print a metric large in the lower right corner, with its interval below."""
    large = _style(fontsize=22, fontweight="bold", color=CURVE, ha="right", va="center")
    value = format_value(name, estimate.value)
    axes.text(0.97, 0.20, value, transform=axes.transAxes, **large)
    interval = format_interval(name, estimate.low, estimate.high)
    _print_small(axes, 0.11, title + (f", 95 % interval {interval}" if interval else ""))


def _print_small(axes: Axes, height: float, text: str) -> None:
    small = _style(fontsize=8.5, color=MUTED, ha="right", va="center")
    axes.text(0.97, height, text, transform=axes.transAxes, **small)


def _style(**options: object) -> _Style:
    return options


def _lighter(colour: str) -> tuple[float, float, float]:
    red, green, blue = (1 - 0.4 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _number(value: float | None) -> float | None:
    """The value where it is a finite number, else None."""
    return float(value) if value is not None and math.isfinite(value) else None
