"""Small data sets for tests of the reading side, written by the real writer, without images to
decode.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.manifest import Row, parse_manifest
from xrai.dataset.shards import (
    MANIFEST_KEY,
    Columns,
    Counts,
    DatasetIndex,
    ShardInfo,
    shard_name,
    write_shard,
)
from xrai.labels import Labels, LabelSpec

SIZE = 16
TWO = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
FINDINGS = LabelSpec("multilabel", ("Edema", "Nodule", "Mass"))


def write_dataset(
    folder: Path,
    rows: Mapping[str, Sequence[int]],
    *,
    seed: int = 0,
    size: int = SIZE,
    commit: bool = True,
    labels: LabelSpec = TWO,
) -> DatasetIndex:
    """A data set of random pixels in `folder`: `rows` gives the rows of each shard, split by split.

    The first four pixels of an image hold its place in the split (`place_of`), from which its label
    follows (`labels_at`).
    `commit` writes dataset.json. Another seed gives other shards under the same names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        split: tuple(_write_split(folder, split, list(counts), seed, size, labels))
        for split, counts in rows.items()
    }
    num = sum(shard.num_rows for shards in splits.values() for shard in shards)
    index = DatasetIndex(
        classes=labels.classes,
        task=labels.task,
        image_size=size,
        splits=splits,
        carved=(),
        pixel_mean=127.5,
        pixel_std=74.0,
        source="random pixels",
        plan_sha256="0" * 64,
        counts=Counts(num_found=num, num_written=num, num_set_aside=0, num_not_data=0),
        objects=(),
        config={"images": {"size": size, "fit": "crop"}},
        tool_version="0",
    )
    if commit:
        (folder / "dataset.json").write_text(index.to_json())
    return index


def place_of(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The places in the split that images (n, 1, H, W) carry in their first four pixels."""
    return np.ascontiguousarray(images[:, 0, 0, :4]).view("<u4")[:, 0].astype(np.int64)


def labels_at(places: NDArray[np.int64], labels: LabelSpec = TWO) -> Labels:
    """The labels of the images at these places: classes by turns, or findings that are present,
    absent or unknown.
    """
    if labels.task == "multilabel":
        powers = 3 ** np.arange(len(labels.classes))
        return (places[:, None] // powers % 3 - 1).astype(np.int8)
    return (places % len(labels.classes)).astype(np.uint8)


def _write_split(
    folder: Path, split: str, rows: Sequence[int], seed: int, size: int, spec: LabelSpec
) -> list[ShardInfo]:
    infos, start = [], 0
    for number, num_rows in enumerate(rows):
        name = shard_name(split, number, len(rows))
        places = np.arange(start, start + num_rows)
        images = np.random.default_rng([seed, start]).integers(
            0, 256, (num_rows, size, size), dtype=np.uint8
        )
        images[:, 0, :4] = places.astype("<u4")[:, None].view(np.uint8)
        labels = labels_at(places, spec)
        write_shard(
            folder / name,
            Columns(
                images=images,
                labels=labels,
                source=[f"{split}/{place}.png" for place in places],
                patient=[f"IM/{place}" for place in places],
                subtype=["bacterial" if place % 2 else "" for place in places],
                sha256=[hashlib.sha256(f"{seed}/{place}".encode()).hexdigest() for place in places],
                width=(1000 + places).tolist(),
                height=(800 + places).tolist(),
            ),
        )
        data = (folder / name).read_bytes()
        infos.append(
            ShardInfo(
                name, num_rows, len(data), hashlib.sha256(data).hexdigest(), *spec.count(labels)
            )
        )
        start += num_rows
    return infos


def rows_of(dataset: Path) -> list[Row]:
    """The rows of a data set's manifest."""
    with (dataset / MANIFEST_KEY).open("rb") as lines:
        return [*parse_manifest(lines, where=MANIFEST_KEY)]
