"""How good the scores are: metrics with patient-level bootstrap intervals, and the operating threshold.

Called by `xrai.train` and `xrai.evaluate` with arrays. The dictionary that `evaluate_scores` returns is metrics.json;
the summary, the report and the last lines on the terminal take their numbers from it and from nowhere else.

A score is the probability of pneumonia in [0, 1]; an image is called pneumonia where score >= threshold; labels are 1
for pneumonia and 0 for normal. Values are scikit-learn's where it has the metric. Intervals are percentiles over
resamples of patients (not of images: one patient's images are alike), computed from weights, many resamples at once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
)

from xrai.errors import XraiError

SCHEMA_VERSION = 1
NUM_CALIBRATION_BINS = 10
PREVALENCES = (0.01, 0.05, 0.10, 0.25, 0.50)  # shares of pneumonia for which PPV and NPV are worked out
FIXED_RATE = 0.90  # the specificity at which sensitivity is read off the ROC curve, and the reverse
_CONFIDENCE = 0.95
_RESAMPLES_AT_ONCE = 50  # keeps the arrays of one step in the processor's cache
_MIN_DEFINED_SHARE = 0.9  # fewer resamples in which a metric is defined make no interval

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MetricInfo:
    """What people need to know of one metric to read it."""

    title: str
    meaning: str
    unit: Literal["percent", "number"]
    undefined: str  # the reason given where it has no value


METRICS: Mapping[str, MetricInfo] = {
    "accuracy": MetricInfo("Accuracy", "share of images called right", "percent", "there are no images"),
    "sensitivity": MetricInfo(
        "Sensitivity", "share of pneumonia images called pneumonia", "percent", "there are no pneumonia images"
    ),
    "specificity": MetricInfo(
        "Specificity", "share of normal images called normal", "percent", "there are no normal images"
    ),
    "ppv": MetricInfo(
        "PPV",
        "share of images called pneumonia that are; holds for this split's mix of classes only",
        "percent",
        "no image was called pneumonia",
    ),
    "npv": MetricInfo(
        "NPV",
        "share of images called normal that are; holds for this split's mix of classes only",
        "percent",
        "no image was called normal",
    ),
    "auroc": MetricInfo(
        "AUROC",
        "chance that a pneumonia image scores above a normal one; needs no threshold",
        "number",
        "it needs images of both classes",
    ),
    "average_precision": MetricInfo(
        "Average precision", "area under the precision-recall curve", "number", "it needs images of both classes"
    ),
    "f1": MetricInfo(
        "F1", "harmonic mean of PPV and sensitivity", "number", "no image is pneumonia and none was called pneumonia"
    ),
    "mcc": MetricInfo(
        "MCC",
        "correlation of calls with labels, -1 to 1 (Matthews)",
        "number",
        "all images have one label or got one call",
    ),
    "brier": MetricInfo(
        "Brier score", "mean squared distance of score and label; lower is better", "number", "there are no images"
    ),
    "ece": MetricInfo(
        "ECE",
        f"mean distance of score and observed share over {NUM_CALIBRATION_BINS} bins; lower is better",
        "number",
        "there are no images",
    ),
    "sensitivity_at_specificity_90": MetricInfo(
        "Sensitivity at 90 % specificity",
        "the highest that any threshold with at least 90 % specificity reaches on these images",
        "percent",
        "it needs images of both classes",
    ),
    "specificity_at_sensitivity_90": MetricInfo(
        "Specificity at 90 % sensitivity",
        "the highest that any threshold with at least 90 % sensitivity reaches on these images",
        "percent",
        "it needs images of both classes",
    ),
}

_SCIKIT_ON_CALLS: Mapping[str, Callable[..., Any]] = {
    "accuracy": accuracy_score,
    "sensitivity": recall_score,
    "specificity": lambda labels, calls: recall_score(labels, calls, pos_label=0),
    "ppv": precision_score,
    "npv": lambda labels, calls: precision_score(labels, calls, pos_label=0),
    "f1": f1_score,
    "mcc": matthews_corrcoef,
}
_SCIKIT_ON_SCORES: Mapping[str, Callable[..., Any]] = {
    "auroc": roc_auc_score,
    "average_precision": average_precision_score,
    "brier": brier_score_loss,
}


def evaluate_scores(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    threshold: float,
    groups: npt.ArrayLike,
    subtypes: npt.ArrayLike,
    split: str,
    threshold_source: str,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of one split, as the dictionary that metrics.json holds.

    `labels` (N,) 0 or 1; `scores` (N,) in [0, 1]; `groups` (N,) patient keys, resampled as a whole; `subtypes` (N,)
    text, empty where unknown: each subtype's pneumonia images are measured against all normal images.
    `threshold_source` says in words where the threshold comes from. Intervals are 95 % percentile intervals over
    `num_bootstrap` resamples of patients (Efron and Tibshirani 1993, ch. 13; Field and Welsh 2007 on clusters).

    A metric that is undefined is NaN (null in JSON), and `reasons` says why, under the metric's name; a missing or
    doubtful interval has its reason under `NAME.interval`; a subtype has its own `reasons`. Raises `XraiError` for a
    score that is not a number in [0, 1].
    """
    labels, scores = _checked(labels, scores)
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    subtype_of = np.asarray(subtypes).astype(str)
    if not (len(labels) == len(group_of) == len(subtype_of)):
        raise ValueError(f"{len(labels)} labels, {len(group_of)} groups and {len(subtype_of)} subtypes must be equal")
    normal = labels == 0
    selections = {"": np.ones(len(labels), dtype=bool)}
    for subtype in sorted({str(name) for name in subtype_of[~normal]} - {""}):
        selections[subtype] = normal | (subtype_of == subtype)
    subsets = {
        name: _Subset(labels[chosen], scores[chosen], threshold, group_of[chosen])
        for name, chosen in selections.items()
    }
    resampled = _bootstrap(subsets, num_groups=len(names), num_bootstrap=num_bootstrap, seed=seed)
    measured = {name: _summarise(subset, resampled[name]) for name, subset in subsets.items()}
    whole = measured.pop("")
    whole_metrics = whole["metrics"]
    return {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "num_images": whole.pop("num_images"),
        "num_patients": whole.pop("num_patients"),
        "threshold": float(threshold),
        "threshold_source": threshold_source,
        **whole,
        "subtypes": measured,
        "by_prevalence": _by_prevalence(whole_metrics["sensitivity"]["value"], whole_metrics["specificity"]["value"]),
        "bootstrap": {"num_resamples": num_bootstrap, "unit": "patient", "confidence": _CONFIDENCE, "seed": seed},
    }


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve of labels (N,) and scores (N,), ties counted half; NaN unless both classes are there."""
    labels, scores = _checked(labels, scores, in_unit_range=False)
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else math.nan


def choose_threshold(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The threshold that maximises sensitivity + specificity - 1 (Youden 1950).

    Every threshold between two neighbouring scores makes the same calls, so the maximum is a plateau: the middle of the
    widest one is taken (of equally wide ones the lowest), away from the scores at its ends, so that small changes of
    scores do not change the calls. Plateaus end at 0 and 1. Values of J are compared exactly, in whole numbers.

    `labels` (N,) 0 or 1, `scores` (N,) in [0, 1]. Raises `XraiError` unless both classes are there.
    """
    labels, scores = _checked(labels, scores)
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    if num_positive == 0 or num_negative == 0:
        missing = "normal" if num_negative == 0 else "pneumonia"
        raise XraiError(
            f"no threshold can be chosen on {len(labels)} images: none of them is {missing}; it needs both classes"
        )
    cuts, level_of = np.unique(scores, return_inverse=True)
    positives = np.bincount(level_of, weights=labels, minlength=len(cuts)).astype(np.int64)
    negatives = np.bincount(level_of, minlength=len(cuts)) - positives
    # thresholds in (edges[i], edges[i + 1]] call the scores from cuts[i] up pneumonia; the last interval calls none
    called_positive = np.append(np.cumsum(positives[::-1])[::-1], 0)
    called_negative = np.append(np.cumsum(negatives[::-1])[::-1], 0)
    youden = called_positive * num_negative - called_negative * num_positive
    edges = np.concatenate([[0.0], cuts, [1.0]])
    best = np.concatenate([[False], youden == youden.max(), [False]])
    starts = np.flatnonzero(~best[:-1] & best[1:])  # runs of neighbouring best intervals are one plateau
    ends = np.flatnonzero(best[:-1] & ~best[1:])
    widest = int(np.argmax(edges[ends] - edges[starts]))
    low, high = float(edges[starts[widest]]), float(edges[ends[widest]])
    middle = (low + high) / 2
    return middle if low < middle else high  # neighbouring floats have no middle


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose score lies in [low, high), in the last bin [low, high]."""

    low: float
    high: float
    num_images: int
    mean_score: float  # NaN in an empty bin
    share_pneumonia: float  # NaN in an empty bin


def calibration_bins(labels: npt.ArrayLike, scores: npt.ArrayLike) -> list[CalibrationBin]:
    """The bins of equal width behind the ECE (Naeini et al. 2015) and the reliability plot."""
    labels, scores = _checked(labels, scores)
    bin_of = _bin_of(scores)
    bins = []
    for number in range(NUM_CALIBRATION_BINS):
        inside = bin_of == number
        num_images = int(inside.sum())
        bins.append(
            CalibrationBin(
                low=number / NUM_CALIBRATION_BINS,
                high=(number + 1) / NUM_CALIBRATION_BINS,
                num_images=num_images,
                mean_score=float(scores[inside].mean()) if num_images else math.nan,
                share_pneumonia=float(labels[inside].mean()) if num_images else math.nan,
            )
        )
    return bins


def format_value(name: str, value: float | None) -> str:
    """One value as people read it, the same everywhere: `94.2 %` or `0.981`; a dash where it is undefined."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if METRICS[name].unit == "percent" else f"{value:.3f}"


def format_interval(name: str, low: float | None, high: float | None) -> str:
    """A 95 % interval as people read it: `92.1–95.9 %` or `0.972–0.989`; empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if METRICS[name].unit == "percent":
        return f"{100 * low:.1f}–{100 * high:.1f} %"
    return f"{low:.3f}–{high:.3f}"


def _checked(
    labels: npt.ArrayLike, scores: npt.ArrayLike, *, in_unit_range: bool = True
) -> tuple[npt.NDArray[np.int64], Floats]:
    labels = np.asarray(labels, dtype=np.int64)  # (N,)
    scores = np.asarray(scores, dtype=np.float64)  # (N,)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be of one length, one dimension")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, not {sorted(set(labels.tolist()) - {0, 1})}")
    wrong = ~np.isfinite(scores)
    if in_unit_range:
        wrong |= (scores < 0) | (scores > 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        allowed = "in [0, 1]" if in_unit_range else "that is finite"
        raise XraiError(
            f"the score of row {row} is {scores[row]} ({int(wrong.sum())} of {len(scores)} are wrong): a score is a "
            f"number {allowed}; the model that gave it can not be measured"
        )
    return labels, scores


def _bin_of(scores: Floats) -> npt.NDArray[np.int64]:
    return np.minimum((scores * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)


class _Subset:
    """The images of one selection, laid out so that weights for many resamples turn into metrics by matrix products.

    `group_of` (N,) holds the number of each image's patient among all patients of the split.
    """

    def __init__(
        self, labels: npt.NDArray[np.int64], scores: Floats, threshold: float, group_of: npt.NDArray[np.intp]
    ) -> None:
        order = np.argsort(-scores, kind="stable")
        self.labels, self.scores, self.group_of = labels[order], scores[order], group_of[order]
        self.calls = (self.scores >= threshold).astype(np.int64)
        self.positive = (self.labels == 1).astype(np.float64)
        # the last image of each run of equal scores: only there does a threshold cut
        self.cuts = np.flatnonzero(np.append(np.diff(self.scores) != 0, True)) if len(scores) else np.zeros(0, np.intp)
        in_bin = np.eye(NUM_CALIBRATION_BINS)[_bin_of(self.scores)]  # (N, bins)
        self.features = np.column_stack(
            [
                self.labels * self.calls,  # tp
                (1 - self.labels) * self.calls,  # fp
                (1 - self.labels) * (1 - self.calls),  # tn
                self.labels * (1 - self.calls),  # fn
                (self.scores - self.labels) ** 2,
                in_bin * (self.scores - self.labels)[:, None],
            ]
        )  # (N, 5 + bins)

    def counts(self) -> dict[str, int]:
        tp, fp, tn, fn = (int(total) for total in self.features[:, :4].sum(axis=0))
        return {"tp": tp, "fp": fp, "tn": tn, "fn": fn}

    def measure(self, group_weights: Floats) -> dict[str, Floats]:
        """Each metric (R,) for R resamples given by how often each patient was drawn, (R, G); NaN where undefined."""
        weights = group_weights[:, self.group_of]  # (R, N)
        sums = weights @ self.features  # (R, 5 + bins)
        tp, fp, tn, fn, squares = sums[:, :5].T
        total = tp + fp + tn + fn
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "accuracy": (tp + tn) / total,
                "sensitivity": tp / (tp + fn),
                "specificity": tn / (tn + fp),
                "ppv": tp / (tp + fp),
                "npv": tn / (tn + fn),
                **self._measure_ranks(weights),
                "f1": 2 * tp / (2 * tp + fp + fn),
                "mcc": (tp * tn - fp * fn)
                / (np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn)),
                "brier": squares / total,
                "ece": np.abs(sums[:, 5:]).sum(axis=1) / total,
            }

    def _measure_ranks(self, weights: Floats) -> dict[str, Floats]:
        if len(self.cuts) == 0:
            nothing = np.full(len(weights), math.nan)
            names = ("auroc", "average_precision", "sensitivity_at_specificity_90", "specificity_at_sensitivity_90")
            return dict.fromkeys(names, nothing)
        tp = np.cumsum(weights * self.positive, axis=1)[:, self.cuts]  # (R, U) called pneumonia from the top down
        called = np.cumsum(weights, axis=1)[:, self.cuts]
        fp = called - tp
        num_positive, num_negative = tp[:, -1], fp[:, -1]
        rise_tp, rise_fp = np.diff(tp, axis=1, prepend=0.0), np.diff(fp, axis=1, prepend=0.0)
        area = (rise_fp * (tp - rise_tp / 2)).sum(axis=1)  # trapezoids: ties count half
        precision = tp / np.maximum(called, 1.0)  # nothing called: tp rises by 0 there
        both = num_positive * num_negative
        # whole numbers, but for the product with the rate: half a unit is slack enough for its rounding
        affordable = (fp <= num_negative[:, None] * (1 - FIXED_RATE) + 1e-6).sum(axis=1)
        reached = np.take_along_axis(tp, np.maximum(affordable - 1, 0)[:, None], axis=1)[:, 0]
        first = (tp < num_positive[:, None] * FIXED_RATE - 1e-6).sum(axis=1)
        paid = np.take_along_axis(fp, np.minimum(first, fp.shape[1] - 1)[:, None], axis=1)[:, 0]
        defined = np.where(both > 0, 1.0, math.nan)
        return {
            "auroc": area / both,
            "average_precision": defined * (rise_tp * precision).sum(axis=1) / num_positive,
            "sensitivity_at_specificity_90": defined * np.where(affordable > 0, reached, 0.0) / num_positive,
            "specificity_at_sensitivity_90": defined * (1 - paid / num_negative),
        }


def _bootstrap(
    subsets: Mapping[str, _Subset], *, num_groups: int, num_bootstrap: int, seed: int
) -> dict[str, dict[str, Floats]]:
    """Each subset's metrics (num_bootstrap,) over the same resamples of patients, drawn with replacement."""
    generator = np.random.default_rng(seed)
    parts: dict[str, dict[str, list[Floats]]] = {name: {metric: [] for metric in METRICS} for name in subsets}
    for start in range(0, num_bootstrap if num_groups else 0, _RESAMPLES_AT_ONCE):
        num_rows = min(_RESAMPLES_AT_ONCE, num_bootstrap - start)
        drawn = generator.integers(0, num_groups, size=(num_rows, num_groups))
        drawn += np.arange(num_rows)[:, None] * num_groups
        weights = np.bincount(drawn.ravel(), minlength=num_rows * num_groups).reshape(num_rows, num_groups)
        for name, subset in subsets.items():
            for metric, values in subset.measure(weights.astype(np.float64)).items():
                parts[name][metric].append(values)
    return {
        name: {metric: np.concatenate(values) if values else np.zeros(0) for metric, values in metrics.items()}
        for name, metrics in parts.items()
    }


def _summarise(subset: _Subset, resampled: Mapping[str, Floats]) -> dict[str, Any]:
    """Values, intervals, counts and reasons of one subset."""
    num_patients = len(np.unique(subset.group_of))
    values = _values(subset)
    metrics: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for name, info in METRICS.items():
        low, high = math.nan, math.nan
        samples = resampled[name]
        defined = samples[np.isfinite(samples)]
        if math.isnan(values[name]):
            reasons[name] = info.undefined
        elif num_patients < 2:
            reasons[f"{name}.interval"] = "one patient alone can not be resampled"
        elif len(defined) < _MIN_DEFINED_SHARE * len(samples) or len(defined) == 0:
            reasons[f"{name}.interval"] = f"it is defined in only {len(defined)} of {len(samples)} resamples"
        else:
            tail = 100 * (1 - _CONFIDENCE) / 2
            low, high = (float(edge) for edge in np.percentile(defined, [tail, 100 - tail]))
            if low == high:
                reasons[f"{name}.interval"] = (
                    "all resamples agree: too few patients or errors to measure how far it may be off"
                )
        metrics[name] = {"value": values[name], "low": low, "high": high}
    return {
        "num_images": len(subset.labels),
        "num_patients": num_patients,
        "counts": subset.counts(),
        "metrics": metrics,
        "reasons": reasons,
    }


def _by_prevalence(sensitivity: float, specificity: float) -> list[dict[str, float]]:
    """What a call is worth where pneumonia is as rare or common as each of `PREVALENCES` (Bayes)."""
    rows = []
    for prevalence in PREVALENCES:
        true_positive, false_negative = prevalence * sensitivity, prevalence * (1 - sensitivity)
        true_negative, false_positive = (1 - prevalence) * specificity, (1 - prevalence) * (1 - specificity)
        called, left = true_positive + false_positive, true_negative + false_negative
        rows.append(
            {
                "prevalence": prevalence,
                "ppv": true_positive / called if called else math.nan,
                "npv": true_negative / left if left else math.nan,
            }
        )
    return rows


def _values(subset: _Subset) -> dict[str, float]:
    """The point values: scikit-learn's where it has the metric and it is defined."""
    ones = np.ones((1, int(subset.group_of.max()) + 1 if len(subset.group_of) else 0))
    values = {name: float(value[0]) for name, value in subset.measure(ones).items()}
    for name, function in _SCIKIT_ON_CALLS.items():
        if not math.isnan(values[name]):
            values[name] = float(function(subset.labels, subset.calls))
    for name, function in _SCIKIT_ON_SCORES.items():
        if not math.isnan(values[name]):
            values[name] = float(function(subset.labels, subset.scores))
    return values
