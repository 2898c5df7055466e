"""The order in which an epoch visits the rows of a split. Pure functions; the loader calls them.

The order is a function of (seed, epoch, rows of each shard, window, shuffle) alone, not of ranks,
threads or the step where a run was restarted. It uses numpy's raw bit streams, which NEP 19
promises never to change, and a stable sort.

Shuffled, the shards are permuted and cut into windows of 1, 1, 2, 4, ... up to `window` shards, and
the rows are permuted inside each window. So the first batch needs one shard, and a reader holds one
window and the shards it has asked for ahead. Rows stand in hash order inside a split, which makes
each shard a random sample of it; what the windows cost in mixing is measured in
docs/decisions/0004-order-and-windows.md. Not shuffled, the order is that of the shards.
"""

from collections.abc import Sequence
from itertools import accumulate, islice

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]  # (n,) positions in the split


def rank_slice(num: int, *, rank: int, world_size: int) -> slice:
    """The part of a global batch of `num` images that a rank takes; parts differ by one at most."""
    return slice(num * rank // world_size, num * (rank + 1) // world_size)


def plan_windows(
    num_shards: int, *, seed: int, epoch: int, window: int, shuffle: bool
) -> list[tuple[int, ...]]:
    """The shards of each window, in the order of use. Each shard is in one window."""
    if not shuffle:
        return [(shard,) for shard in range(num_shards)]
    shards = [int(shard) for shard in _permutation(num_shards, seed, epoch, 0)]
    windows = []
    start, size = 0, 1
    while start < num_shards:
        windows.append(tuple(shards[start : start + size]))
        start += size
        size = min(start, window)
    return windows


def shards_to_hold(windows: Sequence[Sequence[int]], used: range, *, num_ahead: int) -> list[int]:
    """The shards that a reader keeps open while it uses some windows, in the order of use.

    These are the shards of the windows in use, of the window after the first of them, and of later
    ones until `num_ahead` shards follow the first window.
    """
    first = windows[used.start]
    last_whole = min(max(used.stop, used.start + 2), len(windows))
    needed = [shard for window in windows[used.start : last_whole] for shard in window]
    later = (shard for window in windows[last_whole:] for shard in window)
    return [*needed, *islice(later, max(len(first) + num_ahead - len(needed), 0))]


def most_held(
    shard_rows: Sequence[int],
    *,
    window: int,
    num_ahead: int,
    batch_size: int,
    batches_apart: int = 0,
) -> int:
    """The most shards that `shards_to_hold` can give, for any seed and epoch.

    With `batches_apart`, the most that readers hold together who share a cache and are at most so
    many batches apart.
    """
    window = min(window, len(shard_rows))
    inside = _num_inside(shard_rows, batch_size)
    apart = window + _num_inside(shard_rows, batch_size * batches_apart + 1) if batches_apart else 0
    return min(len(shard_rows), apart + window + max(inside + window, num_ahead))


def _num_inside(shard_rows: Sequence[int], num_rows: int) -> int:
    """How many whole shards at most lie between the first and the last of `num_rows` rows."""
    return sum(1 for rows in accumulate(sorted(shard_rows)) if rows <= num_rows - 2)


class EpochOrder:
    """One epoch's order of all rows of a split, made a window at a time."""

    def __init__(
        self, shard_rows: Sequence[int], *, seed: int, epoch: int, window: int, shuffle: bool
    ) -> None:
        self._seed, self._epoch, self._shuffle = seed, epoch, shuffle
        self._shard_starts = tuple(accumulate(shard_rows, initial=0))
        self.windows = plan_windows(
            len(shard_rows), seed=seed, epoch=epoch, window=window, shuffle=shuffle
        )
        rows = [sum(shard_rows[shard] for shard in shards) for shards in self.windows]
        self._window_starts = np.array([0, *accumulate(rows)])
        self._latest: dict[int, Rows] = {}

    def windows_of(self, start: int, stop: int) -> range:
        """The windows that hold the places `start` to `stop` (not included) of the order."""
        first = int(np.searchsorted(self._window_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._window_starts, stop, side="left")) - 1
        return range(first, last + 1)

    def rows(self, start: int, stop: int) -> Rows:
        """The rows at the places `start` to `stop` (not included) of the order."""
        latest, self._latest = self._latest, {}
        parts = [np.empty(0, np.int64)]
        for window in self.windows_of(start, stop):
            rows = latest[window] if window in latest else self._window_rows(window)
            self._latest[window] = rows
            first = int(self._window_starts[window])
            parts.append(rows[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def _window_rows(self, window: int) -> Rows:
        starts, shards = self._shard_starts, self.windows[window]
        rows = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        if not self._shuffle:
            return rows
        return rows[_permutation(len(rows), self._seed, self._epoch, 1 + window)]


def _permutation(num: int, seed: int, epoch: int, stream: int) -> Rows:
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(num)
    return np.argsort(bits, kind="stable")
