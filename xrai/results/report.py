"""report.html: one self-contained page about a run, for doctors, reviewers and whoever comes after.

The page asks no network for anything: images are inlined, all text is escaped by jinja2, and its
own content security policy forbids the rest; its one script, the threshold explorer's, is allowed
by its hash. `xrai.run` and `xrai.evaluate` call it. Every number is one of the typed results.
"""

import base64
import functools
import hashlib
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined

import xrai
from xrai.results import history, style
from xrai.results.history import EpochRow
from xrai.results.metrics import HEADLINES, METRICS, format_interval, format_value
from xrai.results.types import DatasetFacts, Estimate, Output, OutputResults, SplitResults, Training

_NUM_BARS = 50  # of the explorer's histogram
_BAR_HEIGHT = 140.0  # of the tallest, where the axis is 1000 wide
_NOT_ON_A_BAR = ("mcc", "brier", "ece")  # their scale is not 0 to 1, or lower is better
_METHODS = {
    "wilson": "Wilson's interval, because there are too few errors to resample",
    "newcombe": "Newcombe's interval",
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


def show(name: str, estimate: Estimate, *, output: Output) -> Shown:
    """An estimate of an output in words and as places on a bar."""
    interval = format_interval(name, estimate.low, estimate.high)
    is_on_bar = name not in _NOT_ON_A_BAR
    has_range = is_on_bar and bool(interval)
    return Shown(
        title=METRICS[name].title,
        meaning=METRICS[name].of(output).meaning,
        value=format_value(name, estimate.value),
        interval=interval,
        reason=estimate.reason if estimate.is_undefined else "",
        place=_percent(estimate.value) if is_on_bar else None,
        low=_percent(estimate.low) if has_range else None,
        width=_percent(estimate.high - estimate.low) if has_range else None,
    )


def render_report(page: Page, folder: Path) -> str:
    """The whole page as HTML text; the images below curves/ and plots/ of `folder` are shown."""
    package = importlib.resources.files("xrai.results")
    template = package.joinpath("report.html.jinja").read_text(encoding="utf-8")
    jinja = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
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
            "value": lambda value, name: format_value(name, value),
        }
    )
    return jinja.from_string(template).render(
        page=page,
        results=page.results,
        found=page.results.main,
        dataset=page.dataset,
        training=page.training,
        config_text=yaml.safe_dump(dict(page.config), sort_keys=False),
        notes=_notes(page.results.main),
        explorer=explore(page.results.main),
        base64=lambda name: base64.b64encode((folder / name).read_bytes()).decode("ascii"),
        has=lambda name: (folder / name).exists(),
        show=functools.partial(show, output=page.results.main.output),
        history_cell=_format_cell,
        history_columns=history.COLUMNS,
        metrics=METRICS,
        headlines=HEADLINES,
        style=style,
        version=xrai.__version__,
    )


@dataclass(frozen=True)
class Explorer:
    """What the threshold explorer's script reads, and the bars of its histogram.

    A bar's height follows the logarithm of its count, so that a few mistakes beside a thousand
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


def _notes(found: OutputResults) -> list[str]:
    """What is undefined or doubtful, in words, for the whole, each subtype and each group."""
    parts = [("", found.whole), *found.subtypes.items()]
    parts += [(name, group.measured) for name, group in found.groups.items()]
    notes = []
    for where, measured in parts:
        for name, each in measured.metrics.items():
            if each.reason:
                about = f"{METRICS[name].title}{f' ({where})' if where else ''}"
                what = "undefined" if each.is_undefined else "no interval"
                notes.append(f"{about}: {what}, because {each.reason}.")
    for method, words in _METHODS.items():
        whole = found.whole.metrics.items()
        if named := [METRICS[name].title for name, each in whole if each.method == method]:
            notes.append(f"{', '.join(named)}: {words}; counted in patients.")
    return list(dict.fromkeys(notes))


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
