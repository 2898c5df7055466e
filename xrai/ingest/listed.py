"""The files of a source as columns: ten million of them in a few arrays, not in as many objects."""

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, starmap
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.rows import Texts, TextsBuilder

_A_RUN: Final = 1 << 16  # files that are sorted as objects
_AT_A_TIME: Final = 1024  # files made into objects


@dataclass(frozen=True, order=True, slots=True)
class SourceFile:
    """One file of a source. `path` is relative, with forward slashes."""

    path: str
    size_bytes: int


@dataclass(frozen=True, eq=False)
class Files(Sequence[SourceFile]):
    """All files of a source, sorted by path. `files[3]` and iterating make a `SourceFile` each."""

    paths: Texts
    sizes: NDArray[np.int64]  # (N,), bytes

    @classmethod
    def of(cls, found: Iterable[tuple[str, int]]) -> "Files":
        """Paths and sizes in bytes in any order, sorted. They are never all objects at once: parts
        are sorted and then merged.
        """
        rest = iter(found)
        runs = []
        while run := sorted(islice(rest, _A_RUN)):
            runs.append(cls._in_order(run))
        return runs[0] if len(runs) == 1 else cls._in_order(heapq.merge(*(r.pairs() for r in runs)))

    @classmethod
    def _in_order(cls, found: Iterable[tuple[str, int]]) -> "Files":
        paths, sizes = TextsBuilder(), array("q")
        for path, size_bytes in found:
            paths.append(path)
            sizes.append(size_bytes)
        return cls(paths.finish(), np.frombuffer(sizes, np.int64))

    def pairs(self) -> Iterator[tuple[str, int]]:
        """Paths and sizes in bytes."""
        for start in range(0, len(self), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            yield from zip(self.paths[part], self.sizes[part].tolist(), strict=True)

    def sizes_of(self, paths: Iterable[str]) -> NDArray[np.int64]:
        """(N,), the sizes of some of the files in bytes; `paths` are sorted."""
        rest = self.pairs()
        found = (next(size for path, size in rest if path == wanted) for wanted in paths)
        return np.fromiter(found, np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, place: int) -> SourceFile: ...
    @overload
    def __getitem__(self, place: slice) -> list[SourceFile]: ...
    def __getitem__(self, place: int | slice) -> SourceFile | list[SourceFile]:
        if isinstance(place, slice):
            pairs = zip(self.paths[place], self.sizes[place].tolist(), strict=True)
            return [*starmap(SourceFile, pairs)]
        return SourceFile(self.paths[place], int(self.sizes[place]))

    def __iter__(self) -> Iterator[SourceFile]:
        return starmap(SourceFile, self.pairs())


class TextIndex:
    """Where texts are in a column, or what `key` makes of them; 16 bytes for each."""

    def __init__(self, texts: Texts, key: Callable[[str], str] | None = None) -> None:
        self._texts, self._key = texts, key
        keys = map(key, texts) if key else texts
        hashes = np.fromiter(map(hash, keys), np.int64, len(texts))
        self._places = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._places].data

    def __contains__(self, text: str) -> bool:
        return next(self.places(text), -1) >= 0

    def places(self, text: str) -> Iterator[int]:
        """All places of a text, in order."""
        own = hash(text)
        found = bisect_left(self._hashes, own)
        while found < len(self._hashes) and self._hashes[found] == own:
            place = int(self._places[found])
            other = self._texts[place]
            if (self._key(other) if self._key else other) == text:
                yield place
            found += 1
