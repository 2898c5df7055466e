"""What a store is: objects under keys, behind one small interface."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xrai.errors import StoreError, TooLargeError, UserError
from xrai.files import temporary_folder

_SYSTEM_FILES = ("lost+found", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True, order=True)
class StoredObject:
    """One object of a store."""

    key: str
    size_bytes: int


class Store(ABC):
    """A place for objects under keys. `uri` is its address in normal form.

    All methods raise `StoreError` kinds that name the address, the key and the cause. A key that is
    absolute, has an empty part, or a part that is `.` or `..`, is refused.
    """

    uri: str

    @abstractmethod
    def read(self, key: str, *, max_bytes: int = sys.maxsize) -> bytes:
        """The whole object. Raises `NotFoundError` where there is none, `TooLargeError` before
        anything is read of one that is larger, `CorruptError` if it is replaced meanwhile.
        """

    @abstractmethod
    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Store `data`, replacing what was there; or raise `AlreadyExistsError` if asked not to
        replace.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> str:
        """Copy the object to a local file, atomically. Returns the SHA-256 of the bytes that
        arrived, in hex.
        """

    @abstractmethod
    def upload(self, key: str, path: Path) -> str:
        """Store a local file. Returns the SHA-256 of the bytes that were sent, in hex."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None where there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The objects whose keys begin with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """The object's own file for a folder, None for a bucket."""

    @contextmanager
    def as_file(self, key: str) -> Iterator[Path]:
        """The object as a local file: a folder's own, or a copy that vanishes after the block."""
        path = self.local_path(key)
        if path is not None and path.exists():
            yield path
            return
        with temporary_folder() as folder:
            copy = Path(folder) / "object"
            self.download(key, copy)
            yield copy

    def _check_size(self, key: str, size_bytes: int, max_bytes: int) -> None:
        if size_bytes > max_bytes:
            raise TooLargeError(
                f"{self._where(key)} has {size_bytes} bytes; at most {max_bytes} are read"
            )

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri


def refuse_others_files(
    store: Store, *, is_own: Callable[[str], bool], is_mark: Callable[[Store, str], bool], flag: str
) -> None:
    """Raise `UserError`, naming the flag, unless an address is new, empty, or holds nothing but
    what the command wrote: keys of its own, one of which no other program would write.

    Hidden files, and those of file systems and desktops, do not count.
    """
    keys = [
        entry.key
        for entry in store.list()
        if entry.key.partition("/")[0] not in _SYSTEM_FILES
        and not any(part.startswith(".") for part in entry.key.split("/"))
    ]
    others = [key for key in keys if not is_own(key)]
    if not others and not any(is_mark(store, key) for key in keys):
        others = keys
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{store.uri} holds files of something else ({', '.join(others[:3])}{more}): give a "
            f"new or an empty folder or prefix by {flag}"
        )


def check_key(key: str) -> str:
    """`key` itself, if it is a relative path that stays inside the store; raises `StoreError` if
    it is not.
    """
    try:
        os.fsencode(key)
        is_name = "\0" not in key
    except UnicodeEncodeError:
        is_name = False
    if not is_name or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(
            f"{key!r} is not a key: keys are relative paths such as report/card.md, without '..' "
            "and '//'"
        )
    return key
