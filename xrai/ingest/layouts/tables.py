"""Where the tables of a layout are, and their rows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from xrai.errors import ImageError, NotFoundError, SourceError
from xrai.ingest.label_rows import LabelRow
from xrai.ingest.labels import stem_of, tail_of
from xrai.ingest.records import (
    MAX_BYTES,
    Fault,
    decode,
    explain_header,
    read_records,
    read_text,
    refuse,
)
from xrai.ingest.sources import Source, open_source
from xrai.labels import folded
from xrai.store import open_parent


@dataclass(frozen=True)
class Record:
    """One row of a table of a layout."""

    table: str
    line: int
    cells: Sequence[str]
    columns: Mapping[str, int]  # folded name -> place

    def get(self, column: str) -> str:
        """The cell of a column, in lower case here; "" where the table has none."""
        place = self.columns.get(column)
        return "" if place is None or place >= len(self.cells) else self.cells[place].strip()

    @property
    def place(self) -> str:
        """For people: "train.csv, line 7"."""
        return f"{self.table}, line {self.line}"

    def row(self, cells: Mapping[str, str], findings: tuple[int, ...] = ()) -> LabelRow:
        """This row in the general form."""
        return LabelRow(self.line, cells, findings, self.table)


@dataclass(frozen=True)
class TableFile:
    """A table's name and text."""

    name: str
    text: str

    def records(self, *required: str) -> Iterator[Record]:
        """Its rows, of a CSV file with these columns (in lower case). Raises `SourceError`."""
        rows = read_records(self.text, name=self.name, required=required)
        line, header = next(rows)
        columns: dict[str, int] = {}
        for place, cell in enumerate(header):
            columns.setdefault(folded(cell), place)
        if not columns.keys() >= set(required):
            raise SourceError(explain_header(self.name, ",".join(header), [*columns], required))
        needed = 1 + max(place for place, cell in enumerate(header) if cell.strip())
        for line, cells in rows:
            if len(cells) < needed:
                words = f"has {len(cells)} cells, the first line {len(header)}"
                refuse([(f"line {line}", words)], name=self.name)
            yield Record(self.name, line, cells, columns)

    @cached_property
    def header(self) -> list[str]:
        """The first line's cells."""
        first = next(read_records(self.text, name=self.name, required=()))
        return [cell.strip() for cell in first[1]]


class Tables:
    """The tables of a layout: those in the folder, zip or bucket `uri`, or next to the file `uri`;
    in the source where `uri` is empty.
    """

    def __init__(self, uri: str, source: Source, *, layout: str) -> None:
        self._uri, self._layout, self._source = uri, layout, source
        self._place: Source | None = source if not uri else None
        if uri and (Path(uri).is_dir() or uri.endswith("/") or uri.lower().endswith(".zip")):
            self._place = open_source(uri.rstrip("/") or "/")

    @property
    def is_file(self) -> bool:
        """Whether `--labels` names one table."""
        return self._place is None

    def main(self, pattern: str, *, wanted: str) -> TableFile:
        """The table that `--labels` names, else the one whose name fits; `wanted` is for messages.
        Raises `SourceError` where there is none, or several.
        """
        if self.is_file:
            name, text = read_text(self._uri, wanted=f"{wanted} of labels.layout = {self._layout}")
            return TableFile(name, text)
        found = self.find(pattern)
        if found is None:
            where = self._place.name if self._place else self._uri
            raise SourceError(
                f"there is no {wanted} in {where}, which labels.layout = {self._layout} reads: "
                "name the file, or the folder that holds it, by --labels"
            )
        return found

    def find(self, pattern: str) -> TableFile | None:
        """The table whose name fits, the one with the fewest folders above; None where there is
        none, or `--labels` names a file. Raises `SourceError` where several fit.
        """
        named = [
            path
            for path in self._paths
            if re.fullmatch(pattern, path.rpartition("/")[2], re.IGNORECASE)
        ]
        top = min((path.count("/") for path in named), default=0)
        fitting = [path for path in named if path.count("/") == top]
        if len(fitting) > 1:
            raise SourceError(
                f"{fitting[0]} and {fitting[1]} may both be the table that labels.layout = "
                f"{self._layout} reads: name one by --labels FILE"
            )
        return self._read(fitting[0]) if fitting else None

    def beside(self, name: str) -> TableFile | None:
        """The table of this name, next to the one that `--labels` names or in its folder."""
        if not self.is_file:
            return self.find(re.escape(name))
        try:
            data = open_parent(self._uri)[0].read(name, max_bytes=MAX_BYTES)
        except NotFoundError:
            return None
        return TableFile(name, decode(data, name=name))

    def note_unused(self, table: TableFile, column: str, *, tail_parts: int) -> list[str]:
        """A note where the source has none of the files that a table names in a column; see
        `LabelTable.tail_parts`.
        """
        tails = (tail_of(row.get(column), tail_parts) for row in table.records(column))
        named = {name for tail in tails for name in (tail, stem_of(tail)) if name}
        for path in self._source.files().paths:
            tail = tail_of(path, tail_parts)
            if tail in named or stem_of(tail) in named:
                return []
        return [f"{table.name} is not used, as {self._source.name} has none of its images"]

    @cached_property
    def _paths(self) -> Sequence[str]:
        return self._place.files().paths if self._place else ()

    def _read(self, path: str) -> TableFile:
        assert self._place is not None
        name = path.rpartition("/")[2]
        try:
            data = self._place.read(path)
        except ImageError as error:
            raise SourceError(f"{path} {error}") from error
        return TableFile(name, decode(bytes(data), name=name))


def merge(rows: Sequence[LabelRow], *, name: str) -> tuple[LabelRow, ...]:
    """Rows without those that repeat another in all that they say. Raises `SourceError` where two
    rows of an image contradict each other.
    """
    first: dict[str, LabelRow] = {}
    faults: list[Fault] = []
    for row in rows:
        other = first.setdefault(row.cells["path"], row)
        if (other.cells, other.findings) != (row.cells, row.findings):
            differs = [
                f"{column} {other.cells.get(column)!r}"
                for column, cell in row.cells.items()
                if other.cells.get(column) != cell and column != "patient"
            ]
            faults.append(
                (
                    row.place,
                    f"{row.cells['path']!r} contradicts {other.place}"
                    + (f", which says {differs[0]}" if differs else ""),
                )
            )
    refuse(faults, name=name)
    return tuple(first.values())
