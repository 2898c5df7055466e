"""The data card: what a data set holds, in Markdown, for people who have to trust it. `xrai.preprocess` writes it."""

from collections import Counter
from collections.abc import Sequence

from xrai.dataset.manifest import Row
from xrai.dataset.shards import DatasetIndex

_SHOWN = 50  # files that are set aside and named


def is_phantom(rows: Sequence[Row]) -> bool:
    """Whether the images are drawn ones: `xrai.dataset.phantom` begins their names so."""
    return bool(rows) and all(row.path.rpartition("/")[2].startswith("phantom-") for row in rows)


def write_card(
    index: DatasetIndex, rows: Sequence[Row], *, notes: Sequence[str], sheets: Sequence[tuple[str, str]]
) -> str:
    """The card's text. `sheets` are (caption, file name) of pictures beside it; `notes` are sentences of the plan."""
    counts = index.counts
    used = [row for row in rows if not row.reason]
    config = index.config["images"]
    lines = [
        f"# Data set {index.fingerprint[:16]}",
        "",
        *(["**Drawn phantoms, not patients.** For trying the program out and for tests.", ""] * is_phantom(rows)),
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
        lines.append(f"| {split} | {numbers} | {len(patients)} | {max(patients.values())} | {origin} |")
    subtypes = Counter(row.subtype for row in used if row.subtype)
    if subtypes:
        named = ", ".join(f"{count} {name}" for name, count in sorted(subtypes.items()))
        lines += ["", f"Kinds of pneumonia that file names state: {named}."]
    num_named = sum(not row.patient.startswith("file:") for row in used)
    lines += [
        "",
        f"Patients are known by file name for {num_named} of {len(used)} images; every other file counts as a patient "
        "of its own.",
        *(f"Note: {_text(note)}." for note in notes),
    ]
    for caption, name in sheets:
        lines += ["", f"## {caption}", "", f"![{caption}]({name})"]
    lines += ["", "## Files set aside", ""]
    aside = [row for row in rows if row.reason]
    if not aside:
        lines.append("None.")
    else:
        lines += ["| file | reason |", "|---|---|"]
        lines += [f"| {_text(row.path)} | {_text(row.reason)} |" for row in aside[:_SHOWN]]
        if len(aside) > _SHOWN:
            lines += ["", f"… and {len(aside) - _SHOWN} more, in manifest.jsonl."]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """Text from outside as one line of Markdown that can not be anything but text."""
    plain = "".join(character if character.isprintable() else "\ufffd" for character in text)
    for special in "\\`*_{}[]<>()#+!|":
        plain = plain.replace(special, "\\" + special)
    return plain
