"""What a data set will hold, before any picture is decoded: every file's hash, split, shard and place.

The plan follows from the source's contents and the config alone. Each planned shard can then be made by itself, by any
worker or machine (`xrai.dataset.build`), and ends in the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xrai.config import Config
from xrai.dataset.manifest import CLASSES, Entry, Row, lay_out
from xrai.dataset.shards import SCHEMA_VERSION, SPLITS, shard_name
from xrai.dataset.sources import Source
from xrai.dataset.splits import assign_splits
from xrai.errors import ImageError, SourceError
from xrai.log import get_logger, progress

_HASH_THREADS = 4
_logger = get_logger(__name__)


@dataclass(frozen=True)
class PlannedShard:
    """One shard: its key and split, and its rows in order. Files that can not be decoded will leave it shorter."""

    name: str
    split: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """All of a data set but its pixels."""

    source: str  # for people
    rows: tuple[Row, ...]  # one a data file, sorted by path; shard and row are not filled in yet
    shards: tuple[PlannedShard, ...]
    carved: tuple[str, ...]
    num_not_data: int
    notes: tuple[str, ...]
    config: Mapping[str, Any]  # the sections that shape the data
    sha256: str  # of everything above that decides the contents


def make_plan(source: Source, config: Config, *, num_threads: int = _HASH_THREADS) -> Plan:
    """Hash every data file and decide where each goes.

    Raises `SourceError` when the source is empty, lacks a class, has an unknown class folder, or the same image in two
    of its splits; and when more files can not be read than `images.max_set_aside` allows.
    """
    layout = lay_out((file.path for file in source.files()), source=source.name)
    if words := layout.describe_not_data():
        _logger.info("%s", words)
    with (
        progress("hash", total=len(layout.entries), unit="files") as bar,
        ThreadPoolExecutor(max(num_threads, source.num_parallel_reads)) as pool,
    ):
        rows = []
        for row in pool.map(lambda entry: _hashed(source, entry), layout.entries):
            rows.append(row)
            bar.update()
    check_set_aside(rows, config.images.max_set_aside)
    assignment = assign_splits(rows, config.splits)
    for note in assignment.notes:
        _logger.warning("%s", note)
    shaping = {section: asdict(getattr(config, section)) for section in ("images", "splits", "shards")}
    shards = _cut(assignment.rows, rows_per_shard=config.shards.rows)
    contents = [SCHEMA_VERSION, CLASSES, shaping, [asdict(row) for row in assignment.rows]]
    return Plan(
        source=source.name,
        rows=assignment.rows,
        shards=shards,
        carved=assignment.carved,
        num_not_data=sum(layout.not_data.values()),
        notes=assignment.notes,
        config=shaping,
        sha256=hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
    )


def check_set_aside(rows: "list[Row] | tuple[Row, ...]", limit: float) -> None:
    """Raise `SourceError`, naming some, when more than the share `limit` of the files is set aside."""
    aside = [row for row in rows if row.reason]
    if len(aside) > limit * len(rows):
        shown = "; ".join(f"{row.path} {row.reason}" for row in aside[:3])
        raise SourceError(
            f"{len(aside)} of {len(rows)} files can not be used, more than images.max_set_aside = {limit:g} of them "
            f"({shown}{'; …' if len(aside) > 3 else ''}); mend or remove them, or raise the limit"
        )


def hash_of(data: bytes | NDArray[np.uint8]) -> str:
    """Hex sha256 of a source file's bytes, or of a picture's shape and pixels."""
    if isinstance(data, np.ndarray):
        return hashlib.sha256(repr(data.shape).encode() + np.ascontiguousarray(data).tobytes()).hexdigest()
    return hashlib.sha256(data).hexdigest()


def _hashed(source: Source, entry: Entry) -> Row:
    row = Row(
        path=entry.path, sha256="", label=entry.label, patient=entry.patient, subtype=entry.subtype, split=entry.split
    )
    try:
        return replace(row, sha256=hash_of(source.read(entry.path)))
    except ImageError as error:
        return replace(row, reason=str(error))


def _cut(rows: tuple[Row, ...], *, rows_per_shard: int) -> tuple[PlannedShard, ...]:
    """Rows by split, in the order of their hashes, cut into shards: each shard is a random sample of its split."""
    shards = []
    for split in SPLITS:
        ordered = sorted((row for row in rows if row.split == split and not row.reason), key=_by_hash)
        num_shards = -(-len(ordered) // rows_per_shard)
        for number in range(num_shards):
            part = tuple(ordered[number * rows_per_shard : (number + 1) * rows_per_shard])
            shards.append(PlannedShard(shard_name(split, number, num_shards), split, part))
    return tuple(shards)


_by_hash: Callable[[Row], tuple[str, str]] = lambda row: (row.sha256, row.path)  # noqa: E731
