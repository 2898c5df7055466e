"""VinDr-CXR (Nguyen et al. 2022) and VinDr-PCXR: `image_labels_train.csv`, `image_labels_test.csv`,
and `train/IMAGE.dicom`, `test/IMAGE.dicom`.

Each row is what one reader (rad_id, rad_ID) says of an image; `labels.readers` says how several are
combined. The tables name no patients; DICOM headers do, unless that was removed.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest import findings
from xrai.ingest.classes import nearest_name
from xrai.ingest.label_rows import LabelRow
from xrai.ingest.labels import LabelTable
from xrai.ingest.layouts.tables import Record, TableFile, Tables
from xrai.ingest.records import Fault, refuse, shown
from xrai.labels import UNKNOWN, folded

_TABLES: Final = {"train": r"image_labels_train\.csv", "test": r"image_labels_test\.csv"}
_IMAGE, _READER = "image_id", "rad_id"
_TAIL_PARTS = 1


def read(tables: Tables, config: Labels) -> LabelTable:
    """A row for each image, with the findings that are columns, without "No finding". Raises
    `SourceError` naming the line of a cell that is none, or of a second row of one reader.
    """
    files, notes = _find_tables(tables)
    rows: list[LabelRow] = []
    names: tuple[str, ...] = ()
    for split, table in files.items():
        records = list(table.records(_IMAGE))
        cells = (record.cells for record in records)
        mostly = findings.mostly_findings(cells, len(table.header))
        wanted = replace(config, names="") if names else config  # names may differ: `_by_name`
        columns = findings.find_columns(
            table.header, mostly, wanted, name=table.name, known=(_IMAGE, _READER)
        )
        columns = _by_name(columns, names, table=table, is_all=not config.names)
        names = names or tuple(columns)
        rows += _merge_readers(records, columns, split, config)
    name = " and ".join(table.name for table in files.values())
    return LabelTable(name, tuple(rows), names, notes=tuple(notes), tail_parts=_TAIL_PARTS)


def combine(values: Sequence[int], readers: str) -> int:
    """The label of a finding from those of several readers; unknown ones do not count."""
    known = [value for value in values if value != UNKNOWN]
    num_present = sum(known)
    if not known:
        return UNKNOWN
    if readers == "agree":
        return known[0] if num_present in (0, len(known)) else UNKNOWN
    is_present = {
        "majority": 2 * num_present > len(known),
        "any": num_present > 0,
        "all": num_present == len(known),
    }
    return int(is_present[readers])


def _merge_readers(
    records: Sequence[Record], columns: dict[str, int], split: str, config: Labels
) -> list[LabelRow]:
    policy = findings.policy_of(config)
    faults: list[Fault] = []
    own: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    first: dict[str, Record] = {}
    readers: dict[tuple[str, str], Record] = {}
    for record in records:
        image = record.get(_IMAGE)
        values, fault = findings.values_of(record.cells, columns, policy)
        other = readers.setdefault((image, record.get(_READER)), record)
        if not image:
            fault = "image_id is empty"
        elif other is not record:
            fault = f"{shown(image)} has a row of the same reader in line {other.line}"
        if fault:
            faults.append((record.place, fault))
        own[image].append(values)
        first.setdefault(image, record)
    refuse(faults, name=records[0].table if records else split)
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    rows = []
    for image, record in first.items():
        values = tuple(combine(each, config.readers) for each in zip(*own[image], strict=True))
        cells = {"path": image, "split": split}
        rows.append(record.row(cells, shared.setdefault(values, values)))
    return rows


def _find_tables(tables: Tables) -> tuple[dict[str, TableFile], list[str]]:
    """The tables by split, without one beside that named whose images are not in the source; and
    notes on it.
    """
    notes: list[str] = []
    first = tables.main("" if tables.is_file else _TABLES["train"], wanted="image_labels_train.csv")
    if not tables.is_file:
        test = tables.find(_TABLES["test"])
    elif "test" in first.name.lower():
        return {"test": first}, notes
    else:
        is_train = re.fullmatch(_TABLES["train"], first.name)
        test = tables.beside("image_labels_test.csv") if is_train else None
        notes += tables.note_unused(test, _IMAGE, tail_parts=_TAIL_PARTS) if test else []
    return {"train": first, "test": test} if test and not notes else {"train": first}, notes


def _by_name(
    columns: dict[str, int], names: tuple[str, ...], *, table: TableFile, is_all: bool
) -> dict[str, int]:
    """The columns in the order and by the names of the first table, where "Other diseases" of one
    is "Other disease" of the other.
    """
    if not columns:
        raise SourceError(f"{table.name} has no columns of findings, of 1 and 0")
    if not names:
        return columns
    own = {folded(name).removesuffix("s"): (name, place) for name, place in columns.items()}
    found = {}
    for name in names:
        if folded(name).removesuffix("s") not in own:
            hint = nearest_name(name, columns)
            raise SourceError(
                f"{table.name} has no column {name!r}, as the other table{hint}; "
                "name those to use by --labels.names='A|B|…'"
            )
        found[name] = own.pop(folded(name).removesuffix("s"))[1]
    if own and is_all:
        raise SourceError(
            f"{table.name} has a column {next(iter(own.values()))[0]!r}, which the other table "
            "lacks; name those to use by --labels.names='A|B|…'"
        )
    return found
