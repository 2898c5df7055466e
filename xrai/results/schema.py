"""metrics.json: the results of one split in plain values, for networks with one output."""

from xrai.results.intervals import CONFIDENCE
from xrai.results.types import Measured, SplitResults

SCHEMA_VERSION = 2


def metrics_json(results: SplitResults) -> dict[str, object]:
    """What metrics.json holds.

    An undefined metric is NaN (null in the file) with its reason in `reasons` under its name; a
    missing interval has its reason under `NAME.interval`.
    """
    (found,) = results.outputs
    groups = {
        name: {
            "num_normal": each.num_negative,
            "num_pneumonia": each.num_positive,
            "against": each.against,
            **_measured(each.measured),
        }
        for name, each in found.groups.items()
    }
    curve: list[dict[str, object]] = [dict(vars(point)) for point in found.abstention.curve]
    for point in curve:
        if point["by_atypicality"] is None:
            del point["by_atypicality"]
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
            "before": found.uncalibrated,
            "after": {name: found.whole.metrics[name] for name in found.uncalibrated},
        },
        "subtypes": {name: _measured(each) for name, each in found.subtypes.items()},
        "groups": groups,
        "num_groups": results.num_groups,
        "abstention": {**vars(found.abstention), "curve": curve},
        "by_threshold": found.by_threshold,
        "by_prevalence": found.by_prevalence,
        "bootstrap": {
            "num_resamples": results.num_bootstrap,
            "unit": "patient",
            "confidence": CONFIDENCE,
            "seed": results.seed,
        },
        "baselines": results.baselines,
    }


def _measured(measured: Measured) -> dict[str, object]:
    reasons = {
        name if each.is_undefined else f"{name}.interval": each.reason
        for name, each in measured.metrics.items()
        if each.reason
    }
    return {**vars(measured), "reasons": reasons}
