import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrai.config import Splits
from xrai.dataset.manifest import Row
from xrai.dataset.rules import carve_share, find_split_faults
from xrai.errors import SourceError
from xrai.ingest.splits import assign_splits
from xrai.labels import LabelSpec

CARVE = Splits(val_fraction=0.2, test_fraction=0.2)
BINARY = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))


def row(
    name: str, *, label: int = 0, patient: str = "", split: str = "train", content: str = ""
) -> Row:
    sha256 = hashlib.sha256((content or name).encode()).hexdigest()
    return Row(f"{split}/{name}", sha256, label, patient or f"file:{name}", "", split)


def many(
    num_patients: int, *, images_each: int = 1, split: str = "train", prefix: str = ""
) -> list[Row]:
    return [
        row(f"{prefix}{k}-{i}.png", label=k % 2, patient=f"{prefix}p:{k}", split=split)
        for k in range(num_patients)
        for i in range(images_each)
    ]


def splits_of(rows: list[Row], config: Splits = CARVE) -> dict[str, str]:
    return {
        row.path: row.split for row in assign_splits(rows, BINARY, config).rows if not row.reason
    }


# ------------------------------------------------------------------------------------------ carving


def test_carved_shares_are_near_to_what_was_asked_in_each_class() -> None:
    rows = many(6000)
    found = splits_of(rows)
    for label in (0, 1):
        counts = Counter(found[row.path] for row in rows if row.label == label)
        assert abs(counts["val"] / 3000 - 0.2) < 0.025
        assert abs(counts["test"] / 3000 - 0.2) < 0.025


patients = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=60
)  # (patient, content) of an image: few of each, so that patients share images


def rows_of(pairs: list[tuple[int, int]]) -> list[Row]:
    """Images, labelled by content so that nothing contradicts, after enough others that no split
    is empty.
    """
    return many(80, prefix="base") + [
        row(f"{k}.png", label=content % 2, patient=f"q:{patient}", content=f"c{content}")
        for k, (patient, content) in enumerate(pairs)
    ]


@given(pairs=patients)
def test_no_patient_and_no_image_is_in_two_carved_splits(pairs: list[tuple[int, int]]) -> None:
    by_patient, by_image = defaultdict(set), defaultdict(set)
    for found in assign_splits(rows_of(pairs), BINARY, CARVE).rows:
        by_patient[found.patient].add(found.split)
        by_image[found.sha256].add(found.split)
    assert all(len(splits) == 1 for splits in (*by_patient.values(), *by_image.values()))


@given(pairs=patients, seed=st.randoms(use_true_random=False))
def test_splits_do_not_depend_on_the_order_of_files(
    pairs: list[tuple[int, int]], seed: "object"
) -> None:
    rows = rows_of(pairs)
    shuffled = rows.copy()
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert splits_of(shuffled) == splits_of(rows)


@given(num_before=st.integers(60, 100), num_added=st.integers(0, 60), images_each=st.integers(1, 3))
def test_adding_images_moves_nobody(num_before: int, num_added: int, images_each: int) -> None:
    before = many(num_before)
    added = many(num_before + num_added, images_each=images_each, prefix="")[len(before) :]
    known = {row.path for row in before}
    after = splits_of(before + [row for row in added if row.path not in known])
    assert splits_of(before).items() <= after.items()


def test_adding_an_identical_image_of_another_patient_moves_only_these_two() -> None:
    before = many(200)
    first = splits_of(before)
    copied = replace(before[7], path="train/copy.png", patient="p:9999")
    after = splits_of([*before, copied])
    assert {path for path in first if after[path] != first[path]} <= {before[7].path}
    assert after["train/copy.png"] == after[before[7].path]


# -------------------------------------------------------------------------- the source's own splits


def test_splits_that_the_source_gives_are_kept() -> None:
    rows = many(40) + many(40, split="val", prefix="v") + many(10, split="test", prefix="t")
    assignment = assign_splits(rows, BINARY, CARVE)
    assert assignment.carved == ()
    assert [found.split for found in assignment.rows] == [given.split for given in rows]


def test_a_val_too_small_to_measure_with_joins_train_and_is_carved_anew_with_a_note() -> None:
    rows = many(200) + many(16, split="val", prefix="v") + many(30, split="test", prefix="t")
    assignment = assign_splits(rows, BINARY, Splits())
    assert assignment.carved == ("val",)
    assert any(
        "16 images, fewer than splits.min_val_images = 32" in note for note in assignment.notes
    )
    assert all(found.split == "test" for found in assignment.rows if found.path.startswith("test/"))
    assert {found.split for found in assignment.rows if not found.path.startswith("test/")} == {
        "train",
        "val",
    }


def test_no_test_is_carved_when_none_is_asked_for() -> None:
    assert set(splits_of(many(100), Splits(val_fraction=0.3, test_fraction=0.0)).values()) == {
        "train",
        "val",
    }


def test_a_patient_in_two_splits_of_the_source_stays_where_the_source_has_him() -> None:
    rows = many(40) + many(40, split="val") + many(40, split="test")
    rows = [
        replace(found, sha256=hashlib.sha256(found.path.encode()).hexdigest()) for found in rows
    ]
    assert [found.split for found in assign_splits(rows, BINARY, Splits()).rows] == [
        given.split for given in rows
    ]


# ------------------------------------------------------------------------- leaks and contradictions


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("train", "val"), ("val", "test")])
def test_the_same_image_in_two_splits_of_the_source_is_refused_by_both_names(
    one: str, other: str
) -> None:
    rows = many(40) + many(40, split="val", prefix="v") + many(40, split="test", prefix="t")
    rows += [row("a.png", split=one, content="same"), row("b.png", split=other, content="same")]
    with pytest.raises(
        SourceError, match=f"{other}/b.png and {one}/a.png; .*--splits.duplicates=drop"
    ):
        assign_splits(rows, BINARY, Splits())


def test_on_request_all_but_the_one_in_test_else_val_are_excluded() -> None:
    rows = many(40) + many(40, split="val", prefix="v") + many(40, split="test", prefix="t")
    rows += [row("a.png", split=split, content="x") for split in ("train", "val", "test")]
    rows += [row("b.png", split=split, content="y") for split in ("train", "val")]
    assignment = assign_splits(rows, BINARY, Splits(duplicates="drop"))
    aside = {found.path: found.reason for found in assignment.rows if found.reason}
    assert aside == {
        "train/a.png": "is the same image as test/a.png",
        "val/a.png": "is the same image as test/a.png",
        "train/b.png": "is the same image as val/b.png",
    }
    assert {assignment.rows.paths[place] for place in assignment.dropped} == set(aside)
    assert any(note.startswith("3 files are dropped") for note in assignment.notes)


def test_a_val_that_joins_train_may_repeat_its_images() -> None:
    rows = [*many(100), row("v.png", split="val", content="same"), row("t.png", content="same")]
    one, other = assign_splits(rows, BINARY, CARVE).rows[-2:]
    assert one.split == other.split
    assert not one.reason and not other.reason


def test_the_same_image_under_both_labels_is_excluded_on_both_sides() -> None:
    rows = [*many(60), row("a.png", label=0, content="same"), row("b.png", label=1, content="same")]
    aside = [found for found in assign_splits(rows, BINARY, CARVE).rows if found.reason]
    assert [found.path for found in aside] == ["train/a.png", "train/b.png"]
    assert all("under another label" in found.reason for found in aside)


def test_files_excluded_before_stay_so_and_take_no_part() -> None:
    bad = replace(row("bad.png"), sha256="", reason="cannot be read")
    worse = replace(row("worse.png", label=1), sha256="", reason="cannot be read")
    found = assign_splits([*many(60), bad, worse], BINARY, CARVE).rows[-2:]
    assert [(entry.reason, entry.split) for entry in found] == [("cannot be read", "train")] * 2


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(f"{k}.png") for k in range(50)], "train has no usable PNEUMONIA images"),
        ([row(f"{k}.png", label=1) for k in range(50)], "train has no usable NORMAL images"),
        (
            [row("a.png", patient="IM:0115"), row("b.png", label=1, patient="IM:0115")],
            "no image falls into val, since all 2 images are of one patient, .*--labels",
        ),
        (
            [*many(40, split="val"), *[row(f"{k}.png", label=1) for k in range(9)]],
            "train has no usable NORMAL images",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        assign_splits(rows, BINARY, Splits(val_fraction=0.1, test_fraction=0.1))


@pytest.mark.parametrize("val_fraction", [0.1, 0.9])
def test_one_patient_id_for_all_images_is_said_with_what_to_do(val_fraction: float) -> None:
    rows = [row(f"{k}.png", label=k % 2, patient="dicom:0f") for k in range(40)]
    with pytest.raises(SourceError) as caught:
        assign_splits(rows, BINARY, Splits(val_fraction=val_fraction, test_fraction=0.05))
    for words in ("all 40 images", "PatientID", "anonymizing", "column patient", "--labels", "val"):
        assert words in str(caught.value)
    assert "raise" not in str(caught.value)


def test_few_patients_whose_images_all_leave_train_are_counted() -> None:
    rows = [row(f"{k}.png", label=k % 2, patient=f"p:{k % 2}") for k in range(40)]
    with pytest.raises(SourceError, match=r"no \w+ image stays in train: 2 patients are too few"):
        assign_splits(rows, BINARY, Splits(val_fraction=0.9, test_fraction=0.05))


def test_a_patient_of_a_large_share_of_the_images_is_noted() -> None:
    anonymous = [row(f"{k}.png", label=k % 2, patient="dicom:0f") for k in range(60)]
    (note,) = assign_splits([*many(100), *anonymous], BINARY, CARVE).notes
    assert "60 of 160 images are of one patient by their PatientID" in note
    assert assign_splits([*many(200), *anonymous], BINARY, CARVE).notes == ()
    given = [row(f"v{k}.png", label=k % 2, split="val") for k in range(40)]
    given += [row(f"t{k}.png", label=k % 2, split="test") for k in range(40)]
    assert assign_splits([*anonymous, *given], BINARY, CARVE).notes == ()


def in_folders(*folders: str, num: int) -> list[Row]:
    """Images whose patients are unknown, `num` in each folder."""
    return [
        row(f"{folder}/{k}.png", label=int("PNEUMONIA" in folder))
        for folder in folders
        for k in range(num)
    ]


@pytest.mark.parametrize(
    ("folders", "num", "within"),
    [
        (("NORMAL", "PNEUMONIA"), 30, ""),
        ([f"NORMAL/p{k}" for k in range(40)] + ["PNEUMONIA"], 3, "40 folders of several images"),
        (["NORMAL", "PNEUMONIA/images"], 30, ""),
        (["NORMAL/train", "PNEUMONIA/a", *(f"PNEUMONIA/{k}" for k in range(60))], 1, ""),
        (["NORMAL/train", "PNEUMONIA/train/a", "PNEUMONIA"], 15, "a folder of several images"),
    ],
)
def test_carving_without_known_patients_is_noted(
    folders: Sequence[str], num: int, within: str
) -> None:
    rows = [*in_folders(*folders, num=num), *many(9)]
    (note,) = (n for n in assign_splits(rows, BINARY, CARVE).notes if "one by one" in n)
    also = f", also within {within} inside the class folders" if within else ""
    assert note == (
        f"patients are known for 9 of {len(rows)} images, so the other images are carved one by "
        f"one{also}: if some are of one patient, say who is who in the column patient of a table "
        "(--labels FILE.csv)"
    )


def test_carving_where_most_patients_are_known_needs_no_note() -> None:
    unknown = in_folders("NORMAL", "PNEUMONIA", num=30)
    assert assign_splits([*unknown, *many(80)], BINARY, CARVE).notes == ()
    assert assign_splits([*unknown, *many(60)], BINARY, CARVE).notes == ()
    assert assign_splits([*unknown, *many(58)], BINARY, CARVE).notes != ()
    (note,) = assign_splits(unknown, BINARY, Splits(val_fraction=0.2, test_fraction=0)).notes
    assert note.startswith("no patients are known, so val is carved image by image: if some are of")
    given = [row(f"v{k}.png", label=k % 2, split="val") for k in range(40)]
    given += [row(f"t{k}.png", label=k % 2, split="test") for k in range(40)]
    assert assign_splits([*unknown, *given], BINARY, CARVE).notes == ()


@pytest.mark.parametrize("splits", [("test",), ("val", "test"), ("val",)])
def test_a_source_without_train_is_kept_as_it_is_whatever_classes_it_has(
    splits: tuple[str, ...],
) -> None:
    rows = [row(f"{k}.png", label=1, split=splits[k % len(splits)]) for k in range(12)]
    assignment = assign_splits(rows, BINARY, Splits())
    assert ([*assignment.rows], assignment.carved) == (rows, ())
    (note,) = assignment.notes
    assert "to evaluate on alone" in note


def test_a_carved_split_without_one_class_is_noted() -> None:
    rows = [row(f"{k}.png") for k in range(100)]
    train_only = next(k for k in range(1000) if 0.2 < carve_share(f"one:{k}") < 0.8)
    rows.append(row("p.png", label=1, patient=f"one:{train_only}"))
    assert any(
        note.startswith(
            "val was carved from train and holds no PNEUMONIA images: xrai train will refuse this "
            "data set"
        )
        for note in assign_splits(rows, BINARY, CARVE).notes
    )


def test_a_given_val_without_one_class_is_noted_as_training_refuses_it() -> None:
    given = [row(f"{k}.png", label=1, split="val") for k in range(40)]
    (note,) = (n for n in assign_splits([*many(40), *given], BINARY, CARVE).notes if "val" in n)
    assert note.startswith("val holds no NORMAL images: xrai train will refuse this data set")


def test_a_given_test_without_one_class_is_noted() -> None:
    given = [row(f"{k}.png", label=1, split="test") for k in range(5)]
    assigned = assign_splits([*many(40), *given], BINARY, CARVE)
    assert assigned.notes == ("test holds no NORMAL images",)


@pytest.mark.parametrize("num", [10, 100])
def test_two_classes_of_other_names_are_balanced(num: int) -> None:
    free = LabelSpec("binary", ("healthy", "TB"))
    rows = [row(f"{k}.png", label=k % 2, patient=f"p:{k}") for k in range(2 * num)]
    assignment = assign_splits(rows, free, Splits())
    counts = Counter((found.split, found.label) for found in assignment.rows)
    assert {split: (counts[split, 0], counts[split, 1]) for split in ("train", "val", "test")} == {
        "train": (num * 8 // 10,) * 2,
        "val": (num // 10,) * 2,
        "test": (num // 10,) * 2,
    }
    assert assignment.notes == ()
    told = "val and test are carved by patient, balanced for every class"
    assert assignment.facts == (told,)  # and none is farthest
    assert find_split_faults(assignment.rows, assignment.carved, Splits(), free) == []


def test_a_split_that_is_far_from_balanced_is_a_note() -> None:
    three = LabelSpec("multiclass", ("A", "B", "C"))
    rows = [row(f"{k}.png", label=min(k % 7, 2), patient=f"p:{k // 9}") for k in range(90)]
    assignment = assign_splits(rows, three, Splits())
    assert assignment.facts == () and "farthest from train is " in assignment.notes[-1]


# ---------------------------------------------------------------------------------- for xrai.verify


@given(pairs=patients)
def test_what_was_assigned_breaks_no_rule(pairs: list[tuple[int, int]]) -> None:
    assignment = assign_splits(rows_of(pairs), BINARY, CARVE)
    assert find_split_faults(assignment.rows, assignment.carved, CARVE, BINARY) == []


def test_each_broken_rule_is_named() -> None:
    rows = many(100, images_each=2)
    assignment = assign_splits(rows, BINARY, CARVE)
    moved = list(assignment.rows)
    place = next(k for k, found in enumerate(moved) if found.split == "val")
    moved[place] = replace(moved[place], split="train")
    faults = find_split_faults(moved, assignment.carved, CARVE, BINARY)
    assert any(moved[place].patient in fault and "in two splits" in fault for fault in faults)
    assert any(moved[place].path in fault and "hash says val" in fault for fault in faults)
    given_splits = [*many(40), *many(40, split="test", prefix="t")]
    copied = replace(given_splits[0], path="test/x.png", split="test")
    assert any(
        "are the same image" in fault
        for fault in find_split_faults([*given_splits, copied], (), CARVE, BINARY)
    )
