"""Which image goes into which split. Pure functions over manifest rows; `xrai.dataset.plan` and `xrai.verify` use them.

A source's own split folders are honoured. What is missing is carved from train, patient by patient, by a hash of the
patient's key alone: adding images moves nobody, and each class gives about the same share. Identical images under two
names count as one patient, the one whose key sorts first.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from xrai.config import Splits
from xrai.dataset.manifest import CLASSES, Row
from xrai.dataset.shards import SPLITS
from xrai.errors import SourceError

_HASH_DIGITS = 15  # of 16, so that the share below has no rounding


@dataclass(frozen=True)
class Assignment:
    """Rows with their splits."""

    rows: tuple[Row, ...]  # in the order given
    carved: tuple[str, ...]  # splits carved from train
    notes: tuple[str, ...]  # what people should know, a sentence each


def assign_splits(rows: Sequence[Row], config: Splits) -> Assignment:
    """Give every row that is not set aside its split; `rows` carry those of the source.

    Identical images with different labels are set aside, for nobody knows which label is right.

    Raises `SourceError` when one image is in two splits of the source (unless `splits.duplicates` is "drop"), a class
    has no images, or train or val would be empty.
    """
    notes = []
    rows = _drop_contradictions(rows)
    rows, num_dropped = _drop_duplicates(rows, duplicates=config.duplicates)
    if num_dropped:
        notes.append(f"{num_dropped} images stand in two splits of the source and are set aside but for one")
    _refuse_missing_class(rows, where="the source")
    num_val = sum(row.split == "val" for row in rows if not row.reason)
    if 0 < num_val < config.min_val_images:
        notes.append(
            f"the source's val has {num_val} images, fewer than splits.min_val_images = {config.min_val_images}: "
            "they join train"
        )
        rows = [replace(row, split="train") if row.split == "val" else row for row in rows]
    given = {row.split for row in rows if not row.reason}
    carved = tuple(
        split
        for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction))
        if split not in given and fraction > 0
    )
    owners = _owners(row for row in rows if not row.reason and row.split == "train")
    rows = [replace(row, split=_carve(owners[row.path], carved, config)) if row.path in owners else row for row in rows]
    used = [row for row in rows if not row.reason]
    for split in ("train", "val"):
        if not any(row.split == split for row in used):
            num_patients = len(set(owners.values()))
            raise SourceError(
                f"no image falls into {split}: {num_patients} patients are too few for splits.val_fraction = "
                f"{config.val_fraction} and splits.test_fraction = {config.test_fraction}; add images or change these"
            )
    _refuse_missing_class([row for row in used if row.split == "train"], where="train")
    for split in carved:
        labels = {row.label for row in used if row.split == split}
        missing = [name for label, name in enumerate(CLASSES) if label not in labels]
        if missing:
            notes.append(f"{split} was carved from train and holds no {' and no '.join(missing)} images")
    return Assignment(tuple(rows), carved, tuple(notes))


def carve_share(patient: str) -> float:
    """A patient's fixed place in [0, 1): val is carved from the low end, test from the high end."""
    digest = hashlib.sha256(patient.encode()).hexdigest()
    return float(int(digest[:_HASH_DIGITS], 16) / 16**_HASH_DIGITS)


def _carve(patient: str, carved: Sequence[str], config: Splits) -> str:
    share = carve_share(patient)
    if "val" in carved and share < config.val_fraction:
        return "val"
    return "test" if "test" in carved and share >= 1 - config.test_fraction else "train"


def _owners(rows: Iterable[Row]) -> dict[str, str]:
    """path -> the patient that it counts as; patients who share an identical image are one."""
    rows = list(rows)
    parent: dict[str, str] = {}

    def root(patient: str) -> str:
        while parent.setdefault(patient, patient) != patient:
            parent[patient] = parent[parent[patient]]
            patient = parent[patient]
        return patient

    first: dict[str, str] = {}  # sha256 -> patient
    for row in rows:
        one, other = root(row.patient), root(first.setdefault(row.sha256, row.patient))
        parent[max(one, other)] = min(one, other)
    return {row.path: root(row.patient) for row in rows}


def _drop_contradictions(rows: Sequence[Row]) -> list[Row]:
    labels: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        if not row.reason:
            labels[row.sha256].add(row.label)
    return [
        replace(row, reason="the same image stands under another label, too")
        if not row.reason and len(labels[row.sha256]) > 1
        else row
        for row in rows
    ]


def _drop_duplicates(rows: Sequence[Row], *, duplicates: str) -> tuple[list[Row], int]:
    """Set aside images that the source has in two splits, keeping the one in test, else val; and count them."""
    kept: dict[str, Row] = {}
    for split in reversed(SPLITS):
        for row in rows:
            if row.reason or row.split != split:
                continue
            other = kept.setdefault(row.sha256, row)
            if other.split != split and duplicates == "error":
                raise SourceError(
                    f"the source has the same image in two splits: {other.path} and {row.path}; remove one, or set "
                    "--splits.duplicates=drop to keep the one in test, else val"
                )
    dropped = {row.path for row in rows if not row.reason and kept[row.sha256].split != row.split}
    return [
        replace(row, reason=f"the same image as {kept[row.sha256].path}") if row.path in dropped else row
        for row in rows
    ], len(dropped)


def _refuse_missing_class(rows: Sequence[Row], *, where: str) -> None:
    labels = {row.label for row in rows if not row.reason}
    for label, name in enumerate(CLASSES):
        if label not in labels:
            raise SourceError(
                f"{where} has no usable {name} images; images of both classes are needed to tell them apart"
            )
