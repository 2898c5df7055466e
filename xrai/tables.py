"""Plain values, mappings and dataclasses as JSON and CSV text."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PATHS = frozenset({"path", "other_path", "source"})  # columns of relative paths
_BEGINS_FORMULA = "-=+@\uff1d\uff0b\uff0d\uff20"  # also as full-width characters
_FORMULA = (*_BEGINS_FORMULA, "\t", "\r", "\n")
_SPLITS = frozenset("\r;\t")
_FORMULA_AFTER_SPLIT = re.compile(rf'([;\t\r\n][\s"]*)(?=[{_BEGINS_FORMULA}])')


def to_json(value: object) -> str:
    """JSON text; what is not finite becomes null. Fields with `in_json=False` are left out."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_json(data: str | bytes) -> Any:
    """The plain values of JSON text. Raises `ValueError` if it is not valid or nested too deep."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def from_plain(kind: Any, value: Any, name: str = "it") -> Any:
    """`value`, from JSON, as a `kind`: a dataclass, or a type that the field of one may have.

    Other keys than a dataclass has are left out. Raises `ValueError` that names the first value of
    another type; numbers must be finite, and no larger than a float or 64 bits can hold.
    """
    parts: tuple[Any, ...] = get_args(kind)
    if type(None) in parts:
        kinds = [part for part in parts if part is not type(None)]
        return None if value is None else from_plain(kinds[0], value, name)
    kept = get_origin(kind) or kind
    if kept is Literal and value in parts:
        return value
    if kind is Any:
        return value
    if kept is Mapping and isinstance(value, dict):
        return {key: from_plain(parts[1], each, f"{name}.{key}") for key, each in value.items()}
    if kept is tuple and isinstance(value, list):
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(kinds) == len(value):
            return tuple(map(from_plain, kinds, value, [name] * len(value)))
    if hasattr(kept, "__dataclass_fields__") and isinstance(value, dict):
        hints = get_type_hints(kept)
        for field in fields(kept):
            if field.name not in value and field.default is MISSING:
                raise ValueError(f"{name} lacks {field.name}")
        given = [field.name for field in fields(kept) if field.name in value]
        return kept(**{key: from_plain(hints[key], value[key], f"{name}.{key}") for key in given})
    is_number = type(value) is int or type(value) is float
    if is_number and not (abs(value) < 2**63 if type(value) is int else math.isfinite(value)):
        raise ValueError(f"{name} is not a number that can be used")
    if type(value) is kind or (kind is float and is_number):
        return value
    raise ValueError(f"{name} is {reprlib.repr(value)}, of another type")


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
    names = [_harmless("", name, is_first=place == 0) for place, name in enumerate(columns)]
    # Readers may end a line at "\r", or a cell at ";" and a tab: csv.writer does not quote those
    is_split = any(
        isinstance(cell, str) and not _SPLITS.isdisjoint(cell)
        for cells in [names, *table]
        for cell in cells
    )
    buffer = io.StringIO(newline="")
    quote_all = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer = quote_all if is_split else csv.writer(buffer, lineterminator="\n")
    writer.writerows([names, *table])
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
