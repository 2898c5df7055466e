import csv
import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xrai.dataset.manifest import Row
from xrai.dataset.rows import Rows
from xrai.dataset.shards import Columns, Counts, DatasetIndex, ShardInfo, shard_name, write_shard
from xrai.ingest.build import Contents, NearDuplicate
from xrai.ingest.card import _sheet_names, is_phantom, is_report_key, make_report, write_card
from xrai.labels import LabelSpec
from xrai.store import Store, open_store

BINARY = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))


def row(
    path: str,
    *,
    label: int = 0,
    split: str = "train",
    place: int = 0,
    reason: str = "",
    **more: str,
) -> Row:
    sha256 = hashlib.sha256(path.encode()).hexdigest()
    values = {"patient": f"file:{path}", "subtype": "", **more}
    shard, number = (None, None) if reason else (shard_name(split, 0, 1), place)
    return Row(
        path, sha256, label, values["patient"], values["subtype"], split, shard, number, reason
    )


ROWS = [
    row("train/NORMAL/IM-1-1.png", place=0, patient="IM:1"),
    row("train/NORMAL/IM-1-2.png", place=1, patient="IM:1"),
    row("train/PNEUMONIA/p.png", label=1, place=2, subtype="viral"),
    row("val/NORMAL/v.png", split="val", place=0),
    row("val/PNEUMONIA/w.png", label=1, split="val", place=1, subtype="viral"),
    row("train/NORMAL/bad.png", reason="is empty (0 bytes)"),
]


def index_of(rows: list[Row], **changes: object) -> DatasetIndex:
    splits = {}
    for split in ("train", "val"):
        labels = [found.label for found in rows if found.split == split and not found.reason]
        info = ShardInfo(
            shard_name(split, 0, 1), len(labels), 1, "ab" * 32, (labels.count(0), labels.count(1))
        )
        splits[split] = (info,)
    num_aside = sum(bool(found.reason) for found in rows)
    values: dict[str, object] = {
        "classes": ("NORMAL", "PNEUMONIA"),
        "image_size": 8,
        "splits": splits,
        "carved": ("val",),
        "pixel_mean": 100.04,
        "pixel_std": 50.0,
        "source": "chest",
        "plan_sha256": "00",
        "counts": Counts(len(rows), len(rows) - num_aside, num_aside, 3),
        "objects": (),
        "config": {"images": {"fit": "crop"}},
        "tool_version": "0",
    }
    return DatasetIndex(**{**values, **changes})  # type: ignore[arg-type]


def card(rows: list[Row] = ROWS, near: list[NearDuplicate] | None = None, **changes: object) -> str:
    contents = Contents(index_of(rows, **changes), Rows.of(rows, BINARY), near or [], ["a note"])
    return write_card(contents, sheets=[("Samples", "s.png")])


def test_the_card_says_the_numbers_that_a_reader_needs() -> None:
    text = card()
    assert "6 files found = 5 written + 1 excluded; 3 more are not data." in text
    assert (
        "8 x 8 grey levels of 8 bits, fitted by `crop`; mean of train 100.0, standard deviation "
        "50.0" in text
    )
    assert "| train | 2 | 1 | 2 | 2 | the source |" in text
    assert "| val | 1 | 1 | 2 | 1 | carved from train, by patient |" in text
    assert "Kinds of pneumonia that file names or labels state: 2 viral." in text
    assert "Patients are known for 2 of 5 images, by file name, labels or DICOM header" in text
    assert "Note: a note." in text and "![Samples](s.png)" in text
    assert "| train/NORMAL/bad.png | is empty \\(0 bytes\\) |" in text


def test_a_card_says_where_no_patients_are_known() -> None:
    text = card([*ROWS[2:], row("train/NORMAL/a.png", place=0)])
    assert "| carved from train, by image, because no patients are known |" in text
    assert "Patients are known for 0 of 4 images" in text


def test_subtypes_of_other_classes_are_no_pneumonia() -> None:
    text = card(classes=("normal", "tuberculosis"))
    assert "Subtypes that file names or labels state: 2 viral." in text
    assert "Kinds of pneumonia" not in text


def test_a_card_without_bad_files_says_so() -> None:
    assert card(ROWS[:-1]).rstrip().endswith("## Excluded files\n\nNone.")


@pytest.mark.parametrize(
    "name",
    ["a|b`c.png", "<script>alert(1)</script>.png", "[x](http://evil).png", "a\nb\x1b[31m.png"],
)
def test_text_from_outside_stays_text(name: str) -> None:
    text = card([*ROWS, row(f"train/NORMAL/{name}", reason="is bad")], source=name)
    assert name not in text
    assert "\x1b" not in text
    (line,) = [line for line in text.splitlines() if "is bad" in line]
    unescaped = re.sub(r"\\.", "", line)
    assert unescaped.count("|") == 3  # one row of the table, of two cells
    assert not set(unescaped) & set("<>[]`*_")


def test_a_long_list_is_cut_and_says_where_the_rest_is() -> None:
    bad = [row(f"train/NORMAL/bad{k}.png", reason="is empty (0 bytes)") for k in range(60)]
    text = card([*ROWS, *bad])
    assert text.count("is empty") == 50
    assert "… and 11 more, in ../manifest.jsonl." in text


def test_phantoms_are_said_to_be_phantoms_and_patients_are_not() -> None:
    phantoms = [f"train/NORMAL/phantom-IM-{k}-0.png" for k in range(3)]
    assert is_phantom(phantoms) and not is_phantom([*phantoms, ROWS[0].path]) and not is_phantom([])
    assert "phantoms" not in card()


# --------------------------------------------------------------------------------- the whole report


class Drawn:
    """Stands in for what draws, and keeps what it was asked."""

    def __init__(self) -> None:
        self.sheets: list[tuple[str, list[np.ndarray], list[str]]] = []
        self.counts: list[dict[str, dict[str, int]]] = []

    def sheet(
        self, images: list[np.ndarray], titles: list[str], path: Path, *, heading: str, **_: object
    ) -> None:
        assert len(images) == len(titles)
        self.sheets.append((heading, images, titles))
        path.write_bytes(heading.encode())

    def count(self, counts: dict[str, dict[str, int]], path: Path, **_: object) -> None:
        self.counts.append(counts)
        path.write_bytes(b"counts")


def stored(folder: Path, rows: list[Row]) -> Store:
    """Shards whose pictures hold their place, at (train) 10 and up or (val) 100 and up."""
    for split, start in (("train", 10), ("val", 100)):
        here = [found for found in rows if found.split == split and not found.reason]
        images = (
            np.zeros((len(here), 8, 8), np.uint8)
            + np.arange(start, start + len(here), dtype=np.uint8)[:, None, None]
        )
        write_shard(
            folder / shard_name(split, 0, 1),
            Columns(
                images=images,
                labels=np.array([found.label for found in here], np.uint8),
                source=[found.path for found in here],
                patient=[found.patient for found in here],
                subtype=[found.subtype for found in here],
                sha256=[found.sha256 for found in here],
                width=[8] * len(here),
                height=[8] * len(here),
            ),
        )
    return open_store(str(folder))


@pytest.mark.parametrize("is_remote", [False, True])
def test_the_sheets_show_the_stored_images_under_their_names(
    tmp_path: Path, is_remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, drawn = stored(tmp_path, ROWS), Drawn()
    if is_remote:
        monkeypatch.setattr(type(store), "local_path", lambda self, key: None)
    near = [NearDuplicate(3, ROWS[0], ROWS[3])]
    contents = Contents(index_of(ROWS), Rows.of(ROWS, BINARY), near, [])
    files = make_report(store, contents, draw_sheet=drawn.sheet, draw_counts=drawn.count)
    names = ["card.md", "samples-normal.png", "samples-pneumonia.png", "class-counts.png"]
    names += ["near-duplicates.png", "near-duplicates.csv"]
    assert set(files) == {f"report/{name}" for name in names}
    assert all(map(is_report_key, files)) and not is_report_key("report/mine.png")
    by_heading = {heading: (images, titles) for heading, images, titles in drawn.sheets}
    images, titles = by_heading["Samples of train: NORMAL"]
    assert titles == ["IM-1-1.png", "IM-1-2.png"] and [int(image[0, 0]) for image in images] == [
        10,
        11,
    ]
    images, titles = by_heading["Near-duplicates in two splits, the nearest"]
    assert titles == ["train: IM-1-1.png", "val: v.png"] and [
        int(image[0, 0]) for image in images
    ] == [10, 100]
    assert drawn.counts == [
        {"train": {"NORMAL": 2, "PNEUMONIA": 1}, "val": {"NORMAL": 1, "PNEUMONIA": 1}}
    ]
    table = list(csv.DictReader(io.StringIO(files["report/near-duplicates.csv"].decode())))
    assert table == [
        {
            "distance": "3",
            "split": "train",
            "path": ROWS[0].path,
            "other_split": "val",
            "other_path": ROWS[3].path,
        }
    ]
    assert "near-duplicates.png" in files["report/card.md"].decode()


def test_samples_come_from_later_shards_where_the_first_has_too_few(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    stored(one, ROWS)
    stored(two, ROWS)
    names = [shard_name("train", number, 2) for number in (0, 1)]
    for folder, name in ((one, names[0]), (two, names[1])):
        (folder / shard_name("train", 0, 1)).rename(tmp_path / name)
    (one / shard_name("val", 0, 1)).rename(tmp_path / shard_name("val", 0, 1))
    train = [found for found in ROWS if found.shard == shard_name("train", 0, 1)]
    rows = [
        *(replace(found, shard=names[0]) for found in train if found.label == 0),
        *(replace(found, shard=names[1]) for found in train),
        *(found for found in ROWS if found.split == "val"),
    ]
    drawn = Drawn()
    contents = Contents(index_of(ROWS), Rows.of(rows, BINARY), [], [])
    store = open_store(str(tmp_path))
    make_report(store, contents, draw_sheet=drawn.sheet, draw_counts=drawn.count)
    assert [titles for _, _, titles in drawn.sheets] == [
        ["IM-1-1.png", "IM-1-2.png"] * 2,
        ["p.png"],
    ]


def test_a_card_of_findings_shows_shares_unknown_ones_and_what_occurs_together() -> None:
    labels = [(1, 1), (1, 0), (0, -1), (0, 0)]
    rows = [
        Row(f"{k}.png", f"{k:064x}", label, f"p:{k}", "", "train", "train-00000-of-00001.h5", k)
        for k, label in enumerate(labels)
    ]
    info = ShardInfo("train-00000-of-00001.h5", 4, 1, "ab" * 32, (2, 1), (0, 1))
    changes = {"task": "multilabel", "classes": ("Effusion", "A/B"), "splits": {"train": (info,)}}
    index = replace(index_of(ROWS), **changes)  # type: ignore[arg-type]
    card = write_card(Contents(index, Rows.of(rows, index.labels), [], []), sheets=[])
    assert "| train | 4 | 4 | 1 | the source |" in card
    assert "| Effusion | 2 (50.0 %) | 0 |" in card and "| A/B | 1 (33.3 %) | 1 |" in card
    assert "| 1 | Effusion | 2 | 1 |" in card and "| 2 | A/B | 1 | 1 |" in card


def test_sheets_of_any_class_names_have_their_own_files() -> None:
    assert _sheet_names(("A/B", "a b", "肺炎", "NORMAL")) == [
        "samples-a-b.png",
        "samples-a-b-1.png",
        "samples--2.png",
        "samples-normal.png",
    ]
