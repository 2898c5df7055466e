"""The rules that every data set keeps: `xrai.ingest` makes data sets by them, `xrai.dataset.verify`
checks them.

If a source lacks val or test, it is carved from train, patient by patient. With NORMAL and
PNEUMONIA, a hash of the patient's key alone decides: adding images moves nobody, and each class
gives about the same share. Any other classes, and findings, some of them rare, are balanced instead
(`xrai.dataset.stratify`), from the rows alone. Patients who share an identical image count as one,
the one whose key sorts first.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xrai.config import Splits
from xrai.dataset.manifest import Row
from xrai.dataset.stratify import count_sides, stratify
from xrai.labels import Label, LabelSpec

_HASH_DIGITS = 13  # 52 bits: a float holds the share exactly


def in_shard_order(rows: Iterable[Row]) -> list[Row]:
    """A split's rows by hash of the file, so that each shard is a random sample of its split."""
    return sorted(rows, key=lambda row: (row.sha256, row.path))


def carve(
    rows: Sequence[Row], carved: Collection[str], config: Splits, labels: LabelSpec
) -> list[Row]:
    """Move patients of train to the carved splits; to repeat it changes nothing.

    `rows` are all of a data set's: what was excluded when it was decoded is divided like the rest.
    """
    if not carved:
        return [*rows]
    pool = _carved_rows(rows, ("train", *carved))
    owners = _owners(pool)
    if labels.is_public:
        splits = {owner: _split_of(owner, carved, config) for owner in owners.values()}
    else:
        splits = _stratified(pool, owners, carved, config, labels)
    return [
        replace(row, split=split)
        if not row.reason
        and row.split in ("train", *carved)
        and (split := splits.get(owners.get(row.patient, ""), row.split)) != row.split
        else row
        for row in rows
    ]


def _carved_rows(rows: Sequence[Row], pool: Collection[str]) -> list[Row]:
    """The rows of `pool` that were usable before they were decoded: their files were read, under
    labels that do not contradict each other, and are in no other split.
    """
    unfit = find_contradicted(row for row in rows if row.sha256)
    unfit |= {row.sha256 for row in rows if row.split not in pool}
    return [row for row in rows if row.split in pool and row.sha256 and row.sha256 not in unfit]


def _stratified(
    rows: Sequence[Row],
    owners: Mapping[str, str],
    carved: Collection[str],
    config: Splits,
    labels: LabelSpec,
) -> dict[str, str]:
    """owner -> split, of rows that train and the carved splits are made of."""
    order = sorted(set(owners.values()), key=lambda owner: (carve_share(owner), owner))
    places = {owner: place for place, owner in enumerate(order)}
    counts = count_sides(
        [places[owners[row.patient]] for row in rows],
        [row.label for row in rows],
        labels,
        num_owners=len(order),
    )
    fractions = {"val": config.val_fraction, "test": config.test_fraction}
    shares = {split: fraction for split, fraction in fractions.items() if split in carved}
    names = ("train", *shares)
    found = stratify(counts, (1 - sum(shares.values()), *shares.values()))
    return dict(zip(order, (names[split] for split in found.tolist()), strict=True))


def carve_share(patient: str) -> float:
    """A patient's fixed place in [0, 1): val is carved from the low end, test from the high end."""
    digest = hashlib.sha256(patient.encode()).hexdigest()
    return int(digest[:_HASH_DIGITS], 16) / 16.0**_HASH_DIGITS


def find_contradicted(rows: Iterable[Row]) -> set[str]:
    """Hashes of images that appear under different labels. A finding that is unknown in one place
    contradicts nothing.
    """
    first: dict[str, Label] = {}
    several: dict[str, set[Label]] = {}
    for row in rows:
        if (label := first.setdefault(row.sha256, row.label)) != row.label:
            several.setdefault(row.sha256, {label}).add(row.label)
    return {sha256 for sha256, labels in several.items() if _contradict(labels)}


def _contradict(labels: Collection[Label]) -> bool:
    findings = [label for label in labels if isinstance(label, tuple)]
    return not findings or any({0, 1} <= set(values) for values in zip(*findings, strict=True))


def patients_in_several(rows: Iterable[Row], splits: Collection[str]) -> list[str]:
    """Patients with images in more than one of `splits`, sorted."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.split in splits:
            found[row.patient].add(row.split)
    return sorted(patient for patient, places in found.items() if len(places) > 1)


def find_split_faults(
    rows: Sequence[Row], carved: Collection[str], config: Splits, labels: LabelSpec
) -> list[str]:
    """What breaks the rules of splitting among a data set's rows, a sentence each."""
    used = [row for row in rows if not row.reason]
    faults = [
        f"patient {patient} is in two splits although one was carved from the other"
        for patient in patients_in_several(used, {"train", *carved})
    ]
    first: dict[str, Row] = {}
    for row in used:
        other = first.setdefault(row.sha256, row)
        if other.split != row.split:
            faults.append(
                f"{other.path} in {other.split} and {row.path} in {row.split} are the same image"
            )
    says = "its patient's hash says" if labels.is_public else "balanced splits have it in"
    for row, again in zip(rows, carve(rows, carved, config, labels), strict=True):
        if row.split != again.split:
            faults.append(f"{row.path} is in {row.split}, {says} {again.split}")
    return faults


def grey_histogram(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels of each grey level, (256,), of images (N, H, W); N may be 0."""
    if not len(images):
        return np.zeros(256, np.int64)
    # Pillow counts in place; numpy would first copy each pixel to 64 bits
    flat = Image.fromarray(np.asarray(images).reshape(-1, images.shape[-1]))
    return np.array(flat.histogram(), np.int64)


def mean_and_std(histogram: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and standard deviation of the pixels, grey levels.

    Computed from whole numbers: the same however the pixels were split among shards and machines.
    """
    counts = histogram.tolist()
    num_pixels = sum(counts)
    total = sum(level * count for level, count in enumerate(counts))
    squares = sum(level**2 * count for level, count in enumerate(counts))
    return total / num_pixels, (squares * num_pixels - total**2) ** 0.5 / num_pixels


def _split_of(patient: str, carved: Collection[str], config: Splits) -> str:
    share = carve_share(patient)
    if "val" in carved and share < config.val_fraction:
        return "val"
    return "test" if "test" in carved and share >= 1 - config.test_fraction else "train"


def _owners(rows: Sequence[Row]) -> dict[str, str]:
    """patient -> the one that counts for it: patients who share an identical image are one."""
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
    return {row.patient: root(row.patient) for row in rows}
