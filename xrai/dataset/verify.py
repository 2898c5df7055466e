"""Everything that can be checked again about a stored data set: what `xrai.verify` runs.

The index is checked when it is read. Here each object is compared with the hash in the index, the
shards with the manifest, the manifest with the counts and the rules of splitting, and all with the
fingerprint.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xrai.config import Splits
from xrai.dataset.manifest import Row, parse_manifest
from xrai.dataset.rows import Names, Rows, RowsBuilder
from xrai.dataset.rules import find_split_faults, grey_histogram, mean_and_std
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
from xrai.files import explaining, sha256_of
from xrai.labels import LabelSpec
from xrai.log import progress
from xrai.store import Store

_AT_A_TIME = 8


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. `key` names the object."""

    key: str
    words: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest lists."""

    rows: Rows  # those whose labels the data set knows
    num_rows: int  # all of them
    num_written: int
    unknown_labels: tuple[str, ...]  # a sentence about each of the others


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
        with store.as_file(key) as path, path.open("rb") as lines:
            manifest = read_rows(lines, index.labels, where=key)
    except CorruptError as error:
        return [*faults, Fault(key, str(error).removeprefix(f"{key}: "))]
    faults += [Fault(key, words) for words in _check_manifest(index, manifest)]
    return [*faults, *_check_shards(store, index, manifest.rows, skip=bad)]


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
        with store.as_file(key) as path, explaining("read", f"{store.uri}/{key}"):
            if sha256_of(path) != stated[key]:
                faults.append(Fault(key, "is damaged: its bytes are not those that were written"))
            elif with_rows:
                with path.open("rb") as lines:
                    manifest = read_rows(lines, index.labels, where=key)
                faults += [Fault(key, words) for words in _check_manifest(index, manifest)]
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


def read_rows(lines: Iterable[bytes], labels: LabelSpec, *, where: str) -> Manifest:
    """Read a manifest into columns. Raises `CorruptError` that names a line that is no row."""
    builder = RowsBuilder(labels)
    num_rows = num_written = 0
    faults = []
    for row in parse_manifest(lines, where=where):
        num_rows, num_written = num_rows + 1, num_written + (row.shard is not None)
        if not labels.allows(row.label):
            faults.append(
                f"{row.path} has the label {row.label!r}, which its data set does not know"
            )
            continue
        builder.append(row)
    return Manifest(builder.finish(), num_rows, num_written, tuple(faults))


def _check_manifest(index: DatasetIndex, manifest: Manifest) -> Iterator[str]:
    counts, rows = index.counts, manifest.rows
    num_rows, num_written = manifest.num_rows, manifest.num_written
    if (num_rows, num_written) != (counts.num_found, counts.num_written):
        yield f"lists {num_rows} files, {num_written} of them written; {INDEX_KEY} says {counts}"
    in_shard = ~rows.shards.are("")
    for place in np.flatnonzero(in_shard != rows.is_used).tolist():
        yield f"{rows.paths[place]} has neither a shard nor a reason, or both"
    yield from manifest.unknown_labels
    if manifest.unknown_labels:
        return
    stated = {
        (info.name.removeprefix(index.place), split): (
            info.num_rows,
            info.num_rows_per_class,
            info.num_unknown_per_class,
        )
        for split, infos in index.splits.items()
        for info in infos
    }
    found = {
        (name, split): (len(own), *index.labels.count(rows.labels[own]))
        for name, places in _by_shard(rows).items()
        for split in Names(rows.splits.codes[places], rows.splits.values).used()
        for own in [places[rows.splits.take(places).are(split)]]
    }
    if stated != found:
        yield f"does not list as many images of each shard and class as {INDEX_KEY}"
    config = Splits(**index.config.get("splits", {}))
    yield from find_split_faults(rows, index.carved, config, index.labels)


def _by_shard(rows: Rows) -> dict[str, NDArray[np.int64]]:
    """The places of each shard's rows, in the order that they state."""
    codes = rows.shards.codes
    order = np.lexsort((rows.places, codes))
    ends = np.searchsorted(codes[order], np.arange(len(rows.shards.values) + 1))
    return {
        name: order[ends[k] : ends[k + 1]]
        for k, name in enumerate(rows.shards.values)
        if name and ends[k] < ends[k + 1]
    }


def _check_shards(
    store: Store, index: DatasetIndex, rows: Rows, *, skip: set[str]
) -> Iterator[Fault]:
    """Compare each shard that has the right hash with the manifest, and all of train (of all
    splits where there is no train) with the stated mean.
    """
    by_shard = _by_shard(rows)
    measured = {"train"} & index.splits.keys() or {*index.splits}
    histogram = np.zeros(256, np.int64)
    for split, infos in index.splits.items():
        for info in infos:
            if info.name in skip:
                continue
            name = info.name.removeprefix(index.place)
            listed = [*rows.take(by_shard.get(name, np.empty(0, np.int64)))]
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
    hashes = [(row.sha256, row.path) for row in rows]
    if hashes != sorted(hashes):
        yield "does not hold its rows in the order of their hashes"
