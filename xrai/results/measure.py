"""From the scores of a split to its results: every metric, for all images and for parts of them.

`xrai.run` calls `measure`; files, plots, the page and the terminal take their numbers from what it
returns and from nowhere else.
"""

import math

import numpy as np
import numpy.typing as npt

from xrai.results import types
from xrai.results.calibration import checked
from xrai.results.intervals import Key, bootstrap, estimate_all
from xrai.results.metrics import Sample, count_calls_by_threshold, find_curves
from xrai.results.types import Estimate, Labelled, Measured, Scores

PREVALENCES = (0.01, 0.05, 0.10, 0.25, 0.50)  # shares of pneumonia for which calls are valued
COVERAGES = tuple(share / 100 for share in range(100, 45, -5))  # kept, on the abstention curve
NUM_GROUPS = 12  # source groups that are measured, the largest ones

_Chosen = npt.NDArray[np.bool_]


def measure(scores: Scores, *, num_bootstrap: int = 1000, seed: int = 0) -> types.SplitResults:
    """All metrics of one split, for each output and for all of them.

    The positive images of a subtype are measured against all negative ones. A source group of
    one class is measured against all images of the other, a group of both by itself. Intervals are
    those of `xrai.results.intervals`, all of them over the same resamples of patients. Raises
    `XraiError` for a logit that is not finite.
    """
    names, patient_of = np.unique(np.asarray(scores.patients, dtype=str), return_inverse=True)
    known = [scores.labelled(column) for column in range(len(scores.outputs))]
    samples: dict[Key, Sample] = {}
    for column, (output, found) in enumerate(zip(scores.outputs, known, strict=True)):
        checked(found.labels, found.logits, in_unit_range=False)
        patients = patient_of[found.rows]
        samples |= {
            (column, *key): Sample(
                found.labels[own], found.scores[own], found.called[own], patients[own]
            )
            for key, own in _select(scores, found).items()
        }
        if output.temperature != 1:
            before = scores.uncalibrated[found.rows, column]
            samples[column, "before", ""] = Sample(found.labels, before, found.called, patients)
    resampled = bootstrap(samples, num_patients=len(names), num_bootstrap=num_bootstrap, seed=seed)
    measured: list[dict[tuple[str, str], Measured]] = [{} for _ in known]
    for (column, kind, name), sample in samples.items():
        drawn = resampled[column, kind, name]
        measured[column][kind, name] = Measured(
            num_images=len(sample.labels),
            num_patients=len(np.unique(sample.patient_of)),
            counts=sample.counts(),
            metrics=estimate_all(sample, drawn, scores.outputs[column]),
        )
    outputs = tuple(
        _output_results(scores, found, output, own)
        for found, output, own in zip(known, scores.outputs, measured, strict=True)
    )
    return types.SplitResults(
        split=scores.split,
        task=scores.task,
        num_images=len(scores.labels),
        num_patients=len(names),
        num_groups=len(set(scores.groups) - {""}),
        is_phantom=scores.is_phantom,
        outputs=outputs,
        abstention=outputs[0].abstention,
        num_bootstrap=num_bootstrap,
        seed=seed,
    )


def _select(scores: Scores, found: Labelled) -> dict[tuple[str, str], _Chosen]:
    """Every selection of images that is measured."""
    negative = found.labels == 0
    chosen = {("whole", ""): np.ones(len(negative), dtype=bool)}
    subtype_of = np.asarray(scores.subtypes, dtype=str)[found.rows]
    for subtype in sorted(set(subtype_of[~negative].tolist()) - {""}):
        chosen["subtype", subtype] = negative | (subtype_of == subtype)
    group_of = np.asarray(scores.groups, dtype=str)[found.rows]
    names, sizes = np.unique(group_of[group_of != ""], return_counts=True)
    largest = names[np.argsort(-sizes, kind="stable")[:NUM_GROUPS]].tolist()
    for name in sorted(largest) if len(largest) > 1 else []:
        own = group_of == name
        is_of_both = len(np.unique(negative[own])) == 2
        chosen["group", name] = own if is_of_both else own | (negative != negative[own][0])
    kept = ~scores.in_review[found.rows]
    if not kept.all():
        chosen["kept", ""] = kept
    return chosen


def _output_results(
    scores: Scores, found: Labelled, output: types.Output, measured: dict[tuple[str, str], Measured]
) -> types.OutputResults:
    whole = measured["whole", ""]
    before = measured.get(("before", ""), whole).metrics
    groups = {}
    group_of = np.asarray(scores.groups, dtype=str)[found.rows]
    for name in [name for kind, name in measured if kind == "group"]:
        labels = found.labels[group_of == name]
        positive, negative = int(labels.sum()), int((1 - labels).sum())
        opposites = "itself" if negative else f"all {output.opposite}"
        against = opposites if positive else f"all {output.name}"
        groups[name] = types.Group(negative, positive, against, measured["group", name])
    return types.OutputResults(
        output=output,
        whole=whole,
        uncalibrated={name: before[name] for name in ("brier", "ece")},
        subtypes={name: each for (kind, name), each in measured.items() if kind == "subtype"},
        groups=groups,
        abstention=_abstention(scores, found, output, measured.get(("kept", ""), whole)),
        by_threshold=count_calls_by_threshold(found.labels, found.scores),
        by_prevalence=_by_prevalence(whole.metrics["sensitivity"], whole.metrics["specificity"]),
        curves=find_curves(found.labels, found.scores),
    )


def _abstention(
    scores: Scores, found: Labelled, output: types.Output, kept: Measured
) -> types.Abstention:
    """What is left to a person, the metrics of the rest, and accuracy as more is left."""
    is_right = found.called == found.labels
    certainty = scores.certainty[found.rows, scores.outputs.index(output)]
    by_doubt = is_right[np.argsort(-certainty, kind="stable")]
    by_atypicality = None
    if scores.atypicality is not None:
        order = np.argsort(scores.atypicality[found.rows], kind="stable")
        by_atypicality = is_right[order]
    curve = []
    for coverage in COVERAGES if len(is_right) else ():
        num_kept = max(1, round(coverage * len(is_right)))
        accuracy = float(by_doubt[:num_kept].mean())
        typical = None if by_atypicality is None else float(by_atypicality[:num_kept].mean())
        curve.append(types.CurvePoint(coverage, num_kept, accuracy, typical))
    if scores.atypicality is None:
        reason = "the run knows no typicality"
        return types.Abstention(None, math.nan, {}, {}, reason, tuple(curve))
    in_review = scores.in_review[found.rows]
    classes = {output.opposite: found.labels == 0, output.name: found.labels == 1}
    return types.Abstention(
        num_review=int(in_review.sum()),
        share_review=float(in_review.mean()) if len(in_review) else math.nan,
        by_class={
            name: types.ReviewCount(int(own.sum()), int(in_review[own].sum()))
            for name, own in classes.items()
        },
        metrics=kept.metrics,
        reason="" if len(in_review) else "there are no images",
        curve=tuple(curve),
    )


def _by_prevalence(sensitivity: Estimate, specificity: Estimate) -> tuple[types.WorthOfCall, ...]:
    """What a call is worth at each of `PREVALENCES` (Bayes).

    The lower ends matter where no false alarm was seen: the values then say that there is none.
    """

    def worth(prevalence: float, found: float, cleared: float) -> tuple[float, float]:
        tp, fn = prevalence * found, prevalence * (1 - found)
        tn, fp = (1 - prevalence) * cleared, (1 - prevalence) * (1 - cleared)
        return tp / (tp + fp) if tp + fp else math.nan, tn / (tn + fn) if tn + fn else math.nan

    return tuple(
        types.WorthOfCall(
            prevalence,
            *worth(prevalence, sensitivity.value, specificity.value),
            *worth(prevalence, sensitivity.low, specificity.low),
        )
        for prevalence in PREVALENCES
    )
