"""A store that is a folder of this machine."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath

from xrai.errors import NotFoundError, StoreError
from xrai.files import (
    Access,
    copy_hashed,
    explaining,
    is_temporary,
    open_regular,
    read_once,
    replacing,
    write_atomically,
)
from xrai.store.base import Store, StoredObject, check_key

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # deleted meanwhile, or a link to nothing


@contextmanager
def _skipping_gone() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise


class FolderStore(Store):
    """Objects as files below a folder. The folder is made by the first write."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(os.path.abspath(folder))  # noqa: PTH100, Path.resolve would follow links
        self.uri = str(self._folder)

    def read(self, key: str, *, max_bytes: int = sys.maxsize) -> bytes:
        path = self._path(key)
        with self._explaining("read", key):
            if max_bytes < sys.maxsize:  # with a limit, a pipe is read, too: --labels <(…)
                with suppress(OSError):
                    self._check_size(key, path.stat().st_size, max_bytes)
                data = read_once(path, max_bytes=max_bytes + 1)
                self._check_size(key, len(data), max_bytes)
                return data
            with open_regular(path) as file:
                return file.read()

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        path = self._path(key)
        with self._explaining("written", key):
            write_atomically(path, data, only_if_absent=only_if_absent)

    def download(self, key: str, path: Path) -> str:
        source = self._path(key)
        with self._explaining("read", key):
            opened = open_regular(source)
        with opened, explaining("written", str(path)), replacing(path) as file:
            return copy_hashed(opened, file.write, where=self._where(key))

    def upload(self, key: str, path: Path) -> str:
        target = self._path(key)
        with explaining("read", str(path)):
            opened = path.open("rb")
        with opened, self._explaining("written", key), replacing(target) as file:
            return copy_hashed(opened, file.write, where=str(path))

    def size(self, key: str) -> int | None:
        path = self._path(key)
        try:
            with self._explaining("read", key):
                return path.stat().st_size if not path.is_dir() else None
        except NotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        if prefix.startswith("/") or ".." in prefix.split("/"):
            raise StoreError(
                f"{prefix!r} is not the beginning of a key: keys are relative paths, without '..'"
            )
        # os.walk recurses before Python 3.12
        found, folders = [], [f"{self.uri}/{prefix.rpartition('/')[0]}"]
        with self._explaining("listed", prefix):
            while folders:
                entries: list[os.DirEntry[str]] = []
                with suppress(FileNotFoundError, NotADirectoryError):
                    entries = list(os.scandir(folders.pop()))
                for entry in entries:
                    key = entry.path.removeprefix(self.uri).lstrip("/")
                    with _skipping_gone():
                        if entry.is_dir():
                            folders += [] if entry.is_symlink() else [entry.path]
                        elif key.startswith(prefix) and not is_temporary(entry.name):
                            found.append(StoredObject(key, entry.stat().st_size))
        yield from sorted(found)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explaining("deleted", key):
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self._folder / PurePosixPath(check_key(key))

    def _explaining(self, access: Access, key: str) -> AbstractContextManager[None]:
        return explaining(access, self._where(key))
