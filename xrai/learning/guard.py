"""The guard of training: a step that is not finite changes no weight, and ends the run.

Python does not wait for the numbers of a step, so it is ahead of the device. Whether a step is
finite is decided on the device, where the optimizer then skips it, and said when somebody looks:
every `train.log_every` steps, and before anything is saved. A refused step makes all later losses
NaN, so later steps are skipped, too, and the weights stay as they were before it.
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
        self.factor = torch.ones((), dtype=dtype, device=ranks.device)  # of losses: 1, or NaN
        self._steps: list[_Step] = []  # since the last look

    def judge(self, place: str, rows: NDArray[np.int64], losses: Tensor, norm: Tensor) -> Tensor:
        """Whether the step must be skipped, () on the device; a step that is refused besides is
        kept for `refuse`.
        """
        is_bad = ~torch.isfinite(norm)
        is_refused = is_bad
        if self._is_fp16:  # its range alone may make gradients infinite: the scaler's business
            is_refused = is_bad & self._ranks.is_any(~torch.isfinite(losses).all())
        self.factor = self.factor.masked_fill(is_refused, math.nan)
        self._steps.append(_Step(place, rows, losses, norm, is_refused))
        return is_bad

    def forget(self) -> None:
        """Nobody will ask about the steps so far."""
        self._steps.clear()

    def refuse(self, name_of: Callable[[int], str]) -> NoReturn:
        """Raise `TrainingError` naming the images whose loss is not finite, else all of the batch,
        of the first step that was refused.
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
