"""Local files: replace atomically, hash, explain failures in one line, cache folder, cores.

All packages write through `replacing` or `write_atomically`, so a reader never sees half a file.
"""

import errno
import fcntl
import functools
import hashlib
import io
import os
import re
import secrets
import select
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import BinaryIO, Literal

from xrai.errors import (
    AlreadyExistsError,
    ForbiddenError,
    NotFoundError,
    StoreAccessError,
    StoreError,
    UserError,
)

Access = Literal["read", "written", "listed", "deleted"]

_CHUNK_BYTES = 256 * 1024
_LOCK = ".xrai-lock"
_STALE_S = 24 * 3600.0
_SILENCE_S = 60.0  # of a pipe that is read
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


@contextmanager
def replacing(path: Path, *, only_if_absent: bool = False, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` if the block succeeds and vanishes if it fails.

    Parent folders are created. The first write into a folder removes what killed writers left
    there a day ago or more. `mode` is its permissions, less the umask. With `only_if_absent`,
    raises `FileExistsError` instead of replacing. Raises `OSError` as the operating system does;
    see `explaining`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(path.parent)) from error
    _remove_stale_temporaries(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if only_if_absent and _link(temporary, path):
            return
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # instead of none, or of the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(
    path: Path, data: bytes, *, only_if_absent: bool = False, mode: int = 0o666
) -> None:
    """Write `data` to `path`, whole or not at all; see `replacing`."""
    with replacing(path, only_if_absent=only_if_absent, mode=mode) as file:
        file.write(data)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that `replacing` has not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read it, without waiting where it is a pipe, a device or a folder. Raises
    `OSError` where it is one of these.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(kind, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_once(path: Path, *, max_bytes: int) -> bytes:
    """The first `max_bytes` of a file, or of a pipe such as `<(…)`, which can be read only once.

    Raises `OSError`: `TimeoutError` where a pipe's writer is missing, or silent for a minute.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        ready = select.poll()
        ready.register(file, select.POLLIN)
        parts: list[bytes] = []
        while max_bytes > 0:
            if not ready.poll(_SILENCE_S * 1000):
                words = f"nothing was written into it for {_SILENCE_S:g} s"
                raise TimeoutError(errno.ETIMEDOUT, words, str(path))
            part = file.read(min(max_bytes, 4 * _CHUNK_BYTES))
            if not part:
                break
            parts.append(part)
            max_bytes -= len(part)
    return b"".join(parts)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_hashed(file: BinaryIO, write: Callable[[bytes], object], *, where: str) -> str:
    """Pass the rest of `file` to `write` in chunks; return the SHA-256 of it, in hex.

    A failing read is raised as `explaining` does, with `where` as the file's name; a bare `OSError`
    comes from `write`.
    """
    digest = hashlib.sha256()
    while True:
        with explaining("read", where):
            chunk = file.read(_CHUNK_BYTES)
        if not chunk:
            return digest.hexdigest()
        digest.update(chunk)
        write(chunk)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that vanishes after the block, and after a kill when a command starts again."""
    return tempfile.TemporaryDirectory(dir=scratch_folder())


@functools.lru_cache(1)
def scratch_folder() -> Path:
    """This process's own folder below TMPDIR, removed when it ends. The first call removes those of
    processes that were killed.

    A process holds a lock in its folder, so nothing that another one uses is removed, whatever its
    process id and container. Raises `UserError` where no folder can be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="xrai-"))
    except OSError as error:
        raise UserError(
            f"{error.strerror}: temporary files are written there; mount a folder, or name one by "
            "TMPDIR"
        ) from error
    for lock_path in folder.parent.glob(f"xrai-{'[a-z0-9_]' * 8}/{_LOCK}"):
        # another user's, or locked as long as its process lives
        with suppress(OSError), open_regular(lock_path) as other:
            if os.fstat(other.fileno()).st_uid != os.geteuid():
                continue
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_path.parent)
    lock = (folder / "new").open("wb")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "new").rename(folder / _LOCK)  # so that nobody finds it unlocked

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()

    # After multiprocessing's own finalizers, which remove a folder in it; never in a fork
    Finalize(None, remove, exitpriority=-200)
    return folder


def cache_folder(*parts: str) -> Path:
    """A folder below `$XDG_CACHE_HOME/xrai`, else `~/.cache/xrai`; it is not created.

    Raises `UserError` where there is neither.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError("no home folder for a cache: set XDG_CACHE_HOME to a folder") from error
    return Path(cache, "xrai", *parts)


def num_cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use, by its affinity and the CPU quota of its cgroups. A
    quota of 1.5 CPUs counts as 2 cores.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min([cores, *_cpu_quotas(root)])


def _cpu_quotas(root: Path) -> Iterator[int]:
    """The quota of this process's cgroups (v2 and v1) and of their parents, where they have one."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            folder = top / name.strip("/")
            for place in [folder, *folder.parents][: len(folder.parts) - len(top.parts) + 1]:
                with suppress(OSError, ValueError):  # no such file, or "max"
                    texts = [(place / file).read_text() for file in files]
                    quota, period = (int(number) for number in " ".join(texts).split())
                    if quota > 0 and period > 0:
                        yield -(-quota // period)


@contextmanager
def explaining(
    access: Access,
    where: str,
    *,
    hint: str = "",
    error_type: type[StoreError] = StoreError,
    is_address: bool = True,
) -> Iterator[None]:
    """Turn an `OSError` in the block into one line that says what to do.

    `where` names the file for people. `hint` replaces the advice that fits the cause. Raises
    `AlreadyExistsError`, `ForbiddenError`, `NotFoundError` or `StoreAccessError` where one of
    these is the cause, else `error_type`. Without `is_address`, for files below an address that
    the program chose itself, it is always `error_type`.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        what = f"{where} cannot be {access}: {cause}"
        if not is_address:
            raise error_type(f"{what}{f'; {hint}' if hint else ''}") from error
        if isinstance(error, FileExistsError):
            raise AlreadyExistsError(f"{where} exists already") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = hint or "change its permissions or use another folder"
            raise ForbiddenError(f"{what}; {advice}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = hint or "free some space or use another folder"
            raise error_type(f"{what}; {advice}") from error
        if access == "written" and error.errno == errno.ENOTDIR:
            advice = hint or "choose another folder"
            text = f"{where} cannot be written: it is below a file; {advice}"
            raise StoreAccessError(text) from error
        if access == "read" and isinstance(error, IsADirectoryError | TimeoutError):
            raise StoreAccessError(f"{what}{f'; {hint}' if hint else ''}") from error
        if access != "written" and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise NotFoundError(f"there is no {where}") from error
        raise error_type(f"{what}{f'; {hint}' if hint else ''}") from error


@contextmanager
def explaining_disk() -> Iterator[None]:
    """Turn an `OSError` that no `explaining` met, and that names a file or a full disk, into one
    line; for the whole of a command.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.filename is None and not is_full and error.errno != errno.ENOENT:
            raise
        advice = "free some space" if is_full else "check that it is there, and its permissions"
        text = f"{error.filename or 'a file'} cannot be used: {error.strerror}"
        raise StoreError(f"{text}; {advice}, then start again") from error


def _link(temporary: Path, path: Path) -> bool:
    """Give a finished file its name, if no file has it; False on a file system without links."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "it exists already", str(path)) from error
        return False
    return True


@functools.lru_cache(1024)  # to list a folder for each file in it would take quadratic time
def _remove_stale_temporaries(folder: Path) -> None:
    """Remove what killed writers left in a folder a day ago or more; best effort."""
    with suppress(OSError):  # it may be written, not listed
        for left in folder.iterdir():
            with suppress(OSError):  # another user's, or its writer finishes right now
                if is_temporary(left.name) and left.stat().st_mtime < time.time() - _STALE_S:
                    left.unlink()
