"""One row per source file: what it shows, whose it is, and where it went or why it was excluded.

`xrai.ingest` makes the rows; `xrai.verify` checks them.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

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
    subtype: str  # such as "viral"; "" where nothing is said
    split: str  # "" where the file was excluded before it had one
    shard: str | None = None  # name of the shard that holds it, None if excluded
    row: int | None = None  # position in that shard
    reason: str = ""  # why it was excluded

    def to_mapping(self) -> dict[str, Label | str | None]:
        """As `dataclasses.asdict`, in a tenth of its time."""
        return {name: getattr(self, name) for name in self.__slots__}


_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {  # of the values in JSON
    "path": (str,),
    "sha256": (str,),
    "label": (int, list),
    "patient": (str,),
    "subtype": (str,),
    "split": (str,),
    "shard": (str, _NONE),
    "row": (int, _NONE),
    "reason": (str,),
}
_NEEDED = [field.name for field in fields(Row) if field.default is MISSING]
_SHA256 = re.compile(r"(?:[0-9a-f]{64})?")


def manifest_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    """The lines of `manifest.jsonl`: JSON, 280 bytes a row."""
    for row in rows:
        yield json.dumps(row.to_mapping()).encode() + b"\n"


def parse_manifest(lines: Iterable[bytes], *, where: str) -> Iterator[Row]:
    """The rows of `manifest.jsonl`, one at a time: held together they take 700 bytes each.

    Raises `CorruptError` that names a line that is no row.
    """
    known: dict[Label, Label] = {}
    for number, line in enumerate(lines, start=1):
        try:
            values = _values_of(json.loads(line))
        except (ValueError, RecursionError) as error:
            words = f"line {number} is not a row of a manifest: {error}"
            raise CorruptError(f"{where}: {words}") from error
        if isinstance(values["label"], list):
            label = tuple(values["label"])
            values["label"] = known.setdefault(label, label)
        yield Row(**values)


def _values_of(found: Any) -> dict[str, Any]:
    """The values of a row by their names, of what a line says. Raises `ValueError` that names what
    is no value of a row.
    """
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    for name, value in found.items():
        if type(value) not in _KINDS.get(name, ()):  # exactly: a bool is no int
            raise _fault(name, value) if name in _KINDS else ValueError(f"{name!r} is unknown")
    if len(found) < len(_KINDS) and (missing := [name for name in _NEEDED if name not in found]):
        raise ValueError(f"it has no {missing[0]}")
    label, place, sha256 = found["label"], found.get("row"), found["sha256"]
    if type(label) is list and not {*map(type, label)} <= {int}:
        raise _fault("label", label)
    if place is not None and not 0 <= place < 2**31:
        raise _fault("row", place)
    if not _SHA256.fullmatch(sha256):
        raise _fault("sha256", sha256)
    return found


def _fault(name: str, value: Any) -> ValueError:
    return ValueError(f"{name} is {value!r}"[:200])
