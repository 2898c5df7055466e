"""What the labels of a data set are: two classes, several classes, or findings."""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Task = Literal["binary", "multiclass", "multilabel"]
UNKNOWN: Final = -1  # the label of a finding that nobody looked for, or was unsure of


@dataclass(frozen=True)
class LabelSpec:
    """A task and its names. `binary` has two classes, of which the second is looked for;
    `multiclass` three or more, one for each image; `multilabel` findings, each present, absent or
    unknown.
    """

    task: Task
    classes: tuple[str, ...]  # or findings, in the order of their outputs

    @property
    def num_outputs(self) -> int:
        """Logits of an image: one for two classes, else one for each class or finding."""
        return 1 if self.task == "binary" else len(self.classes)

    def matrix(self, labels: NDArray[np.integer]) -> NDArray[np.int8]:
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
