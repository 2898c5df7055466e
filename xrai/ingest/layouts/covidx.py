"""COVIDx CXR (Wang et al. 2020): lists `train*.txt`, `test*.txt` and perhaps `val*.txt` of lines
`PATIENT FILE CLASS SOURCE`, and `train/FILE`, `test/FILE`.

Classes are negative and positive (version B), or normal, pneumonia and COVID-19 (version A). The
source becomes the group, since patients of two sources may have one number.
"""

import re
from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.classes import nearest_name
from xrai.ingest.label_rows import LabelRow
from xrai.ingest.labels import LabelTable
from xrai.ingest.layouts.tables import TableFile, Tables, merge
from xrai.ingest.records import Fault, refuse, shown
from xrai.labels import folded

VERSIONS: Final = {"B": ("negative", "positive"), "A": ("normal", "COVID-19", "pneumonia")}

_ALL: Final = (*VERSIONS["B"], *VERSIONS["A"])
_LISTS: Final = {"train": r"train.*\.txt", "val": r"val.*\.txt", "test": r"test.*\.txt"}


def read(tables: Tables, config: Labels) -> LabelTable:
    """A row for each image; lines that repeat are taken once. Raises `SourceError` naming a line
    that is none, or contradicts another.
    """
    del config
    files = _find_lists(tables)
    rows = [row for split, table in files.items() for row in _read_list(table, split)]
    name = " and ".join(table.name for table in files.values())
    if not rows:
        raise SourceError(f"{name} has no lines")
    used = {row.cells["label"] for row in rows}
    fitting = [classes for classes in VERSIONS.values() if used <= set(classes)]
    if not fitting:
        raise SourceError(f"{name} mix the classes of versions A and B: {', '.join(sorted(used))}")
    return LabelTable(name, merge(rows, name=name), classes=fitting[0], tail_parts=1)


def _find_lists(tables: Tables) -> dict[str, TableFile]:
    first = tables.main(_LISTS["train"], wanted="train.txt")
    if not tables.is_file:
        others = {split: tables.find(_LISTS[split]) for split in ("val", "test")}
    else:
        own = next((split for split in _LISTS if split in first.name.lower()), "")
        if own != "train":
            return {own or "train": first}
        names = {split: re.sub("train", split, first.name, flags=re.I) for split in ("val", "test")}
        others = {split: tables.beside(name) for split, name in names.items()}
    return {"train": first} | {split: table for split, table in others.items() if table}


def _read_list(table: TableFile, split: str) -> list[LabelRow]:
    known = {folded(name): name for name in _ALL}
    faults: list[Fault] = []
    rows: list[LabelRow] = []
    for number, line in enumerate(table.text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        # A file name may hold spaces, and the oldest lists state no source
        at = next((k for k in (-2, -1) if len(words) + k >= 2 and folded(words[k]) in known), None)
        if at is None:
            label = words[-2] if len(words) > 3 else words[-1]
            hint = nearest_name(label, _ALL) or f", allowed are {', '.join(_ALL)}"
            faults.append((f"{table.name}, line {number}", f"unknown class {shown(label)}{hint}"))
            continue
        cells = {
            "path": " ".join(words[1:at]),
            "patient": words[0],
            "label": known[folded(words[at])],
            "split": split,
            "group": _group(words[-1]) if at == -2 else "covidx",
        }
        rows.append(LabelRow(number, cells, (), table.name))
    refuse(faults, name=table.name)
    return rows


def _group(source: str) -> str:
    return re.sub(r"[^\w.-]", "-", source)[:40]
