"""How good the scores are: metrics with patient-level intervals, calibration, and the operating
threshold.

Called by `xrai.train` and `xrai.evaluate` with arrays. The dictionary that `evaluate_scores`
returns is metrics.json; the summary, the report and the last lines on the terminal take their
numbers from it and from nowhere else.

A score is the calibrated probability of pneumonia in [0, 1], the logistic function of logit /
temperature; an image is called pneumonia where score >= threshold, and left to a person (review)
where its atypicality is above 1; labels are 1 for pneumonia and 0 for normal. Values are
scikit-learn's where it has the metric. Intervals are percentiles over resamples of patients (not of
images: one patient's images are alike), computed from weights, many resamples at once; where there
are too few errors to resample, a proportion has Wilson's interval and a perfect AUROC has
Newcombe's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xrai.results.calibration import Floats, checked
from xrai.results.review import needs_review

SCHEMA_VERSION = 2
NUM_CALIBRATION_BINS = 10
PREVALENCES = (
    0.01,
    0.05,
    0.10,
    0.25,
    0.50,
)  # shares of pneumonia for which PPV and NPV are worked out
FIXED_RATE = 0.90  # the specificity at which sensitivity is read off the ROC curve, and the reverse
NUM_THRESHOLDS = 200  # equal steps from 0 to 1, for which metrics.json counts the calls
COVERAGES = tuple(
    share / 100 for share in range(100, 45, -5)
)  # shares of images kept, on the abstention curve
NUM_GROUPS = 12  # source groups that are measured, the largest ones
_CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
_MIN_EVENTS = 5  # patients right, or wrong; with fewer, resamples of a proportion tell little
_RESAMPLES_AT_ONCE = 50  # keeps the arrays of one step in the processor's cache
_WEIGHTS_AT_ONCE = (
    2**18
)  # of resamples times images, of splits above 5,000: ten arrays of 2 MiB, however many images
_ROUNDING = 1e-9  # resamples that differ by less agree
_MIN_DEFINED_SHARE = 0.9  # fewer resamples in which a metric is defined make no interval


@dataclass(frozen=True)
class MetricInfo:
    """What people need to know of one metric to read it."""

    title: str
    meaning: str
    unit: Literal["percent", "number"]
    undefined: str  # the reason given where it has no value


METRICS: Mapping[str, MetricInfo] = {
    "accuracy": MetricInfo(
        "Accuracy", "share of images called right", "percent", "there are no images"
    ),
    "sensitivity": MetricInfo(
        "Sensitivity",
        "share of pneumonia images called pneumonia",
        "percent",
        "there are no pneumonia images",
    ),
    "specificity": MetricInfo(
        "Specificity",
        "share of normal images called normal",
        "percent",
        "there are no normal images",
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
        "Average precision",
        "area under the precision-recall curve",
        "number",
        "it needs images of both classes",
    ),
    "f1": MetricInfo(
        "F1",
        "harmonic mean of PPV and sensitivity",
        "number",
        "no image is pneumonia and none was called pneumonia",
    ),
    "mcc": MetricInfo(
        "MCC",
        "correlation of calls with labels, -1 to 1 (Matthews)",
        "number",
        "all images have one label or got one call",
    ),
    "brier": MetricInfo(
        "Brier score",
        "mean squared distance of score and label; lower is better",
        "number",
        "there are no images",
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

# the images that a proportion is a share of
_DENOMINATORS: Mapping[str, Callable[["_Subset"], npt.NDArray[np.bool_]]] = {
    "accuracy": lambda subset: np.ones(len(subset.labels), dtype=bool),
    "sensitivity": lambda subset: subset.labels == 1,
    "specificity": lambda subset: subset.labels == 0,
    "ppv": lambda subset: subset.calls == 1,
    "npv": lambda subset: subset.calls == 0,
    "sensitivity_at_specificity_90": lambda subset: subset.labels == 1,
    "specificity_at_sensitivity_90": lambda subset: subset.labels == 0,
}


def _scikit() -> tuple[Mapping[str, Callable[..., Any]], Mapping[str, Callable[..., Any]]]:
    """scikit-learn's metrics of (labels, calls) and of (labels, scores), by name."""
    from sklearn import metrics  # a second to import, which preprocessing need not spend

    on_calls = {
        "accuracy": metrics.accuracy_score,
        "sensitivity": metrics.recall_score,
        "specificity": lambda labels, calls: metrics.recall_score(labels, calls, pos_label=0),
        "ppv": metrics.precision_score,
        "npv": lambda labels, calls: metrics.precision_score(labels, calls, pos_label=0),
        "f1": metrics.f1_score,
        "mcc": metrics.matthews_corrcoef,
    }
    on_scores = {
        "auroc": metrics.roc_auc_score,
        "average_precision": metrics.average_precision_score,
        "brier": metrics.brier_score_loss,
    }
    return on_calls, on_scores


def evaluate_scores(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    threshold: float,
    patients: npt.ArrayLike,
    subtypes: npt.ArrayLike,
    split: str,
    threshold_source: str,
    groups: npt.ArrayLike | None = None,
    uncalibrated: npt.ArrayLike | None = None,
    temperature: float = 1.0,
    atypicality: npt.ArrayLike | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of one split, as the dictionary that metrics.json holds.

    `labels` (N,) 0 or 1; `scores` (N,) in [0, 1]; `patients` (N,) keys, resampled as a whole;
    `subtypes` (N,) text, empty where unknown: each subtype's pneumonia images are measured against
    all normal images. `groups` (N,) text, where an image comes from: a group of normal images is
    measured against all pneumonia images, one of pneumonia images against all normal ones, one of
    both by itself. `uncalibrated` (N,) are the scores at temperature 1, by default `scores`;
    `atypicality` (N,), where known, is above 1 for an image that is left to a person.
    `threshold_source` says in words where the threshold comes from. Intervals are 95 % percentile
    intervals over `num_bootstrap` resamples of patients (Efron and Tibshirani 1993, ch. 13; Field
    and Welsh 2007 on clusters). A proportion with fewer than 5 patients' worth right or wrong has
    Wilson's interval instead, and an AUROC of which all resamples agree has Newcombe's, both
    counted in patients; `method` says which one a metric has.

    A metric that is undefined is NaN (null in JSON), and `reasons` says why, under the metric's
    name; a missing interval has its reason under `NAME.interval`; a subtype and a group have their
    own `reasons`. Raises `XraiError` for a score that is not a number in [0, 1].
    """
    labels, scores = checked(labels, scores)
    names, patient_of = np.unique(np.asarray(patients), return_inverse=True)
    subtype_of = np.asarray(subtypes).astype(str)
    group_of = np.full(len(labels), "") if groups is None else np.asarray(groups).astype(str)
    if not (len(labels) == len(patient_of) == len(subtype_of) == len(group_of)):
        raise ValueError(
            f"{len(labels)} labels, {len(patient_of)} patients, {len(subtype_of)} subtypes and {len(group_of)} groups "
            "must be equal in number"
        )
    typical = None if atypicality is None else ~needs_review(np.asarray(atypicality, np.float64))
    everything, normal = np.ones(len(labels), dtype=bool), labels == 0
    selections = {("whole", ""): everything}
    for subtype in sorted({str(name) for name in subtype_of[~normal]} - {""}):
        selections["subtype", subtype] = normal | (subtype_of == subtype)
    largest, against = _largest_groups(group_of), {}
    for group in largest:
        own = group_of == group
        is_mixed = 0 < labels[own].sum() < own.sum()
        against[group] = (
            "itself" if is_mixed else "all normal" if labels[own].all() else "all pneumonia"
        )
        selections["group", group] = own if is_mixed else own | (labels != labels[own][0])
    if typical is not None and not typical.all():
        selections["kept", ""] = typical
    subsets = {
        key: _Subset(labels[chosen], scores[chosen], threshold, patient_of[chosen])
        for key, chosen in selections.items()
    }
    if uncalibrated is not None:
        subsets["before", ""] = _Subset(*checked(labels, uncalibrated), threshold, patient_of)
    resampled = _bootstrap(subsets, num_patients=len(names), num_bootstrap=num_bootstrap, seed=seed)
    measured = {key: _summarise(subset, resampled[key]) for key, subset in subsets.items()}
    whole = measured["whole", ""]
    return {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "num_images": whole.pop("num_images"),
        "num_patients": whole.pop("num_patients"),
        "threshold": float(threshold),
        "threshold_source": threshold_source,
        **whole,
        "calibration": {
            "temperature": float(temperature),
            **{
                name: {metric: found["metrics"][metric] for metric in ("brier", "ece")}
                for name, found in (
                    ("before", measured.get(("before", ""), whole)),
                    ("after", whole),
                )
            },
        },
        "subtypes": {name: entry for (kind, name), entry in measured.items() if kind == "subtype"},
        "groups": {
            group: {
                "num_normal": int((normal & (group_of == group)).sum()),
                "num_pneumonia": int((~normal & (group_of == group)).sum()),
                "against": against[group],
                **measured["group", group],
            }
            for group in largest
        },
        "num_groups": len(set(group_of.tolist()) - {""}),
        "abstention": _measure_abstention(
            labels,
            scores,
            threshold,
            atypicality,
            kept=measured.get(("kept", ""), whole)["metrics"],
        ),
        "by_threshold": count_calls_by_threshold(labels, scores),
        "by_prevalence": _by_prevalence(
            whole["metrics"]["sensitivity"], whole["metrics"]["specificity"]
        ),
        "bootstrap": {
            "num_resamples": num_bootstrap,
            "unit": "patient",
            "confidence": _CONFIDENCE,
            "seed": seed,
        },
    }


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve of labels (N,) and scores (N,), ties counted half; NaN unless
    both classes are there.
    """
    labels, scores = checked(labels, scores, in_unit_range=False)
    if not 0 < labels.sum() < len(labels):
        return math.nan
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def wilson_interval(share: float, number: float) -> tuple[float, float]:
    """The 95 % score interval of a proportion out of `number` (Wilson 1927); it does not
    collapse at 0 or 1.
    """
    centre = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = (
        _Z
        / (1 + _Z**2 / number)
        * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))
    )
    return 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half


def newcombe_interval(area: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """The 95 % score interval of an AUROC (Newcombe 2006, part 2, method 5); it does not
    collapse at 0 or 1.
    """

    def excess(theta: float) -> float:
        """Above 0 where theta is further from the area than its own standard error allows."""
        half = (num_positive + num_negative) / 2 - 1
        spread = (
            theta
            * (1 - theta)
            * (1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta))
        )
        return (theta - area) ** 2 - _Z**2 * spread / (num_positive * num_negative)

    edges = []
    for far in (0.0, 1.0):
        outside, inside = far, area
        for _ in range(60):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
        edges.append(inside)
    return edges[0], edges[1]


def count_calls_by_threshold(labels: npt.ArrayLike, scores: npt.ArrayLike) -> dict[str, Any]:
    """What other thresholds would call: tp and fp at each of `num_steps` + 1 thresholds, evenly
    from 0 to 1.
    """
    labels, scores = checked(labels, scores)
    thresholds = np.arange(NUM_THRESHOLDS + 1) / NUM_THRESHOLDS
    called = {
        name: len(own) - np.searchsorted(np.sort(own), thresholds, side="left")
        for name, own in (("tp", scores[labels == 1]), ("fp", scores[labels == 0]))
    }
    return {
        "num_steps": NUM_THRESHOLDS,
        **{name: counts.tolist() for name, counts in called.items()},
    }


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
    labels, scores = checked(labels, scores)
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
    """One value as people read it, the same everywhere: `94.2 %` or `0.981`; a dash where it is
    undefined.
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if METRICS[name].unit == "percent" else f"{value:.3f}"


def format_interval(name: str, low: float | None, high: float | None) -> str:
    """A 95 % interval as people read it: `92.1–95.9 %` or `0.972–0.989`; empty where there is
    none.
    """
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if METRICS[name].unit == "percent":
        return f"{100 * low:.1f}–{100 * high:.1f} %"
    return f"{low:.3f}–{high:.3f}"


def _largest_groups(group_of: npt.NDArray[np.str_]) -> list[str]:
    """The names of the largest groups in alphabetical order; none where all images are of one."""
    names, sizes = np.unique(group_of[group_of != ""], return_counts=True)
    if len(names) < 2:
        return []
    return sorted(str(name) for name in names[np.argsort(-sizes, kind="stable")[:NUM_GROUPS]])


def _bin_of(scores: Floats) -> npt.NDArray[np.int64]:
    return np.minimum((scores * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)


class _Subset:
    """The images of one selection, laid out so that weights for many resamples turn into metrics by
    matrix products.

    `patient_of` (N,) holds the number of each image's patient among all patients of the split.
    """

    def __init__(
        self,
        labels: npt.NDArray[np.int64],
        scores: Floats,
        threshold: float,
        patient_of: npt.NDArray[np.intp],
    ) -> None:
        order = np.argsort(-scores, kind="stable")
        self.labels: npt.NDArray[np.int64] = labels[order]
        self.scores: Floats = scores[order]
        self.patient_of: npt.NDArray[np.intp] = patient_of[order]
        self.calls: npt.NDArray[np.int64] = (self.scores >= threshold).astype(np.int64)
        self.positive = (self.labels == 1).astype(np.float64)
        # the last image of each run of equal scores: only there does a threshold cut
        self.cuts = (
            np.flatnonzero(np.append(np.diff(self.scores) != 0, True))
            if len(scores)
            else np.zeros(0, np.intp)
        )
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

    def measure(self, patient_weights: Floats) -> dict[str, Floats]:
        """Each metric (R,) for R resamples given by how often each patient was drawn, (R, G);
        NaN where undefined.
        """
        weights = patient_weights[:, self.patient_of]  # (R, N)
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
            names = (
                "auroc",
                "average_precision",
                "sensitivity_at_specificity_90",
                "specificity_at_sensitivity_90",
            )
            return dict.fromkeys(names, nothing)
        tp = np.cumsum(weights * self.positive, axis=1)[
            :, self.cuts
        ]  # (R, U) called pneumonia from the top down
        called = np.cumsum(weights, axis=1)[:, self.cuts]
        fp = called - tp
        num_positive, num_negative = tp[:, -1], fp[:, -1]
        rise_tp, rise_fp = np.diff(tp, axis=1, prepend=0.0), np.diff(fp, axis=1, prepend=0.0)
        area = (rise_fp * (tp - rise_tp / 2)).sum(axis=1)  # trapezoids: ties count half
        precision = tp / np.maximum(called, 1.0)  # nothing called: tp rises by 0 there
        both = num_positive * num_negative
        # whole numbers, but for the product with the rate: half a unit is slack enough for its
        # rounding
        affordable = (fp <= num_negative[:, None] * (1 - FIXED_RATE) + 1e-6).sum(axis=1)
        reached = np.take_along_axis(tp, np.maximum(affordable - 1, 0)[:, None], axis=1)[:, 0]
        first = (tp < num_positive[:, None] * FIXED_RATE - 1e-6).sum(axis=1)
        paid = np.take_along_axis(fp, np.minimum(first, fp.shape[1] - 1)[:, None], axis=1)[:, 0]
        defined = np.where(both > 0, 1.0, math.nan)
        return {
            "auroc": area / both,
            "average_precision": defined * (rise_tp * precision).sum(axis=1) / num_positive,
            "sensitivity_at_specificity_90": defined
            * np.where(affordable > 0, reached, 0.0)
            / num_positive,
            "specificity_at_sensitivity_90": defined * (1 - paid / num_negative),
        }


def _bootstrap(
    subsets: Mapping[tuple[str, str], _Subset], *, num_patients: int, num_bootstrap: int, seed: int
) -> dict[tuple[str, str], dict[str, Floats]]:
    """Each subset's metrics (num_bootstrap,) over the same resamples of patients, drawn with
    replacement.
    """
    generator = np.random.default_rng(seed)
    parts: dict[tuple[str, str], dict[str, list[Floats]]] = {
        key: {name: [] for name in METRICS} for key in subsets
    }
    num_images = max(len(subset.labels) for subset in subsets.values())
    at_once = max(1, min(_RESAMPLES_AT_ONCE, _WEIGHTS_AT_ONCE // max(num_images, num_patients, 1)))
    for start in range(0, num_bootstrap if num_patients else 0, at_once):
        num_rows = min(at_once, num_bootstrap - start)
        drawn = generator.integers(0, num_patients, size=(num_rows, num_patients))
        drawn += np.arange(num_rows)[:, None] * num_patients
        weights = np.bincount(drawn.ravel(), minlength=num_rows * num_patients).reshape(
            num_rows, num_patients
        )
        for key, subset in subsets.items():
            for metric, values in subset.measure(weights.astype(np.float64)).items():
                parts[key][metric].append(values)
    return {
        key: {
            metric: np.concatenate(values) if values else np.zeros(0)
            for metric, values in metrics.items()
        }
        for key, metrics in parts.items()
    }


def _summarise(subset: _Subset, resampled: Mapping[str, Floats]) -> dict[str, Any]:
    """Values, intervals, counts and reasons of one subset."""
    num_patients = len(np.unique(subset.patient_of))
    values = _values(subset)
    metrics: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for name, info in METRICS.items():
        low, high, method = math.nan, math.nan, ""
        if math.isnan(values[name]):
            reasons[name] = info.undefined
        elif num_patients < 2:
            reasons[f"{name}.interval"] = "one patient alone cannot be resampled"
        else:
            low, high, method = _interval(name, values[name], subset, resampled[name])
            if not method:
                reasons[f"{name}.interval"] = "too few resamples give it, or all give the same"
        metrics[name] = {"value": values[name], "low": low, "high": high, "method": method}
    return {
        "num_images": len(subset.labels),
        "num_patients": num_patients,
        "counts": subset.counts(),
        "metrics": metrics,
        "reasons": reasons,
    }


def _interval(
    name: str, value: float, subset: _Subset, samples: Floats
) -> tuple[float, float, str]:
    """The two ends and the method of a metric's interval; NaN and no method where none can be
    given.
    """
    if name in _DENOMINATORS:
        num_patients = len(np.unique(subset.patient_of[_DENOMINATORS[name](subset)]))
        if (
            min(value, 1 - value) * num_patients < _MIN_EVENTS - 0.5
        ):  # whole numbers where each has one image
            return *wilson_interval(value, num_patients), "wilson"
    defined = samples[np.isfinite(samples)]
    if len(defined) and len(defined) >= _MIN_DEFINED_SHARE * len(samples):
        tail = 100 * (1 - _CONFIDENCE) / 2
        low, high = (float(edge) for edge in np.percentile(defined, [tail, 100 - tail]))
        if high - low > _ROUNDING:
            return low, high, "bootstrap"
    if name == "auroc":
        sizes = [len(np.unique(subset.patient_of[subset.labels == label])) for label in (1, 0)]
        return *newcombe_interval(value, *sizes), "newcombe"
    return math.nan, math.nan, ""


def _measure_abstention(
    labels: npt.NDArray[np.int64],
    scores: Floats,
    threshold: float,
    atypicality: npt.ArrayLike | None,
    *,
    kept: Mapping[str, Any],
) -> dict[str, Any]:
    """What is left to a person, the metrics of the rest, and the accuracy where more and more
    images are left out.

    The curve leaves out the least sure images first, whose logit is nearest to that of the
    threshold, and, where `atypicality` is known, the least typical ones first. NaN with a reason
    where it is not known.
    """
    right = (scores >= threshold) == labels
    tiny = np.finfo(np.float64).tiny
    logits = np.log(np.maximum(scores, tiny)) - np.log(np.maximum(1 - scores, tiny))
    doubt = -np.abs(logits - math.log(max(threshold, tiny)) + math.log(max(1 - threshold, tiny)))
    orders = {"by_doubt": np.argsort(doubt, kind="stable")}
    found: dict[str, Any] = {}
    if atypicality is None:
        reason = "the run knows no typicality"
        found = {
            "num_review": None,
            "share_review": math.nan,
            "by_class": {},
            "metrics": {},
            "reason": reason,
        }
    else:
        unlike = np.asarray(atypicality, dtype=np.float64)
        orders["by_atypicality"] = np.argsort(unlike, kind="stable")
        review = needs_review(unlike)
        classes = {"normal": labels == 0, "pneumonia": labels == 1}
        found = {
            "num_review": int(review.sum()),
            "share_review": float(review.mean()) if len(review) else math.nan,
            "by_class": {
                name: {"num_images": int(own.sum()), "num_review": int(review[own].sum())}
                for name, own in classes.items()
            },
            "metrics": dict(kept),
            "reason": "" if len(review) else "there are no images",
        }
    curve = []
    for coverage in COVERAGES if len(labels) else ():
        num_kept = max(1, round(coverage * len(labels)))
        accuracies = {name: float(right[order[:num_kept]].mean()) for name, order in orders.items()}
        curve.append({"coverage": coverage, "num_images": num_kept, **accuracies})
    return {**found, "curve": curve}


def _by_prevalence(
    sensitivity: Mapping[str, Any], specificity: Mapping[str, Any]
) -> list[dict[str, float]]:
    """What a call is worth where pneumonia is as rare or common as each of `PREVALENCES` (Bayes).

    `ppv` and `npv` follow from the values, `ppv_low` and `npv_low` from the lower ends of both
    intervals: where no false alarm was seen, the first says that there never is one.
    """
    rows = []
    for prevalence in PREVALENCES:
        row = {"prevalence": prevalence}
        for end, suffix in (("value", ""), ("low", "_low")):
            found, left_alone = sensitivity[end], specificity[end]
            true_positive, false_negative = prevalence * found, prevalence * (1 - found)
            true_negative, false_positive = (
                (1 - prevalence) * left_alone,
                (1 - prevalence) * (1 - left_alone),
            )
            called, left = true_positive + false_positive, true_negative + false_negative
            row[f"ppv{suffix}"] = true_positive / called if called else math.nan
            row[f"npv{suffix}"] = true_negative / left if left else math.nan
        rows.append(row)
    return rows


def _values(subset: _Subset) -> dict[str, float]:
    """The point values: scikit-learn's where it has the metric and it is defined."""
    ones = np.ones((1, int(subset.patient_of.max()) + 1 if len(subset.patient_of) else 0))
    values = {name: float(value[0]) for name, value in subset.measure(ones).items()}
    on_calls, on_scores = _scikit()
    for name, function in on_calls.items():
        if not math.isnan(values[name]):
            values[name] = float(function(subset.labels, subset.calls))
    for name, function in on_scores.items():
        if not math.isnan(values[name]):
            values[name] = float(function(subset.labels, subset.scores))
    return values
