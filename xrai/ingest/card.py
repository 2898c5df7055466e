"""The data card: what a data set holds, for people who rely on it. Markdown and sheets of images.

Rooms do not import each other, so the commands pass in what draws (`xrai.results.sheets`).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.manifest import CLASSES, Row
from xrai.dataset.shards import REPORT_PREFIX, open_shard
from xrai.files import temporary_folder
from xrai.ingest.build import Contents, NearDuplicate
from xrai.ingest.layout import is_file_patient
from xrai.log import printable
from xrai.store import Store
from xrai.tables import to_csv

REPORT_KEYS: Final = tuple(
    REPORT_PREFIX + name
    for name in (
        "card.md",
        *(f"samples-{class_name.lower()}.png" for class_name in CLASSES),
        "class-counts.png",
        "near-duplicates.png",
        "near-duplicates.csv",
    )
)

_SAMPLES = 12  # images of each class
_PAIRS = 6  # near-duplicates on the sheet
_SHOWN = 50  # rows of a table

DrawSheet = Callable[..., None]  # (images (H, W) uint8, titles, path, *, heading, note)
DrawCounts = Callable[..., None]  # ({split: {class: number}}, path, *, heading, note)


def make_report(
    store: Store, contents: Contents, *, draw_sheet: DrawSheet, draw_counts: DrawCounts
) -> dict[str, bytes]:
    """The report's files by key. Images come from the stored shards."""
    index, near = contents.index, contents.near
    split = next(iter(index.splits))  # train, if there is one
    rows = [row for row in contents.rows if row.split == split and row.shard is not None]
    files: dict[str, bytes] = {}
    sheets: list[tuple[str, str]] = []
    warning = "drawn phantoms, not patients" if is_phantom(contents.rows) else ""

    def add(
        name: str, heading: str, draw: Callable[..., None], *content: object, note: str = ""
    ) -> None:
        with temporary_folder() as folder:
            path = Path(folder) / name
            draw(*content, path, heading=heading, note=" · ".join(filter(None, [note, warning])))
            files[REPORT_PREFIX + name] = path.read_bytes()
        sheets.append((heading, name))

    for label, class_name in enumerate(index.classes):
        # From the first shard alone, if it holds enough
        samples = nsmallest(_SAMPLES, (row for row in rows if row.label == label), key=_by_place)
        images, titles = _read_images(store, index.place, samples), [_name(row) for row in samples]
        name, heading = f"samples-{class_name.lower()}.png", f"Samples of {split}: {class_name}"
        if samples:
            add(name, heading, draw_sheet, images, titles)
    counts = {split: index.num_images_per_class(split) for split in index.splits}
    add("class-counts.png", "Images by split and class", draw_counts, counts)
    if near:
        shown = [row for pair in near[:_PAIRS] for row in (pair.one, pair.other)]
        titles = [f"{row.split}: {_name(row)}" for row in shown]
        heading, note = "Near-duplicates in two splits, the nearest", f"{len(near)} pairs in all"
        images = _read_images(store, index.place, shown)
        add("near-duplicates.png", heading, draw_sheet, images, titles, note=note)
        files[f"{REPORT_PREFIX}near-duplicates.csv"] = _write_near(near)
    files[f"{REPORT_PREFIX}card.md"] = write_card(contents, sheets=sheets).encode()
    return files


def is_phantom(rows: Sequence[Row]) -> bool:
    """Whether the images are drawn ones: `xrai.phantom` begins their names so."""
    return bool(rows) and all(_name(row).startswith("phantom-") for row in rows)


def write_card(contents: Contents, *, sheets: Sequence[tuple[str, str]]) -> str:
    """The card's text. `sheets` are (caption, file name) of images beside it."""
    index, counts, rows = contents.index, contents.index.counts, contents.rows
    used = [row for row in rows if not row.reason]
    num_named = sum(not is_file_patient(row.patient) for row in used)
    measured = "train" if "train" in index.splits else "all"
    drawn = "**Drawn phantoms, not patients.** For trying the program out and for tests."
    lines = [
        f"# Data set {index.fingerprint[:16]}",
        "",
        *([drawn, ""] if is_phantom(rows) else []),
        f"Source: {_text(index.source)}. {counts.num_found} files found = {counts.num_written} "
        f"written + {counts.num_set_aside} excluded; {counts.num_not_data} more are not data.",
        f"Images: {index.image_size} x {index.image_size} grey levels of 8 bits, fitted by "
        f"`{index.config['images']['fit']}`; mean of {measured} {index.pixel_mean:.1f}, standard "
        f"deviation {index.pixel_std:.1f}.",
        "",
        *_splits(contents, used),
        "",
        f"Patients are known for {num_named} of {len(used)} images, by file name, labels or DICOM "
        "header; every other file counts as a patient of its own.",
        *(f"Note: {_text(note)}." for note in contents.notes),
    ]
    for caption, name in sheets:
        lines += ["", f"## {caption}", "", f"![{caption}]({name})"]
    pairs = [
        f"| {pair.distance} | {pair.one.split}: {_text(pair.one.path)} "
        f"| {pair.other.split}: {_text(pair.other.path)} |"
        for pair in contents.near
    ]
    head = "| bits of 256 that differ | image | image |"
    lines += ["", "## Near-duplicates", "", *_table(head, pairs, rest="near-duplicates.csv")]
    excluded = [f"| {_text(row.path)} | {_text(row.reason)} |" for row in rows if row.reason]
    table = _table("| file | reason |", excluded, rest="../manifest.jsonl")
    return "\n".join([*lines, "", "## Excluded files", "", *table]) + "\n"


def _splits(contents: Contents, used: Sequence[Row]) -> list[str]:
    index = contents.index
    classes = " | ".join(index.classes)
    lines = [
        "## Splits",
        "",
        f"| split | {classes} | patients | images per patient, most | from |",
        "|---|" + "---|" * (len(index.classes) + 3),
    ]
    for split in index.splits:
        patients = Counter(row.patient for row in used if row.split == split)
        origin = "carved from train, by patient" if split in index.carved else "the source"
        numbers = " | ".join(str(number) for number in index.num_images_per_class(split).values())
        most = max(patients.values())
        lines.append(f"| {split} | {numbers} | {len(patients)} | {most} | {origin} |")
    subtypes = Counter(row.subtype for row in used if row.subtype)
    if subtypes:
        named = ", ".join(f"{count} {name}" for name, count in sorted(subtypes.items()))
        lines += ["", f"Kinds of pneumonia that file names or labels state: {named}."]
    return lines


def _table(head: str, lines: Sequence[str], *, rest: str) -> list[str]:
    if not lines:
        return ["None."]
    more = ["", f"… and {len(lines) - _SHOWN} more, in {rest}."] if len(lines) > _SHOWN else []
    return [head, "|" + "---|" * (head.count("|") - 1), *lines[:_SHOWN], *more]


def _text(text: str) -> str:
    """Text from outside as one line of Markdown that cannot be anything but text."""
    plain = printable(text)
    return re.sub(r"([\\`*_{}\[\]<>()#+!|])", r"\\\1", plain)


def _write_near(near: Sequence[NearDuplicate]) -> bytes:
    rows = [
        {
            "distance": pair.distance,
            "split": pair.one.split,
            "path": pair.one.path,
            "other_split": pair.other.split,
            "other_path": pair.other.path,
        }
        for pair in near
    ]
    columns = ("distance", "split", "path", "other_split", "other_path")
    return to_csv(columns, rows).encode()


def _by_place(row: Row) -> tuple[str, int]:
    return row.shard or "", row.row or 0


def _read_images(store: Store, place: str, rows: Sequence[Row]) -> list[NDArray[np.uint8]]:
    """The stored images (H, W) of a few rows; each shard is fetched once."""
    found: dict[str, NDArray[np.uint8]] = {}
    for name in sorted({row.shard for row in rows if row.shard is not None}):
        with store.as_file(place + name) as path:
            images = open_shard(path).images
            found.update((row.path, images[row.row].copy()) for row in rows if row.shard == name)
    return [found[row.path] for row in rows]


def _name(row: Row) -> str:
    return row.path.rpartition("/")[2]
