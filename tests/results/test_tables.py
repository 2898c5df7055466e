"""JSON and CSV of any values, read back by others."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xrai.results.folder import RunFolder
from xrai.results.tables import safe_path


def test_json_has_null_for_what_is_not_finite_and_plain_numbers_for_numpy_ones(
    run: RunFolder,
) -> None:
    path = run.write_json(
        "x.json",
        {"a": np.float32(0.5), "b": [math.nan, np.int64(3)], "c": {"d": math.inf}, "e": "ü"},
    )
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [None, 3], "c": {"d": None}, "e": "ü"}


def test_predictions_come_back_as_they_were_whatever_the_names(run: RunFolder) -> None:
    rows: list[dict[str, Any]] = [
        {
            "source": 'a,"b"\nc.png',
            "patient": "p1",
            "subtype": "",
            "label": 1,
            "score": 0.1 + 0.2,
            "call": 0,
        },
        {
            "source": "d.png",
            "patient": "p2",
            "subtype": "virus",
            "label": 0,
            "score": np.float32(0.3),
        },
    ]
    path = run.write_predictions(rows)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [entry["source"] for entry in found] == ['a,"b"\nc.png', "d.png"]
    assert float(found[0]["score"]) == 0.1 + 0.2
    assert np.float32(found[1]["score"]) == np.float32(0.3)
    assert found[1]["call"] == ""


@pytest.mark.parametrize(
    "name",
    [
        "=1+1.png",
        "+1.png",
        "-1.png",
        "@x/y.png",
        "\tx.png",
        "\r=x.png",
        "\n-x",
        "=cmd|' /C calc'!A0",
    ],
)
def test_no_cell_of_predictions_begins_as_a_formula_does_and_the_path_stays_the_same(
    run: RunFolder, name: str
) -> None:
    values = {
        "split": "val",
        "patient": "file:x",
        "subtype": "",
        "label": "NORMAL",
        "score": 0.5,
        "call": "NORMAL",
    }
    path = run.write_predictions(
        [{"source": name, **values}, {"source": "train/a=b.png", **values}]
    )
    with path.open(newline="") as file:
        hostile, plain = csv.DictReader(file)
    assert all(cell[:1] not in ("=", "+", "-", "@", "\t", "\r", "\n") for cell in hostile.values())
    assert Path("raw", hostile["source"]) == Path("raw", name)
    assert plain["source"] == "train/a=b.png"
    assert safe_path(safe_path(name)) == safe_path(name)
