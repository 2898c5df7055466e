"""What the labels of a data set are: two classes, several classes, or findings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Task = Literal["binary", "multiclass", "multilabel"]
# A position in `LabelSpec.classes`; of findings, 1 present, 0 absent or `UNKNOWN` for each of them
Label = int | tuple[int, ...]
Labels = NDArray[np.integer]  # (N,) uint8 positions, or (N, C) int8 findings
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

    def fault(self) -> str:
        """What is wrong with the names, in words that follow them; empty if nothing is."""
        num = len(self.classes)
        names = Counter(name.casefold() for name in self.classes)
        name, times = names.most_common(1)[0] if names else ("", 0)
        if times > 1:
            same = [each for each in self.classes if each.casefold() == name]
            return f"name one class twice: {' and '.join(map(repr, same))}"
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
