"""Plain values as JSON and CSV text."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def to_json(value: Any) -> str:
    """JSON text of plain values, NumPy scalars and dataclasses; what is not finite becomes null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(columns: Sequence[str], rows: Iterable[Any]) -> str:
    """CSV text with a header; what is missing, None or not finite is an empty field. See
    `safe_path` for names.
    """
    buffer = io.StringIO(newline="")
    plain = [
        {key: "" if value is None else value for key, value in _plain(row).items()} for row in rows
    ]
    # csv quotes a carriage return only where it ends lines, and readers take a bare one for the end
    # of a line
    has_return = any(
        isinstance(value, str) and "\r" in value for row in plain for value in row.values()
    )
    quoting: Any = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n", quoting=quoting)
    writer.writeheader()
    writer.writerows(plain)
    return buffer.getvalue()


def safe_path(path: str) -> str:
    """The same relative path, such that no spreadsheet takes it for a formula.

    Names of files come from anywhere, and `=cmd|' /C …'!A0` at the head of a cell is run by a click
    (OWASP, CSV injection). `./` in front changes no path's meaning.
    """
    return f"./{path}" if path.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else path


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
