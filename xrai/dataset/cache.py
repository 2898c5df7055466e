"""Shards of a store, verified and mapped, through a folder of this machine. The loader calls it.

A shard in a folder store is used where it is. One in a bucket is copied to

    <cache folder>/<fingerprint of the data set>/<name>.<hash of the shard>.h5

so it is never mistaken for one of a replaced data set, or of another with the same names. A shard's
hash is checked when it arrives, and when a process first uses a file that it finds. Ranks and runs
on one machine share the folder: one fetches a shard, under a lock that the kernel drops if its
holder dies, and the others wait. If the folder would outgrow its limit, the least recently used
shards are removed, but never one that a process has open.
"""

import fcntl
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import file_digest
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from xrai import files
from xrai.dataset import shards
from xrai.dataset.shards import DatasetIndex, Layout, Shard, ShardInfo, read_index
from xrai.errors import (
    CorruptError,
    DatasetError,
    NotFoundError,
    StoreAccessError,
    StoreError,
    UserError,
)
from xrai.log import get_logger
from xrai.store import Store

_NUM_FETCHES = 3  # of a shard that arrives damaged, before the error that names it
# Shards that stay mapped after their use. A mapped page takes 8 bytes of kernel memory, and each
# mapping counts as one of the process's open files; there is a cache for each split.
_MAX_KEPT = 1024
_FILES_FOR_EACH_KEPT = 8
_POLL_S = 0.02
_SETTLE_S = 10.0
_CACHE_HINT = "give another cache by --cache.dir=FOLDER"
_REPAIR = "; `xrai verify --dataset {} --repair --source SOURCE` writes it anew"

_Stamp = tuple[int, int, int, int]  # of a file: device, inode, bytes, time of the last change
_logger = get_logger(__name__)


@dataclass
class OpenShard:
    """A shard in use: its file stays in the cache until `close`, its arrays while they are held."""

    shard: Shard
    fetch_s: float = 0.0  # getting the file, including the wait for another process
    verify_s: float = 0.0  # checking the hash of a local file
    _file: BinaryIO | None = field(default=None, repr=False)
    _process: int = field(default_factory=os.getpid, repr=False)

    def close(self) -> None:
        """Let the cache remove the file."""
        if self._file is None or self._file.closed:
            return
        if self._process == os.getpid():
            _unlock(self._file)
        else:
            self._file.close()  # after a fork the lock is also the parent's, which may need it


class ShardCache:
    """The shards of one data set. Threads may share it.

    `folder` is None for the user's own cache folder. `max_bytes` limits it, all data sets together;
    0: no limit. `timeout_s` is the longest wait for another process, or for room.
    """

    def __init__(
        self,
        store: Store,
        index: DatasetIndex,
        *,
        folder: Path | None = None,
        max_bytes: int = 0,
        timeout_s: float = 600.0,
    ) -> None:
        self._store, self._index = store, index
        self._folder = folder
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._verified: set[tuple[str, _Stamp]] = set()
        self._known: dict[str, tuple[_Stamp, Layout]] = {}  # of shards that were open before
        self._kept: dict[str, Shard] = {}  # those still mapped
        num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        is_unlimited = num_files == resource.RLIM_INFINITY
        most = _MAX_KEPT if is_unlimited else min(_MAX_KEPT, num_files // _FILES_FOR_EACH_KEPT)
        self._max_kept = 0 if max_bytes else most
        # One thread at a time is in HDF5, which has such a lock anyway
        self._mapping = (os.getpid(), threading.Lock())

    @cached_property
    def _root(self) -> Path:
        """The cache folder, which a data set in a folder does not need."""
        return self._folder or files.cache_folder()

    def settle(self) -> None:
        """Wait for the thread inside HDF5, then block others. Called when a process ends.

        Python stops daemon threads wherever they are; one stopped inside HDF5 would make the exit
        hang or crash.
        """
        self._mapping_lock().acquire(timeout=_SETTLE_S)

    def keeps(self, info: ShardInfo) -> bool:
        """Whether the shard is still mapped and its file unchanged, so opening it takes no time."""
        if info.name not in self._kept:
            return False
        path = self._store.local_path(info.name) or self._path(info)
        try:
            return self._known[info.name][0] == _stamp(path.stat())
        except OSError:
            return False

    def open(self, info: ShardInfo) -> OpenShard:
        """One shard, its hash checked.

        Raises `CorruptError` if the shard does not have the hash in the index, even after several
        fetches from a bucket; `DatasetError` if that is because the data set was replaced;
        `UserError` if the cache folder cannot be written; and the store's errors. All name the
        shard.
        """
        in_place = self._store.local_path(info.name)
        try:
            if in_place is not None:
                return self._open_file(in_place, info, in_cache=False)
            return self._open_cached(info)
        except (CorruptError, NotFoundError) as error:
            if replaced := self._replaced():
                raise DatasetError(replaced) from error
            raise

    def _open_cached(self, info: ShardInfo) -> OpenShard:
        path = self._path(info)
        started = time.monotonic()
        damage: CorruptError | None = None
        for _ in range(_NUM_FETCHES + 1):
            try:
                opened = self._open_file(path, info, in_cache=True)
            except NotFoundError:
                self._fetch(path, info)
            except CorruptError as error:
                damage = error
                _logger.warning("%s; fetching it again", error)
                self._fetch(path, info, instead_of=_inode(path))
            else:
                opened.fetch_s = time.monotonic() - started - opened.verify_s
                return opened
        raise damage or StoreError(
            f"{path} was removed from the cache {_NUM_FETCHES + 1} times while it was opened; does "
            "another program clean the cache?"
        )

    def _path(self, info: ShardInfo) -> Path:
        name = f"{Path(info.name).stem}.{info.sha256[:16]}.h5"
        return self._root / self._index.fingerprint[:16] / name

    def _open_file(self, path: Path, info: ShardInfo, *, in_cache: bool) -> OpenShard:
        hint = f"change its permissions{f' or {_CACHE_HINT}' if in_cache else ''}"
        with files.explaining("read", str(path), hint=hint):
            file = path.open("rb")
        try:
            if in_cache:
                with files.explaining("read", str(path), hint=_CACHE_HINT):  # it may have no locks
                    _lock(file, fcntl.LOCK_SH, _poll(self._timeout_s, f"the lock on {path}"))
                if not _is_at(file, path):
                    raise NotFoundError(f"{path} was removed while it was opened")
                with suppress(OSError):  # note the time of use; a read-only cache needs none
                    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            started = time.monotonic()
            self._verify(file, path, info, in_cache=in_cache)
            verify_s = time.monotonic() - started
            with self._mapping_lock():
                shard = self._map(path, file, info)
            if not _is_at(file, path):  # replaced between hashing and mapping
                raise CorruptError(f"shard {path} was replaced while it was opened")
            size = self._index.image_size
            if shard.images.shape != (info.num_rows, size, size):
                raise CorruptError(
                    f"{path} holds images of {shard.images.shape}, not the {info.num_rows} of its "
                    "index"
                )
        except BaseException:
            file.close()
            raise
        if not in_cache:
            file.close()
        return OpenShard(shard, verify_s=verify_s, _file=file)

    def _map(self, path: Path, file: BufferedReader, info: ShardInfo) -> Shard:
        """The open file as a shard, which stays mapped after its use if there is room.

        A mapped file keeps its inode and its disk space, so none stays mapped if the cache has a
        limit. The first ones stay: an epoch uses each shard once, so the least recently used one
        is needed soonest.
        """
        stamp = _stamp(os.fstat(file.fileno()))
        last_stamp, layout = self._known.get(info.name, (None, None))
        if layout is None or last_stamp != stamp:  # another file now
            self._kept.pop(info.name, None)
            shard = shards.open_shard(path)
            self._known[info.name] = stamp, shard.layout
        elif info.name in self._kept:
            return self._kept[info.name]
        else:
            shard = shards.map_shard(path, layout)
        if len(self._kept) < self._max_kept:
            self._kept[info.name] = shard
        return shard

    def _mapping_lock(self) -> threading.Lock:
        process, lock = self._mapping
        if process != os.getpid():  # in a forked child nobody releases what the parent held
            lock = threading.Lock()
            self._mapping = (os.getpid(), lock)
        return lock

    def _verify(self, file: BufferedReader, path: Path, info: ShardInfo, *, in_cache: bool) -> None:
        status = os.fstat(file.fileno())
        key = (info.sha256, _stamp(status))
        if key in self._verified:
            return
        if status.st_size != info.size_bytes:
            damage = f"it has {status.st_size} bytes, not the {info.size_bytes} of the index"
        elif (found := file_digest(file, "sha256").hexdigest()) != info.sha256:
            damage = f"its sha256 is {found[:16]}…, not the {info.sha256[:16]}… of the index"
        else:
            self._verified.add(key)
            return
        repair = "" if in_cache else _REPAIR.format(self._store.uri)
        raise CorruptError(f"shard {path} is damaged: {damage}{repair}")

    def _fetch(
        self, path: Path, info: ShardInfo, *, instead_of: tuple[int, int] | None = None
    ) -> None:
        """Bring the shard to `path`, unless another process does. `instead_of` is the inode of a
        damaged file to remove.
        """
        with self._only_one(path, info) as lock:
            if instead_of is not None and _inode(path) == instead_of:
                path.unlink(missing_ok=True)
            if path.exists():
                return
            _remove_leftovers(path)
            if self._max_bytes:
                self._make_room(lock, info)
            part = path.with_suffix(".part")
            found = ""
            for _ in range(_NUM_FETCHES):
                found = self._store.download(info.name, part)
                if found == info.sha256:
                    self._verified.add((info.sha256, _stamp(part.stat())))
                    part.replace(path)
                    return
                _logger.warning(
                    "%s/%s arrived with a wrong hash; fetching it again", self._store.uri, info.name
                )
                part.unlink()
        raise CorruptError(
            f"shard {self._store.uri}/{info.name} is damaged: in {_NUM_FETCHES} fetches its sha256 "
            f"was {found[:16]}…, not the {info.sha256[:16]}… of the index"
            f"{_REPAIR.format(self._store.uri)}"
        )

    @contextmanager
    def _only_one(self, path: Path, info: ShardInfo) -> Iterator[BinaryIO]:
        """Hold the right to fetch one shard: a lock file, as long as the room that is reserved."""
        lock_path = path.with_suffix(".lock")
        what = f"another process to fetch {self._store.uri}/{info.name} (it holds {lock_path})"
        polls = _poll(self._timeout_s, what)
        with files.explaining(
            "written",
            f"the cache folder {self._root}",
            hint=_CACHE_HINT,
            error_type=StoreAccessError,
            is_address=False,
        ):
            while True:
                lock_path.parent.mkdir(parents=True, exist_ok=True)
                with lock_path.open("ab") as file:
                    _lock(file, fcntl.LOCK_EX, polls)
                    if not _is_at(file, lock_path):
                        continue  # the last holder removed it while we waited
                    try:
                        yield file
                    finally:
                        lock_path.unlink(missing_ok=True)
                        _unlock(file)
                    return

    def _make_room(self, lock: BinaryIO, info: ShardInfo) -> None:
        """Remove the least recently used shards that nobody has open until this one fits, and
        reserve its room.
        """
        limit = f"cache.max_gib ({self._max_bytes / 2**30:.3g} GiB)"
        if info.size_bytes > self._max_bytes:
            raise UserError(
                f"{limit} is smaller than the shard {info.name} ({info.size_bytes} bytes); raise it"
            )
        what = (
            f"room for {info.name} in {self._root}: {limit} is full of shards in use; raise it, or "
            "lower loader.window"
        )
        for _ in _poll(self._timeout_s, what, pause_s=5 * _POLL_S):
            with (self._root / ".lock").open("ab") as whole:
                _lock(whole, fcntl.LOCK_EX, _poll(self._timeout_s, f"the lock on {whole.name}"))
                if _evict(self._root, self._max_bytes - info.size_bytes):
                    os.ftruncate(lock.fileno(), info.size_bytes)
                    return

    def _replaced(self) -> str:
        """The message if another data set is at the address now, else nothing."""
        try:
            found = read_index(self._store).fingerprint
        except (CorruptError, StoreError, DatasetError):
            return ""
        if found == self._index.fingerprint:
            return ""
        return (
            f"the data set at {self._store.uri} was replaced while it was read (its fingerprint "
            f"was {self._index.fingerprint[:16]}…, now it is {found[:16]}…); start again"
        )


def _evict(root: Path, most_bytes: int) -> bool:
    """Bring shards and reserved room below `most_bytes`; returns whether that was possible."""
    total = 0
    # Locks first: a fetch that ends meanwhile is then counted twice, not left out
    for lock in root.glob("*/*.lock"):
        if not _remove_unused(lock):
            with suppress(FileNotFoundError):
                total += lock.stat().st_size  # the room that its holder has reserved
    found = []
    for path in root.glob("*/*.h5"):
        with suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_atime_ns, status.st_size, path))
    total += sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            break
        if _remove_unused(path):
            total -= size
    return total <= most_bytes


def _remove_unused(path: Path) -> bool:
    """Remove a shard that no process has open, or a lock with what its dead holder left."""
    try:
        with path.open("r+b") as file:  # NFS locks for one alone only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):  # another file took its place, and may be in use
                return False
            if path.suffix == ".lock":
                _remove_leftovers(path)
            path.unlink()
    except OSError:  # locked, gone, or another user's; or there are no locks
        return False
    return True


def _remove_leftovers(path: Path) -> None:
    """Remove what a killed fetch of the shard left. The caller holds the shard's lock."""
    for left in path.parent.glob(f".{path.stem}.part.*.tmp"):
        left.unlink(missing_ok=True)
    path.with_suffix(".part").unlink(missing_ok=True)


def _poll(timeout_s: float, what: str, *, pause_s: float = _POLL_S) -> Iterator[None]:
    """Yield at once and after each pause; raise `StoreError` when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        yield
        if time.monotonic() > deadline:
            raise StoreError(f"waited {timeout_s:g} s for {what}")
        time.sleep(pause_s)


def _lock(file: BinaryIO, kind: int, polls: Iterator[None]) -> None:
    """Take a lock that ends with `file`, or with the process."""
    for _ in polls:
        with suppress(BlockingIOError):
            return fcntl.flock(file, kind | fcntl.LOCK_NB)


def _unlock(file: BinaryIO) -> None:
    """Drop the lock and close. Closing alone would leave the lock to a child forked meanwhile."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _inode(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    status = os.fstat(file.fileno())
    return _inode(path) == (status.st_dev, status.st_ino)
