"""Files of a run and of a data set whose values have other types: one line, no traceback."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training import Finished
from xrai.dataset.shards import DatasetIndex, compute_fingerprint, read_index
from xrai.dataset.shards import _hash_json as hash_json
from xrai.errors import ConfigError, CorruptError, RunError, XraiError
from xrai.evaluate import read_facts
from xrai.learning.checkpoint import CheckpointFolder
from xrai.measuring import describe_dataset
from xrai.results.folder import RunFolder
from xrai.results.history import parse_history
from xrai.results.summary import read_summary, result_lines
from xrai.store import open_store

OTHER: list[Any] = [
    None,
    [],
    {},
    "x",
    [1],
    math.nan,
    math.inf,
    -1,
    10**30,
    1.5,
    True,
    "../../x",
    "missing",
]


def changes(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The same values with one of them replaced by each of `OTHER`, and where that was done."""
    items = values.items() if isinstance(values, dict) else enumerate(values[:1])
    for key, value in items:
        for other in OTHER:
            changed = copy.copy(values)
            changed[key] = other
            if other == "missing":
                del changed[key]
            yield (*place, key), changed
        if isinstance(value, dict | list):
            for where, inner in changes(value, (*place, key)):
                changed = copy.copy(values)
                changed[key] = inner
                yield where, changed


def test_a_summary_of_other_types_is_refused_or_shown(finished: Finished) -> None:
    values = json.loads((finished.folder / "summary.json").read_text())
    del values["files"]
    num_refused = 0
    for where, changed in changes(values):
        try:
            found = read_summary(json.dumps(changed).encode(), where=f"summary {where}")
            result_lines(found.main, "run", validation=found.validation)
        except RunError:
            num_refused += 1
    assert num_refused > 400
    for damaged in (b"", b"[]", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"schema_version": 1}'):
        with pytest.raises(RunError, match="summary"):
            read_summary(damaged, where="summary")


def test_an_index_of_other_types_is_refused_though_its_hash_is_right(finished: Finished) -> None:
    values = json.loads((finished.dataset / "dataset.json").read_text())
    del values["index_sha256"]
    num_refused = 0
    for where, changed in changes(values):
        text = json.dumps(changed | {"index_sha256": hash_json(changed)})
        try:
            index = DatasetIndex.from_json(text, where=f"index {where}")
            compute_fingerprint(index), index.num_images_per_class("train"), index.to_json()
        except XraiError:
            num_refused += 1
    assert num_refused > 400
    for damaged in ("", "[]", "null", "[" * 100_000, "1" * 5000):
        with pytest.raises(XraiError, match="is not the index of a data set"):
            DatasetIndex.from_json(damaged, where="index")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("more than 1000000", lambda index, shard: shard.update(num_rows=2**62)),
        ("has no images", lambda index, shard: shard.update(num_rows=0)),
        (
            "its classes are 'NORMAL', 'NORMAL'",
            lambda index, _: index.update(classes=["NORMAL"] * 2),
        ),
        ("surrogates", lambda index, _: index.update(classes=["NORMAL", "\ud800"])),
        ("is not a key", lambda index, _: index["objects"][0].update(name="\ud800")),
        ("its images are 64 and 32 wide", lambda index, _: index.update(image_size=64)),
    ],
)
def test_a_forged_index_is_refused_though_its_hash_is_right(
    finished: Finished, words: str, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    values = json.loads((finished.dataset / "dataset.json").read_text())
    del values["index_sha256"]
    change(values, values["splits"]["train"][0])
    text = json.dumps(values | {"index_sha256": hash_json(values)})
    with pytest.raises(CorruptError, match=words):
        DatasetIndex.from_json(text, where="index")


def test_a_manifest_of_other_types_is_refused_by_its_line(
    finished: Finished, tmp_path: Path
) -> None:
    index = read_index(open_store(str(finished.dataset)))
    first, *others = (finished.dataset / "manifest.jsonl").read_text().splitlines()
    forged = json.dumps(json.loads(first) | {"patient": {}})
    (tmp_path / "manifest.jsonl").write_text("\n".join([*others, forged]))
    words = f"{tmp_path}/manifest.jsonl: line {1 + len(others)} is not a row of a manifest: "
    with pytest.raises(CorruptError, match=re.escape(words + "patient is {}")):
        describe_dataset(str(tmp_path), index)


def test_config_and_environment_of_other_types_are_refused(
    finished: Finished, tmp_path: Path
) -> None:
    run = RunFolder(str(tmp_path), "r")
    texts = {n: (finished.folder / n).read_text() for n in ("config.yaml", "environment.json")}
    for name, text in texts.items():
        run.path.mkdir(exist_ok=True)
        for each, whole in texts.items():
            (run.path / each).write_text(whole)
        read_facts(run)
        for damaged in ("[1]", "3", "{}", "{model: 3}", "[" * 10_000, '{"packages": []}', ""):
            (run.path / name).write_text(damaged)
            with pytest.raises((RunError, ConfigError)):
                read_facts(run)
        (run.path / name).write_text(text)


def test_a_mark_of_other_types_is_skipped_with_a_warning(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark = sorted((finished.folder / "checkpoints").glob("step-*.json"))[-1]
    (tmp_path / "checkpoints").mkdir()
    store = open_store(str(tmp_path))
    published: list[object] = []
    folder = CheckpointFolder(
        tmp_path,
        store=store,
        publish=published.append,
        remove=published.append,
        keep_last=1,
        keep_best=1,
    )
    for _, changed in changes(json.loads(mark.read_text())):
        (tmp_path / "checkpoints" / mark.name).write_text(json.dumps(changed))
        with pytest.raises(RunError, match="none of the checkpoints"):
            folder.newest()
    (tmp_path / "checkpoints" / mark.name).write_text("[" * 100_000)
    with pytest.raises(RunError, match="none of the checkpoints"):
        folder.newest()
    assert "is damaged and skipped: it is nested too deep" in caplog.text


@pytest.mark.parametrize(
    "row", ["x,1", "1,x", "0,1", "1,-1", "9" * 5000 + ",1", "99999999999,1", "1", "1,1,1,1,1", "\0"]
)
def test_a_history_of_other_types_is_refused(row: str) -> None:
    with pytest.raises(RunError, match="is not a history"):
        parse_history(f"epoch,step,lr\n{row}".encode(), where="history.csv")
    with pytest.raises(RunError, match="is not a history"):
        parse_history(b"epoch,step,lr\n1,1," + b"0" * 200_000, where="history.csv")
