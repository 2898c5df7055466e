"""Put back what was damaged in a data set, bit for bit, from the source that it was made of.
`xrai.verify` calls it.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from xrai.config import Images
from xrai.dataset.rules import grey_histogram
from xrai.dataset.shards import DatasetIndex, ShardInfo, open_shard
from xrai.errors import CorruptError, DatasetError
from xrai.ingest.build import Decoded, Part, Report, assemble, decode_rows, write_rows
from xrai.ingest.leaks import perceptual_hash
from xrai.ingest.plan import Plan, PlannedShard, hash_of
from xrai.ingest.sources import Source
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
    """Write the objects `keys` of a data set anew. All others are left as they are.

    Raises `DatasetError` when the source is not the one that the data set was made of,
    `CorruptError` when an object made anew is not the one that the index lists; nothing wrong is
    stored then.
    """
    if plan.sha256 != index.plan_sha256:
        raise DatasetError(
            f"source {source.name} is not what {store.uri} was made of: files, labels or config differ"
        )
    images = Images(**plan.config["images"])
    infos = {info.name: info for shards in index.splits.values() for info in shards}
    for shard in plan.shards:
        if shard.name in keys:
            _repair_shard(
                store, infos[shard.name], shard, index, source, images, num_workers=num_workers
            )
    others = sorted(set(keys) - set(infos))
    if not others:
        return
    parts = [
        _recover_part(store, infos.get(shard.name), shard, plan, source, images)
        for shard in plan.shards
    ]
    stated = {info.name: info.sha256 for info in index.objects}
    with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
        made, paths = assemble(plan, parts, report, Path(folder))
        digests = {info.name: info.sha256 for info in made.objects}
        for key in others:
            if key not in digests or digests[key] != stated.get(key):
                raise _differs(store, key, index)
            store.upload(key, paths[key])


def _repair_shard(
    store: Store,
    info: ShardInfo,
    shard: PlannedShard,
    index: DatasetIndex,
    source: Source,
    images: Images,
    *,
    num_workers: int,
) -> None:
    pictures = decode_rows(source, images, shard.rows, num_workers=num_workers)
    pairs = [
        (row, picture)
        for row, picture in zip(shard.rows, pictures, strict=True)
        if isinstance(picture, Decoded)
    ]
    with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
        path = Path(folder) / shard.name
        stacked = np.stack([picture.pixels for _, picture in pairs])
        write_rows(
            path, [row for row, _ in pairs], stacked, sizes=[picture.size for _, picture in pairs]
        )
        if hash_of(path.read_bytes()) != info.sha256:
            raise _differs(store, shard.name, index)
        store.upload(shard.name, path)


def _recover_part(
    store: Store,
    info: ShardInfo | None,
    shard: PlannedShard,
    plan: Plan,
    source: Source,
    images: Images,
) -> Part:
    """The part of a stored shard, as it was when the shard was made."""
    histogram = np.zeros(256, np.int64)
    hashes: list[str] = []
    kept: set[str] = set()
    if info is not None:
        with store.as_file(info.name) as path:
            stored = open_shard(path)
            histogram = grey_histogram(stored.images)
            hashes = [perceptual_hash(np.ascontiguousarray(image)) for image in stored.images]
            kept = set(stored.source)
    absent = [row for row in shard.rows if row.path not in kept]
    reasons = {
        row.path: str(why)
        for row, why in zip(absent, decode_rows(source, images, absent, num_workers=1), strict=True)
    }
    return Part(plan.sha256, info, reasons, histogram.tolist(), hashes)


def _differs(store: Store, key: str, index: DatasetIndex) -> CorruptError:
    return CorruptError(
        f"{key} made anew is not the one that {store.uri} lists: it was made by xrai {index.tool_version}, perhaps "
        "with other versions of Pillow, pydicom or HDF5; `python -m xrai.preprocess --overwrite` makes all of it anew"
    )
