"""From the scores of a split to its results: every metric, for all images and for parts of them.

`xrai.run` calls `measure`; files, plots, the page and the terminal take their numbers from what it
returns and from nowhere else.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from xrai.results.calibration import Floats, calibrated, checked
from xrai.results.intervals import Key, bootstrap, estimate_all
from xrai.results.metrics import Sample, count_calls_by_threshold
from xrai.results.types import (
    Abstention,
    CurvePoint,
    Estimate,
    Group,
    Labelled,
    Measured,
    Output,
    OutputResults,
    ReviewCount,
    Scores,
    SplitResults,
    WorthOfCall,
)

PREVALENCES = (0.01, 0.05, 0.10, 0.25, 0.50)  # shares of pneumonia for which calls are valued
COVERAGES = tuple(share / 100 for share in range(100, 45, -5))  # kept, on the abstention curve
NUM_GROUPS = 12  # source groups that are measured, the largest ones

_Chosen = npt.NDArray[np.bool_]


def measure(scores: Scores, *, num_bootstrap: int = 1000, seed: int = 0) -> SplitResults:
    """All metrics of one split, for each output.

    The positive images of a subtype are measured against all negative ones. A source group of
    one class is measured against all images of the other, a group of both by itself. Intervals are
    those of `xrai.results.intervals`. Raises `XraiError` for a logit that is not finite.
    """
    names, patient_of = np.unique(np.asarray(scores.patients, dtype=str), return_inverse=True)
    outputs = []
    for column, output in enumerate(scores.outputs):
        found = scores.labelled(column)
        checked(found.labels, found.logits, in_unit_range=False)
        groups = _Groups(scores, found)
        samples = _samples(scores, found, output, patient_of, groups)
        resampled = bootstrap(
            samples, num_patients=len(names), num_bootstrap=num_bootstrap, seed=seed
        )
        measured = {key: _measured(each, resampled[key]) for key, each in samples.items()}
        outputs.append(_output_results(scores, found, output, groups, measured))
    return SplitResults(
        split=scores.split,
        num_images=len(scores.labels),
        num_patients=len(names),
        num_groups=len(set(scores.groups) - {""}),
        is_phantom=scores.is_phantom,
        outputs=tuple(outputs),
        num_bootstrap=num_bootstrap,
        seed=seed,
    )


class _Groups:
    """The largest source groups in alphabetical order, and what each is measured against."""

    def __init__(self, scores: Scores, found: Labelled) -> None:
        group_of = np.asarray(scores.groups, dtype=str)[found.rows]
        names, sizes = np.unique(group_of[group_of != ""], return_counts=True)
        largest = names[np.argsort(-sizes, kind="stable")[:NUM_GROUPS]].tolist()
        self.against: dict[str, str] = {}
        self.chosen: dict[str, _Chosen] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        for name in sorted(largest) if len(largest) > 1 else []:
            own = group_of == name
            positive, total = int(found.labels[own].sum()), int(own.sum())
            self.sizes[name] = (total - positive, positive)
            if 0 < positive < total:
                self.chosen[name], self.against[name] = own, "itself"
            else:
                self.chosen[name] = own | (found.labels != found.labels[own][0])
                self.against[name] = "all normal" if positive else "all pneumonia"


def _samples(
    scores: Scores,
    found: Labelled,
    output: Output,
    patient_of: npt.NDArray[np.intp],
    groups: _Groups,
) -> dict[Key, Sample]:
    """Every selection of images that is measured."""
    negative = found.labels == 0
    subtype_of = np.asarray(scores.subtypes, dtype=str)[found.rows]
    kept = ~scores.in_review[found.rows]
    chosen: dict[Key, _Chosen] = {("whole", ""): np.ones(len(found.rows), dtype=bool)}
    for subtype in sorted(set(subtype_of[~negative].tolist()) - {""}):
        chosen["subtype", subtype] = negative | (subtype_of == subtype)
    chosen |= {("group", name): own for name, own in groups.chosen.items()}
    if not kept.all():
        chosen["kept", ""] = kept
    patients = patient_of[found.rows]
    samples = {
        key: Sample(found.labels[own], found.scores[own], output.threshold, patients[own])
        for key, own in chosen.items()
    }
    if output.temperature != 1:
        before = calibrated(found.logits)
        samples["before", ""] = Sample(found.labels, before, output.threshold, patients)
    return samples


def _measured(sample: Sample, resampled: Mapping[str, Floats]) -> Measured:
    return Measured(
        num_images=len(sample.labels),
        num_patients=len(np.unique(sample.patient_of)),
        counts=sample.counts(),
        metrics=estimate_all(sample, resampled),
    )


def _output_results(
    scores: Scores,
    found: Labelled,
    output: Output,
    groups: _Groups,
    measured: Mapping[Key, Measured],
) -> OutputResults:
    whole = measured["whole", ""]
    before = measured.get(("before", ""), whole).metrics
    return OutputResults(
        output=output,
        whole=whole,
        uncalibrated={name: before[name] for name in ("brier", "ece")},
        subtypes={name: each for (kind, name), each in measured.items() if kind == "subtype"},
        groups={
            name: Group(*groups.sizes[name], against, measured["group", name])
            for name, against in groups.against.items()
        },
        abstention=_abstention(scores, found, output, measured.get(("kept", ""), whole)),
        by_threshold=count_calls_by_threshold(found.labels, found.scores),
        by_prevalence=_by_prevalence(whole.metrics["sensitivity"], whole.metrics["specificity"]),
    )


def _abstention(scores: Scores, found: Labelled, output: Output, kept: Measured) -> Abstention:
    """What is left to a person, the metrics of the rest, and accuracy as more is left."""
    is_right = (found.scores >= output.threshold) == found.labels
    certainty = np.abs(found.logits / output.temperature - _logit(output.threshold))
    by_doubt = is_right[np.argsort(-certainty, kind="stable")]
    by_atypicality = None
    if scores.atypicality is None:
        review = Abstention(None, math.nan, {}, {}, "the run knows no typicality", ())
    else:
        atypicality, in_review = (
            np.asarray(each)[found.rows] for each in (scores.atypicality, scores.in_review)
        )
        by_atypicality = is_right[np.argsort(atypicality, kind="stable")]
        classes = {output.opposite: found.labels == 0, output.name: found.labels == 1}
        num = len(in_review)
        review = Abstention(
            num_review=int(in_review.sum()),
            share_review=float(in_review.mean()) if num else math.nan,
            by_class={
                name: ReviewCount(int(own.sum()), int(in_review[own].sum()))
                for name, own in classes.items()
            },
            metrics=kept.metrics,
            reason="" if num else "there are no images",
            curve=(),
        )
    curve = []
    for coverage in COVERAGES if len(is_right) else ():
        num_kept = max(1, round(coverage * len(is_right)))
        accuracy = float(by_doubt[:num_kept].mean())
        typical = None if by_atypicality is None else float(by_atypicality[:num_kept].mean())
        curve.append(CurvePoint(coverage, num_kept, accuracy, typical))
    return dataclasses.replace(review, curve=tuple(curve))


def _logit(probability: float) -> float:
    tiny = np.finfo(np.float64).tiny
    return math.log(max(probability, tiny)) - math.log(max(1 - probability, tiny))


def _by_prevalence(sensitivity: Estimate, specificity: Estimate) -> tuple[WorthOfCall, ...]:
    """What a call is worth at each of `PREVALENCES` (Bayes).

    The lower ends matter where no false alarm was seen: the values then say that there is none.
    """

    def worth(prevalence: float, found: float, cleared: float) -> tuple[float, float]:
        tp, fn = prevalence * found, prevalence * (1 - found)
        tn, fp = (1 - prevalence) * cleared, (1 - prevalence) * (1 - cleared)
        return tp / (tp + fp) if tp + fp else math.nan, tn / (tn + fn) if tn + fn else math.nan

    return tuple(
        WorthOfCall(
            prevalence,
            *worth(prevalence, sensitivity.value, specificity.value),
            *worth(prevalence, sensitivity.low, specificity.low),
        )
        for prevalence in PREVALENCES
    )
