"""From paths to data files: the layout of folders, and the file names of the public data set."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from xrai.config import Labels
from xrai.dataset.manifest import Row
from xrai.dataset.rows import Rows
from xrai.errors import SourceError
from xrai.ingest.classes import NAME_CLASSES, Found, explain_classes, make_spec, places_of
from xrai.ingest.folders import DERIVED, SPLIT_NAMES, ClassFolders, Folder, holds_images
from xrai.labels import CLASSES, Label, LabelSpec, folded
from xrai.log import counted

BINARY: Final = LabelSpec("binary", CLASSES)  # the public set's classes
# As file names and tables write them -> as the manifest keeps them
SUBTYPES: Final = {"bacteria": "bacterial", "virus": "viral"}

_LAYOUT = "[chest_xray/]{train,val,test}/{NORMAL,PNEUMONIA,…}/* or {NORMAL,PNEUMONIA,…}/*"
_TABLE = "a table (--labels FILE.csv) can say for any layout what each file is"
_DEFAULTS = Labels()
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
    facts: tuple[str, ...] = ()  # as the notes, where nothing is doubtful

    @cached_property
    def rows(self) -> Rows:
        """The entries as rows whose hashes are not known yet."""
        return Rows.of(map(_row_of, self.entries), self.labels)

    def describe_not_data(self) -> str:
        """In words; empty where nothing was skipped."""
        parts = ", ".join(f"{count} {words}" for words, count in sorted(self.not_data.items()))
        words = counted(sum(self.not_data.values()), "file", "are")
        return f"{words} not data: {parts}" if parts else ""


def lay_out(paths: Iterable[str], *, source: str, config: Labels = _DEFAULTS) -> Layout:
    """Find the data files among a source's paths; `source` names it in messages.

    Accepted: split and class folders, one in the other, in any case; class folders alone (all of it
    train); either below further folders; a second copy of the same tree inside the first, as in the
    public archive. Hidden files, `__MACOSX`, `Thumbs.db`, `desktop.ini`, masks and thumbnails
    beside images, and files outside of class folders are counted, but are not data.

    Raises `SourceError` when there is no data file, a class folder is inside another or doubtful
    (`make_spec`), a split has two folders, or there are several trees.
    """
    not_data: Counter[str] = Counter()
    names: dict[str, list[str]] = defaultdict(list)  # by the folder above
    for path in sorted(paths):
        above, _, name = path.rpartition("/")
        if words := _junk_above(above) or _junk(name):
            not_data[words] += 1
        else:
            names[above].append(name)
    classes = ClassFolders([above for above, own in names.items() if holds_images(own)])
    trees: dict[str, list[tuple[str, Folder]]] = defaultdict(list)  # by the folder above
    outside: list[str] = []
    for above, own in names.items():
        folder = classes.describe(above)
        files = [f"{above}/{name}" if above else name for name in own]
        if folder is None:
            outside += files
        else:
            trees[folder.above] += [(path, folder) for path in files]
    if not trees:
        others = (
            f"it holds {counted(len(outside), 'other file')}, such as {min(outside)}"
            if outside
            else ""
        )
        raise SourceError(
            f"{source} holds no images laid out as {_LAYOUT}, with two classes at least; "
            f"{others or 'it is empty'}; {_TABLE}"
        )
    _check_folders({folder for tree in trees.values() for _, folder in tree}, source)
    own_tree, copies = _without_copies(trees, source)
    if copies:
        not_data["in a second copy of the tree"] = copies
    if outside:
        not_data["outside of the class folders"] += len(outside)
    images, notes = _without_derived(own_tree)
    if num_derived := len(own_tree) - len(images):
        not_data["masks, thumbnails or the like"] += num_derived
    found = _found_classes(images)
    spec = make_spec(found, config, where=source)
    told = () if spec.is_public else (explain_classes(found, spec),)
    if not config.names:
        notes += [f"{each}: {NAME_CLASSES}" for each in told]
    places = places_of(spec)
    patients: dict[str, str] = {}  # each key once in memory
    entries = tuple(_entry(path, folder, places, patients) for path, folder in images)
    notes += _note_folders(images)
    facts = told if config.names else ()
    layout = Layout(entries, dict(not_data), tuple(notes), spec, facts)
    return by_target(layout, config, source=source)


def by_target(layout: Layout, config: Labels, *, source: str) -> Layout:
    """The layout with the labels that `labels.target` asks for: of two classes the second one is
    divided into its subtypes, in capitals and by name, as in NORMAL, BACTERIAL, VIRAL.

    Raises `SourceError` where there are not two classes, or an image of the second has no subtype.
    """
    if config.target == "label":
        return layout
    if layout.labels.task != "binary":
        noun = "finding" if layout.labels.task == "multilabel" else "class"
        num = counted(len(layout.labels.classes), noun)
        raise SourceError(
            f"labels.target = subtype takes two classes with subtypes of the second; {source} has "
            f"{num}: {', '.join(layout.labels.classes)}"
        )
    negative, positive = layout.labels.classes
    lacking = [entry.path for entry in layout.entries if entry.label and not entry.subtype]
    if lacking:
        raise SourceError(
            f"labels.target = subtype, but {counted(len(lacking), f'{positive} image')} of "
            f"{source} without one, such as {lacking[0]}: it stands in file names as of the public "
            "set (person1_virus_7.jpeg) or in the column subtype of a table (--labels FILE.csv)"
        )
    subtypes = sorted({entry.subtype for entry in layout.entries if entry.label})
    spec = LabelSpec("multiclass", (negative, *(subtype.upper() for subtype in subtypes)))
    if len(spec.classes) < 3:
        raise SourceError(
            f"labels.target = subtype, but all {positive} images of {source} are of one subtype, "
            f"{''.join(subtypes)!r}: it takes two or more"
        )
    places = {subtype: k for k, subtype in enumerate(subtypes, start=1)}
    entries = tuple(
        replace(entry, label=places[entry.subtype] if entry.label else 0, subtype="")
        for entry in layout.entries
    )
    return replace(layout, entries=entries, labels=spec)


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


def _row_of(entry: Entry) -> Row:
    return Row(entry.path, "", entry.label, entry.patient, entry.subtype, entry.split)


def _check_folders(found: Collection[Folder], source: str) -> None:
    """Raise `SourceError` where the folders of images do not agree with each other."""
    has_splits = any(folder.split for folder in found)
    folders = sorted(found, key=lambda folder: folder.path)
    classes = {folded(folder.class_folder) for folder in folders}
    usual = {folded(name) for name in CLASSES}
    names_of: dict[str, str] = {}
    written: dict[tuple[str, str], str] = {}
    for folder in folders:
        if has_splits and not folder.split:
            raise SourceError(
                f"{source} has split folders, but {folder.path}/ is in none; split folders are "
                f"called {', '.join(SPLIT_NAMES)}, and the layout is {_LAYOUT}; {_TABLE}"
            )
        inside = {folded(name) for name in folder.inside.split("/")}
        is_usual = folded(folder.class_folder) in usual
        if inside & usual and not is_usual:
            raise SourceError(
                f"unknown class folder {folder.class_folder!r} in {source} ({folder.path}/): "
                "class folders are directly in a split folder if there are any, and beside each "
                f"other; {_TABLE}"
            )
        if inside & (usual if is_usual else classes - {folded(folder.class_folder)}):
            raise SourceError(
                f"a class folder is inside another in {source} ({folder.path}/): move its images "
                f"to one of them; {_TABLE}"
            )
        beside = (folder.class_path.rpartition("/")[0], folded(folder.class_folder))
        if (other := written.setdefault(beside, folder.class_folder)) != folder.class_folder:
            raise SourceError(
                f"{source} has two folders of one class, {other!r} and {folder.class_folder!r} in "
                f"{_place(beside[0])}: make them one; case does not matter"
            )
        if folder.split:
            (name,) = (part for part in folder.own.lower().split("/") if part in SPLIT_NAMES)
            if (other := names_of.setdefault(folder.split, name)) != name:
                raise SourceError(
                    f"{source} has two folders for the split {folder.split}, {other!r} and "
                    f"{name!r}; leave one; {_TABLE}"
                )


def _without_copies(
    trees: Mapping[str, list[tuple[str, Folder]]], source: str
) -> tuple[list[tuple[str, Folder]], int]:
    """The files of the one tree, and how many are in copies of it inside. Raises `SourceError`."""
    top, *nested = sorted(trees, key=lambda above: (above.count("/"), above))
    inside = {path.removeprefix(top) for path, _ in trees[top]} if nested else set()
    for above in nested:
        copies = {path.removeprefix(above) for path, _ in trees[above]}
        if not above.startswith(top) or not inside.issuperset(copies):
            raise SourceError(
                f"{source} holds several trees of images, in {_place(top)} and {_place(above)}; "
                "call them train, val and test if they are splits, else give one of them as "
                f"--source; {_TABLE}"
            )
    return sorted(trees[top], key=lambda file: file[0]), sum(len(trees[above]) for above in nested)


def _place(folder: str) -> str:
    return repr(folder) if folder else "its top folder"


def _found_classes(files: Iterable[tuple[str, Folder]]) -> list[Found]:
    counts: Counter[str] = Counter()
    first: dict[str, Folder] = {}
    for _, folder in files:
        counts[own := folded(folder.class_folder)] += 1
        first.setdefault(own, folder)
    return [
        Found(folder.class_folder, counts[own], f"{folder.class_path}/")
        for own, folder in first.items()
    ]


def _without_derived(
    files: Sequence[tuple[str, Folder]],
) -> tuple[Sequence[tuple[str, Folder]], list[str]]:
    """Leave out masks, thumbnails and the like that lie beside images, with a note.

    They are recognized by a folder inside the class folder, or by a name such as `a_mask.png` next
    to `a.png`. Where there is nothing else, they are the images.
    """
    folders = {folder for _, folder in files}
    bad = {folder for folder in folders if DERIVED.search(folder.inside)}
    derived = {path for path, folder in files if folder in bad}
    named = [path for path, _ in files if DERIVED.search(path, path.rfind("/") + 1)]
    stems = {path.rpartition(".")[0] for path, _ in files} if named else set()
    for path in named:
        stem = path.rpartition(".")[0]
        if any(stem[: match.start()] in stems for match in re.finditer(r"[ _.-]", stem)):
            derived.add(path)
    if not 0 < len(derived) < len(files):
        return files, []
    note = (
        f"{counted(len(derived), 'file', 'are')} left out, with a folder or name as of masks, "
        f"thumbnails or the like, such as {min(derived)}; a table (--labels FILE.csv) that names "
        "them takes them in"
    )
    return [file for file in files if file[0] not in derived], [note]


def _note_folders(files: Iterable[tuple[str, Folder]]) -> list[str]:
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


def _junk_above(path: str) -> str:
    """Why the files of a folder are no data, in words; empty where they may be."""
    folders = path.split("/")
    if any(folder.lower() == "__macosx" for folder in folders):
        return "in __MACOSX"
    return next(filter(None, map(_junk, folders)), "")


def _junk(name: str) -> str:
    if name.startswith("."):
        return "hidden (names that begin with a dot)"
    return "Thumbs.db or desktop.ini" if name.lower() in ("thumbs.db", "desktop.ini") else ""


def _entry(path: str, folder: Folder, places: Mapping[str, int], patients: dict[str, str]) -> Entry:
    patient, subtype = parse_name(path.rpartition("/")[2])
    return Entry(
        path=path,
        split=folder.split or "train",
        label=places[folded(folder.class_folder)],
        patient=patients.setdefault(patient, patient)
        if patient
        else file_patient(path.removeprefix(folder.above)),
        subtype=subtype if folder.class_folder.upper() == CLASSES[1] else "",
    )
