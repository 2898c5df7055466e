"""Decode, cut into shards, store, commit: the work behind `xrai.preprocess`.

Shards are made one after the other, each from its part of the plan, with all cores decoding. After a shard its part
file follows, `parts/<shard>.json`, which says what it holds; when all parts are there, manifest, report and, last,
`dataset.json` are written and the parts removed. So a job that was killed goes on from what is stored, several machines
can share the work, and whoever finishes last commits, with the same bytes.
"""

import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xrai import __version__
from xrai.config import Images
from xrai.dataset.images import decode
from xrai.dataset.manifest import CLASSES, Row, write_manifest
from xrai.dataset.plan import Plan, PlannedShard, check_set_aside, hash_of
from xrai.dataset.shards import (
    INDEX_KEY,
    MANIFEST_KEY,
    SPLITS,
    Counts,
    DatasetIndex,
    ObjectInfo,
    ShardInfo,
    read_index,
    write_shard,
)
from xrai.dataset.sources import Source
from xrai.errors import (
    AlreadyExistsError,
    CorruptError,
    DatasetError,
    ImageError,
    NotFoundError,
    SourceError,
    XraiError,
)
from xrai.log import Progress, get_logger, progress
from xrai.store import Store

PARTS = "parts"
_CLAIM = f"{PARTS}/plan.json"
_CHUNK = 16  # images that a worker takes at a time
_PARENT_POLL_S = 1.0
_logger = get_logger(__name__)

Picture = NDArray[np.uint8] | str  # (H, W), or the reason why there is none


@dataclass(frozen=True)
class Part:
    """What one planned shard came to."""

    plan_sha256: str
    shard: ShardInfo | None  # None where every file of it was set aside
    reasons: dict[str, str]  # path -> why it was set aside
    pixel_sum: int
    pixel_square_sum: int

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Part":
        """Read one back. Raises `CorruptError` where it is not what was written."""
        try:
            mapping = json.loads(data)
            if mapping["shard"] is not None:
                counts = tuple(mapping["shard"].pop("num_rows_per_class"))
                mapping["shard"] = ShardInfo(**mapping["shard"], num_rows_per_class=counts)
            return cls(**mapping)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"is no part of a data set: {error}") from error


class Builder:
    """Makes the data set of a plan at an address, or its share of it."""

    def __init__(self, plan: Plan, source: Source, store: Store, images: Images, *, num_workers: int) -> None:
        self._plan, self._source, self._store, self._images = plan, source, store, images
        self._num_workers = num_workers
        self._mine: list[str] = []  # keys that this process has stored
        self._reasons: dict[str, str] = {}  # path -> why it was set aside, of the shards made here

    def claim(self) -> None:
        """Say at the address what is being made there. Raises `DatasetError` where something else is."""
        claim = json.dumps({"plan_sha256": self._plan.sha256}).encode()
        try:
            self._store.write(_CLAIM, claim, only_if_absent=True)
        except AlreadyExistsError:
            if self._store.read(_CLAIM) != claim:
                raise DatasetError(
                    f"{self._store.uri} holds the beginning of a data set from another source or config: finish that "
                    "one, choose another --dataset, or start anew with --overwrite"
                ) from None
            _logger.info("going on with the data set that was begun at %s", self._store.uri)

    def build(self, shards: Sequence[PlannedShard]) -> None:
        """Make these shards, but for those that are stored already, and their parts.

        Raises `SourceError` when more files are set aside than allowed; then nothing that this call stored is left.
        """
        missing = [shard for shard in shards if self._stored_part(shard) is None]
        num_rows = sum(len(shard.rows) for shard in missing)
        if len(missing) < len(shards):
            _logger.info("%d of %d shards are stored already", len(shards) - len(missing), len(shards))
        began = time.monotonic()
        with progress("preprocess", total=num_rows, unit="images") as bar, self._pool() as pictures:
            for shard, part_pictures in zip(missing, _by_shard(pictures(missing), missing), strict=True):
                part = self._make(shard, part_pictures, bar)
                try:
                    self._check_limit(part)
                except SourceError:
                    for key in self._mine:
                        self._store.delete(key)
                    self._store.delete(_CLAIM)
                    raise
        if num_rows:
            _logger.info("%d images in %.1f s", num_rows, time.monotonic() - began)

    def parts(self) -> list[Part] | None:
        """All parts of the plan in order, or None while some are missing."""
        found = [self._part(shard) for shard in self._plan.shards]
        return None if None in found else [part for part in found if part is not None]

    def commit(self, parts: Sequence[Part], report: Callable[[DatasetIndex, Sequence[Row]], dict[str, bytes]]) -> None:
        """Write manifest, report and `dataset.json`, and remove the parts. `report` gives the report's files by key."""
        rows = _finished_rows(self._plan, parts)
        check_set_aside(rows, self._images.max_set_aside)
        for part in parts:
            if part.shard is not None and self._store.size(part.shard.name) != part.shard.size_bytes:
                raise CorruptError(f"{self._store.uri}/{part.shard.name} is not the shard that was stored; start again")
        index = _index(self._plan, parts, rows)
        objects = {MANIFEST_KEY: write_manifest(rows), **report(index, rows)}
        infos = []
        for key, data in objects.items():
            self._store.write(key, data)
            infos.append(ObjectInfo(key, len(data), hash_of(data)))
        index = replace(index, objects=tuple(infos))
        try:
            self._store.write(INDEX_KEY, index.to_json().encode(), only_if_absent=True)
        except AlreadyExistsError:  # another machine was faster; both mean the same
            if read_index(self._store) != index:
                raise DatasetError(f"another data set was stored at {self._store.uri} meanwhile") from None
        remove_parts(self._store)

    def _make(self, shard: PlannedShard, pictures: Iterator[Picture], bar: Progress) -> Part:
        size = self._images.size
        images = np.empty((len(shard.rows), size, size), np.uint8)
        kept: list[Row] = []
        reasons = {}
        for row in shard.rows:
            picture = next(pictures)
            bar.update()
            if isinstance(picture, str):
                reasons[row.path] = picture
                continue
            images[len(kept)] = picture
            kept.append(row)
        images = images[: len(kept)]
        info = self._store_shard(shard, images, kept) if kept else None
        pixels = images.reshape(len(kept), -1).astype(np.int64)
        part = Part(self._plan.sha256, info, reasons, int(pixels.sum()), int(np.square(pixels).sum()))
        self._store.write(_part_key(shard), part.to_json())
        self._mine.append(_part_key(shard))
        return part

    def _store_shard(self, shard: PlannedShard, images: NDArray[np.uint8], rows: Sequence[Row]) -> ShardInfo:
        labels = np.array([row.label for row in rows], np.uint8)
        with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
            path = Path(folder) / shard.name
            try:
                write_shard(
                    path, images=images, labels=labels, source=[row.path for row in rows],
                    patient=[row.patient for row in rows], subtype=[row.subtype for row in rows],
                    sha256=[row.sha256 for row in rows],
                )  # fmt: skip
            except OSError as error:
                raise XraiError(
                    f"{shard.name} can not be written in {folder}: {error.strerror or error}; make room there, or set "
                    "TMPDIR to another disk"
                ) from error
            size_bytes = path.stat().st_size
            self._mine.append(shard.name)
            digest = self._store.upload(shard.name, path)
        counts = tuple(int(np.count_nonzero(labels == label)) for label in range(len(CLASSES)))
        return ShardInfo(shard.name, len(rows), size_bytes, digest, counts)

    def _check_limit(self, part: Part) -> None:
        """Refuse as soon as it is sure that too many files are set aside."""
        self._reasons.update(part.reasons)
        check_set_aside(
            [replace(row, reason=row.reason or self._reasons.get(row.path, "")) for row in self._plan.rows],
            self._images.max_set_aside,
        )

    def _part(self, shard: PlannedShard) -> Part | None:
        try:
            part = Part.from_json(self._store.read(_part_key(shard)))
        except (NotFoundError, CorruptError):
            return None
        return part if part.plan_sha256 == self._plan.sha256 else None

    def _stored_part(self, shard: PlannedShard) -> Part | None:
        """A shard's part, where the shard's stored bytes are those that it names."""
        part = self._part(shard)
        if part is None or part.shard is None:
            return part
        with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
            try:
                digest = self._store.download(part.shard.name, Path(folder) / "shard")
            except NotFoundError:
                return None
        return part if digest == part.shard.sha256 else None

    def _pool(self) -> "_Pool":
        return _Pool(self._source, self._images, num_workers=self._num_workers)


def remove_parts(store: Store) -> None:
    """Remove what a commit has made superfluous; the claim goes last."""
    for key in [entry.key for entry in store.list(f"{PARTS}/") if entry.key != _CLAIM]:
        store.delete(key)
    store.delete(_CLAIM)


def _part_key(shard: PlannedShard) -> str:
    return f"{PARTS}/{shard.name}.json"


def _finished_rows(plan: Plan, parts: Sequence[Part]) -> list[Row]:
    """The manifest: the plan's rows with shard, place and what was set aside in decoding."""
    placed: dict[str, Row] = {}
    for shard, part in zip(plan.shards, parts, strict=True):
        place = 0
        for row in shard.rows:
            if row.path in part.reasons:
                placed[row.path] = replace(row, reason=part.reasons[row.path])
            else:
                placed[row.path] = replace(row, shard=shard.name, row=place)
                place += 1
        assert place == (part.shard.num_rows if part.shard else 0)
    return [placed.get(row.path, row) for row in plan.rows]


def _index(plan: Plan, parts: Sequence[Part], rows: Sequence[Row]) -> DatasetIndex:
    splits: dict[str, tuple[ShardInfo, ...]] = {}
    for split in SPLITS:
        pairs = zip(plan.shards, parts, strict=True)
        infos = tuple(part.shard for shard, part in pairs if shard.split == split and part.shard is not None)
        if infos:
            splits[split] = infos
    for split in ("train", "val"):
        if split not in splits:
            raise SourceError(f"all files of {split} are set aside; manifest lines say why")
    train = [part for shard, part in zip(plan.shards, parts, strict=True) if shard.split == "train"]
    size = int(plan.config["images"]["size"])
    num_pixels = sum(info.num_rows for info in splits["train"]) * size * size
    mean = sum(part.pixel_sum for part in train) / num_pixels
    variance = max(0.0, sum(part.pixel_square_sum for part in train) / num_pixels - mean**2)
    num_set_aside = sum(bool(row.reason) for row in rows)
    return DatasetIndex(
        classes=CLASSES,
        image_size=size,
        splits=splits,
        carved=plan.carved,
        pixel_mean=mean,
        pixel_std=variance**0.5,
        source=plan.source,
        plan_sha256=plan.sha256,
        counts=Counts(len(rows), len(rows) - num_set_aside, num_set_aside, plan.num_not_data),
        objects=(),
        config=plan.config,
        tool_version=__version__,
    )


# ------------------------------------------------------------------------------------------------------------- workers


class _Pool:
    """Decodes on several cores, in order, with a bounded number of pictures ahead."""

    def __init__(self, source: Source, images: Images, *, num_workers: int) -> None:
        self._source, self._images, self._num_workers = source, images, num_workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Callable[[Sequence[PlannedShard]], Iterator[Picture]]":
        if self._num_workers > 1:
            self._executor = ProcessPoolExecutor(
                self._num_workers,
                mp_context=get_context("spawn"),
                initializer=_begin_work,
                initargs=(self._source, self._images, os.getpid()),
            )
        return self._pictures

    def __exit__(self, *_: Any) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _pictures(self, shards: Sequence[PlannedShard]) -> Iterator[Picture]:
        rows = (row for shard in shards for row in shard.rows)
        if self._executor is None:
            for row in rows:
                yield _decode_row(self._source, self._images, row)
            return
        ahead: deque[Future[list[Picture]]] = deque()
        try:
            for chunk in _chunks(rows):
                ahead.append(self._executor.submit(_decode_rows, chunk))
                if len(ahead) > 4 * self._num_workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        except BrokenProcessPool as error:
            raise XraiError(
                "a worker process ended abruptly, killed for want of memory perhaps: start again with fewer --workers, "
                "what is stored is kept"
            ) from error


_worker: tuple[Source, Images] | None = None  # of a worker process; set once, when it begins


def _begin_work(source: Source, images: Images, parent: int) -> None:
    global _worker
    _worker = (source, images)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)  # the parent was killed and can take no results

    threading.Thread(target=watch, daemon=True).start()


def _decode_rows(rows: list[Row]) -> list[Picture]:
    assert _worker is not None
    return [_decode_row(*_worker, row) for row in rows]


def _decode_row(source: Source, images: Images, row: Row) -> Picture:
    """The picture (H, W) of a row, or the reason why it is set aside."""
    try:
        data = source.read(row.path)
        if hash_of(data) != row.sha256:
            raise SourceError(f"{row.path} in {source.name} was changed while it was read; start again")
        return decode(data, size=images.size, fit=images.fit, max_pixels=images.max_pixels)
    except ImageError as error:
        return str(error)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _by_shard(pictures: Iterator[Picture], shards: Sequence[PlannedShard]) -> Iterator[Iterator[Picture]]:
    """The same stream once for each shard: each takes its own number of pictures."""
    for _ in shards:
        yield pictures
