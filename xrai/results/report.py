"""report.html: one self-contained page about a run, for doctors, reviewers and whoever comes after.

The page asks no network for anything: images are inlined, all text is escaped by jinja2, and its
own content security policy forbids the rest; its one script, the threshold explorer's, is allowed
by its hash. `xrai.run` and `xrai.evaluate` call it. Every number is one of the typed results.
"""

import base64
import hashlib
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

import xrai
from xrai.results import history, style
from xrai.results.calibration import explain_limit
from xrai.results.history import EpochRow
from xrai.results.lettering import short_names
from xrai.results.metrics import ALL_METRICS, HEADLINES, format_interval, format_value
from xrai.results.types import (
    DatasetFacts,
    Estimate,
    Output,
    OutputResults,
    SplitResults,
    Training,
    told_images,
    told_patients,
)

_MOST_NAMED = 4  # outputs in the heading
_LONGEST_NAME, _LONGEST_UPRIGHT = 26, 18  # characters of a name in a table, and in a column's head
_NUM_BARS = 50  # of the explorer's histogram
_BAR_HEIGHT = 140.0  # of the tallest, where the axis is 1000 wide
# Their scale is not 0 to 1, or lower is better
_NOT_ON_A_BAR = ("mcc", "brier", "ece", "kappa", "log_loss")
_METHODS = {
    "wilson": "Wilson's interval, because too few patients are right, or wrong, to resample",
    "widest": "as far as Wilson's interval and percentiles reach, because few are right, or wrong",
    "newcombe": "Newcombe's interval, because a class has too few patients, or nothing is wrong",
    "combined": "combined from the intervals of each, because not all of these are percentiles",
}


# Of findings that say neither yes nor no, by the word of the config
_COUNTED = {
    "unknown": "counts as unknown",
    "negative": "counts as absent",
    "positive": "counts as present",
}
_READERS = {
    "majority": "a finding is present if more than half of its readers say so",
    "any": "a finding is present if any of its readers says so",
    "all": "a finding is present if all of its readers say so",
    "agree": "a finding is unknown where its readers differ",
}


@dataclass(frozen=True)
class Page:
    """What a page is about."""

    results: SplitResults
    training: Training
    dataset: DatasetFacts  # the one that `results` come from
    config: Mapping[str, Mapping[str, object]]
    environment: Mapping[str, object]  # environment.json
    history: Sequence[EpochRow] = ()
    others: Sequence[SplitResults] = ()  # the run's other splits
    is_evaluation: bool = False  # of a finished run, perhaps on another data set

    @property
    def is_own_data(self) -> bool:
        """Whether the results come from the data set that the run was trained on."""
        return self.dataset.fingerprint == self.training.fingerprint


@dataclass(frozen=True)
class Shown:
    """One estimate as the page shows it, with its place on a bar from 0 to 100 %."""

    title: str
    meaning: str
    value: str
    interval: str
    reason: str
    place: float | None
    low: float | None
    width: float | None


def show(name: str, estimate: Estimate, output: Output | None = None) -> Shown:
    """An estimate in words, those of its meaning for an output, and as places on a bar."""
    interval = format_interval(name, estimate.low, estimate.high)
    is_on_bar = name not in _NOT_ON_A_BAR
    has_range = is_on_bar and bool(interval)
    return Shown(
        title=ALL_METRICS[name].title,
        meaning=ALL_METRICS[name].of(output).meaning if output else "",
        value=format_value(name, estimate.value),
        interval=interval,
        reason=estimate.reason if estimate.is_undefined else "",
        place=_percent(estimate.value) if is_on_bar else None,
        low=_percent(estimate.low) if has_range else None,
        width=_percent(estimate.high - estimate.low) if has_range else None,
    )


def render_report(page: Page, folder: Path) -> str:
    """The whole page as HTML text; the images below curves/ and plots/ of `folder` are shown."""
    results, package = page.results, importlib.resources.files("xrai.results")
    jinja = Environment(
        loader=FunctionLoader(lambda name: package.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters.update(
        {
            "thousands": lambda number: f"{number:,}",
            "duration": _format_duration,
            "share": lambda number, total=1: (
                f"{100 * number / total:.1f} %" if total and math.isfinite(number) else "–"
            ),
            "total": lambda numbers: sum(numbers.values()),
            "sha256": source_hash,
            "sentence": _sentence,
            "value": lambda value, name: format_value(name, value),
        }
    )
    parts = _parts_of(results)
    return jinja.get_template("report.html.jinja").render(
        page=page,
        results=results,
        found=results.main,
        dataset=page.dataset,
        training=page.training,
        config_text=yaml.safe_dump(dict(page.config), sort_keys=False),
        heading=_heading(results),
        parts=parts,
        short=short_names([found.output.name for found in results.outputs], _LONGEST_NAME),
        shorter=short_names([found.output.name for found in results.outputs], _LONGEST_UPRIGHT),
        part=parts[0],
        overview=Overview(results, parts),
        notes_of_means=_notes_of_means(results),
        base64=lambda name: base64.b64encode((folder / name).read_bytes()).decode("ascii"),
        has=lambda name: (folder / name).exists(),
        errors_at=_errors_at(folder / "plots"),
        show=show,
        history_cell=_format_cell,
        history_columns=history.columns_of(page.history),
        metrics=ALL_METRICS,
        headlines=HEADLINES,
        style=style,
        told_images=told_images,
        told_patients=told_patients,
        told_missing=_tell_missing(page.dataset),
        told_reference=_tell_reference(page.dataset),
        version=xrai.__version__,
    )


def _parts_of(results: SplitResults) -> "list[Part]":
    ids = ["explorer"]
    if len(results.outputs) > 1:
        ids = [f"explorer-{number}" for number in range(len(results.outputs))]
    return [
        Part(name, number, found, has_patients=results.has_patients)
        for number, (name, found) in enumerate(zip(ids, results.outputs, strict=True))
    ]


def _errors_at(plots: Path) -> str:
    """The section of the page that has the sheets of the largest errors; empty without one."""
    if any((plots / f"{name}.png").exists() for name in ("mistakes", "overlays")):
        return "mistakes"
    return "outputs" if any(plots.glob("overlays-*.png")) else ""


def _heading(results: SplitResults) -> str:
    names = [found.output.name for found in results.outputs]
    if results.task == "binary":
        names = [_sentence(names[0]), results.main.output.opposite]
    if len(names) > _MOST_NAMED:
        nouns = "classes" if results.task == "multiclass" else "findings"
        return f"{len(names)} {nouns}, from a chest X-ray"
    last = " and " if results.task == "multilabel" else " or "
    return f"{last.join(filter(None, [', '.join(names[:-1]), names[-1]]))}, from a chest X-ray"


def _sentence(text: str) -> str:
    """The text with a capital, unless it begins with a name such as mTB, which keeps its case."""
    return text[:1].upper() + text[1:] if text.partition(" ")[0].islower() else text


def _tell_missing(dataset: DatasetFacts) -> str:
    """What was done where a label is missing, for reviewers."""
    reading = dataset.reading
    told = ["a file that cannot be read is excluded with a reason"]
    if reading.missing == "skip":
        told.append("images that a table names and the source lacks are left out")
    if dataset.task != "multilabel":
        return "; ".join([*told, "no label is imputed"])
    blank = reading.blank
    if blank == "auto":
        blank = "negative" if reading.layout == "chexpert" else "unknown"
    if reading.layout != "nih":  # its findings are names alone
        empty = f"an empty finding {_COUNTED[blank]}"
        if not reading.layout and blank == "unknown":
            empty += ", or as absent where 'No finding' is stated"
        told.append(empty)
    if reading.layout in ("", "nih"):
        told.append("a finding that a list of names leaves out counts as absent")
    return "; ".join([*told, "unknown findings cost no loss and count in no metric"])


def _tell_reference(dataset: DatasetFacts) -> str:
    """How labels were made of what the source states, for reviewers."""
    reading = dataset.reading
    if dataset.task != "multilabel":
        subtype = "; subtypes are classes (labels.target = subtype)"
        return f"the source's labels{subtype if reading.target == 'subtype' else ' as they are'}"
    told = f"the source's labels; an uncertain finding {_COUNTED[reading.uncertain]}"
    return told + (f"; {_READERS[reading.readers]}" if reading.layout == "vindr" else "")


@dataclass(frozen=True)
class Part:
    """One output as the page shows it."""

    key: str  # what the ids of its explorer begin with
    number: int  # among the outputs
    found: OutputResults
    has_patients: bool = True  # whether the patient of any image is known

    @cached_property
    def explorer(self) -> "Explorer":
        """Its threshold explorer."""
        return explore(self.found)

    @cached_property
    def notes(self) -> list[str]:
        """What is undefined or doubtful, in words."""
        return _notes(self.found, has_patients=self.has_patients)


@dataclass(frozen=True)
class Overview:
    """All outputs side by side."""

    results: SplitResults
    parts: Sequence[Part]

    @cached_property
    def ranked(self) -> list[Part]:
        """The parts by AUROC, the lowest first; those without one come last."""
        return [self.parts[number] for number in self.results.ranked]

    @cached_property
    def low(self) -> float:
        """Where the axis of AUROC begins: at 0.4, or lower where a value does."""
        values = [part.found.whole.metrics["auroc"].value for part in self.parts]
        return math.floor(10 * min([0.4, *(each for each in values if math.isfinite(each))])) / 10

    def on_axis(self, estimate: Estimate) -> Shown:
        """An AUROC as places on this axis."""
        value, low, high = (
            (end - self.low) / (1 - self.low)
            for end in (estimate.value, max(estimate.low, self.low), estimate.high)
        )
        return show("auroc", Estimate(value, low, high))

    @cached_property
    def num_correct(self) -> int:
        """Images of which the right class was called."""
        return sum(row[number] for number, row in enumerate(self.results.confusion or ()))

    @cached_property
    def confusions(self) -> list[tuple[int, str, str, int]]:
        """Which class was called another how often, and how many images it has; the most frequent
        ones first.
        """
        names = [part.found.output.name for part in self.parts]
        found = [
            (num, names[row], names[column], sum(calls))
            for row, calls in enumerate(self.results.confusion or ())
            for column, num in enumerate(calls)
            if num and row != column
        ]
        return sorted(found, key=lambda each: -each[0])


@dataclass(frozen=True)
class Explorer:
    """What the threshold explorer's script reads, and the bars of its histogram.

    A bar's height follows the logarithm of its count, so that a few mistakes next to a thousand
    correct calls stay visible.
    """

    data: Mapping[str, object]
    width: float  # of a bar
    bars: Mapping[str, list[tuple[float, float]]]  # left edge and height, by class


def explore(found: OutputResults) -> Explorer:
    """The explorer of an output."""
    calls = found.by_threshold
    stride = calls.num_steps // _NUM_BARS
    numbers = {
        name: (-np.diff([*called[:-1:stride], 0])).tolist()
        for name, called in (("positive", calls.tp), ("negative", calls.fp))
    }
    tallest = math.log1p(max(1, *numbers["positive"], *numbers["negative"]))
    return Explorer(
        data={
            "threshold": found.output.threshold,
            "counts": vars(found.whole.counts),
            **vars(calls),
        },
        width=1000 / _NUM_BARS,
        bars={
            name: [
                (1000 * place / _NUM_BARS, round(_BAR_HEIGHT * math.log1p(count) / tallest, 1))
                for place, count in enumerate(bars)
                if count
            ]
            for name, bars in numbers.items()
        },
    )


def source_hash(script: str) -> str:
    """The name of an inline script in a content security policy (CSP 3, 2.3.1)."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _notes(found: OutputResults, *, has_patients: bool) -> list[str]:
    """What is undefined or doubtful, in words, for the whole, each subtype and each group."""
    parts = [("", found.whole), *found.subtypes.items()]
    parts += [(name, group.measured) for name, group in found.groups.items()]
    notes = []
    if limit := explain_limit(found.output.temperature):
        notes.append(f"{_sentence(limit)}.")
    for where, measured in parts:
        for name, each in measured.metrics.items():
            if each.reason and (not where or each.reason != found.whole.metrics[name].reason):
                about = f"{ALL_METRICS[name].title}{f' ({where})' if where else ''}"
                what = "undefined" if each.is_undefined else "no interval"
                notes.append(f"{about}: {what}, because {each.reason}.")
    notes += _notes_of_methods(found.whole.metrics, has_patients=has_patients)
    return list(dict.fromkeys(notes))


def _notes_of_means(results: SplitResults) -> list[str]:
    """Why means of several outputs have no interval, or one that is not of percentiles."""
    notes = []
    for where, metrics in (" (macro)", results.macro), (" (micro)", results.micro):
        for reason in dict.fromkeys(each.reason for each in metrics.values() if each.reason):
            found = [
                name
                for name, each in metrics.items()
                if each.reason == reason and not each.is_undefined
            ]
            if found:
                notes.append(f"{_titles(found)}{where}: no interval, because {reason}.")
        notes += _notes_of_methods(metrics, where, has_patients=results.has_patients)
    return notes


def _notes_of_methods(
    metrics: Mapping[str, Estimate], where: str = "", *, has_patients: bool
) -> list[str]:
    """The metrics by the method of their interval, but for percentiles."""
    unit = "patients" if has_patients else "patients, each image counting as one"
    notes = []
    for method, words in _METHODS.items():
        if named := [name for name, each in metrics.items() if each.method == method]:
            counted = "" if method == "combined" else f"; counted in {unit}"
            notes.append(f"{_titles(named)}{where}: {words}{counted}.")
    return notes


def _titles(names: Sequence[str]) -> str:
    return ", ".join(ALL_METRICS[name].title for name in names)


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else round(100 * min(max(value, 0.0), 1.0), 2)


def _format_cell(column: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{int(value):,}" if column in ("epoch", "step") else f"{value:.4g}"


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
