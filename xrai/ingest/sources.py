"""Where raw images come from: a folder, a zip that stays packed, a MedMNIST .npz, or a bucket.

`open_source` gives a `Source`, which lists its files and reads them one by one. Sources travel to
worker processes, which open them again. A file that cannot be read is excluded (`ImageError`); a
source that cannot be listed is the user's mistake (`SourceError`).
"""

import errno
import hashlib
import heapq
import lzma
import os
import re
import stat
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.shards import SPLITS
from xrai.errors import ImageError, NotFoundError, SourceError, StoreError, TooLargeError
from xrai.ingest.listed import Files
from xrai.labels import CLASSES, folded
from xrai.log import counted, get_logger, printable
from xrai.store import Store, check_key, folder_of, masked, open_store, scheme_of

MAX_FILE_BYTES: Final = 1 << 28  # no X-ray is larger: 100 million pixels of 16 bits are 2e8 bytes
MAX_ARRAY_BYTES: Final = 4 << 30  # of one array of a .npz, which is held in memory

_KINDS = "a folder, a .zip, a MedMNIST .npz or s3://bucket/prefix"
_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # this process's fault, not a file's
_IS_UTF_8 = 1 << 11  # flag of a name in a zip (APPNOTE.TXT 4.4.4)
_DRIVE = re.compile("[A-Za-z]:")
# What zipfile, its decompressors and numpy raise on damaged archives, found by feeding them such
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
    *(OSError, EOFError, ValueError, TypeError, LookupError, SyntaxError),
    *(ArithmeticError, RuntimeError, MemoryError),
)
_logger = get_logger(__name__)


class Source(ABC):
    """A place that raw images are read from. Picklable; safe to read from several threads."""

    name: str  # for people: what the data set calls its source
    num_parallel_reads: int = 1  # how many reads at a time pay off in one process

    def holds(self, store: Store) -> bool:
        """Whether a store's address is inside this source, which would read what is written."""
        return False

    @abstractmethod
    def files(self) -> Files:
        """All files, data or not, sorted by path. Raises `SourceError`."""

    @abstractmethod
    def read(self, path: str) -> bytes | NDArray[np.uint8]:
        """A file's bytes, or an image (H, W). Raises `ImageError` if this file cannot be read."""


def open_source(uri: str, names: Sequence[str] = (), *, needs_labels: bool = True) -> Source:
    """The source at an address; `names` are those of its classes where it has numbers alone (.npz),
    NORMAL and PNEUMONIA if there are none. Without `needs_labels`, such numbers may mean anything
    else. Raises `SourceError` if there is no source, or its kind is unknown.
    """
    if not uri:
        raise SourceError(f"--source is empty; it takes {_KINDS}")
    scheme = scheme_of(uri)
    if scheme == "s3":
        if uri.lower().endswith((".zip", ".npz")):
            raise SourceError(
                f"source {uri} is one packed object; download it first, or unpack it into the "
                "bucket"
            )
        return StoreSource(open_store(uri))
    if scheme not in ("", "file"):
        raise SourceError(f"source {masked(uri)!r} is of no known kind; --source takes {_KINDS}")
    path = folder_of(uri) if scheme else Path(uri)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(
            f"there is no source {uri}; --source takes {_KINDS} (to try with drawn images: `python "
            "-m xrai.phantom --num-images 600 --out data/phantoms`, then --source data/phantoms)"
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(
            f"source {uri!r} cannot be read: {error}; --source takes {_KINDS}"
        ) from error
    if stat.S_ISDIR(mode):
        return FolderSource(path)
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        raise SourceError(f"source {uri} is a pipe, a socket or a device; --source takes {_KINDS}")
    if path.suffix.lower() == ".npz":
        return NpzSource(path, names, needs_labels=needs_labels)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return ZipSource(path)
    raise SourceError(f"source {uri} is a file of no known kind; --source takes {_KINDS}")


def hash_of(data: bytes | NDArray[np.uint8]) -> str:
    """Hex sha256 of a source file's bytes, or of an array's shape and pixels."""
    if isinstance(data, np.ndarray):
        data = repr(data.shape).encode() + np.ascontiguousarray(data).tobytes()
    return hashlib.sha256(data).hexdigest()


class FolderSource(Source):
    """A folder. Links are followed; a folder that several paths lead to is listed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = printable(folder.resolve().name)  # it may not be UTF-8

    def holds(self, store: Store) -> bool:
        path = store.local_path("any")
        return path is not None and path.parent.resolve().is_relative_to(self._folder.resolve())

    def files(self) -> Files:
        return Files.of(self._found())

    def _found(self) -> Iterator[tuple[str, int]]:
        """Paths and sizes; a name is an object only until it is taken."""
        seen: dict[int, set[int]] = defaultdict(set)  # numbers of folders, by device
        again: list[str] = []
        pending, links = [""], list[str]()  # folders
        while pending or links:
            prefix = heapq.heappop(pending or links)  # so that no order of listing matters
            folder = f"{self._folder}/{prefix}"
            with _explaining(folder):
                status = os.stat(folder)  # noqa: PTH116, a Path takes quadratic time
            if status.st_ino in seen[status.st_dev]:
                again.append(prefix)
                continue
            seen[status.st_dev].add(status.st_ino)
            for entry in _entries(folder):
                path = prefix + entry.name
                try:
                    entry.name.encode()
                    status = entry.stat()
                except UnicodeEncodeError:
                    raise SourceError(
                        f"the name of {entry.path!r} is not UTF-8; rename it"
                    ) from None
                except OSError:  # a broken link, say: reading it will tell
                    yield path, 0
                    continue
                if stat.S_ISDIR(status.st_mode):
                    heapq.heappush(links if entry.is_symlink() else pending, f"{path}/")
                else:
                    yield path, status.st_size
        if again:
            text = "%s: %d links to folders that are listed already are skipped, such as %r"
            _logger.warning(text, self.name, len(again), again[0])

    def read(self, path: str) -> bytes:
        # `open` would take longer than the reading itself. A pipe is not waited for, and a terminal
        # does not become this process's own.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            descriptor = os.open(f"{self._folder}/{path}", flags)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise ImageError("is not a regular file but a pipe, a device or a folder")
                _check_size(left := status.st_size)
                parts = []
                # Never beyond the stated size: some files of /proc wait for more, or never end
                while left > 0 and (part := os.read(descriptor, left)):
                    parts.append(part)
                    left -= len(part)
                return b"".join(parts)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in _OUT_OF:
                raise
            raise ImageError(f"cannot be read ({error.strerror})") from error


@contextmanager
def _explaining(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"source folder {folder} cannot be listed: {error.strerror}") from error


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, one by one: a list of millions would take 200 bytes each."""
    with _explaining(folder), os.scandir(folder) as entries:
        yield from entries


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_FILE_BYTES:
        raise ImageError(
            f"has {size_bytes} bytes, more than any X-ray file ({MAX_FILE_BYTES} bytes)"
        )


class ZipSource(Source):
    """A zip archive, read in place. The names in it are labels, never paths of this machine."""

    def __init__(self, path: Path | str, content: BinaryIO | None = None) -> None:
        """The archive at a path; with `content`, that one, and the path is its name for people."""
        self._path = path
        self._content = content
        self.name = printable(PurePath(path).name)
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None, "_members": {}}

    def files(self) -> Files:
        self._open()
        unknown = [path for path, member in self._members.items() if _name_of(member) is None]
        if unknown:
            words = counted(len(unknown), "file", "have")
            text = (
                "%s: %s a name in an unknown encoding, read as code page 437, such as %r: if it is "
            )
            text += "wrong, pack it again with names in UTF-8, or unpack it and give the folder"
            _logger.warning(text, self.name, words, unknown[0])
        return Files.of((path, member.file_size) for path, member in self._members.items())

    def read(self, path: str) -> bytes:
        archive = self._open()
        member = self._members[path]
        _check_size(member.file_size)
        try:
            return archive.read(member)
        except _DAMAGE as error:
            raise ImageError(f"cannot be unpacked ({error})") from error

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                archive = zipfile.ZipFile(self._content or self._path)
            except _DAMAGE as error:
                raise SourceError(
                    f"{self._path} cannot be read as a zip archive: {error}; download it again"
                ) from error
            # Some programs of Windows end the names of folders with a backslash
            files = [
                entry for entry in archive.infolist() if entry.filename[-1:] not in ("/", "\\")
            ]
            names = [self._checked(member) for member in files]
            for name, count in Counter(names).most_common(1):
                if count > 1:
                    raise SourceError(
                        f"{self._path} holds {count} files under the one name {name!r}; pack it "
                        "again"
                    )
            self._members = dict(zip(names, files, strict=True))
            self._archive = archive
        return self._archive

    def _checked(self, member: zipfile.ZipInfo) -> str:
        parts = (_name_of(member) or member.filename).replace("\\", "/").split("/")
        name = "/".join(part for part in parts if part not in ("", "."))
        if not name or not parts[0] or ".." in parts or _DRIVE.fullmatch(parts[0]):
            raise SourceError(
                f"{self._path} holds a file of the unsafe name {member.filename!r}; pack it again"
            )
        if member.flag_bits & 0x1:
            raise SourceError(
                f"{self._path} is encrypted ({name}); unpack it and give the folder as --source"
            )
        return name


def _name_of(member: zipfile.ZipInfo) -> str | None:
    """The name of a file in a zip; None where its encoding is unknown.

    Without a flag it should be in code page 437, as `zipfile` reads it; macOS writes UTF-8 there,
    and Windows the code page of its language.
    """
    name = member.filename
    if member.flag_bits & _IS_UTF_8 or name.isascii():
        return name
    try:
        data = name.encode("cp437")
    except UnicodeEncodeError:  # it is from the extra field that states the name in UTF-8
        return name
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class NpzSource(Source):
    """A MedMNIST file: `train_images` (N, H, W) uint8, `train_labels` (N, 1), likewise val, test.

    Its images appear as `train/PNEUMONIA/000007`, and as `train/000007` where its labels mean
    something else and are not needed. Each process that reads holds all of them.
    """

    def __init__(self, path: Path, names: Sequence[str] = (), *, needs_labels: bool = True) -> None:
        """`names` are what the labels 0, 1, … mean; NORMAL or PNEUMONIA alone stands for both.
        Raises `SourceError` for one with a slash.
        """
        self._needs_labels = needs_labels
        is_usual = {*map(folded, names)} <= {*map(folded, CLASSES)}
        usual = tuple(name.upper() for name in names) if len(names) > 1 else CLASSES
        self._classes = usual if is_usual else tuple(names)
        self._path = path
        self.name = printable(path.name)
        for name in self._classes:
            if "/" in name:
                raise SourceError(f"labels.names has {name!r}: classes of a .npz have no slash")
        self._arrays: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def files(self) -> Files:
        files = Files.of(self._found())
        if not files:
            raise SourceError(
                f"{self._path} holds no images: MedMNIST files have arrays such as train_images"
            )
        return files

    def _found(self) -> Iterator[tuple[str, int]]:
        for split in SPLITS:
            if f"{split}_images" not in self._load():
                continue
            images, folders = self._pair(split)
            size_bytes = int(np.prod(images.shape[1:]))
            for k, folder in enumerate(folders):
                yield f"{folder}/{k:06d}", size_bytes

    def read(self, path: str) -> NDArray[np.uint8]:
        split, *_, number = path.split("/")
        image: NDArray[np.uint8] = self._load()[f"{split}_images"][int(number)]
        return image  # (H, W)

    def _pair(self, split: str) -> tuple[NDArray[np.uint8], list[str]]:
        """Images (N, H, W) of one split, and the folder of each. Raises `SourceError`."""
        arrays = self._load()
        images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels", np.empty(0))
        if images.ndim != 3 or images.dtype != np.uint8:
            raise SourceError(
                f"{split}_images in {self._path} is {images.dtype} {images.shape}; "
                "grey images of (N, H, W) uint8 are needed, as in PneumoniaMNIST"
            )
        has_shape = labels.shape in ((len(images),), (len(images), 1))
        if has_shape and np.isin(labels, range(len(self._classes))).all():
            numbers = labels.reshape(-1).astype(np.int64).tolist()
            return images, [f"{split}/{self._classes[number]}" for number in numbers]
        if self._needs_labels:
            allowed = " or ".join(f"{k} ({name})" for k, name in enumerate(self._classes))
            raise SourceError(
                f"{split}_labels in {self._path} is not one label of {allowed} for each of "
                f"{counted(len(images), 'image')}; --labels.names='A|B|…' names other classes"
            )
        return images, [split] * len(images)

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
            except _DAMAGE as error:
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

    def files(self) -> Files:
        return Files.of(self._found())

    def _found(self) -> Iterator[tuple[str, int]]:
        for entry in self._store.list():
            try:
                check_key(entry.key)
            except StoreError:
                raise SourceError(
                    f"{self.name} holds an object of the unsafe name {entry.key!r} ('..' or '//'); "
                    "rename it"
                ) from None
            yield entry.key, entry.size_bytes

    def read(self, path: str) -> bytes:
        try:
            return self._store.read(path, max_bytes=MAX_FILE_BYTES)
        except TooLargeError as error:
            raise ImageError(f"is larger than any X-ray file ({MAX_FILE_BYTES} bytes)") from error
        except NotFoundError as error:
            raise ImageError("cannot be read (it is no longer there)") from error
