"""report.html: one self-contained page about a run, for doctors, reviewers and whoever comes after.

Called by `xrai.train` and `xrai.evaluate`. The page asks for nothing from any network: pictures are inlined, all text
is escaped by jinja2, and its own content security policy forbids the rest. Every number comes from the dictionaries
that metrics.json, summary.json and history.csv hold.
"""

import base64
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from xrai.results import metrics as metrics_module
from xrai.results import plots
from xrai.results.metrics import METRICS, format_interval, format_value

HEADLINES = ("accuracy", "sensitivity", "specificity", "auroc")
_BY_SUBTYPE = ("sensitivity", "auroc", "average_precision", "sensitivity_at_specificity_90")


@dataclass(frozen=True)
class DatasetFacts:
    """What the page says of the data set; the caller takes it from dataset.json."""

    source: str
    fingerprint: str
    image_size: int
    fit: str
    splits: Mapping[str, Mapping[str, int]]  # split -> class -> number of images
    num_found: int
    set_aside: Mapping[str, int] = field(default_factory=dict)  # reason -> number of files
    is_phantom: bool = False


@dataclass(frozen=True)
class Picture:
    """One inlined picture with what it says in words, for eyes and for screen readers."""

    title: str
    caption: str
    uri: str
    is_photo: bool = False  # X-rays keep their grey values in the dark theme
    is_wide: bool = False


def render_report(
    folder: Path,
    *,
    metrics: Mapping[str, Any],
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    dataset: DatasetFacts,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    version: str,
    sheets: Mapping[str, Path] | None = None,
) -> str:
    """The whole page as HTML text.

    `folder` is the run's local folder: pictures that exist under curves/ and plots/ are shown. `metrics`, `summary` and
    `environment` are the dictionaries of the JSON files, `config` the resolved config by section, `history` the rows of
    history.csv, `sheets` pictures of the data by caption.
    """
    source = importlib.resources.files("xrai.results").joinpath("report.html.jinja").read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["thousands"] = lambda number: f"{number:,}"
    jinja.filters["hours"] = _format_duration
    return jinja.from_string(source).render(
        summary=summary,
        metrics=metrics,
        dataset=dataset,
        version=version,
        environment=environment,
        config_text=yaml.safe_dump(dict(config), sort_keys=False),
        config=config,
        history=[{key: _format_cell(key, value) for key, value in row.items()} for row in history],
        headlines=[_row(name, metrics) for name in HEADLINES],
        rows=[_row(name, metrics) for name in METRICS],
        subtypes=[_subtype(name, entry) for name, entry in metrics["subtypes"].items()],
        subtype_columns=[METRICS[name].title for name in _BY_SUBTYPE],
        by_prevalence=[
            (f"{100 * entry['prevalence']:.0f} %", format_value("ppv", entry["ppv"]), format_value("npv", entry["npv"]))
            for entry in metrics["by_prevalence"]
        ],
        notes=_notes(metrics),
        curves=_pictures(folder, _CURVES),
        plots=_pictures(folder, _PLOTS),
        sheets=[
            Picture(title, title, _data_uri(path), is_photo=True, is_wide=True)
            for title, path in (sheets or {}).items()
            if path.exists()
        ],
        splits=_splits(dataset),
        colours={"normal": plots.NORMAL, "pneumonia": plots.PNEUMONIA},
        fixed_rate=metrics_module.FIXED_RATE,
    )


_WIDE = ("plots/scores.png", "plots/mistakes.png")
_CURVES = {
    "curves/loss.png": ("Loss", "Training and validation loss by epoch."),
    "curves/accuracy.png": (
        "Accuracy",
        "Training and validation accuracy by epoch. Augmented validation stands for other hospitals' images.",
    ),
}
_PLOTS = {
    "plots/scores.png": (
        "Scores",
        "How sure the model is. Solid bars lie on the wrong side of the threshold. Heights are on a logarithmic scale.",
    ),
    "plots/confusion.png": ("Calls against truth", "Each row is what the label says, each column what the model says."),
    "plots/roc.png": (
        "ROC curve",
        "What every other threshold would give: pneumonia found against normals called pneumonia.",
    ),
    "plots/precision_recall.png": (
        "Precision and recall",
        "How many calls of pneumonia are right, against how many pneumonias are found; depends on the mix of classes.",
    ),
    "plots/calibration.png": (
        "Calibration",
        "Does a score of 80 % mean pneumonia in 80 of 100? On the dotted line it does. Bars are 95 % Wilson intervals.",
    ),
    "plots/mistakes.png": (
        "The worst mistakes",
        "The images that it got most wrong, as the network sees them, each with its label, its score and its name.",
    ),
}


def _row(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One metric as the page shows it, with its place on a bar from 0 to 100 %."""
    entry = metrics["metrics"][name]
    interval = format_interval(name, entry["low"], entry["high"])
    on_bar = name not in ("mcc", "brier", "ece")
    return {
        "name": name,
        "title": METRICS[name].title,
        "meaning": METRICS[name].meaning,
        "value": format_value(name, entry["value"]),
        "interval": interval,
        "place": _percent(entry["value"]) if on_bar else None,
        "low": _percent(entry["low"]) if interval and on_bar else None,
        "width": _percent(entry["high"] - entry["low"]) if interval and on_bar else None,
        "reason": metrics["reasons"].get(name, ""),
    }


def _subtype(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    counts = entry["counts"]
    return {
        "name": name,
        "num_pneumonia": counts["tp"] + counts["fn"],
        "num_found": counts["tp"],
        "cells": [_row(metric, entry) for metric in _BY_SUBTYPE],
    }


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    """What is undefined or doubtful, in words, for the whole and each subtype."""
    notes = []
    for where, entry in (("", metrics), *metrics["subtypes"].items()):
        for key, reason in entry["reasons"].items():
            name, _, part = key.partition(".")
            about = f"{METRICS[name].title}{f' ({where})' if where else ''}"
            notes.append(f"{about}: no usable interval, {reason}." if part else f"{about}: not defined, {reason}.")
    return notes


def _splits(dataset: DatasetFacts) -> list[dict[str, Any]]:
    largest = max([1, *(sum(classes.values()) for classes in dataset.splits.values())])
    return [
        {
            "name": name,
            "total": sum(classes.values()),
            "classes": dict(classes),
            "bars": [(label, round(100 * number / largest, 2)) for label, number in classes.items()],
        }
        for name, classes in dataset.splits.items()
    ]


def _pictures(folder: Path, wanted: Mapping[str, tuple[str, str]]) -> list[Picture]:
    return [
        Picture(title, caption, _data_uri(folder / name), is_wide=name in _WIDE)
        for name, (title, caption) in wanted.items()
        if (folder / name).exists()
    ]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * min(max(value, 0.0), 1.0), 2)


def _format_cell(column: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if column in ("epoch", "step"):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
