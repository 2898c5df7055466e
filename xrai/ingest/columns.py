"""The columns that a table of labels may have beside the path and what the image shows."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from xrai.errors import SourceError
from xrai.ingest.folders import SPLIT_NAMES
from xrai.ingest.records import shown
from xrai.labels import folded

OPTIONAL: Final[Sequence[str]] = ("patient", "split", "subtype", "group")

# What people call these two, without spaces, hyphens and underscores
_PATIENTS = frozenset(
    [
        *("patients", "patientid", "patientno", "patientnumber", "patientname", "patientkey"),
        *("subject", "subjects", "subjectid", "subjectno", "personid", "mrn"),
    ]
)
_SPLITS = frozenset(
    ["splits", "splitname", "datasplit", "set", "subset", "dataset", "partition", "fold", "phase"]
)


def refuse_misnamed(
    header: Sequence[str],
    records: Iterable[Sequence[str]],
    *,
    known: Mapping[str, int],
    used: Collection[int],
    name: str,
) -> None:
    """Raise `SourceError` where a table states no patient, or no split, and has an unused column
    that is filled and clearly meant as that. `known` has the columns with names of our own.
    """
    own = {k: _plain(cell) for k, cell in enumerate(header) if k not in used}
    likely = {
        "patient": [k for k, plain in own.items() if plain in _PATIENTS],
        "split": [k for k, plain in own.items() if plain in _SPLITS],
    }
    likely = {column: places for column, places in likely.items() if places}
    if not likely:
        return
    filled = dict.fromkeys([*own, *known.values()], False)
    others: set[int] = set()  # columns with a cell that names no split
    for cells in records:
        for k in filled:
            if cell := cells[k].strip():
                filled[k] = True
                if cell.lower() not in SPLIT_NAMES:
                    others.add(k)
    for column, places in likely.items():
        is_stated = column in known and filled[known[column]]
        meant = [k for k in places if filled[k] and (column == "patient" or k not in others)]
        if meant and not is_stated:
            raise SourceError(
                f"{name} has a column {shown(header[meant[0]].strip())} and no {column}: rename it "
                f"to {column}; if it states none, give it another name or remove it"
            )


def _plain(column: str) -> str:
    return folded(column).replace(" ", "").replace("_", "").replace("-", "")
