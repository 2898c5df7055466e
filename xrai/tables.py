"""Plain values, mappings and dataclasses as JSON and CSV text."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PATHS = frozenset({"path", "other_path", "source"})  # columns of relative paths
_BEGINS_FORMULA = "-=+@\uff1d\uff0b\uff0d\uff20"  # also of full width
_FORMULA = (*_BEGINS_FORMULA, "\t", "\r", "\n")
_SPLITS = frozenset("\r;\t")
_FORMULA_AFTER_SPLIT = re.compile(rf'([;\t\r\n][\s"]*)(?=[{_BEGINS_FORMULA}])')


def to_json(value: object) -> str:
    """JSON text; what is not finite becomes null. Fields with `in_json=False` are left out."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, object] | DataclassInstance]) -> str:
    """CSV text with a header; what is missing, None or not finite is an empty field.

    Text comes from anywhere, and a click on a cell `=cmd|' /C …'!A0` of a spreadsheet runs it
    (OWASP, CSV injection). So text that begins as a formula does gets `./` in front in a column
    of `PATHS`, where it stays the same path, and `'` in others. So does what begins as a formula
    after a semicolon, tab or line end, since quotes hide these from a reader with another separator
    in the first column alone.
    """
    table = [
        [
            _harmless(column, _plain(value), is_first=place == 0)
            for place, (column, value) in enumerate(zip(columns, cells, strict=True))
        ]
        for cells in (_cells(columns, row) for row in rows)
    ]
    # Readers may end a line at "\r", or a cell at ";" and a tab: csv.writer does not quote those
    is_split = any(
        isinstance(cell, str) and not _SPLITS.isdisjoint(cell) for cells in table for cell in cells
    )
    buffer = io.StringIO(newline="")
    quote_all = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer = quote_all if is_split else csv.writer(buffer, lineterminator="\n")
    writer.writerows([columns, *table])
    return buffer.getvalue()


def _harmless(column: str, value: object, *, is_first: bool) -> object:
    if not isinstance(value, str):
        return value
    if not is_first:
        value = _FORMULA_AFTER_SPLIT.sub(r"\1'", value)
    if not value.startswith(_FORMULA):
        return value
    return f"./{value}" if column in PATHS else f"'{value}"


def _cells(columns: Sequence[str], row: Mapping[str, object] | DataclassInstance) -> list[object]:
    if isinstance(row, Mapping):
        if unknown := set(row) - set(columns):
            raise ValueError(f"{sorted(unknown)} are not among the columns {', '.join(columns)}")
        return [row.get(column) for column in columns]
    return [getattr(row, column) for column in columns]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        shown = [field.name for field in fields(value) if field.metadata.get("in_json", True)]
        return {name: _plain(getattr(value, name)) for name in shown}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
