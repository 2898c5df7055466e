"""Where raw images come from: a folder, a zip that stays packed, a MedMNIST .npz, or a bucket.

`open_source` gives a `Source`, which lists its files and reads them one by one. Sources travel to
worker processes, which open them again. A file that cannot be read is excluded (`ImageError`); a
source that cannot be listed is the user's mistake (`SourceError`).
"""

import errno
import hashlib
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.manifest import CLASSES
from xrai.dataset.shards import SPLITS
from xrai.errors import ImageError, NotFoundError, SourceError, StoreError
from xrai.store import Store, check_key, open_store

MAX_FILE_BYTES: Final = 1 << 30  # no X-ray is larger; a zip member that claims more is a bomb
MAX_ARRAY_BYTES: Final = 4 << 30  # of one array of a .npz, which is held in memory

_READ_BYTES = 1 << 16  # at a time, beyond the size that a file states
_KINDS = "a folder, a .zip, a MedMNIST .npz or s3://bucket/prefix"


@dataclass(frozen=True, order=True, slots=True)
class SourceFile:
    """One file of a source. `path` is relative, with forward slashes."""

    path: str
    size_bytes: int


class Source(ABC):
    """A place that raw images are read from. Picklable; safe to read from several threads."""

    name: str  # for people: what the data set calls its source
    num_parallel_reads: int = 1  # how many reads at a time pay off in one process

    def holds(self, store: Store) -> bool:
        """Whether a store's address is inside this source, which would read what is written."""
        return False

    @abstractmethod
    def files(self) -> list[SourceFile]:
        """All files, data or not, sorted by path. Raises `SourceError`."""

    @abstractmethod
    def read(self, path: str) -> bytes | NDArray[np.uint8]:
        """A file's bytes, or an image (H, W). Raises `ImageError` if this file cannot be read."""


def open_source(uri: str) -> Source:
    """The source at an address. Raises `SourceError` if there is none, or its kind is unknown."""
    if not uri:
        raise SourceError(f"--source is empty; it takes {_KINDS}")
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme == "s3":
        if uri.lower().endswith((".zip", ".npz")):
            raise SourceError(
                f"source {uri} is one packed object; download it first, or unpack it into the "
                "bucket"
            )
        return StoreSource(open_store(uri))
    if scheme not in ("", "file"):
        raise SourceError(f"source {uri!r} is of no known kind; --source takes {_KINDS}")
    path = Path(unquote(urlsplit(uri).path)) if scheme else Path(uri)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(
            f"there is no source {uri}; --source takes {_KINDS} (to try with drawn images: `python "
            "-m xrai.phantom --num-images 600 --out data/phantoms`, then --source data/phantoms)"
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(
            f"source {uri!r} cannot be read: {error}; --source takes {_KINDS}"
        ) from error
    if is_folder:
        return FolderSource(path)
    if path.suffix.lower() == ".npz":
        return NpzSource(path)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return ZipSource(path)
    raise SourceError(f"source {uri} is a file of no known kind; --source takes {_KINDS}")


def hash_of(data: bytes | NDArray[np.uint8]) -> str:
    """Hex sha256 of a source file's bytes, or of an array's shape and pixels."""
    if isinstance(data, np.ndarray):
        data = repr(data.shape).encode() + np.ascontiguousarray(data).tobytes()
    return hashlib.sha256(data).hexdigest()


class FolderSource(Source):
    """A folder. Links are followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name

    def holds(self, store: Store) -> bool:
        path = store.local_path("any")
        return path is not None and path.parent.resolve().is_relative_to(self._folder.resolve())

    def files(self) -> list[SourceFile]:
        return sorted(self._walk(self._folder, "", parents=frozenset()))

    def _walk(
        self, folder: Path, prefix: str, *, parents: frozenset[tuple[int, int]]
    ) -> Iterator[SourceFile]:
        try:
            status = folder.stat()
            entries = list(os.scandir(folder))
        except OSError as error:
            raise SourceError(
                f"source folder {folder} cannot be listed: {error.strerror}"
            ) from error
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            raise SourceError(
                f"source folder {folder} is a link to a folder above it, an endless loop; remove it"
            )
        for entry in entries:
            try:
                entry.name.encode()
            except UnicodeEncodeError:
                raise SourceError(f"the name of {entry.path!r} is not UTF-8; rename it") from None
            path = prefix + entry.name
            if entry.is_dir():
                yield from self._walk(folder / entry.name, f"{path}/", parents=parents | {identity})
            elif entry.is_file():
                yield SourceFile(path, entry.stat().st_size)
            elif entry.is_symlink():  # a broken link: reading it will tell
                yield SourceFile(path, 0)
            else:
                raise SourceError(f"{entry.path} is neither a file nor a folder; remove it")

    def read(self, path: str) -> bytes:
        try:
            # `open` would take longer than the reading itself
            descriptor = os.open(f"{self._folder}/{path}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                size_bytes = os.fstat(descriptor).st_size
                parts = [os.read(descriptor, min(size_bytes, MAX_FILE_BYTES) + 1)]
                num_bytes = len(parts[0])
                # The file may grow, not state its size, or come in pieces
                while more := os.read(
                    descriptor,
                    min(max(size_bytes - num_bytes, _READ_BYTES), MAX_FILE_BYTES + 1 - num_bytes),
                ):
                    parts.append(more)
                    num_bytes += len(more)
                return _limited(b"".join(parts))
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.EIO):
                raise ImageError(f"cannot be read ({error.strerror})") from error
            raise


def _limited(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"is larger than any X-ray file ({MAX_FILE_BYTES} bytes)")
    return data


class ZipSource(Source):
    """A zip archive, read in place. The names in it are labels, never paths of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.name
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None, "_members": {}}

    def files(self) -> list[SourceFile]:
        self._open()
        return sorted(SourceFile(path, member.file_size) for path, member in self._members.items())

    def read(self, path: str) -> bytes:
        archive = self._open()
        member = self._members[path]
        if member.file_size > MAX_FILE_BYTES:
            raise ImageError(
                f"declares {member.file_size} bytes, more than any X-ray file ({MAX_FILE_BYTES})"
            )
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
            raise ImageError(f"cannot be unpacked ({error})") from error

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                archive = zipfile.ZipFile(self._path)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise SourceError(
                    f"{self._path} cannot be read as a zip archive: {error}; download it again"
                ) from error
            members = [member for member in archive.infolist() if not member.is_dir()]
            names = [self._checked(member) for member in members]
            for name, count in Counter(names).most_common(1):
                if count > 1:
                    raise SourceError(
                        f"{self._path} holds {count} files under the one name {name!r}; pack it "
                        "again"
                    )
            self._members = dict(zip(names, members, strict=True))
            self._archive = archive
        return self._archive

    def _checked(self, member: zipfile.ZipInfo) -> str:
        name = member.filename.replace("\\", "/")
        if any(part in ("", ".", "..") or ":" in part for part in name.split("/")):
            raise SourceError(
                f"{self._path} holds a file of the unsafe name {member.filename!r}; pack it again"
            )
        if member.flag_bits & 0x1:
            raise SourceError(
                f"{self._path} is encrypted ({name}); unpack it and give the folder as --source"
            )
        return name


class NpzSource(Source):
    """A MedMNIST file: `train_images` (N, H, W) uint8, `train_labels` (N, 1), likewise val, test.

    Its images appear as `train/PNEUMONIA/000007`. Each process that reads holds all of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.name
        self._arrays: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def files(self) -> list[SourceFile]:
        found = []
        for split in SPLITS:
            if f"{split}_images" not in self._load():
                continue
            images, labels = self._pair(split)
            size_bytes = int(np.prod(images.shape[1:]))
            found += [
                SourceFile(f"{split}/{CLASSES[label]}/{k:06d}", size_bytes)
                for k, label in enumerate(labels.tolist())
            ]
        if not found:
            raise SourceError(
                f"{self._path} holds no images: MedMNIST files have arrays such as train_images"
            )
        return sorted(found)

    def read(self, path: str) -> NDArray[np.uint8]:
        split, _, number = path.split("/")
        image: NDArray[np.uint8] = self._load()[f"{split}_images"][int(number)]
        return image  # (H, W)

    def _pair(self, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (N, H, W) and labels (N,) of one split. Raises `SourceError`."""
        arrays = self._load()
        images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels", np.empty(0))
        if images.ndim != 3 or images.dtype != np.uint8:
            raise SourceError(
                f"{split}_images in {self._path} is {images.dtype} {images.shape}; "
                "grey images of (N, H, W) uint8 are needed, as in PneumoniaMNIST"
            )
        has_shape = labels.shape in ((len(images),), (len(images), 1))
        if not has_shape or not np.isin(labels, range(len(CLASSES))).all():
            raise SourceError(
                f"{split}_labels in {self._path} is not one label of 0 (normal) or 1 (pneumonia) "
                f"for each of {len(images)} images"
            )
        return images, labels.reshape(-1).astype(np.int64)

    def _load(self) -> dict[str, NDArray[Any]]:
        if not self._arrays:
            wanted = {f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")}
            try:
                with zipfile.ZipFile(self._path) as archive:
                    for member in archive.infolist():
                        if member.file_size > MAX_ARRAY_BYTES:
                            raise SourceError(
                                f"{self._path}: {member.filename} declares {member.file_size} bytes"
                            )
                with np.load(self._path, allow_pickle=False) as archive:
                    self._arrays = {name: archive[name] for name in archive.files if name in wanted}
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
                raise SourceError(
                    f"{self._path} cannot be read as a MedMNIST .npz: {error}"
                ) from error
        return self._arrays


class StoreSource(Source):
    """Objects below an address of a bucket."""

    num_parallel_reads = 16

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = store.uri

    def holds(self, store: Store) -> bool:
        return f"{store.uri}/".startswith(f"{self._store.uri}/")

    def files(self) -> list[SourceFile]:
        entries = list(self._store.list())
        for entry in entries:
            try:
                check_key(entry.key)
            except StoreError:
                raise SourceError(
                    f"{self.name} holds an object of the unsafe name {entry.key!r}; rename it"
                ) from None
        return sorted(SourceFile(entry.key, entry.size_bytes) for entry in entries)

    def read(self, path: str) -> bytes:
        try:
            return _limited(self._store.read(path))
        except NotFoundError as error:
            raise ImageError("cannot be read (it is no longer there)") from error
