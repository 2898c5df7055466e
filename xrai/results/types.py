"""What travels through this room: the scores of a split, and what was measured on them.

`xrai.run` makes `Scores`, `xrai.results.measure` makes `SplitResults` of them. Files, plots, pages
and terminal lines are written from these types; nothing reads them back from a dictionary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt

from xrai.results.calibration import Floats, Ints, calibrated

REVIEW: Final = "review"  # the decision for an image unlike the training images
_PUBLIC_GROUPS = frozenset({"IM", "NORMAL2", "bacteria", "virus"})  # in the public set's file names


@dataclass(frozen=True)
class Output:
    """One thing that a network looks for, and how its logit is read."""

    name: str  # for people: "pneumonia"
    opposite: str  # what an image is that shows none of it: "normal"
    temperature: float
    threshold: float  # of the calibrated score
    threshold_source: str  # in words


def binary_output(
    classes: Sequence[str], *, temperature: float, threshold: float, threshold_source: str
) -> Output:
    """The one output of a network that tells two classes apart: it looks for the second."""
    opposite, name = (each.lower() for each in classes)
    return Output(name, opposite, float(temperature), float(threshold), threshold_source)


@dataclass(frozen=True, eq=False)
class Labelled:
    """The images whose label for one output is known."""

    rows: npt.NDArray[np.intp]  # (n,) of the split
    labels: Ints  # (n,) 0 or 1
    logits: Floats  # (n,)
    scores: Floats  # (n,) in [0, 1]


@dataclass(frozen=True, eq=False)
class Scores:
    """The logits of one split of N images for C outputs, and what is known of each image."""

    split: str
    classes: tuple[str, ...]  # as the data set names them
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
        """Calibrated scores (N, C)."""
        columns = [calibrated(self.logits[:, c], o.temperature) for c, o in enumerate(self.outputs)]
        return np.stack(columns, axis=1)

    @cached_property
    def in_review(self) -> npt.NDArray[np.bool_]:
        """Which images are left to a person, (N,); none where typicality is unknown."""
        if self.atypicality is None:
            return np.zeros(len(self.labels), dtype=bool)
        return needs_review(self.atypicality)

    def labelled(self, column: int = 0) -> Labelled:
        """The images whose label for an output is known."""
        rows = np.flatnonzero(self.labels[:, column] >= 0)
        labels = self.labels[rows, column].astype(np.int64)
        return Labelled(rows, labels, self.logits[rows, column], self.probabilities[rows, column])


def needs_review(atypicality: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which atypicalities (N,), or whether one, are above the limit of 1; NaN is. Such an image
    gets no class: a person looks at it.
    """
    return ~np.less_equal(np.asarray(atypicality, np.float64), 1)


def are_phantoms(sources: Iterable[str]) -> bool:
    """Whether there are images and all are drawn ones: `xrai.phantom` names them so."""
    flags = [PurePosixPath(source).name.startswith("phantom-") for source in sources]
    return bool(flags) and all(flags)


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
    method: str = ""  # of the interval: bootstrap, wilson, newcombe
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
    num_images: int
    num_patients: int
    num_groups: int
    is_phantom: bool
    outputs: tuple[OutputResults, ...]
    num_bootstrap: int
    seed: int
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    @property
    def main(self) -> OutputResults:
        """The first output, which is the only one of a network for two classes."""
        return self.outputs[0]


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
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # images, by split

    @property
    def is_public(self) -> bool:
        """Whether all patient keys are those of the public data set."""
        names = {name for groups in self.groups.values() for name in groups}
        return bool(names) and names <= _PUBLIC_GROUPS


@dataclass(frozen=True)
class TrainedOn:
    """The data set of a training."""

    source: str
    image_size: int
    fit: str
    splits: Mapping[str, Mapping[str, int]]  # split -> class -> number of images


@dataclass(frozen=True)
class Training:
    """A finished training: what was trained, on what, for how long."""

    run_id: str
    status: str
    epochs: int
    best_epoch: int
    fingerprint: str
    duration_s: float
    trained_on: TrainedOn
