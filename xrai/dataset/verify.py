"""Everything that can be checked again about a stored data set: what `xrai.verify` runs.

The index is checked when it is read. Here each object is compared with the hash in the index, the
shards with the manifest, the manifest with the counts and the rules of splitting, and all with the
fingerprint.
"""

import hashlib
from collections import Counter, defaultdict
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
    Shard,
    ShardInfo,
    compute_fingerprint,
    hash_object,
    is_shard_name,
    open_shard,
)
from xrai.errors import CorruptError
from xrai.labels import Label, LabelSpec
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
    faults = [*_check_index(index), *find_bad_objects(store, index)]
    bad = {fault.key for fault in faults}
    listed = {info.name for info in index.all_objects()}
    for entry in store.list():
        if is_shard_name(entry.key) and entry.key not in listed:
            faults.append(Fault(entry.key, f"is a shard that {INDEX_KEY} does not list: delete it"))
    key = index.place + MANIFEST_KEY
    if key in bad:
        return faults
    try:
        rows = read_manifest(store.read(key), where=key)
    except CorruptError as error:
        return [*faults, Fault(key, str(error))]
    faults += [Fault(key, words) for words in _check_manifest(index, rows)]
    return [*faults, *_check_shards(store, index, rows, skip=bad)]


def find_faults_soon(store: Store, index: DatasetIndex, *, with_rows: bool) -> list[Fault]:
    """What can be found without reading a shard: the index, the sizes of all objects, and the
    manifest's hash, `with_rows` its rows as well.
    """
    faults = list(_check_index(index))
    sizes = {entry.key: entry.size_bytes for entry in store.list(index.place)}
    for info in index.all_objects():
        found = sizes.get(info.name)
        if found is None:
            faults.append(Fault(info.name, "is missing"))
        elif found != info.size_bytes:
            words = f"is damaged: it has {found} bytes instead of {info.size_bytes}"
            faults.append(Fault(info.name, words))
    key = index.place + MANIFEST_KEY
    stated = {info.name: info.sha256 for info in index.objects}
    if key not in stated:
        faults.append(Fault(key, f"is not listed in {INDEX_KEY}"))
    elif key not in {fault.key for fault in faults}:
        data = store.read(key)
        if hashlib.sha256(data).hexdigest() != stated[key]:
            faults.append(Fault(key, "is damaged: its bytes are not those that were written"))
        elif with_rows:
            rows = read_manifest(data, where=key)
            faults += [Fault(key, words) for words in _check_manifest(index, rows)]
    return faults


def find_bad_objects(store: Store, index: DatasetIndex) -> list[Fault]:
    """Objects that are missing, or whose bytes do not have the hash in the index."""
    infos = index.all_objects()
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


def _check_index(index: DatasetIndex) -> Iterator[Fault]:
    """What contradicts itself in `dataset.json`."""
    counts, shards = index.counts, [info for infos in index.splits.values() for info in infos]
    if index.fingerprint != compute_fingerprint(index):
        yield Fault(INDEX_KEY, "its fingerprint is not that of the shards it lists")
    for name, times in Counter(info.name for info in index.all_objects()).items():
        if times > 1:
            yield Fault(name, f"is listed {times} times in {INDEX_KEY}")
    for digest, times in Counter(info.sha256 for info in shards).items():
        if times > 1:
            names = ", ".join(info.name for info in shards if info.sha256 == digest)
            yield Fault(INDEX_KEY, f"lists shards of the same content: {names}")
    for split, infos in index.splits.items():
        for info in infos:
            if not info.name.removeprefix(index.place).startswith(f"{split}-"):
                yield Fault(info.name, f"is listed in {INDEX_KEY} as a shard of {split}")
            if not _adds_up(info, index.labels):
                yield Fault(info.name, f"has {info.num_rows} rows, but {info.num_rows_per_class}")
    if counts.num_found != counts.num_written + counts.num_set_aside:
        yield Fault(INDEX_KEY, f"found is not written + excluded: {counts}")
    if sum(info.num_rows for info in shards) != counts.num_written:
        yield Fault(INDEX_KEY, f"its shards do not hold as many images as it says: {counts}")


def _adds_up(info: ShardInfo, labels: LabelSpec) -> bool:
    if labels.task != "multilabel":
        return sum(info.num_rows_per_class) == info.num_rows
    counts = zip(info.num_rows_per_class, info.num_unknown_per_class, strict=True)
    return all(present + unknown <= info.num_rows for present, unknown in counts)


def _check_manifest(index: DatasetIndex, rows: Sequence[Row]) -> Iterator[str]:
    counts = index.counts
    num_written = sum(row.shard is not None for row in rows)
    if (len(rows), num_written) != (counts.num_found, counts.num_written):
        yield f"lists {len(rows)} files, {num_written} of them written; {INDEX_KEY} says {counts}"
    for row in rows:
        if (row.shard is None) == (row.reason == ""):
            yield f"{row.path} has neither a shard nor a reason, or both"
    bad = [row for row in rows if not index.labels.allows(row.label)]
    for row in bad:
        yield f"{row.path} has the label {row.label!r}, which its data set does not know"
    found: dict[tuple[str, str], list[Label]] = defaultdict(list)
    for row in rows:
        if row.shard is not None:
            found[row.shard, row.split].append(row.label)
    stated = {
        (info.name.removeprefix(index.place), split): (
            info.num_rows,
            info.num_rows_per_class,
            info.num_unknown_per_class,
        )
        for split, infos in index.splits.items()
        for info in infos
    }
    if not bad and stated != {
        place: (len(labels), *index.labels.count(index.labels.array(labels)))
        for place, labels in found.items()
    }:
        yield f"does not list as many images of each shard and class as {INDEX_KEY}"
    if not bad:
        config = Splits(**index.config.get("splits", {}))
        yield from find_split_faults(rows, index.carved, config, index.labels)


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
            name = info.name.removeprefix(index.place)
            listed = sorted(by_shard.get(name, []), key=lambda row: row.row or 0)
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
    if shard.labels.shape != index.labels.empty(info.num_rows).shape:
        yield f"holds labels of shape {shard.labels.shape}, not those of {len(index.classes)} names"
        return
    counts, stated_counts = index.labels.count(shard.labels)[0], info.num_rows_per_class
    if counts != stated_counts:
        yield f"holds {counts} images of each class; {INDEX_KEY} says {stated_counts}"
    labels = shard.labels.tolist()
    if shard.labels.ndim == 2:
        labels = [tuple(each) for each in labels]
    inside = list(zip(*columns, labels, strict=True))
    stated = [(row.path, row.patient, row.subtype, row.sha256, row.label) for row in rows]
    places = [(row.split, row.row) for row in rows]
    if inside != stated or places != [(split, number) for number in range(len(rows))]:
        yield f"does not hold the rows that {MANIFEST_KEY} lists for it"
    if not all(side.all() for side in sides):
        yield "holds images whose source has no width or no height"
    if list(rows) != in_shard_order(rows):
        yield "does not hold its rows in the order of their hashes"
