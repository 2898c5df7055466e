import dataclasses
import json

import pytest

from xrai.dataset.manifest import Row, manifest_lines, read_manifest
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


def test_a_manifest_reads_back_as_it_was_written() -> None:
    data = b"".join(manifest_lines(ROWS))
    assert read_manifest(data, where="m") == ROWS
    assert [json.loads(line)["path"] for line in data.splitlines()] == [row.path for row in ROWS]


def test_a_row_becomes_the_mapping_that_dataclasses_would_give() -> None:
    for row in ROWS:
        assert list(row.to_mapping().items()) == list(dataclasses.asdict(row).items())


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"path": "x"}', b"\xff", b'{"path": "x", "more": 1}']
)
def test_a_damaged_manifest_is_refused_by_line(line: bytes) -> None:
    with pytest.raises(CorruptError, match=r"manifest\.jsonl, line 3, is not a row"):
        read_manifest(b"".join(manifest_lines(ROWS)) + line + b"\n", where="manifest.jsonl")
