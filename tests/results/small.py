"""Scores of a few images, from probabilities as tests write them."""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from xrai.labels import LabelSpec
from xrai.results.measure import measure
from xrai.results.types import Output, OutputResults, Scores, SplitResults, outputs_of


def make_scores(
    labels: Any,
    scores: Any,
    *,
    patients: Sequence[object] | None = None,
    groups: Sequence[str] | None = None,
    subtypes: Sequence[str] | None = None,
    atypicality: Any = None,
    temperature: float = 1.0,
    threshold: float = 0.5,
    split: str = "val",
    is_phantom: bool = False,
) -> Scores:
    """Scores whose probabilities, at this temperature, are `scores` within rounding."""
    num = len(labels)
    names = [str(each) for each in (range(num) if patients is None else patients)]
    if groups is not None:
        names = [f"{group}:{name}" for group, name in zip(groups, names, strict=True)]
    probabilities = np.asarray(scores, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities) - np.log1p(-probabilities)
    return Scores(
        split=split,
        task="binary",
        classes=("NORMAL", "PNEUMONIA"),
        outputs=(Output("pneumonia", "normal", temperature, threshold, "chosen on validation"),),
        labels=np.asarray(labels, np.int8)[:, None],
        logits=temperature * np.clip(logits, -700, 700)[:, None],
        patients=names,
        sources=[f"{'phantom-' * is_phantom}{row}.png" for row in range(num)],
        subtypes=[""] * num if subtypes is None else list(subtypes),
        atypicality=None if atypicality is None else np.asarray(atypicality, np.float64),
    )


def make_classes(labels: Any, logits: Any, *, temperature: float = 1.0, **options: Any) -> Scores:
    """Scores of classes A, B, C … that exclude each other; `labels` (N,) are their numbers."""
    names = tuple(string.ascii_uppercase[: np.shape(logits)[1]])
    spec = LabelSpec("multiclass", names)
    return make_several(spec, spec.matrix(np.asarray(labels)), logits, [temperature], **options)


def make_findings(labels: Any, logits: Any, **options: Any) -> Scores:
    """Scores of findings A, B, C …, each of them 1, 0 or -1 in `labels` (N, C)."""
    num = np.shape(logits)[1]
    spec = LabelSpec("multilabel", tuple(string.ascii_uppercase[:num]))
    return make_several(spec, np.asarray(labels, np.int8), logits, [1.0] * num, **options)


def make_several(
    spec: LabelSpec,
    labels: Any,
    logits: Any,
    temperatures: Sequence[float],
    *,
    thresholds: Sequence[float] = (),
    patients: Sequence[object] | None = None,
    atypicality: Any = None,
) -> Scores:
    """Scores of several outputs; the thresholds of findings are 0.5 unless given."""
    num = len(labels)
    if spec.task == "multilabel" and not thresholds:
        thresholds = [0.5] * len(spec.classes)
    return Scores(
        split="val",
        task=spec.task,
        classes=spec.classes,
        outputs=outputs_of(spec, temperatures, thresholds, "chosen on validation"),
        labels=labels,
        logits=np.asarray(logits, np.float64),
        patients=[str(each) for each in (range(num) if patients is None else patients)],
        sources=[f"{row}.png" for row in range(num)],
        subtypes=[""] * num,
        atypicality=None if atypicality is None else np.asarray(atypicality, np.float64),
    )


def measure_split(
    labels: Any, scores: Any, *, num_bootstrap: int = 20, seed: int = 0, **options: Any
) -> SplitResults:
    """The results of `make_scores`."""
    return measure(make_scores(labels, scores, **options), num_bootstrap=num_bootstrap, seed=seed)


def measure_main(labels: Any, scores: Any, **options: Any) -> OutputResults:
    """The results of the one output."""
    return measure_split(labels, scores, **options).main


@st.composite
def scored_images(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """Images of both classes with scores that are often tied."""
    number = draw(st.integers(4, 60))
    labels = draw(
        st.lists(st.integers(0, 1), min_size=number, max_size=number).filter(
            lambda ls: 0 < sum(ls) < len(ls)
        )
    )
    grid = st.integers(0, 12).map(lambda step: step / 12)
    scores = draw(st.lists(grid | st.floats(0, 1), min_size=number, max_size=number))
    return labels, scores
