"""What a loader yields, and how its images get to the device."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Batch(Protocol):
    """This rank's part of a global batch; in the last batch of an epoch it may be empty."""

    @property
    def images(self) -> NDArray[np.uint8]: ...  # (n, 1, H, W)
    @property
    def labels(self) -> NDArray[np.integer]: ...  # (n,) or (n, C), see `LabelSpec`
    @property
    def rows(self) -> NDArray[np.int64]: ...  # (n,), positions in the split
    @property
    def num_global(self) -> int: ...  # images of the global batch, all ranks together


class Loader(Protocol):
    """The batches of one split, for one rank."""

    @property
    def num_images(self) -> int: ...  # of the split, all ranks together
    @property
    def num_batches(self) -> int: ...  # global ones, of an epoch

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from batch `start` on."""

    def timings(self) -> dict[str, float]:
        """Seconds of the current epoch, by stage."""


def to_grey(images: NDArray[np.uint8], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, 1, H, W) uint8 to grey values in [0, 1] on the device."""
    tensor = torch.from_numpy(images)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(dtype) / 255
