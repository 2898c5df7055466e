"""The rows of a data set as columns: a few arrays instead of an object for each file.

A `Row` takes 700 bytes, in columns the file takes about 120, so that ten million fit into 2 GiB
(docs/decisions/0031-columns.md). `xrai.ingest` lists, hashes and plans with them, `xrai.dataset.
verify` reads a manifest into them. What iterates over `Rows`, or takes one of them, gets a `Row`.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.manifest import Row
from xrai.labels import Labels, LabelSpec

HASH_BYTES: Final = 32  # of SHA-256
OWN_PATIENT: Final = "file:"  # in the key of a patient known only by one file, before its path

_AT_A_TIME = 1024  # rows made into objects
_MAX_HEADS = 1000  # groups of patients known only by their files
_MAX_RECENT = 1 << 16  # patients remembered while rows are added

Numbers = NDArray[np.integer]  # positions of rows, or numbers of what several of them share


def is_file_patient(patient: str) -> bool:
    """Whether a key names a file whose patient is unknown, as `xrai.ingest.layout.file_patient`."""
    return patient.startswith(OWN_PATIENT) or patient.partition(":")[2].startswith(OWN_PATIENT)


class Texts(Sequence[str]):
    """Texts one after the other in UTF-8: 8 bytes each, and their own."""

    def __init__(self, data: bytes | bytearray, ends: NDArray[np.int64]) -> None:
        """`ends` are the N + 1 places in `data` where texts end; the first one is 0."""
        self._data, self._ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Put texts together; they need not be in memory at once."""
        builder = TextsBuilder()
        for text in texts:
            builder.append(text)
        return builder.finish()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return self._between(start, max(stop, start))[::step] if step > 0 else [*self][place]
        num = len(self._ends) - 1
        if not -num <= place < num:
            raise IndexError(place)
        place %= num
        start, end = self._ends[place : place + 2].tolist()
        return _decode(self._data[start:end])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_A_TIME):
            yield from self._between(start, min(start + _AT_A_TIME, len(self)))

    def _between(self, start: int, stop: int) -> list[str]:
        ends = self._ends[start : stop + 1].tolist()
        first = ends[0]
        data = self._data[first : ends[-1]]
        if data.isascii():
            text = data.decode("ascii")
            return [text[a - first : b - first] for a, b in pairwise(ends)]
        return [_decode(data[a - first : b - first]) for a, b in pairwise(ends)]

    def take(self, places: Numbers) -> "Texts":
        """The texts at these places."""
        starts, ends = self._ends[places], self._ends[places + 1]
        data = bytearray()
        for k in range(0, len(places), _AT_A_TIME):
            spans = zip(
                starts[k : k + _AT_A_TIME].tolist(), ends[k : k + _AT_A_TIME].tolist(), strict=True
            )
            data += b"".join([self._data[a:b] for a, b in spans])
        ends -= starts
        return Texts(data, np.concatenate([np.zeros(1, np.int64), np.cumsum(ends, out=ends)]))

    def joined(self, other: "Texts") -> "Texts":
        """These texts, then the others."""
        ends = np.concatenate([self._ends, self._ends[-1] + other._ends[1:]])
        return Texts(self._data + other._data, ends)


class TextsBuilder:
    """Puts texts together."""

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, text: str) -> None:
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def finish(self) -> Texts:
        """All texts; nothing can be appended afterwards."""
        return Texts(self._data, np.frombuffer(self._ends, np.int64))


def _decode(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "surrogatepass")  # as of names on a disk that are no UTF-8


@dataclass(frozen=True, eq=False)
class Names:
    """A column of names of which few are different."""

    codes: Numbers  # (N,), places in `values`
    values: tuple[str, ...]

    @classmethod
    def same(cls, name: str, num: int) -> "Names":
        """A column with the same name in all rows."""
        return cls(np.zeros(num, np.uint8), (name,))

    def __getitem__(self, place: int) -> str:
        return self.values[int(self.codes[place])]

    def are(self, *names: str) -> NDArray[np.bool_]:
        """(N,), where one of these names stands."""
        found = np.zeros(len(self.codes), np.bool_)
        for code, value in enumerate(self.values):
            if value in names:
                found |= self.codes == code
        return found

    def used(self) -> list[str]:
        """The names that occur."""
        counts = np.bincount(self.codes, minlength=len(self.values))
        return [name for name, count in zip(self.values, counts.tolist(), strict=True) if count]

    def put(self, where: NDArray[np.bool_] | Numbers, name: str) -> "Names":
        """With this name in the rows of a mask, or at these places."""
        values = self.values if name in self.values else (*self.values, name)
        codes = self.codes.astype(np.min_scalar_type(len(values)))
        codes[where] = values.index(name)
        return Names(codes, values)

    def take(self, places: Numbers) -> "Names":
        return Names(self.codes[places], self.values)


@dataclass(frozen=True, eq=False)
class Patients:
    """The patients' keys. One that follows from the path of the patient's only file is not stored:
    it is a head ("file:", "group:file:") and the path without its first folders.
    """

    codes: NDArray[np.int32]  # (N,), a place in `keys`, which are all different; -1 - k: `heads[k]`
    keys: Texts
    heads: tuple[str, ...] = ()
    skipped: str = ""  # what the paths begin with, and such keys lack

    def take(self, places: Numbers) -> "Patients":
        return replace(self, codes=self.codes[places])

    def between(self, start: int, stop: int, paths: Sequence[str]) -> list[str]:
        """The keys of a few rows with these paths."""
        codes = self.codes[start:stop].tolist()
        first, last = min(codes, default=-1), max(codes, default=-1)
        known: Mapping[int, str] = {}
        if first >= 0 and last - first < 2 * len(codes):  # one after the other: read at once
            known = dict(enumerate(self.keys[first : last + 1], first))
        else:
            known = {code: self.keys[code] for code in set(codes) if code >= 0}
        heads, cut = self.heads, len(self.skipped)
        return [
            known[code] if code >= 0 else heads[-1 - code] + path[cut:]
            for code, path in zip(codes, paths, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """The rows of a data set. `rows[3]` and iterating make a `Row` each."""

    paths: Texts
    sha256: NDArray[np.uint8]  # (N, 32), contents undefined where `is_hashed` is false
    is_hashed: NDArray[np.bool_]  # (N,)
    labels: Labels  # (N,) uint8, or (N, C) int8 of findings
    patients: Patients
    subtypes: Names
    splits: Names
    shards: Names  # "" where an image is in none
    places: NDArray[np.int32]  # (N,), in the shard; -1 where an image is in none
    reasons: Mapping[int, str] = field(default_factory=dict)  # of the rows that were excluded

    @classmethod
    def of(cls, rows: Iterable[Row], labels: LabelSpec) -> "Rows":
        """Columns of rows that need not be in memory at once."""
        if isinstance(rows, Rows):
            return rows
        builder = RowsBuilder(labels)
        for row in rows:
            builder.append(row)
        return builder.finish()

    @classmethod
    def unread(
        cls, paths: Texts, labels: Labels, patients: Patients, subtypes: Names, splits: Names
    ) -> "Rows":
        """Rows of files that were listed and not read: without hashes, in no shard."""
        num = len(paths)
        return cls(
            paths=paths,
            sha256=np.zeros((num, HASH_BYTES), np.uint8),  # takes no memory until it is written
            is_hashed=np.zeros(num, np.bool_),
            labels=labels,
            patients=patients,
            subtypes=subtypes,
            splits=splits,
            shards=Names.same("", num),
            places=np.full(num, -1, np.int32),
        )

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> "Rows": ...
    def __getitem__(self, place: int | slice) -> "Row | Rows":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return next(self._between(place, place + 1))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _AT_A_TIME):
            yield from self._between(start, min(start + _AT_A_TIME, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return len(self) == len(other) and all(
            one == another for one, another in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def _between(self, start: int, stop: int) -> Iterator[Row]:
        span = slice(start, stop)
        labels: Iterable[Any] = self.labels[span].tolist()
        if self.labels.ndim == 2:
            labels = map(tuple, labels)
        paths, subtypes = self.paths[span], self.subtypes.values
        splits, shards, get_reason = self.splits.values, self.shards.values, self.reasons.get
        columns = zip(
            range(start, stop),
            paths,
            self.is_hashed[span].tolist(),
            labels,
            self.patients.between(start, stop, paths),
            self.subtypes.codes[span].tolist(),
            self.splits.codes[span].tolist(),
            self.shards.codes[span].tolist(),
            self.places[span].tolist(),
            strict=True,
        )
        hashes = self.sha256[span].tobytes()
        for number, path, is_hashed, label, patient, subtype, split, shard, place in columns:
            begin = (number - start) * HASH_BYTES
            yield Row(
                path,
                hashes[begin : begin + HASH_BYTES].hex() if is_hashed else "",
                label,
                patient,
                subtypes[subtype],
                splits[split],
                shards[shard] or None,
                None if place < 0 else place,
                get_reason(number, ""),
            )

    # ------------------------------------------------------------------- what several rows share

    @property
    def is_used(self) -> NDArray[np.bool_]:
        """(N,), false where a file was excluded."""
        used = np.ones(len(self), np.bool_)
        used[[*self.reasons]] = False
        return used

    @cached_property
    def images(self) -> NDArray[np.int32]:
        """(N,), the same number for files with the same hash, in the order of the hashes; -1 where
        there is none.
        """
        hashed = np.flatnonzero(self.is_hashed)
        words = self.sha256.view(">u8")  # (N, 4)
        first = words[hashed, 0].astype(np.uint64)
        order = np.argsort(first, kind="stable")
        first = first[order]
        order = hashed[order]
        is_new = np.ones(len(order), np.bool_)
        np.not_equal(first[1:], first[:-1], out=is_new[1:])
        del first
        # Of those whose first 64 bits are another's, the others are compared, too
        alike = ~is_new
        alike[:-1] |= ~is_new[1:]
        if alike.any():
            some = order[alike]
            own = words[some].astype(np.uint64)  # (M, 4)
            sorting = np.lexsort((some, *own.T[::-1]))
            order[alike], own = some[sorting], own[sorting]
            is_new[alike] = np.concatenate([[True], (own[1:] != own[:-1]).any(axis=1)])
        numbers = np.full(len(self), -1, np.int32)
        numbers[order] = np.cumsum(is_new, dtype=np.int32) - 1
        return numbers

    @property
    def num_patients(self) -> int:
        """A bound: the numbers of patients are below it."""
        return len(self.patients.keys) + len(self)

    def patient_numbers(self, places: Numbers | None = None) -> NDArray[np.int32]:
        """Numbers of the patients of all rows, or of those at some places; see `patient_key`."""
        codes = self.patients.codes if places is None else self.patients.codes[places]
        rows = np.arange(len(self), dtype=np.int32) if places is None else places
        return np.where(codes < 0, len(self.patients.keys) + rows, codes).astype(np.int32)

    def patient_keys(self, numbers: Numbers) -> Iterator[str]:
        """The keys of the patients of these numbers."""
        for start in range(0, len(numbers), _AT_A_TIME):
            yield from map(self.patient_key, numbers[start : start + _AT_A_TIME].tolist())

    def patient_key(self, number: int) -> str:
        """The key of the patient of this number."""
        keys = self.patients.keys
        if number < len(keys):
            return keys[number]
        row = number - len(keys)
        head = self.patients.heads[-1 - int(self.patients.codes[row])]
        return head + self.paths[row][len(self.patients.skipped) :]

    # ----------------------------------------------------------------------------------- others

    def take(self, places: Numbers) -> "Rows":
        """The rows at these places, which are all different."""
        reasons = {}
        if self.reasons:
            reasons = {
                new: self.reasons[old]
                for new, old in enumerate(places.tolist())
                if old in self.reasons
            }
        return Rows(
            paths=self.paths.take(places),
            sha256=self.sha256[places],
            is_hashed=self.is_hashed[places],
            labels=self.labels[places],
            patients=self.patients.take(places),
            subtypes=self.subtypes.take(places),
            splits=self.splits.take(places),
            shards=self.shards.take(places),
            places=self.places[places],
            reasons=reasons,
        )

    def with_(self, **columns: Any) -> "Rows":
        """The same rows with some other columns; the rest is shared."""
        changed = replace(self, **columns)
        if "images" in self.__dict__ and not {"sha256", "is_hashed"} & columns.keys():
            changed.__dict__["images"] = self.images
        return changed

    def with_patients(self, places: Numbers, keys: Texts) -> "Rows":
        """The same rows with these patients at these places."""
        if not len(places):
            return self
        patients, codes = self.patients, self.patients.codes.copy()
        codes[places] = len(patients.keys) + np.arange(len(places), dtype=np.int32)
        joined = replace(patients, codes=codes, keys=patients.keys.joined(keys))
        return self.with_(patients=_without_repeats(joined))


class RowsBuilder:
    """Makes `Rows` of one row after the other."""

    def __init__(self, labels: LabelSpec) -> None:
        self._labels, self._label_values = labels, array("b" if _has_findings(labels) else "B")
        self._paths, self._last, self._is_sorted = TextsBuilder(), "", True
        self._sha256, self._is_hashed = bytearray(), bytearray()
        self._patients = PatientsBuilder()
        self._subtypes, self._splits = NamesBuilder(), NamesBuilder()
        self._shards, self._places = NamesBuilder(), array("i")  # kept once there is a shard
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def append(self, row: Row) -> None:
        """Raises `ValueError`, `TypeError`, `AttributeError` or `OverflowError` where a value is
        none that `xrai` writes.
        """
        number, path = len(self._paths), row.path
        if self._is_sorted and number and path <= self._last:
            self._is_sorted = False
        self._last = path
        self._append_label(row)
        self._append_hash(row.sha256)
        self._paths.append(path)
        self._patients.append(path, row.patient)
        self._subtypes.append(row.subtype)
        self._splits.append(row.split)
        self._append_place(row, number)
        if row.reason:
            self._reasons[number] = row.reason

    def _append_label(self, row: Row) -> None:
        if isinstance(row.label, tuple):
            if len(row.label) != len(self._labels.classes):
                raise ValueError(f"{row.label} has another number of findings")
            self._label_values.extend(row.label)
        else:
            self._label_values.append(row.label)

    def _append_hash(self, sha256: str) -> None:
        """Nothing is kept until there is a hash: of a listing there is none."""
        if sha256:
            digest = bytes.fromhex(sha256)
            if digest.hex() != sha256 or len(digest) != HASH_BYTES:
                raise ValueError(f"{sha256!r} is no SHA-256")
            num_missing = len(self._is_hashed) * HASH_BYTES - len(self._sha256)
            self._sha256 += bytes(num_missing)
            self._sha256 += digest
        self._is_hashed.append(bool(sha256))

    def _append_place(self, row: Row, number: int) -> None:
        if not self._places and row.shard is None and row.row is None:
            return
        if not self._places:
            self._shards.extend("", number)
            self._places.extend([-1] * number)
        self._shards.append(row.shard or "")
        self._places.append(-1 if row.row is None else row.row)

    def finish(self) -> Rows:
        """All rows; nothing can be appended afterwards."""
        num, paths = len(self._paths), self._paths.finish()
        values = np.frombuffer(self._label_values, self._labels.empty(0).dtype)
        rows = Rows.unread(
            paths,
            values.reshape(self._labels.empty(num).shape),
            self._patients.finish(paths, is_sorted=self._is_sorted),
            self._subtypes.finish(),
            self._splits.finish(),
        ).with_(reasons=self._reasons)
        if self._sha256:
            self._sha256 += bytes(num * HASH_BYTES - len(self._sha256))
            sha256 = np.frombuffer(self._sha256, np.uint8).reshape(num, HASH_BYTES)
            rows = rows.with_(sha256=sha256, is_hashed=np.frombuffer(self._is_hashed, np.bool_))
        if self._places:
            places = np.frombuffer(self._places, np.int32)
            rows = rows.with_(shards=self._shards.finish(), places=places)
        return rows


def _has_findings(labels: LabelSpec) -> bool:
    return labels.task == "multilabel"


class NamesBuilder:
    """Makes `Names` of one row's name after the other."""

    def __init__(self) -> None:
        self._codes, self._values = array("i"), dict[str, int]()

    def append(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is no text")
        self._codes.append(self._values.setdefault(name, len(self._values)))

    def extend(self, name: str, times: int) -> None:
        self._codes.extend([self._values.setdefault(name, len(self._values))] * times)

    def finish(self) -> Names:
        dtype = np.min_scalar_type(max(len(self._values) - 1, 0))
        return Names(np.frombuffer(self._codes, np.int32).astype(dtype), (*self._values,))


class PatientsBuilder:
    """Makes `Patients` of one row's path and key after the other."""

    def __init__(self) -> None:
        self._codes, self._keys = array("i"), TextsBuilder()
        self._recent: dict[str, int] = {}  # most patients have their images one after the other
        self._heads: dict[str, int] = {}
        self._skipped: str | None = None
        self._is_doubtful = False  # whether a key of `_keys` may be that of another row's path

    def append(self, path: str, key: str) -> None:
        code = self._recent.get(key)
        if code is None:
            head, mark, rest = key.partition(OWN_PATIENT)
            # As of `xrai.ingest.layout.file_patient`; ":" stands in no group
            is_own = mark and (not head or head.find(":") == len(head) - 1)
            code = self._follows(path, head + mark, rest) if is_own else None
        if code is None:
            code = len(self._keys)
            self._keys.append(key)
            if len(self._recent) == _MAX_RECENT:
                self._recent.clear()
            self._recent[key] = code
        self._codes.append(code)

    def _follows(self, path: str, head: str, rest: str) -> int | None:
        """The code of a key that is a head and the end of the path; None if this one is not.

        A head ends with the first "file:", so keys with different heads are different, and so are
        those of different paths without the same folders.
        """
        if rest and path.endswith(rest):
            skipped = path[: len(path) - len(rest)]
            if self._skipped is None:
                self._skipped = skipped
            if skipped == self._skipped and (head in self._heads or len(self._heads) < _MAX_HEADS):
                return -1 - self._heads.setdefault(head, len(self._heads))
        self._is_doubtful = True
        return None

    def finish(self, paths: Texts, *, is_sorted: bool) -> Patients:
        """`is_sorted` says that no path is there twice."""
        codes = np.frombuffer(self._codes, np.int32).copy()
        heads, skipped = (*self._heads,), self._skipped or ""
        if heads and (self._is_doubtful or not is_sorted):
            for place in np.flatnonzero(codes < 0).tolist():
                key = heads[-1 - int(codes[place])] + paths[place][len(skipped) :]
                codes[place] = len(self._keys)
                self._keys.append(key)
            heads = ()
        return _without_repeats(Patients(codes, self._keys.finish(), heads, skipped))


def _without_repeats(patients: Patients) -> Patients:
    """The same patients, each key once."""
    keys = patients.keys
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    is_alike = np.zeros(len(keys), np.bool_)
    is_alike[1:] = hashes[1:] == hashes[:-1]
    is_alike[:-1] |= hashes[1:] == hashes[:-1]
    some = order[is_alike]
    if not len(some):
        return patients
    first = np.arange(len(keys))
    del order, is_alike
    found: dict[str, int] = {}
    last = None
    for place in some.tolist():  # those of the same hash, one after the other
        key = keys[place]
        if (own := hash(key)) != last:
            found, last = {}, own
        first[place] = found.setdefault(key, place)
    is_first = first == np.arange(len(keys))
    new = (np.cumsum(is_first) - 1)[first]
    codes = np.where(patients.codes < 0, patients.codes, new[patients.codes]).astype(np.int32)
    return replace(patients, codes=codes, keys=keys.take(np.flatnonzero(is_first)))
