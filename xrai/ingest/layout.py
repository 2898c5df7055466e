"""From paths to data files: the layout of folders, and the file names of the public data set."""

import hashlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from xrai.dataset.manifest import CLASSES
from xrai.dataset.shards import SPLITS
from xrai.errors import SourceError

# As file names and tables write them -> as the manifest keeps them
SUBTYPES: Final = {"bacteria": "bacterial", "virus": "viral"}

_LAYOUT = "[chest_xray/]{train,val,test}/{NORMAL,PNEUMONIA}/* or {NORMAL,PNEUMONIA}/*"
# IM-0115-0001.jpeg, NORMAL2-IM-0416-0001-0002.jpeg, person1000_bacteria_2931.jpeg,
# person1_virus_7_1.jpeg
_PUBLIC_NAME = re.compile(
    r"(?P<prefix>phantom-)?"
    r"(?:(?:(?P<normal>NORMAL2)-)?IM-(?P<film>\d+)(?:-\d+)+"
    r"|person(?P<person>\d+)_(?P<germ>bacteria|virus)(?:_\d+)+)"
    r"\.\w+"
)
_OWN = "file:"  # in the key of a patient known only by one file


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
    not_data: dict[str, int]  # description of skipped files -> how many

    def describe_not_data(self) -> str:
        """In words; empty where nothing was skipped."""
        parts = ", ".join(f"{count} {words}" for words, count in sorted(self.not_data.items()))
        return f"{sum(self.not_data.values())} files are not data: {parts}" if parts else ""


def lay_out(paths: Iterable[str], *, source: str) -> Layout:
    """Find the data files among a source's paths; `source` names it in messages.

    Accepted: split and class folders in any case; class folders alone (all of it train); either
    below further folders; a second copy of the same tree inside the first, as in the public
    archive. Hidden files, `__MACOSX`, `Thumbs.db`, `desktop.ini` and files outside of class folders
    are counted, but are not data.

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
        others = f"it holds {len(outside)} other files, such as {outside[0]}" if outside else ""
        raise SourceError(
            f"{source} holds no images laid out as {_LAYOUT}; {others or 'it is empty'}"
        )
    has_splits = _check_folders(
        [place for tree in trees.values() for place in tree], outside, source=source
    )
    top, *nested = sorted(trees, key=lambda above: (above.count("/"), above))
    inside = {place.below for place in trees[top]} if nested else set()
    for above in nested:
        copies = {place.below for place in trees[above]}
        if not above.startswith(top) or not inside.issuperset(copies):
            raise SourceError(
                f"{source} holds several trees of images, in {top or 'its top folder'!r} and "
                f"{above!r}; give one of them as --source"
            )
        not_data["in a second copy of the tree"] += len(trees[above])
    if outside:
        not_data["outside of the class folders"] += len(outside)
    patients: dict[str, str] = {}  # each key once in memory
    entries = tuple(_entry(place, patients) for place in trees[top])
    return Layout(entries, has_splits, dict(not_data))


def parse_name(name: str) -> tuple[str, str]:
    """Patient key and subtype that a public (or phantom) file name states, else empty strings.

    A key is a stream and a number in it: `person78` of bacteria and of virus are two people.
    """
    match = _PUBLIC_NAME.fullmatch(name)
    if match is None:
        return "", ""
    prefix, germ = match["prefix"] or "", match["germ"]
    if germ:
        return f"{prefix}{germ}:{match['person']}", SUBTYPES[germ]
    return f"{prefix}{match['normal'] or 'IM'}:{match['film']}", ""


def file_patient(path: str, *, group: str = "") -> str:
    """The key for a file whose patient is unknown: each such file counts as its own patient."""
    return f"{group}:{_OWN}{path}" if group else f"{_OWN}{path}"


def hashed_patient(identifier: str, *, group: str) -> str:
    """The key of a patient whom a table or a header names: always the same, without the name."""
    return f"{group}:{hashlib.sha256(identifier.encode()).hexdigest()[:16]}"


def is_file_patient(patient: str) -> bool:
    """Whether a key is one of `file_patient`."""
    return patient.startswith(_OWN) or patient.partition(":")[2].startswith(_OWN)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file is. Strings other than `path` are interned: a large source repeats them."""

    path: str
    above: str  # "" or "chest_xray/"
    split: str  # "" where there is no split folder
    class_folder: str  # as it is written

    @property
    def below(self) -> str:
        """The path from the split or class folder on: "train/NORMAL/IM-0115-0001.jpeg"."""
        return self.path.removeprefix(self.above)


def _find_place(path: str) -> _Place | None:
    """None where a path has neither a split nor a class folder."""
    folders = path.split("/")[:-1]
    for k, folder in enumerate(folders[:-1]):
        if folder.lower() in SPLITS:
            return _place(path, folders[:k], folder.lower(), folders[k + 1])
    for k, folder in enumerate(folders):
        if folder.upper() in CLASSES:
            return _place(path, folders[:k], "", folder)
    return None


def _place(path: str, above: Sequence[str], split: str, class_folder: str) -> _Place:
    top = "".join(f"{part}/" for part in above)
    return _Place(path, sys.intern(top), sys.intern(split), sys.intern(class_folder))


def _check_folders(places: Sequence[_Place], outside: Sequence[str], *, source: str) -> bool:
    """Whether there are split folders. Raises `SourceError` for an unknown class folder."""
    has_splits = any(place.split for place in places)
    folders = [(place.class_folder, place.path) for place in places]
    if not has_splits:  # then every folder beside the class folders is meant as a class
        for top in sorted({place.above for place in places}):
            rest = [path[len(top) :] for path in outside if path.startswith(top)]
            folders += [(path.split("/")[0], top + path) for path in rest if "/" in path]
    for folder, path in folders:
        if folder.upper() not in CLASSES:
            raise SourceError(
                f"unknown class folder {folder!r} in {source} ({path}); "
                f"allowed are {' and '.join(CLASSES)}"
            )
    for place in places:
        if has_splits and not place.split:
            raise SourceError(
                f"{source} has split folders, but {place.path} is in none; the layout is {_LAYOUT}"
            )
    return has_splits


def _junk(path: str) -> str:
    *folders, name = path.split("/")
    if any(folder.lower() == "__macosx" for folder in folders):
        return "in __MACOSX"
    if name.startswith(".") or any(folder.startswith(".") for folder in folders):
        return "hidden (names that begin with a dot)"
    return "Thumbs.db or desktop.ini" if name.lower() in ("thumbs.db", "desktop.ini") else ""


def _entry(place: _Place, patients: dict[str, str]) -> Entry:
    label = CLASSES.index(place.class_folder.upper())
    patient, subtype = parse_name(place.path.rpartition("/")[2])
    return Entry(
        path=place.path,
        split=place.split or "train",
        label=label,
        patient=patients.setdefault(patient, patient) if patient else file_patient(place.below),
        subtype=subtype if CLASSES[label] == "PNEUMONIA" else "",
    )
