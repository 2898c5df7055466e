"""One row a source file: what it shows, whose it is, where it went, or why it was set aside.

Also the rules that turn paths into rows: the layout of folders, and the file names of the public
data set. Everything here is pure; `xrai.ingest.plan` and `xrai.verify` use it.
"""

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from xrai.dataset.shards import SPLITS
from xrai.errors import CorruptError, SourceError

CLASSES: Final = ("NORMAL", "PNEUMONIA")  # a label is a position in this tuple
SUBTYPES: Final = {
    "bacteria": "bacterial",
    "virus": "viral",
}  # as file names and tables write them -> as it is kept

_LAYOUT = "[chest_xray/]{train,val,test}/{NORMAL,PNEUMONIA}/* or {NORMAL,PNEUMONIA}/*"
_JUNK_FOLDERS = frozenset({"__macosx"})
_JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
# IM-0115-0001.jpeg, NORMAL2-IM-0416-0001-0002.jpeg, person1000_bacteria_2931.jpeg,
# person1_virus_7_1.jpeg
_PUBLIC_NAME = re.compile(
    r"(?P<prefix>phantom-)?"
    r"(?:(?:(?P<normal>NORMAL2)-)?IM-(?P<film>\d+)(?:-\d+)+|person(?P<person>\d+)_(?P<germ>bacteria|virus)(?:_\d+)+)"
    r"\.\w+"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One source file."""

    path: str  # in the source, forward slashes
    sha256: str  # hex; "" where the file could not be read
    label: int  # position in the data set's classes
    patient: str  # "IM:0115", "bacteria:1000", "dicom:" and a hash, or "file:…" where nothing says who; group first
    subtype: str  # "bacterial", "viral" or ""
    split: str  # "" where the file was set aside before it had one
    shard: str | None = None  # name of the shard that holds it, None if set aside
    row: int | None = None  # position in that shard
    reason: str = ""  # why it was set aside

    def to_mapping(self) -> dict[str, str | int | None]:
        """Names and values of the fields, as `dataclasses.asdict` gives them, in a tenth of its
        time.
        """
        return {name: getattr(self, name) for name in self.__slots__}


def manifest_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    """The lines of `manifest.jsonl`, each with its end: JSON, one a row. All of them take 280
    bytes a row.
    """
    for row in rows:
        yield json.dumps(row.to_mapping()).encode() + b"\n"


def read_manifest(data: bytes, *, where: str) -> list[Row]:
    """Read `manifest.jsonl` back. Raises `CorruptError` naming the line when it is not what was
    written.
    """
    return list(parse_manifest(data.splitlines(), where=where))


def parse_manifest(lines: Iterable[bytes], *, where: str) -> Iterator[Row]:
    """The rows of lines of `manifest.jsonl`, one at a time: all of them take 700 bytes each.
    Raises `CorruptError`.
    """
    for number, line in enumerate(lines, start=1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise CorruptError(
                f"{where}, line {number}, is not a row of a manifest: {error}"
            ) from error
        yield row


# ------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True, slots=True)
class Entry:
    """A data file as its path describes it."""

    path: str
    split: str  # the split that the source gives; "train" where it has no split folders
    label: int
    patient: str
    subtype: str


@dataclass(frozen=True)
class Layout:
    """What a source's paths say."""

    entries: tuple[Entry, ...]  # sorted by path
    has_splits: bool  # the source has split folders
    not_data: dict[str, int]  # what was passed over, in words -> number of files

    def describe_not_data(self) -> str:
        """In words; empty where nothing was passed over."""
        parts = ", ".join(f"{count} {words}" for words, count in sorted(self.not_data.items()))
        return f"{sum(self.not_data.values())} files are not data: {parts}" if parts else ""


def lay_out(paths: Iterable[str], *, source: str) -> Layout:
    """Find the data files among a source's paths; `source` names it in messages.

    Known: split and class folders, whatever their case; class folders alone (all of it train);
    either below further folders; a second copy of the same tree inside the first, as in the public
    archive. Hidden files, `__MACOSX`, `Thumbs.db`, `desktop.ini` and files outside of class folders
    are not data; they are counted.

    Raises `SourceError` when there is no data file, a class folder is unknown, or there are several
    trees.
    """
    not_data: Counter[str] = Counter()
    trees: dict[str, list[_Place]] = defaultdict(list)  # by the folder above
    outside = []
    for path in sorted(paths):
        if words := _junk(path):
            not_data[words] += 1
        elif place := _find_place(path):
            trees[place.above].append(place)
        else:
            outside.append(path)
    if not trees:
        raise SourceError(f"{source} holds no images laid out as {_LAYOUT}{_example(outside)}")
    has_splits = _check_folders(
        [place for tree in trees.values() for place in tree], outside, source=source
    )
    top, *others = sorted(trees, key=lambda above: (above.count("/"), above))
    inside = {place.below for place in trees[top]} if others else set()
    for above in others:
        if not above.startswith(top) or not inside.issuperset(
            place.below for place in trees[above]
        ):
            raise SourceError(
                f"{source} holds several trees of images, in {top or 'its top folder'!r} and {above!r}; "
                f"give one of them as --source"
            )
        not_data["in a second copy of the tree"] += len(trees[above])
    if outside:
        not_data["outside of the class folders"] += len(outside)
    patients: dict[str, str] = {}  # each key, held once for all files
    return Layout(
        tuple(_entry(place, patients) for place in trees[top]), has_splits, dict(not_data)
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file stands. Its strings but for `path` are held once for all files."""

    path: str
    above: str  # "" or "chest_xray/"
    split: str  # "" where there is no split folder
    class_folder: str  # as it is written

    @property
    def below(self) -> str:
        """The rest of the path, which begins with the split or class folder:
        "train/NORMAL/IM-0115-0001.jpeg".
        """
        return self.path.removeprefix(self.above)


def _find_place(path: str) -> _Place | None:
    """None where a path has neither a split nor a class folder."""
    parts = path.split("/")
    folders = parts[:-1]
    for k, folder in enumerate(folders[:-1]):
        if folder.lower() in SPLITS:
            return _place(path, parts[:k], folder.lower(), parts[k + 1])
    for k, folder in enumerate(folders):
        if folder.upper() in CLASSES:
            return _place(path, parts[:k], "", folder)
    return None


def _place(path: str, above: Sequence[str], split: str, class_folder: str) -> _Place:
    return _Place(
        path,
        sys.intern("".join(f"{part}/" for part in above)),
        sys.intern(split),
        sys.intern(class_folder),
    )


def _check_folders(places: Sequence[_Place], outside: Sequence[str], *, source: str) -> bool:
    """Whether there are split folders. Raises `SourceError` for a class folder that is not
    known.
    """
    has_splits = any(place.split for place in places)
    folders = [(place.class_folder, place.path) for place in places]
    if not has_splits:  # then every folder beside the class folders means to be a class
        tops = {place.above for place in places}
        folders += [
            (path[len(top) :].split("/")[0], path)
            for path in outside
            for top in tops
            if _is_deep(path, top)
        ]
    for folder, path in folders:
        if folder.upper() not in CLASSES:
            raise SourceError(
                f"unknown class folder {folder!r} in {source} ({path}); allowed are {' and '.join(CLASSES)}"
            )
    for place in places:
        if has_splits and not place.split:
            raise SourceError(
                f"{source} has split folders, but {place.path} is in none; the layout is {_LAYOUT}"
            )
    return has_splits


def _is_deep(path: str, top: str) -> bool:
    """Whether a path lies in a folder inside `top`, not in `top` itself."""
    return path.startswith(top) and "/" in path[len(top) :]


def _junk(path: str) -> str:
    *folders, name = path.split("/")
    if any(folder.lower() in _JUNK_FOLDERS for folder in folders):
        return "in __MACOSX"
    if name.startswith(".") or any(folder.startswith(".") for folder in folders):
        return "hidden (names that begin with a dot)"
    return "Thumbs.db or desktop.ini" if name.lower() in _JUNK_FILES else ""


def _entry(place: _Place, patients: dict[str, str]) -> Entry:
    label = CLASSES.index(place.class_folder.upper())
    patient, subtype = parse_name(PurePosixPath(place.path).name)
    return Entry(
        path=place.path,
        split=place.split or "train",
        label=label,
        patient=patients.setdefault(patient, patient) if patient else file_patient(place.below),
        subtype=subtype if CLASSES[label] == "PNEUMONIA" else "",
    )


def parse_name(name: str) -> tuple[str, str]:
    """The patient key and subtype that a public (or phantom) file name states; empty where it is no
    such name.

    A key is a stream and a number in it: `person78` of bacteria and of virus are two people.
    """
    match = _PUBLIC_NAME.fullmatch(name)
    if match is None:
        return "", ""
    prefix, germ = match["prefix"] or "", match["germ"]
    if germ:
        return f"{prefix}{germ}:{match['person']}", SUBTYPES[germ]
    return f"{prefix}{match['normal'] or 'IM'}:{match['film']}", ""


_OWN = "file:"  # in the key of a patient who is known by nothing but one file


def file_patient(path: str, *, group: str = "") -> str:
    """The key of a patient of whom nothing is known: each such file counts as a patient of its
    own.
    """
    return f"{group}:{_OWN}{path}" if group else f"{_OWN}{path}"


def hashed_patient(identifier: str, *, group: str) -> str:
    """The key of a patient whom a table or a header names: the same wherever it is made, without
    the name.
    """
    return f"{group}:{hashlib.sha256(identifier.encode()).hexdigest()[:16]}"


def is_file_patient(patient: str) -> bool:
    """Whether a key is one of `file_patient`."""
    return patient.startswith(_OWN) or patient.partition(":")[2].startswith(_OWN)


def _example(outside: Sequence[str]) -> str:
    return (
        f"; it holds {len(outside)} other files, such as {outside[0]}"
        if outside
        else "; it is empty"
    )
