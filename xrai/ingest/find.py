"""Find the files that people name: files, folders, zips, buckets, or patterns of these.

`xrai.pipeline` classifies what is found.
"""

import functools
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrai.errors import UserError
from xrai.ingest.sources import FolderSource, Source, open_source
from xrai.log import get_logger
from xrai.store import folder_of, open_store, scheme_of

_KINDS = "name JPEG, PNG or DICOM files or folders of them"
_WILDCARDS = frozenset("*?[")
_logger = get_logger(__name__)


@dataclass(frozen=True)
class File:
    """One image to classify."""

    path: str  # its name for people
    read: Callable[[], bytes | NDArray[np.uint8]]  # gives the file's bytes, or pixels (H, W)
    is_hidden: bool = False  # it, or a folder above it inside the source, begins with a dot


def find_files(paths: Sequence[str]) -> list[File]:
    """The files that the paths name, each once, in the order given.

    A path is a file; a folder, zip or .npz with all that is in it; the same below s3://bucket; or a
    pattern of these with `*`, `?`, `[abc]`, or `**` for any number of folders. A file of exactly
    that name comes before the pattern. Hidden files inside folders are skipped. Raises `UserError`
    if a path is missing or holds no file.
    """
    if not paths:
        raise UserError(f"no PATH given: {_KINDS}, as in `xrai predict --run R images/`")
    found: dict[str, File] = {}
    num_hidden = 0
    for path in paths:
        inside = _find(path)
        shown = [file for file in inside if not file.is_hidden]
        num_hidden += len(inside) - len(shown)
        if not shown:
            raise UserError(f"{path} holds no files to classify; {_KINDS}")
        found.update({file.path: file for file in shown})
    if num_hidden:
        _logger.info("%d hidden files (names that begin with a dot) are skipped", num_hidden)
    return list(found.values())


def _find(path: str) -> list[File]:
    """What one path names. Raises `UserError` if there is nothing."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name {path!r} is not UTF-8; rename it") from None
    # Shells give names that exist, such as file:1.png
    scheme = scheme_of(path) if "://" in path or not os.path.lexists(path) else ""
    if scheme == "file":
        path = str(folder_of(path))
    elif scheme:
        return _find_in_bucket(path)
    if not os.path.lexists(path) and _WILDCARDS & set(path):
        matches = sorted(_glob(path))
        if not matches:
            raise UserError(f"no file matches {path}; {_KINDS}")
        return [file for match in matches for file in _find_on_disk(match, is_match=True)]
    return _find_on_disk(path)


def _glob(pattern: str) -> Iterator[str]:
    """What matches on disk. `**` is left to the source's listing, since `glob` recurses into
    folders and follows links to one folder again and again.
    """
    parts = pattern.rstrip("/").split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)  # noqa: PTH207, Path.glob takes no absolute one
        return
    first = parts.index("**")
    tops = glob.glob("".join(f"{part}/" for part in parts[:first])) if first else [""]  # noqa: PTH207
    takes_hidden = any(part.startswith(".") for part in parts[first:])
    for top in tops:
        for path in FolderSource(Path(top)).files().paths:
            inside = path.split("/")
            is_hidden = any(part.startswith(".") for part in inside)
            if (takes_hidden or not is_hidden) and _matches(inside, parts[first:]):
                yield top + path


def _find_on_disk(path: str, *, is_match: bool = False) -> list[File]:
    place = Path(path)
    try:
        mode = place.stat().st_mode
    except OSError as error:
        if not is_match:
            reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
            raise UserError(f"there is no file or folder {path}{reason}; {_KINDS}") from error
        mode = 0  # a broken link, say, whose row then says so
    is_file = stat.S_ISREG(mode)
    if stat.S_ISDIR(mode) or (is_file and place.suffix.lower() in (".zip", ".npz")):
        return _all_of(open_source(path, needs_labels=False), path)
    if not is_file and not is_match:
        raise UserError(f"{path} is neither a file nor a folder; {_KINDS}")
    return [_file(FolderSource(place.parent), place.name, path)]


def _find_in_bucket(uri: str) -> list[File]:
    """One object, all objects below a prefix, or all that match a pattern or are below a match."""
    parent, _, name = uri.rpartition("/")
    if name and parent.count("/") > 1 and open_store(parent).size(name) is not None:
        return [_file(open_source(parent), name, uri)]
    parts = uri.split("/")
    places = range(3, len(parts))  # behind the bucket
    first = next((place for place in places if _WILDCARDS & set(parts[place])), None)
    if first is None:
        return _all_of(open_source(uri), uri)
    top, pattern = "/".join(parts[:first]), parts[first:]
    inside = _all_of(open_source(top), top)
    matches = [file for file in inside if _matches(file.path.split("/")[first:], pattern)]
    if not matches:
        raise UserError(f"no object matches {uri}; {_KINDS}")
    return matches


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether folders and a file, or the first of them, match; `**` is any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _all_of(source: Source, path: str) -> list[File]:
    top = path.rstrip("/")
    return [
        _file(source, inside, f"{top}/{inside}", is_hidden="/." in f"/{inside}")
        for inside in source.files().paths
    ]


def _file(source: Source, key: str, path: str, *, is_hidden: bool = False) -> File:
    return File(path, functools.partial(source.read, key), is_hidden)
