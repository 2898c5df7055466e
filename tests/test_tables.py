"""JSON and CSV of any values, read back by others."""

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xrai.tables import to_csv, to_json


@dataclass(frozen=True)
class Row:
    source: str
    score: object


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_json_has_null_for_what_is_not_finite_and_plain_numbers_for_numpy_ones() -> None:
    value = {"a": np.float32(0.5), "b": [math.nan, np.int64(3)], "c": {"d": math.inf}, "e": "ü"}
    assert json.loads(to_json(value)) == {"a": 0.5, "b": [None, 3], "c": {"d": None}, "e": "ü"}
    assert json.loads(to_json({"rows": (Row("a", math.nan),)})) == {
        "rows": [{"source": "a", "score": None}]
    }


@pytest.mark.parametrize("name", ['a,"b"\nc.png', "a\rb.png", "a\r\nb", "ä b.png", ""])
def test_csv_gives_every_name_and_every_number_back(name: str) -> None:
    columns = ["source", "score"]
    rows: list[Any] = [
        {"source": name, "score": 0.1 + 0.2},
        Row(name, np.float32(0.3)),
        {"source": name},
    ]
    first, second, third = read(to_csv(columns, rows))
    assert [row["source"] for row in (first, second, third)] == [name] * 3
    assert float(first["score"]) == 0.1 + 0.2
    assert np.float32(second["score"]) == np.float32(0.3)
    assert third["score"] == ""


def test_a_field_of_csv_is_empty_where_a_value_is_none_or_not_finite() -> None:
    rows = [Row("a", None), Row("b", math.nan), Row("c", np.float32("inf"))]
    assert to_csv(["source", "score"], rows) == "source,score\na,\nb,\nc,\n"


def test_a_key_that_is_no_column_of_csv_is_refused() -> None:
    with pytest.raises(ValueError, match="'accuracy'"):
        to_csv(["source", "score"], [{"source": "a", "accuracy": 1.0}])


@pytest.mark.parametrize(
    "name",
    [
        "=1+1.png",
        "\uff1d1",
        "+1.png",
        "-1.png",
        "@x/y",
        "\tx.png",
        "\r=x.png",
        "\n-x",
        "=cmd|' /C calc'!A0",
    ],
)
def test_no_text_begins_as_a_formula_does_and_a_path_stays_the_same_path(name: str) -> None:
    rows: list[Any] = [
        {"source": name, "subtype": name, "score": -1.5},
        {"source": "train/a=b.png"},
    ]
    hostile, plain = read(to_csv(["source", "subtype", "score"], rows))
    for column in ("source", "subtype"):
        assert hostile[column][:1] not in ("=", "+", "-", "@", "\t", "\r", "\n")
    assert Path("raw", hostile["source"]) == Path("raw", name)
    assert hostile["subtype"].startswith(f"'{name[0]}")
    assert hostile["score"] == "-1.5" and plain["source"] == "train/a=b.png"


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("between", ["{}", '"{}', '{}"', "{} ", "\n", "\r"])
def test_no_text_is_a_formula_in_a_spreadsheet_that_has_another_separator(
    separator: str, between: str
) -> None:
    name = f"a{between.format(separator)}=cmd|' /C calc'!A0{separator}.png"
    columns = ["source", "score", "path", "note"]
    text = to_csv(columns, [{"source": name, "score": 1, "path": name, "note": name}])
    found = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    assert not any(cell.lstrip(' "').startswith("=") for row in found for cell in row)
    (row,) = read(text)
    assert row["source"] == name
    assert row["path"] == row["note"] == name.replace("=", "'=")
