"""Findings as tables state them: a column each, of 1, 0, empty or -1; or names joined by `|`."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.classes import (
    Found,
    check_name,
    is_negative_word,
    nearest_name,
    refuse_twice,
    separated,
    split_names,
)
from xrai.ingest.records import shown
from xrai.labels import UNKNOWN, find_twice, folded
from xrai.log import counted

COLUMN: Final = "findings"  # of names joined by |

_VALUES: Final = {
    **{"1": 1, "1.0": 1, "1,0": 1, "yes": 1, "true": 1},
    **{"0": 0, "0.0": 0, "0,0": 0, "no": 0, "false": 0},
    **{"-1": UNKNOWN, "-1.0": UNKNOWN, "-1,0": UNKNOWN},
}
_ALLOWED = "1, yes or true (present), 0, no or false (absent), empty or -1 (unknown)"
# Cells that may be meant as findings, as numbers from -1 to 1 may
_LIKE_VALUES = frozenset(["y", "n", "pos", "neg", "positive", "negative", "present", "absent"])
_JOINTS = re.compile(r"[;,/+]")  # what people write in place of |
_SHOWN = 5  # names that one message lists
# What CheXpert's "No Finding" says nothing about
_DEVICES = frozenset(["support devices"])
# Columns of numbers, or of few values, that are no findings
_OTHERS = frozenset(
    [
        *("age", "sex", "gender", "id", "index", "year", "height", "width"),
        *("view", "view position", "viewposition", "projection", "frontal/lateral", "ap/pa"),
    ]
)
# A column of so few values in more rows may be one of findings in another language, or of crosses
_FEW_VALUES, _FEW_ROWS = 3, 10


@dataclass(frozen=True)
class Policy:
    """How to read cells that say neither yes nor no."""

    uncertain: int  # of a finding of -1
    blank: int  # of an empty finding

    def of_cell(self, cell: str) -> int | None:
        """1, 0 or `UNKNOWN`; None for a cell that is no finding."""
        cell = cell.strip()
        if not cell:
            return self.blank
        value = _VALUES.get(cell.casefold())
        return self.uncertain if value == UNKNOWN else value


def policy_of(config: Labels, *, blank: str = "unknown") -> Policy:
    """The policy that `labels` states; `blank` is what its "auto" stands for."""
    values = {"unknown": UNKNOWN, "negative": 0, "positive": 1}
    return Policy(
        values[config.uncertain], values[blank if config.blank == "auto" else config.blank]
    )


def mostly_findings(records: Iterable[Sequence[str]], num_columns: int) -> frozenset[int]:
    """The columns of whose filled cells at least half are findings."""
    num_filled, num_values = [0] * num_columns, [0] * num_columns
    for cells in records:
        for k, cell in enumerate(cells[:num_columns]):
            if cell := cell.strip():
                num_filled[k] += 1
                num_values[k] += cell.casefold() in _VALUES
    return frozenset(k for k, num in enumerate(num_filled) if num and 2 * num_values[k] >= num)


def find_columns(
    header: Sequence[str],
    mostly: Collection[int],
    config: Labels,
    *,
    name: str,
    known: Iterable[str] = (),
) -> dict[str, int]:
    """Finding -> its column. These are the ones that `labels.names` lists, else all others than
    `known` that are `mostly_findings`; a mistake in a cell hides none.

    A column "No finding" adds nothing to the others, and does not count as a finding. Raises
    `SourceError` for a name that is no column, or two columns of one name.
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
            if not is_negative_word(cell) and folded(cell) not in _OTHERS and k in mostly
        }
        found = {cell: k for k, cell in others.items()}
    refuse_twice(list(others.values()), where=f"the first line of {name}")
    for each in found:
        check_name(each, "multilabel", where=name)
    return found


def find_negative_columns(
    header: Sequence[str], mostly: Collection[int], columns: Mapping[str, int]
) -> dict[str, int]:
    """Columns such as "No finding", of 1 and 0, that are not among the findings' `columns`."""
    return {
        cell.strip(): k
        for k, cell in enumerate(header)
        if k not in columns.values() and is_negative_word(cell) and k in mostly
    }


def explain_unused(
    header: Sequence[str], records: Iterable[tuple[int, Sequence[str]]], used: Collection[int]
) -> Iterator[str]:
    """A sentence on each column that may be meant as a finding and is not `used` as one; the
    records have their lines.
    """
    unused = {
        k: _Unused()
        for k, cell in enumerate(header)
        if k not in used and folded(cell) not in _OTHERS
    }
    for line, cells in records if unused else ():
        for k, column in unused.items():
            column.add(line, cells[k].strip())
    for k, column in unused.items():
        if column.first_bad and column.is_doubtful:
            line, cell = column.first_bad
            yield (
                f"the column {shown(header[k].strip())} is not used as a finding: line {line} has "
                f"{shown(cell)}, allowed are {_ALLOWED}"
            )


@dataclass
class _Unused:
    """What the cells of a column are that is not used as a finding."""

    num_rows: int = 0
    num_filled: int = 0
    num_alike: int = 0
    values: set[str] = field(default_factory=set)  # no more than tell whether they are few
    first_bad: tuple[int, str] | None = None  # line and cell

    def add(self, line: int, cell: str) -> None:
        self.num_rows += 1
        if len(self.values) <= _FEW_VALUES + 1:  # one may be empty
            self.values.add(cell.casefold())
        if cell:
            self.num_filled += 1
            self.num_alike += _is_like_a_value(cell)
            if self.first_bad is None and cell.casefold() not in _VALUES:
                self.first_bad = line, cell

    @property
    def is_doubtful(self) -> bool:
        """Whether it may be meant as a finding."""
        is_few = len(self.values) > 1 and len(self.values - {""}) <= _FEW_VALUES
        return (is_few and self.num_rows > _FEW_ROWS) or 4 * self.num_alike >= 3 * self.num_filled


def values_of(
    cells: Sequence[str],
    columns: Mapping[str, int],
    policy: Policy,
    negative: Mapping[str, int] | None = None,
) -> tuple[tuple[int, ...], str]:
    """The findings of a row, and what is wrong with one; empty if nothing is.

    Where one of the columns `negative` is 1, empty findings are absent, and none is present.
    Support devices are no finding in this sense.
    """
    every = {**columns, **(negative or {})}
    found = {name: policy.of_cell(cells[k]) for name, k in every.items()}
    for name, value in found.items():
        if value is None:
            return (), f"{name} is {shown(cells[every[name]].strip())}, allowed are {_ALLOWED}"
    for none, k in (negative or {}).items():
        if _VALUES.get(cells[k].strip().casefold()) != 1:
            continue
        for name in columns:
            if folded(name) in _DEVICES:
                continue
            if found[name] == 1:
                return (
                    (),
                    f"{name} and {none} are both present: leave one, or choose by labels.names",
                )
            if not cells[columns[name]].strip():
                found[name] = 0
    return tuple(value for name in columns if (value := found[name]) is not None), ""


def split_cell(cell: str) -> tuple[dict[str, int], str]:
    """The findings that a cell of names joined by `|` states, and what is wrong; empty if nothing.

    `NAME?` is unknown; "No finding" states that there is none.
    """
    if not cell.strip():
        return {}, "findings is empty; write 'No finding' where there is none"
    stated = [name.strip() for name in cell.split("|")]
    names = [name.removesuffix("?").strip() for name in stated]
    negative = [name for name in names if is_negative_word(name)]
    fault = ""
    if "" in names:
        fault = "lacks a name"
    elif negative and any(name in negative for name in names if name not in stated):
        fault = "has ? behind it; write it behind each finding that is unknown, as in 'Edema?'"
    elif negative and len(negative) < len(names):
        fault = "says none beside others"
    elif not negative and (same := find_twice(names)):
        fault = f"says {same[0]!r} twice"
    if fault or negative:
        return {}, f"findings {shown(cell)} {fault}" if fault else ""
    is_known = (not name.endswith("?") for name in stated)
    return dict(zip(names, (1 if known else UNKNOWN for known in is_known), strict=True)), ""


def refuse_doubtful(found: Mapping[str, Found], names: Collection[str], *, name: str) -> None:
    """Raise `SourceError` where one of the findings that cells of names state (folded -> `Found`)
    is likely several, or another one written otherwise; either would count as absent. `names` are
    those of `labels.names`, which are meant as they are; others that are joined of something that
    is no finding are left out (`explain_left_out`).
    """
    meant = {folded(each) for each in names}
    known = meant | found.keys()
    alike: dict[str, list[Found]] = defaultdict(list)
    for own, each in found.items():
        is_meant, parts = own in meant, {folded(part) for part in _JOINTS.split(own)}
        if meant:
            is_joined = parts <= known and not meant.isdisjoint(parts)
        else:
            is_joined = not known.isdisjoint(parts) or ";" in own
        if not is_meant and len(parts) > 1 and is_joined:
            raise SourceError(
                f"{name}, {each.place}: {shown(each.name)} looks like several findings: join them "
                f"by | ({counted(each.num_images, 'image')}); if it is one, name all findings to "
                "use by --labels.names='A|B|…'"
            )
        others = alike[separated(own)]
        if others and (is_meant != (folded(others[0].name) in meant) or not meant):
            raise SourceError(
                f"{name}, {each.place}: {shown(each.name)} differs from {shown(others[0].name)} "
                f"({others[0].place}) only in spaces, hyphens or underscores: write both alike; if "
                "each is meant, name all findings to use by --labels.names='A|B|…'"
            )
        others.append(each)


def explain_left_out(found: Mapping[str, Found], names: Collection[str]) -> str:
    """A sentence on the findings that cells of names state and `labels.names` leaves out; empty
    where there are none.
    """
    meant = {folded(each) for each in names}
    others = [each for own, each in found.items() if own not in meant] if meant else []
    told = [f"{shown(each.name)} ({counted(each.num_images, 'image')})" for each in others[:_SHOWN]]
    more = [f"{len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
    return f"labels.names leaves out {', '.join(told + more)}: check the spelling" if told else ""


def to_values(
    stated: Mapping[str, int], places: Mapping[str, int], policy: Policy
) -> tuple[int, ...]:
    """The findings of a row from the names that it states; `places` has folded names."""
    values = [0] * len(places)
    for name, value in stated.items():
        if (place := places.get(folded(name))) is not None:
            values[place] = policy.uncertain if value == UNKNOWN else value
    return tuple(values)


def _is_like_a_value(cell: str) -> bool:
    if cell.casefold() in {*_VALUES, *_LIKE_VALUES}:
        return True
    with suppress(ValueError):
        return -1 <= float(cell) <= 1
    return False
