"""CheXpert (Irvin et al. 2019): `train.csv` and `valid.csv`, with paths such as
`CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg`.

-1 is uncertain (`labels.uncertain`), an empty cell was not mentioned and counts as absent unless
`labels.blank` says otherwise. Lateral views are left out unless `labels.views` is all. valid.csv is
val; test is carved from train, unless there is a test.csv.
"""

import re
from dataclasses import replace
from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest import findings
from xrai.ingest.classes import nearest_name
from xrai.ingest.label_rows import LabelRow
from xrai.ingest.labels import LabelTable
from xrai.ingest.layouts.tables import Record, TableFile, Tables, merge
from xrai.ingest.records import Fault, refuse, shown
from xrai.labels import folded

_TABLES: Final = {"train": r"train\.csv", "val": r"valid\.csv", "test": r"test(_labels)?\.csv"}
FINDINGS: Final = (
    *("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)

_KNOWN = ("path", "sex", "age", "frontal/lateral", "ap/pa")
_PATIENT = re.compile(r"(?:^|[/\\])(patient\d+)[/\\]", re.IGNORECASE)
_TAIL_PARTS = 4  # train/patient00001/study1/view1_frontal.jpg


def read(tables: Tables, config: Labels) -> LabelTable:
    """The findings that are columns, without "No Finding". Raises `SourceError` naming the line of
    a cell that is none, a path without a patient, or an image that another row contradicts.
    """
    files, notes = _find_tables(tables)
    faults: list[Fault] = []
    rows: list[LabelRow] = []
    names: tuple[str, ...] = ()
    policy = findings.policy_of(config, blank="negative")
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    num_unused = 0
    for split, table in files.items():
        records = list(table.records("path"))
        columns = _find_columns(table, config)
        _check_names(table, tuple(columns), names)
        names = names or tuple(columns)
        for record in records:
            if not _is_wanted(record, config):
                num_unused += 1
                continue
            values, fault = findings.values_of(record.cells, columns, policy)
            patient = _PATIENT.search(record.get("path"))
            if patient is None:
                fault = f"path {shown(record.get('path'))} has no folder of a patient"
            if fault:
                faults.append((record.place, fault))
            elif patient:
                found = {"path": record.get("path"), "patient": patient[1].lower(), "split": split}
                rows.append(record.row(found, shared.setdefault(values, values)))
    name = " and ".join(table.name for table in files.values())
    refuse(faults, name=name)
    if not rows:
        raise SourceError(f"{name} has no images of the views that labels.views = {config.views}")
    merged = merge(rows, name=name)
    return LabelTable(name, merged, names, num_unused, tuple(notes), tail_parts=_TAIL_PARTS)


def _find_tables(tables: Tables) -> tuple[dict[str, TableFile], list[str]]:
    """The tables by split, without those beside a named one whose images are not in the source;
    and notes on these.
    """
    notes: list[str] = []
    first = tables.main("" if tables.is_file else _TABLES["train"], wanted="train.csv")
    if not tables.is_file:
        others = {split: tables.find(_TABLES[split]) for split in ("val", "test")}
    else:
        own = [split for split, pattern in _TABLES.items() if re.fullmatch(pattern, first.name)]
        if own != ["train"]:
            return {own[0] if own else "train": first}, notes
        others = {
            "val": tables.beside("valid.csv"),
            "test": tables.beside("test.csv") or tables.beside("test_labels.csv"),
        }
    files = {"train": first}
    for split, table in others.items():
        unused = (
            tables.note_unused(table, "path", tail_parts=_TAIL_PARTS)
            if table and tables.is_file
            else []
        )
        notes += unused
        if table and not unused:
            files[split] = table
    return files, notes


def _find_columns(table: TableFile, config: Labels) -> dict[str, int]:
    """Finding -> its column. Raises `SourceError` for a column that is likely misspelt."""
    known = {folded(name) for name in FINDINGS}
    present = [cell for cell in table.header if folded(cell) in known]
    lacking = [name for name in FINDINGS if folded(name) not in map(folded, present)]
    for cell in table.header:
        if folded(cell) not in known.union(_KNOWN) and (near := nearest_name(cell, lacking)):
            raise SourceError(f"{table.name} has an unknown column {cell!r}{near}")
    wanted = replace(config, names=config.names or "|".join(present))
    return findings.find_columns(table.header, (), wanted, name=table.name, known=_KNOWN)


def _check_names(table: TableFile, own: tuple[str, ...], names: tuple[str, ...]) -> None:
    if not own:
        raise SourceError(f"{table.name} has no columns of findings, of 1, 0, -1 and empty cells")
    if names and set(own) != set(names):
        odd = sorted(set(own) ^ set(names))[0]
        raise SourceError(
            f"{table.name} does not have the findings of train.csv ({odd!r} is in one alone); name "
            "those to use by --labels.names='A|B|…'"
        )


def _is_wanted(record: Record, config: Labels) -> bool:
    if config.views == "all":
        return True
    side = record.get("frontal/lateral").lower()
    is_frontal = side == "frontal" if side else "lateral" not in record.get("path").lower()
    return is_frontal and config.views in ("frontal", record.get("ap/pa").lower())
