"""The metrics: what each means, how its values are written, and how they are counted.

A label is 1 where an image shows what an output looks for, else 0. Values agree with those of
scikit-learn; tests hold it. All metrics of many resamples are computed at once, from weights, by
matrix products.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xrai.results.calibration import Floats, Ints, checked
from xrai.results.types import CallsByThreshold, Counts, Curves, Output

HEADLINES = ("accuracy", "sensitivity", "specificity", "auroc")
NUM_CALIBRATION_BINS = 10
FIXED_RATE = 0.90  # the specificity at which sensitivity is read off the ROC curve, and vice versa
NUM_POINTS = 100  # of a curve on the page
NUM_THRESHOLDS = 200  # equal steps from 0 to 1, for which metrics.json counts the calls

_NO_IMAGES = "there are no images"
_NEEDS_BOTH = "it needs {both}"
_NONE = "no image was called"
_ONE_KIND = "all images have one label or got one call"
_MIX = "depends on this split's mix of classes"
_LOWER = "lower is better"
_TINY = float(np.finfo(np.float64).tiny)
_BEST = "the highest of any threshold with at least 90 %"


@dataclass(frozen=True)
class MetricInfo:
    """What people need to know of one metric to read it; `{}` are places for an output's words."""

    title: str
    meaning: str
    undefined: str  # the reason given where it has no value

    def of(self, output: Output) -> "MetricInfo":
        """The same, in words for this output."""
        words = output.words
        return MetricInfo(
            self.title, self.meaning.format_map(words), self.undefined.format_map(words)
        )


METRICS: Mapping[str, MetricInfo] = {
    "accuracy": MetricInfo("Accuracy", "share of images correctly classified", _NO_IMAGES),
    "sensitivity": MetricInfo(
        "Sensitivity", "share of {positives} called {name}", "there are no {positives}"
    ),
    "specificity": MetricInfo(
        "Specificity", "share of {negatives} called {opposite}", "there are no {negatives}"
    ),
    "ppv": MetricInfo(
        "PPV", f"share of {{name}} calls that are correct; {_MIX}", f"{_NONE} {{name}}"
    ),
    "npv": MetricInfo(
        "NPV", f"share of {{opposite}} calls that are correct; {_MIX}", f"{_NONE} {{opposite}}"
    ),
    "auroc": MetricInfo("AUROC", "chance that {a_positive} scores above {a_negative}", _NEEDS_BOTH),
    "average_precision": MetricInfo(
        "Average precision", "area under the precision-recall curve", _NEEDS_BOTH
    ),
    "f1": MetricInfo(
        "F1", "harmonic mean of PPV and sensitivity", "no image is, or was called, {name}"
    ),
    "mcc": MetricInfo("MCC", "correlation of calls with labels, -1 to 1 (Matthews)", _ONE_KIND),
    "brier": MetricInfo(
        "Brier score", f"mean squared distance of score and label; {_LOWER}", _NO_IMAGES
    ),
    "ece": MetricInfo("ECE", f"mean distance of score and observed share; {_LOWER}", _NO_IMAGES),
    "sensitivity_at_specificity_90": MetricInfo(
        "Sensitivity at 90 % specificity", f"{_BEST} specificity", _NEEDS_BOTH
    ),
    "specificity_at_sensitivity_90": MetricInfo(
        "Specificity at 90 % sensitivity", f"{_BEST} sensitivity", _NEEDS_BOTH
    ),
}


CLASS_METRICS: Mapping[str, MetricInfo] = {  # of calls of classes that exclude each other
    "accuracy": METRICS["accuracy"],
    "kappa": MetricInfo(
        "Kappa", "agreement of calls with labels beyond chance, 1 at most (Cohen)", _ONE_KIND
    ),
    "log_loss": MetricInfo(
        "Log loss", f"mean negative logarithm of the score of the true class; {_LOWER}", _NO_IMAGES
    ),
}


ALL_METRICS: Mapping[str, MetricInfo] = {**METRICS, **CLASS_METRICS}


def format_value(name: str, value: float | None) -> str:
    """A metric's value as it is written everywhere: `94.2 %` or `0.981`; a dash where undefined."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if name in PROPORTIONS else f"{value:.3f}"


def format_interval(name: str, low: float | None, high: float | None) -> str:
    """A metric's interval: `92.1–95.9 %` or `0.972–0.989`; empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if name in PROPORTIONS:
        return f"{100 * low:.1f}–{100 * high:.1f} %"
    return f"{low:.3f}–{high:.3f}"


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve of labels (N,) and finite scores (N,), ties counted half.

    NaN unless both classes are present.
    """
    labels, scores = checked(labels, scores, in_unit_range=False)
    tp, fp = cumulative_calls(labels, scores)
    if tp[-1] == 0 or fp[-1] == 0:
        return math.nan
    return float(np.trapezoid(tp, fp) / (tp[-1] * fp[-1]))


def cumulative_calls(labels: Ints, scores: Floats) -> tuple[Floats, Floats]:
    """True and false positives (U + 1,) as the threshold falls from above all scores through each
    of the U distinct ones: the ROC curve, not yet divided.
    """
    order = np.argsort(-scores, kind="stable")
    cuts = _last_of_ties(scores[order])
    tp = np.append(0.0, np.cumsum(labels[order])[cuts])
    return tp, np.append(0.0, cuts + 1.0) - tp


def count_calls_by_threshold(labels: Ints, scores: Floats) -> CallsByThreshold:
    """What other thresholds would call: at each multiple of 1 / 200 from 0 to 1."""
    thresholds = np.arange(NUM_THRESHOLDS + 1) / NUM_THRESHOLDS

    def count(own: Floats) -> tuple[int, ...]:
        return tuple((len(own) - np.searchsorted(np.sort(own), thresholds)).tolist())

    return CallsByThreshold(NUM_THRESHOLDS, count(scores[labels == 1]), count(scores[labels == 0]))


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose score lies in [low, high), in the last bin [low, high]."""

    low: float
    high: float
    num_images: int
    num_patients: int
    mean_score: float  # NaN in an empty bin
    share_positive: float  # NaN in an empty bin


def calibration_bins(
    labels: Ints, scores: Floats, patient_of: npt.NDArray[np.intp] | None = None
) -> list[CalibrationBin]:
    """The bins of equal width behind the ECE (Naeini et al. 2015) and the reliability plot.

    `patient_of` (N,) are the numbers of the images' patients; without it, each is another one.
    """
    patients = np.arange(len(labels)) if patient_of is None else patient_of
    bin_of, bins = _bin_of(scores), []
    for number in range(NUM_CALIBRATION_BINS):
        inside = bin_of == number
        mean, share = (
            float(values[inside].mean()) if inside.any() else math.nan
            for values in (scores, labels)
        )
        low, high = number / NUM_CALIBRATION_BINS, (number + 1) / NUM_CALIBRATION_BINS
        num_patients = len(np.unique(patients[inside]))
        bins.append(CalibrationBin(low, high, int(inside.sum()), num_patients, mean, share))
    return bins


def find_curves(labels: Ints, scores: Floats) -> Curves:
    """The curves of labels (N,) and scores (N,) as the page draws them."""
    bins = tuple(
        (each.mean_score, each.share_positive, each.num_images)
        for each in calibration_bins(labels, scores)
        if each.num_images
    )
    tp, fp = cumulative_calls(labels, scores)
    if not (tp[-1] and fp[-1]):
        return Curves((), (), bins)
    return Curves(
        roc=_thinned(fp / fp[-1], tp / tp[-1]),
        precision_recall=_thinned(*precision_recall(tp, fp)),
        reliability=bins,
    )


def precision_recall(tp: Floats, fp: Floats) -> tuple[Floats, Floats]:
    """Recall and precision (2 U,) of `cumulative_calls` (U + 1,) as the corners of steps, below
    which lies the average precision: what is found at a threshold has the precision there.
    """
    precision = tp[1:] / (tp + fp)[1:]
    return np.repeat(tp / tp[-1], 2)[1:-1], np.repeat(precision, 2)


def _thinned(x: Floats, y: Floats) -> tuple[tuple[float, float], ...]:
    """At most `NUM_POINTS` of a curve's points, evenly along it; both ends are kept."""
    length = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    wanted = np.linspace(0.0, length[-1], NUM_POINTS)
    kept = np.unique(np.append(np.searchsorted(length, wanted[:-1]), len(x) - 1))
    return tuple(zip(x[kept].round(4).tolist(), y[kept].round(4).tolist(), strict=True))


class Sample:
    """Some images, laid out so that the weights of many resamples become metrics at once.

    `labels` (N,), `scores` (N,) in [0, 1], `called` (N,) bool; `patient_of` (N,) holds the number
    of each image's patient among all patients of the split.
    """

    def __init__(
        self,
        labels: Ints,
        scores: Floats,
        called: npt.NDArray[np.bool_],
        patient_of: npt.NDArray[np.intp],
    ) -> None:
        self.infos = METRICS
        order = np.argsort(-scores, kind="stable")
        self.labels, self.patient_of = labels[order], patient_of[order]
        scores = scores[order]
        self.calls = called[order].astype(np.int64)
        self._cuts = _last_of_ties(scores)
        in_bin = np.eye(NUM_CALIBRATION_BINS)[_bin_of(scores)]  # (N, bins)
        self._features = np.column_stack(
            [
                self.labels * self.calls,  # tp
                (1 - self.labels) * self.calls,  # fp
                (1 - self.labels) * (1 - self.calls),  # tn
                self.labels * (1 - self.calls),  # fn
                (scores - self.labels) ** 2,
                in_bin * (scores - self.labels)[:, None],
            ]
        )  # (N, 5 + bins)

    def counts(self) -> Counts:
        """Calls against labels."""
        return Counts(*(int(total) for total in self._features[:, :4].sum(axis=0)))

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Each metric (R,) for R resamples, given how often each image was drawn, (R, N)."""
        sums = weights @ self._features  # (R, 5 + bins)
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
        """The metrics that need no threshold; NaN unless both classes were drawn."""
        if len(self._cuts) == 0:
            nothing = np.full(len(weights), math.nan)
            names = [name for name, info in METRICS.items() if info.undefined == _NEEDS_BOTH]
            return dict.fromkeys(names, nothing)
        # called from the top down, (R, U)
        tp = np.cumsum(weights * self.labels, axis=1)[:, self._cuts]
        called = np.cumsum(weights, axis=1)[:, self._cuts]
        fp = called - tp
        num_positive, num_negative = tp[:, -1], fp[:, -1]
        rise_tp, rise_fp = np.diff(tp, axis=1, prepend=0.0), np.diff(fp, axis=1, prepend=0.0)
        area = (rise_fp * (tp - rise_tp / 2)).sum(axis=1)  # trapezoids: ties count half
        precision = tp / np.maximum(called, 1.0)  # where nothing is called, tp rises by 0
        both = num_positive * num_negative
        # counts are whole numbers, so a slack below 1 absorbs the rounding of the product
        affordable = (fp <= num_negative[:, None] * (1 - FIXED_RATE) + 1e-6).sum(axis=1)
        reached = np.take_along_axis(tp, np.maximum(affordable - 1, 0)[:, None], axis=1)[:, 0]
        first = (tp < num_positive[:, None] * FIXED_RATE - 1e-6).sum(axis=1)
        paid = np.take_along_axis(fp, np.minimum(first, fp.shape[1] - 1)[:, None], axis=1)[:, 0]
        defined = np.where(both > 0, 1.0, math.nan)
        found = np.where(affordable > 0, reached, 0.0)
        return {
            "auroc": area / both,
            "average_precision": defined * (rise_tp * precision).sum(axis=1) / num_positive,
            "sensitivity_at_specificity_90": defined * found / num_positive,
            "specificity_at_sensitivity_90": defined * (1 - paid / num_negative),
        }


class ClassSample:
    """Some images of C classes that exclude each other, laid out as those of a `Sample`.

    `labels` and `calls` (N,) are numbers of classes; `scores` (N, C) are the classes', whose sum
    in each row is 1.
    """

    def __init__(
        self, labels: Ints, calls: Ints, scores: Floats, patient_of: npt.NDArray[np.intp]
    ) -> None:
        self.infos = CLASS_METRICS
        self.labels, self.calls, self.patient_of = labels, calls, patient_of
        self._num_classes = scores.shape[1]
        eye = np.eye(self._num_classes)
        true_scores = np.maximum(scores[np.arange(len(labels)), labels], _TINY)
        self._features = np.column_stack(
            [labels == calls, -np.log(true_scores), eye[labels], eye[calls]]
        )  # (N, 2 + 2 C)

    def confusion(self) -> tuple[tuple[int, ...], ...]:
        """Images by label (rows) and call (columns)."""
        num = self._num_classes
        cells = np.bincount(self.labels * num + self.calls, minlength=num * num)
        return tuple(tuple(row) for row in cells.reshape(num, num).tolist())

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Each metric (R,) for R resamples, given how often each image was drawn, (R, N)."""
        sums, num = weights @ self._features, self._num_classes
        total = sums[:, 2 : 2 + num].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            right = sums[:, 0] / total
            by_chance = (sums[:, 2 : 2 + num] * sums[:, 2 + num :]).sum(axis=1) / total**2
            return {
                "accuracy": right,
                "kappa": (right - by_chance) / (1 - by_chance),
                "log_loss": sums[:, 1] / total,
            }


def values(sample: Sample | ClassSample) -> dict[str, float]:
    """Each metric of the images as they are; NaN where undefined."""
    found = sample.measure(np.ones((1, len(sample.labels))))
    return {name: float(value[0]) for name, value in found.items()}


# The metrics that are a share of images, and of which
PROPORTIONS: Mapping[str, Callable[[Sample | ClassSample], npt.NDArray[np.bool_]]] = {
    "accuracy": lambda sample: sample.labels >= 0,
    "sensitivity": lambda sample: sample.labels == 1,
    "specificity": lambda sample: sample.labels == 0,
    "ppv": lambda sample: sample.calls == 1,
    "npv": lambda sample: sample.calls == 0,
    "sensitivity_at_specificity_90": lambda sample: sample.labels == 1,
    "specificity_at_sensitivity_90": lambda sample: sample.labels == 0,
}


def _last_of_ties(falling: Floats) -> npt.NDArray[np.intp]:
    """The last position of each run of equal scores: only there can a threshold cut."""
    is_last = np.append(np.diff(falling) != 0, True)[: len(falling)]
    return np.flatnonzero(is_last)


def _bin_of(scores: Floats) -> Ints:
    return np.minimum((scores * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)
