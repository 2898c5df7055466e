"""Restore damaged objects of a data set, bit for bit, from the source that it was made from.

`xrai.verify` calls it.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from xrai.config import Images
from xrai.dataset.rules import grey_histogram
from xrai.dataset.shards import DatasetIndex, ShardInfo, open_shard
from xrai.errors import CorruptError, DatasetError
from xrai.files import sha256_of, temporary_folder
from xrai.ingest.build import Report, assemble, gather, write_decoded
from xrai.ingest.decode import decode_rows
from xrai.ingest.greys import with_few_greys
from xrai.ingest.leaks import perceptual_hash
from xrai.ingest.plan import Plan, PlannedShard
from xrai.ingest.sources import Source
from xrai.ingest.unfinished import Part
from xrai.store import Store


def repair(
    store: Store,
    index: DatasetIndex,
    keys: Collection[str],
    *,
    plan: Plan,
    source: Source,
    report: Report,
    num_workers: int,
) -> None:
    """Write the objects `keys` of a data set again. All others stay as they are.

    Raises `DatasetError` when the source is not the one that the data set was made from,
    `CorruptError` when an object made again is not the one that the index lists; nothing wrong is
    stored then.
    """
    if plan.sha256 != index.plan_sha256:
        raise DatasetError(
            f"{store.uri} was not made from source {source.name}: files, labels, config or the "
            "key of patients (--patient_key) differ"
        )
    images = Images(**plan.config["images"])
    infos = {info.name: info for shards in index.splits.values() for info in shards}
    for shard in plan.shards:
        name = index.place + shard.name
        if name in keys:
            decoded = decode_rows(source, images, shard.rows, num_workers=num_workers)
            with temporary_folder() as folder:
                path = Path(folder) / shard.name
                made = gather(shard, decoded, labels=plan.labels, size=images.size)
                write_decoded(path, made)
                _replace(store, index, name, path)
    others = sorted(set(keys) - set(infos))
    if not others:
        return
    parts = [
        _recover_part(store, plan, shard, source, infos.get(index.place + shard.name))
        for shard in plan.shards
    ]
    with temporary_folder() as folder:
        _, paths = assemble(plan, parts, store, report, Path(folder))
        for key in others:
            _replace(store, index, key, paths.get(key))


def _replace(store: Store, index: DatasetIndex, key: str, path: Path | None) -> None:
    """Store a file that was made again, if it is the one that the index lists."""
    stated = {info.name: info.sha256 for info in index.all_objects()}
    if path is None or sha256_of(path) != stated.get(key):
        raise CorruptError(
            f"{key} made again is not the one that {store.uri} lists: it was made by xrai "
            f"{index.tool_version}, perhaps with other versions of Pillow, pydicom or HDF5; "
            "`xrai preprocess --overwrite` makes the whole data set again"
        )
    store.upload(key, path)


def _recover_part(
    store: Store, plan: Plan, shard: PlannedShard, source: Source, info: ShardInfo | None
) -> Part:
    """The part of a stored shard, as it was when the shard was made."""
    histogram = np.zeros(256, np.int64)
    hashes = bytearray()
    few_greys: list[str] = []
    kept: set[str] = set()
    if info is not None:
        with store.as_file(info.name) as path:
            stored = open_shard(path)
            histogram = grey_histogram(stored.images)
            found = (perceptual_hash(np.ascontiguousarray(image)) for image in stored.images)
            hashes = bytearray.fromhex("".join(found))
            kept = set(stored.source)
            few_greys = with_few_greys(stored.source, stored.images)
    absent = [row for row in shard.rows if row.path not in kept]
    whys = decode_rows(source, Images(**plan.config["images"]), absent, num_workers=1)
    reasons = {row.path: str(why) for row, why in zip(absent, whys, strict=True)}
    return Part(plan.sha256, info, reasons, histogram.tolist(), hashes, few_greys)
