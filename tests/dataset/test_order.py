"""The order of an epoch: a partition, the same for all who ask, wherever they begin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrai.dataset.order import EpochOrder, most_held, plan_windows, rank_slice, shards_to_hold

shard_rows = st.lists(st.integers(1, 9), min_size=1, max_size=12)
seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 1000)
windows = st.integers(1, 8)


def whole_epoch(
    rows: list[int], seed: int, epoch: int, window: int, *, shuffle: bool = True
) -> list[int]:
    order = EpochOrder(rows, seed=seed, epoch=epoch, window=window, shuffle=shuffle)
    return [int(row) for row in order.rows(0, sum(rows))]


@given(shard_rows, seeds, epochs, windows, st.booleans())
def test_an_epoch_visits_each_row_once(
    rows: list[int], seed: int, epoch: int, window: int, shuffle: bool
) -> None:
    assert sorted(whole_epoch(rows, seed, epoch, window, shuffle=shuffle)) == list(range(sum(rows)))


@given(shard_rows, seeds, epochs, windows, st.booleans(), st.data())
def test_any_cut_of_the_order_is_the_same_as_in_the_whole(
    rows: list[int], seed: int, epoch: int, window: int, shuffle: bool, data: st.DataObject
) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, sum(rows))] * 2)))
    fresh = EpochOrder(rows, seed=seed, epoch=epoch, window=window, shuffle=shuffle)
    assert [int(row) for row in fresh.rows(start, stop)] == whole_epoch(
        rows, seed, epoch, window, shuffle=shuffle
    )[start:stop]


@given(shard_rows, seeds, epochs, windows)
def test_the_rows_of_a_cut_stand_in_the_shards_of_its_windows(
    rows: list[int], seed: int, epoch: int, window: int
) -> None:
    order = EpochOrder(rows, seed=seed, epoch=epoch, window=window, shuffle=True)
    shard_of = np.repeat(np.arange(len(rows)), rows)
    for start in range(sum(rows)):
        used = order.windows_of(start, start + 1)
        assert len(used) == 1
        assert shard_of[order.rows(start, start + 1)[0]] in order.windows[used.start]


@given(st.integers(1, 200), seeds, epochs, st.integers(1, 64))
def test_windows_begin_with_one_shard_and_double_to_their_limit(
    num_shards: int, seed: int, epoch: int, window: int
) -> None:
    planned = plan_windows(num_shards, seed=seed, epoch=epoch, window=window, shuffle=True)
    assert sorted(shard for shards in planned for shard in shards) == list(range(num_shards))
    sizes = [len(shards) for shards in planned]
    assert sizes[0] == 1
    assert max(sizes) <= window
    assert all(size == min(sum(sizes[:k]), window) for k, size in enumerate(sizes[:-1]) if k)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_ranks_share_a_batch_without_gap_or_overlap_and_evenly(num: int, world_size: int) -> None:
    parts = [
        range(num)[rank_slice(num, rank=rank, world_size=world_size)] for rank in range(world_size)
    ]
    assert [place for part in parts for place in part] == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(shard_rows)
def test_without_shuffling_the_order_is_that_of_the_shards(rows: list[int]) -> None:
    assert whole_epoch(rows, 7, 3, 4, shuffle=False) == list(range(sum(rows)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(whole_epoch([50] * 4, seed, epoch, 64)) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_the_order_is_the_one_that_earlier_runs_had() -> None:
    """A run that goes on with another version of numpy, or of ours, must find its place. Change
    this never.
    """
    assert whole_epoch([3] * 5, 1, 2, 1) == [4, 3, 5, 10, 9, 11, 1, 2, 0, 14, 12, 13, 8, 6, 7]
    assert whole_epoch([3] * 5, 1, 2, 64) == [4, 3, 5, 10, 9, 11, 1, 2, 13, 14, 0, 12, 8, 6, 7]


@given(shard_rows, seeds, epochs, windows)
def test_the_first_rows_need_one_shard(rows: list[int], seed: int, epoch: int, window: int) -> None:
    order = EpochOrder(rows, seed=seed, epoch=epoch, window=window, shuffle=True)
    (first,) = order.windows[0]
    assert order.windows_of(0, rows[first]) == range(1)
    start = sum(rows[:first])
    assert sorted(order.rows(0, rows[first]).tolist()) == list(range(start, start + rows[first]))


def test_every_row_is_as_likely_in_every_place() -> None:
    num_epochs = 3000
    counts = np.zeros((24, 24))
    for epoch in range(num_epochs):
        counts[whole_epoch([6] * 4, 0, epoch, 4), np.arange(24)] += 1
    expected = num_epochs / 24
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 23 * 23) < 5 * np.sqrt(2 * 23 * 23)  # five standard deviations
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


# ------------------------------------------------------------------------------ what a reader holds


class Reader:
    """What a reader uses and holds at each of its batches."""

    def __init__(
        self, rows: list[int], batch_size: int, *, window: int, num_ahead: int, seed: int = 0
    ) -> None:
        self.order = EpochOrder(rows, seed=seed, epoch=0, window=window, shuffle=True)
        self.used: list[list[int]] = []
        self.held: list[list[int]] = []
        for start in range(0, sum(rows), batch_size):
            used = self.order.windows_of(start, min(start + batch_size, sum(rows)))
            self.used.append([shard for number in used for shard in self.order.windows[number]])
            self.held.append(shards_to_hold(self.order.windows, used, num_ahead=num_ahead))


@given(shard_rows, seeds, windows, st.integers(1, 8), st.integers(1, 40))
def test_a_reader_holds_what_it_uses_and_then_what_comes_next(
    rows: list[int], seed: int, window: int, num_ahead: int, batch_size: int
) -> None:
    reader = Reader(rows, batch_size, window=window, num_ahead=num_ahead, seed=seed)
    in_order = [shard for shards in reader.order.windows for shard in shards]
    place = {
        shard: number for number, shards in enumerate(reader.order.windows) for shard in shards
    }
    for used, held in zip(reader.used, reader.held, strict=True):
        start = in_order.index(held[0])
        assert held == in_order[start : start + len(held)]  # in order, without a gap
        assert held[: len(used)] == used
        num_first = len(reader.order.windows[place[held[0]]])
        assert len(held) - num_first >= min(num_ahead, len(in_order) - start - num_first)
        if place[held[0]] + 1 < len(reader.order.windows):
            assert set(reader.order.windows[place[held[0]] + 1]) <= set(held)


@given(shard_rows, seeds, windows, st.integers(1, 8), st.integers(1, 40))
def test_no_reader_holds_more_than_is_promised(
    rows: list[int], seed: int, window: int, num_ahead: int, batch_size: int
) -> None:
    reader = Reader(rows, batch_size, window=window, num_ahead=num_ahead, seed=seed)
    most = most_held(rows, window=window, num_ahead=num_ahead, batch_size=batch_size)
    assert max(map(len, reader.held)) <= most


@given(shard_rows, seeds, windows, st.integers(1, 8), st.integers(1, 20), st.integers(1, 4))
def test_readers_that_are_some_batches_apart_hold_no_more_together(
    rows: list[int], seed: int, window: int, num_ahead: int, batch_size: int, apart: int
) -> None:
    held = Reader(rows, batch_size, window=window, num_ahead=num_ahead, seed=seed).held
    most = most_held(
        rows, window=window, num_ahead=num_ahead, batch_size=batch_size, batches_apart=apart
    )
    for step in range(len(held)):
        assert len(set().union(*held[step : step + apart + 1])) <= most


@pytest.mark.parametrize(
    ("window", "num_ahead", "batch_size", "num_held"),
    [(4, 2, 16, 8), (1, 4, 16, 5), (64, 4, 16, 128), (4, 2, 256, 11)],
)
def test_what_is_held_is_two_windows_however_large_the_data_set(
    window: int, num_ahead: int, batch_size: int, num_held: int
) -> None:
    rows = [64] * 500
    assert most_held(rows, window=window, num_ahead=num_ahead, batch_size=batch_size) == num_held
    reader = Reader(rows, batch_size, window=window, num_ahead=num_ahead)
    assert num_held - 3 <= max(map(len, reader.held)) <= num_held
