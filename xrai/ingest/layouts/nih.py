"""NIH ChestX-ray14 (Wang et al. 2017): `Data_Entry_2017.csv`, `train_val_list.txt`,
`test_list.txt`, and `images*/*.png`.

All images are frontal; a finding that a row does not name is absent. The lists give train and test.
"""

from typing import Final

from xrai.config import Labels
from xrai.ingest import findings
from xrai.ingest.classes import nearest_name, split_names
from xrai.ingest.label_rows import LabelRow
from xrai.ingest.labels import LabelTable
from xrai.ingest.layouts.tables import Record, TableFile, Tables, merge
from xrai.ingest.records import Fault, refuse, shown
from xrai.labels import folded

FINDINGS: Final = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis"),
    *("Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia"),
    "Pneumothorax",
)
_IMAGE, _LABELS, _PATIENT, _VIEW = "image index", "finding labels", "patient id", "view position"
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


def read(tables: Tables, config: Labels) -> LabelTable:
    """The findings that some row names, or those of `labels.names`. Raises `SourceError` naming the
    line of an unknown finding, of an image that is in both lists or in neither, or that another row
    contradicts.
    """
    main = tables.main(r"data_entry_2017.*\.csv", wanted="Data_Entry_2017.csv")
    splits, notes = _read_lists(tables)
    known = {folded(name): name for name in FINDINGS}
    faults: list[Fault] = []
    rows: list[tuple[Record, dict[str, int]]] = []
    num_unused = 0
    for record in main.records(_IMAGE, _LABELS, _PATIENT):
        stated, fault = findings.split_cell(record.get(_LABELS))
        unknown = [name for name in stated if folded(name) not in known]
        if unknown:
            hint = nearest_name(unknown[0], FINDINGS) or f"; there are {', '.join(FINDINGS)}"
            fault = f"unknown finding {shown(unknown[0])}{hint}"
        elif splits and record.get(_IMAGE) not in splits:
            fault = f"{shown(record.get(_IMAGE))} is in none of the lists of splits"
        if fault:
            faults.append((record.place, fault))
        if _is_wanted(record.get(_VIEW), config):
            rows.append((record, stated))
        else:
            num_unused += 1
    refuse(faults, name=main.name)
    found = {folded(name) for _, stated in rows for name in stated}
    names = split_names(config.names) or tuple(known[name] for name in sorted(found))
    for name in names:
        if folded(name) not in known:
            refuse(
                [("labels.names", f"no finding {name!r}{nearest_name(name, FINDINGS)}")],
                name=main.name,
            )
    places = {folded(name): place for place, name in enumerate(names)}
    policy = findings.policy_of(config)
    labels = [
        _row(record, splits, findings.to_values(stated, places, policy)) for record, stated in rows
    ]
    merged = merge(labels, name=main.name)
    return LabelTable(main.name, merged, names, num_unused, notes, tail_parts=1)


def _row(record: Record, splits: dict[str, str], values: tuple[int, ...]) -> LabelRow:
    cells = {"path": record.get(_IMAGE), "patient": record.get(_PATIENT)}
    if splits:
        cells["split"] = splits[cells["path"]]
    return record.row(cells, values)


def _read_lists(tables: Tables) -> tuple[dict[str, str], tuple[str, ...]]:
    """Image -> split, empty where there are no lists; and notes."""
    lists = {split: tables.beside(name) for split, name in _LISTS.items()}
    if None in lists.values():
        missing = [name for split, name in _LISTS.items() if lists[split] is None]
        note = f"there is no {' and no '.join(missing)}: splits are carved by patient"
        return {}, (note,)
    splits: dict[str, str] = {}
    faults: list[Fault] = []
    for split, table in lists.items():
        for line, name in enumerate((table or TableFile("", "")).text.splitlines(), start=1):
            if name.strip() and splits.setdefault(name.strip(), split) != split:
                faults.append((f"line {line}", f"{shown(name.strip())} is in both lists"))
    refuse(faults, name=_LISTS["test"])
    return splits, ()


def _is_wanted(view: str, config: Labels) -> bool:
    if config.views == "all":
        return True
    return view.upper() in (
        ("PA", "AP", "") if config.views == "frontal" else (config.views.upper(),)
    )
