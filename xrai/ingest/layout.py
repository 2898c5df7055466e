"""From paths to data files: the layout of folders, and the file names of the public data set."""

import re
from array import array
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from xrai.config import Labels
from xrai.dataset.rows import OWN_PATIENT, Names, PatientsBuilder, Rows, Texts
from xrai.errors import SourceError
from xrai.ingest.classes import NAME_CLASSES, explain_classes, make_spec, places_of, split_names
from xrai.ingest.trees import (
    BY_TABLE,
    LAYOUT,
    FindUnlike,
    Placed,
    check_folders,
    check_outside,
    found_classes,
    note_folders,
    sort_files,
    without_copies,
    without_derived,
)
from xrai.labels import CLASSES, LabelSpec, folded
from xrai.log import counted

BINARY: Final = LabelSpec("binary", CLASSES)  # the public set's classes
# As file names and tables write them -> as the manifest keeps them
SUBTYPES: Final = {"bacteria": "bacterial", "virus": "viral"}

_SUBTYPES = ("", *SUBTYPES.values())  # those of file names
_DEFAULTS = Labels()
# IM-0115-0001.jpeg, NORMAL2-IM-0416-0001-0002.jpeg, person1000_bacteria_2931.jpeg,
# person1_virus_7_1.jpeg
_PUBLIC_NAME = re.compile(
    r"(?P<prefix>phantom-)?"
    r"(?:(?:(?P<normal>NORMAL2)-)?IM-(?P<film>\d+)(?:-\d+)+"
    r"|person(?P<person>\d+)_(?P<germ>bacteria|virus)(?:_\d+)+)"
    r"\.\w+"
)
_NUMBER = "IM:"  # of keys from names that other programs give, too
_NUMBERED = (
    "one name such as IM-0001-0001 is in several folders: if such names number images, as in what "
    "DICOM viewers export, images of one patient may be in two splits; this does not concern files "
    "with a PatientID, for others name patients in a table (--labels FILE.csv with a column "
    "patient)"
)


@dataclass(frozen=True)
class Layout:
    """What a source's paths say."""

    rows: Rows  # sorted by path, no hashes; split "train" where the source has no split folders
    not_data: dict[str, int]  # description of skipped files -> how many
    notes: tuple[str, ...] = ()  # what people should know, a sentence each
    labels: LabelSpec = BINARY  # what the rows' labels mean
    facts: tuple[str, ...] = ()  # as the notes, where nothing is doubtful

    def describe_not_data(self) -> str:
        """In words; empty where nothing was skipped."""
        parts = ", ".join(f"{count} {words}" for words, count in sorted(self.not_data.items()))
        words = counted(sum(self.not_data.values()), "file", "are")
        return f"{words} not data: {parts}" if parts else ""


def lay_out(
    paths: Iterable[str],
    *,
    source: str,
    config: Labels = _DEFAULTS,
    find_unlike: FindUnlike = lambda copies, originals: None,
) -> Layout:
    """Find the data files among a source's paths; `source` names it in messages. `find_unlike`
    compares the files of what may be a copy of the tree; without it, names are all that counts.

    Accepted: split and class folders, one in the other, in any case; class folders alone (all of it
    train); either below further folders; a second copy of the same tree inside the first, as in the
    public archive. Hidden files, `__MACOSX`, `Thumbs.db`, `desktop.ini`, masks and thumbnails
    beside images, and files outside of class folders are counted, but are not data.

    Raises `SourceError` when there is no data file, a class folder is inside another or doubtful
    (`make_spec`), a split has two folders, or there are several trees.
    """
    names = split_names(config.names)
    found = sort_files(paths if isinstance(paths, Texts) else Texts.of(sorted(paths)), names)
    outside, data, not_data = found.outside, found.data, found.not_data
    del found
    if not len(data):
        held = (
            f"it holds {counted(len(outside), 'other file')}, such as {outside[0]}"
            if outside
            else "it is empty"
        )
        raise SourceError(
            f"{source} holds no images laid out as {LAYOUT}, with two classes at least; "
            f"{held}; {BY_TABLE}"
        )
    check_folders(data.folders, source)
    tree, notes = without_copies(data, source, find_unlike)
    images, told_derived = without_derived(tree)
    notes += told_derived
    others = {
        "in a second copy of the tree": len(data) - len(tree),
        "outside of the class folders": len(outside),
        "masks, thumbnails or the like": len(tree) - len(images),
    }
    not_data |= {words: count for words, count in others.items() if count}
    classes = found_classes(images)
    notes += check_outside(outside, classes, source, is_named=bool(names))
    del data, tree, outside
    spec = make_spec(classes, config, where=source)
    refuse_faulty(spec, source=source)
    told = () if spec.is_public else (explain_classes(classes, spec),)
    if not config.names:
        notes += [f"{each}: {NAME_CLASSES}" for each in told]
    notes += note_folders(images)
    facts = told if config.names else ()
    if are_numbers((images.folders[number].split, path) for path, number in images):
        notes.append(_NUMBERED)
    layout = Layout(_rows(images, spec), not_data, tuple(notes), spec, facts)
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
    rows = layout.rows
    is_positive = rows.labels != 0
    lacking = np.flatnonzero(is_positive & rows.subtypes.are(""))
    if len(lacking):
        raise SourceError(
            f"labels.target = subtype, but {counted(len(lacking), f'{positive} image')} of "
            f"{source} without one, such as {rows.paths[int(lacking[0])]}: it stands in file names "
            "as of the public set (person1_virus_7.jpeg) or in the column subtype of a table "
            "(--labels FILE.csv)"
        )
    subtypes = sorted(rows.subtypes.take(np.flatnonzero(is_positive)).used())
    spec = LabelSpec("multiclass", (negative, *(subtype.upper() for subtype in subtypes)))
    if len(spec.classes) < 3:
        raise SourceError(
            f"labels.target = subtype, but all {positive} images of {source} are of one subtype, "
            f"{''.join(subtypes)!r}: it takes two or more"
        )
    refuse_faulty(spec, source=source)
    labels = np.zeros_like(rows.labels)
    for place, subtype in enumerate(subtypes, start=1):
        labels[is_positive & rows.subtypes.are(subtype)] = place
    rows = rows.with_(labels=labels, subtypes=Names.same("", len(rows)))
    return replace(layout, rows=rows, labels=spec)


def refuse_faulty(spec: LabelSpec, *, source: str) -> None:
    """Raise `SourceError` for classes that no data set can have."""
    if fault := spec.fault():
        raise SourceError(f"the classes of {source} {fault}")


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
    return f"{group}:{OWN_PATIENT}{path}" if group else f"{OWN_PATIENT}{path}"


def name_patient(path: str, *, group: str = "", has_numbers: bool = False) -> str:
    """The key that a file's name states, as `parse_name` does, else that of `file_patient`; with
    `has_numbers`, names such as IM-0001-0001.jpeg state none.
    """
    patient = parse_name(path.rpartition("/")[2])[0]
    if not patient or (has_numbers and patient.startswith(_NUMBER)):
        return file_patient(path, group=group)
    return f"{group}:{patient}" if group else patient


def may_be_number(patient: str, path: str) -> bool:
    """Whether the key is from a name such as IM-0001-0001.dcm. DICOM viewers name what they export
    like that, too, and then number images, not patients.
    """
    own = parse_name(path.rpartition("/")[2])[0]
    return own.startswith(_NUMBER) and (patient == own or patient.endswith(f":{own}"))


def group_of(patient: str) -> str:
    """The group in front of a key of `name_patient`, if that is a file's or a number; else ""."""
    head, _, rest = patient.partition(":")
    return head if f"{head}:" != OWN_PATIENT and rest.startswith((OWN_PATIENT, _NUMBER)) else ""


def are_numbers(files: Iterable[tuple[Hashable, str]]) -> bool:
    """Whether names such as IM-0001-0001.jpeg may number images, as one of them is in two folders;
    `files` are pairs of what tells patients apart beside the name, such as the split, and the path.
    """
    found = array("q")  # a hash of each such name
    for apart, path in files:
        name = path.rpartition("/")[2]
        if name.startswith("IM-") and parse_name(name)[0]:
            found.append(hash((apart, name)))
    hashes = np.sort(np.frombuffer(found, np.int64))
    return bool((hashes[1:] == hashes[:-1]).any())


def _rows(files: Placed, spec: LabelSpec) -> Rows:
    """What the folders and names of images say."""
    places, folders = places_of(spec), files.folders
    labels = np.array([places[folded(folder.class_folder)] for folder in folders], np.uint8)
    has_subtypes = [folder.class_folder.upper() == CLASSES[1] for folder in folders]
    patients, subtypes = PatientsBuilder(), bytearray()
    for path, number in files:
        patient, subtype = parse_name(path.rpartition("/")[2])
        own = folders[number].above
        patients.append(path, patient or file_patient(path.removeprefix(own)))
        subtypes.append(_SUBTYPES.index(subtype if has_subtypes[number] else ""))
    return Rows.unread(
        files.paths,
        labels[files.above],
        patients.finish(files.paths, is_sorted=True),
        subtypes=Names(np.frombuffer(subtypes, np.uint8), _SUBTYPES),
        splits=files.column([folder.split or "train" for folder in folders]),
    )
