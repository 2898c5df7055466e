"""From paths to data files: the layout of folders, and the file names of the public data set."""

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
SPLIT_NAMES: Final = {name: name for name in SPLITS} | {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}

_LAYOUT = "[chest_xray/]{train,val,test}/{NORMAL,PNEUMONIA}/* or {NORMAL,PNEUMONIA}/*"
_TABLE = "a table (--labels FILE.csv) can say for any layout what each file is"
# Folders and files of these names are made from images and lie beside them. Synology: @eaDir
_DERIVED = re.compile(r"mask|thumb|segment|annotat|overlay|heat.?map|preview|@eadir", re.IGNORECASE)
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
    notes: tuple[str, ...] = ()  # what people should know, a sentence each

    def describe_not_data(self) -> str:
        """In words; empty where nothing was skipped."""
        parts = ", ".join(f"{count} {words}" for words, count in sorted(self.not_data.items()))
        return f"{sum(self.not_data.values())} files are not data: {parts}" if parts else ""


def lay_out(paths: Iterable[str], *, source: str) -> Layout:
    """Find the data files among a source's paths; `source` names it in messages.

    Accepted: split and class folders, one in the other, in any case; class folders alone (all of it
    train); either below further folders; a second copy of the same tree inside the first, as in the
    public archive. Hidden files, `__MACOSX`, `Thumbs.db`, `desktop.ini`, masks and thumbnails
    beside images, and files outside of class folders are counted, but are not data.

    Raises `SourceError` when there is no data file, a class folder is unknown or inside another, a
    split has two folders, or there are several trees.
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
            f"{source} holds no images laid out as {_LAYOUT}; {others or 'it is empty'}; {_TABLE}"
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
                f"{above!r}; call them train, val and test if they are splits, else give one of "
                f"them as --source; {_TABLE}"
            )
        not_data["in a second copy of the tree"] += len(trees[above])
    if outside:
        not_data["outside of the class folders"] += len(outside)
    images, notes = _without_derived(trees[top])
    if num_derived := len(trees[top]) - len(images):
        not_data["masks, thumbnails or the like"] += num_derived
    patients: dict[str, str] = {}  # each key once in memory
    entries = tuple(_entry(place, patients) for place in images)
    return Layout(entries, has_splits, dict(not_data), (*notes, *_note_folders(images)))


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


def is_file_patient(patient: str) -> bool:
    """Whether a key is one of `file_patient`."""
    return patient.startswith(_OWN) or patient.partition(":")[2].startswith(_OWN)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file is. Strings other than `path` are interned: a large source repeats them."""

    path: str
    above: str  # "" or "chest_xray/"
    split: str  # "" where there is no split folder
    folders: str  # of split and class, as they are written: "Train/NORMAL", "NORMAL/Train"
    class_folder: str
    inside: str  # the class folder: "" or "masks"

    @property
    def below(self) -> str:
        """The path from the split or class folder on: "train/NORMAL/IM-0115-0001.jpeg"."""
        return self.path.removeprefix(self.above)


def _find_place(path: str) -> _Place | None:
    """None where a path has neither a split nor a class folder."""
    *folders, _ = path.split("/")
    splits = [SPLIT_NAMES.get(folder.lower(), "") for folder in folders]
    for k, folder in enumerate(folders):
        if folder.upper() in CLASSES:
            if k and splits[k - 1]:
                return _place(path, folders, slice(k - 1, k + 1), splits[k - 1], folder)
            if k + 1 < len(folders) and splits[k + 1]:
                return _place(path, folders, slice(k, k + 2), splits[k + 1], folder)
            if not any(splits[:k]):
                return _place(path, folders, slice(k, k + 1), "", folder)
            break
    for k, split in enumerate(splits[:-1]):
        if split:  # with a folder inside that is no class
            return _place(path, folders, slice(k, k + 2), split, folders[k + 1])
    return None


def _place(path: str, folders: list[str], own: slice, split: str, class_folder: str) -> _Place:
    top = "".join(f"{folder}/" for folder in folders[: own.start])
    texts = (top, split, "/".join(folders[own]), class_folder, "/".join(folders[own.stop :]))
    return _Place(path, *map(sys.intern, texts))


def _check_folders(places: Sequence[_Place], outside: Sequence[str], *, source: str) -> bool:
    """Whether there are split folders. Raises `SourceError` for an unknown class folder."""
    has_splits = any(place.split for place in places)
    folders = [(place.class_folder, place.path) for place in places]
    if not has_splits:  # then every folder beside the class folders is meant as a class
        for top in sorted({place.above for place in places}):
            rest = [path[len(top) :] for path in outside if path.startswith(top)]
            folders += [
                (path.split("/")[0], top + path)
                for path in rest
                if "/" in path and not _DERIVED.search(path.split("/")[0])
            ]
    for folder, path in folders:
        if folder.upper() not in CLASSES:
            raise SourceError(
                f"unknown class folder {folder!r} in {source} ({path}); allowed are "
                f"{' and '.join(CLASSES)}, directly in a split folder if there are any; {_TABLE}"
            )
    names: dict[str, str] = {}
    for place in places:
        if has_splits and not place.split:
            raise SourceError(
                f"{source} has split folders, but {place.path} is in none; split folders are "
                f"called {', '.join(SPLIT_NAMES)}, and the layout is {_LAYOUT}; {_TABLE}"
            )
        if place.inside and any(part.upper() in CLASSES for part in place.inside.split("/")):
            raise SourceError(
                f"a class folder is inside another in {source} ({place.path}): move its images to "
                f"one of them; {_TABLE}"
            )
        if place.split:
            folders_of_split = place.folders.lower().split("/")
            (name,) = (folder for folder in folders_of_split if folder in SPLIT_NAMES)
            if names.setdefault(place.split, name) != name:
                raise SourceError(
                    f"{source} has two folders for the split {place.split}, "
                    f"{names[place.split]!r} and {name!r}; leave one; {_TABLE}"
                )
    return has_splits


def _without_derived(places: Sequence[_Place]) -> tuple[Sequence[_Place], list[str]]:
    """Leave out masks, thumbnails and the like that lie beside images, with a note.

    They are known by a folder inside the class folder, or by a name such as `a_mask.png` beside
    `a.png`. Where there is nothing else, they are the images.
    """
    suspects = [place for place in places if _DERIVED.search(place.inside)]
    named = [place for place in places if _DERIVED.search(place.path.rpartition("/")[2])]
    if named:
        stems = {place.path.rpartition(".")[0] for place in places}
        for place in named:
            stem = place.path.rpartition(".")[0]
            cuts = (match.start() for match in re.finditer(r"[ _.-]", stem))
            if any(stem[:cut] in stems for cut in cuts):
                suspects.append(place)
    derived = {place.path for place in suspects}
    if not 0 < len(derived) < len(places):
        return places, []
    note = (
        f"{len(derived)} files are left out, because their folders or names are those of masks, "
        f"thumbnails or the like, such as {min(derived)}; a table (--labels FILE.csv) that names "
        "them takes them in"
    )
    return [place for place in places if place.path not in derived], [note]


def _note_folders(places: Iterable[_Place]) -> list[str]:
    """A note where class folders hold several folders alike, such as images and crops of them.

    Folders of the same name in several places are kinds of images; others are patients. Numbers do
    not count: `study1` and `study2` are one kind.
    """
    counts = Counter((place.folders, place.inside) for place in places)
    parents: dict[str, set[str]] = defaultdict(set)  # by the name of the folder that holds images
    num_images: Counter[str] = Counter()
    for (folders, inside), count in counts.items():
        parent, _, name = f"{folders}/{inside}".rpartition("/")
        kind = re.sub(r"\d+", "", name).strip(" ._-").lower()
        if kind or not inside:
            parents[kind].add(parent)
            num_images[kind] += count
    with_folders = {folders for folders, inside in counts if inside}
    is_mixed = any(not inside and folders in with_folders for folders, inside in counts)
    kinds = [kind for kind, above in parents.items() if kind and (is_mixed or len(above) > 1)]
    if len(kinds) < 2 and not is_mixed:
        return []
    shown = [f"{num_images['']} directly"] if is_mixed else []
    shown += [f"{num_images[kind]} in {kind!r}" for kind in sorted(kinds)[:5]]
    return [
        f"the class folders hold images in several folders ({', '.join(shown)}), and all of them "
        "are used: if some are crops or copies of others, move those away, or name the files to "
        "use in a table (--labels FILE.csv)"
    ]


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
