"""Batches get to the device unchanged, and one ahead where that is asked for."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.learning.fakes import FakeBatch, FakeLoader, make_discs
from xrai.learning.batch import DeviceBatch, to_device

CPU = torch.device("cpu")


def loader(num_images: int = 50) -> FakeLoader:
    return FakeLoader(*make_discs(num_images), batch_size=16, shuffle=True)


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("num_images", [1, 16, 50])
def test_batches_arrive_in_order_and_as_they_were(is_ahead: bool, num_images: int) -> None:
    given = list(loader(num_images).epoch(3))
    found = list(to_device(loader(num_images).epoch(3), CPU, is_ahead=is_ahead))
    assert len(found) == len(given)
    for ours, theirs in zip(found, given, strict=True):
        assert np.array_equal(ours.images.numpy(), theirs.images)
        assert np.array_equal(ours.labels.numpy(), theirs.labels)
        assert np.array_equal(ours.rows.numpy(), theirs.rows)
        assert np.array_equal(ours.own_rows, theirs.rows) and ours.num_global == theirs.num_global


@pytest.mark.parametrize(("is_ahead", "num_asked"), [(False, 1), (True, 2)])
def test_the_next_batch_is_asked_for_before_one_is_given_out(
    is_ahead: bool, num_asked: int
) -> None:
    asked: list[FakeBatch] = []

    def batches() -> Iterator[FakeBatch]:
        for batch in loader().epoch(0):
            asked.append(batch)
            yield batch

    on_device = to_device(batches(), CPU, is_ahead=is_ahead)
    assert isinstance(next(on_device), DeviceBatch) and len(asked) == num_asked
    next(on_device)
    assert len(asked) == num_asked + 1


def test_a_batch_copied_ahead_keeps_nothing_of_the_loaders_memory() -> None:
    batch = next(loader().epoch(0))
    (copied,) = to_device(iter([batch]), CPU, is_ahead=True)
    batch.images[:] = 0
    assert copied.images.any()


@pytest.mark.parametrize("is_ahead", [False, True])
def test_whoever_stops_early_ends_the_loader(is_ahead: bool) -> None:
    ended = []

    def batches() -> Iterator[FakeBatch]:
        try:
            yield from loader().epoch(0)
        finally:
            ended.append(True)

    on_device = to_device(batches(), CPU, is_ahead=is_ahead)
    next(on_device)
    del on_device
    assert ended == [True]
