"""The data card: what a data set holds, for people who rely on it. Markdown and sheets of images.

This package must not import `xrai.results`, so the commands pass in its functions that draw.
"""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.manifest import Row
from xrai.dataset.rows import Rows
from xrai.dataset.shards import REPORT_PREFIX, DatasetIndex, open_shard
from xrai.files import temporary_folder
from xrai.ingest.build import Contents, NearDuplicate
from xrai.ingest.splits import num_named
from xrai.labels import Labels, LabelSpec
from xrai.log import counted, printable
from xrai.store import Store
from xrai.tables import to_csv

_REPORT_KEY = re.compile(
    rf"{REPORT_PREFIX}(card\.md|samples-[^/]+\.png|class-counts\.png|near-duplicates\.(png|csv))"
)
_SAMPLES = 12  # images of each class
_FEW_SAMPLES = 6  # where there are more than three classes, or findings
_SHEETS = 20  # of samples, at most
_CROSSED = 20  # findings in the table of those that occur together
_PAIRS = 6  # near-duplicates on the sheet
_SHOWN = 50  # rows of a table
_AT_A_TIME = 1 << 16  # images counted

DrawSheet = Callable[..., None]  # (images (H, W) uint8, titles, path, *, heading, note)
DrawCounts = Callable[..., None]  # ({split: {class: number}}, path, *, heading, note, num_images)


def is_report_key(key: str) -> bool:
    """Whether a key is that of a file of the report."""
    return _REPORT_KEY.fullmatch(key) is not None


def make_report(
    store: Store, contents: Contents, *, draw_sheet: DrawSheet, draw_counts: DrawCounts
) -> dict[str, bytes]:
    """The report's files by key. Images come from the stored shards."""
    index, near = contents.index, contents.near
    split = next(iter(index.splits))  # train, if there is one
    rows = contents.rows
    files: dict[str, bytes] = {}
    sheets: list[tuple[str, str]] = []
    warning = "drawn phantoms, not patients" if is_phantom(rows.paths) else ""

    def add(
        name: str,
        heading: str,
        draw: Callable[..., None],
        *content: object,
        note: str = "",
        **options: object,
    ) -> None:
        with temporary_folder() as folder:
            path = Path(folder) / name
            words = " · ".join(filter(None, [note, warning]))
            draw(*content, path, heading=heading, note=words, **options)
            files[REPORT_PREFIX + name] = path.read_bytes()
        sheets.append((heading, name))

    num_samples = _SAMPLES if len(index.classes) <= 3 else _FEW_SAMPLES
    names = _sheet_names(index.classes)
    for label, class_name in [*enumerate(index.classes)][:_SHEETS]:
        # From the first shard alone, if it holds enough
        samples = _first_stored(
            rows, rows.splits.are(split) & _show(rows.labels, label), num_samples
        )
        images, titles = _read_images(store, index.place, samples), [_name(row) for row in samples]
        if samples:
            heading = f"Samples of {split}: {printable(class_name)}"
            add(names[label], heading, draw_sheet, images, titles)
    counts = {split: index.num_images_per_class(split) for split in index.splits}
    if index.task == "multilabel":
        totals = {split: index.num_images(split) for split in index.splits}
        heading = "Images by split and finding"
        add("class-counts.png", heading, draw_counts, counts, num_images=totals)
    else:
        add("class-counts.png", "Images by split and class", draw_counts, counts)
    if near:
        pairs = [row for pair in near[:_PAIRS] for row in (pair.one, pair.other)]
        titles = [f"{row.split}: {_name(row)}" for row in pairs]
        heading = "Near-duplicates in two splits, the nearest"
        note = f"{counted(len(near), 'pair')} in all"
        images = _read_images(store, index.place, pairs)
        add("near-duplicates.png", heading, draw_sheet, images, titles, note=note)
        files[f"{REPORT_PREFIX}near-duplicates.csv"] = _write_near(near)
    files[f"{REPORT_PREFIX}card.md"] = write_card(contents, sheets=sheets).encode()
    return files


def is_phantom(paths: Collection[str]) -> bool:
    """Whether the images are drawn ones: `xrai.phantom` begins their names so."""
    names = (path.rpartition("/")[2] for path in paths)
    return len(paths) > 0 and all(name.startswith("phantom-") for name in names)


def write_card(contents: Contents, *, sheets: Sequence[tuple[str, str]]) -> str:
    """The card's text, Markdown. `sheets` are (caption, file name) of images in its folder."""
    index, counts, rows = contents.index, contents.index.counts, contents.rows
    used = rows.is_used
    num_used = int(used.sum())
    measured = "train" if "train" in index.splits else "all"
    drawn = "**Drawn phantoms, not patients.** For trying the program out and for tests."
    lines = [
        f"# Data set {index.fingerprint[:16]}",
        "",
        *([drawn, ""] if is_phantom(rows.paths) else []),
        f"Source: {_text(index.source)}. {counted(counts.num_found, 'file')} found = "
        f"{counts.num_written} written + {counts.num_set_aside} excluded; "
        f"{counts.num_not_data} more are not data.",
        f"Images: {index.image_size} x {index.image_size} grey levels of 8 bits, fitted by "
        f"`{index.config['images']['fit']}`; mean of {measured} {index.pixel_mean:.1f}, standard "
        f"deviation {index.pixel_std:.1f}.",
        "",
        *_splits(contents, used),
        "",
        f"Patients are known for {num_named(rows, used)} of {counted(num_used, 'image')}, by file "
        "name, labels or DICOM header; every other file counts as a patient of its own.",
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
    excluded = [
        f"| {_text(rows.paths[place])} | {_text(rows.reasons[place])} |"
        for place in sorted(rows.reasons)
    ]
    table = _table("| file | reason |", excluded, rest="../manifest.jsonl")
    return "\n".join([*lines, "", "## Excluded files", "", *table]) + "\n"


def _sheet_names(classes: Sequence[str]) -> list[str]:
    """The file of samples of each class; no two have the same name."""
    names: list[str] = []
    for number, name in enumerate(classes):
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
        file = f"samples-{plain}.png"
        names.append(file if plain and file not in names else f"samples-{plain}-{number}.png")
    return names


def _show(labels: Labels, place: int) -> NDArray[np.bool_]:
    """(N,), which images are of the class, or show the finding, at a place among the names."""
    found: NDArray[np.bool_] = labels[:, place] == 1 if labels.ndim == 2 else labels == place
    return found


def _first_stored(rows: Rows, among: NDArray[np.bool_], num: int) -> list[Row]:
    """The first `num` images of `among` that are in shards, in the order of these."""
    places = np.flatnonzero(among & (rows.places >= 0))
    names = rows.shards.values
    ranks = np.argsort(np.argsort(np.array(names)))  # shards by name
    keys = (ranks[rows.shards.codes[places]] << 32) + rows.places[places]
    if len(keys) > num:
        nearest = np.argpartition(keys, num)[:num]
        places, keys = places[nearest], keys[nearest]
    return [rows[place] for place in places[np.argsort(keys)].tolist()]


def _count_patients(rows: Rows, among: NDArray[np.bool_]) -> tuple[int, int]:
    """Patients of the images of `among`, and the most images of one of them."""
    codes = rows.patients.codes[among]
    counts = np.bincount(codes[codes >= 0], minlength=1)
    num_own = int((codes < 0).sum())  # of one file each
    return int((counts > 0).sum()) + num_own, max(int(counts.max()), min(num_own, 1))


def _splits(contents: Contents, used: NDArray[np.bool_]) -> list[str]:
    index, rows = contents.index, contents.rows
    is_wide = index.task != "binary"  # classes and findings have a table of their own then
    names = ["images"] if is_wide else [_text(name) for name in index.classes]
    lines = [
        "## Splits",
        "",
        f"| split | {' | '.join(names)} | patients | images per patient, most | from |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    divided = used & rows.splits.are("train", *index.carved)
    by = "patient" if num_named(rows, divided) else "image, because no patients are known"
    for split in index.splits:
        num_patients, most = _count_patients(rows, used & rows.splits.are(split))
        origin = f"carved from train, by {by}" if split in index.carved else "the source"
        counts = index.num_images_per_class(split).values()
        numbers = " | ".join(map(str, [index.num_images(split)] if is_wide else counts))
        lines.append(f"| {split} | {numbers} | {num_patients} | {most} | {origin} |")
    counts_of = np.bincount(rows.subtypes.codes[used], minlength=len(rows.subtypes.values))
    subtypes = {
        name: count
        for name, count in zip(rows.subtypes.values, counts_of.tolist(), strict=True)
        if name and count
    }
    if subtypes:
        named = ", ".join(f"{count} {name}" for name, count in sorted(subtypes.items()))
        noun = "Kinds of pneumonia" if index.labels.is_public else "Subtypes"
        lines += ["", f"{noun} that file names or labels state: {named}."]
    if is_wide:
        lines += ["", *_shares_by_split(index)]
    if index.task == "multilabel":
        lines += ["", *_together(index.labels, rows.labels[used])]
    return lines


def _shares_by_split(index: DatasetIndex) -> list[str]:
    """A table of images of each class, or with each finding, by split, and their share."""
    is_multilabel = index.task == "multilabel"
    heads = [f"{split} | {split}, unknown" if is_multilabel else split for split in index.splits]
    head = f"| {'finding' if is_multilabel else 'class'} | {' | '.join(heads)} |"
    lines = ["## Findings" if is_multilabel else "## Classes", ""]
    if is_multilabel:
        lines += ["Images with the finding, and their share of those where it is known.", ""]
    lines += [head, "|" + "---|" * (head.count("|") - 1)]
    for name in index.classes:
        cells = []
        for split in index.splits:
            num, known = (
                index.num_images_per_class(split)[name],
                index.num_known_per_class(split)[name],
            )
            cells.append(f"{num} ({100 * num / known:.1f} %)" if known else str(num))
            if is_multilabel:
                cells.append(str(index.num_images(split) - known))
        lines.append(f"| {_text(name)} | {' | '.join(cells)} |")
    return lines


def _together(spec: LabelSpec, labels: Labels) -> list[str]:
    """A table of how many images show two findings; the most frequent findings, if many."""
    counts = np.zeros((len(spec.classes),) * 2, np.int64)
    for start in range(0, len(labels), _AT_A_TIME):
        present = (labels[start : start + _AT_A_TIME] == 1).astype(np.float64)  # exact sums
        counts += (present.T @ present).astype(np.int64)
    shown = sorted(np.argsort(-counts.diagonal(), kind="stable")[:_CROSSED].tolist())
    numbers = " | ".join(str(number) for number in range(1, len(shown) + 1))
    lines = ["## Findings together", "", "Images of all splits that show both findings."]
    if len(shown) < len(spec.classes):
        lines[-1] += f" The {len(shown)} most frequent ones of {len(spec.classes)}."
    lines += ["", f"| | finding | {numbers} |", "|" + "---|" * (len(shown) + 2)]
    for number, k in enumerate(shown, start=1):
        row = " | ".join(map(str, counts[k, shown].tolist()))
        lines.append(f"| {number} | {_text(spec.classes[k])} | {row} |")
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
