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

from xrai.labels import Label, LabelSpec

Counts = NDArray[np.integer]  # (P, L + 1), images of patients by side, then all of them


def count_sides(
    owners: Sequence[int], labels: Sequence[Label], spec: LabelSpec, *, num_owners: int
) -> Counts:
    """Images of each patient by class, or by finding present and by finding absent; the last column
    counts all of them. `owners` says whose each image is, a number below `num_owners`.
    """
    kinds: dict[Label, int] = {}  # most images have the labels of others
    kind_of = np.array([kinds.setdefault(label, len(kinds)) for label in labels], np.int64)  # (N,)
    matrix = spec.matrix(spec.array(list(kinds)))  # (K, C)
    sides = [matrix == 1, matrix == 0] if spec.task == "multilabel" else [matrix == 1]
    shown = np.hstack([*sides, np.ones((len(kinds), 1), bool)])  # (K, L + 1)
    owner_of = np.array(owners, np.int64)
    most = int(np.bincount(owner_of, minlength=1).max())
    counts = np.empty((num_owners, shown.shape[1]), np.min_scalar_type(most))  # a byte, mostly
    for side, is_shown in enumerate(shown.T):
        counts[:, side] = np.bincount(owner_of[is_shown[kind_of]], minlength=num_owners)
    return counts


def stratify(counts: Counts, shares: Sequence[float]) -> NDArray[np.int64]:
    """Which split each patient goes to, (P,), where split s is to have `shares[s]` of every side.

    The first split is the one that the others are carved from: it is never left without a side that
    the others have. Each of the others gets a patient of a side as soon as there are enough. Equal
    choices are decided by the order of the patients.
    """
    num_sides = counts.shape[1] - 1
    wanted = np.outer(shares, counts.sum(axis=0, dtype=np.int64))  # (S, L + 1), images
    given = np.zeros(wanted.shape, np.int64)
    split_of = np.full(len(counts), -1)
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
    split_of: NDArray[np.int64],
) -> None:
    """Give each of the patients to the split that lacks most of the side; note it in `given` and
    `split_of`.
    """
    by_side, in_all = counts[patients, side].tolist(), counts[patients, -1].tolist()
    queue = sorted(range(len(patients)), key=lambda k: (-by_side[k], -in_all[k]))
    lacking = (wanted - given)[:, side].tolist()
    lacking_in_all = (wanted - given)[:, -1].tolist()
    dealt: list[tuple[int, int]] = []
    empty = [split for split in range(1, len(wanted)) if not given[split, side]]
    for split in empty[: max(len(queue) - (not given[0, side]), 0)]:
        dealt.append((queue.pop(), split))  # the one with the fewest images
    for k, split in dealt:
        lacking[split] -= by_side[k]
        lacking_in_all[split] -= in_all[k]
    for k in queue:
        split = max(range(len(lacking)), key=lambda s: (lacking[s], lacking_in_all[s], -s))
        lacking[split] -= by_side[k]
        lacking_in_all[split] -= in_all[k]
        dealt.append((k, split))
    if dealt:
        places, splits = np.array(dealt).T
        split_of[patients[places]] = splits
        np.add.at(given, splits, counts[patients[places]].astype(np.int64))
