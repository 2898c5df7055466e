"""The rules that every data set keeps: `xrai.ingest` makes data sets by them, `xrai.dataset.verify`
checks them.

If a source lacks val or test, it is carved from train, patient by patient. With NORMAL and
PNEUMONIA, a hash of the patient's key alone decides: adding images moves nobody, and each class
gives about the same share. Any other classes, and findings, some of them rare, are balanced instead
(`xrai.dataset.stratify`), from the rows alone. Patients who share an identical image count as one,
the one whose key sorts first.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xrai.config import Splits
from xrai.dataset.manifest import Row
from xrai.dataset.rows import Numbers, Rows
from xrai.dataset.stratify import count_sides, stratify
from xrai.labels import LabelSpec

_HASH_DIGITS = 13  # 52 bits: a float holds the share exactly


def in_shard_order(rows: Rows, split: str) -> NDArray[np.int64]:
    """The places of a split's usable rows in the order of its shards: by hash of the file, so that
    each shard is a random sample of its split. Equal ones stay in the order given, by path.
    """
    places = np.flatnonzero(rows.splits.are(split) & rows.is_used)
    order: NDArray[np.int64] = places[np.argsort(rows.images[places], kind="stable")]
    return order


def carve(rows: Sequence[Row], carved: Collection[str], config: Splits, labels: LabelSpec) -> Rows:
    """Move patients of train to the carved splits; to repeat it changes nothing.

    `rows` are all of a data set's: what was excluded when it was decoded is divided like the rest.
    """
    rows = Rows.of(rows, labels)
    if not carved:
        return rows
    pool = _carved_rows(rows, ("train", *carved))
    owner_of = _owners(rows, pool)
    owners = np.unique(owner_of[rows.patient_numbers(pool)])
    if labels.is_public:
        found = {"val": np.zeros(len(owners), np.bool_), "test": np.zeros(len(owners), np.bool_)}
        for k, share in enumerate(map(carve_share, rows.patient_keys(owners))):
            if (split := _split_of(share, carved, config)) != "train":
                found[split][k] = True
    else:
        found = _stratified(rows, pool, owner_of, owners, carved, config, labels)
    return _moved(rows, ("train", *carved), owner_of, owners, found)


def _moved(
    rows: Rows,
    pool: Collection[str],
    owner_of: NDArray[np.int32],
    owners: Numbers,
    found: dict[str, NDArray[np.bool_]],
) -> Rows:
    """The rows with each usable one of `pool` in the split of its patient's owner: `found` has a
    mask of `owners` for each carved split, and train is the rest.
    """
    names = ("train", *found)
    split_of_owner = np.full(rows.num_patients, 255, np.uint8)
    split_of_owner[owners] = 0
    for k, name in enumerate(names):
        if k:
            split_of_owner[owners[found[name]]] = k
    places = np.flatnonzero(rows.splits.are(*pool) & rows.is_used)
    to = split_of_owner[owner_of[rows.patient_numbers(places)]]
    splits = rows.splits
    for k, name in enumerate(names):
        splits = splits.put(places[to == k], name)
    return rows.with_(splits=splits)


def _carved_rows(rows: Rows, pool: Collection[str]) -> NDArray[np.int64]:
    """The places of those rows of `pool` that were usable before they were decoded: their files
    were read, under labels that do not contradict each other, and are in no other split.
    """
    is_unfit = find_contradicted(rows, rows.is_hashed)
    is_pool = rows.splits.are(*pool)
    foreign = rows.images[~is_pool & rows.is_hashed]
    is_foreign = np.zeros(len(rows), np.bool_)  # by number of the image
    is_foreign[foreign] = True
    is_unfit |= is_foreign[rows.images]
    return np.flatnonzero(is_pool & rows.is_hashed & ~is_unfit)


def _stratified(
    rows: Rows,
    pool: Numbers,
    owner_of: NDArray[np.int32],
    owners: Numbers,
    carved: Collection[str],
    config: Splits,
    labels: LabelSpec,
) -> dict[str, NDArray[np.bool_]]:
    """Which of the owners go to each carved split."""
    shares = np.fromiter(map(carve_share, rows.patient_keys(owners)), np.float64, len(owners))
    order = np.argsort(shares, kind="stable")
    alike = shares[order][1:] == shares[order][:-1]
    if alike.any():  # of 2^52 shares two are the same, as those of one key
        by_key = sorted(order.tolist(), key=lambda k: (shares[k], rows.patient_key(int(owners[k]))))
        order = np.array(by_key, np.int64)
    rank = np.empty(rows.num_patients, np.int32)
    rank[owners[order]] = np.arange(len(owners), dtype=np.int32)
    owner_ranks = rank[owner_of[rows.patient_numbers(pool)]]
    counts = count_sides(owner_ranks, rows.labels[pool], labels, num_owners=len(owners))
    fractions = {"val": config.val_fraction, "test": config.test_fraction}
    wanted = {split: fraction for split, fraction in fractions.items() if split in carved}
    dealt = stratify(counts, (1 - sum(wanted.values()), *wanted.values()))
    split_of = np.empty(len(owners), np.int8)
    split_of[order] = dealt
    return {split: split_of == k for k, split in enumerate(wanted, start=1)}


def carve_share(patient: str) -> float:
    """A patient's fixed place in [0, 1): val is carved from the low end, test from the high end."""
    digest = hashlib.sha256(patient.encode()).hexdigest()
    return int(digest[:_HASH_DIGITS], 16) / 16.0**_HASH_DIGITS


def find_contradicted(rows: Rows, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,), which rows of `among` show images that appear under different labels there. A finding
    that is unknown in one place contradicts nothing.
    """
    places, starts = find_repeated(rows, among)
    found = np.zeros(len(rows), np.bool_)
    if not len(places):
        return found
    labels = rows.labels[places]
    if labels.ndim == 1:
        contradict = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    else:
        present = np.logical_or.reduceat(labels == 1, starts, axis=0)
        absent = np.logical_or.reduceat(labels == 0, starts, axis=0)
        contradict = (present & absent).any(axis=1)
    lengths = np.diff(starts, append=len(places))
    found[places[np.repeat(contradict, lengths)]] = True
    return found


def find_repeated(
    rows: Rows, among: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of rows of `among` whose image another one of them shows, image by image, each in
    the order of the rows; and where in these places each image begins.
    """
    places = np.flatnonzero(among & rows.is_hashed)
    times = np.bincount(rows.images[places], minlength=1)
    places = places[times[rows.images[places]] > 1]
    places = places[np.argsort(rows.images[places], kind="stable")]
    images = rows.images[places]
    return places, np.flatnonzero(np.diff(images, prepend=-1))


def patients_in_several(rows: Rows, splits: Collection[str], among: NDArray[np.bool_]) -> list[str]:
    """Patients with images in more than one of `splits`, sorted; of the rows of `among`."""
    keys = rows.patients.keys  # those of one file are in one split
    times = np.zeros(len(keys), np.uint8)
    for split in splits:
        codes = rows.patients.codes[rows.splits.are(split) & among]
        is_here = np.zeros(len(keys), np.bool_)
        is_here[codes[codes >= 0]] = True
        times += is_here
    return sorted(keys[place] for place in np.flatnonzero(times > 1).tolist())


def find_split_faults(
    rows: Sequence[Row], carved: Collection[str], config: Splits, labels: LabelSpec
) -> list[str]:
    """What breaks the rules of splitting among a data set's rows, a sentence each."""
    rows = Rows.of(rows, labels)
    is_used = rows.is_used
    faults = [
        f"patient {patient} is in two splits although one was carved from the other"
        for patient in patients_in_several(rows, {"train", *carved}, is_used)
    ]
    faults += _repeated_in_two_splits(rows, is_used)
    says = "its patient's hash says" if labels.is_public else "balanced splits have it in"
    again = carve(rows, carved, config, labels)
    # The names of splits are those of `rows`, and perhaps more
    for place in np.flatnonzero(rows.splits.codes != again.splits.codes).tolist():
        own, other = rows.splits[place], again.splits[place]
        faults.append(f"{rows.paths[place]} is in {own}, {says} {other}")
    return faults


def _repeated_in_two_splits(rows: Rows, is_used: NDArray[np.bool_]) -> Iterator[str]:
    places, starts = find_repeated(rows, is_used)
    splits = rows.splits.codes[places]
    first = np.repeat(starts, np.diff(starts, append=len(places)))  # of the same image
    differs = np.flatnonzero(splits != splits[first]) if len(places) else starts
    for k in differs[np.argsort(places[differs])].tolist():
        other, own = int(places[first[k]]), int(places[k])
        yield (
            f"{rows.paths[other]} in {rows.splits[other]} and {rows.paths[own]} in "
            f"{rows.splits[own]} are the same image"
        )


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


def _split_of(share: float, carved: Collection[str], config: Splits) -> str:
    if "val" in carved and share < config.val_fraction:
        return "val"
    return "test" if "test" in carved and share >= 1 - config.test_fraction else "train"


def _owners(rows: Rows, pool: Numbers) -> NDArray[np.int32]:
    """By number of a patient, the one that counts for it: patients who share an identical image in
    `pool` are one, the one whose key sorts first.
    """
    parent = np.arange(rows.num_patients, dtype=np.int32)

    def root(patient: int) -> int:
        while (above := int(parent[patient])) != patient:
            parent[patient] = parent[above]
            patient = above
        return patient

    among = np.zeros(len(rows), np.bool_)
    among[pool] = True
    places, starts = find_repeated(rows, among)
    patients = rows.patient_numbers(places)
    first = patients[np.repeat(starts, np.diff(starts, append=len(places)))]
    for one, other in zip(first.tolist(), patients.tolist(), strict=True):
        roots = {root(one), root(other)}
        if len(roots) == 2:
            low, high = sorted(roots, key=rows.patient_key)
            parent[high] = low
    for patient in np.flatnonzero(parent != np.arange(len(parent))).tolist():
        parent[patient] = root(patient)
    return parent
