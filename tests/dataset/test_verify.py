import hashlib
from pathlib import Path

import h5py
import pytest

from tests.dataset.small import write_dataset
from xrai.dataset import verify
from xrai.dataset.manifest import Row
from xrai.dataset.shards import DatasetIndex, ShardInfo, open_shard


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, ShardInfo, list[Row], DatasetIndex]:
    """A shard, what lists it, and the rows of its manifest."""
    index = write_dataset(tmp_path, {"train": [6]})
    (info,) = index.splits["train"]
    opened = open_shard(tmp_path / info.name)
    columns = zip(
        opened.source,
        opened.sha256,
        opened.labels.tolist(),
        opened.patient,
        opened.subtype,
        strict=True,
    )
    return (
        tmp_path / info.name,
        info,
        [Row(*row, "train", info.name, k) for k, row in enumerate(columns)],
        index,
    )


def faults(shard: tuple[Path, ShardInfo, list[Row], DatasetIndex]) -> list[str]:
    path, info, rows, index = shard
    return list(verify._check_shard(path, info, rows, index, split="train"))


def test_a_source_picture_without_a_size_is_a_fault(
    shard: tuple[Path, ShardInfo, list[Row], DatasetIndex],
) -> None:
    words = "holds pictures whose source has no width or no height"
    assert words not in faults(shard)
    with h5py.File(shard[0], "r+") as file:
        file["height"][3] = 0
    assert words in faults(shard)


def test_a_shard_without_the_sizes_of_its_sources_is_a_fault_and_no_crash(
    shard: tuple[Path, ShardInfo, list[Row], DatasetIndex],
) -> None:
    with h5py.File(shard[0], "r+") as file:
        del file["width"]
    (words,) = faults(shard)
    assert "lacks width" in words and "makes the data set anew" in words
    assert hashlib.sha256(shard[0].read_bytes()).hexdigest() != shard[1].sha256


def test_a_column_of_texts_that_can_not_be_read_is_a_fault_and_no_crash(
    shard: tuple[Path, ShardInfo, list[Row], DatasetIndex],
) -> None:
    with h5py.File(shard[0], "r+") as file:
        del file["patient"]
    (words,) = faults(shard)
    assert "cannot be read as a shard" in words and "patient" in words
