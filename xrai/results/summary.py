"""summary.json, and the lines that a command ends with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xrai.results.metrics import format_interval, format_value

SCHEMA_VERSION = 1
FINAL_TAGS = {name: f"final/{name}" for name in ("accuracy", "sensitivity", "specificity", "auroc")}


def make_summary(
    metrics: Mapping[str, Any],
    *,
    run_id: str,
    status: str,
    epochs: int,
    best_epoch: int,
    fingerprint: str,
    duration_s: float,
    is_phantom: bool,
) -> dict[str, Any]:
    """What summary.json holds, but for `files`; each result is the one of `metrics` (the
    metrics.json dictionary).
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "status": status,
        **main_results(metrics),
        "epochs": epochs,
        "best_epoch": best_epoch,
        "fingerprint": fingerprint,
        "is_phantom": is_phantom,
        "duration_s": round(duration_s, 3),
    }


def format_result_lines(summary: Mapping[str, Any], folder: str | Path) -> list[str]:
    """The last lines of a training: the results with their 95 % intervals and counts, and where
    the pictures are.
    """
    validation = summary.get("validation", {}) if summary["split"] != "val" else {}
    values = [f"{_title(name)} {format_value(name, value)}" for name, value in validation.items()]
    return [
        *_format_main_results(summary, is_phantom=summary["is_phantom"]),
        *([f"validation  {', '.join(values)}"] if values else []),
        *_format_side_results(summary),
        f"pictures    {folder}/curves/loss.png  {folder}/curves/accuracy.png  {folder}/plots/",
        f"report      {folder}/report.html",
    ]


def format_metrics_lines(
    metrics: Mapping[str, Any], folder: str | Path, *, is_phantom: bool = False
) -> list[str]:
    """The same lines for one split measured alone: from the metrics.json dictionary, with the
    folder of its files.
    """
    results = main_results(metrics)
    return [
        *_format_main_results(results, is_phantom=is_phantom),
        *_format_side_results(results),
        f"pictures    {folder}/plots/",
        f"report      {folder}/report.html",
    ]


def main_results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    entries = {
        name: metrics["metrics"][name]
        for name in ("accuracy", "sensitivity", "specificity", "auroc")
    }
    return {
        "split": metrics["split"],
        "num_images": metrics["num_images"],
        "num_patients": metrics["num_patients"],
        **{name: entry["value"] for name, entry in entries.items()},
        "intervals": {name: [entry["low"], entry["high"]] for name, entry in entries.items()},
        "counts": dict(metrics["counts"]),
        "threshold": metrics["threshold"],
        "threshold_source": metrics["threshold_source"],
        "temperature": metrics["calibration"]["temperature"],
        "review": {
            "num_images": metrics["abstention"]["num_review"],
            "share": metrics["abstention"]["share_review"],
            "accuracy_of_the_rest": metrics["abstention"]["metrics"]
            .get("accuracy", {})
            .get("value"),
        },
        "baselines": {
            name: {"auroc": entry["metrics"]["auroc"]["value"], "reason": entry["reason"]}
            for name, entry in metrics.get("baselines", {}).items()
        },
    }


def _format_side_results(results: Mapping[str, Any]) -> list[str]:
    """What is left to a person, and what shortcuts alone can do."""
    lines = []
    review = results.get("review") or {}  # a run of an earlier version has neither
    if review.get("num_images") is not None:
        rest = format_value("accuracy", review["accuracy_of_the_rest"])
        lines.append(
            f"review      {review['num_images']:,} of {results['num_images']:,} images are unlike the training images; "
            f"accuracy on the others {rest}"
        )
    if results.get("baselines"):
        geometry, border = (results["baselines"][name] for name in ("geometry", "border"))
        parts = [
            f"picture size alone {format_value('auroc', geometry['auroc'])}",
            f"outer border alone {format_value('auroc', border['auroc'])}",
        ]
        lines.append(f"shortcuts   AUROC of {', '.join(parts)}")
    return lines


def _title(name: str) -> str:
    return "AUROC" if name == "auroc" else name


def _format_main_results(results: Mapping[str, Any], *, is_phantom: bool) -> list[str]:
    tp, fp, tn, fn = (results["counts"][key] for key in ("tp", "fp", "tn", "fn"))
    details = {
        "accuracy": f"{tp + tn:,} of {tp + fp + tn + fn:,} images called right",
        "sensitivity": f"{tp:,} of {tp + fn:,} pneumonia images found",
        "specificity": f"{tn:,} of {tn + fp:,} normal images left alone",
        "auroc": f"threshold {results['threshold']:.3f}, {results['threshold_source']}",
    }
    lines = [
        f"{results['split']} split: {results['num_images']:,} images of {results['num_patients']:,} patients; 95 % "
        f"intervals in brackets{'; drawn phantoms, not patients' if is_phantom else ''}"
    ]
    for name, detail in details.items():
        interval = format_interval(name, *results["intervals"][name])
        number, shown = format_value(name, results[name]), f"({interval})" if interval else ""
        lines.append(f"{_title(name):<12}{number:>7}  {shown:<16}  {detail}")
    return lines
