"""The types of this package: the scores of a split, and what was measured on them.

`xrai.run` makes `Scores`, `xrai.results.measure` makes `SplitResults` of them. Files, plots, pages
and terminal lines are written from these types; nothing reads them back from a dictionary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from xrai.config import Labels as LabelReading
from xrai.labels import LabelSpec, Task
from xrai.results.calibration import Floats, Ints, calibrated, log_odds, move_share, softmax

# In the public set's file names, of normal images and of pneumonias
_PUBLIC_GROUPS = frozenset({"IM", "NORMAL2"}), frozenset({"bacteria", "virus"})
# Temperature, threshold and share of a finding whose validation labels all agree
_UNTOLD = (1.0, 0.5, 0.5)


@dataclass(frozen=True)
class Output:
    """One class or finding that a network looks for, and how its logit is read."""

    name: str  # for people: "pneumonia"
    opposite: str  # what an image is that shows none of it: "normal"
    temperature: float
    threshold: float | None  # of the calibrated score; None: the class with the highest is called
    threshold_source: str  # in words
    task: Task = "binary"  # of the network
    moved: "Moved | None" = None  # to the prior that was given or estimated, if one was
    # of images that show it, at which its scores are probabilities; None where a run keeps none
    share: float | None = None

    @property
    def unmoved(self) -> "Output":
        """The same without a prior: what is called does not depend on one."""
        return self if self.moved is None else self.moved.before

    @property
    def offset(self) -> float:
        """What a prior adds to logit / temperature."""
        return 0.0 if self.moved is None else self.moved.offset

    def move(self, share: float, offset: float, source: str) -> "Output":
        """The same with its scores, and its threshold, for another share of such images."""
        threshold = None if self.threshold is None else move_share(self.threshold, offset)
        words = f"{self.threshold_source}, moved to the prior"
        if self.threshold is None:
            words = "the class with the highest score before the prior is called"
        moved = Moved(self, share, offset, source)
        return replace(self, threshold=threshold, threshold_source=words, moved=moved, share=share)

    @property
    def words(self) -> Mapping[str, str]:
        """How to speak of the images that show it (`positives`), of the others, and of one each."""
        name, opposite = self.name, self.opposite
        if self.task == "multiclass":
            found = (f"images of class {name}", "images of other classes")
            one = (f"an image of class {name}", "one of another class")
        elif self.task == "multilabel":
            found = (f"images with {name}", f"images without {name}")
            one = (f"an image with {name}", "one without it")
        else:
            found = (f"{name} images", f"{opposite} images")
            one = (f"{_article(name)} {name} image", f"{_article(opposite)} {opposite} one")
        both = "images of both classes" if self.task == "binary" else " and ".join(found)
        return {
            **{"name": name, "opposite": opposite, "both": both},
            **dict(zip(("positives", "negatives"), found, strict=True)),
            **dict(zip(("a_positive", "a_negative"), one, strict=True)),
        }


@dataclass(frozen=True)
class Moved:
    """What a prior does to an output."""

    before: Output
    share: float  # of images that show the output, which the scores are for
    offset: float  # added to logit / temperature
    source: str  # of the share, in words


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


def outputs_of(
    spec: LabelSpec, temperatures: Sequence[float], thresholds: Sequence[float], source: str
) -> tuple[Output, ...]:
    """The outputs of a network for these labels, `source` saying where thresholds come from.

    Two classes have one output, which looks for the second. Classes share one temperature and have
    no thresholds, findings have one of each.
    """
    if spec.task == "multiclass":
        (temperature,) = temperatures
        source = "the class with the highest score is called"
        return tuple(
            Output(name, f"not {name}", float(temperature), None, source, spec.task)
            for name in spec.classes
        )
    names = [(name, f"no {name}") for name in spec.classes]
    if spec.task == "binary":
        names = [(spec.spoken[1], spec.spoken[0])]
    return tuple(
        Output(name, opposite, float(temperature), float(threshold), source, spec.task)
        for (name, opposite), temperature, threshold in zip(
            names, temperatures, thresholds, strict=True
        )
    )


def with_shares(outputs: Sequence[Output], shares: Sequence[float]) -> tuple[Output, ...]:
    """The outputs with the shares at which their scores are probabilities, if a run keeps them.

    A finding whose validation labels all agreed has none: its temperature of 1, its threshold and
    its share of 0.5 stand in for what could not be chosen.
    """
    if not shares:
        return tuple(outputs)
    return tuple(
        output
        if output.task == "multilabel" and (output.temperature, output.threshold, share) == _UNTOLD
        else replace(output, share=share)
        for output, share in zip(outputs, shares, strict=True)
    )


def score_logits(outputs: Sequence[Output], logits: Floats) -> Floats:
    """The calibrated scores (N, C) of logits (N, C); those of classes sum to 1 in each row."""
    scaled = logits / np.array([output.temperature for output in outputs])
    scaled += np.array([output.offset for output in outputs])
    return softmax(scaled) if outputs[0].task == "multiclass" else calibrated(scaled)


def call_logits(outputs: Sequence[Output], logits: Floats) -> npt.NDArray[np.bool_]:
    """Which outputs are called by logits (N, C): the class with the highest score, or each output
    whose score reaches its threshold. A prior changes no call.
    """
    outputs = [output.unmoved for output in outputs]
    thresholds = [output.threshold for output in outputs]
    if None not in thresholds:
        found: npt.NDArray[np.bool_] = score_logits(outputs, logits) >= np.array(
            thresholds, np.float64
        )
        return found
    # of the logits: probabilities of very sure calls round to ties
    called: npt.NDArray[np.bool_] = logits.argmax(axis=1)[:, None] == np.arange(len(outputs))
    return called


def calls_of(outputs: Sequence[Output], called: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """The names of what is called in one image, (C,): one class, or any number of findings."""
    if outputs[0].task == "binary":
        return (outputs[0].name if called[0] else outputs[0].opposite,)
    return tuple(
        output.name for output, is_called in zip(outputs, called, strict=True) if is_called
    )


@dataclass(frozen=True, eq=False)
class Labelled:
    """The images whose label for one output is known."""

    rows: npt.NDArray[np.intp]  # (n,) of the split
    labels: Ints  # (n,) 0 or 1
    logits: Floats  # (n,)
    scores: Floats  # (n,) in [0, 1]
    called: npt.NDArray[np.bool_]  # (n,)
    patient_of: npt.NDArray[np.intp]  # (n,) number of each image's patient in the split


@dataclass(frozen=True, eq=False)
class Scores:
    """The logits of one split of N images for C outputs, and what is known of each image."""

    split: str
    task: Task
    classes: tuple[str, ...]  # or findings, as the data set names them
    outputs: tuple[Output, ...]  # C of them: one for two classes
    labels: npt.NDArray[np.int8]  # (N, C): 1 present, 0 absent, -1 unknown
    logits: Floats  # (N, C)
    patients: Sequence[str]  # (N,) keys; a group and a colon may stand in front
    sources: Sequence[str]  # (N,) paths
    subtypes: Sequence[str]  # (N,) empty where unknown
    atypicality: Floats | None = None  # (N,); above 1 asks for review

    def __post_init__(self) -> None:
        num = len(self.labels)
        shape = (num, len(self.outputs))
        lengths = [len(each) for each in (self.patients, self.sources, self.subtypes)]
        lengths += [num if self.atypicality is None else len(self.atypicality)]
        if self.labels.shape != shape or self.logits.shape != shape or set(lengths) != {num}:
            raise ValueError(
                f"labels {self.labels.shape} and logits {self.logits.shape} must be {shape}, and "
                f"all columns {num} long, not {lengths}"
            )

    @cached_property
    def groups(self) -> list[str]:
        """The source group of each image, empty where its patient key names none."""
        return [group_of(patient) for patient in self.patients]

    @cached_property
    def is_phantom(self) -> bool:
        """Whether all images are drawn ones, which every result must say."""
        return are_phantoms(self.sources)

    @cached_property
    def probabilities(self) -> Floats:
        """Calibrated scores (N, C); those of classes sum to 1 in each row."""
        return score_logits(self.outputs, self.logits)

    @cached_property
    def uncalibrated(self) -> Floats:
        """Scores at temperature 1, (N, C), moved to the same prior as `probabilities`."""
        plain = [replace(output, temperature=1.0) for output in self.outputs]
        return score_logits(plain, self.logits)

    @cached_property
    def called(self) -> npt.NDArray[np.bool_]:
        """Which outputs each image is called, (N, C): the class with the highest score, or each
        one whose score reaches its threshold.
        """
        return call_logits(self.outputs, self.logits)

    @cached_property
    def certainty(self) -> Floats:
        """How far each call is from another one, (N, C), as a difference of calibrated logits."""
        scaled = self.logits / np.array([output.temperature for output in self.outputs])
        if self.task == "multiclass":
            order = np.sort(scaled, axis=1)
            limits = np.where(self.called, order[:, -2:-1], order[:, -1:])  # the best other class
        else:
            thresholds = [output.unmoved.threshold or 0.0 for output in self.outputs]
            limits = np.array([log_odds(each) for each in thresholds])
        found: Floats = np.abs(scaled - limits)
        return found

    @cached_property
    def in_review(self) -> npt.NDArray[np.bool_]:
        """Which images are left to a person, (N,); none where typicality is unknown."""
        if self.atypicality is None:
            return np.zeros(len(self.labels), dtype=bool)
        return needs_review(self.atypicality)

    @cached_property
    def patient_of(self) -> npt.NDArray[np.intp]:
        """The number of each image's patient, (N,), in the order of their keys."""
        return np.unique(np.asarray(self.patients, dtype=str), return_inverse=True)[1]

    def labelled(self, column: int = 0) -> Labelled:
        """The images whose label for an output is known."""
        rows = np.flatnonzero(self.labels[:, column] >= 0)
        return Labelled(
            rows,
            self.labels[rows, column].astype(np.int64),
            self.logits[rows, column],
            self.probabilities[rows, column],
            self.called[rows, column],
            self.patient_of[rows],
        )


def needs_review(atypicality: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which atypicalities (N,), or whether one, are above the limit of 1; NaN is. Such an image
    gets no class: a person looks at it.
    """
    return ~np.less_equal(np.asarray(atypicality, np.float64), 1)


def are_phantoms(sources: Iterable[str]) -> bool:
    """Whether there are images and all are drawn ones: `xrai.phantom` names them so."""
    flags = [PurePosixPath(source).name.startswith("phantom-") for source in sources]
    return bool(flags) and all(flags)


def told_images(num_images: int, num_patients: int, num_without_patient: int = 0) -> str:
    """How many images of how many patients, in words: "1,204 images of 1 patient".

    The patient of `num_without_patient` images is unknown; each of them counts as one.
    """
    images, patients = (
        f"{num:,} {noun}{'' if num == 1 else 's'}"
        for num, noun in ((num_images, "image"), (num_patients, "patient"))
    )
    if num_images and num_without_patient == num_images:
        return f"{images} of unknown patients"
    unknown = f" (unknown for {num_without_patient:,} of the images)"
    return f"{images} of {patients if not num_without_patient else f'at most {patients}{unknown}'}"


def told_patients(num_images: int, num_patients: int, num_without_patient: int) -> str:
    """How many patients, for the cell of a table: "1,204", "at most 1,204" or "unknown"."""
    if num_images and num_without_patient == num_images:
        return "unknown"
    return f"{'at most ' if num_without_patient else ''}{num_patients:,}"


def group_of(patient: str) -> str:
    """The part of a patient key before its colon; empty where the key names no group."""
    group, colon, _ = patient.partition(":")
    return group if colon and group != "file" else ""


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its 95 % interval; NaN where there is none, and `reason` says why."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    method: str = ""  # of the interval: bootstrap, wilson, widest, newcombe, combined
    # why there is no value, or no interval; metrics.json has it in another place
    reason: str = field(default="", metadata={"in_json": False})

    @property
    def is_undefined(self) -> bool:
        """Whether there is no value."""
        return math.isnan(self.value)


@dataclass(frozen=True)
class Counts:
    """Calls against labels."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def num_positive(self) -> int:
        """Images that show what is looked for."""
        return self.tp + self.fn

    @property
    def num_negative(self) -> int:
        """The others."""
        return self.tn + self.fp


@dataclass(frozen=True)
class Measured:
    """One output on one selection of images."""

    num_images: int
    num_patients: int
    counts: Counts
    metrics: Mapping[str, Estimate]  # by the names in `METRICS`


@dataclass(frozen=True)
class Group:
    """A source group, measured against the images that it lacks."""

    num_negative: int
    num_positive: int
    against: str  # in words
    measured: Measured


@dataclass(frozen=True)
class CallsByThreshold:
    """True and false positives at `num_steps` + 1 thresholds, evenly from 0 to 1."""

    num_steps: int
    tp: tuple[int, ...]
    fp: tuple[int, ...]


@dataclass(frozen=True)
class Curves:
    """What the page draws of an output, at most `metrics.NUM_POINTS` points of each curve; empty
    where a class is missing.
    """

    roc: tuple[tuple[float, float], ...]  # 1 - specificity, sensitivity
    precision_recall: tuple[tuple[float, float], ...]  # recall, precision
    # mean score, share of positive images, and number of images of each bin that has some
    reliability: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class WorthOfCall:
    """PPV and NPV at one prevalence, and at the lower ends of both rates' intervals."""

    prevalence: float
    ppv: float
    npv: float
    ppv_low: float
    npv_low: float


@dataclass(frozen=True)
class ReviewCount:
    """How many images of a class are left to a person."""

    num_images: int
    num_review: int


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy on the images that are kept when the others are left to a person."""

    coverage: float  # share that is kept
    num_images: int
    by_doubt: float  # the least certain are left out first
    by_atypicality: float | None  # the least typical first; None where typicality is unknown


@dataclass(frozen=True)
class Abstention:
    """What is left to a person, and the metrics of the rest."""

    num_review: int | None  # None where the run knows no typicality
    share_review: float
    by_class: Mapping[str, ReviewCount]
    metrics: Mapping[str, Estimate]
    reason: str
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class OutputResults:
    """All that was measured for one output."""

    output: Output
    whole: Measured
    uncalibrated: Mapping[str, Estimate]  # brier and ece at temperature 1
    subtypes: Mapping[str, Measured]  # each against all images without the output
    groups: Mapping[str, Group]  # the largest ones
    abstention: Abstention
    by_threshold: CallsByThreshold
    by_prevalence: tuple[WorthOfCall, ...]
    curves: Curves


@dataclass(frozen=True)
class Baseline:
    """What a model that never sees a lung reaches."""

    meaning: str
    num_train: int
    num_images: int
    metrics: Mapping[str, Estimate]
    reason: str  # why there is no number, or what it is worth


@dataclass(frozen=True)
class SplitResults:
    """All that was measured on one split."""

    split: str
    task: Task
    num_images: int
    num_patients: int
    num_groups: int
    is_phantom: bool
    outputs: tuple[OutputResults, ...]
    abstention: Abstention  # of all outputs together; of two classes, that of the one output
    num_bootstrap: int
    seed: int
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    num_without_patient: int = 0  # images whose patient is unknown; each counts as a patient
    # Of several outputs, by the names in `METRICS`; both are empty for two classes
    macro: Mapping[str, Estimate] = field(default_factory=dict)  # means over outputs
    micro: Mapping[str, Estimate] = field(default_factory=dict)  # of all outputs' pooled labels
    # metric -> outputs without a value, which its macro mean leaves out
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # images by class (rows) and call (columns), (C, C); None unless classes exclude each other
    confusion: tuple[tuple[int, ...], ...] | None = None

    @property
    def main(self) -> OutputResults:
        """The first output, which is the only one of a network for two classes."""
        return self.outputs[0]

    @property
    def has_patients(self) -> bool:
        """Whether the patient of any image is known."""
        return self.num_without_patient < self.num_images

    @property
    def headline(self) -> Mapping[str, Estimate]:
        """The headline metrics: those of a single output, or the macro means of several.

        Accuracy is a share of images; for findings, the share of known labels called correctly.
        """
        shared = {name: self.micro[name] for name in ("accuracy",) if name in self.micro}
        return {**self.macro, **shared} or self.main.whole.metrics

    @property
    def ranked(self) -> list[int]:
        """The outputs' numbers by AUROC, the lowest first; those without one come last."""
        values = [found.whole.metrics["auroc"].value for found in self.outputs]
        return sorted(range(len(values)), key=lambda at: (math.isnan(values[at]), values[at]))

    @property
    def worst(self) -> OutputResults | None:
        """The output with the lowest AUROC; None where none has one."""
        first = self.outputs[self.ranked[0]]
        return None if first.whole.metrics["auroc"].is_undefined else first


@dataclass(frozen=True)
class DatasetFacts:
    """What a page says of a data set."""

    source: str
    fingerprint: str
    image_size: int
    fit: str
    splits: Mapping[str, Mapping[str, int]]  # split -> class -> number of images
    num_found: int
    excluded: Mapping[str, int] = field(default_factory=dict)  # reason -> number of files
    num_patients: Mapping[str, int] = field(default_factory=dict)  # by split
    # images by split whose patient is unknown; each counts as a patient
    num_without_patient: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # images, by split
    num_images: Mapping[str, int] = field(default_factory=dict)  # by split
    # of findings: split -> finding -> number of images where it is unknown
    num_unknown: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    task: Task = "binary"  # of the data set
    reading: LabelReading = field(default_factory=LabelReading)

    @property
    def has_patients(self) -> bool:
        """Whether the patient of any image is known, or may be."""
        num_images = sum(self.num_images.values())
        return num_images == 0 or sum(self.num_without_patient.values()) < num_images

    @property
    def is_public(self) -> bool:
        """Whether all patient keys are those of the public data set, of normal images and of
        pneumonias.
        """
        names = {name for groups in self.groups.values() for name in groups}
        normal, pneumonia = _PUBLIC_GROUPS
        return bool(names & normal and names & pneumonia) and names <= normal | pneumonia


@dataclass(frozen=True)
class TrainedOn:
    """The data set of a training."""

    source: str
    image_size: int
    fit: str
    splits: Mapping[str, Mapping[str, int]]  # split -> class -> number of images


@dataclass(frozen=True)
class UnlikeImages:
    """Images that a site gave for review to be fitted to, `review.unlike`."""

    source: str
    sha256: str  # of the hashes of their files
    num_images: int
    num_patients: int
    num_held_out: int  # images of patients that review was not fitted to
    num_held_out_review: int  # those of them that go to review
    num_without_patient: int = 0  # images whose patient is unknown; each counts as a patient


@dataclass(frozen=True)
class Training:
    """A finished training: what was trained, on what, for how long."""

    run_id: str
    status: str
    epochs: int
    best_epoch: int
    fingerprint: str
    duration_s: float  # to the report; of a resumed run, without steps that were lost
    trained_on: TrainedOn
    unlike: UnlikeImages | None = None
