import hashlib
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dataset.pictures import dicom_file, picture_file, source_files, write_files
from xrai.config import Config, Images, Shards, Splits
from xrai.dataset.rules import find_split_faults
from xrai.errors import ImageError, SourceError
from xrai.ingest import hashing
from xrai.ingest.hashing import hash_files, hash_source
from xrai.ingest.listed import Files
from xrai.ingest.patients import PatientKey
from xrai.ingest.plan import Listing, Plan, list_source, make_plan
from xrai.ingest.sources import Source
from xrai.labels import CLASSES

CONFIG = Config(
    images=Images(size=16),
    shards=Shards(rows=10),
    splits=Splits(val_fraction=0.3, test_fraction=0.2),
)


class Held(Source):
    """Files in memory, listed in any order."""

    name = "held"

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def files(self) -> Files:
        return Files.of((path, len(data)) for path, data in self._files.items())

    def read(self, path: str) -> bytes:
        if path.endswith("unreadable.png"):
            raise ImageError("cannot be read (Input/output error)")
        return self._files[path]


def plan_of(files: dict[str, bytes], config: Config = CONFIG) -> Plan:
    source = Held(files)
    listing = list_source(source)
    return make_plan(listing, hash_source(source, listing, None), config)


FILES = source_files()


def test_every_file_is_in_one_shard_of_its_split_in_the_order_of_hashes() -> None:
    plan = plan_of(FILES)
    assert sorted(row.path for shard in plan.shards for row in shard.rows) == sorted(FILES)
    for shard in plan.shards:
        assert {row.split for row in shard.rows} == {shard.split}
        assert 1 <= len(shard.rows) <= 10
    for split in ("train", "val", "test"):
        shards = [shard for shard in plan.shards if shard.split == split]
        hashes = [row.sha256 for shard in shards for row in shard.rows]
        assert hashes == sorted(hashes)
        assert [shard.name for shard in shards] == [
            f"{split}-{number:05d}-of-{len(shards):05d}.h5" for number in range(len(shards))
        ]
        assert all(len(shard.rows) == 10 for shard in shards[:-1])


@given(order=st.permutations(sorted(FILES)))
def test_the_plan_does_not_depend_on_the_order_of_listing(order: list[str]) -> None:
    assert plan_of({path: FILES[path] for path in order}) == plan_of(FILES)


def test_the_plans_hash_follows_contents_and_config_and_nothing_else() -> None:
    (path, data), *_ = FILES.items()
    renamed = {f"chest_xray/{name}": content for name, content in FILES.items()}
    plans = [
        plan_of(FILES),
        plan_of({**FILES, path: data + b"x"}),
        plan_of({**FILES, "train/NORMAL/more.png": picture_file(99)}),
        plan_of(renamed),
        plan_of(FILES, replace(CONFIG, images=Images(size=32))),
        plan_of(FILES, replace(CONFIG, shards=Shards(rows=9))),
        plan_of(FILES, replace(CONFIG, splits=Splits(val_fraction=0.31, test_fraction=0.2))),
    ]
    assert len({plan.sha256 for plan in plans}) == len(plans)
    others = replace(
        CONFIG, train=replace(CONFIG.train, epochs=99), model=replace(CONFIG.model, width=8)
    )
    assert plan_of(FILES, others).sha256 == plans[0].sha256
    assert plan_of({**FILES, "README.txt": b"not data"}).sha256 == plans[0].sha256


def test_files_that_cannot_be_read_are_excluded_and_counted() -> None:
    plan = plan_of({**FILES, "train/NORMAL/unreadable.png": b""})
    assert [(row.path, row.reason) for row in plan.unusable] == [
        ("train/NORMAL/unreadable.png", "cannot be read (Input/output error)")
    ]
    assert all(
        row.path != "train/NORMAL/unreadable.png" for shard in plan.shards for row in shard.rows
    )
    assert len(plan.rows) == len(FILES) + 1


@pytest.mark.parametrize("duplicates", ["error", "drop"])
@pytest.mark.parametrize("data", [b"", b"<html>404 Not Found</html>"])
def test_files_that_are_no_images_are_no_image_twice(data: bytes, duplicates: Any) -> None:
    test = {f"test/{label}/{k}.png": picture_file(700 + k) for k, label in enumerate(CLASSES * 4)}
    none = {"train/NORMAL/e.png": data, "test/NORMAL/e.png": data, "train/PNEUMONIA/e.png": data}
    splits = Splits(val_fraction=0.3, duplicates=duplicates)
    config = replace(CONFIG, splits=splits, images=Images(max_set_aside=0.1, size=16))
    plan = plan_of({**FILES, **test, **none}, config)
    assert plan.unusable == () and not plan.rows.reasons
    planned = {row.path for shard in plan.shards for row in shard.rows}
    assert planned >= {*none}  # what decodes them tells the reason
    places = {
        place: "is empty (0 bytes)" for place, row in enumerate(plan.rows) if row.path in none
    }
    rows = plan.rows.with_(reasons=places)
    assert find_split_faults(rows, plan.carved, config.splits, plan.labels) == []
    with pytest.raises(SourceError, match=r"3 of 55 files cannot be used.*e\.png is "):
        plan_of({**FILES, **test, **none})


@pytest.mark.parametrize(
    ("num_bytes", "wait_s", "several"),
    [(100, 0.0, False), (100_000, 0.0, True), (100, 0.002, True)],
)
def test_files_that_are_large_or_waited_for_are_hashed_by_several_threads_all_in_order(
    num_bytes: int, wait_s: float, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not wait_s:  # a busy machine may let a test wait, too
        monkeypatch.setattr(hashing, "_SLOW_S", 60)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    files = {
        f"train/{('NORMAL', 'PNEUMONIA')[k % 2]}/{k:03d}.png": bytes([k]) * num_bytes
        for k in range(100)
    }
    threads = set()

    class Watched(Held):
        def read(self, path: str) -> bytes:
            threads.add(threading.get_ident())
            time.sleep(wait_s or 0.001)
            return super().read(path)

    source = Watched(files)
    rows = list_source(source).layout.rows
    counted: list[int] = []
    found = hash_files(source, rows, key=PatientKey(), on_done=counted.append)
    assert [(row.path, sha256) for row, (sha256, _, _) in zip(rows, found, strict=True)] == [
        (path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())
    ]
    assert sum(counted) == 100
    assert (len(threads - {threading.get_ident()}) > 1) == several


def test_a_dicom_header_names_the_patient_before_the_file_name_does_but_not_before_a_table(
    tmp_path: Path,
) -> None:
    samples = np.arange(256, dtype="<u2").reshape(16, 16)
    files = {
        f"train/{label}/IM-{film:04}-0001.dcm": dicom_file(samples + film, PatientID=f"P{film % 2}")
        for film, label in enumerate(["NORMAL", "NORMAL", "PNEUMONIA", "PNEUMONIA"])
    }
    files["train/NORMAL/IM-0009-0001.dcm"] = dicom_file(samples, leave_out=("PatientID",))
    (tmp_path / "key").write_bytes(b"k" * 32)
    rows = [*list_source(Held(files)).layout.rows]
    assert [row.patient for row in rows] == ["IM:0000", "IM:0001", "IM:0009", "IM:0002", "IM:0003"]
    key = PatientKey(str(tmp_path / "key"))
    even, odd = (key.hash(name, group="dicom") for name in ("P0", "P1"))
    rows.append(replace(rows[0], patient="clinic:0123456789abcdef"))
    rows += [replace(rows[0], patient=f"north:{own}") for own in ("IM:0000", "file:a.dcm")]
    found = hash_files(Held(files), rows, key=key, on_done=lambda num: None)
    patients = [patient for _, _, patient in found]
    north = key.hash("P0", group="north")
    assert patients[:5] == [even, odd, "IM:0009", even, odd]
    assert patients[5:] == ["clinic:0123456789abcdef", north, north]


def test_too_many_of_them_are_refused_naming_some() -> None:
    bad = {f"train/NORMAL/{k}-unreadable.png": b"" for k in range(5)}
    with pytest.raises(
        SourceError, match=r"5 of 49 files cannot be used.*0-unreadable\.png cannot.*; …\); fix"
    ):
        plan_of({**FILES, **bad})
    assert (
        len(plan_of({**FILES, **bad}, replace(CONFIG, images=Images(max_set_aside=0.11))).unusable)
        == 5
    )


def test_duplicates_left_out_on_request_do_not_count_as_unusable() -> None:
    train = source_files(10, 10)
    test = {path.replace("train/", "test/"): data for path, data in train.items()}
    val = {
        f"val/{label}/v{k}.png": picture_file(500 + k)
        for k in range(40)
        for label in [("NORMAL", "PNEUMONIA")[k % 2]]
    }
    more = {
        f"train/{label}/t{k}.png": picture_file(900 + k)
        for k in range(4)
        for label in [("NORMAL", "PNEUMONIA")[k % 2]]
    }
    with pytest.raises(SourceError, match="the same image in two splits"):
        plan_of({**train, **test, **val, **more})
    plan = plan_of(
        {**train, **test, **val, **more},
        replace(CONFIG, splits=Splits(duplicates="drop"), images=Images(max_set_aside=0)),
    )
    assert sum(bool(row.reason) for row in plan.rows) == 20
    assert plan.unusable == ()


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "it is empty"), ({"train/NORMAL/a.png": b"x"}, "has no usable PNEUMONIA images")],
)
def test_a_source_without_both_classes_is_refused_before_any_file_is_read(
    files: dict[str, bytes], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "read", lambda self, path: pytest.fail("read"))
    with pytest.raises(SourceError, match=message):
        list_source(Held(files))


NESTED = {f"data/hospital2/{path.removeprefix('train/')}": path for path in FILES}


def with_nested(**changed: bytes) -> dict[str, bytes]:
    """Class folders in data/, and the same names in data/hospital2/: of the last one other data."""
    files = {f"data/{path.removeprefix('train/')}": data for path, data in FILES.items()}
    copies = {path: FILES[original] for path, original in NESTED.items()}
    last = max(copies)
    return {**files, **copies, last: changed.get("last", copies[last])}


def test_a_second_copy_of_the_tree_is_left_out_with_a_note() -> None:
    layout = list_source(Held(with_nested())).layout
    assert len(layout.rows) == len(FILES)
    assert layout.not_data == {"in a second copy of the tree": len(FILES)}
    assert layout.notes[0] == (
        f"{len(FILES)} files are left out, as a second copy of the tree, in 'data/hospital2/'"
    )


@pytest.mark.parametrize("num_more", [0, 1])
def test_a_tree_of_the_same_names_and_other_images_is_no_copy(num_more: int) -> None:
    own = max(with_nested().items())[1]
    other = bytes([own[0] ^ 1]) + own[1:] + bytes(num_more)
    words = r"trees of images, in 'data/' and 'data/hospital2/' \(data/hospital2/\S+ and data/\S+ d"
    with pytest.raises(SourceError, match=words):
        list_source(Held(with_nested(last=other)))


def test_a_file_of_a_copy_that_cannot_be_read_says_nothing() -> None:
    files = {**FILES, "train/NORMAL/unreadable.png": b""}
    nested = {**files, **{f"x/{path}": data for path, data in files.items()}}
    assert len(list_source(Held(nested)).layout.rows) == len(files)


def test_a_listing_is_known_by_paths_and_sizes(tmp_path: Path) -> None:
    from xrai.ingest.sources import open_source

    def listed() -> Listing:
        return list_source(open_source(str(tmp_path)))

    write_files(tmp_path, FILES)
    before = listed()
    assert listed() == before
    write_files(tmp_path, {"train/NORMAL/new.png": b"x"})
    assert listed().sha256 != before.sha256
