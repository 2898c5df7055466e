"""One row per source file: what it shows, whose it is, and where it went or why it was excluded.

`xrai.ingest` makes the rows; `xrai.verify` checks them.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xrai.errors import CorruptError
from xrai.labels import Label


@dataclass(frozen=True, slots=True)
class Row:
    """One source file."""

    path: str  # in the source, forward slashes
    sha256: str  # hex; "" where the file could not be read
    label: Label  # a list in JSON; rows with the same findings share one tuple
    # Group first: "IM:0115", "bacteria:1000", "dicom:" and a hash; "file:…" where nothing says who
    patient: str
    subtype: str  # "bacterial", "viral" or ""
    split: str  # "" where the file was excluded before it had one
    shard: str | None = None  # name of the shard that holds it, None if excluded
    row: int | None = None  # position in that shard
    reason: str = ""  # why it was excluded

    def to_mapping(self) -> dict[str, Label | str | None]:
        """As `dataclasses.asdict`, in a tenth of its time."""
        return {name: getattr(self, name) for name in self.__slots__}


def manifest_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    """The lines of `manifest.jsonl`: JSON, 280 bytes a row."""
    for row in rows:
        yield json.dumps(row.to_mapping()).encode() + b"\n"


def read_manifest(data: bytes, *, where: str) -> list[Row]:
    """All rows of `manifest.jsonl`. Raises `CorruptError` that names a line that is no row."""
    return list(parse_manifest(data.splitlines(), where=where))


def parse_manifest(lines: Iterable[bytes], *, where: str) -> Iterator[Row]:
    """The rows of `manifest.jsonl`, one at a time: held together they take 700 bytes each."""
    known: dict[Label, Label] = {}
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if isinstance(values["label"], list):
                label = tuple(values["label"])
                values["label"] = known.setdefault(label, label)
            row = Row(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptError(
                f"{where}, line {number}, is not a row of a manifest: {error}"
            ) from error
        yield row
