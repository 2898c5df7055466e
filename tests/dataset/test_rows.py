"""Columns give back the rows that they were made of, and know which share an image or a patient."""

import hashlib
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrai.dataset import rows as columns
from xrai.dataset.manifest import Row
from xrai.dataset.rows import Names, Rows, Texts
from xrai.labels import LabelSpec

BINARY = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
FINDINGS = LabelSpec("multilabel", ("A", "B", "C"))
texts = st.text(st.characters(exclude_categories=()), max_size=6)  # lone surrogates, too
PATHS = st.sampled_from(["a/x", "b/x", "b/xx", "x", "ä/x", "z"])
KEYS = st.sampled_from(["p:1", "p:2", "file:x", "file:a/x", "g:file:x", "g:file:b/x", "file:", ""])


@st.composite
def row_lists(draw: st.DrawFn, *, has_findings: bool = False) -> list[Row]:
    hashes = st.sampled_from(["", *(hashlib.sha256(bytes([k])).hexdigest() for k in range(3))])
    labels = st.tuples(*[st.integers(-1, 1)] * 3) if has_findings else st.integers(0, 1)
    places = st.none() | st.integers(0, 9)
    shards = st.sampled_from([None, "one.h5", "two.h5"])
    reasons = st.sampled_from(["", "is bad"])
    each = st.builds(Row, PATHS, hashes, labels, KEYS, texts, texts, shards, places, reasons)
    return draw(st.lists(each, max_size=12))


@given(row_lists())
def test_rows_come_back_as_they_were(rows: list[Row]) -> None:
    found = Rows.of(rows, BINARY)
    assert [*found] == rows and [found[k] for k in range(len(rows))] == rows
    assert [*found[1:4]] == rows[1:4] and Rows.of(found, BINARY) is found
    backwards = found.take(np.arange(len(rows))[::-1])
    assert [*backwards] == rows[::-1] and (backwards == found) == (rows == rows[::-1])


@given(row_lists(has_findings=True))
def test_rows_with_findings_come_back_as_they_were(rows: list[Row]) -> None:
    assert [*Rows.of(rows, FINDINGS)] == rows


@given(st.lists(texts))
def test_texts_come_back_as_they_were(given: list[str]) -> None:
    found = Texts.of(given)
    assert [*found] == given and [found[k] for k in range(len(given))] == given
    assert found[1:3] == given[1:3] and found[::-1] == given[::-1]
    order = np.argsort([len(text) for text in given]).astype(np.int64)
    assert [*found.take(order)] == [given[k] for k in order.tolist()]
    assert [*found.joined(found.take(order))] == given + [given[k] for k in order.tolist()]


@given(row_lists())
def test_two_rows_have_one_number_where_they_share_the_patient_or_the_image(
    rows: list[Row],
) -> None:
    found = Rows.of(rows, BINARY)
    check_numbers(rows, found)


def check_numbers(rows: list[Row], found: Rows) -> None:
    numbers = found.patient_numbers().tolist()
    assert [found.patient_key(number) for number in numbers] == [row.patient for row in rows]
    assert len(set(numbers)) == len({row.patient for row in rows})
    assert all(number < found.num_patients for number in numbers)
    images = found.images.tolist()
    assert [image < 0 for image in images] == [not row.sha256 for row in rows]
    assert len({*images} - {-1}) == len({row.sha256 for row in rows} - {""})
    by_number = sorted(zip(images, (row.sha256 for row in rows), strict=True))
    assert [sha256 for _, sha256 in by_number] == sorted(row.sha256 for row in rows)


@given(row_lists(), st.lists(st.tuples(st.integers(0, 11), KEYS), unique_by=lambda it: it[0]))
def test_other_patients_take_the_place_of_those_that_a_path_gives(
    rows: list[Row], changes: list[tuple[int, str]]
) -> None:
    # As DICOM files do: theirs are no keys of files
    changes = [(k, key) for k, key in changes if k < len(rows) and "file:" not in key]
    places = np.array([k for k, _ in changes], np.int64)
    found = Rows.of(rows, BINARY).with_patients(places, Texts.of(key for _, key in changes))
    for k, key in changes:
        rows[k] = replace(rows[k], patient=key)
    assert [*found] == rows
    check_numbers(rows, found)


def test_patients_known_by_one_file_are_not_stored() -> None:
    paths = [f"chest/{k}.png" for k in range(5)]
    rows = [Row(path, "", 0, f"file:{path[6:]}", "", "train") for path in paths]
    found = Rows.of(rows, BINARY)
    assert len(found.patients.keys) == 0 and found.patients.skipped == "chest/"
    assert len(set(found.patient_numbers().tolist())) == 5


def test_hashes_that_differ_late_are_different_images() -> None:
    hashes = [
        bytes(8) + bytes([a]) + bytes(15) + bytes([b]) + bytes(7) for a in (1, 0) for b in (1, 0, 1)
    ]
    rows = [Row(f"{k}", each.hex(), 0, "p:1", "", "train") for k, each in enumerate(hashes)]
    assert Rows.of(rows, BINARY).images.tolist() == [3, 2, 3, 1, 0, 1]


def test_what_is_no_row_is_refused() -> None:
    good = Row("a", "ab" * 32, 0, "p:1", "", "train")
    for bad in ({"sha256": "ab"}, {"sha256": "AB" * 32}, {"label": -1}, {"label": (1, 0)}):
        with pytest.raises((ValueError, OverflowError)):
            Rows.of([replace(good, **bad)], BINARY)
    for wrong in ({"path": 5}, {"patient": None}, {"split": None}, {"label": "0"}):
        with pytest.raises((TypeError, AttributeError)):
            Rows.of([replace(good, **wrong)], BINARY)


def test_keys_of_equal_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "hash", lambda text: len(text), raising=False)
    monkeypatch.setattr(columns, "_MAX_RECENT", 1)
    rows = [Row(f"{k}", "", 0, f"p:{k % 3}", "", "train") for k in range(9)]
    found = Rows.of(rows, BINARY)
    assert [*found] == rows and len(found.patients.keys) == 3


def test_names_are_found_and_replaced() -> None:
    names = Names.same("train", 4).put(np.array([1, 3]), "val").put(np.arange(4) == 0, "train")
    assert [names[k] for k in range(4)] == ["train", "val", "train", "val"]
    assert names.are("val", "test").tolist() == [False, True, False, True]
    groups = defaultdict(list)
    for k in range(4):
        groups[names[k]].append(k)
    assert sorted(groups) == sorted(names.used()) and Names.same("x", 0).used() == []
