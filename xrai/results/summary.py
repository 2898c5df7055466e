"""summary.json, the mark of a finished run, and the lines that a command ends with."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xrai.errors import RunError
from xrai.results.metrics import HEADLINES, format_interval, format_value
from xrai.results.types import Counts, Estimate, SplitResults, Training

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class MainResults:
    """What is said first of one split."""

    split: str
    num_images: int
    num_patients: int
    estimates: Mapping[str, Estimate]  # of `HEADLINES`
    counts: Counts
    threshold: float
    threshold_source: str
    temperature: float
    num_review: int | None
    share_review: float
    accuracy_of_the_rest: float
    baselines: Mapping[str, tuple[float, str]]  # AUROC and what it is worth
    is_phantom: bool


def main_results(results: SplitResults) -> MainResults:
    """The main results of a split."""
    found = results.main
    abstention = found.abstention
    return MainResults(
        split=results.split,
        num_images=results.num_images,
        num_patients=results.num_patients,
        estimates={name: found.whole.metrics[name] for name in HEADLINES},
        counts=found.whole.counts,
        threshold=found.output.threshold,
        threshold_source=found.output.threshold_source,
        temperature=found.output.temperature,
        num_review=abstention.num_review,
        share_review=abstention.share_review,
        accuracy_of_the_rest=abstention.metrics.get("accuracy", Estimate()).value,
        baselines={
            name: (each.metrics["auroc"].value, each.reason)
            for name, each in results.baselines.items()
        },
        is_phantom=results.is_phantom,
    )


@dataclass(frozen=True)
class Summary:
    """What summary.json says of a run, beside the list of its files."""

    training: Training
    main: MainResults
    validation: Mapping[str, float]  # values of `HEADLINES`

    def to_mapping(self) -> dict[str, object]:
        """The keys of summary.json, in their order."""
        main, training = self.main, self.training
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": training.run_id,
            "status": training.status,
            "split": main.split,
            "num_images": main.num_images,
            "num_patients": main.num_patients,
            **{name: each.value for name, each in main.estimates.items()},
            "intervals": {name: [each.low, each.high] for name, each in main.estimates.items()},
            "counts": main.counts,
            "threshold": main.threshold,
            "threshold_source": main.threshold_source,
            "temperature": main.temperature,
            "review": {
                "num_images": main.num_review,
                "share": main.share_review,
                "accuracy_of_the_rest": main.accuracy_of_the_rest,
            },
            "baselines": {
                name: {"auroc": auroc, "reason": reason}
                for name, (auroc, reason) in main.baselines.items()
            },
            "epochs": training.epochs,
            "best_epoch": training.best_epoch,
            "fingerprint": training.fingerprint,
            "is_phantom": main.is_phantom,
            "duration_s": round(training.duration_s, 3),
            "validation": dict(self.validation),
            "trained_on": {
                "source": training.source,
                "image_size": training.image_size,
                "fit": training.fit,
                "splits": training.splits,
            },
        }


def read_summary(data: bytes, *, where: str) -> Summary:
    """The summary that `Summary.to_mapping` wrote. Raises `RunError` where it is none."""
    try:
        found: dict[str, Any] = json.loads(data)
        if found["schema_version"] != SCHEMA_VERSION:
            raise RunError(
                f"{where} has schema version {found['schema_version']}, this xrai reads version "
                f"{SCHEMA_VERSION}"
            )
        return _parse(found)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{where} is not a summary of a run: {error!r}") from error


def _parse(found: dict[str, Any]) -> Summary:
    trained, review = found["trained_on"], found["review"]
    training = Training(
        run_id=found["run_id"],
        status=found["status"],
        epochs=found["epochs"],
        best_epoch=found["best_epoch"],
        fingerprint=found["fingerprint"],
        duration_s=found["duration_s"],
        **trained,
    )
    main = MainResults(
        split=found["split"],
        num_images=found["num_images"],
        num_patients=found["num_patients"],
        estimates={name: _estimate(found[name], *found["intervals"][name]) for name in HEADLINES},
        counts=Counts(**found["counts"]),
        threshold=found["threshold"],
        threshold_source=found["threshold_source"],
        temperature=found["temperature"],
        num_review=review["num_images"],
        share_review=_number(review["share"]),
        accuracy_of_the_rest=_number(review["accuracy_of_the_rest"]),
        baselines={
            name: (_number(each["auroc"]), each["reason"])
            for name, each in found["baselines"].items()
        },
        is_phantom=found["is_phantom"],
    )
    validation = {name: _number(value) for name, value in found["validation"].items()}
    return Summary(training, main, validation)


def result_lines(summary: Summary, folder: str | Path) -> list[str]:
    """The last lines of a training: results, and where its images and its page are."""
    values = [
        f"{_title(name)} {format_value(name, value)}" for name, value in summary.validation.items()
    ]
    return [
        *_main_lines(summary.main),
        *([f"validation  {', '.join(values)}"] if summary.main.split != "val" else []),
        *_side_lines(summary.main),
        f"plots       {folder}/curves/loss.png  {folder}/curves/accuracy.png  {folder}/plots/",
        f"report      {folder}/report.html",
    ]


def split_lines(results: MainResults, folder: str | Path) -> list[str]:
    """The same lines for one split that was measured alone."""
    return [
        *_main_lines(results),
        *_side_lines(results),
        f"plots       {folder}/plots/",
        f"report      {folder}/report.html",
    ]


def _main_lines(results: MainResults) -> list[str]:
    counts, num_patients = results.counts, results.num_patients
    details = {
        "accuracy": f"{counts.tp + counts.tn:,} of {results.num_images:,} images correctly "
        "classified",
        "sensitivity": f"{counts.tp:,} of {counts.num_positive:,} pneumonia images found",
        "specificity": f"{counts.tn:,} of {counts.num_negative:,} normal images correctly "
        "classified",
        "auroc": f"threshold {results.threshold:.3f}, {results.threshold_source}",
    }
    phantoms = "; drawn phantoms, not patients" if results.is_phantom else ""
    lines = [
        f"{results.split} split: {results.num_images:,} images of {num_patients:,} patients; "
        f"95 % intervals in brackets{phantoms}"
    ]
    for name, detail in details.items():
        estimate = results.estimates[name]
        interval = format_interval(name, estimate.low, estimate.high)
        value, shown = format_value(name, estimate.value), f"({interval})" if interval else ""
        lines.append(f"{_title(name):<12}{value:>7}  {shown:<16}  {detail}")
    return lines


def _side_lines(results: MainResults) -> list[str]:
    """What is left to a person, and what shortcuts alone can do."""
    lines = []
    if results.num_review is not None:
        lines.append(
            f"review      {results.num_review:,} of {results.num_images:,} images are unlike the "
            f"training images; accuracy on the others "
            f"{format_value('accuracy', results.accuracy_of_the_rest)}"
        )
    if results.baselines:
        geometry, border = (
            format_value("auroc", results.baselines[name][0]) for name in ("geometry", "border")
        )
        lines.append(
            f"shortcuts   AUROC of image size alone {geometry}, outer border alone {border}"
        )
    return lines


def _title(name: str) -> str:
    return "AUROC" if name == "auroc" else name


def _estimate(value: float | None, low: float | None, high: float | None) -> Estimate:
    return Estimate(_number(value), _number(low), _number(high))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
