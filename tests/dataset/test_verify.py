import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

from tests.dataset.remote import RemoteFolder
from tests.dataset.small import write_dataset
from xrai.dataset import verify
from xrai.dataset.manifest import Row
from xrai.dataset.rows import Rows
from xrai.dataset.shards import MANIFEST_KEY, DatasetIndex, ObjectInfo, ShardInfo, open_shard
from xrai.store import FolderStore, open_store


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, ShardInfo, Rows, DatasetIndex]:
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
        Rows.of((Row(*row, "train", info.name, k) for k, row in enumerate(columns)), index.labels),
        index,
    )


def faults(shard: tuple[Path, ShardInfo, Rows, DatasetIndex]) -> list[str]:
    path, info, rows, index = shard
    found = verify._check_shards(open_store(str(path.parent)), index, rows, skip=set())
    return [fault.words for fault in found if fault.key == info.name]


def test_a_source_image_without_a_size_is_a_fault(
    shard: tuple[Path, ShardInfo, Rows, DatasetIndex],
) -> None:
    words = "holds images whose source has no width or no height"
    assert words not in faults(shard)
    with h5py.File(shard[0], "r+") as file:
        file["height"][3] = 0
    assert words in faults(shard)


@pytest.mark.parametrize("column", ["patient", "width"])
def test_a_column_that_cannot_be_read_is_a_fault_and_no_crash(
    shard: tuple[Path, ShardInfo, Rows, DatasetIndex], column: str
) -> None:
    with h5py.File(shard[0], "r+") as file:
        del file[column]
    (words,) = faults(shard)
    assert "cannot be read as a shard" in words and column in words


@pytest.mark.parametrize("kind", [FolderStore, RemoteFolder])
def test_the_quick_check_holds_no_manifest_in_memory(
    tmp_path: Path, kind: type[FolderStore]
) -> None:
    index = write_dataset(tmp_path / "set", {"train": [6]})
    data = bytes(8 << 20)
    (tmp_path / "set" / MANIFEST_KEY).write_bytes(data)
    info = ObjectInfo(MANIFEST_KEY, len(data), hashlib.sha256(data).hexdigest())
    index = replace(index, objects=(info,))
    store = kind(tmp_path / "set")
    tracemalloc.start()
    try:
        faults = verify.find_faults_soon(store, index, with_rows=False)
        assert tracemalloc.get_traced_memory()[1] < len(data) / 2
    finally:
        tracemalloc.stop()
    assert MANIFEST_KEY not in {fault.key for fault in faults}
    wrong = replace(index, objects=(replace(info, sha256="0" * 64),))
    damaged = verify.Fault(MANIFEST_KEY, "is damaged: its bytes are not those that were written")
    assert damaged in verify.find_faults_soon(store, wrong, with_rows=False)
