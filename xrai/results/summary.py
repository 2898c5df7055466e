"""summary.json, the mark of a finished run, and the lines that a command ends with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from xrai.errors import RunError
from xrai.labels import Task
from xrai.results.folder import SUMMARY
from xrai.results.metrics import HEADLINES, format_interval, format_value
from xrai.results.types import Counts, Estimate, OutputResults, SplitResults, Training, told_images
from xrai.store import Store
from xrai.tables import from_plain, load_json

SCHEMA_VERSION = 1
# Keys of summary.json that are left out where they have these values
_USUAL = {
    **{"task": "binary", "outputs": (), "looked_for": "pneumonia", "opposite": "normal"},
    "num_without_patient": 0,
}

Number = float | None  # None where it is undefined, in a summary that was read back


@dataclass(frozen=True)
class ReviewSummary:
    """What is left to a person."""

    num_images: int | None
    share: Number
    accuracy_of_the_rest: Number


@dataclass(frozen=True)
class BaselineSummary:
    """What a shortcut alone achieves, and how to judge that."""

    auroc: Number
    reason: str


@dataclass(frozen=True)
class OutputSummary:
    """The headline results of one of several classes or findings."""

    name: str
    num_positive: int
    sensitivity: Number
    specificity: Number
    auroc: Number
    intervals: Mapping[str, tuple[Number, Number]]
    threshold: Number
    temperature: float
    num_negative: int | None = None  # earlier versions wrote none; unknown labels are in neither


@dataclass(frozen=True)
class MainResults:
    """The headline results of one split: keys of summary.json, in their order.

    With several outputs, the metrics are macro means over those that have a value, and the counts
    are those of all labels pooled. Accuracy is the share of images whose class is called correctly;
    for findings, the share of known labels that are called correctly.
    """

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
    temperature: Number
    review: ReviewSummary
    baselines: Mapping[str, BaselineSummary]
    is_phantom: bool
    task: Task = "binary"
    outputs: tuple[OutputSummary, ...] = ()  # of two classes, whose one output is above, none
    looked_for: str = "pneumonia"  # of two classes, the second one
    opposite: str = "normal"
    num_without_patient: int = 0  # images whose patient is unknown; each counts as a patient

    @property
    def has_patients(self) -> bool:
        """Whether the patient of any image is known."""
        return self.num_without_patient < self.num_images

    @property
    def worst(self) -> OutputSummary | None:
        """The output with the lowest AUROC."""
        known = [each for each in self.outputs if each.auroc is not None]
        return min(known, key=lambda each: each.auroc or 0.0, default=None)


def main_results(results: SplitResults) -> MainResults:
    """The main results of a split."""
    abstention, metrics, output = results.abstention, results.headline, results.main.output
    counts, is_binary = results.main.whole.counts, results.task == "binary"
    if not is_binary:
        parts = [each.whole.counts for each in results.outputs]
        totals = (sum(getattr(part, name) for part in parts) for name in ("tp", "fp", "tn", "fn"))
        counts = Counts(*totals)
    rest = abstention.metrics.get("accuracy", Estimate()).value
    return MainResults(
        split=results.split,
        num_images=results.num_images,
        num_patients=results.num_patients,
        **{name: metrics[name].value for name in HEADLINES},
        intervals={name: (metrics[name].low, metrics[name].high) for name in HEADLINES},
        counts=counts,
        threshold=output.threshold if is_binary else None,
        threshold_source=output.threshold_source,
        temperature=output.temperature if results.task != "multilabel" else None,
        review=ReviewSummary(abstention.num_review, abstention.share_review, rest),
        baselines={
            name: BaselineSummary(each.metrics["auroc"].value, each.reason)
            for name, each in results.baselines.items()
        },
        is_phantom=results.is_phantom,
        task=results.task,
        outputs=() if is_binary else tuple(map(_output_summary, results.outputs)),
        looked_for=output.name if is_binary else "",
        opposite=output.opposite if is_binary else "",
        num_without_patient=results.num_without_patient,
    )


def _output_summary(found: OutputResults) -> OutputSummary:
    metrics = found.whole.metrics
    names = ("sensitivity", "specificity", "auroc")
    # NaN becomes None, as it does in the file
    values = {name: None if metrics[name].is_undefined else metrics[name].value for name in names}
    return OutputSummary(
        name=found.output.name,
        num_positive=found.whole.counts.num_positive,
        **values,
        intervals={name: (metrics[name].low, metrics[name].high) for name in names},
        threshold=found.output.threshold,
        temperature=found.output.temperature,
        num_negative=found.whole.counts.num_negative,
    )


@dataclass(frozen=True)
class Summary:
    """What summary.json says of a run, apart from the list of its files."""

    training: Training
    main: MainResults
    validation: Mapping[str, Number]  # values of `HEADLINES`

    def to_mapping(self) -> dict[str, object]:
        """The keys of summary.json, in their order."""
        main, training = dict(vars(self.main)), self.training
        is_phantom = main.pop("is_phantom")
        # only what differs from pneumonia or normal, of which earlier versions wrote no names
        several = {
            name: value
            for name, usual in _USUAL.items()
            if (value := main.pop(name)) != usual and value
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": training.run_id,
            "status": training.status,
            **main,
            **several,
            "epochs": training.epochs,
            "best_epoch": training.best_epoch,
            "fingerprint": training.fingerprint,
            "is_phantom": is_phantom,
            "duration_s": round(training.duration_s, 3),
            "validation": self.validation,
            "trained_on": training.trained_on,
            **({} if training.unlike is None else {"unlike": training.unlike}),
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
        is_binary = main.task == "binary"
        if main.task not in get_args(Task) or is_binary != (main.threshold is not None):
            raise ValueError("its task and its threshold do not agree")
        if is_binary == bool(main.outputs):
            raise ValueError("its task and its outputs do not agree")
        return Summary(training, main, validation)
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{where} is not a summary of a run: {error}") from error


def stated_hashes(store: Store) -> dict[str, str] | None:
    """The SHA-256 that summary.json states of each file of the run; None if the run has no summary.

    Raises `RunError` if the summary cannot be read.
    """
    if store.size(SUMMARY) is None:
        return None
    try:
        files = load_json(store.read(SUMMARY))["files"]
        return dict(from_plain(Mapping[str, str], files, "files"))
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{store.uri}/{SUMMARY} does not state the hashes of the run's files: it is damaged"
        ) from error


def stated_hash(store: Store, name: str) -> str | None:
    """The SHA-256 that summary.json states of a file of the run; None if the run has no summary.

    Raises `RunError` if the summary cannot be read or does not state it.
    """
    hashes = stated_hashes(store)
    if hashes is not None and name not in hashes:
        raise RunError(f"{store.uri}/{SUMMARY} does not state the hash of {name}: it is damaged")
    return None if hashes is None else hashes[name]


def _details(results: MainResults) -> dict[str, str]:
    """The counts or the note that follow each headline figure, for two classes."""
    counts, correct = results.counts, "images correctly classified"
    found = f"{results.looked_for} images found"
    return {
        "accuracy": f"{counts.tp + counts.tn:,} of {results.num_images:,} {correct}",
        "sensitivity": f"{counts.tp:,} of {counts.num_positive:,} {found}",
        "specificity": f"{counts.tn:,} of {counts.num_negative:,} {results.opposite} {correct}",
        "auroc": f"threshold {results.threshold or 0:.3f}, {results.threshold_source}",
    }


def _details_of_several(results: MainResults) -> dict[str, str]:
    """The same for several classes or findings, the worst one named."""
    counts = results.counts
    is_multiclass = results.task == "multiclass"
    kind = "classes" if is_multiclass else "findings"
    num_calls = counts.tp + counts.fp + counts.tn + counts.fn
    num_right = counts.tp if is_multiclass else counts.tp + counts.tn

    def mean(name: str) -> str:
        num = sum(getattr(each, name) is not None for each in results.outputs)
        left_out = "" if num == len(results.outputs) else f"{num} of "
        return f"mean of {left_out}{len(results.outputs)} {kind}"

    worst = results.worst
    lowest = f"; worst {worst.name} {format_value('auroc', worst.auroc)}" if worst else ""
    return {
        "accuracy": f"{num_right:,} of {results.num_images:,} images correctly classified"
        if is_multiclass
        else f"{num_right:,} of {num_calls:,} known labels correct",
        "sensitivity": mean("sensitivity"),
        "specificity": mean("specificity"),
        "auroc": f"{mean('auroc')}{lowest}",
    }


def result_lines(
    results: MainResults, folder: str | Path, *, validation: Mapping[str, Number] | None = None
) -> list[str]:
    """The lines that a command ends with: results, and where their plots and their page are.

    Those of a training have the `validation` of its summary, and its curves.
    """
    details = _details(results) if results.task == "binary" else _details_of_several(results)
    num_images = results.num_images
    phantoms = "; drawn phantoms, not patients" if results.is_phantom else ""
    images = told_images(num_images, results.num_patients, results.num_without_patient)
    lines = [f"{results.split} split: {images}; 95 % intervals in brackets{phantoms}"]
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
    names = ("loss", "accuracy", *(("auroc",) if results.outputs else ()))
    curves = "".join(f"{folder}/curves/{name}.png  " for name in names)
    lines.append(f"plots       {curves if validation is not None else ''}{folder}/plots/")
    return [*lines, f"report      {folder}/report.html"]


def _title(name: str) -> str:
    return "AUROC" if name == "auroc" else name
