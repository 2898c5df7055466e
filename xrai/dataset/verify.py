"""Everything that can be checked again about a stored data set: what `xrai.verify` runs.

The index is checked when it is read. Here each object is compared with the hash in the index, the
shards with the manifest, the manifest with the counts and the rules of splitting, and all with the
fingerprint.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from xrai.config import Splits
from xrai.dataset.manifest import Row, read_manifest
from xrai.dataset.rules import find_split_faults, grey_histogram, in_shard_order, mean_and_std
from xrai.dataset.shards import (
    INDEX_KEY,
    MANIFEST_KEY,
    DatasetIndex,
    ObjectInfo,
    Shard,
    ShardInfo,
    compute_fingerprint,
    hash_object,
    is_shard_name,
    open_shard,
)
from xrai.errors import CorruptError
from xrai.log import progress
from xrai.store import Store

_AT_A_TIME = 8


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. `key` names the object."""

    key: str
    words: str


def find_faults(store: Store, index: DatasetIndex) -> list[Fault]:
    """All that is wrong with a data set; empty if nothing is."""
    faults = find_bad_objects(store, index)
    bad = {fault.key for fault in faults}
    if index.fingerprint != compute_fingerprint(index):
        faults.append(Fault(INDEX_KEY, "its fingerprint is not that of the shards it lists"))
    listed = {shard.name for shards in index.splits.values() for shard in shards}
    for entry in store.list():
        if is_shard_name(entry.key) and entry.key not in listed:
            faults.append(Fault(entry.key, f"is a shard that {INDEX_KEY} does not list: delete it"))
    if MANIFEST_KEY in bad:
        return faults
    try:
        rows = read_manifest(store.read(MANIFEST_KEY), where=MANIFEST_KEY)
    except CorruptError as error:
        return [*faults, Fault(MANIFEST_KEY, str(error))]
    faults += [Fault(MANIFEST_KEY, words) for words in _check_manifest(index, rows)]
    return [*faults, *_check_shards(store, index, rows, skip=bad)]


def find_bad_objects(store: Store, index: DatasetIndex) -> list[Fault]:
    """Objects that are missing, or whose bytes do not have the hash in the index."""
    infos: list[ShardInfo | ObjectInfo] = [
        *(shard for shards in index.splits.values() for shard in shards),
        *index.objects,
    ]
    faults = []
    with (
        progress("verify", total=len(infos), unit="objects") as bar,
        ThreadPoolExecutor(_AT_A_TIME) as pool,
    ):
        digests = pool.map(lambda info: hash_object(store, info.name), infos)
        for info, digest in zip(infos, digests, strict=True):
            bar.update()
            if digest is None:
                faults.append(Fault(info.name, "is missing"))
            elif digest != info.sha256:
                size_bytes = store.size(info.name)
                words = "its bytes are not those that were written"
                if size_bytes != info.size_bytes:
                    words = f"it has {size_bytes} bytes instead of {info.size_bytes}"
                faults.append(Fault(info.name, f"is damaged: {words}"))
    return faults


def _check_manifest(index: DatasetIndex, rows: Sequence[Row]) -> Iterator[str]:
    counts = index.counts
    num_written = sum(row.shard is not None for row in rows)
    if (len(rows), num_written) != (counts.num_found, counts.num_written):
        yield f"lists {len(rows)} files, {num_written} of them written; {INDEX_KEY} says {counts}"
    if counts.num_found != counts.num_written + counts.num_set_aside:
        yield f"found is not written + excluded in {INDEX_KEY}: {counts}"
    for row in rows:
        if (row.shard is None) == (row.reason == ""):
            yield f"{row.path} has neither a shard nor a reason, or both"
    yield from find_split_faults(rows, index.carved, Splits(**index.config["splits"]))


def _check_shards(
    store: Store, index: DatasetIndex, rows: Sequence[Row], *, skip: set[str]
) -> Iterator[Fault]:
    """Compare each shard that has the right hash with the manifest, and all of train (of all
    splits where there is no train) with the stated mean.
    """
    by_shard: dict[str, list[Row]] = {}
    for row in rows:
        if row.shard is not None:
            by_shard.setdefault(row.shard, []).append(row)
    measured = {"train"} & index.splits.keys() or {*index.splits}
    histogram = np.zeros(256, np.int64)
    for split, infos in index.splits.items():
        for info in infos:
            if info.name in skip:
                continue
            listed = sorted(by_shard.get(info.name, []), key=lambda row: row.row or 0)
            try:
                with store.as_file(info.name) as path:
                    shard = open_shard(path)
                    for words in _check_shard(shard, info, listed, index, split=split):
                        yield Fault(info.name, words)
            except CorruptError as error:
                skip = {*skip, info.name}
                yield Fault(info.name, str(error))
            else:
                if split in measured:
                    histogram += grey_histogram(shard.images)
    if not skip.intersection(info.name for split in measured for info in index.splits[split]):
        mean, std = mean_and_std(histogram)
        if abs(mean - index.pixel_mean) > 1e-6 or abs(std - index.pixel_std) > 1e-6:
            yield Fault(INDEX_KEY, f"pixel mean and std are {mean} and {std}, not what it states")


def _check_shard(
    shard: Shard, info: ShardInfo, rows: Sequence[Row], index: DatasetIndex, *, split: str
) -> Iterator[str]:
    """What is wrong with one shard. Raises `CorruptError` if a column cannot be read."""
    columns = (shard.source, shard.patient, shard.subtype, shard.sha256)
    sides = (shard.width, shard.height)
    shape = (info.num_rows, index.image_size, index.image_size)
    if shard.images.shape != shape:
        yield f"holds images of shape {shard.images.shape}; {INDEX_KEY} says {shape}"
        return
    counts = tuple(np.bincount(shard.labels, minlength=len(index.classes)).tolist())
    if counts != info.num_rows_per_class:
        yield f"holds {counts} images of each class; {INDEX_KEY} says {info.num_rows_per_class}"
    inside = list(zip(*columns, shard.labels.tolist(), strict=True))
    stated = [(row.path, row.patient, row.subtype, row.sha256, row.label) for row in rows]
    places = [(row.split, row.row) for row in rows]
    if inside != stated or places != [(split, number) for number in range(len(rows))]:
        yield f"does not hold the rows that {MANIFEST_KEY} lists for it"
    if not all(side.all() for side in sides):
        yield "holds images whose source has no width or no height"
    if list(rows) != in_shard_order(rows):
        yield "does not hold its rows in the order of their hashes"
