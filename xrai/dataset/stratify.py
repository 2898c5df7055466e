"""Divide patients among splits so that every class or finding has about its share in each.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of
multi-label data"), for groups: a patient goes as a whole, and counts by images. The rarest class or
finding is dealt with first, while there is most choice. A finding has two sides, present and absent
(unknown is neither), each with its own share. `xrai.dataset.rules` calls it; what it reaches is
measured in docs/decisions/0022-stratified-splits.md.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.rows import Numbers
from xrai.labels import Labels, LabelSpec

_AT_A_TIME = 1 << 14  # patients dealt

Counts = NDArray[np.integer]  # (P, L + 1), images of patients by side, then all of them


def count_sides(owners: Numbers, labels: Labels, spec: LabelSpec, *, num_owners: int) -> Counts:
    """Images of each patient by class, or by finding present and by finding absent; the last column
    counts all of them. `owners` (N,) says whose each image is, a number below `num_owners`.
    """
    is_multilabel = spec.task == "multilabel"
    sides = [(k, 1) for k in range(len(spec.classes))]
    if is_multilabel:
        sides += [(k, 0) for k in range(len(spec.classes))]
    elif spec.task == "binary":
        sides = [(1, 1)]
    totals = np.bincount(owners, minlength=num_owners)
    most = int(totals.max(initial=0))
    counts = np.empty((num_owners, len(sides) + 1), np.min_scalar_type(most))  # a byte, mostly
    counts[:, -1] = totals
    for side, (k, value) in enumerate(sides):
        is_shown = labels[:, k] == value if is_multilabel else labels == k
        counts[:, side] = np.bincount(owners[is_shown], minlength=num_owners)
    return counts


def stratify(counts: Counts, shares: Sequence[float]) -> NDArray[np.int8]:
    """Which split each patient goes to, (P,), where split s is to have `shares[s]` of every side.

    The first split is the one that the others are carved from: it is never left without a side that
    the others have. Each of the others gets a patient of a side as soon as there are enough. Equal
    choices are decided by the order of the patients.
    """
    num_sides = counts.shape[1] - 1
    wanted = np.outer(shares, counts.sum(axis=0, dtype=np.int64))  # (S, L + 1), images
    given = np.zeros(wanted.shape, np.int64)
    split_of = np.full(len(counts), -1, np.int8)
    remaining = counts[:, :num_sides].sum(axis=0, dtype=np.int64)
    while remaining.any():
        side = int(np.where(remaining > 0, remaining, remaining.max() + 1).argmin())
        patients = np.flatnonzero((counts[:, side] > 0) & (split_of < 0))
        _deal(patients, side, counts, wanted, given, split_of)
        remaining -= counts[patients, :num_sides].sum(axis=0, dtype=np.int64)
    _deal(np.flatnonzero(split_of < 0), num_sides, counts, wanted, given, split_of)
    return split_of


def _deal(
    patients: NDArray[np.int64],
    side: int,
    counts: Counts,
    wanted: NDArray[np.float64],
    given: NDArray[np.int64],
    split_of: NDArray[np.int8],
) -> None:
    """Give each of the patients to the split that lacks most of the side; note it in `given` and
    `split_of`.
    """
    by_side, in_all = (counts[patients, column] for column in (side, -1))
    queue = np.lexsort((-in_all.astype(np.int64), -by_side.astype(np.int64)))
    lacking = (wanted - given)[:, side].tolist()
    lacking_in_all = (wanted - given)[:, -1].tolist()
    splits = np.empty(len(queue), np.int8)
    empty = [split for split in range(1, len(wanted)) if not given[split, side]]
    num_first = max(min(len(empty), len(queue) - (not given[0, side])), 0)
    splits[len(queue) - num_first :] = empty[:num_first][::-1]  # those with the fewest images
    for k in range(len(queue) - 1, len(queue) - 1 - num_first, -1):
        lacking[splits[k]] -= int(by_side[queue[k]])
        lacking_in_all[splits[k]] -= int(in_all[queue[k]])
    for start in range(0, len(queue) - num_first, _AT_A_TIME):
        places = queue[start : min(start + _AT_A_TIME, len(queue) - num_first)]
        pairs = zip(by_side[places].tolist(), in_all[places].tolist(), strict=True)
        for k, (num, num_in_all) in enumerate(pairs, start):
            split = max(range(len(lacking)), key=lambda s: (lacking[s], lacking_in_all[s], -s))
            lacking[split] -= num
            lacking_in_all[split] -= num_in_all
            splits[k] = split
    split_of[patients[queue]] = splits
    for split in range(len(wanted)):
        given[split] += counts[patients[queue[splits == split]]].sum(axis=0, dtype=np.int64)
