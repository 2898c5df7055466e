"""The rows of a table of labels: as columns, where there may be millions of them."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import overload

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.rows import Names, NamesBuilder, Numbers, Texts, TextsBuilder

_MANY = ("path", "patient")  # columns of which each row may have another text
_AT_A_TIME = 1024  # rows made into objects


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One row of a table."""

    line: int
    cells: Mapping[str, str]  # of the known columns that the table has, as they are written there
    findings: tuple[int, ...] = ()  # in the order of the table's
    table: str = ""  # its name, where rows of several tables stand together

    @property
    def place(self) -> str:
        """For people: "line 7"."""
        return f"{self.table}, line {self.line}" if self.table else f"line {self.line}"


@dataclass(frozen=True, eq=False)
class LabelRows(Sequence[LabelRow]):
    """The rows of one table. `rows[3]` and iterating make a `LabelRow` each."""

    lines: NDArray[np.int32]  # (N,)
    cells: Mapping[str, Texts | Names]  # by column, (N,) each
    findings: NDArray[np.int8]  # (N, C), C is 0 where there are none

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, place: int) -> LabelRow: ...
    @overload
    def __getitem__(self, place: slice) -> "LabelRows": ...
    def __getitem__(self, place: int | slice) -> "LabelRow | LabelRows":
        if isinstance(place, slice):
            return self.take(np.arange(len(self), dtype=np.int32)[place])
        cells = {column: texts[place] for column, texts in self.cells.items()}
        return LabelRow(int(self.lines[place]), cells, tuple(self.findings[place].tolist()))

    def __iter__(self) -> Iterator[LabelRow]:
        for start in range(0, len(self), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            cells = [_between(texts, part) for texts in self.cells.values()]
            findings = map(tuple, self.findings[part].tolist())
            for line, own, *texts in zip(self.lines[part].tolist(), findings, *cells, strict=True):
                yield LabelRow(line, dict(zip(self.cells, texts, strict=True)), own)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelRows) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]

    def take(self, places: Numbers) -> "LabelRows":
        """The rows at these places."""
        cells = {column: texts.take(places) for column, texts in self.cells.items()}
        return LabelRows(self.lines[places], cells, self.findings[places])

    def with_findings(self, findings: NDArray[np.int8]) -> "LabelRows":
        """The same rows with these findings (N, C)."""
        return replace(self, findings=findings)


class LabelRowsBuilder:
    """Makes `LabelRows` of one row after the other."""

    def __init__(self, columns: Iterable[str], *, num_findings: int = 0) -> None:
        self._lines, self._findings, self._num_findings = array("i"), array("b"), num_findings
        self._cells = {
            column: TextsBuilder() if column in _MANY else NamesBuilder() for column in columns
        }

    def append(self, line: int, cells: Mapping[str, str], findings: Iterable[int] = ()) -> None:
        self._lines.append(line)
        self._findings.extend(findings)
        for column, builder in self._cells.items():
            builder.append(cells[column])

    def finish(self) -> LabelRows:
        """All rows; nothing can be appended afterwards."""
        findings = np.frombuffer(self._findings, np.int8)
        return LabelRows(
            np.frombuffer(self._lines, np.int32),
            {column: builder.finish() for column, builder in self._cells.items()},
            findings.reshape(len(self._lines), self._num_findings),
        )


def column_of(rows: Sequence[LabelRow], column: str) -> Iterator[str]:
    """A column of rows, "" where there is no cell, without making rows where they are columns."""
    if not isinstance(rows, LabelRows):
        return (row.cells.get(column, "") for row in rows)
    texts = rows.cells.get(column)
    if texts is None:
        return repeat("", len(rows))
    if isinstance(texts, Texts):
        return iter(texts)
    return map(texts.values.__getitem__, texts.codes.data)


def in_order(rows: Sequence[LabelRow], order: Numbers) -> Iterator[LabelRow]:
    """The rows at these places, one after the other."""
    for start in range(0, len(order), _AT_A_TIME):
        part = order[start : start + _AT_A_TIME]
        if isinstance(rows, LabelRows):
            yield from rows.take(part)
        else:
            yield from (rows[number] for number in part.tolist())


def _between(texts: Texts | Names, part: slice) -> list[str]:
    if isinstance(texts, Texts):
        return texts[part]
    return [texts.values[code] for code in texts.codes[part].tolist()]
