"""95 % intervals of metrics, by patient.

Percentiles over resamples of whole patients, because one patient's images are alike (Efron and
Tibshirani 1993, ch. 13; Field and Welsh 2007 on clusters). Where too few patients are right, or
wrong, to resample, a proportion has Wilson's interval, and an AUROC of few patients of a class, or
of which all resamples agree, has Newcombe's, both counted in patients. The mean of outputs combines
such intervals. An ECE has none. docs/decisions/0016-metrics-counted-once.md has their coverage.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from xrai.log import counted
from xrai.results.calibration import Floats
from xrai.results.metrics import PROPORTIONS, ClassSample, Sample, values
from xrai.results.types import Estimate, Output

CONFIDENCE = 0.95
# Of a sample: the column of an output, the kind of a selection of images, and its name
Key = tuple[int, str, str]
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_MIN_EVENTS = 5  # patients right, or wrong; fewer make resamples of a proportion uninformative
_MIN_PATIENTS = 30  # of a class; with fewer, resamples of its images vary too little
# The label of the images that set the threshold at which it is read off
_SET_BY = {"sensitivity_at_specificity_90": 0, "specificity_at_sensitivity_90": 1}
_RESAMPLES_AT_ONCE = 50  # keeps the arrays of one step in the processor's cache
_WEIGHTS_AT_ONCE = 2**18  # resamples times images of a large split: ten arrays of 2 MiB
_BY_LABEL = ("sensitivity", "specificity")  # count the images of one label each
_ROUNDING = 1e-9  # resamples that differ by less agree
_MIN_DEFINED_SHARE = 0.9  # of resamples in which a metric is defined
_ONE_PATIENT = "one patient alone cannot be resampled"
_BIASED = "it is biased upwards with few images, and more so in resamples"
_NO_SPREAD = "too few resamples define it, or all give the same"
_FEW_SET_IT = "the images of {} set its threshold, and {} patients are needed"
_NOT_ALL = "not every class or finding has an interval"


def bootstrap(
    samples: Mapping[Key, Sample | ClassSample], *, num_patients: int, num_bootstrap: int, seed: int
) -> dict[Key, dict[str, Floats]]:
    """Each sample's metrics (num_bootstrap,) over the same resamples of patients."""
    generator = np.random.default_rng(seed)
    num_images = max(len(sample.labels) for sample in samples.values())
    at_once = max(1, min(_RESAMPLES_AT_ONCE, _WEIGHTS_AT_ONCE // max(num_images, num_patients, 1)))
    parts = {key: [dict.fromkeys(each.infos, np.zeros(0))] for key, each in samples.items()}
    for start in range(0, num_bootstrap if num_patients else 0, at_once):
        num_rows = min(at_once, num_bootstrap - start)
        drawn = generator.integers(0, num_patients, size=(num_rows, num_patients))
        drawn += np.arange(num_rows)[:, None] * num_patients
        weights = np.bincount(drawn.ravel(), minlength=num_rows * num_patients)
        times_drawn = weights.reshape(num_rows, num_patients).astype(np.float64)
        for key, sample in samples.items():
            parts[key].append(sample.measure(times_drawn[:, sample.patient_of]))
    return {
        key: {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        for key, found in parts.items()
    }


def estimate_all(
    sample: Sample | ClassSample, resampled: Mapping[str, Floats], output: Output
) -> dict[str, Estimate]:
    """Every metric of a sample with its interval, or with the reason why it has none."""
    num_patients, known = len(np.unique(sample.patient_of)), values(sample)
    found = {}
    for name, info in sample.infos.items():
        value = known[name]
        if math.isnan(value):
            found[name] = Estimate(reason=info.of(output).undefined)
        elif num_patients < 2:
            found[name] = Estimate(value, reason=_ONE_PATIENT)
        else:
            found[name] = _estimate(name, value, sample, resampled[name])
    return found


def estimate_mean(estimates: Sequence[Estimate], resampled: Floats, shared: Floats) -> Estimate:
    """The mean of a metric over C outputs, given the same metric in R resamples, (C, R), and which
    part of their patients two outputs share, (C, C).

    An output without a value is left out; with none, or where one has no interval, `reason` says
    so. Unless all intervals come from resamples, they are combined.
    """
    is_defined = np.array([not each.is_undefined for each in estimates])
    if not is_defined.any():
        return Estimate(reason="no class or finding has it")
    defined, drawn = [each for each in estimates if not each.is_undefined], resampled[is_defined]
    shared = shared[np.ix_(is_defined, is_defined)]
    value = float(np.mean([each.value for each in defined]))
    if reasons := {each.reason for each in defined if math.isnan(each.low)}:
        return Estimate(value, reason=reasons.pop() if len(reasons) == 1 else _NOT_ALL)
    if {each.method for each in defined} == {"bootstrap"}:
        is_known = np.isfinite(drawn)
        with np.errstate(invalid="ignore"):
            means = np.where(is_known, drawn, 0.0).sum(axis=0) / is_known.sum(axis=0)
        if found := _percentiles(value, means):
            return found
    return Estimate(value, *_combined(value, defined, drawn, shared), "combined")


def share_patients(samples: Sequence[Sample | ClassSample], name: str) -> Floats:
    """Which part of the patients that a metric of C samples counts two of them share, (C, C): how
    far two proportions are correlated at most. Other metrics count the patients of either label,
    and the label of the larger part decides.
    """
    num_patients = max(int(each.patient_of.max(initial=-1)) for each in samples) + 1
    chosen = [PROPORTIONS[name]] if name in PROPORTIONS else [PROPORTIONS[n] for n in _BY_LABEL]
    parts = []
    for choose in chosen:
        is_in = np.zeros((len(samples), num_patients))
        for row, each in zip(is_in, samples, strict=True):
            row[each.patient_of[choose(each)]] = 1
        nums = is_in.sum(axis=1).clip(1)
        parts.append(is_in @ is_in.T / np.sqrt(np.outer(nums, nums)))
    largest: Floats = np.max(parts, axis=0)
    return largest


def _combined(
    value: float, estimates: Sequence[Estimate], drawn: Floats, shared: Floats
) -> tuple[float, float]:
    """The interval of a mean of correlated estimates from the interval of each (Zou and Donner
    2008, https://doi.org/10.1002/sim.3095), with correlations of the resamples `drawn` (C, R).

    Resamples of an output that all agree tell no correlation: it is as `shared` (C, C) has it.
    """
    correlations = shared.copy()
    np.fill_diagonal(correlations, 1)
    whole = drawn[:, np.isfinite(drawn).all(axis=0)]
    varies = np.ptp(whole, axis=1) > _ROUNDING if whole.size else np.zeros(len(drawn), dtype=bool)
    if varies.any():
        correlations[np.ix_(varies, varies)] = np.corrcoef(whole[varies])
    halves = []
    for widths in (
        np.array([each.value - each.low for each in estimates]),
        np.array([each.high - each.value for each in estimates]),
    ):
        halves.append(math.sqrt(max(0.0, widths @ correlations @ widths)) / len(widths))
    return value - halves[0], value + halves[1]


def _percentiles(value: float, resampled: Floats) -> Estimate | None:
    """The interval of most resamples, unless they agree or too few have a value."""
    defined = resampled[np.isfinite(resampled)]
    if len(defined) and len(defined) >= _MIN_DEFINED_SHARE * len(resampled):
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = (float(edge) for edge in np.percentile(defined, [tail, 100 - tail]))
        if high - low > _ROUNDING:
            return Estimate(value, low, high, "bootstrap")
    return None


def _estimate(name: str, value: float, sample: Sample | ClassSample, resampled: Floats) -> Estimate:
    if name == "ece":
        return Estimate(value, reason=_BIASED)
    found = _percentiles(value, resampled)
    if name in _SET_BY and (num := _num_patients(sample, _SET_BY[name])) < _MIN_PATIENTS:
        return Estimate(value, reason=_FEW_SET_IT.format(counted(num, "patient"), _MIN_PATIENTS))
    if name in PROPORTIONS:
        num_patients = len(np.unique(sample.patient_of[PROPORTIONS[name](sample)]))
        # where each patient has one image the product is a whole number
        if min(value, 1 - value) * num_patients < _MIN_EVENTS - 0.5:
            low, high = wilson_interval(value, num_patients)
            if name in _SET_BY and found:  # Wilson knows nothing of the other class
                low, high = min(low, found.low), max(high, found.high)
                return Estimate(value, low, high, "widest")
            return Estimate(value, low, high, "wilson")
    if name == "auroc":
        positive, negative = (_num_patients(sample, label) for label in (1, 0))
        if found is None or min(positive, negative) < _MIN_PATIENTS:
            return Estimate(value, *newcombe_interval(value, positive, negative), "newcombe")
    return found or Estimate(value, reason=_NO_SPREAD)


def _num_patients(sample: Sample | ClassSample, label: int) -> int:
    return len(np.unique(sample.patient_of[sample.labels == label]))


def wilson_interval(share: float, number: float) -> tuple[float, float]:
    """The score interval of a proportion of `number` (Wilson 1927); not empty at 0 or 1."""
    centre = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    spread = math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))
    half = _Z / (1 + _Z**2 / number) * spread
    return 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half


def newcombe_interval(area: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """The score interval of an AUROC (Newcombe 2006, part 2, method 5); not empty at 0 or 1."""

    def excess(theta: float) -> float:
        """Above 0 where theta is further from the area than its own standard error allows."""
        half = (num_positive + num_negative) / 2 - 1
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        variance = theta * (1 - theta) * spread / (num_positive * num_negative)
        return (theta - area) ** 2 - _Z**2 * variance

    edges = []
    for outside in (0.0, 1.0):
        inside = area
        for _ in range(60):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
        edges.append(inside)
    return edges[0], edges[1]
