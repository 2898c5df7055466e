"""Pictures of results: curves, ROC, precision-recall, confusion, calibration, scores, heat maps
over images.

The one home of matplotlib, by its object-oriented API on the Agg canvas: no pyplot, no global
figure, no display. Called by `xrai.train` and `xrai.evaluate`; sheets of images are drawn in
`xrai.results.sheets`. Each function writes a PNG whole or not at all, the same bytes for the same
input and version of matplotlib (no dates inside). Numbers in a picture come from the metrics.json
dictionary. Colours: `xrai.results.style`.
"""

import gc
import io
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
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

from xrai.results.metrics import calibration_bins, format_interval, format_value, wilson_interval
from xrai.results.style import (
    CURVE,
    DPI,
    INK,
    MUTED,
    NORMAL,
    PAPER,
    PNEUMONIA,
    RULE,
    SHIFTED,
    SUBTITLE_DOWN,
    SUBTITLE_SIZE,
    TITLE_DOWN,
    TITLE_SIZE,
    TRAIN,
    VALIDATION,
    subtitle_of,
    write_picture,
)

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so pictures do not depend on the machine's fonts
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # names of files are shown as they are, dollar signs too
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
_BILINEAR = Image.Resampling.BILINEAR
_OPACITY = 0.65  # of a heat map where it is 1
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


def draw_curves(
    history: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    best_epoch: int | None = None,
    is_phantom: bool = False,
) -> None:
    """Write `folder`/curves/loss.png and accuracy.png: training and validation by epoch.

    `history` holds the rows of history.csv so far; a value that is missing or not finite leaves a
    gap. 0.3 s in all.
    """
    series = [("train", TRAIN, "train_{}"), ("validation", VALIDATION, "val_{}")]
    shifted = [("validation,\naugmented", SHIFTED, "shifted_{}")]
    for kind, unit, lines in (
        ("loss", "cross-entropy, nats", series),
        ("accuracy", "share of images called right", series + shifted),
    ):
        with _figure(
            folder / "curves" / f"{kind}.png",
            f"{kind.capitalize()} by epoch",
            unit,
            is_phantom=is_phantom,
        ) as figure:
            axes = figure.add_subplot()
            figure.subplots_adjust(left=0.1, right=0.745, top=0.795, bottom=0.12)
            _draw_lines(
                axes,
                history,
                [(name, colour, key.format(kind)) for name, colour, key in lines],
                kind=kind,
            )
            if best_epoch is not None:
                axes.axvline(best_epoch, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
                late = best_epoch > (history[0]["epoch"] + history[-1]["epoch"]) / 2
                axes.annotate(
                    "saved", (best_epoch, 1), xycoords=("data", "axes fraction"), xytext=(-4 if late else 4, -2),
                    textcoords="offset points", fontsize=8, color=MUTED, va="top", ha="right" if late else "left",
                )  # fmt: skip


def draw_roc(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    metrics: Mapping[str, Any],
    path: Path,
    *,
    is_phantom: bool = False,
) -> None:
    """Write the ROC curve of labels (N,) and scores (N,), with the operating point of `metrics`
    (metrics.json).
    """
    from sklearn.metrics import roc_curve  # see `xrai.results.metrics`

    with _figure(
        path, "ROC curve", _split_line(metrics), size=(5.6, 5.6), is_phantom=is_phantom
    ) as figure:
        axes = _square_axes(
            figure, "1 - specificity: normals called pneumonia", "sensitivity: pneumonia found"
        )
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        if _has_both(labels):
            false_positive, true_positive, _ = roc_curve(labels, scores, drop_intermediate=False)
            axes.fill_between(false_positive, true_positive, color=CURVE, alpha=0.08, linewidth=0)
            axes.plot(false_positive, true_positive, color=CURVE, linewidth=2.2)
            x = 1 - metrics["metrics"]["specificity"]["value"]
            y = metrics["metrics"]["sensitivity"]["value"]
            _mark_operating_point(axes, x, y, metrics, below=y > 0.25)
        _say(axes, "auroc", metrics)


def draw_precision_recall(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    metrics: Mapping[str, Any],
    path: Path,
    *,
    is_phantom: bool = False,
) -> None:
    """Write the precision-recall curve, with the share of pneumonia as the level of chance."""
    from sklearn.metrics import precision_recall_curve

    with _figure(
        path, "Precision and recall", _split_line(metrics), size=(5.6, 5.6), is_phantom=is_phantom
    ) as figure:
        axes = _square_axes(
            figure, "recall: pneumonia found", "precision: calls of pneumonia that are right"
        )
        if _has_both(labels):
            share = float(np.mean(np.asarray(labels)))
            precision, recall, _ = precision_recall_curve(labels, scores)
            axes.axhline(share, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                f"chance {share:.2f}", (0.02, share), xytext=(0, -4), textcoords="offset points", color=MUTED,
                fontsize=8, va="top",
            )  # fmt: skip
            axes.fill_between(recall, precision, color=CURVE, alpha=0.08, linewidth=0, step="pre")
            axes.step(recall, precision, color=CURVE, linewidth=2.2, where="pre")
            ppv = metrics["metrics"]["ppv"]["value"]
            if _number(ppv) is not None:
                _mark_operating_point(
                    axes, metrics["metrics"]["sensitivity"]["value"], ppv, metrics, below=ppv > 0.25
                )
        _say(axes, "average_precision", metrics)


def draw_confusion(metrics: Mapping[str, Any], path: Path, *, is_phantom: bool = False) -> None:
    """Write the four counts of `metrics`, rows the truth, columns the call, tinted by the share
    of the row.
    """
    counts = metrics["counts"]
    cells = [
        [("tn", "right", NORMAL), ("fp", "false alarm", PNEUMONIA)],
        [("fn", "missed", PNEUMONIA), ("tp", "right", NORMAL)],
    ]
    with _figure(
        path, "Calls against truth", _split_line(metrics), size=(5.6, 5.6), is_phantom=is_phantom
    ) as figure:
        axes = figure.add_axes((0.17, 0.07, 0.79, 0.74))
        axes.set(xlim=(0, 2), ylim=(2, 0), xticks=[0.5, 1.5], yticks=[0.5, 1.5])
        axes.set_xticklabels(["called normal", "called pneumonia"], color=INK)
        axes.set_yticklabels(["normal", "pneumonia"], color=INK, rotation=90, va="center")
        axes.xaxis.tick_top()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        for row, entries in enumerate(cells):
            num_row = sum(counts[key] for key, _, _ in entries)
            for column, (key, word, colour) in enumerate(entries):
                share = counts[key] / num_row if num_row else 0.0
                axes.add_patch(
                    mpl.patches.FancyBboxPatch(
                        (column + 0.05, row + 0.05), 0.9, 0.9, boxstyle="round,pad=0,rounding_size=0.05",
                        facecolor=colour, alpha=0.06 + 0.44 * share, edgecolor="none",
                    )
                )  # fmt: skip
                centre = (column + 0.5, row + 0.47)
                axes.text(
                    *centre,
                    f"{counts[key]:,}",
                    ha="center",
                    va="center",
                    fontsize=26,
                    fontweight="bold",
                )
                note = f"{word} · {100 * share:.1f} % of row" if num_row else word
                axes.text(
                    column + 0.5,
                    row + 0.70,
                    note,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="#3d4757",
                )


def draw_calibration(
    labels: npt.ArrayLike, scores: npt.ArrayLike, metrics: Mapping[str, Any], path: Path, *,
    uncalibrated: npt.ArrayLike | None = None, is_phantom: bool = False,
) -> None:  # fmt: skip
    """Write the reliability plot: observed share of pneumonia against mean score in ten bins, with
    their counts.

    With `uncalibrated` (N,), the scores at temperature 1, their line is drawn too, thin.
    """
    bins = calibration_bins(labels, scores)
    full = [entry for entry in bins if entry.num_images]
    with _figure(
        path, "Calibration", _split_line(metrics), size=(5.6, 5.6), is_phantom=is_phantom
    ) as figure:
        axes = figure.add_axes((0.13, 0.34, 0.81, 0.50))
        below = figure.add_axes((0.13, 0.105, 0.81, 0.17), sharex=axes)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        if uncalibrated is not None and metrics["calibration"]["temperature"] != 1:
            earlier = [
                entry for entry in calibration_bins(labels, uncalibrated) if entry.num_images
            ]
            axes.plot(
                [entry.mean_score for entry in earlier], [entry.share_pneumonia for entry in earlier], color=TRAIN,
                linewidth=1.1, marker="o", markersize=3.5, alpha=0.85, zorder=1.5, label="before calibration",
            )  # fmt: skip
        # by bin, to show how little a bin of few images says
        for entry in full:
            low, high = wilson_interval(entry.share_pneumonia, entry.num_images)
            axes.plot([entry.mean_score] * 2, [low, high], color=CURVE, linewidth=1.6, alpha=0.45)
        axes.plot(
            [entry.mean_score for entry in full], [entry.share_pneumonia for entry in full],
            color=CURVE, linewidth=1.4, marker="o", markersize=6, markeredgecolor=PAPER,
            label=f"temperature {metrics['calibration']['temperature']:.2f}",
        )  # fmt: skip
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(
                loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=2, fontsize=8.5, labelcolor=MUTED,
                columnspacing=1.2, handlelength=1.6,
            )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="observed share of pneumonia")
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.tick_params(labelbottom=False)
        _say(axes, "ece", metrics, others=("brier",))
        centres = [(entry.low + entry.high) / 2 for entry in bins]
        heights = [entry.num_images for entry in bins]
        below.bar(centres, heights, width=0.09, color=CURVE, alpha=0.35)
        below.set(
            xlabel="score: predicted probability of pneumonia",
            ylabel="images",
            ylim=(0, max(1, *heights) * 1.3),
        )
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for centre, height in zip(centres, heights, strict=True):
            below.annotate(
                f"{height:,}", (centre, height), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7,
                color=MUTED,
            )  # fmt: skip
        below.xaxis.set_major_formatter(_PERCENT)


def draw_scores(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    metrics: Mapping[str, Any],
    path: Path,
    *,
    is_phantom: bool = False,
) -> None:
    """Write the histogram of scores of each class; the bars on the wrong side of the threshold
    are the mistakes.
    """
    labels, scores, threshold = (
        np.asarray(labels),
        np.asarray(scores, dtype=np.float64),
        metrics["threshold"],
    )
    counts, edges = metrics["counts"], np.linspace(0, 1, 51).tolist()
    panels = [
        (0.49, 0, NORMAL, "normal", f"{counts['fp']:,} called pneumonia", scores >= threshold),
        (0.125, 1, PNEUMONIA, "pneumonia", f"{counts['fn']:,} called normal", scores < threshold),
    ]
    with _figure(
        path, "Scores by class", _split_line(metrics), size=(10.4, 4.4), is_phantom=is_phantom
    ) as figure:
        for bottom, label, colour, name, mistakes, is_wrong in panels:
            axes = figure.add_axes((0.185, bottom, 0.785, 0.32))
            own = labels == label
            axes.hist(
                [scores[own & is_wrong], scores[own & ~is_wrong]], edges, stacked=True, linewidth=0,
                color=[colour, _lighter(colour)],
            )  # fmt: skip
            # a few mistakes beside a thousand hits stay visible
            axes.set_yscale("symlog", linthresh=2, linscale=0.5)
            axes.set(xlim=(0, 1), ylim=(0, max(2.0, axes.get_ylim()[1])))
            axes.yaxis.set_major_locator(FixedLocator([1, 10, 100, 1_000, 10_000, 100_000]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_major_formatter(_PERCENT)
            axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            for line, text, weight, size in (
                (0.78, name, "bold", 11),
                (0.58, f"{own.sum():,} images", "normal", 8.5),
            ):
                figure.text(
                    0.022,
                    bottom + 0.32 * line,
                    text,
                    color=colour,
                    fontweight=weight,
                    fontsize=size,
                    va="center",
                )
            figure.text(0.0294, bottom + 0.32 * 0.4, mistakes, color=INK, fontsize=8.5, va="center")
            if label == 0:
                axes.tick_params(labelbottom=False)
                shift, side = (-5, "right") if threshold > 0.75 else (5, "left")
                axes.annotate(
                    f"threshold {threshold:.3f}", (threshold, 1), xycoords=("data", "axes fraction"),
                    xytext=(shift, 5), textcoords="offset points", fontsize=8.5, ha=side,
                )  # fmt: skip
            else:
                axes.set_xlabel("score: predicted probability of pneumonia")


def draw_abstention(metrics: Mapping[str, Any], path: Path, *, is_phantom: bool = False) -> None:
    """Write the accuracy of the images that are kept, where more and more are left to a person."""
    abstention = metrics["abstention"]
    lines = [
        ("least sure first", CURVE, "by_doubt"),
        ("least typical first", SHIFTED, "by_atypicality"),
    ]
    with _figure(
        path,
        "Leaving images to a person",
        _split_line(metrics),
        size=(5.6, 5.6),
        is_phantom=is_phantom,
    ) as (figure):
        axes = figure.add_axes((0.13, 0.105, 0.81, 0.74))
        curve, lowest = abstention["curve"], 1.0
        for name, colour, key in lines:
            values = [entry[key] for entry in curve if key in entry]
            if values:
                lowest = min([lowest, *values])
                shares = [1 - entry["coverage"] for entry in curve]
                axes.plot(
                    shares, values, color=colour, linewidth=2, marker="o", markersize=4, label=name
                )
        kept = abstention["metrics"].get("accuracy", {}).get("value")
        if _number(kept) is not None:
            lowest = min(lowest, kept)
            axes.plot(
                [abstention["share_review"]], [kept], "o", color=PNEUMONIA, markersize=9, markeredgecolor=PAPER,
                markeredgewidth=1.5, zorder=5, clip_on=False, label=f"this run's review: {abstention['num_review']:,}",
            )  # fmt: skip
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", fontsize=8.5, labelcolor=MUTED)
        axes.set(xlabel="share of images left to a person", ylabel="accuracy on the others")
        axes.set_xlim(0, max(0.5, _number(abstention["share_review"]) or 0.0))
        axes.set_ylim(max(0.0, math.floor(20 * lowest - 0.2) / 20), 1.002)
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)


def draw_plots(
    labels: npt.ArrayLike, scores: npt.ArrayLike, metrics: Mapping[str, Any], folder: Path, *,
    uncalibrated: npt.ArrayLike | None = None, is_phantom: bool = False,
) -> None:  # fmt: skip
    """Write all plots of one split under `folder`/plots.

    They are roc, precision_recall, confusion, calibration, scores and abstention.
    """
    plots = folder / "plots"
    draw_roc(labels, scores, metrics, plots / "roc.png", is_phantom=is_phantom)
    draw_precision_recall(
        labels, scores, metrics, plots / "precision_recall.png", is_phantom=is_phantom
    )
    draw_confusion(metrics, plots / "confusion.png", is_phantom=is_phantom)
    draw_calibration(
        labels,
        scores,
        metrics,
        plots / "calibration.png",
        uncalibrated=uncalibrated,
        is_phantom=is_phantom,
    )
    draw_scores(labels, scores, metrics, plots / "scores.png", is_phantom=is_phantom)
    draw_abstention(metrics, plots / "abstention.png", is_phantom=is_phantom)


def overlay(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """A picture (H, W) under its heat map in [0, 1], of any size, as (H, W, 3) uint8; where it is 0
    the picture stays.

    Colours are matplotlib's inferno without its dark end, so that they differ in brightness too;
    the heat map is scaled to the picture by a triangle filter.
    """
    scaled = np.asarray(
        Image.fromarray(np.asarray(heat, np.float32)).resize(image.shape[::-1], _BILINEAR)
    )  # (H, W)
    level = np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)
    opacity = np.linspace(0, _OPACITY, 256, dtype=np.float32)[
        :, None
    ]  # (256, 1), as in the colours
    colours = (
        opacity
        * 255
        * mpl.colormaps["inferno"](np.linspace(0.35, 0.95, 256))[:, :3].astype(np.float32)
    )
    mixed: npt.NDArray[np.uint8] = np.rint(
        (1 - opacity)[level] * image[..., None] + colours[level]
    ).astype(np.uint8)
    return mixed


@contextmanager
def _figure(
    path: Path,
    title: str,
    subtitle: str,
    *,
    size: tuple[float, float] = (6.2, 4.3),
    is_phantom: bool,
) -> Iterator[Figure]:
    """A figure with its title and subtitle, written to `path` when the block ends without an
    error.
    """
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # plain values are what matplotlib documents
        figure = Figure(figsize=size, dpi=DPI)
        FigureCanvasAgg(figure)
        left = 0.15 / size[0] + 0.015
        figure.text(
            left,
            1 - TITLE_DOWN / size[1],
            title,
            fontsize=TITLE_SIZE,
            fontweight="bold",
            va="center",
        )
        line = subtitle_of(subtitle, is_phantom=is_phantom)
        figure.text(
            left,
            1 - SUBTITLE_DOWN / size[1],
            line,
            fontsize=SUBTITLE_SIZE,
            color=MUTED,
            va="center",
        )
        yield figure
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Glyph .* missing from font"
            )  # a name in a script it lacks
            figure.savefig(
                buffer, format="png", metadata={"Software": None}
            )  # no version, no date: comparable bytes
        figure.clear()
        del figure
        gc.collect()  # figures are full of cycles: without this a training grew by 5 MiB an epoch
    write_picture(path, buffer.getvalue())


def _draw_lines(
    axes: Axes,
    history: Sequence[Mapping[str, Any]],
    lines: Sequence[tuple[str, str, str]],
    *,
    kind: str,
) -> None:
    ends: list[tuple[float, str, str]] = []
    epochs = [int(row["epoch"]) for row in history]
    for name, colour, key in lines:
        values = [_number(row.get(key)) for row in history]
        known = [value for value in values if value is not None]
        if not known:
            continue
        marker = "o" if len(known) <= 40 else None
        axes.plot(
            epochs,
            [math.nan if value is None else value for value in values],
            color=colour,
            linewidth=2,
            marker=marker,
            markersize=3.5,
            label=name,
        )
        text = f"{100 * known[-1]:.1f} %" if kind == "accuracy" else f"{known[-1]:.3f}"
        ends.append((known[-1], f"{name}\n{text}", colour))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    shown = [
        value
        for _, _, key in lines
        for value in (_number(row.get(key)) for row in history)
        if value is not None
    ]
    if kind == "accuracy":
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set_ylim(max(0.0, math.floor(20 * min(shown, default=0.0) - 0.1) / 20), 1)
    else:
        axes.set_ylim(0, 1.08 * max(shown, default=1.0))
    if len(epochs) > 1:
        axes.set_xlim(epochs[0], epochs[-1])
    elif epochs:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.set_xticks(epochs)
    low, high = axes.get_ylim()
    heights = _spread([(value - low) / (high - low) for value, _, _ in ends], gap=0.15)
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        axes.text(
            1.02, height, text, transform=axes.transAxes, color=colour, va="center", fontsize=8.5
        )


def _spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """The heights moved apart so that no two are nearer than `gap`, in their order, within 0 and
    1.
    """
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
    axes = figure.add_axes((0.13, 0.105, 0.81, 0.74))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    return axes


def _mark_operating_point(
    axes: Axes, x: float, y: float, metrics: Mapping[str, Any], *, below: bool
) -> None:
    axes.plot(
        [x],
        [y],
        "o",
        color=PNEUMONIA,
        markersize=9,
        markeredgecolor=PAPER,
        markeredgewidth=1.5,
        zorder=5,
    )
    right = x < 0.55
    axes.annotate(
        f"threshold {metrics['threshold']:.3f}", (x, y), xytext=(10 if right else -10, -14 if below else 12),
        textcoords="offset points", color=PNEUMONIA, fontsize=8.5, ha="left" if right else "right", va="center",
    )  # fmt: skip


def _say(axes: Axes, name: str, metrics: Mapping[str, Any], *, others: Sequence[str] = ()) -> None:
    """Print a metric large in the lower right corner, with its interval, and others small below."""
    entry = metrics["metrics"][name]
    titles = {
        "auroc": "AUROC",
        "average_precision": "average precision",
        "ece": "calibration error (ECE)",
    }
    axes.text(
        0.97, 0.20, format_value(name, entry["value"]), transform=axes.transAxes, ha="right", va="center", fontsize=22,
        fontweight="bold", color=CURVE,
    )  # fmt: skip
    interval = format_interval(name, entry["low"], entry["high"])
    line = titles[name] + (f", 95 % interval {interval}" if interval else "")
    axes.text(
        0.97,
        0.11,
        line,
        transform=axes.transAxes,
        ha="right",
        va="center",
        fontsize=8.5,
        color=MUTED,
    )
    for other in others:
        text = f"Brier score {format_value(other, metrics['metrics'][other]['value'])}"
        axes.text(
            0.97,
            0.04,
            text,
            transform=axes.transAxes,
            ha="right",
            va="center",
            fontsize=8.5,
            color=MUTED,
        )


def _split_line(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['split']} split · {metrics['num_images']:,} images of {metrics['num_patients']:,} patients"


def _lighter(colour: str) -> tuple[float, float, float]:
    red, green, blue = (1 - 0.4 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _has_both(labels: npt.ArrayLike) -> bool:
    return len(np.unique(np.asarray(labels))) == 2


def _number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    return float(value) if value is not None and math.isfinite(value) else None
