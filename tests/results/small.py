"""Scores of a few images, from probabilities as tests write them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from xrai.results.measure import measure
from xrai.results.types import Output, OutputResults, Scores, SplitResults


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
