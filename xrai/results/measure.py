"""From the scores of a split to its results: every metric, for all images and for parts of them.

`xrai.run` calls `measure`; files, plots, the page and the terminal take their numbers from what it
returns and from nowhere else.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xrai.dataset.rows import is_file_patient
from xrai.results import types
from xrai.results.calibration import Floats, checked
from xrai.results.intervals import Key, bootstrap, estimate_all, estimate_mean, share_patients
from xrai.results.metrics import METRICS, ClassSample, Sample, count_calls_by_threshold, find_curves
from xrai.results.types import Estimate, Labelled, Measured, Scores

PREVALENCES = (0.01, 0.05, 0.10, 0.25, 0.50)  # at which PPV and NPV are computed
COVERAGES = tuple(share / 100 for share in range(100, 45, -5))  # kept, on the abstention curve
NUM_GROUPS = 12  # source groups that are measured, the largest ones

_ALL = -1  # the column of what is measured of all outputs together
_Chosen = npt.NDArray[np.bool_]


def measure(scores: Scores, *, num_bootstrap: int = 1000, seed: int = 0) -> types.SplitResults:
    """All metrics of one split, for each output and for all of them.

    The positive images of a subtype are measured against all negative ones. A source group of
    one class is measured against all images of the other, a group of both by itself. Intervals are
    those of `xrai.results.intervals`, all of them over the same resamples of patients. Raises
    `XraiError` for a logit that is not finite.
    """
    patient_of = scores.patient_of
    num_patients = len(np.unique(patient_of))
    known = [scores.labelled(column) for column in range(len(scores.outputs))]
    samples: dict[Key, Sample | ClassSample] = {}
    for column, found in enumerate(known):
        checked(found.labels, found.logits, in_unit_range=False)
        samples |= _samples_of(scores, column, patient_of)
    if scores.task != "binary":
        samples |= _samples_of_all(scores, known, patient_of)
    resampled = bootstrap(
        samples, num_patients=num_patients, num_bootstrap=num_bootstrap, seed=seed
    )
    measured = {
        key: Measured(
            num_images=len(sample.labels),
            num_patients=len(np.unique(sample.patient_of)),
            counts=sample.counts(),
            metrics=estimate_all(sample, resampled[key], scores.outputs[key[0]]),
        )
        for key, sample in samples.items()
        if isinstance(sample, Sample) and key[0] >= 0
    }
    outputs = tuple(_output_results(scores, column, measured) for column in range(len(known)))
    results = types.SplitResults(
        split=scores.split,
        task=scores.task,
        num_images=len(scores.labels),
        num_patients=num_patients,
        num_without_patient=sum(map(is_file_patient, scores.patients)),
        num_groups=len(set(scores.groups) - {""}),
        is_phantom=scores.is_phantom,
        outputs=outputs,
        abstention=outputs[0].abstention,
        num_bootstrap=num_bootstrap,
        seed=seed,
    )
    if scores.task == "binary":
        return results
    return _with_all(results, scores, samples, resampled, measured)


def _samples_of(
    scores: Scores, column: int, patient_of: npt.NDArray[np.intp]
) -> dict[Key, Sample | ClassSample]:
    """All that is measured of one output."""
    found, patients = scores.labelled(column), patient_of[scores.labelled(column).rows]
    samples: dict[Key, Sample | ClassSample] = {
        (column, kind, name): Sample(
            found.labels[own], found.scores[own], found.called[own], patients[own]
        )
        for (kind, name), own in _select(scores, found).items()
    }
    if scores.outputs[column].temperature != 1:
        before = scores.uncalibrated[found.rows, column]
        samples[column, "before", ""] = Sample(found.labels, before, found.called, patients)
    return samples


def _samples_of_all(
    scores: Scores, known: list[Labelled], patient_of: npt.NDArray[np.intp]
) -> dict[Key, Sample | ClassSample]:
    """What is measured of several outputs together: their pooled labels, and calls of classes."""
    samples: dict[Key, Sample | ClassSample] = {
        (_ALL, "whole", ""): _pooled(known, patient_of, np.ones(len(scores.labels), dtype=bool))
    }
    if scores.task == "multilabel":
        samples[_ALL, "kept", ""] = _pooled(known, patient_of, ~scores.in_review)
    if scores.task == "multiclass":
        labels, calls = scores.labels.argmax(axis=1), scores.called.argmax(axis=1)
        whole = np.ones(len(labels), dtype=bool)
        for kind, own in ("classes", whole), ("kept classes", ~scores.in_review):
            samples[_ALL, kind, ""] = ClassSample(
                labels[own], calls[own], scores.probabilities[own], patient_of[own]
            )
    return samples


def _pooled(known: list[Labelled], patient_of: npt.NDArray[np.intp], chosen: _Chosen) -> Sample:
    """The known labels of all outputs together, of the chosen images (N,)."""
    own = [chosen[found.rows] for found in known]
    columns = [
        (found.labels[kept], found.scores[kept], found.called[kept], patient_of[found.rows][kept])
        for found, kept in zip(known, own, strict=True)
    ]
    return Sample(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


def _with_all(
    results: types.SplitResults,
    scores: Scores,
    samples: Mapping[Key, Sample | ClassSample],
    resampled: Mapping[Key, Mapping[str, Floats]],
    measured: Mapping[Key, Measured],
) -> types.SplitResults:
    """The results of several outputs, with what is said of all of them together."""
    noun = "class" if scores.task == "multiclass" else "finding"
    any_of = types.Output(f"any {noun}", f"no {noun}", 1.0, None, "", scores.task)
    estimates = {
        kind: estimate_all(sample, resampled[column, kind, name], any_of)
        for (column, kind, name), sample in samples.items()
        if column == _ALL
    }
    classes = estimates.get("classes", {})
    kept = _means(samples, measured, resampled, "kept", len(scores.outputs))
    if "kept" in estimates:
        kept |= {"accuracy": estimates["kept"]["accuracy"]}
    results = dataclasses.replace(
        results,
        macro=_means(samples, measured, resampled, "whole", len(scores.outputs)) | classes,
        micro=estimates["whole"] | {key: classes[key] for key in classes if key == "accuracy"},
        left_out={
            name: names
            for name in METRICS
            if (
                names := tuple(
                    each.output.name
                    for each in results.outputs
                    if each.whole.metrics[name].is_undefined
                )
            )
        },
        abstention=_abstention_of_all(scores, kept | estimates.get("kept classes", {})),
    )
    whole = samples.get((_ALL, "classes", ""))
    if isinstance(whole, ClassSample):
        results = dataclasses.replace(results, confusion=whole.confusion())
    return results


def _means(
    samples: Mapping[Key, Sample | ClassSample],
    measured: Mapping[Key, Measured],
    resampled: Mapping[Key, Mapping[str, Floats]],
    kind: str,
    num_outputs: int,
) -> dict[str, Estimate]:
    """The macro mean of each metric on one selection of images."""
    keys: list[Key] = [
        (column, kind if (column, kind, "") in measured else "whole", "")
        for column in range(num_outputs)
    ]
    return {
        name: estimate_mean(
            [measured[key].metrics[name] for key in keys],
            np.stack([resampled[key][name] for key in keys]),
            share_patients([samples[key] for key in keys], name),
        )
        for name in METRICS
    }


def _select(scores: Scores, found: Labelled) -> dict[tuple[str, str], _Chosen]:
    """Every selection of images that is measured."""
    negative = found.labels == 0
    chosen = {("whole", ""): np.ones(len(negative), dtype=bool)}
    subtype_of = np.asarray(scores.subtypes, dtype=str)[found.rows]
    subtypes = sorted(set(subtype_of[~negative].tolist()) - {""})
    # the one subtype of a class is the class
    for subtype in subtypes if len(subtypes) > 1 or scores.task == "binary" else []:
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
    scores: Scores, column: int, measured: Mapping[Key, Measured]
) -> types.OutputResults:
    output, found = scores.outputs[column], scores.labelled(column)
    own = {(kind, name): each for (at, kind, name), each in measured.items() if at == column}
    whole = own["whole", ""]
    before = own.get(("before", ""), whole).metrics
    groups, words = {}, output.words
    others = (words["negatives"], words["positives"])  # what a group of the one or the other lacks
    if output.task == "binary":
        others = (output.opposite, output.name)
    group_of = np.asarray(scores.groups, dtype=str)[found.rows]
    for name in [name for kind, name in own if kind == "group"]:
        labels = found.labels[group_of == name]
        positive, negative = int(labels.sum()), int((1 - labels).sum())
        against = "itself" if positive and negative else f"all {others[not positive]}"
        groups[name] = types.Group(negative, positive, against, own["group", name])
    return types.OutputResults(
        output=output,
        whole=whole,
        uncalibrated={name: before[name] for name in ("brier", "ece")},
        subtypes={name: each for (kind, name), each in own.items() if kind == "subtype"},
        groups=groups,
        abstention=_abstention(
            scores,
            _Calls(
                found.rows,
                right=(found.called == found.labels).astype(np.float64),
                known=np.ones(len(found.rows)),
                certainty=scores.certainty[found.rows, column],
            ),
            {output.opposite: found.labels == 0, output.name: found.labels == 1},
            own.get(("kept", ""), whole).metrics,
        ),
        by_threshold=count_calls_by_threshold(found.labels, found.scores),
        by_prevalence=_by_prevalence(whole.metrics["sensitivity"], whole.metrics["specificity"]),
        curves=find_curves(found.labels, found.scores),
    )


@dataclass(frozen=True)
class _Calls:
    """The calls of n images whose label is known."""

    rows: npt.NDArray[np.intp]  # (n,) of the split
    right: Floats  # (n,) number of correct calls
    known: Floats  # (n,) number of calls with a label
    certainty: Floats  # (n,) larger is surer


def _abstention(
    scores: Scores, calls: _Calls, classes: Mapping[str, _Chosen], kept: Mapping[str, Estimate]
) -> types.Abstention:
    """What is left to a person, `kept` being the metrics of the rest, and accuracy as more is
    left; `classes` say which of the images (n,) are of each class.
    """
    by_doubt = np.argsort(-calls.certainty, kind="stable")
    by_atypicality = None
    if scores.atypicality is not None:
        by_atypicality = np.argsort(scores.atypicality[calls.rows], kind="stable")
    curve = []
    for coverage in COVERAGES if len(calls.rows) else ():
        num_kept = max(1, round(coverage * len(calls.rows)))

        def accuracy(order: npt.NDArray[np.intp], num_kept: int = num_kept) -> float:
            first = order[:num_kept]
            return float(calls.right[first].sum() / calls.known[first].sum())

        typical = None if by_atypicality is None else accuracy(by_atypicality)
        curve.append(types.CurvePoint(coverage, num_kept, accuracy(by_doubt), typical))
    if scores.atypicality is None:
        reason = "the run knows no typicality"
        return types.Abstention(None, math.nan, {}, {}, reason, tuple(curve))
    in_review = scores.in_review[calls.rows]
    return types.Abstention(
        num_review=int(in_review.sum()),
        share_review=float(in_review.mean()) if len(in_review) else math.nan,
        by_class={
            name: types.ReviewCount(int(own.sum()), int(in_review[own].sum()))
            for name, own in classes.items()
        },
        metrics=kept,
        reason="" if len(in_review) else "there are no images",
        curve=tuple(curve),
    )


def _abstention_of_all(scores: Scores, kept: Mapping[str, Estimate]) -> types.Abstention:
    """The same for all outputs together: for classes the single call counts, for findings every
    call with a label; an image is as certain as its least certain call.
    """
    is_known = scores.labels >= 0
    rows = np.flatnonzero(is_known.any(axis=1))
    is_known, labels = is_known[rows], scores.labels[rows]
    is_right = is_known & (scores.called[rows] == labels)
    certainty = np.where(is_known, scores.certainty[rows], np.inf).min(axis=1)
    right, known = is_right.sum(axis=1), is_known.sum(axis=1)
    if scores.task == "multiclass":
        right, known = is_right.all(axis=1), np.ones(len(rows))
    found = _abstention(
        scores,
        _Calls(rows, right.astype(np.float64), known.astype(np.float64), certainty),
        {output.name: labels[:, column] == 1 for column, output in enumerate(scores.outputs)},
        kept,
    )
    if found.num_review is None or len(rows) == len(scores.labels):
        return found
    in_review = scores.in_review  # images whose labels are all unknown are in review, too
    return dataclasses.replace(
        found, num_review=int(in_review.sum()), share_review=float(in_review.mean()), reason=""
    )


def _by_prevalence(sensitivity: Estimate, specificity: Estimate) -> tuple[types.WorthOfCall, ...]:
    """PPV and NPV at each of `PREVALENCES` (Bayes), and at the lower ends of both intervals.

    The lower ends matter where no false alarm was seen: the PPV itself is then 1.
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
