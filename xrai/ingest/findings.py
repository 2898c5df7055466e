"""Findings as tables state them: a column each, of 1, 0, empty or -1; or names joined by `|`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.classes import (
    check_name,
    is_negative_word,
    nearest_name,
    refuse_twice,
    split_names,
)
from xrai.ingest.records import shown
from xrai.labels import UNKNOWN, folded

COLUMN: Final = "findings"  # of names joined by |

_VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": UNKNOWN, "-1.0": UNKNOWN}
_ALLOWED = "1 (present), 0 (absent), empty or -1 (unknown)"
# Columns of numbers that are no findings
_OTHERS = frozenset(["age", "sex", "gender", "view", "id", "index", "year", "height", "width"])


@dataclass(frozen=True)
class Policy:
    """What cells mean that neither say yes nor no."""

    uncertain: int  # of a finding of -1
    blank: int  # of an empty finding

    def of_cell(self, cell: str) -> int | None:
        """1, 0 or `UNKNOWN`; None for a cell that is no finding."""
        cell = cell.strip()
        if not cell:
            return self.blank
        value = _VALUES.get(cell)
        return self.uncertain if value == UNKNOWN else value


def policy_of(config: Labels, *, blank: str = "unknown") -> Policy:
    """The policy that `labels` states; `blank` is what its "auto" stands for."""
    values = {"unknown": UNKNOWN, "negative": 0, "positive": 1}
    return Policy(
        values[config.uncertain], values[blank if config.blank == "auto" else config.blank]
    )


def find_columns(
    header: Sequence[str],
    records: Sequence[Sequence[str]],
    config: Labels,
    *,
    name: str,
    known: Iterable[str] = (),
) -> dict[str, int]:
    """Finding -> its column. These are the ones that `labels.names` lists, else all others than
    `known` of whose filled cells at least half are findings; a mistake in a cell hides none.

    A column "No finding" says nothing that the others do not, and is none. Raises `SourceError` for
    a name that is no column, or two columns of one name.
    """
    others = {
        k: cell.strip()
        for k, cell in enumerate(header)
        if cell.strip() and folded(cell) not in set(known)
    }
    wanted = split_names(config.names)
    if wanted:
        columns = {folded(cell): k for k, cell in others.items()}
        for each in wanted:
            if folded(each) not in columns:
                raise SourceError(
                    f"{name} has no column {each!r} of labels.names"
                    f"{nearest_name(each, others.values())}"
                )
        found = {each: columns[folded(each)] for each in wanted}
        others = {k: cell for k, cell in others.items() if folded(cell) in map(folded, wanted)}
    else:
        others = {
            k: cell
            for k, cell in others.items()
            if not is_negative_word(cell)
            and folded(cell) not in _OTHERS
            and _is_mostly_findings(records, k)
        }
        found = {cell: k for k, cell in others.items()}
    refuse_twice(list(others.values()), where=f"the first line of {name}")
    for each in found:
        check_name(each, "multilabel", where=name)
    return found


def values_of(
    cells: Sequence[str], columns: Mapping[str, int], policy: Policy
) -> tuple[tuple[int, ...], str]:
    """The findings of a row, and what is wrong with one; empty if nothing is."""
    values = [policy.of_cell(cells[k]) for k in columns.values()]
    if None in values:
        name = list(columns)[values.index(None)]
        return (), f"{name} is {shown(cells[columns[name]].strip())}, allowed are {_ALLOWED}"
    return tuple(value for value in values if value is not None), ""


def split_cell(cell: str) -> tuple[dict[str, int], str]:
    """The findings that a cell of names joined by `|` states, and what is wrong; empty if nothing.

    `NAME?` is unknown; "No finding" states that there is none.
    """
    names = [name.strip() for name in cell.split("|")]
    if "" in names:
        empty = "is empty; write 'No finding' where there is none"
        return {}, f"findings {empty if len(names) == 1 else f'{shown(cell)} lacks a name'}"
    found = {
        name.removesuffix("?").strip(): UNKNOWN if name.endswith("?") else 1
        for name in names
        if not is_negative_word(name)
    }
    if found and len(found) < len(names):
        return {}, f"findings {shown(cell)} says none, or one twice, beside others"
    return found, ""


def to_values(
    stated: Mapping[str, int], places: Mapping[str, int], policy: Policy
) -> tuple[int, ...]:
    """The findings of a row from the names that it states; `places` has folded names."""
    values = [0] * len(places)
    for name, value in stated.items():
        if (place := places.get(folded(name))) is not None:
            values[place] = policy.uncertain if value == UNKNOWN else value
    return tuple(values)


def _is_mostly_findings(records: Sequence[Sequence[str]], k: int) -> bool:
    cells = [record[k].strip() for record in records if k < len(record)]
    filled = [cell for cell in cells if cell]
    return bool(filled) and 2 * sum(cell in _VALUES for cell in filled) >= len(filled)
