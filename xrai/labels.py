"""What the labels of a data set are: two classes, several classes, or findings."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Task = Literal["binary", "multiclass", "multilabel"]
# A position in `LabelSpec.classes`; of findings, 1 present, 0 absent or `UNKNOWN` for each of them
Label = int | tuple[int, ...]
Labels = NDArray[np.integer]  # (N,) uint8 positions, or (N, C) int8 findings
CLASSES: Final = ("NORMAL", "PNEUMONIA")  # of the public set; people read them in lower case
REVIEW: Final = "review"  # the decision for an image unlike the training images
NO_FINDING: Final = "no finding"  # the decision where none of the findings is called
MAX_NAME: Final = 60  # characters
MAX_CLASSES: Final = 256  # a class is a byte
UNKNOWN: Final = -1  # the label of a finding that nobody looked for, or was unsure of


@dataclass(frozen=True)
class LabelSpec:
    """A task and its names. `binary` has two classes, of which the second is looked for;
    `multiclass` three or more, one for each image; `multilabel` findings, each present, absent or
    unknown.
    """

    task: Task
    classes: tuple[str, ...]  # or findings, in the order of their outputs

    def __str__(self) -> str:
        """For people: "the classes NORMAL, PNEUMONIA"."""
        kind = "findings" if self.task == "multilabel" else "classes"
        return f"the {kind} {', '.join(self.classes)}"

    @property
    def num_outputs(self) -> int:
        """Logits of an image: one for two classes, else one for each class or finding."""
        return 1 if self.task == "binary" else len(self.classes)

    @property
    def is_public(self) -> bool:
        """Whether the classes are NORMAL and PNEUMONIA."""
        return self.task == "binary" and {*self.classes} == {*CLASSES}

    @property
    def spoken(self) -> tuple[str, ...]:
        """The names as people read them: normal and pneumonia; any others as they are."""
        return tuple(name.lower() for name in self.classes) if self.is_public else self.classes

    def fault(self) -> str:
        """What is wrong with the task or the names, in words that follow them; empty if nothing
        is.
        """
        if self.task not in get_args(Task):
            return f"are of task {self.task!r}; it is one of {', '.join(get_args(Task))}"
        for name in self.classes:
            if words := name_fault(name, self.task):
                return f"have the name {name[:MAX_NAME]!r}, which {words}"
        if same := find_twice(self.classes):
            return f"name one class twice: {' and '.join(map(repr, same))}"
        num = len(self.classes)
        if num == 1 and self.task != "multilabel":
            return f"are one class alone, {self.classes[0]!r}; there must be two at least"
        if self.task == "binary":
            return "" if num == 2 else f"are {num}; a binary data set has 2"
        fewest = {"multiclass": 3, "multilabel": 1}[self.task]
        if not fewest <= num <= MAX_CLASSES:
            return f"are {num}; a {self.task} data set has {fewest} to {MAX_CLASSES}"
        return ""

    def allows(self, label: Label) -> bool:
        """Whether a label is one that this data set can have."""
        if self.task == "multilabel":
            findings = label if isinstance(label, tuple) else ()
            is_known = all(type(one) is int and UNKNOWN <= one <= 1 for one in findings)
            return len(findings) == len(self.classes) and is_known
        return type(label) is int and 0 <= label < len(self.classes)

    def empty(self, num: int) -> Labels:
        """Room for the labels of `num` images as the data set holds them, contents undefined."""
        if self.task == "multilabel":
            return np.empty((num, len(self.classes)), np.int8)
        return np.empty(num, np.uint8)

    def array(self, labels: Sequence[Label]) -> Labels:
        """Labels of images as the data set holds them: (N,) uint8, or (N, C) int8 of findings."""
        found = self.empty(len(labels))
        found[:] = np.array(labels, found.dtype).reshape(found.shape)
        return found

    def count(self, labels: Labels) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Images of each class, or with each finding present; and of findings, the images where
        each is unknown (else empty).
        """
        if self.task == "multilabel":
            present, unknown = (labels == 1).sum(axis=0), (labels == UNKNOWN).sum(axis=0)
            return tuple(present.tolist()), tuple(unknown.tolist())
        return tuple(np.bincount(labels, minlength=len(self.classes)).tolist()), ()

    def matrix(self, labels: Labels) -> NDArray[np.int8]:
        """Labels as the data set holds them, (N,) or (N, C), as one column for each output: (N,
        `num_outputs`), 1 present, 0 absent, -1 unknown.
        """
        if self.task == "multilabel":
            return labels.astype(np.int8)
        if self.task == "binary":
            return labels.astype(np.int8)[:, None]
        one_hot: NDArray[np.int8] = (labels[:, None] == np.arange(len(self.classes))).astype(
            np.int8
        )
        return one_hot

    def reads(self, other: "LabelSpec") -> bool:
        """Whether a network for these labels can be measured on others: those with the same names,
        in upper or lower case and, with several outputs, in any order.
        """
        own, theirs = ([folded(name) for name in each.classes] for each in (self, other))
        if self.task != "binary":
            own, theirs = sorted(own), sorted(theirs)
        return self.task == other.task and own == theirs

    def matrix_for(self, reader: "LabelSpec", labels: Labels) -> NDArray[np.int8]:
        """The `matrix` of these labels in the order of another spec, which `reads` this one."""
        columns = self.matrix(labels)
        if self.task == "binary":
            return columns
        places = {folded(name): place for place, name in enumerate(self.classes)}
        return columns[:, [places[folded(name)] for name in reader.classes]]


def folded(name: str) -> str:
    """The form in which names are compared: without case and outer spaces, accents composed."""
    return unicodedata.normalize("NFC", name.strip().casefold())


def find_twice(names: Iterable[str]) -> tuple[str, ...]:
    """The first two names that are the same but for case; empty where there are none."""
    first: dict[str, str] = {}
    for name in names:
        if folded(name) in first:
            return first[folded(name)], name
        first[folded(name)] = name
    return ()


def name_fault(name: str, task: Task) -> str:
    """Why this is no name of a class or finding, in words that follow it; empty if it is one."""
    if not name.strip() or len(name) > MAX_NAME or "|" in name or not name.isprintable():
        return f"is no name: it takes 1 to {MAX_NAME} printable characters without |"
    own = re.sub(r"[\s_-]+", " ", folded(name))
    if own == REVIEW or (own == NO_FINDING and task == "multilabel"):
        return "predictions use as a word of their own; give it another name"
    if name.rstrip().endswith("?") and task == "multilabel":
        return "ends in ?, which marks a finding that is unknown; give it another name"
    return ""
