"""Shards of a store, verified and mapped, by way of a folder of this machine. The loader calls it.

A shard in a folder store is used where it is. One in a bucket is copied to

    <cache folder>/<fingerprint of the data set>/<name>.<hash of the shard>.h5

so that a data set that was replaced, or another with the same names, can never be taken for it. A
shard's hash is checked when it arrives, and again the first time that a process uses a file it
finds. Ranks and runs on one machine share the folder: one of them fetches a shard under a lock that
the kernel drops when its holder dies, the others wait. The least recently used shards go when the
folder would grow beyond its limit, never one that a process has open.
"""

import fcntl
import hashlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from xrai.dataset.shards import (
    DatasetIndex,
    Layout,
    Shard,
    ShardInfo,
    map_shard,
    open_shard,
    read_index,
)
from xrai.errors import (
    CorruptError,
    DatasetError,
    ForbiddenError,
    NotFoundError,
    StoreError,
    UserError,
)
from xrai.log import get_logger
from xrai.store import Store

_NUM_FETCHES = 3  # of one shard whose bytes arrive damaged, before the error that names it
_MAX_KEPT = 1024  # shards that stay mapped after their use: a mapped page takes 8 bytes of the kernel's memory
_FILES_KEPT = (
    1 / 8
)  # of the files that a process may have open; each map takes one, and there is a cache a split
_POLL_S = 0.02
_SETTLE_S = 10.0

_logger = get_logger(__name__)


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/xrai`, else `~/.cache/xrai`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xrai"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder for the cache of shards; give a folder by --cache.dir=FOLDER"
        ) from error


@dataclass
class OpenShard:
    """A shard in use: its arrays stay valid, and its file in the cache, until `close`."""

    shard: Shard
    fetch_s: float = 0.0  # spent on getting the file here, waiting for another process included
    verify_s: float = 0.0  # spent on checking the hash of a file that was here
    _file: BinaryIO | None = field(default=None, repr=False)
    _process: int = field(default_factory=os.getpid, repr=False)

    def close(self) -> None:
        """Let the cache remove the file. Arrays taken from the shard stay valid as long as they
        are held.
        """
        if self._file is None or self._file.closed:
            return
        if self._process == os.getpid():
            _unlock(self._file)
        else:
            self._file.close()  # after a fork the lock is the parent's too, who may still need it


@dataclass(frozen=True)
class _Known:
    """A shard that was open before."""

    identity: tuple[
        int, int, int, int
    ]  # of its file: device, inode, bytes, time of the last change
    layout: Layout
    shard: Shard | None  # where it is still mapped


class ShardCache:
    """The shards of one data set. Threads may share it.

    `max_bytes` limits the folder, all data sets together; 0: no limit. `timeout_s` is the longest
    wait for another process, or for room.
    """

    def __init__(
        self,
        store: Store,
        index: DatasetIndex,
        *,
        folder: Path,
        max_bytes: int = 0,
        timeout_s: float = 600.0,
    ) -> None:
        self._store, self._index = store, index
        self._root, self._max_bytes, self._timeout_s = folder, max_bytes, timeout_s
        self._verified: set[tuple[str, int, int, int]] = set()
        self._known: dict[str, _Known] = {}  # by the shard's name
        self._num_kept, self._max_kept = 0, 0 if max_bytes else _most_kept()
        self._mapping = (
            os.getpid(),
            threading.Lock(),
        )  # one thread at a time is in HDF5, which has such a lock anyway

    def settle(self) -> None:
        """For the end of a process that leaves threads behind: see the one that is in HDF5 out, and
        let no other in.

        Python stops such threads wherever they are. One that it stops in HDF5 leaves the end
        hanging, or crashing.
        """
        self._mapping_lock().acquire(timeout=_SETTLE_S)

    def keeps(self, info: ShardInfo) -> bool:
        """Whether the shard is mapped since it was open before, and its file is the same: to
        open it takes no time.
        """
        known = self._known.get(info.name)
        if known is None or known.shard is None:
            return False
        try:
            return known.identity == _version(
                (self._store.local_path(info.name) or self._path(info)).stat()
            )
        except OSError:
            return False

    def open(self, info: ShardInfo) -> OpenShard:
        """One shard, its hash checked.

        Raises `CorruptError` when the shard does not have the hash that the index gives, after
        several fetches from a bucket; `DatasetError` when that is because the data set was
        replaced; `UserError` when the cache folder cannot be written; and the store's errors. All
        name the shard.
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
                self._fetch(path, info, instead_of=_identity(path))
            else:
                opened.fetch_s = time.monotonic() - started - opened.verify_s
                return opened
        raise damage or StoreError(
            f"{path} was removed from the cache again and again while it was opened; is it cleaned by hand?"
        )

    def _path(self, info: ShardInfo) -> Path:
        return (
            self._root
            / self._index.fingerprint[:16]
            / f"{Path(info.name).stem}.{info.sha256[:16]}.h5"
        )

    def _open_file(self, path: Path, info: ShardInfo, *, in_cache: bool) -> OpenShard:
        try:
            file = path.open("rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"there is no {path}") from error
        except OSError as error:
            hint = "mend its rights" + (
                " or give another cache by --cache.dir=FOLDER" if in_cache else ""
            )
            raise ForbiddenError(f"{path} cannot be read: {error.strerror}; {hint}") from error
        try:
            if in_cache:
                _lock(
                    file,
                    fcntl.LOCK_SH,
                    timeout_s=self._timeout_s,
                    waiting_for=f"the lock on {path}",
                )
                if _identity(path) != _identity_of(file):
                    raise NotFoundError(f"{path} was removed while it was opened")
                _touch(path)
            started = time.monotonic()
            self._verify(file, path, info, in_cache=in_cache)
            verify_s = time.monotonic() - started
            with self._mapping_lock():
                shard = self._map(path, file, info)
            if _identity(path) != _identity_of(file):  # by another between the hash and the map
                raise CorruptError(f"shard {path} was replaced while it was opened")
            size = self._index.image_size
            if shard.images.shape != (info.num_rows, size, size):
                raise CorruptError(
                    f"{path} holds images of {shard.images.shape}, not the {info.num_rows} of its index"
                )
        except BaseException:
            file.close()
            raise
        if not in_cache:
            file.close()
        return OpenShard(shard, verify_s=verify_s, _file=file)

    def _map(self, path: Path, file: BufferedReader, info: ShardInfo) -> Shard:
        """The open file as a shard, which stays mapped after its use where there is room for it.

        A file that is mapped keeps its inode, and its place on the disk: none stays where the cache
        has a limit. Those that came first stay: an epoch uses each shard once, so the one whose use
        is longest ago is needed soonest.
        """
        identity = _version(os.fstat(file.fileno()))
        known = self._known.get(info.name)
        if known is not None and known.identity != identity:  # another file now
            self._num_kept -= known.shard is not None
            known = None
        if known is not None and known.shard is not None:
            return known.shard
        shard = open_shard(path) if known is None else map_shard(path, known.layout)
        is_kept = self._num_kept < self._max_kept
        self._num_kept += is_kept
        self._known[info.name] = _Known(identity, shard.layout, shard if is_kept else None)
        return shard

    def _mapping_lock(self) -> threading.Lock:
        process, lock = self._mapping
        if (
            process != os.getpid()
        ):  # in a child after fork nobody would open it who held it in the parent
            lock = threading.Lock()
            self._mapping = (os.getpid(), lock)
        return lock

    def _verify(self, file: BufferedReader, path: Path, info: ShardInfo, *, in_cache: bool) -> None:
        status = os.fstat(file.fileno())
        identity = (info.sha256, status.st_ino, status.st_size, status.st_mtime_ns)
        if identity in self._verified:
            return
        if status.st_size != info.size_bytes:
            raise CorruptError(
                f"shard {path} is damaged: it has {status.st_size} bytes, not the {info.size_bytes} of the index"
                f"{'' if in_cache else self._how_to_repair()}"
            )
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != info.sha256:
            raise CorruptError(
                f"shard {path} is damaged: its sha256 is {found[:16]}…, not the {info.sha256[:16]}… of the index"
                f"{'' if in_cache else self._how_to_repair()}"
            )
        self._verified.add(identity)

    def _how_to_repair(self) -> str:
        return f"; `python -m xrai.verify --dataset {self._store.uri} --repair --source SOURCE` writes it anew"

    def _fetch(
        self, path: Path, info: ShardInfo, *, instead_of: tuple[int, int] | None = None
    ) -> None:
        """Bring the shard to `path`, unless another process does. `instead_of` is a damaged file
        that must go.
        """
        with self._only_one(path, info) as lock:
            if instead_of is not None and _identity(path) == instead_of:
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
                    status = part.stat()
                    self._verified.add(
                        (info.sha256, status.st_ino, status.st_size, status.st_mtime_ns)
                    )
                    part.replace(path)
                    return
                _logger.warning(
                    "%s/%s arrived with a wrong hash; fetching it again", self._store.uri, info.name
                )
                part.unlink()
        raise CorruptError(
            f"shard {self._store.uri}/{info.name} is damaged: in {_NUM_FETCHES} fetches its sha256 was "
            f"{found[:16]}…, not the {info.sha256[:16]}… of the index{self._how_to_repair()}"
        )

    @contextmanager
    def _only_one(self, path: Path, info: ShardInfo) -> Iterator[BinaryIO]:
        """Hold the right to fetch one shard. The lock's file is as long as the room that its
        holder has taken.
        """
        lock_path = path.with_suffix(".lock")
        deadline = time.monotonic() + self._timeout_s
        waiting_for = (
            f"another process to fetch {self._store.uri}/{info.name} (it holds {lock_path})"
        )
        while True:
            with _explained_cache(self._root):
                lock_path.parent.mkdir(parents=True, exist_ok=True)
                file = lock_path.open("ab")
            with file:
                _lock(
                    file,
                    fcntl.LOCK_EX,
                    timeout_s=self._timeout_s,
                    deadline=deadline,
                    waiting_for=waiting_for,
                )
                if _identity(lock_path) != _identity_of(file):
                    continue  # the last holder removed it while we waited
                with _explained_cache(self._root):
                    try:
                        yield file
                    finally:
                        lock_path.unlink(missing_ok=True)
                        _unlock(file)
                return

    def _make_room(self, lock: BinaryIO, info: ShardInfo) -> None:
        """Remove the least recently used shards that nobody has open until this one fits, and
        take its room.
        """
        limit = f"cache.max_gib ({self._max_bytes / 2**30:.3g} GiB)"
        if info.size_bytes > self._max_bytes:
            raise UserError(
                f"{limit} is smaller than the one shard {info.name} ({info.size_bytes} bytes); raise it"
            )
        deadline = time.monotonic() + self._timeout_s
        while True:
            with (self._root / ".lock").open("ab") as whole:
                _lock(
                    whole,
                    fcntl.LOCK_EX,
                    timeout_s=self._timeout_s,
                    waiting_for=f"the lock on {whole.name}",
                )
                if _evict(self._root, self._max_bytes - info.size_bytes):
                    os.ftruncate(lock.fileno(), info.size_bytes)
                    return
            if time.monotonic() > deadline:
                raise StoreError(
                    f"waited {self._timeout_s:g} s for room for {info.name} in {self._root}: {limit} is full of "
                    "shards in use; raise it, or lower loader.window"
                )
            time.sleep(5 * _POLL_S)

    def _replaced(self) -> str:
        """What to say where another data set is at the address now, else nothing."""
        try:
            found = read_index(self._store).fingerprint
        except (CorruptError, StoreError, DatasetError):
            return ""
        if found == self._index.fingerprint:
            return ""
        return (
            f"the data set at {self._store.uri} was replaced while it was read (its fingerprint was "
            f"{self._index.fingerprint[:16]}…, now it is {found[:16]}…); start again"
        )


def _most_kept() -> int:
    """How many shards of a data set may stay mapped in this process."""
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _MAX_KEPT
        if num_files == resource.RLIM_INFINITY
        else min(_MAX_KEPT, int(num_files * _FILES_KEPT))
    )


def _evict(root: Path, most_bytes: int) -> bool:
    """Bring the shards and the rooms taken below `most_bytes`, if that can be done."""
    # locks first: a fetch that ends meanwhile is then counted twice, not left out
    total = sum(_taken(lock) for lock in root.glob("*/*.lock"))
    shards = []
    for path in root.glob("*/*.h5"):
        with suppress(FileNotFoundError):
            status = path.stat()
            shards.append((status.st_atime_ns, status.st_size, path))
    total += sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if total <= most_bytes:
            break
        if _remove_unused(path):
            total -= size
    return total <= most_bytes


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _identity(path) != _identity_of(
                file
            ):  # another file took its place, and may be in use
                return False
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _taken(lock_path: Path) -> int:
    """The room that the holder of a lock has taken, bytes. A dead holder's lock, and what it
    left, is removed.
    """
    try:
        with lock_path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return os.fstat(file.fileno()).st_size
            if _identity(lock_path) == _identity_of(file):
                _remove_leftovers(lock_path)
                lock_path.unlink()
    except FileNotFoundError:
        pass
    return 0


def _remove_leftovers(path: Path) -> None:
    """Remove what a killed fetch of the shard left. The caller holds the shard's lock."""
    for left in path.parent.glob(f".{path.stem}.part.*.tmp"):
        left.unlink(missing_ok=True)
    path.with_suffix(".part").unlink(missing_ok=True)


def _lock(
    file: BinaryIO, kind: int, *, timeout_s: float, waiting_for: str, deadline: float | None = None
) -> None:
    """Take a lock that ends with `file`, or with the process. `deadline` is for a wait that has
    begun before.
    """
    if deadline is None:
        deadline = time.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise StoreError(f"waited {timeout_s:g} s for {waiting_for}") from error
            time.sleep(_POLL_S)


def _unlock(file: BinaryIO) -> None:
    """Drop the lock and close. Closing alone would leave the lock to a child that was forked
    meanwhile.
    """
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _touch(path: Path) -> None:
    """Note the time of use. A cache that is read-only needs none."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _identity_of(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


@contextmanager
def _explained_cache(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {root} cannot be written: {error.strerror}; give another by --cache.dir=FOLDER"
        ) from error
