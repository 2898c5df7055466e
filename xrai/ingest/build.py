"""Hash, decode, cut into shards, store, commit: the work behind `xrai.preprocess`.

While a data set is made its address holds objects whose keys begin with "unfinished-": a claim,
which says what is being made; the hashes of the source's files; and for each shard a part, which
says what the shard holds. When all parts are there, the manifest, the report and, last,
`dataset.json` are written and the unfinished objects removed. So a job that was killed goes on from
what is stored, machines can share the work, two jobs at once do each other no harm, and whoever
finishes last commits, with the same bytes.
"""

import ctypes
import hashlib
import json
import math
import multiprocessing
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import forkserver
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL
from numpy.typing import NDArray

from xrai import __version__
from xrai.config import Images
from xrai.dataset.manifest import CLASSES, Row, manifest_lines
from xrai.dataset.rules import grey_histogram, mean_and_std
from xrai.dataset.shards import (
    HDF5_VERSION,
    INDEX_KEY,
    MANIFEST_KEY,
    SPLITS,
    Counts,
    DatasetIndex,
    ObjectInfo,
    ShardInfo,
    hash_object,
    read_index,
    write_shard,
)
from xrai.errors import (
    AlreadyExistsError,
    CorruptError,
    DatasetError,
    ImageError,
    NotFoundError,
    SourceError,
    XraiError,
)
from xrai.ingest import dicom
from xrai.ingest.images import decode_sized
from xrai.ingest.leaks import find_near_pairs, num_pairs, perceptual_hash
from xrai.ingest.plan import Listing, Plan, PlannedShard, check_set_aside, hash_files, hash_of
from xrai.ingest.sources import Source
from xrai.ingest.splits import refuse_missing_class
from xrai.log import Progress, get_logger, progress
from xrai.store import Store
from xrai.workers import start_pool

UNFINISHED: Final = "unfinished-"  # what the keys of everything begin with that a commit removes

_CLAIM = f"{UNFINISHED}claim.json"
_FILES_A_GROUP = 1024  # files whose hashes are stored together
_IMAGES_A_TASK = 16  # images that a worker process takes at a time
_TASKS_AHEAD = 4  # a worker; what was decoded before it is needed, held in memory
_CHECKS_AT_A_TIME = 8
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Decoded:
    """One usable picture."""

    pixels: NDArray[np.uint8]  # (H, W)
    size: tuple[int, int]  # (width, height) of the source picture, upright, pixels
    perceptual_hash: str


@dataclass(frozen=True)
class Part:
    """What one planned shard came to."""

    plan_sha256: str
    shard: ShardInfo | None  # None where every file of it was set aside
    reasons: dict[str, str]  # path -> why it was set aside
    histogram: list[int]  # pixels of each grey level, (256,)
    perceptual_hashes: list[str]  # of the shard's rows, (N,)

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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"not the part of a data set: {error}") from error


@dataclass(frozen=True)
class NearDuplicate:
    """Two images of different splits that look the same."""

    distance: int  # bits of 256
    one: Row
    other: Row


_File = tuple[str, str]  # path and sha256 of a source file
_Found = tuple[
    tuple[int, int], str
]  # size of a source picture and perceptual hash: of `Decoded` all but the pixels
Report = Callable[[DatasetIndex, Sequence[Row], Sequence[NearDuplicate]], dict[str, bytes]]


# ------------------------------------------------------------------------------- unfinished objects


class Unfinished:
    """What an address holds while a data set is made there. Whatever is damaged counts as not
    there.
    """

    def __init__(self, store: Store, listing: Listing, config: dict[str, Any]) -> None:
        self._store = store
        claim = {
            "listing_sha256": listing.sha256,
            "source": listing.source,
            "config": config,
            "made_with": {
                "xrai": __version__,
                "pillow": PIL.__version__,
                "hdf5": HDF5_VERSION,
                **dicom.versions(),
            },
        }
        self._claim = json.dumps(claim, sort_keys=True).encode()

    def claim(self) -> None:
        """Say at the address what is being made there. Raises `DatasetError` where something
        else is.
        """
        try:
            self._store.write(_CLAIM, self._claim, only_if_absent=True)
        except AlreadyExistsError:
            try:
                there = self._store.read(_CLAIM)
            except (
                NotFoundError
            ):  # whoever made it has just committed, with what this process will come to as well
                return
            if there != self._claim:
                raise DatasetError(
                    f"{self._store.uri} holds the beginning of a data set from another source, config or version: "
                    "finish that one, choose another --dataset, or discard it with --overwrite"
                ) from None
            _logger.info("going on with the data set that was begun at %s", self._store.uri)

    def hashes(self, group: int) -> list[list[str]] | None:
        """Stored (sha256, reason, patient) of a group of files."""
        data = self._read(_hashes_key(group))
        try:
            return (
                None
                if data is None
                else [[str(text) for text in found] for found in json.loads(data)]
            )
        except (ValueError, TypeError):
            return None

    def store_hashes(self, group: int, found: Sequence[Sequence[str]]) -> None:
        self._write(_hashes_key(group), json.dumps(found).encode())

    def part(self, shard: PlannedShard, plan: Plan) -> Part | None:
        """The stored part of a shard, if it is of this plan."""
        data = self._read(_part_key(shard.name))
        try:
            part = None if data is None else Part.from_json(data)
        except CorruptError:
            return None
        return part if part is not None and part.plan_sha256 == plan.sha256 else None

    def store_part(self, shard: PlannedShard, part: Part) -> None:
        self._write(_part_key(shard.name), part.to_json())

    def drop_part(self, shard: PlannedShard) -> None:
        self._store.delete(_part_key(shard.name))

    def _write(self, key: str, data: bytes) -> None:
        self._store.write(key, hash_of(data).encode() + b"\n" + data)

    def _read(self, key: str) -> bytes | None:
        """What `_write` stored, None where there is nothing or it was damaged since."""
        try:
            digest, _, data = self._store.read(key).partition(b"\n")
        except NotFoundError:
            return None
        return data if digest == hash_of(data).encode() else None


def remove_unfinished(store: Store) -> None:
    """Remove what a commit has made superfluous; the claim goes last."""
    for key in [entry.key for entry in store.list(UNFINISHED) if entry.key != _CLAIM]:
        store.delete(key)
    store.delete(_CLAIM)


def _hashes_key(group: int) -> str:
    return f"{UNFINISHED}hashes-{group:05d}"


def _part_key(name: str) -> str:
    return f"{UNFINISHED}part-{name}"


# ------------------------------------------------------------------------------------------ hashing


def hash_source(
    source: Source,
    listing: Listing,
    unfinished: Unfinished | None,
    *,
    number: int = 0,
    num_partitions: int = 1,
) -> list[Row]:
    """Rows of all data files, sorted by path. What others have hashed already is taken from them.

    Partition `number` begins with its own groups of files and then hashes what is still missing: no
    process waits for another, and machines that run side by side read the source about once between
    them.
    """
    entries = listing.layout.entries
    groups = [
        entries[start : start + _FILES_A_GROUP] for start in range(0, len(entries), _FILES_A_GROUP)
    ]
    own_first = sorted(
        range(len(groups)), key=lambda group: ((group - number) % num_partitions, group)
    )
    rows: dict[int, list[Row]] = {}
    with progress("hash", total=len(entries), unit="files") as bar:
        for group in own_first:
            found = unfinished.hashes(group) if unfinished else None
            if found is not None and [len(texts) for texts in found] == [3] * len(groups[group]):
                rows[group] = [
                    Row(
                        entry.path,
                        sha256,
                        entry.label,
                        patient,
                        entry.subtype,
                        entry.split,
                        reason=reason,
                    )
                    for entry, (sha256, reason, patient) in zip(groups[group], found, strict=True)
                ]
                bar.update(len(found))
                continue
            rows[group] = hash_files(source, groups[group], on_done=bar.update)
            if unfinished:
                unfinished.store_hashes(
                    group, [(row.sha256, row.reason, row.patient) for row in rows[group]]
                )
    return [row for group in range(len(groups)) for row in rows[group]]


# ----------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class _Taken:
    """The decoded pictures of one planned shard, and its files that have none."""

    images: NDArray[np.uint8]  # (N, H, W)
    rows: list[Row]  # (N,), as all but `reasons`
    sizes: list[tuple[int, int]]  # (width, height) of the source pictures
    hashes: list[str]
    reasons: dict[str, str]  # path -> why it was set aside


class Builder:
    """Makes the data set of a plan at an address, or a share of it."""

    def __init__(
        self, plan: Plan, source: Source, store: Store, unfinished: Unfinished, *, num_workers: int
    ) -> None:
        self._plan, self._source, self._store, self._unfinished = plan, source, store, unfinished
        self._images = Images(**plan.config["images"])
        self._num_workers = num_workers

    def build(self, shards: Sequence[PlannedShard]) -> None:
        """Make these shards and their parts, but for those that are stored already.

        Raises `SourceError` as soon as it is sure that too many files are set aside, or when the
        source changes.
        """
        stored = {
            shard.name: part for shard in shards if (part := self._stored_part(shard)) is not None
        }
        missing = [shard for shard in shards if shard.name not in stored]
        if stored:
            _logger.info("%d of %d shards are stored already", len(stored), len(shards))
        unusable = [*self._plan.unusable]
        for shard in shards:
            if shard.name in stored:
                unusable += _set_aside(shard, stored[shard.name].reasons)
        rows = [row for shard in missing for row in shard.rows]
        with (
            progress("preprocess", total=len(rows), unit="images") as bar,
            closing(
                decode_rows(self._source, self._images, rows, num_workers=self._num_workers)
            ) as pictures,
            ThreadPoolExecutor(
                1
            ) as pool,  # a shard is stored while the next one's pictures are decoded
        ):
            storing: Future[None] | None = None
            for shard in missing:
                taken = self._take(shard, islice(pictures, len(shard.rows)), bar)
                unusable += _set_aside(shard, taken.reasons)
                check_set_aside(
                    unusable, num_files=len(self._plan.rows), limit=self._images.max_set_aside
                )
                if storing is not None:
                    storing.result()
                storing = pool.submit(self._store_taken, shard, taken)
            if storing is not None:
                storing.result()

    def commit(self, report: Report) -> DatasetIndex | None:
        """Write manifest, report and `dataset.json` and remove the unfinished objects, if all parts
        are there.

        Returns None, having done nothing, where they are not. `report` gives the report's files by
        key. Raises `CorruptError` naming the shards whose stored bytes are not those that were
        made; their parts are removed, so that the next start makes them anew.
        """
        with ThreadPoolExecutor(_CHECKS_AT_A_TIME) as pool:
            found = list(
                pool.map(lambda shard: self._unfinished.part(shard, self._plan), self._plan.shards)
            )
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        self._check_stored(parts)
        with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
            index, objects = assemble(self._plan, parts, report, Path(folder))
            for key, path in objects.items():
                self._store.upload(key, path)
        try:
            self._store.write(INDEX_KEY, index.to_json().encode(), only_if_absent=True)
        except AlreadyExistsError:  # another process was faster; both mean the same
            if read_index(self._store) != index:
                raise DatasetError(
                    f"another data set was stored at {self._store.uri} meanwhile"
                ) from None
        remove_unfinished(self._store)
        return index

    def _take(
        self, shard: PlannedShard, pictures: Iterable[Decoded | str], bar: Progress
    ) -> _Taken:
        images = np.empty((len(shard.rows), self._images.size, self._images.size), np.uint8)
        rows: list[Row] = []
        hashes, sizes, reasons = [], [], {}
        for row, picture in zip(shard.rows, pictures, strict=True):
            bar.update()
            if isinstance(picture, str):
                reasons[row.path] = picture
                continue
            images[len(rows)] = picture.pixels
            hashes.append(picture.perceptual_hash)
            sizes.append(picture.size)
            rows.append(row)
        return _Taken(images[: len(rows)], rows, sizes, hashes, reasons)

    def _store_taken(self, shard: PlannedShard, taken: _Taken) -> None:
        info = self._store_shard(shard, taken) if taken.rows else None
        part = Part(
            self._plan.sha256,
            info,
            taken.reasons,
            grey_histogram(taken.images).tolist(),
            taken.hashes,
        )
        self._unfinished.store_part(shard, part)

    def _store_shard(self, shard: PlannedShard, taken: _Taken) -> ShardInfo:
        with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
            path = Path(folder) / shard.name
            write_rows(path, taken.rows, taken.images, sizes=taken.sizes)
            digest = self._store.upload(shard.name, path)
            size_bytes = path.stat().st_size
        counts = tuple(
            sum(row.label == label for row in taken.rows) for label in range(len(CLASSES))
        )
        return ShardInfo(shard.name, len(taken.rows), size_bytes, digest, counts)

    def _stored_part(self, shard: PlannedShard) -> Part | None:
        """A shard's part, where the shard's stored bytes are those that it names."""
        part = self._unfinished.part(shard, self._plan)
        if (
            part is None
            or part.shard is None
            or hash_object(self._store, part.shard.name) == part.shard.sha256
        ):
            return part
        return None

    def _check_stored(self, parts: Sequence[Part]) -> None:
        infos = [part.shard for part in parts if part.shard is not None]
        with ThreadPoolExecutor(_CHECKS_AT_A_TIME) as pool:
            digests = list(pool.map(lambda info: hash_object(self._store, info.name), infos))
        bad = [
            info.name for info, digest in zip(infos, digests, strict=True) if digest != info.sha256
        ]
        for shard in self._plan.shards:
            if shard.name in bad:
                self._unfinished.drop_part(shard)
        if bad:
            raise CorruptError(
                f"at {self._store.uri} {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not what was stored there; "
                "start again, and only these are made anew"
            )


def write_rows(
    path: Path, rows: Sequence[Row], images: NDArray[np.uint8], *, sizes: Sequence[tuple[int, int]]
) -> None:
    """Write the shard of some rows; `sizes` are (width, height) of their source pictures."""
    with _explained(path, path.name):
        write_shard(
            path,
            images=images,
            labels=np.array([row.label for row in rows], np.uint8),
            source=[row.path for row in rows],
            patient=[row.patient for row in rows],
            subtype=[row.subtype for row in rows],
            sha256=[row.sha256 for row in rows],
            width=[width for width, _ in sizes],
            height=[height for _, height in sizes],
        )


def assemble(
    plan: Plan, parts: Sequence[Part], report: Report, folder: Path
) -> tuple[DatasetIndex, dict[str, Path]]:
    """What a commit writes: the index, and by key the manifest and the report, as files below
    `folder`.

    The parts give up their perceptual hashes. Raises `SourceError` when too many files are set
    aside, or a class or val has none left.
    """
    rows = _finished_rows(plan, parts)
    unusable = [*plan.unusable]
    for shard, part in zip(plan.shards, parts, strict=True):
        unusable += _set_aside(shard, part.reasons)
    check_set_aside(unusable, num_files=len(rows), limit=plan.config["images"]["max_set_aside"])
    index = _make_index(plan, parts, rows)
    near = _near_duplicates(plan, parts, rows)
    for part in parts:
        part.perceptual_hashes.clear()  # a tenth of all memory
    if near:
        _logger.warning(
            "%d pairs of images in two splits look the same, such as %s and %s",
            len(near),
            near[0].one.path,
            near[0].other.path,
        )
    contents: dict[str, Iterable[bytes]] = {MANIFEST_KEY: manifest_lines(rows)}
    contents.update((key, [data]) for key, data in report(index, rows, near).items())
    paths = {key: folder / str(number) for number, key in enumerate(contents)}
    infos = tuple(_write_object(paths[key], key, pieces) for key, pieces in contents.items())
    return replace(index, objects=infos), paths


def _write_object(path: Path, key: str, pieces: Iterable[bytes]) -> ObjectInfo:
    digest, size_bytes = hashlib.sha256(), 0
    with _explained(path, key), path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
    return ObjectInfo(key, size_bytes, digest.hexdigest())


@contextmanager
def _explained(path: Path, name: str) -> Iterator[None]:
    """Say what to do where a file cannot be written before it is stored."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: what h5py makes of a full disk when it closes a file
        raise XraiError(
            f"{name} cannot be written in {path.parent}: {error}; make room there, or set TMPDIR to another disk"
        ) from error


def _set_aside(shard: PlannedShard, reasons: Mapping[str, str]) -> list[Row]:
    if not reasons:
        return []
    return [replace(row, reason=reasons[row.path]) for row in shard.rows if row.path in reasons]


def _finished_rows(plan: Plan, parts: Sequence[Part]) -> list[Row]:
    """The manifest: the plan's rows with shard, place and what was set aside in decoding."""
    finished = [
        row for row in plan.rows if row.reason or row.split not in SPLITS
    ]  # those in no shard
    places = list(
        range(max((len(shard.rows) for shard in plan.shards), default=0))
    )  # held once for all shards
    for shard, part in zip(plan.shards, parts, strict=True):
        kept = (row for row in shard.rows if row.path not in part.reasons)
        finished += [
            replace(row, shard=shard.name, row=place)
            for place, row in zip(places, kept, strict=False)
        ]
        finished += _set_aside(shard, part.reasons)
    finished.sort(
        key=attrgetter("path")
    )  # as in the plan: a dictionary by path would take a tenth more memory
    return finished


def _near_duplicates(plan: Plan, parts: Sequence[Part], rows: Sequence[Row]) -> list[NearDuplicate]:
    hashes: dict[str, list[str]] = {}
    starts: dict[str, int] = {}  # of a shard -> how many hashes of its split come before its own
    for shard, part in zip(plan.shards, parts, strict=True):
        of_split = hashes.setdefault(shard.split, [])
        starts[shard.name] = len(of_split)
        of_split.extend(part.perceptual_hashes)
    with progress("near-duplicates", total=num_pairs(hashes), unit="pairs") as bar:
        found = find_near_pairs(hashes, on_done=bar.update)
    wanted = {(split, pair.one) for (split, _), pairs in found.items() for pair in pairs}
    wanted |= {(other, pair.other) for (_, other), pairs in found.items() for pair in pairs}
    written = {}
    for row in rows:
        if (
            row.shard is not None
            and (place := (row.split, starts[row.shard] + (row.row or 0))) in wanted
        ):
            written[place] = row
    near = [
        NearDuplicate(pair.distance, written[split, pair.one], written[other, pair.other])
        for (split, other), pairs in found.items()
        for pair in pairs
    ]
    return sorted(near, key=lambda pair: (pair.distance, pair.one.path, pair.other.path))


def _make_index(plan: Plan, parts: Sequence[Part], rows: Sequence[Row]) -> DatasetIndex:
    used = [row for row in rows if row.shard is not None]
    refuse_missing_class((row.label for row in used if row.split == "train"), where="train")
    if not any(row.split == "val" for row in used):
        raise SourceError(
            "no image of val could be decoded; mend them, or raise splits.val_fraction"
        )
    shards: dict[str, list[ShardInfo]] = {}
    histogram = np.zeros(256, np.int64)  # of train
    for shard, part in zip(plan.shards, parts, strict=True):
        if part.shard is not None:
            shards.setdefault(shard.split, []).append(part.shard)
        if shard.split == "train":
            histogram += np.array(part.histogram)
    mean, std = mean_and_std(histogram)
    return DatasetIndex(
        classes=CLASSES,
        image_size=int(plan.config["images"]["size"]),
        splits={split: tuple(shards[split]) for split in SPLITS if split in shards},
        carved=plan.carved,
        pixel_mean=mean,
        pixel_std=std,
        source=plan.source,
        plan_sha256=plan.sha256,
        counts=Counts(len(rows), len(used), len(rows) - len(used), plan.num_not_data),
        objects=(),
        config=plan.config,
        tool_version=__version__,
    )


# ----------------------------------------------------------------------------------------- decoding


def decode_rows(
    source: Source, images: Images, rows: Sequence[Row], *, num_workers: int
) -> Generator[Decoded | str, None, None]:
    """The picture of each row in order, or the reason why it has none; with several processes if
    asked.

    Holds a bounded number of pictures, whatever the number of rows. Who may stop before the last
    row closes it, which ends the processes. Raises `SourceError` when a file is no longer the one
    that was hashed.
    """
    starts = range(0, len(rows), _IMAGES_A_TASK)
    num_workers = min(num_workers, len(starts))
    if num_workers <= 1:
        for start in starts:
            yield from _decode_files(
                source, images, _files_of(rows[start : start + _IMAGES_A_TASK])
            )
        return
    num_places = _TASKS_AHEAD * num_workers + 1
    shape = (num_places, _IMAGES_A_TASK, images.size, images.size)
    start_workers_soon()
    context = multiprocessing.get_context("forkserver")
    shared = context.RawArray(
        ctypes.c_uint8, math.prod(shape)
    )  # pixels go through memory, all else through pipes
    pictures = np.ctypeslib.as_array(shared).reshape(shape)
    executor = start_pool(num_workers, context, _begin_work, source, images, shared)
    ahead: deque[Future[list[_Found | str]]] = deque()
    taken = 0  # tasks whose pictures were handed on, so that their places are free again

    def take() -> Iterator[Decoded | str]:
        nonlocal taken
        for found, pixels in zip(
            ahead.popleft().result(), pictures[taken % num_places], strict=False
        ):
            yield found if isinstance(found, str) else Decoded(pixels.copy(), *found)
        taken += 1

    try:
        for number, start in enumerate(starts):
            files = _files_of(rows[start : start + _IMAGES_A_TASK])
            ahead.append(executor.submit(_work, files, number % num_places))
            if len(ahead) > _TASKS_AHEAD * num_workers:
                yield from take()
        while ahead:
            yield from take()
    except BrokenProcessPool as error:
        raise XraiError(
            "a worker process ended abruptly, perhaps killed for want of memory; start again with fewer --workers, "
            "what is stored is kept"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def start_workers_soon() -> None:
    """Let the server that workers are forked from import its modules, beside other work; again,
    it does nothing.
    """
    forkserver.set_forkserver_preload([__name__])
    forkserver.ensure_running()


_worker: tuple[Source, Images, NDArray[np.uint8]] | None = (
    None  # of a worker process, which opens its source once
)


def _begin_work(source: Source, images: Images, shared: Any) -> None:
    global _worker
    places = np.ctypeslib.as_array(shared).reshape(-1, _IMAGES_A_TASK, images.size, images.size)
    _worker = (source, images, places)


def _work(files: Sequence[_File], place: int) -> list[_Found | str]:
    """Put the pictures into their place; return what else there is to say about each."""
    assert _worker is not None
    source, images, places = _worker
    results: list[_Found | str] = []
    for pixels, decoded in zip(places[place], _decode_files(source, images, files), strict=False):
        if isinstance(decoded, str):
            results.append(decoded)
        else:
            pixels[:] = decoded.pixels
            results.append((decoded.size, decoded.perceptual_hash))
    return results


def _files_of(rows: Iterable[Row]) -> list[_File]:
    return [(row.path, row.sha256) for row in rows]


def _decode_files(source: Source, images: Images, files: Sequence[_File]) -> list[Decoded | str]:
    if source.num_parallel_reads == 1:
        return [_decode_file(source, images, file) for file in files]
    with ThreadPoolExecutor(source.num_parallel_reads) as pool:
        return list(pool.map(lambda file: _decode_file(source, images, file), files))


def _decode_file(source: Source, images: Images, file: _File) -> Decoded | str:
    path, sha256 = file
    try:
        data = source.read(path)
        if hash_of(data) != sha256:
            raise SourceError(
                f"{path} in source {source.name} was changed while it was read; start again"
            )
        pixels, size = decode_sized(
            data, size=images.size, fit=images.fit, max_pixels=images.max_pixels
        )
    except ImageError as error:
        return str(error)
    return Decoded(pixels, size, perceptual_hash(pixels))
