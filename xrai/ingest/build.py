"""Make the shards of a plan, then commit: manifest, report and, last, `dataset.json`.

`xrai.preprocess` calls it. Each shard is stored with its part (`xrai.ingest.unfinished`). The
partition that ends last commits, with the same bytes whichever it is.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrai import __version__
from xrai.config import Images
from xrai.dataset import shards
from xrai.dataset.manifest import Row, manifest_lines
from xrai.dataset.rows import Names, Rows
from xrai.dataset.rules import grey_histogram, mean_and_std
from xrai.dataset.shards import SPLITS, DatasetIndex, ObjectInfo, ShardInfo
from xrai.errors import AlreadyExistsError, CorruptError, DatasetError, SourceError
from xrai.files import explaining, temporary_folder
from xrai.ingest.decode import Decoded, decode_rows
from xrai.ingest.greys import FEW_GREYS, with_few_greys
from xrai.ingest.leaks import NearPair, find_near_pairs, num_pairs, words_of
from xrai.ingest.plan import Plan, PlannedShard, check_excluded
from xrai.ingest.sources import Source
from xrai.ingest.splits import refuse_missing_class
from xrai.ingest.unfinished import Part, Unfinished
from xrai.labels import LabelSpec
from xrai.log import counted, get_logger, progress
from xrai.store import Store

_CHECKS_AT_A_TIME = 8
_logger = get_logger(__name__)


@dataclass(frozen=True)
class NearDuplicate:
    """Two images of different splits that look the same."""

    distance: int  # bits of 256
    one: Row
    other: Row


@dataclass(frozen=True)
class Contents:
    """All that a report can say about a data set."""

    index: DatasetIndex  # without `objects`, which the report belongs to
    rows: Rows
    near: Sequence[NearDuplicate]
    notes: Sequence[str]  # the plan's, and what decoding found


Report = Callable[[Store, Contents], dict[str, bytes]]  # the report's files by key


@dataclass(frozen=True)
class DecodedShard:
    """The images of one planned shard, and its files that have none."""

    columns: shards.Columns
    hashes: list[str]  # (N,)
    reasons: dict[str, str]  # path -> why it was excluded
    unknown_views: list[str]  # paths of images whose ViewPosition is not known


class Builder:
    """Makes the data set of a plan at an address, or a share of it."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        store: Store,
        unfinished: Unfinished,
        *,
        num_workers: int,
        place: str = "",
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        """`place` begins the keys of all objects; `confirm` raises where another job took over."""
        self._plan, self._source, self._store, self._unfinished = plan, source, store, unfinished
        self._place, self._confirm = place, confirm
        self._images = Images(**plan.config["images"])
        self._num_workers = num_workers

    def build(self, planned: Sequence[PlannedShard]) -> None:
        """Make those of the planned shards that are not stored yet, each with its part.

        Raises `SourceError` as soon as too many files are excluded, or when the source changes.
        """
        unusable, missing = [*self._plan.unusable], []
        for shard in planned:
            part = self._stored_part(shard)
            if part is None:
                missing.append(shard)
            else:
                unusable += _excluded(shard, part.reasons)
        if len(missing) < len(planned):
            num_stored = len(planned) - len(missing)
            _logger.info("%d of %d shards are stored already", num_stored, len(planned))
        rows = (row for shard in missing for row in shard.rows)
        decoded_rows = decode_rows(self._source, self._images, rows, num_workers=self._num_workers)
        with (
            progress("preprocess", total=sum(map(len, missing)), unit="images") as bar,
            closing(decoded_rows) as pending,
            ThreadPoolExecutor(1) as pool,  # stores a shard while the next one is decoded
        ):
            storing: Future[None] | None = None
            for shard in missing:
                rows_of_shard = islice(pending, len(shard))
                decoded = gather(
                    shard,
                    rows_of_shard,
                    labels=self._plan.labels,
                    size=self._images.size,
                    on_done=bar.update,
                )
                unusable += _excluded(shard, decoded.reasons)
                check_excluded(
                    unusable, num_files=len(self._plan.rows), limit=self._images.max_set_aside
                )
                if storing is not None:
                    storing.result()
                storing = pool.submit(self._store_decoded, shard, decoded)
            if storing is not None:
                storing.result()

    def commit(self, report: Report, *, replaced: bytes | None = None) -> DatasetIndex | None:
        """Write manifest, report and `dataset.json`. `replaced` is the `dataset.json` that this one
        takes the place of.

        Returns None, having done nothing, while parts are missing. Raises `CorruptError` naming the
        shards whose stored bytes are not those that were made; their parts are removed, so that the
        next start makes them again.
        """
        plan = self._plan
        with ThreadPoolExecutor(_CHECKS_AT_A_TIME) as pool:
            found = list(pool.map(self._part, plan.shards))
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        self._check_stored(parts)
        with temporary_folder() as folder:
            index, objects = assemble(plan, parts, self._store, report, Path(folder))
            for key, path in objects.items():
                self._store.upload(key, path)
        self._confirm()
        self._write_index(index, replaced)
        return index

    def _write_index(self, index: DatasetIndex, replaced: bytes | None) -> None:
        """Write `dataset.json`, unless another one than `replaced` is there; then look for all
        objects once more, and take it back if one has gone.
        """
        store, data = self._store, index.to_json().encode()
        try:
            if replaced is None or store.read(shards.INDEX_KEY) != replaced:
                store.write(shards.INDEX_KEY, data, only_if_absent=True)
            else:
                store.write(shards.INDEX_KEY, data)
        except AlreadyExistsError:  # another partition was faster; both made the same
            if shards.read_index(store) != index:
                raise DatasetError(
                    f"another data set was stored at {store.uri} meanwhile"
                ) from None
        sizes = {entry.key: entry.size_bytes for entry in store.list(self._place)}
        gone = [x.name for x in index.all_objects() if sizes.get(x.name) != x.size_bytes]
        if gone:
            if replaced is None:
                store.delete(shards.INDEX_KEY)
            else:
                store.write(shards.INDEX_KEY, replaced)
            raise CorruptError(
                f"{', '.join(gone[:3])} at {store.uri} changed while the data set was committed: "
                "start again when no other program writes there"
            )

    def _store_decoded(self, shard: PlannedShard, decoded: DecodedShard) -> None:
        info, labels = None, decoded.columns.labels
        if len(labels):
            with temporary_folder() as folder:
                path = Path(folder) / shard.name
                write_decoded(path, decoded)
                self._confirm()
                digest = self._store.upload(self._place + shard.name, path)
                size_bytes = path.stat().st_size
            counts = self._plan.labels.count(labels)
            name = self._place + shard.name
            info = ShardInfo(name, len(labels), size_bytes, digest, *counts)
        histogram = grey_histogram(decoded.columns.images).tolist()
        few_greys = with_few_greys(decoded.columns.source, decoded.columns.images)
        hashes = bytearray.fromhex("".join(decoded.hashes))
        part = Part(
            self._plan.sha256,
            info,
            decoded.reasons,
            histogram,
            hashes,
            few_greys,
            decoded.unknown_views,
        )
        self._unfinished.store_part(shard, part)

    def _stored_part(self, shard: PlannedShard) -> Part | None:
        """A shard's part, if the shard's stored bytes are those that it names."""
        part = self._part(shard)
        if part is None or part.shard is None:
            return part
        return (
            part if shards.hash_object(self._store, part.shard.name) == part.shard.sha256 else None
        )

    def _part(self, shard: PlannedShard) -> Part | None:
        part = self._unfinished.part(shard, self._plan)
        is_elsewhere = part and part.shard and part.shard.name != self._place + shard.name
        return None if is_elsewhere else part

    def _check_stored(self, parts: Sequence[Part]) -> None:
        infos = [part.shard for part in parts if part.shard is not None]
        with ThreadPoolExecutor(_CHECKS_AT_A_TIME) as pool:
            digests = list(pool.map(lambda info: shards.hash_object(self._store, info.name), infos))
        bad = [
            info.name for info, digest in zip(infos, digests, strict=True) if digest != info.sha256
        ]
        for shard in self._plan.shards:
            if self._place + shard.name in bad:
                self._unfinished.drop_part(shard)
        if bad:
            raise CorruptError(
                f"at {self._store.uri} {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not "
                "what was stored there; start again, and only these are made again"
            )


def gather(
    shard: PlannedShard,
    decoded: Iterable[Decoded | str],
    *,
    labels: LabelSpec,
    size: int,
    on_done: Callable[[], object] = lambda: None,
) -> DecodedShard:
    """Collect what `decode_rows` gives for the rows of one shard."""
    images = np.empty((len(shard), size, size), np.uint8)
    rows: list[Row] = []
    hashes, sizes, reasons, unknown_views = [], [], {}, []
    for row, image in zip(shard.rows, decoded, strict=True):
        on_done()
        if isinstance(image, str):
            reasons[row.path] = image
            continue
        images[len(rows)] = image.pixels
        hashes.append(image.perceptual_hash)
        sizes.append(image.size)
        if image.is_view_unknown:
            unknown_views.append(row.path)
        rows.append(row)
    columns = shards.Columns(
        images=images[: len(rows)],
        labels=labels.array([row.label for row in rows]),
        source=[row.path for row in rows],
        patient=[row.patient for row in rows],
        subtype=[row.subtype for row in rows],
        sha256=[row.sha256 for row in rows],
        width=[width for width, _ in sizes],
        height=[height for _, height in sizes],
    )
    return DecodedShard(columns, hashes, reasons, unknown_views)


def write_decoded(path: Path, decoded: DecodedShard) -> None:
    """Write a shard to a local file."""
    with _explaining(path, path.name):
        shards.write_shard(path, decoded.columns)


def assemble(
    plan: Plan, parts: Sequence[Part], store: Store, report: Report, folder: Path
) -> tuple[DatasetIndex, dict[str, Path]]:
    """What a commit writes: the index, and by key the manifest and the report as files in `folder`.

    Empties the parts' perceptual hashes. Raises `SourceError` when too many files are excluded, or
    a class or val has none left.
    """
    unusable = [*plan.unusable]
    for shard, part in zip(plan.shards, parts, strict=True):
        unusable += _excluded(shard, part.reasons)
    limit = plan.config["images"]["max_set_aside"]
    check_excluded(unusable, num_files=len(plan.rows), limit=limit)
    stored = [_kept(shard, part) for shard, part in zip(plan.shards, parts, strict=True)]
    index = _make_index(plan, parts, stored)
    pairs = _find_near(plan, parts)  # before there are more columns, and without its hashes after
    rows = _finished_rows(plan, parts, stored)
    near = _near_duplicates(pairs, rows, _by_split(plan, stored))
    if near:
        first = near[0]
        _logger.warning(
            "%s of images in two splits look the same, such as %s and %s",
            counted(len(near), "pair"),
            first.one.path,
            first.other.path,
        )
    notes = [*plan.notes, *plan.facts]
    if few_greys := [path for part in parts for path in part.few_greys]:
        notes.append(
            f"{counted(len(few_greys), 'image', 'use')} fewer than {FEW_GREYS} of 256 grey levels, "
            f"such as {few_greys[0]}"
        )
        _logger.warning("%s", notes[-1])
    if views := [path for part in parts for path in part.unknown_views]:
        # Not in the report: it is made anew from shards, which do not say so
        words = counted(len(views), "image", "have")
        text = (
            "%s a ViewPosition of which nothing is known, such as %s: look whether they are frontal"
        )
        _logger.warning(text, words, views[0])
    contents: dict[str, Iterable[bytes]] = {index.place + shards.MANIFEST_KEY: manifest_lines(rows)}
    reported = report(store, Contents(index, rows, near, notes))
    contents.update((index.place + key, [data]) for key, data in reported.items())
    paths = {key: folder / str(number) for number, key in enumerate(contents)}
    infos = tuple(_write_object(paths[key], key, pieces) for key, pieces in contents.items())
    return replace(index, objects=infos), paths


def _write_object(path: Path, key: str, pieces: Iterable[bytes]) -> ObjectInfo:
    digest, size_bytes = hashlib.sha256(), 0
    with _explaining(path, key), path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
    return ObjectInfo(key, size_bytes, digest.hexdigest())


@contextmanager
def _explaining(path: Path, name: str) -> Iterator[None]:
    hint = "make room there, or set TMPDIR to another disk"
    with explaining("written", f"{name} in {path.parent}", hint=hint, is_address=False):
        try:
            yield
        except RuntimeError as error:  # h5py raises it when it closes a file on a full disk
            raise OSError(str(error)) from error


def _excluded(shard: PlannedShard, reasons: Mapping[str, str]) -> list[Row]:
    if not reasons:
        return []
    return [replace(row, reason=reasons[row.path]) for row in shard.rows if row.path in reasons]


def _kept(shard: PlannedShard, part: Part) -> NDArray[np.int32]:
    """The places among the plan's rows of those that are in a shard, in its order."""
    if not part.reasons:
        return shard.places
    return shard.places[[path not in part.reasons for path in shard.rows.paths]]


def _by_split(plan: Plan, stored: Sequence[NDArray[np.int32]]) -> dict[str, NDArray[np.int32]]:
    """The places of the stored rows of each split, in the order of its shards."""
    found: dict[str, list[NDArray[np.int32]]] = {}
    for shard, kept in zip(plan.shards, stored, strict=True):
        found.setdefault(shard.split, []).append(kept)
    return {split: np.concatenate(places) for split, places in found.items()}


def _finished_rows(plan: Plan, parts: Sequence[Part], stored: Sequence[NDArray[np.int32]]) -> Rows:
    """The manifest: the plan's rows with shard, place, and what decoding excluded."""
    names = ("", *(shard.name for shard in plan.shards))
    shard_of = np.zeros(len(plan.rows), np.min_scalar_type(len(names)))
    place_of = np.full(len(plan.rows), -1, np.int32)
    reasons = {**plan.rows.reasons}
    for code, (shard, part, kept) in enumerate(zip(plan.shards, parts, stored, strict=True), 1):
        shard_of[kept], place_of[kept] = code, np.arange(len(kept))
        if part.reasons:
            pairs = zip(shard.places.tolist(), shard.rows.paths, strict=True)
            reasons |= {k: part.reasons[path] for k, path in pairs if path in part.reasons}
    return plan.rows.with_(shards=Names(shard_of, names), places=place_of, reasons=reasons)


def _find_near(plan: Plan, parts: Sequence[Part]) -> dict[tuple[str, str], list[NearPair]]:
    """Near pairs by pair of splits, as places among the stored rows of each. Empties the parts'
    perceptual hashes.
    """
    hashes: dict[str, list[bytearray]] = {}
    for shard, part in zip(plan.shards, parts, strict=True):
        hashes.setdefault(shard.split, []).append(part.perceptual_hashes)
    words = {split: words_of(own) for split, own in hashes.items()}
    for part in parts:
        part.perceptual_hashes.clear()
    with progress("near-duplicates", total=num_pairs(words), unit="pairs") as bar:
        return find_near_pairs(words, on_done=bar.update)


def _near_duplicates(
    found: Mapping[tuple[str, str], Sequence[NearPair]],
    rows: Rows,
    stored: Mapping[str, NDArray[np.int32]],
) -> list[NearDuplicate]:
    near = [
        NearDuplicate(
            pair.distance, rows[int(stored[split][pair.one])], rows[int(stored[other][pair.other])]
        )
        for (split, other), pairs in found.items()
        for pair in pairs
    ]
    return sorted(near, key=lambda pair: (pair.distance, pair.one.path, pair.other.path))


def _make_index(
    plan: Plan, parts: Sequence[Part], stored: Sequence[NDArray[np.int32]]
) -> DatasetIndex:
    num_in = dict.fromkeys(SPLITS, 0)
    for shard, kept in zip(plan.shards, stored, strict=True):
        num_in[shard.split] += len(kept)
    num_found, num_stored = len(plan.rows), sum(num_in.values())
    has_train = bool(plan.rows.splits.are("train").any())
    if has_train:
        labels = plan.rows.labels
        in_train = [
            labels[kept]
            for shard, kept in zip(plan.shards, stored, strict=True)
            if shard.split == "train"
        ]
        refuse_missing_class(np.concatenate([labels[:0], *in_train]), plan.labels, where="train")
    if has_train and not num_in["val"]:
        raise SourceError(
            "no image of val could be decoded; fix them, or raise splits.val_fraction"
        )
    if not num_stored:
        raise SourceError("no image could be decoded; fix them")
    infos: dict[str, list[ShardInfo]] = {}
    histogram = np.zeros(256, np.int64)  # of train, or of all where there is none
    for shard, part in zip(plan.shards, parts, strict=True):
        if part.shard is not None:
            infos.setdefault(shard.split, []).append(part.shard)
        if shard.split == "train" or not has_train:
            histogram += np.array(part.histogram)
    mean, std = mean_and_std(histogram)
    return DatasetIndex(
        classes=plan.labels.classes,
        image_size=int(plan.config["images"]["size"]),
        splits={split: tuple(infos[split]) for split in SPLITS if split in infos},
        carved=plan.carved,
        pixel_mean=mean,
        pixel_std=std,
        source=plan.source,
        plan_sha256=plan.sha256,
        counts=shards.Counts(num_found, num_stored, num_found - num_stored, plan.num_not_data),
        objects=(),
        config=plan.config,
        tool_version=__version__,
        task=plan.labels.task,
    )
