"""The data card: what a data set holds, for people who have to trust it: Markdown, and sheets of
pictures beside it.

Rooms do not know each other, so the command passes what draws (`xrai.results.plots`).
"""

import csv
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.manifest import CLASSES, Row
from xrai.dataset.shards import REPORT_PREFIX, DatasetIndex, open_shard
from xrai.ingest.build import NearDuplicate
from xrai.ingest.layout import is_file_patient
from xrai.store import Store

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

_SAMPLES = 12  # pictures of each class
_PAIRS = 6  # near-duplicates on the sheet
_SHOWN = 50  # rows of a table

DrawSheet = Callable[..., None]  # (images (H, W) uint8, titles, path, *, heading, note, is_phantom)
DrawCounts = Callable[..., None]  # ({split: {class: number}}, path, *, heading, is_phantom)


def make_report(
    store: Store,
    index: DatasetIndex,
    rows: Sequence[Row],
    near: Sequence[NearDuplicate],
    *,
    notes: Sequence[str],
    draw_sheet: DrawSheet,
    draw_counts: DrawCounts,
) -> dict[str, bytes]:
    """The report's files by key. Pictures come from the stored shards; `notes` are the plan's."""
    phantom = is_phantom(rows)
    files: dict[str, bytes] = {}
    sheets: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
        path = Path(folder) / "sheet.png"
        train = [row for row in rows if row.split == "train" and row.shard is not None]

        def keep(name: str, caption: str) -> None:
            files[REPORT_PREFIX + name] = path.read_bytes()
            sheets.append((caption, name))

        for label, class_name in enumerate(index.classes):
            of_class = (row for row in train if row.label == label)
            samples = nsmallest(
                _SAMPLES, of_class, key=_by_place
            )  # of the first shard, if it has as many
            caption = f"Samples of train: {class_name}"
            pictures = _read_pictures(store, samples)
            draw_sheet(
                pictures, [_name(row) for row in samples], path, heading=caption, is_phantom=phantom
            )
            keep(f"samples-{class_name.lower()}.png", caption)
        counts = {split: index.num_images_per_class(split) for split in index.splits}
        draw_counts(counts, path, heading="Images by split and class", is_phantom=phantom)
        keep("class-counts.png", "Images by split and class")
        if near:
            shown = [row for pair in near[:_PAIRS] for row in (pair.one, pair.other)]
            titles = [f"{row.split}: {_name(row)}" for row in shown]
            caption = "Near-duplicates in two splits, the nearest"
            note = f"{len(near)} pairs in all"
            draw_sheet(
                _read_pictures(store, shown),
                titles,
                path,
                heading=caption,
                note=note,
                is_phantom=phantom,
            )
            keep("near-duplicates.png", caption)
            files[f"{REPORT_PREFIX}near-duplicates.csv"] = _write_near(near)
    files[f"{REPORT_PREFIX}card.md"] = write_card(
        index, rows, near, notes=notes, sheets=sheets
    ).encode()
    return files


def is_phantom(rows: Sequence[Row]) -> bool:
    """Whether the images are drawn ones: `xrai.phantom` begins their names so."""
    return bool(rows) and all(_name(row).startswith("phantom-") for row in rows)


def write_card(
    index: DatasetIndex,
    rows: Sequence[Row],
    near: Sequence[NearDuplicate],
    *,
    notes: Sequence[str],
    sheets: Sequence[tuple[str, str]],
) -> str:
    """The card's text. `sheets` are (caption, file name) of pictures beside it; `notes` are
    sentences of the plan.
    """
    counts = index.counts
    used = [row for row in rows if not row.reason]
    config = index.config["images"]
    lines = [
        f"# Data set {index.fingerprint[:16]}",
        "",
        *(
            ["**Drawn phantoms, not patients.** For trying the program out and for tests.", ""]
            * is_phantom(rows)
        ),
        f"Source: {_text(index.source)}. {counts.num_found} files found = {counts.num_written} written + "
        f"{counts.num_set_aside} set aside; {counts.num_not_data} more are not data.",
        f"Pictures: {index.image_size} x {index.image_size} grey levels of 8 bits, fitted by `{config['fit']}`; mean "
        f"of train {index.pixel_mean:.1f}, standard deviation {index.pixel_std:.1f}.",
        "",
        "## Splits",
        "",
        "| split | " + " | ".join(index.classes) + " | patients | images a patient, most | from |",
        "|---|" + "---|" * (len(index.classes) + 3),
    ]
    for split in index.splits:
        patients = Counter(row.patient for row in used if row.split == split)
        origin = "carved from train, by patient" if split in index.carved else "the source"
        numbers = " | ".join(str(number) for number in index.num_images_per_class(split).values())
        lines.append(
            f"| {split} | {numbers} | {len(patients)} | {max(patients.values())} | {origin} |"
        )
    subtypes = Counter(row.subtype for row in used if row.subtype)
    if subtypes:
        named = ", ".join(f"{count} {name}" for name, count in sorted(subtypes.items()))
        lines += ["", f"Kinds of pneumonia that file names or labels state: {named}."]
    num_named = sum(not is_file_patient(row.patient) for row in used)
    lines += [
        "",
        f"Patients are known for {num_named} of {len(used)} images, by file name, labels or DICOM header; every other "
        "file counts as a patient of its own.",
        *(f"Note: {_text(note)}." for note in notes),
    ]
    for caption, name in sheets:
        lines += ["", f"## {caption}", "", f"![{caption}]({name})"]
    lines += ["", "## Near-duplicates", ""]
    pairs = [
        f"| {pair.distance} | {pair.one.split}: {_text(pair.one.path)} | {pair.other.split}: {_text(pair.other.path)} |"
        for pair in near
    ]
    lines += _table(
        "| bits of 256 that differ | image | image |", pairs, rest="near-duplicates.csv"
    )
    lines += ["", "## Files set aside", ""]
    aside = [f"| {_text(row.path)} | {_text(row.reason)} |" for row in rows if row.reason]
    lines += _table("| file | reason |", aside, rest="../manifest.jsonl")
    return "\n".join(lines) + "\n"


def _table(head: str, lines: Sequence[str], *, rest: str) -> list[str]:
    if not lines:
        return ["None."]
    more = ["", f"… and {len(lines) - _SHOWN} more, in {rest}."] if len(lines) > _SHOWN else []
    return [head, "|" + "---|" * (head.count("|") - 1), *lines[:_SHOWN], *more]


def _text(text: str) -> str:
    """Text from outside as one line of Markdown that cannot be anything but text."""
    plain = "".join(character if character.isprintable() else "\ufffd" for character in text)
    for special in "\\`*_{}[]<>()#+!|":
        plain = plain.replace(special, "\\" + special)
    return plain


def _write_near(near: Sequence[NearDuplicate]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["distance", "split", "path", "other_split", "other_path"])
    for pair in near:
        writer.writerow(
            [pair.distance, pair.one.split, pair.one.path, pair.other.split, pair.other.path]
        )
    return text.getvalue().encode()


def _by_place(row: Row) -> tuple[str, int]:
    return row.shard or "", row.row or 0


def _read_pictures(store: Store, rows: Sequence[Row]) -> list[NDArray[np.uint8]]:
    """The stored pictures (H, W) of a few rows; each shard is fetched once."""
    pictures: dict[str, NDArray[np.uint8]] = {}
    for name in sorted({row.shard for row in rows if row.shard is not None}):
        with store.as_file(name) as path:
            images = open_shard(path).images
            pictures.update((row.path, images[row.row].copy()) for row in rows if row.shard == name)
    return [pictures[row.path] for row in rows]


def _name(row: Row) -> str:
    return row.path.rpartition("/")[2]
