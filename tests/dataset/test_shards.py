import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrai.dataset.shards import (
    Columns,
    Counts,
    DatasetIndex,
    ObjectInfo,
    ShardInfo,
    is_shard_name,
    map_shard,
    open_shard,
    read_index,
    shard_name,
    write_shard,
)
from xrai.errors import CorruptError, DatasetError
from xrai.store import open_store

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
SIDE = st.integers(1, 2**32 - 1)


def write(path: Path, *, num_rows: int = 5, size: int = 8, seed: int = 0) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    rows = {
        "images": rng.integers(0, 256, (num_rows, size, size), dtype=np.uint8),
        "labels": rng.integers(0, 2, num_rows, dtype=np.uint8),
        "source": [f"train/NORMAL/ä {k}.png" for k in range(num_rows)],
        "patient": [f"IM:{k:04d}" for k in range(num_rows)],
        "subtype": ["bacterial" if k % 2 else "" for k in range(num_rows)],
        "sha256": [hashlib.sha256(bytes([k % 256])).hexdigest() for k in range(num_rows)],
        "width": [1000 + k for k in range(num_rows)],
        "height": [800 + k for k in range(num_rows)],
    }
    write_shard(path, Columns(**rows))  # type: ignore[arg-type]
    return rows


# ------------------------------------------------------------------------------------------- shards


@given(
    num_rows=st.integers(1, 12), size=st.integers(1, 40), seed=st.integers(0, 99), data=st.data()
)
def test_a_shard_reads_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    size: int,
    seed: int,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_rows, size, size), dtype=np.uint8)
    labels = rng.integers(0, 2, num_rows, dtype=np.uint8)
    texts: dict[str, Any] = {
        name: data.draw(st.lists(TEXT, min_size=num_rows, max_size=num_rows))
        for name in ("source", "patient", "subtype")
    }
    sha256 = [hashlib.sha256(bytes([k])).hexdigest() for k in range(num_rows)]
    sides: dict[str, Any] = {
        name: data.draw(st.lists(SIDE, min_size=num_rows, max_size=num_rows))
        for name in ("width", "height")
    }
    path = tmp_path_factory.mktemp("shard") / "x.h5"
    rows = Columns(images=images, labels=labels, sha256=sha256, **texts, **sides)
    write_shard(path, rows)
    shard = open_shard(path)
    np.testing.assert_array_equal(shard.images, images)
    np.testing.assert_array_equal(shard.labels, labels)
    assert shard.images.dtype == shard.labels.dtype == np.uint8
    assert not shard.images.flags.writeable
    assert list(shard.sha256) == sha256
    for name, text in texts.items():
        assert list(getattr(shard, name)) == text
    for name, numbers in sides.items():
        assert getattr(shard, name).tolist() == numbers
        assert getattr(shard, name).dtype == np.uint32


def test_the_same_rows_give_the_same_bytes_at_any_time_and_place(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", num_rows=300)
    second = int(time.time())
    while int(time.time()) == second:  # HDF5 can keep times, in seconds
        time.sleep(0.01)
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "another name.h5", num_rows=300)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "deep" / "another name.h5").read_bytes()


def test_plain_h5py_reads_a_shard(tmp_path: Path) -> None:
    rows = write(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r") as file:
        assert set(file) == {
            "images",
            "labels",
            "source",
            "patient",
            "subtype",
            "sha256",
            "width",
            "height",
        }
        assert file["images"].shape == (5, 8, 8)
        assert file["images"].chunks is None and file["images"].compression is None
        np.testing.assert_array_equal(file["images"][:], rows["images"])
        assert list(file["source"].asstr()) == rows["source"]
        assert [text.decode() for text in file["sha256"]] == rows["sha256"]
        assert list(file["width"]) == rows["width"] and list(file["height"]) == rows["height"]
        assert file.attrs["schema_version"] == 1


def test_h5dump_reads_a_shard(tmp_path: Path) -> None:
    if shutil.which("h5dump") is None:
        pytest.skip("h5dump is not installed")
    write(tmp_path / "x.h5")
    done = subprocess.run(
        ["h5dump", "-H", str(tmp_path / "x.h5")], capture_output=True, text=True, check=True
    )
    assert 'DATASET "images"' in done.stdout and "( 5, 8, 8 )" in done.stdout


def test_images_start_on_a_page_so_that_a_reader_can_map_them(tmp_path: Path) -> None:
    write(tmp_path / "x.h5", num_rows=100, size=16)
    with h5py.File(tmp_path / "x.h5", "r") as file:
        assert file["images"].id.get_offset() % 4096 == 0


def test_a_shard_that_cannot_be_finished_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_shard_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.h5"
    write(path, num_rows=50, size=32)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CorruptError, match=r"x\.h5"):
        open_shard(path)


def test_a_file_of_another_kind_or_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(b"no HDF5 at all")
    with pytest.raises(CorruptError, match="cannot be read as a shard"):
        open_shard(path)
    write(path)
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 3
    with pytest.raises(CorruptError, match="schema version 3; this xrai reads 1 and 2"):
        open_shard(path)
    with h5py.File(path, "w") as file:
        file.attrs["schema_version"] = 1
        file["images"] = np.zeros((3, 4, 4), np.float32)
    with pytest.raises(CorruptError, match="cannot be read as a shard"):
        open_shard(path)


def test_opening_reads_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.h5")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("texts are read when they are asked for")

    with monkeypatch.context() as patched:
        patched.setattr(h5py.Dataset, "asstr", refuse)
        shard = open_shard(tmp_path / "x.h5")
        with pytest.raises(AssertionError, match="when they are asked for"):
            _ = shard.source
    assert shard.source[2] == "train/NORMAL/ä 2.png"


def test_columns_are_those_of_the_file_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    rows = write(path)
    shard = open_shard(path)
    write(path, num_rows=3)  # another file under its name
    for name in ("source", "patient", "subtype", "sha256", "width", "height"):
        assert getattr(shard, name).tolist() == rows[name]
    path.unlink()
    assert shard.patient.tolist() == rows["patient"]


def test_a_column_of_other_length_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        del file["patient"]
        file.create_dataset("patient", data=["one", "two"], dtype=h5py.string_dtype("utf-8"))
    with pytest.raises(CorruptError, match=r"x\.h5 is not laid out as a shard: patient has 2 rows"):
        _ = open_shard(path).patient


def test_a_shard_is_mapped_by_a_known_layout_unless_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    rows = write(path, num_rows=50, size=32)
    shard = map_shard(path, open_shard(path).layout)
    np.testing.assert_array_equal(shard.images, np.asarray(rows["images"]))
    np.testing.assert_array_equal(shard.labels, np.asarray(rows["labels"]))
    assert shard.source.tolist() == rows["source"]
    layout = shard.layout
    os.truncate(path, layout.offset + 100)
    with pytest.raises(CorruptError, match=r"x\.h5 is cut short"):
        map_shard(path, layout)


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_flipped_byte_never_crashes_a_reader(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.h5"
    write(path)
    data = bytearray(path.read_bytes())
    flipped, heap = int(place * len(data)), data.index(b"GCOL")
    data[flipped] ^= value
    path.write_bytes(data)
    numbers, texts = ("sha256", "width", "height"), ("source", "patient", "subtype")
    # HDF5 2.0 loops on some sizes in its heap of texts, in C, where nothing can stop it. Readers
    # check the hash of the file before they read a text, so no damaged heap gets there.
    is_in_heap = 0 <= flipped - heap < 4096
    try:
        shard = open_shard(path)
        for name in numbers if is_in_heap else numbers + texts:
            assert len(getattr(shard, name)) == 5
    except CorruptError:
        return
    # a pixel or a text changed, which the hash of the file tells
    assert shard.images.shape == (5, 8, 8)


def test_shard_names_are_known_from_others() -> None:
    assert shard_name("train", 3, 12) == "train-00003-of-00012.h5"
    assert is_shard_name(shard_name("val", 0, 123456))
    for name in (
        "train-1-of-2.h5",
        "../train-00000-of-00001.h5",
        "train-00000-of-00001.h5.part",
        "x-00000-of-00001.h5",
    ):
        assert not is_shard_name(name)


# -------------------------------------------------------------------------------------------- index


def index(**changes: object) -> DatasetIndex:
    values: dict[str, object] = {
        "classes": ("NORMAL", "PNEUMONIA"),
        "image_size": 64,
        "splits": {
            "train": (ShardInfo("train-00000-of-00001.h5", 3, 999, "ab" * 32, (1, 2)),),
            "val": (ShardInfo("val-00000-of-00001.h5", 2, 888, "cd" * 32, (2, 0)),),
        },
        "carved": ("val",),
        "pixel_mean": 12.5,
        "pixel_std": 3.25,
        "source": "chest_xray",
        "plan_sha256": "ef" * 32,
        "counts": Counts(6, 5, 1, 0),
        "objects": (ObjectInfo("manifest.jsonl", 10, "01" * 32),),
        "config": {"images": {"size": 64, "fit": "crop"}},
        "tool_version": "0.1.0",
    }
    return DatasetIndex(**{**values, **changes})  # type: ignore[arg-type]


def test_an_index_reads_back_as_it_was_written() -> None:
    assert DatasetIndex.from_json(index().to_json(), where="x") == index()
    assert list(json.loads(index().to_json()))[:2] == ["schema_version", "fingerprint"]


def test_counts_by_split_and_class_are_summed_over_shards() -> None:
    assert index().num_images("train") == 3
    assert index().num_images("test") == 0
    assert index().num_images_per_class("train") == {"NORMAL": 1, "PNEUMONIA": 2}


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_any_flipped_byte_of_an_index_is_noticed(place: float, value: int) -> None:
    data = bytearray(index().to_json().encode())
    data[int(place * len(data))] ^= value
    try:
        found = DatasetIndex.from_json(bytes(data), where="dataset.json")
    except (CorruptError, DatasetError) as error:
        assert "dataset.json" in str(error)
    else:
        assert found == index()  # a space or line break that says nothing


def test_an_index_of_another_version_is_refused_as_such() -> None:
    text = index(schema_version=3).to_json()
    with pytest.raises(DatasetError, match="has schema version 3; this xrai reads versions 1 to 2"):
        DatasetIndex.from_json(text, where="dataset.json")


def test_an_index_that_names_a_file_elsewhere_is_refused() -> None:
    evil = index(splits={"train": (ShardInfo("../../etc/passwd", 3, 999, "ab" * 32, (1, 2)),)})
    with pytest.raises(CorruptError, match="names that xrai never writes"):
        DatasetIndex.from_json(evil.to_json(), where="dataset.json")


@pytest.mark.parametrize("classes", [("NORMAL", "Review"), ("a", "A"), ("A|B", "C")])
def test_an_index_of_names_that_xrai_refuses_is_refused(classes: tuple[str, str]) -> None:
    with pytest.raises(CorruptError, match="it has other classes or splits than xrai writes"):
        DatasetIndex.from_json(index(classes=classes).to_json(), where="dataset.json")


def test_the_fingerprint_follows_the_contents_and_nothing_else() -> None:
    same = index(source="elsewhere", tool_version="9", config={}, plan_sha256="0", pixel_mean=0.0)
    assert same.fingerprint == index().fingerprint
    train, val = index().splits["train"][0], index().splits["val"][0]
    others = [
        index(image_size=32),
        index(classes=("A", "B")),
        index(splits={"train": (dataclasses.replace(train, sha256="00" * 32),), "val": (val,)}),
        index(splits={"train": (train,)}),
    ]
    assert len({index().fingerprint, *(other.fingerprint for other in others)}) == 5


def test_an_address_without_dataset_json_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"holds no dataset\.json, so no data set; `xrai preprocess"
    ) as caught:
        read_index(open_store(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_findings_are_written_and_read_back_with_what_is_unknown(tmp_path: Path) -> None:
    labels = np.array([[1, 0, -1]] * 5, np.int8)
    write_shard(tmp_path / "x.h5", replace(Columns(**write(tmp_path / "y.h5")), labels=labels))  # type: ignore[arg-type]
    shard = open_shard(tmp_path / "x.h5")
    assert shard.labels.dtype == np.int8 and shard.labels.tolist() == labels.tolist()


def test_an_index_of_version_1_is_read_as_two_classes_with_the_same_fingerprint() -> None:
    text = index(schema_version=1).to_json()
    assert '"task"' not in text and "num_unknown_per_class" not in text
    first = DatasetIndex.from_json(text, where="d")
    assert (first.task, first.labels.num_outputs) == ("binary", 1)
    assert first.fingerprint == index().fingerprint
    assert first.to_json() == text


def test_an_index_of_findings_counts_present_and_known_images() -> None:
    info = ShardInfo("train-00000-of-00001.h5", 5, 999, "ab" * 32, (2, 1), (0, 3))
    other = replace(info, name="train-00001-of-00002.h5", num_unknown_per_class=(1, 0))
    made = index(
        task="multilabel", classes=("Nodule", "Mass"), splits={"train": (info, other)}, carved=()
    )
    assert made.num_images_per_class("train") == {"Nodule": 4, "Mass": 2}
    assert made.num_known_per_class("train") == {"Nodule": 9, "Mass": 7}
    assert made.num_known_per_class("val") == {"Nodule": 0, "Mass": 0}
    assert DatasetIndex.from_json(made.to_json(), where="d") == made
    assert made.fingerprint != replace(made, classes=("Nodule", "X"), fingerprint="").fingerprint
