"""95 % intervals of metrics, by patient.

Percentiles over resamples of whole patients, because one patient's images are alike (Efron and
Tibshirani 1993, ch. 13; Field and Welsh 2007 on clusters). Where there are too few errors to
resample, a proportion has Wilson's interval, and an AUROC of which all resamples agree has
Newcombe's, both counted in patients.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from xrai.results.calibration import Floats
from xrai.results.metrics import PROPORTIONS, ClassSample, Sample, values
from xrai.results.types import Estimate, Output

CONFIDENCE = 0.95
# Of a sample: the column of an output, the kind of a selection of images, and its name
Key = tuple[int, str, str]
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_MIN_EVENTS = 5  # patients right, or wrong; fewer make resamples of a proportion uninformative
_RESAMPLES_AT_ONCE = 50  # keeps the arrays of one step in the processor's cache
_WEIGHTS_AT_ONCE = 2**18  # resamples times images of a large split: ten arrays of 2 MiB
_ROUNDING = 1e-9  # resamples that differ by less agree
_MIN_DEFINED_SHARE = 0.9  # of resamples in which a metric is defined
_ONE_PATIENT = "one patient alone cannot be resampled"
_NO_SPREAD = "too few resamples define it, or all give the same"


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


def estimate_mean(values: Floats, resampled: Floats, *, num_patients: int) -> Estimate:
    """The mean of a metric over C outputs, (C,), and over the same outputs in R resamples, (C, R).

    An output without a value, here or in a resample, is left out there; with none, `reason` says
    so.
    """
    is_defined = np.isfinite(values)
    if not is_defined.any():
        return Estimate(reason="no class or finding has it")
    value = float(values[is_defined].mean())
    if num_patients < 2:
        return Estimate(value, reason=_ONE_PATIENT)
    drawn = resampled[is_defined]
    is_known = np.isfinite(drawn)
    with np.errstate(invalid="ignore"):
        means = np.where(is_known, drawn, 0.0).sum(axis=0) / is_known.sum(axis=0)
    return _percentiles(value, means) or Estimate(value, reason=_NO_SPREAD)


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
    if name in PROPORTIONS:
        num_patients = len(np.unique(sample.patient_of[PROPORTIONS[name](sample)]))
        # where each patient has one image the product is a whole number
        if min(value, 1 - value) * num_patients < _MIN_EVENTS - 0.5:
            return Estimate(value, *wilson_interval(value, num_patients), "wilson")
    if found := _percentiles(value, resampled):
        return found
    if name == "auroc":
        positive, negative = (
            len(np.unique(sample.patient_of[sample.labels == label])) for label in (1, 0)
        )
        return Estimate(value, *newcombe_interval(value, positive, negative), "newcombe")
    return Estimate(value, reason=_NO_SPREAD)


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
