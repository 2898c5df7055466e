"""metrics.json: the results of one split in plain values, for networks with one output."""

from collections.abc import Mapping

from xrai.results.intervals import CONFIDENCE
from xrai.results.types import Abstention, Baseline, Estimate, Group, Measured, SplitResults

SCHEMA_VERSION = 2


def metrics_json(results: SplitResults) -> dict[str, object]:
    """What metrics.json holds.

    An undefined metric is NaN (null in the file) with its reason in `reasons` under its name; a
    missing interval has its reason under `NAME.interval`.
    """
    (found,) = results.outputs
    whole = _measured(found.whole)
    return {
        "schema_version": SCHEMA_VERSION,
        "split": results.split,
        "num_images": whole.pop("num_images"),
        "num_patients": whole.pop("num_patients"),
        "threshold": found.output.threshold,
        "threshold_source": found.output.threshold_source,
        **whole,
        "calibration": {
            "temperature": found.output.temperature,
            "before": _estimates(found.uncalibrated),
            "after": _estimates({name: found.whole.metrics[name] for name in found.uncalibrated}),
        },
        "subtypes": {name: _measured(each) for name, each in found.subtypes.items()},
        "groups": {name: _group(each) for name, each in found.groups.items()},
        "num_groups": results.num_groups,
        "abstention": _abstention(found.abstention),
        "by_threshold": found.by_threshold,
        "by_prevalence": found.by_prevalence,
        "bootstrap": {
            "num_resamples": results.num_bootstrap,
            "unit": "patient",
            "confidence": CONFIDENCE,
            "seed": results.seed,
        },
        "baselines": {name: _baseline(each) for name, each in results.baselines.items()},
    }


def _estimates(metrics: Mapping[str, Estimate]) -> dict[str, object]:
    return {
        name: {"value": each.value, "low": each.low, "high": each.high, "method": each.method}
        for name, each in metrics.items()
    }


def _measured(measured: Measured) -> dict[str, object]:
    return {
        "num_images": measured.num_images,
        "num_patients": measured.num_patients,
        "counts": measured.counts,
        "metrics": _estimates(measured.metrics),
        "reasons": {
            name if each.is_undefined else f"{name}.interval": each.reason
            for name, each in measured.metrics.items()
            if each.reason
        },
    }


def _group(group: Group) -> dict[str, object]:
    return {
        "num_normal": group.num_negative,
        "num_pneumonia": group.num_positive,
        "against": group.against,
        **_measured(group.measured),
    }


def _abstention(abstention: Abstention) -> dict[str, object]:
    curve = [
        {
            key: value
            for key, value in vars(point).items()
            if not (key == "by_atypicality" and value is None)
        }
        for point in abstention.curve
    ]
    return {**vars(abstention), "metrics": _estimates(abstention.metrics), "curve": curve}


def _baseline(baseline: Baseline) -> dict[str, object]:
    return {**vars(baseline), "metrics": _estimates(baseline.metrics)}
