"""summary.json, the mark of a finished run, and the lines that a command ends with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xrai.errors import RunError
from xrai.results.folder import SUMMARY
from xrai.results.metrics import HEADLINES, format_interval, format_value
from xrai.results.types import Counts, Estimate, SplitResults, Training
from xrai.store import Store
from xrai.tables import from_plain, load_json

SCHEMA_VERSION = 1

Number = float | None  # None where it is undefined, in a summary that was read back


@dataclass(frozen=True)
class ReviewSummary:
    """What is left to a person."""

    num_images: int | None
    share: Number
    accuracy_of_the_rest: Number


@dataclass(frozen=True)
class BaselineSummary:
    """What a shortcut reaches, and what that is worth."""

    auroc: Number
    reason: str


@dataclass(frozen=True)
class MainResults:
    """What is said first of one split: keys of summary.json, in their order."""

    split: str
    num_images: int
    num_patients: int
    accuracy: Number
    sensitivity: Number
    specificity: Number
    auroc: Number
    intervals: Mapping[str, tuple[Number, Number]]
    counts: Counts
    threshold: Number
    threshold_source: str
    temperature: float
    review: ReviewSummary
    baselines: Mapping[str, BaselineSummary]
    is_phantom: bool


def main_results(results: SplitResults) -> MainResults:
    """The main results of a split."""
    found, abstention = results.main, results.main.abstention
    metrics, output = found.whole.metrics, found.output
    rest = abstention.metrics.get("accuracy", Estimate()).value
    return MainResults(
        split=results.split,
        num_images=results.num_images,
        num_patients=results.num_patients,
        **{name: metrics[name].value for name in HEADLINES},
        intervals={name: (metrics[name].low, metrics[name].high) for name in HEADLINES},
        counts=found.whole.counts,
        threshold=output.threshold,
        threshold_source=output.threshold_source,
        temperature=output.temperature,
        review=ReviewSummary(abstention.num_review, abstention.share_review, rest),
        baselines={
            name: BaselineSummary(each.metrics["auroc"].value, each.reason)
            for name, each in results.baselines.items()
        },
        is_phantom=results.is_phantom,
    )


@dataclass(frozen=True)
class Summary:
    """What summary.json says of a run, beside the list of its files."""

    training: Training
    main: MainResults
    validation: Mapping[str, Number]  # values of `HEADLINES`

    def to_mapping(self) -> dict[str, object]:
        """The keys of summary.json, in their order."""
        main, training = dict(vars(self.main)), self.training
        is_phantom = main.pop("is_phantom")
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": training.run_id,
            "status": training.status,
            **main,
            "epochs": training.epochs,
            "best_epoch": training.best_epoch,
            "fingerprint": training.fingerprint,
            "is_phantom": is_phantom,
            "duration_s": round(training.duration_s, 3),
            "validation": self.validation,
            "trained_on": training.trained_on,
        }


def read_summary(data: bytes, *, where: str) -> Summary:
    """The summary that `Summary.to_mapping` wrote. Raises `RunError` where it is none."""
    try:
        found = load_json(data)
        version = found["schema_version"]
        if version != SCHEMA_VERSION:
            raise RunError(
                f"{where} has schema version {version!r}, this xrai reads version {SCHEMA_VERSION}"
            )
        training, main = from_plain(Training, found), from_plain(MainResults, found)
        validation = from_plain(Mapping[str, Number], found["validation"], "validation")
        is_complete = {*validation} <= {*HEADLINES} <= {*main.intervals}
        if not is_complete or {*main.baselines} not in (set(), {"geometry", "border"}):
            raise ValueError("it lacks metrics, or has others than xrai writes")
        return Summary(training, main, validation)
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{where} is not a summary of a run: {error}") from error


def stated_hash(store: Store, name: str) -> str | None:
    """The SHA-256 that summary.json states of a file of the run; None if the run has no summary.

    Raises `RunError` if the summary cannot be read or does not state it.
    """
    if store.size(SUMMARY) is None:
        return None
    try:
        sha256 = load_json(store.read(SUMMARY))["files"][name]
        if isinstance(sha256, str):
            return sha256
        raise TypeError(f"{sha256!r} is no hash")
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{store.uri}/{SUMMARY} does not state the hash of {name}: it is damaged"
        ) from error


def result_lines(
    results: MainResults, folder: str | Path, *, validation: Mapping[str, Number] | None = None
) -> list[str]:
    """The lines that a command ends with: results, and where their plots and their page are.

    Those of a training have the `validation` of its summary, and its curves.
    """
    counts, num_images = results.counts, results.num_images
    correct = "images correctly classified"
    details = {
        "accuracy": f"{counts.tp + counts.tn:,} of {num_images:,} {correct}",
        "sensitivity": f"{counts.tp:,} of {counts.num_positive:,} pneumonia images found",
        "specificity": f"{counts.tn:,} of {counts.num_negative:,} normal {correct}",
        "auroc": f"threshold {results.threshold or 0:.3f}, {results.threshold_source}",
    }
    phantoms = "; drawn phantoms, not patients" if results.is_phantom else ""
    lines = [
        f"{results.split} split: {num_images:,} images of {results.num_patients:,} patients; "
        f"95 % intervals in brackets{phantoms}"
    ]
    for name, detail in details.items():
        interval = format_interval(name, *results.intervals[name])
        value = format_value(name, getattr(results, name))
        shown = f"({interval})" if interval else ""
        lines.append(f"{_title(name):<12}{value:>7}  {shown:<16}  {detail}")
    if validation is not None and results.split != "val":
        values = (f"{_title(key)} {format_value(key, each)}" for key, each in validation.items())
        lines.append(f"validation  {', '.join(values)}")
    review, baselines = results.review, results.baselines
    if review.num_images is not None:
        rest = format_value("accuracy", review.accuracy_of_the_rest)
        lines.append(
            f"review      {review.num_images:,} of {num_images:,} images are unlike the training "
            f"images; accuracy on the others {rest}"
        )
    if baselines:
        geometry, border = (
            format_value("auroc", baselines[name].auroc) for name in ("geometry", "border")
        )
        lines.append(
            f"shortcuts   AUROC of image size alone {geometry}, outer border alone {border}"
        )
    curves = f"{folder}/curves/loss.png  {folder}/curves/accuracy.png  "
    lines.append(f"plots       {curves if validation is not None else ''}{folder}/plots/")
    return [*lines, f"report      {folder}/report.html"]


def _title(name: str) -> str:
    return "AUROC" if name == "auroc" else name
