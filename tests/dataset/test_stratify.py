"""Balanced splits: the rarest finding first, whole patients, the same for the same rows."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from xrai.config import Splits
from xrai.dataset.manifest import Row
from xrai.dataset.rules import carve, find_split_faults
from xrai.dataset.stratify import count_sides, stratify
from xrai.labels import Label, LabelSpec

FINDINGS = LabelSpec("multilabel", ("Effusion", "Nodule", "Hernia"))
CLASSES = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
CARVED = ("val", "test")


def row(name: str, label: Label, patient: str, **changes: str) -> Row:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return replace(Row(name, sha256, label, patient, "", "train"), **changes)  # type: ignore[arg-type]


def rows_of(num_patients: int, *, seed: int = 0) -> list[Row]:
    """Findings of a third, a tenth and a hundredth of the images, a fifth unknown."""
    random = np.random.default_rng(seed)
    found = []
    for patient in range(num_patients):
        for image in range(int(random.integers(1, 6))):
            label = (random.random(3) < (0.33, 0.1, 0.01)).astype(int)
            label[random.random(3) < 0.2] = -1
            found.append(row(f"{patient}-{image}.png", tuple(label.tolist()), f"p:{patient}"))
    return found


def prevalence(rows: Sequence[Row], split: str, place: int) -> float:
    values = [one.label[place] for one in rows if one.split == split]  # type: ignore[index]
    return values.count(1) / (len(values) - values.count(-1))


def test_images_are_counted_by_patient_and_side() -> None:
    labels = FINDINGS.array([(1, 0, -1), (0, 1, -1), (1, -1, 0)])
    counts = count_sides(np.array([0, 1, 0]), labels, FINDINGS, num_owners=2)
    assert counts.tolist() == [[2, 0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 0, 1]]
    assert count_sides(np.array([1, 1]), CLASSES.array([2, 0]), CLASSES, num_owners=2).tolist() == [
        [0, 0, 0, 0],
        [1, 0, 1, 2],
    ]


def test_every_finding_has_its_share_in_every_split_and_patients_stay_whole() -> None:
    rows = carve(rows_of(2000), CARVED, Splits(), FINDINGS)
    splits = defaultdict(set)
    for each in rows:
        splits[each.patient].add(each.split)
    assert all(len(names) == 1 for names in splits.values())
    sizes = Counter(each.split for each in rows)
    for split in CARVED:
        assert sizes[split] / len(rows) == pytest.approx(0.1, abs=0.005)
        for place in range(3):
            expected = prevalence(rows, "train", place)
            assert prevalence(rows, split, place) == pytest.approx(expected, abs=0.002)


def test_a_finding_of_three_patients_is_in_all_splits_and_one_of_two_in_train_and_val() -> None:
    for num, expected in ((3, {"train", "val", "test"}), (2, {"train", "val"}), (1, {"train"})):
        rows = [row(f"{k}.png", (int(k % 2), 0, int(k < num)), f"p:{k}") for k in range(100)]
        found = carve(rows, CARVED, Splits(), FINDINGS)
        assert {each.split for each in found if each.label[2] == 1} == expected  # type: ignore[index]


def test_the_order_of_rows_and_a_second_carving_change_nothing() -> None:
    rows = rows_of(300)
    once = carve(rows, CARVED, Splits(), FINDINGS)
    assert carve(once, CARVED, Splits(), FINDINGS) == once
    again = carve(rows[::-1], CARVED, Splits(), FINDINGS)[::-1]
    assert again == once


def test_verify_holds_balanced_splits_to_their_rule_whatever_could_not_be_decoded() -> None:
    found = [
        replace(each, reason="is cut short") if number % 7 == 0 else each
        for number, each in enumerate(carve(rows_of(300), CARVED, Splits(), FINDINGS))
    ]
    assert find_split_faults(found, CARVED, Splits(), FINDINGS) == []
    moved = [replace(each, split="val") if each.patient == "p:3" else each for each in found]
    moved[0] = replace(moved[0], split="test")
    faults = find_split_faults(moved, CARVED, Splits(), FINDINGS)
    assert any("balanced splits have it in" in fault for fault in faults)


def test_classes_are_balanced_too() -> None:
    rows = [row(f"{k}.png", 2 if k % 50 == 0 else k % 2, f"p:{k // 2}") for k in range(1000)]
    found = carve(rows, CARVED, Splits(), CLASSES)
    counts = Counter((each.split, each.label) for each in found)
    assert [counts[split, 2] for split in ("train", *CARVED)] == [16, 2, 2]


def test_no_patients_and_one_patient_are_dealt() -> None:
    empty = np.zeros((0, 3), np.int64)
    assert stratify(empty, (0.8, 0.2)).tolist() == []
    assert stratify(np.array([[4, 1, 5]]), (0.5, 0.3, 0.2)).tolist() == [0]
