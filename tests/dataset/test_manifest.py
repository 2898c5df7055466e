import dataclasses
import json

import pytest

from xrai.dataset.manifest import Row, manifest_lines, parse_manifest
from xrai.errors import CorruptError

ROWS = [
    Row("train/NORMAL/a b.png", "ab" * 32, 0, "IM:0115", "", "train", "train-00000-of-00001.h5", 3),
    Row(
        "train/PNEUMONIA/ü,\"'\n.png",
        "",
        1,
        "bacteria:7",
        "bacterial",
        "",
        reason="is empty (0 bytes)",
    ),
]


def read(data: bytes, *, where: str = "m") -> list[Row]:
    return [*parse_manifest(data.splitlines(), where=where)]


def test_a_manifest_reads_back_as_it_was_written() -> None:
    data = b"".join(manifest_lines(ROWS))
    assert read(data) == ROWS
    assert [json.loads(line)["path"] for line in data.splitlines()] == [row.path for row in ROWS]


def test_a_row_becomes_the_mapping_that_dataclasses_would_give() -> None:
    for row in ROWS:
        assert list(row.to_mapping().items()) == list(dataclasses.asdict(row).items())


def test_a_damaged_manifest_is_refused_by_line() -> None:
    with pytest.raises(CorruptError, match=r"manifest\.jsonl: line 3 is not a row"):
        read(b"".join(manifest_lines(ROWS)) + b"\xff\n", where="manifest.jsonl")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": 7}, "path is 7"),
        ({"patient": {}}, "patient is {}"),
        ({"split": None}, "split is None"),
        ({"sha256": "ab"}, "sha256 is 'ab'"),
        ({"sha256": "AB" * 32}, f"sha256 is '{'AB' * 32}'"),
        ({"label": "1"}, "label is '1'"),
        ({"label": True}, "label is True"),
        ({"label": [0, [1]]}, "label is [0, [1]]"),
        ({"label": [0, 0.5]}, "label is [0, 0.5]"),
        ({"row": -1}, "row is -1"),
        ({"row": 2**31}, "row is 2147483648"),
        ({"row": "3"}, "row is '3'"),
        ({"shard": 3}, "shard is 3"),
        ({"reason": "x", "more": 1}, "'more' is unknown"),
    ],
)
def test_a_value_that_is_none_of_a_row_is_named(change: dict[str, object], words: str) -> None:
    line = json.dumps({**ROWS[0].to_mapping(), **change}).encode()
    with pytest.raises(CorruptError) as raised:
        read(line)
    assert str(raised.value) == f"m: line 1 is not a row of a manifest: {words}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[]", "no JSON object"),
        (b"{}", "it has no path"),
        (b'{"path": "x"}', "it has no sha256"),
        (b"{", "Expecting property name"),
        (b"[" * 100_000, "maximum recursion depth"),
    ],
)
def test_a_line_that_is_no_row_is_refused(line: bytes, words: str) -> None:
    with pytest.raises(CorruptError, match=f"m: line 1 is not a row of a manifest: {words}"):
        read(line)


@pytest.mark.parametrize("label", [1, [0, -1, 1]])
def test_a_label_or_findings_are_read(label: object) -> None:
    (row,) = read(json.dumps({**ROWS[0].to_mapping(), "label": label}).encode())
    assert row.label == (tuple(label) if isinstance(label, list) else label)
