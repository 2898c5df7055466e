"""RSNA Pneumonia Detection Challenge 2018: `stage_2_train_labels.csv`,
`stage_2_detailed_class_info.csv`, and `stage_2_train_images/PATIENT.dcm`.

An image has a row for each of its boxes. Target 1 is "Lung Opacity", 0 is "No Lung Opacity", of
whom many are not normal: `--labels.target=subtype` makes the three classes of the second table.
"""

from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.classes import nearest_name
from xrai.ingest.label_rows import LabelRow
from xrai.ingest.labels import LabelTable
from xrai.ingest.layouts.tables import Tables, merge
from xrai.ingest.records import Fault, refuse, shown
from xrai.labels import folded

CLASSES: Final = ("No Lung Opacity", "Lung Opacity")  # of Target
DETAILED: Final = ("Normal", "Lung Opacity", "No Lung Opacity / Not Normal")

_DETAILS = "stage_2_detailed_class_info.csv"
_PATIENT, _TARGET, _CLASS = "patientid", "target", "class"


def read(tables: Tables, config: Labels) -> LabelTable:
    """A row for each image. Raises `SourceError` naming the line of a Target or class that is none,
    or of a row that contradicts another of the same patient, or the second table.
    """
    main = tables.main(r"stage_2_train_labels\.csv", wanted="stage_2_train_labels.csv")
    is_detailed = config.target == "subtype"
    faults: list[Fault] = []
    details = _read_details(tables, is_needed=is_detailed)
    rows: list[LabelRow] = []
    for record in main.records(_PATIENT, _TARGET):
        patient, target = record.get(_PATIENT), record.get(_TARGET)
        if target not in ("0", "1", "0.0", "1.0"):
            faults.append((record.place, f"Target is {shown(target)}, allowed are 0 and 1"))
            continue
        label = CLASSES[int(float(target))]
        detail = details.get(patient, "")
        if detail and (detail == DETAILED[1]) != (label == CLASSES[1]):
            words = f"{shown(patient)} has Target {target}, but is {detail!r} in {_DETAILS}"
            faults.append((record.place, words))
        if is_detailed and not detail:
            faults.append((record.place, f"{shown(patient)} is not in {_DETAILS}"))
        label = detail if is_detailed else label
        rows.append(record.row({"path": patient, "patient": patient, "label": label}))
    refuse(faults, name=main.name)
    return LabelTable(
        main.name,
        merge(rows, name=main.name),
        classes=DETAILED if is_detailed else CLASSES,
        has_target=True,
        tail_parts=1,
    )


def _read_details(tables: Tables, *, is_needed: bool) -> dict[str, str]:
    """Patient -> class of the second table; empty where there is none."""
    table = tables.beside(_DETAILS)
    if table is None:
        if is_needed:
            raise SourceError(f"labels.target = subtype takes the classes of {_DETAILS}: not found")
        return {}
    known = {folded(name): name for name in DETAILED}
    found: dict[str, str] = {}
    faults: list[Fault] = []
    for record in table.records(_PATIENT, _CLASS):
        name = record.get(_CLASS)
        if folded(name) not in known:
            hint = nearest_name(name, DETAILED) or f", allowed are {', '.join(DETAILED)}"
            faults.append((record.place, f"unknown class {shown(name)}{hint}"))
            continue
        first = found.setdefault(record.get(_PATIENT), known[folded(name)])
        if first != known[folded(name)]:
            words = f"{shown(record.get(_PATIENT))} is {name!r} here, {first!r} in an earlier line"
            faults.append((record.place, words))
    refuse(faults, name=table.name)
    return found
