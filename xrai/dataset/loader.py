"""Batches of images from a data set, in an order that depends on the seed and the epoch alone.

For the training loop, and for anyone who wants the data without our training. No torch:

    from xrai.dataset.loader import Loader

    loader = Loader("s3://bucket/prefix", split="train", batch_size=64, shuffle=True)
    for epoch in range(10):
        for batch in loader.epoch(epoch):
            batch.images  # (n, 1, H, W) uint8
            batch.labels  # (n,) uint8, positions in loader.index.classes; or, of findings,
            # (n, C) int8: 1 present, 0 absent, -1 unknown (loader.index.labels.task says which)

Global batch k of an epoch holds the same images whatever the number of ranks or threads, and
wherever a run was restarted: `loader.epoch(epoch, start=step)` continues at a step, so the whole
state is (seed, epoch, step). The last batch may be smaller; each image comes exactly once.
Background threads fetch, check and map shards and assemble batches ahead of use; they end with the
iterator.
"""

import atexit
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xrai.config import Config
from xrai.dataset.cache import OpenShard, ShardCache
from xrai.dataset.order import EpochOrder, most_held, rank_slice, shards_to_hold
from xrai.dataset.shards import DatasetIndex, Shard, ShardInfo, read_index
from xrai.errors import ConfigError, DatasetError, UnreachableError, XraiError
from xrai.labels import Labels
from xrai.store import Store, disk_path, open_store

_POLL_S = 0.1
_STAGES = ("fetch", "verify", "assemble", "wait")
_NUM_BUFFERS = 8  # batches whose memory is kept for reuse
_COLUMNS = ("labels", "source", "patient", "subtype", "width", "height")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch; empty if that has fewer images than there are ranks."""

    images: NDArray[np.uint8]  # (n, 1, H, W), C-contiguous
    labels: Labels  # (n,) uint8 positions in `DatasetIndex.classes`, or (n, C) int8 findings
    rows: NDArray[np.int64]  # (n,), positions in the split
    step: int  # of this global batch in the epoch
    num_global: int  # images in the global batch, all ranks together


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} = {value} is not allowed: it takes a whole number of at least 1")


@dataclass(frozen=True)
class LoaderOptions:
    """How a loader reads. Only `seed` and `window` change the order, and only of a shuffled epoch.

    Raises `ConfigError` for a number out of range.
    """

    seed: int = 0
    window: int = 64  # shards that are shuffled together
    prefetch: int = 2  # batches assembled ahead
    threads: int = 4  # shards fetched at once
    cache_dir: str | Path | None = None  # for shards of a bucket; None: the user's cache folder
    cache_max_gib: float = 0.0  # of the cache folder; 0: no limit
    timeout_s: float = 600.0  # longest wait for a batch

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed} is not allowed: it must be at least 0")
        for name in ("window", "prefetch", "threads"):
            _check_positive(name, getattr(self, name))


def open_split(
    config: Config,
    dataset: str,
    split: str,
    *,
    shuffle: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> "Loader":
    """A split as a command reads it: shuffled, in training batches; or in order, to be measured."""
    options = LoaderOptions(
        seed=config.train.seed,
        **asdict(config.loader),
        cache_dir=config.cache.dir or None,
        cache_max_gib=config.cache.max_gib,
        timeout_s=config.train.timeout_s,
    )
    return Loader(
        dataset,
        split=split,
        batch_size=config.train.global_batch_size if shuffle else config.evaluate.batch_size,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
        options=options,
    )


class Loader:
    """Batches of one split of a data set.

    `dataset` is an address or a store. `batch_size` counts the images of a global batch, of which
    rank r of `world_size` takes the r-th of equal parts. Without `shuffle`, images come as stored.

    Raises `DatasetError` if there is no such data set or split, `ConfigError` for a number out of
    range.
    """

    def __init__(
        self,
        dataset: str | Store,
        *,
        split: str,
        batch_size: int,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        options: LoaderOptions = LoaderOptions(),
    ) -> None:
        _check_positive("batch_size", batch_size)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank = {rank} of {world_size} is not allowed: ranks start at 0")
        store = open_store(dataset) if isinstance(dataset, str) else dataset
        self.index: DatasetIndex = read_index(store)
        if split not in self.index.splits:
            raise DatasetError(
                f"the data set at {store.uri} has no split {split!r}; it holds "
                f"{', '.join(self.index.splits)}"
            )
        self.split, self.batch_size, self.shuffle = split, batch_size, shuffle
        self.rank, self.world_size, self.options = rank, world_size, options
        self._shards: tuple[ShardInfo, ...] = self.index.splits[split]
        if options.cache_max_gib and store.local_path(self._shards[0].name) is None:
            self._check_room(store)
        self._cache = ShardCache(
            store,
            self.index,
            folder=disk_path(str(options.cache_dir), flag="cache.dir")
            if options.cache_dir
            else None,
            max_bytes=int(options.cache_max_gib * 2**30),
            timeout_s=options.timeout_s,
        )
        self._seconds = dict.fromkeys(_STAGES, 0.0)
        self._adding = threading.Lock()  # threads add seconds
        self._buffers = _Buffers(self.index.image_size)
        self._next_epoch = 0

    @property
    def num_images(self) -> int:
        """Images of the split."""
        return sum(shard.num_rows for shard in self._shards)

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch, the smaller last one included."""
        return -(-self.num_images // self.batch_size)

    @cached_property
    def labels(self) -> Labels:
        """(N,) classes or (N, C) findings of all rows of the split; opens every shard when first
        asked for.
        """
        return self.columns("labels")["labels"]

    def columns(
        self, *names: str, start: int = 0, stop: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Columns of the split, by name, of rows `start` to `stop`; opens the shards that hold
        them and keeps nothing.

        Names are labels (uint8, or (N, C) int8 findings), source, patient, subtype (str), width and
        height (uint32, of the source image). `stop` may be past the last row, as in a slice. Raises
        `ConfigError` for an unknown column or row.
        """
        stop = self.num_images if stop is None else min(stop, self.num_images)
        if not 0 <= start < stop:
            raise ConfigError(
                f"there are no rows {start} to {stop} in a split of {self.num_images} images"
            )
        if unknown := sorted(set(names) - set(_COLUMNS)):
            raise ConfigError(
                f"there is no column {unknown[0]!r}; the columns are {', '.join(_COLUMNS)}"
            )
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        first = 0
        for info in self._shards:
            low, high = start - first, stop - first
            first += info.num_rows
            if low < info.num_rows and high > 0:
                with closing(self._cache.open(info)) as opened:
                    for name, column in parts.items():
                        column.append(getattr(opened.shard, name)[max(low, 0) : high])
        return {name: np.concatenate(column) for name, column in parts.items()}

    def __iter__(self) -> Iterator[Batch]:
        """The next epoch, beginning with epoch 0."""
        self._next_epoch += 1
        return self.epoch(self._next_epoch - 1)

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        """This rank's batches of one epoch, from step `start` on.

        Closing or dropping the iterator ends its threads. An error in the background is raised
        here, with its shard and cause: `CorruptError`, kinds of `StoreError`, or `DatasetError` if
        the data set was replaced meanwhile.
        """
        if not 0 <= start <= self.num_batches or epoch < 0:
            raise ConfigError(
                f"epoch {epoch} has no step {start}: steps go from 0 to {self.num_batches}"
            )
        with self._adding:
            self._seconds = dict.fromkeys(_STAGES, 0.0)
        return self._prefetched(epoch, start)

    def timings(self) -> dict[str, float]:
        """Seconds of this epoch so far (or of the last one): why the GPU waits.

        `wait`: the caller waited for batches. In the background meanwhile: `fetch` (shards from the
        store, summed over threads), `verify` (hashes of local shards), `assemble` (pixels into
        batches).
        """
        with self._adding:
            return dict(self._seconds)

    def _add_seconds(self, stage: str, seconds: float) -> None:
        with self._adding:
            self._seconds[stage] += seconds

    def _prefetched(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """The batches, assembled ahead in a thread."""
        ready: _Outcomes = queue.SimpleQueue()
        # An item for each batch that may still be assembled ahead
        room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(self.options.prefetch):
            room.put(None)
        stop = threading.Event()
        process = os.getpid()
        num_threads = min(self.options.threads, len(self._shards))
        feed = _ShardFeed(self._cache, self._shards, num_threads, stop, self._add_seconds)

        def assemble() -> None:
            outcome: BaseException | None = None
            try:
                for batch in self._batches(feed, epoch, start):
                    room.get()
                    if stop.is_set():
                        return
                    ready.put(batch)
            except _Stopped:
                return
            except BaseException as error:  # goes to the consumer
                outcome = error
            ready.put(outcome)

        thread = threading.Thread(target=assemble, name="xrai-assemble", daemon=True)

        def end() -> None:
            if os.getpid() != process:  # a forked child has none of these threads
                return
            stop.set()
            room.put(None)  # the thread may be waiting for it
            thread.join()
            feed.close()

        atexit.register(end)
        thread.start()
        try:
            while (batch := self._next(ready, thread, feed)) is not None:
                room.put(None)
                yield batch
        finally:
            if not sys.is_finalizing():  # else `end` has run
                atexit.unregister(end)
                end()

    def _next(
        self, ready: "_Outcomes", thread: threading.Thread, feed: "_ShardFeed"
    ) -> Batch | None:
        """The next batch, or None after the last; raises what the background raised."""
        started = time.monotonic()
        name = f"rank {self.rank} of {self.world_size}, {self.split} split"
        found: Batch | BaseException | None
        while True:
            try:
                found = ready.get(timeout=_POLL_S)
                break
            except queue.Empty:
                waited_s = time.monotonic() - started
                if waited_s > self.options.timeout_s:
                    raise UnreachableError(
                        f"{name}: no batch within {waited_s:.0f} s; waiting for {feed.waiting_for}"
                    ) from None
                assert thread.is_alive() or not ready.empty(), "the assembling thread died silently"
        self._add_seconds("wait", time.monotonic() - started)
        if isinstance(found, XraiError):
            raise type(found)(f"{name}: {found}") from found
        if isinstance(found, BaseException):
            raise found
        return found

    def _batches(self, feed: "_ShardFeed", epoch: int, start: int) -> Iterator[Batch]:
        options = self.options
        rows_of_shards = [shard.num_rows for shard in self._shards]
        order = EpochOrder(
            rows_of_shards,
            seed=options.seed,
            epoch=epoch,
            window=options.window,
            shuffle=self.shuffle,
        )
        starts = np.cumsum([0, *rows_of_shards])
        spec = self.index.labels
        num_images = self.num_images
        held = range(0)
        opened: dict[int, Shard] = {}
        for step in range(start, self.num_batches):
            first = step * self.batch_size
            last = min(first + self.batch_size, num_images)
            windows = order.windows_of(first, last)
            if step == start:  # the first batch has the network to itself: nothing is fetched ahead
                feed.hold([shard for window in windows for shard in order.windows[window]])
            elif windows != held:
                held = windows
                opened.clear()
                feed.hold(shards_to_hold(order.windows, windows, num_ahead=options.threads))
            all_rows = order.rows(first, last)
            rows = all_rows[rank_slice(len(all_rows), rank=self.rank, world_size=self.world_size)]
            shards = np.searchsorted(starts, rows, side="right") - 1
            for shard in sorted(set(shards.tolist()).difference(opened)):
                opened[shard] = feed.take(shard)
            started = time.monotonic()
            images, labels = self._buffers.take(len(rows)), spec.empty(len(rows))
            # Indexing by arrays copies twice and is 2 to 4 times slower for rows of 64 shards
            # (n = 64, 64 and 224 pixels, numpy 2.4, 2 cores, best of three)
            places = zip(shards.tolist(), (rows - starts[shards]).tolist(), strict=True)
            for place, (shard, row) in enumerate(places):
                images[place, 0] = opened[shard].images[row]
                labels[place] = opened[shard].labels[row]
            self._add_seconds("assemble", time.monotonic() - started)
            yield Batch(images, labels, rows, step=step, num_global=len(all_rows))

    def _check_room(self, store: Store) -> None:
        """Refuse a cache that is too small for the shards held at once, before any work."""
        options = self.options
        num_held = most_held(
            [shard.num_rows for shard in self._shards],
            window=options.window if self.shuffle else 1,
            num_ahead=options.threads,
            batch_size=self.batch_size,
            batches_apart=options.prefetch + 2 if self.world_size > 1 else 0,
        )
        sizes = sorted((shard.size_bytes for shard in self._shards), reverse=True)
        held_gib = sum(sizes[:num_held]) / 2**30
        if held_gib > options.cache_max_gib:
            raise ConfigError(
                f"cache.max_gib = {options.cache_max_gib:g} is too small for the {self.split} "
                f"split of {store.uri}, of which up to {num_held} shards are held at once; give at "
                f"least {math.ceil(held_gib * 1000) / 1000:g}, or lower loader.window or "
                "loader.threads"
            )


# What the background hands over: batches, then None or an error
_Outcomes = queue.SimpleQueue[Batch | BaseException | None]


class _ShardFeed:
    """Opens shards ahead of their use, several at once, and closes those no longer needed."""

    def __init__(
        self,
        cache: ShardCache,
        shards: Sequence[ShardInfo],
        num_threads: int,
        stop: threading.Event,
        add_seconds: Callable[[str, float], None],
    ) -> None:
        self.waiting_for = "nothing"
        self._cache, self._shards, self._num_threads = cache, shards, num_threads
        self._stop, self._add_seconds = stop, add_seconds
        self._asked: queue.SimpleQueue[tuple[ShardInfo, Future[OpenShard]] | None]
        self._asked = queue.SimpleQueue()
        self._opening: dict[int, Future[OpenShard]] = {}
        self._threads: list[threading.Thread] = []  # started when first needed
        atexit.register(self._cache.settle)

    def hold(self, needed: Sequence[int]) -> None:
        """Open these shards, in this order, and close all others."""
        for shard in set(self._opening).difference(needed):
            _release(self._opening.pop(shard))
        for shard in needed:
            if shard in self._opening:
                continue
            opening = self._opening[shard] = Future[OpenShard]()
            if self._cache.keeps(self._shards[shard]):  # a thread would take longer than opening it
                self._open(self._shards[shard], opening)
                continue
            self._asked.put((self._shards[shard], opening))
            while len(self._threads) < self._num_threads:
                # Daemons, unlike a ThreadPoolExecutor's: a store that does not answer must not keep
                # a process from ending
                name = f"xrai-fetch-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads[-1].start()

    def take(self, shard: int) -> Shard:
        """A shard that is held, once it is open. Raises what opening it raised."""
        opening = self._opening[shard]
        self.waiting_for = f"shard {self._shards[shard].name}"
        while not opening.done():
            wait_for([opening], timeout=_POLL_S)
            if self._stop.is_set():
                raise _Stopped
        self.waiting_for = "a batch to be assembled"
        return opening.result().shard

    def close(self) -> None:
        """Close all shards and end the threads. One that waits for the store ends by the store's
        own time-out.
        """
        for opening in self._opening.values():
            _release(opening)
        self._opening.clear()
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join(timeout=_POLL_S)
        if not any(thread.is_alive() for thread in self._threads):
            atexit.unregister(self._cache.settle)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            self._open(*asked)

    def _open(self, info: ShardInfo, opening: "Future[OpenShard]") -> None:
        if not opening.set_running_or_notify_cancel():
            return
        try:
            opened = self._cache.open(info)
        except BaseException as error:  # goes to whoever takes the shard
            opening.set_exception(error)
            return
        self._add_seconds("fetch", opened.fetch_s)
        self._add_seconds("verify", opened.verify_s)
        opening.set_result(opened)


def _release(opening: "Future[OpenShard]") -> None:
    """Close a shard as soon as it is open, or do not open it."""
    if not opening.cancel():
        opening.add_done_callback(
            lambda done: done.result().close() if done.exception() is None else None
        )


class _Buffers:
    """Memory for the images of batches, reused once nobody holds the batch or a view of it.

    Fresh memory costs a fifth of a batch's time: the kernel clears each page at its first use.
    """

    def __init__(self, image_size: int) -> None:
        self._shape = (1, image_size, image_size)
        self._owners: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()  # iterators of two epochs may be in use
        # References of an array that only a list, and the counting, hold
        (self._unused,) = _count_references([np.empty(0, np.uint8)])

    def take(self, num: int) -> NDArray[np.uint8]:
        """(num, 1, H, W), contents undefined."""
        with self._lock:
            # A view, or a view of a view, refers to the array that owns the memory
            counts = _count_references(self._owners)
            for owner, references in zip(self._owners, counts, strict=True):
                if references == self._unused and len(owner) >= num:
                    return owner[:num]
            fresh = np.empty((num, *self._shape), np.uint8)
            self._owners = [fresh, *self._owners[: _NUM_BUFFERS - 1]]
            return fresh[:num]


def _count_references(arrays: Sequence[NDArray[np.uint8]]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


class _Stopped(Exception):  # noqa: N818, no error: the consumer has left
    pass
