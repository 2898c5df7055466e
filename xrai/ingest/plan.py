"""What a data set will hold, before any picture is decoded: every file's hash, split, shard and
place.

The plan follows from the source's contents and the config alone. Each planned shard can then be
made by itself, by any worker or machine (`xrai.ingest.build`), and ends in the same bytes.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xrai.config import Config
from xrai.dataset.manifest import CLASSES, Row
from xrai.dataset.rules import in_shard_order
from xrai.dataset.shards import SCHEMA_VERSION, SPLITS, shard_name
from xrai.errors import ImageError, SourceError
from xrai.ingest.dicom import is_dicom, read_patient_id
from xrai.ingest.labels import LabelTable, lay_out_by_labels
from xrai.ingest.layout import Entry, Layout, hashed_patient, is_file_patient, lay_out
from xrai.ingest.sources import Source
from xrai.ingest.splits import assign_splits, refuse_missing_class
from xrai.log import get_logger

SHAPING_SECTIONS: Final = (
    "images",
    "splits",
    "shards",
)  # of the config: those that decide what a data set holds

_FILES_A_TASK = 8  # that a thread takes at a time: small ones cost less to hash than to hand over
_LARGE_BYTES = (
    1 << 16
)  # of a file; threads that read smaller ones from memory take longer than one that does it all
_WAITS_S = 0.0005  # a file; one in memory takes a tenth of it
_MAX_HASH_THREADS = 8
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Listing:
    """What a source's listing says, before any file is read."""

    source: str  # for people
    layout: Layout
    sha256: str  # of the paths and sizes, and of what a table says about them


@dataclass(frozen=True)
class PlannedShard:
    """One shard: its key and split, and its rows in order. Files that cannot be decoded will
    leave it shorter.
    """

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
    unusable: tuple[Row, ...]  # those set aside so far, but for duplicates left out on request
    num_not_data: int
    notes: tuple[str, ...]
    config: Mapping[str, Any]  # the sections that shape the data
    sha256: str  # of everything above that decides the contents


def list_source(source: Source, table: LabelTable | None = None) -> Listing:
    """List a source and find its data files, by their folders or by a table.

    Raises `SourceError` when it is empty, lacks a class or has an unknown one, or the table does
    not fit it.
    """
    files = source.files()
    paths = (file.path for file in files)
    if table is None:
        layout = lay_out(paths, source=source.name)
    else:
        layout = lay_out_by_labels(paths, table, source=source.name)
    refuse_missing_class((entry.label for entry in layout.entries), where=f"source {source.name}")
    if words := layout.describe_not_data():
        _logger.info("%s", words)
    listed = (f"{file.path}\0{file.size_bytes}\n" for file in files)
    said = [] if table is None else _in_list(json.dumps(asdict(entry)) for entry in layout.entries)
    return Listing(source.name, layout, _hash_of_texts(chain(listed, said)))


def hash_files(
    source: Source, entries: Sequence[Entry], *, on_done: Callable[[int], object]
) -> list[Row]:
    """One row an entry, with the hash of its file, or the reason why it cannot be read.

    Where neither name nor table say whose picture it is, a DICOM file does, by PatientID: it must
    not be in two splits. Raises `SourceError` for such a file where pydicom is not installed.
    """

    def hashed(entry: Entry) -> Row:
        patient, sha256, reason = entry.patient, "", ""
        try:
            data = source.read(entry.path)
        except ImageError as error:
            reason = str(error)
        else:
            if isinstance(data, bytes):
                sizes.append(len(data))
                if is_file_patient(patient) and is_dicom(data):
                    patient = _patient_in(data, patient)
            sha256 = hash_of(data)
        return Row(
            entry.path, sha256, entry.label, patient, entry.subtype, entry.split, reason=reason
        )

    sizes: list[int] = []  # bytes
    began, began_busy = time.perf_counter(), time.thread_time()
    rows = [hashed(entry) for entry in entries[:_FILES_A_TASK]]
    took_s, busy_s = time.perf_counter() - began, time.thread_time() - began_busy
    on_done(len(rows))
    rest = entries[_FILES_A_TASK:]
    num_threads = source.num_parallel_reads
    if took_s > _WAITS_S * len(rows) and took_s > 2 * busy_s:  # for a network, or a disk that turns
        num_threads = max(num_threads, _MAX_HASH_THREADS)
    elif num_threads == 1 and sum(sizes) > _LARGE_BYTES * len(
        sizes
    ):  # Python's lock is free while one is hashed
        num_threads = min(len(os.sched_getaffinity(0)), _MAX_HASH_THREADS)
    tasks = [rest[start : start + _FILES_A_TASK] for start in range(0, len(rest), _FILES_A_TASK)]
    with ThreadPoolExecutor(num_threads) as pool:
        for found in pool.map(lambda task: [hashed(entry) for entry in task], tasks):
            rows += found
            on_done(len(found))
    return rows


def _patient_in(data: bytes, patient: str) -> str:
    """The key of a DICOM file's patient; `patient`, the one of its path, where it states none."""
    group = patient.partition(":")[0]
    identifier = read_patient_id(data)
    return (
        hashed_patient(identifier, group="dicom" if group == "file" else group)
        if identifier
        else patient
    )


def make_plan(listing: Listing, rows: Sequence[Row], config: Config) -> Plan:
    """Decide where each file goes; `rows` are those of `hash_files` for all entries of the listing.

    Raises `SourceError` as `assign_splits` does, and when fewer files can be used than
    `images.max_set_aside` allows.
    """
    check_set_aside(
        [row for row in rows if row.reason], num_files=len(rows), limit=config.images.max_set_aside
    )
    assignment = assign_splits(rows, config.splits)
    unusable = [row for row in assignment.rows if row.reason and row.path not in assignment.dropped]
    check_set_aside(unusable, num_files=len(rows), limit=config.images.max_set_aside)
    shaping = shaping_config(config)
    decided = (
        json.dumps([SCHEMA_VERSION, CLASSES, shaping], sort_keys=True).removesuffix("]") + ", "
    )
    told = (json.dumps(row.to_mapping(), sort_keys=True) for row in assignment.rows)
    contents = chain([decided], _in_list(told), ["]"])
    return Plan(
        source=listing.source,
        rows=assignment.rows,
        shards=_cut(assignment.rows, rows_per_shard=config.shards.rows),
        carved=assignment.carved,
        unusable=tuple(unusable),
        num_not_data=sum(listing.layout.not_data.values()),
        notes=assignment.notes,
        config=shaping,
        sha256=_hash_of_texts(contents),
    )


def _in_list(texts: Iterable[str]) -> Iterator[str]:
    """A list in JSON of values in JSON, in pieces: whole, that of a large source would be the
    most memory of all.
    """
    yield "["
    for number, text in enumerate(texts):
        yield f", {text}" if number else text
    yield "]"


def _hash_of_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def shaping_config(config: Config) -> dict[str, Any]:
    """The sections of the config that decide what a data set holds, as plain values."""
    return {section: asdict(getattr(config, section)) for section in SHAPING_SECTIONS}


def check_set_aside(unusable: Sequence[Row], *, num_files: int, limit: float) -> None:
    """Raise `SourceError`, naming some, when more than the share `limit` of the files cannot be
    used.

    Duplicates that are set aside on request are not counted here: there is nothing wrong with them.
    """
    if len(unusable) > limit * num_files:
        shown = "; ".join(f"{row.path} {row.reason}" for row in unusable[:3])
        raise SourceError(
            f"{len(unusable)} of {num_files} files cannot be used, more than images.max_set_aside = {limit:g} of them "
            f"({shown}{'; …' if len(unusable) > 3 else ''}); mend or remove them, or raise the limit"
        )


def hash_of(data: bytes | NDArray[np.uint8]) -> str:
    """Hex sha256 of a source file's bytes, or of a picture's shape and pixels."""
    if isinstance(data, np.ndarray):
        return hashlib.sha256(
            repr(data.shape).encode() + np.ascontiguousarray(data).tobytes()
        ).hexdigest()
    return hashlib.sha256(data).hexdigest()


def _cut(rows: Sequence[Row], *, rows_per_shard: int) -> tuple[PlannedShard, ...]:
    shards = []
    for split in SPLITS:
        ordered = in_shard_order(row for row in rows if row.split == split and not row.reason)
        num_shards = -(-len(ordered) // rows_per_shard)
        for number in range(num_shards):
            part = tuple(ordered[number * rows_per_shard : (number + 1) * rows_per_shard])
            shards.append(PlannedShard(shard_name(split, number, num_shards), split, part))
    return tuple(shards)
