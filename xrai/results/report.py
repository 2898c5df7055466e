"""report.html: one self-contained page about a run, for doctors, reviewers and whoever comes after.

Called by `xrai.train` and `xrai.evaluate`. The page asks for nothing from any network: pictures are
inlined, all text is escaped by jinja2, and its own content security policy forbids the rest; the
one script, of the threshold explorer, is allowed by its hash. Every number comes from the
dictionaries that metrics.json, summary.json and history.csv hold.
"""

import base64
import hashlib
import importlib.resources
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from xrai.results import metrics as metrics_module
from xrai.results import style
from xrai.results.metrics import METRICS, format_interval, format_value

HEADLINES = ("accuracy", "sensitivity", "specificity", "auroc")
_BY_SUBTYPE = ("sensitivity", "auroc", "average_precision", "sensitivity_at_specificity_90")
_BY_GROUP = ("sensitivity", "specificity", "auroc")
_PUBLIC_GROUPS = {
    "IM",
    "NORMAL2",
    "bacteria",
    "virus",
}  # what the public data set's file names state
_NUM_BARS = 50  # of the explorer's histogram
_BAR_HEIGHT = 140.0  # of the tallest, where the axis is 1000 wide


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
    num_patients: Mapping[str, int] = field(default_factory=dict)  # split -> number of patients
    groups: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict
    )  # split -> source group -> number of images

    @property
    def is_public(self) -> bool:
        """Whether the files are named as those of the public data set, of which the page then
        says what is known.
        """
        names = {name for groups in self.groups.values() for name in groups}
        return bool(names) and names <= _PUBLIC_GROUPS


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
    others: Mapping[str, Mapping[str, Any]] | None = None,
    is_evaluation: bool = False,
) -> str:
    """The whole page as HTML text.

    `folder` is the run's local folder: pictures that exist under curves/ and plots/ are shown.
    `metrics`, `summary` and `environment` are the dictionaries of the JSON files, `config` the
    resolved config by section, `history` the rows of history.csv, `sheets` pictures of the data by
    caption, `others` the metrics of the run's other splits. With `is_evaluation` the page is about
    a finished run on the data set that `dataset` tells of.
    """
    source = (
        importlib.resources.files("xrai.results")
        .joinpath("report.html.jinja")
        .read_text(encoding="utf-8")
    )
    jinja = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters["thousands"] = lambda number: f"{number:,}"
    jinja.filters["hours"] = _format_duration
    jinja.filters["sha256"] = _source_hash
    splits = {metrics["split"]: metrics, **(others or {})}
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
        groups=[_group(name, entry) for name, entry in metrics["groups"].items()],
        group_columns=[METRICS[name].title for name in _BY_GROUP],
        by_split=[_split(name, entry) for name, entry in splits.items()] if others else [],
        split_columns=[METRICS[name].title for name in HEADLINES],
        baselines=[_baseline(name, entry) for name, entry in metrics.get("baselines", {}).items()],
        calibration=[
            (
                METRICS[name].title,
                *(_row(name, {"metrics": part, "reasons": {}}) for part in _parts(metrics)),
            )
            for name in ("brier", "ece")
        ],
        abstention=_abstention(metrics),
        abstention_plots=_pictures(folder, _ABSTENTION),
        explorer=_explorer(metrics),
        prevalences=[entry["prevalence"] for entry in metrics["by_prevalence"]],
        checklists=_CHECKLISTS,
        is_evaluation=is_evaluation,
        by_prevalence=[
            {
                "share": f"{100 * entry['prevalence']:.0f} %",
                **{
                    name: format_value(name[:3], entry[name])
                    for name in ("ppv", "npv", "ppv_low", "npv_low")
                },
            }
            for entry in metrics["by_prevalence"]
        ],
        notes=_notes(metrics),
        curves=_pictures(folder, _CURVES),
        plots=_pictures(folder, _PLOTS),
        mistakes=_pictures(folder, _MISTAKES)[:1],  # with heat maps where there are some
        sheets=[
            Picture(title, title, _data_uri(path), is_photo=True, is_wide=True)
            for title, path in (sheets or {}).items()
            if path.exists()
        ],
        splits=_splits(dataset),
        colours={"normal": style.NORMAL, "pneumonia": style.PNEUMONIA},
        fixed_rate=metrics_module.FIXED_RATE,
    )


_WIDE = ("plots/scores.png", "plots/overlays.png", "plots/mistakes.png")
_PHOTOS = ("plots/overlays.png", "plots/mistakes.png")
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
    "plots/confusion.png": (
        "Calls against truth",
        "Each row is what the label says, each column what the model says.",
    ),
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
}
_ABSTENTION = {
    "plots/abstention.png": (
        "Leaving images to a person",
        "How accurate the rest is where images are left to a person, the least sure or the least typical ones first.",
    )
}
_MISTAKES = {
    "plots/overlays.png": (
        "The worst mistakes",
        "The images that it got most wrong, as the network sees them, each with its label, its score and its name; "
        "beside it the heat map of what spoke for pneumonia. A heat map explains the network. It is no localiser: it "
        "has not been compared with what radiologists mark.",
    ),
    "plots/mistakes.png": (
        "The worst mistakes",
        "The images that it got most wrong, as the network sees them, each with its label, its score and its name.",
    ),
}
# the fields that reviewers look for, what is said of them, and where
_CHECKLISTS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "CLAIM 2024 (Tejani et al., Radiology: Artificial Intelligence 2024)": (
        ("Kind of AI, intended use and clinical role", "deep learning; for research alone", "use"),
        (
            "Study design and goal",
            "retrospective; the making of a model, on images that were there",
            "data",
        ),
        (
            "Data sources, inclusion and exclusion",
            "every file found is counted, used or set aside with a reason",
            "data",
        ),
        (
            "Preprocessing, selection of subsets",
            "one function for training and use; its settings are in the config",
            "data",
        ),
        (
            "De-identification",
            "no header of a file is kept, no name of a patient; paths of files are",
            "data",
        ),
        (
            "Missing data",
            "a file that cannot be read is set aside with a reason; nothing is imputed",
            "data",
        ),
        ("Image acquisition", "not known to this program", "data"),
        (
            "Reference standard, annotators, their variability",
            "the source's labels as they are",
            "data",
        ),
        (
            "Partitions, and the level at which they are disjoint",
            "by patient; identical images count as one",
            "data",
        ),
        (
            "Intended sample size",
            "none was planned; the intervals say what the number of patients allows",
            "measures",
        ),
        ("Model, libraries, initial parameters", "stated, with versions and seed", "provenance"),
        (
            "Training and choice of the final model",
            "by AUROC on augmented validation images",
            "training",
        ),
        ("Ensembling", "none", "training"),
        ("Metrics, uncertainty", "with 95 % intervals, resampled by patient", "measures"),
        ("Robustness", "kinds of pneumonia, source groups, shortcuts alone, abstention", "kinds"),
        ("Explainability", "heat maps of the worst mistakes", "mistakes"),
        (
            "Internal and external testing",
            "the splits named here; external data by xrai.evaluate",
            "measures",
        ),
        ("Registration of a trial", "none", "limits"),
        ("Numbers of patients and examinations", "stated by split and class", "data"),
        ("Demographic and clinical characteristics", "not known to this program", "data"),
        ("Failure analysis", "the most confident mistakes", "mistakes"),
        ("Limitations, implications for practice", "stated", "limits"),
        (
            "Software, model and data; protocol",
            "model.pt and config of the run; fingerprint of the data",
            "provenance",
        ),
        ("Funding", "not known to this program", "provenance"),
    ),
    "Model card (Mitchell et al. 2019)": (
        ("Model details", "stated", "provenance"),
        ("Intended use", "stated, with what it is not for", "use"),
        (
            "Factors",
            "kind of pneumonia and source group; age, sex and machine are not in the data",
            "kinds",
        ),
        ("Metrics", "stated, with the reason for the threshold", "decisions"),
        ("Training data, evaluation data", "stated", "data"),
        ("Quantitative analyses", "whole, by kind, by source", "kinds"),
        ("Ethical considerations", "stated with the limits", "limits"),
        ("Caveats and recommendations", "stated", "limits"),
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


def _group(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A source group's row: the measures that its own images move, the others a dash."""
    hidden = {"all pneumonia": "sensitivity", "all normal": "specificity"}.get(entry["against"])
    return {
        "name": name,
        "num_normal": entry["num_normal"],
        "num_pneumonia": entry["num_pneumonia"],
        "against": entry["against"],
        "cells": [
            {"value": "", "interval": ""} if key == hidden else _row(key, entry)
            for key in _BY_GROUP
        ],
    }


def _split(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "num_images": metrics["num_images"],
        "num_patients": metrics["num_patients"],
        "cells": [_row(key, metrics) for key in HEADLINES],
    }


def _baseline(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "meaning": entry["meaning"],
        "num_train": entry["num_train"],
        "reason": entry["reason"],
        "auroc": _row("auroc", {**entry, "reasons": {}}),
        "accuracy": _row("accuracy", {**entry, "reasons": {}}),
    }


def _parts(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [metrics["calibration"][when] for when in ("before", "after")]


def _abstention(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page says of images left to a person; None where the run knows no typicality."""
    found = metrics["abstention"]
    if found["num_review"] is None:
        return None
    return {
        "num_review": found["num_review"],
        "share": _format_share(found["share_review"]),
        "by_class": [
            (
                name,
                entry["num_review"],
                entry["num_images"],
                _format_share(entry["num_review"], entry["num_images"]),
            )
            for name, entry in found["by_class"].items()
        ],
        "rows": [
            (METRICS[name].title, _row(name, metrics), _row(name, {**found, "reasons": {}}))
            for name in HEADLINES
        ],
    }


def _explorer(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the threshold explorer needs: counts by threshold for its script, and the bars of its
    histogram.

    A bar's height follows the logarithm of its count, so that a few mistakes beside a thousand hits
    stay visible.
    """
    by_threshold, counts = metrics["by_threshold"], metrics["counts"]
    stride = by_threshold["num_steps"] // _NUM_BARS
    bars = {}
    for name, key in (("pneumonia", "tp"), ("normal", "fp")):
        edges = [*by_threshold[key][:-1:stride], 0]
        bars[name] = [before - after for before, after in itertools.pairwise(edges)]
    tallest = math.log1p(max(1, *bars["pneumonia"], *bars["normal"]))
    return {
        "data": {
            "threshold": metrics["threshold"],
            "counts": dict(counts),
            "num_steps": by_threshold["num_steps"],
            "tp": by_threshold["tp"],
            "fp": by_threshold["fp"],
        },
        "width": 1000 / _NUM_BARS,
        "bars": {
            name: [
                (
                    round(1000 * number / _NUM_BARS, 1),
                    round(_BAR_HEIGHT * math.log1p(count) / tallest, 1),
                )
                for number, count in enumerate(found)
                if count
            ]
            for name, found in bars.items()
        },
        "rows": [_row(name, metrics) for name in ("sensitivity", "specificity", "ppv", "npv")],
    }


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    """What is undefined or doubtful, in words, for the whole and each subtype."""
    notes = []
    for where, entry in (("", metrics), *metrics["subtypes"].items(), *metrics["groups"].items()):
        for key, reason in entry["reasons"].items():
            name, _, part = key.partition(".")
            about = f"{METRICS[name].title}{f' ({where})' if where else ''}"
            notes.append(
                f"{about}: no interval, {reason}." if part else f"{about}: not defined, {reason}."
            )
    methods = {
        "wilson": "Wilson's interval, for too few errors to resample",
        "newcombe": "Newcombe's interval",
    }
    for method, words in methods.items():
        named = [
            METRICS[name].title
            for name, entry in metrics["metrics"].items()
            if entry["method"] == method
        ]
        if named:
            notes.append(f"{', '.join(named)}: {words}; counted in patients.")
    return list(dict.fromkeys(notes))


def _splits(dataset: DatasetFacts) -> list[dict[str, Any]]:
    largest = max([1, *(sum(classes.values()) for classes in dataset.splits.values())])
    return [
        {
            "name": name,
            "total": sum(classes.values()),
            "classes": dict(classes),
            "num_patients": dataset.num_patients.get(name),
            "groups": ", ".join(
                f"{group or 'unnamed'} {number:,}"
                for group, number in sorted(dataset.groups.get(name, {}).items())
            ),
            "bars": [
                (label, round(100 * number / largest, 2)) for label, number in classes.items()
            ],
        }
        for name, classes in dataset.splits.items()
    ]


def _pictures(folder: Path, wanted: Mapping[str, tuple[str, str]]) -> list[Picture]:
    return [
        Picture(
            title,
            caption,
            _data_uri(folder / name),
            is_photo=name in _PHOTOS,
            is_wide=name in _WIDE,
        )
        for name, (title, caption) in wanted.items()
        if (folder / name).exists()
    ]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _source_hash(script: str) -> str:
    """The name of an inline script in a content security policy (CSP 3, 2.3.1)."""
    return (
        "'sha256-"
        + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        + "'"
    )


def _format_share(number: float, total: float = 1) -> str:
    return f"{100 * number / total:.1f} %" if total and math.isfinite(number) else "–"


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
