"""From paths to data files: the layout of folders, and the file names of the public data set."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from xrai.dataset.manifest import CLASSES
from xrai.dataset.shards import SPLITS
from xrai.errors import SourceError
from xrai.labels import Label, LabelSpec

BINARY: Final = LabelSpec("binary", CLASSES)  # the public set's classes
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
    label: Label  # entries with the same findings share one tuple
    patient: str
    subtype: str


@dataclass(frozen=True)
class Layout:
    """What a source's paths say."""

    entries: tuple[Entry, ...]  # sorted by path
    not_data: dict[str, int]  # description of skipped files -> how many
    notes: tuple[str, ...] = ()  # what people should know, a sentence each
    labels: LabelSpec = BINARY  # what the entries' labels mean

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
    folders: dict[str, _Folder | str] = {}
    trees: dict[str, list[tuple[str, _Folder]]] = defaultdict(list)  # by the folder above
    outside = []
    for path in sorted(paths):
        above, _, name = path.rpartition("/")
        if above not in folders:
            folders[above] = _describe(above)
        folder = folders[above]
        if words := (folder if isinstance(folder, str) else "") or _junk(name):
            not_data[words] += 1
        elif isinstance(folder, str):
            outside.append(path)
        else:
            trees[folder.above].append((path, folder))
    if not trees:
        others = f"it holds {len(outside)} other files, such as {outside[0]}" if outside else ""
        raise SourceError(
            f"{source} holds no images laid out as {_LAYOUT}; {others or 'it is empty'}; {_TABLE}"
        )
    _check_folders({folder for tree in trees.values() for _, folder in tree}, outside, source)
    top, *nested = sorted(trees, key=lambda above: (above.count("/"), above))
    inside = {path.removeprefix(top) for path, _ in trees[top]} if nested else set()
    for above in nested:
        copies = {path.removeprefix(above) for path, _ in trees[above]}
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
    entries = tuple(_entry(path, folder, patients) for path, folder in images)
    return Layout(entries, dict(not_data), (*notes, *_note_folders(images)))


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


@dataclass(frozen=True, slots=True, eq=False)
class _Folder:
    """A folder of images, as its path describes it."""

    path: str
    above: str  # "" or "chest_xray/"
    split: str  # "" where there is no split folder
    own: str  # split and class folder, as they are written: "Train/NORMAL", "NORMAL/Train"
    class_folder: str
    inside: str  # the class folder: "" or "masks"


def _describe(path: str) -> _Folder | str:
    """A folder; for one of no images, what its files are, "" where it only is no class folder."""
    folders = path.split("/") if path else []
    if any(folder.lower() == "__macosx" for folder in folders):
        return "in __MACOSX"
    if words := next(filter(None, map(_junk, folders)), ""):
        return words
    splits = [SPLIT_NAMES.get(folder.lower(), "") for folder in folders]

    def described(own: slice, split: str, class_folder: str) -> _Folder:
        above = "".join(f"{folder}/" for folder in folders[: own.start])
        inside = "/".join(folders[own.stop :])
        return _Folder(path, above, split, "/".join(folders[own]), class_folder, inside)

    for k, folder in enumerate(folders):
        if folder.upper() in CLASSES:
            if k and splits[k - 1]:
                return described(slice(k - 1, k + 1), splits[k - 1], folder)
            if k + 1 < len(folders) and splits[k + 1]:
                return described(slice(k, k + 2), splits[k + 1], folder)
            if not any(splits[:k]):
                return described(slice(k, k + 1), "", folder)
            break
    for k, split in enumerate(splits[:-1]):
        if split:  # with a folder inside that is no class
            return described(slice(k, k + 2), split, folders[k + 1])
    return ""


def _check_folders(found: Collection[_Folder], outside: Sequence[str], source: str) -> None:
    has_splits = any(folder.split for folder in found)
    folders = sorted(found, key=lambda folder: folder.path)
    classes = [(folder.class_folder, folder.path) for folder in folders]
    if not has_splits:  # then every folder beside the class folders is meant as a class
        for top in sorted({folder.above for folder in folders}):
            rest = (path[len(top) :].split("/") for path in outside if path.startswith(top))
            names = {parts[0] for parts in rest if len(parts) > 1}
            classes += [(name, top + name) for name in sorted(names) if not _DERIVED.search(name)]
    for name, path in classes:
        if name.upper() not in CLASSES:
            raise SourceError(
                f"unknown class folder {name!r} in {source} ({path}/); allowed are "
                f"{' and '.join(CLASSES)}, directly in a split folder if there are any; {_TABLE}"
            )
    names_of: dict[str, str] = {}
    for folder in folders:
        if has_splits and not folder.split:
            raise SourceError(
                f"{source} has split folders, but {folder.path}/ is in none; split folders are "
                f"called {', '.join(SPLIT_NAMES)}, and the layout is {_LAYOUT}; {_TABLE}"
            )
        if any(name.upper() in CLASSES for name in folder.inside.split("/")):
            raise SourceError(
                f"a class folder is inside another in {source} ({folder.path}/): move its images "
                f"to one of them; {_TABLE}"
            )
        if folder.split:
            (name,) = (part for part in folder.own.lower().split("/") if part in SPLIT_NAMES)
            if (other := names_of.setdefault(folder.split, name)) != name:
                raise SourceError(
                    f"{source} has two folders for the split {folder.split}, {other!r} and "
                    f"{name!r}; leave one; {_TABLE}"
                )


def _without_derived(
    files: Sequence[tuple[str, _Folder]],
) -> tuple[Sequence[tuple[str, _Folder]], list[str]]:
    """Leave out masks, thumbnails and the like that lie beside images, with a note.

    They are known by a folder inside the class folder, or by a name such as `a_mask.png` beside
    `a.png`. Where there is nothing else, they are the images.
    """
    folders = {folder for _, folder in files}
    bad = {folder for folder in folders if _DERIVED.search(folder.inside)}
    derived = {path for path, folder in files if folder in bad}
    named = [path for path, _ in files if _DERIVED.search(path, path.rfind("/") + 1)]
    stems = {path.rpartition(".")[0] for path, _ in files} if named else set()
    for path in named:
        stem = path.rpartition(".")[0]
        if any(stem[: match.start()] in stems for match in re.finditer(r"[ _.-]", stem)):
            derived.add(path)
    if not 0 < len(derived) < len(files):
        return files, []
    note = (
        f"{len(derived)} files are left out, because their folders or names are those of masks, "
        f"thumbnails or the like, such as {min(derived)}; a table (--labels FILE.csv) that names "
        "them takes them in"
    )
    return [file for file in files if file[0] not in derived], [note]


def _note_folders(files: Iterable[tuple[str, _Folder]]) -> list[str]:
    """A note where class folders hold several folders alike, such as images and crops of them.

    Folders of the same name in several places are kinds of images; others are patients. Numbers do
    not count: `study1` and `study2` are one kind.
    """
    counts = Counter(folder for _, folder in files)
    parents: dict[str, set[str]] = defaultdict(set)  # by the name of the folder that holds images
    num_images: Counter[str] = Counter()
    for folder, count in counts.items():
        parent, _, name = f"{folder.own}/{folder.inside}".rpartition("/")
        kind = re.sub(r"\d+", "", name).strip(" ._-").lower()
        if kind or not folder.inside:
            parents[kind].add(parent)
            num_images[kind] += count
    with_folders = {folder.own for folder in counts if folder.inside}
    is_mixed = any(not folder.inside and folder.own in with_folders for folder in counts)
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


def _junk(name: str) -> str:
    if name.startswith("."):
        return "hidden (names that begin with a dot)"
    return "Thumbs.db or desktop.ini" if name.lower() in ("thumbs.db", "desktop.ini") else ""


def _entry(path: str, folder: _Folder, patients: dict[str, str]) -> Entry:
    label = CLASSES.index(folder.class_folder.upper())
    patient, subtype = parse_name(path.rpartition("/")[2])
    return Entry(
        path=path,
        split=folder.split or "train",
        label=label,
        patient=patients.setdefault(patient, patient)
        if patient
        else file_patient(path.removeprefix(folder.above)),
        subtype=subtype if CLASSES[label] == "PNEUMONIA" else "",
    )
