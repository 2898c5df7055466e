"""What a loader yields, and how its images get to the device.

No function here waits for the device. On CUDA, a batch is copied from pinned memory on a stream of
its own while the step on the batch before it runs.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Limit on copies under way. Python may run many batches ahead of the device, and further copies
# would only take memory. 28 batches of 128 images of 384 x 384 pixels fit
_MAX_BYTES_UNDER_WAY = 2**29


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
    def num_batches(self) -> int: ...  # global batches in an epoch

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from batch `start` on."""

    def timings(self) -> dict[str, float]:
        """Seconds of the current epoch, by stage."""


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A batch whose tensors are on the device."""

    images: Tensor  # (n, 1, H, W) uint8
    labels: Tensor  # (n,) or (n, C)
    rows: Tensor  # (n,) int64
    own_rows: NDArray[np.int64]  # the same, in host memory
    num_global: int


def to_device(
    batches: Iterator[Batch],
    device: torch.device,
    *,
    is_ahead: bool | None = None,
    timed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[DeviceBatch]:
    """Copy batches to the device, each copy inside a context that `timed` gives.

    With `is_ahead`, the default on CUDA, the next batch is fetched and its copy begins before the
    current one is yielded.
    """
    if device.type == "cuda" if is_ahead is None else is_ahead:
        yield from _copied_ahead(batches, device, timed)
        return
    for batch in batches:
        with timed():
            images, labels, rows = (each.to(device) for each in _tensors(batch))
        yield DeviceBatch(images, labels, rows, batch.rows, batch.num_global)


def _copied_ahead(
    batches: Iterator[Batch],
    device: torch.device,
    timed: Callable[[], AbstractContextManager[None]],
) -> Iterator[DeviceBatch]:
    streams: Any = torch.get_device_module(device)  # streams and events of a CPU do nothing
    copying, computing = streams.Stream(), streams.current_stream()
    under_way: deque[tuple[int, Any]] = deque()
    ahead: tuple[DeviceBatch, Any] | None = None
    try:
        for batch in batches:
            with timed():
                begun, copied = _begin_copy(batch, device, copying, computing)
            under_way.append((begun.images.nbytes, copied))
            while len(under_way) > 2 and sum(size for size, _ in under_way) > _MAX_BYTES_UNDER_WAY:
                under_way.popleft()[1].synchronize()
            if ahead is not None:
                computing.wait_event(ahead[1])
                yield ahead[0]
            ahead = begun, copied
        if ahead is not None:
            computing.wait_event(ahead[1])
            yield ahead[0]
    finally:  # memory of a batch that nobody took is reused only after its copy
        computing.wait_stream(copying)


def _begin_copy(
    batch: Batch, device: torch.device, copying: Any, computing: Any
) -> tuple[DeviceBatch, Any]:
    """A batch on the device, and the event after which it is filled."""
    streams: Any = torch.get_device_module(device)
    sources = _tensors(batch)
    # The memory belongs to the computing stream, which reuses it in its own order. So the copy
    # waits for the steps queued so far, and runs at the same time as the step that is queued next
    found = [torch.empty_like(source, device=device) for source in sources]
    copying.wait_stream(computing)
    with streams.stream(copying):
        for target, source in zip(found, sources, strict=True):
            pinned = source.pin_memory() if device.type == "cuda" else source
            target.copy_(pinned, non_blocking=True)
        copied = streams.Event()
        copied.record(copying)
    images, labels, rows = found
    return DeviceBatch(images, labels, rows, batch.rows, batch.num_global), copied


def _tensors(batch: Batch) -> list[Tensor]:
    """Images, labels and rows, which share their memory with the batch."""
    return [torch.from_numpy(each) for each in (batch.images, batch.labels, batch.rows)]


def to_grey(images: NDArray[np.uint8], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, 1, H, W) uint8 to grey values in [0, 1] on the device."""
    tensor = torch.from_numpy(images)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return as_grey(tensor, dtype)


def as_grey(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1, H, W) uint8 to grey values in [0, 1], on the same device."""
    return images.to(dtype) / 255
