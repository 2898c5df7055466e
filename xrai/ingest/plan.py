"""What a data set will hold, before any image is decoded: each file's hash, split, shard and place.

The plan follows from the source's contents and the config alone. Each planned shard can then be
made by itself, by any worker or machine (`xrai.ingest.build`), with the same bytes.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xrai.config import Config, Labels
from xrai.dataset.manifest import Row
from xrai.dataset.rows import Rows
from xrai.dataset.rules import in_shard_order
from xrai.dataset.shards import SPLITS, head_of, shard_name
from xrai.errors import SourceError
from xrai.ingest.copies import find_unlike
from xrai.ingest.labels import LabelTable, lay_out_by_labels
from xrai.ingest.layout import Layout, lay_out
from xrai.ingest.patients import PatientKey
from xrai.ingest.sources import Source
from xrai.ingest.splits import assign_splits, refuse_missing_class
from xrai.labels import LabelSpec
from xrai.log import get_logger, printable

# The sections of the config that decide what a data set holds
SHAPING_SECTIONS: Final = ("labels", "images", "splits", "shards")

_DEFAULTS = Labels()
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Listing:
    """What a source's listing says, before any file is read."""

    source: str  # for people
    layout: Layout
    sha256: str  # of the paths and sizes, and of what a table says about them
    key: PatientKey = field(compare=False)  # for the patients in the files


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """One shard: key, split, and rows in order. Files that cannot be decoded leave it shorter."""

    name: str
    split: str
    places: NDArray[np.int32]  # among the rows of the plan
    planned: Rows = field(repr=False)  # all rows of the plan

    def __len__(self) -> int:
        return len(self.places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PlannedShard):
            return NotImplemented
        named = (self.name, self.split) == (other.name, other.split)
        return named and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    @property
    def rows(self) -> Rows:
        """Its own rows, copied each time."""
        return self.planned.take(self.places)


@dataclass(frozen=True)
class Plan:
    """All of a data set but its pixels."""

    source: str  # for people
    labels: LabelSpec  # what the rows' labels mean
    rows: Rows  # one per data file, sorted by path; shard and row are not filled in yet
    shards: tuple[PlannedShard, ...]
    carved: tuple[str, ...]
    unusable: tuple[Row, ...]  # excluded so far, without duplicates that were dropped on request
    num_not_data: int
    notes: tuple[str, ...]
    facts: tuple[str, ...]  # as the notes, where nothing is doubtful
    config: Mapping[str, Any]  # the sections that shape the data
    sha256: str  # of everything above that decides the contents


def list_source(
    source: Source,
    table: LabelTable | None = None,
    key: PatientKey | None = None,
    config: Labels = _DEFAULTS,
) -> Listing:
    """List a source and find its data files, by their folders or by a table. `key` is for the
    identifiers of patients; None means the user's own. `config` says what their labels mean.

    Raises `SourceError` when it is empty, lacks a class or has an unknown one, or the table does
    not fit it.
    """
    files, key = source.files(), key or PatientKey()
    if table is None:
        compare = partial(find_unlike, source, files)
        layout = lay_out(files.paths, source=source.name, config=config, find_unlike=compare)
    else:
        layout = lay_out_by_labels(files.paths, table, source=source.name, key=key, config=config)
    if layout.rows.splits.are("train").any():  # else it is only for evaluation
        refuse_missing_class(layout.rows.labels, layout.labels, where=f"source {source.name}")
    if words := layout.describe_not_data():
        _logger.info("%s", words)
    listed = (f"{path}\0{size_bytes}\n" for path, size_bytes in files.pairs())
    meaning = json.dumps(head_of(layout.labels))
    said = [] if table is None else _in_list(map(_said_of, layout.rows))
    sha256 = _hash_of_texts(chain(listed, [meaning], said))
    return Listing(printable(source.name), layout, sha256, key)


def _said_of(row: Row) -> str:
    """What a table says of a file, JSON."""
    names = ("path", "split", "label", "patient", "subtype")
    return json.dumps({name: getattr(row, name) for name in names})


def make_plan(listing: Listing, rows: Rows, config: Config) -> Plan:
    """Decide where each file goes; `rows` are those of `hash_source`.

    Raises `SourceError` as `assign_splits` does, and when more files are unusable than
    `images.max_set_aside` allows.
    """
    limit = config.images.max_set_aside
    check_excluded(_excluded(rows), num_files=len(rows), limit=limit)
    labels = listing.layout.labels
    assignment = assign_splits(rows, labels, config.splits)
    unusable = _excluded(assignment.rows, without=assignment.dropped)
    shards = _cut(assignment.rows, rows_per_shard=config.shards.rows)
    check_excluded(unusable, num_files=len(rows), limit=limit)
    shaping = shaping_config(config)
    head = json.dumps([*head_of(labels), shaping], sort_keys=True).removesuffix("]") + ", "
    told = (json.dumps(row.to_mapping(), sort_keys=True) for row in assignment.rows)
    return Plan(
        source=listing.source,
        labels=labels,
        rows=replace(assignment.rows),
        shards=shards,
        carved=assignment.carved,
        unusable=tuple(unusable),
        num_not_data=sum(listing.layout.not_data.values()),
        notes=(*listing.layout.notes, *assignment.notes),
        facts=(*listing.layout.facts, *assignment.facts),
        config=shaping,
        sha256=_hash_of_texts(chain([head], _in_list(told), ["]"])),
    )


def _excluded(rows: Rows, *, without: Collection[int] = ()) -> list[Row]:
    return [rows[place] for place in sorted(rows.reasons) if place not in without]


def shaping_config(config: Config) -> dict[str, Any]:
    """The sections of the config that decide what a data set holds, as plain values; without
    `labels` where nothing is said there, as data sets of version 1 have it.
    """
    sections = {section: asdict(getattr(config, section)) for section in SHAPING_SECTIONS}
    if config.labels == _DEFAULTS:
        del sections["labels"]
    return sections


def check_excluded(unusable: Sequence[Row], *, num_files: int, limit: float) -> None:
    """Raise `SourceError`, naming some, when more than the share `limit` of the files is unusable.

    Duplicates that are dropped on request do not count: nothing is wrong with them.
    """
    if len(unusable) > limit * num_files:
        shown = "; ".join(f"{row.path} {row.reason}" for row in unusable[:3])
        raise SourceError(
            f"{len(unusable)} of {num_files} files cannot be used, more than images.max_set_aside "
            f"= {limit:g} of them ({shown}{'; …' if len(unusable) > 3 else ''}); fix or remove "
            "them, or raise the limit"
        )


def _in_list(texts: Iterable[str]) -> Iterator[str]:
    """A JSON list of JSON values, in pieces: a whole one would take more memory than all else."""
    yield "["
    for number, text in enumerate(texts):
        yield f", {text}" if number else text
    yield "]"


def _hash_of_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def _cut(rows: Rows, *, rows_per_shard: int) -> tuple[PlannedShard, ...]:
    shards = []
    planned = replace(rows)  # without the numbers of the images, which are not needed any more
    for split in SPLITS:
        ordered = in_shard_order(rows, split).astype(np.int32)
        num_shards = -(-len(ordered) // rows_per_shard)
        for number in range(num_shards):
            part = ordered[number * rows_per_shard : (number + 1) * rows_per_shard]
            shards.append(PlannedShard(shard_name(split, number, num_shards), split, part, planned))
    return tuple(shards)
