"""The guard of training: a step that is not finite changes no weight, and ends the run.

Python runs ahead of the device, without waiting for the numbers of a step. The device itself
decides whether a step is finite, and has the optimizer skip one that is not. Python asks every
`train.log_every` steps, and before anything is saved. A refused step makes all later losses NaN, so
later steps are skipped, too, and the weights stay as they were before it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xrai.errors import TrainingError
from xrai.learning.distributed import Ranks


@dataclass(frozen=True, eq=False)
class _Step:
    """What a message about a step needs."""

    place: str  # such as "step 4 (epoch 1, batch 4)"
    rows: NDArray[np.int64]  # (n,)
    losses: Tensor  # (n,)
    norm: Tensor  # () of the gradient
    is_refused: Tensor  # ()


class Guard:
    """Judges the steps of this rank. All ranks hold the same gradients, so all judge alike."""

    def __init__(self, ranks: Ranks, *, precision: str, dtype: torch.dtype) -> None:
        self._ranks, self._is_fp16 = ranks, precision == "fp16"
        self.factor = torch.ones((), dtype=dtype, device=ranks.device)  # NaN once one was refused
        self._steps: list[_Step] = []  # since the last look

    def judge(self, place: str, rows: NDArray[np.int64], losses: Tensor, norm: Tensor) -> Tensor:
        """Whether the optimizer must skip the step, () bool on the device.

        A skipped step is also refused, which ends the run, unless fp16 alone made its gradients
        infinite. What `refuse` needs of each step is kept until `forget`.
        """
        is_bad = ~torch.isfinite(norm)
        is_refused = is_bad
        if self._is_fp16:  # gradients may overflow its range, which the scaler handles
            is_refused = is_bad & self._ranks.is_any(~torch.isfinite(losses).all())
        self.factor = self.factor.masked_fill(is_refused, math.nan)
        self._steps.append(_Step(place, rows, losses, norm, is_refused))
        return is_bad

    def forget(self) -> None:
        """Drop the steps so far: none of them was refused."""
        self._steps.clear()

    def refuse(self, name_of: Callable[[int], str]) -> NoReturn:
        """Raise `TrainingError` for the first refused step, naming images whose loss is not finite,
        or images of its batch where all losses are.
        """
        step = next(step for step in self._steps if step.is_refused)
        is_bad = ~torch.isfinite(step.losses).cpu().numpy()
        found = self._of_all_ranks(step.rows[is_bad])
        what = f"the loss of {len(found)} images is not finite"
        if not found:
            found = self._of_all_ranks(step.rows)
            what = (
                f"the gradient is not finite (norm {float(step.norm)}) though the losses are; its "
                f"batch had {len(found)} images"
            )
        names = ", ".join(map(name_of, found[:5])) + (", …" if len(found) > 5 else "")
        raise TrainingError(
            f"{step.place}: {what}: {names}; the weights are as before the step. Look at these "
            "images; a lower optim.lr or optim.clip_norm, or train.precision=off, may help"
        )

    def _of_all_ranks(self, rows: NDArray[np.int64]) -> list[int]:
        return [row for own in self._ranks.gather(rows.tolist()) for row in own]
