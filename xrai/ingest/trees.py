"""Which files of a source are images, going by the folders that they are in and by their names.

`xrai.ingest.layout` says what the images are. Paths stay columns: of millions of files there are
two arrays, and objects only of the folders.
"""

import functools
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.rows import Names, Texts
from xrai.errors import SourceError
from xrai.ingest.classes import Found
from xrai.ingest.folders import DERIVED, SPLIT_NAMES, ClassFolders, Folder, holds_images
from xrai.ingest.listed import TextIndex
from xrai.labels import CLASSES, folded
from xrai.log import counted

_IMAGE: Final = re.compile(  # names of images; DICOM files may have numbers or UIDs as names
    r"\.(?:jpe?g|jpe|jfif|png|dcm|dicom|dic|ima|bmp|gif|tiff?|webp|jp2|j2k|pgm)$"
    r"|(?:^|/)[^./]*\d[^./]*$|(?:\.\d+){3}$",
    re.IGNORECASE,
)
_MANY_OUTSIDE, _LARGE_SHARE = 10, 0.25  # of images outside of the class folders
_MASK_AT_END: Final = re.compile(r"masks?$", re.IGNORECASE)
_SHOWN = 3  # folders that one message lists

LAYOUT: Final = "[chest_xray/]{train,val,test}/{NORMAL,PNEUMONIA,…}/* or {NORMAL,PNEUMONIA,…}/*"
BY_TABLE: Final = "a table (--labels FILE.csv) can say for any layout what each file is"

# Paths of copies and of their originals -> a pair that differs; None where there is none
FindUnlike = Callable[[Texts, Texts], tuple[str, str] | None]


@dataclass(frozen=True, eq=False)
class Placed:
    """Files and the class folders that they are in. Iterating gives paths and places of folders."""

    paths: Texts  # sorted
    above: NDArray[np.int32]  # (N,), places in `folders`
    folders: tuple[Folder, ...]  # each with a file at least

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return zip(self.paths, self.above.data, strict=True)

    def where(self, test: Callable[[Folder], bool]) -> NDArray[np.bool_]:
        """(N,), the files in the folders that pass a test."""
        return np.array([test(folder) for folder in self.folders], np.bool_)[self.above]

    def take(self, where: NDArray[np.bool_]) -> "Placed":
        """The files of a mask."""
        if where.all():
            return self
        return _place_files(self.paths, np.where(where, self.above, np.int32(-1)), self.folders)

    def counts(self) -> list[int]:
        """Files of each folder."""
        counts: list[int] = np.bincount(self.above, minlength=len(self.folders)).tolist()
        return counts

    def column(self, names: Sequence[str]) -> Names:
        """(N,) names, from one for each folder."""
        values = (*dict.fromkeys(names),)
        codes = np.array([values.index(name) for name in names], np.min_scalar_type(len(values)))
        return Names(codes[self.above], values)


@dataclass(frozen=True, eq=False)
class Sorted:
    """What a source holds."""

    data: Placed  # in class folders
    outside: Texts  # in none
    not_data: dict[str, int]  # description of other files -> how many


def sort_files(paths: Texts, names: Collection[str] = ()) -> Sorted:
    """Find the class folders among sorted paths; `names` are those of `labels.names`. Hidden files,
    `__MACOSX` and the like are counted, and are nothing else.
    """
    junk: Counter[str] = Counter()
    numbers: dict[str, int] = {}  # folders
    told: list[str] = []  # why the files of a folder are junk
    with_images: list[bool] = []
    above = array("i")  # numbers of folders; -1 for junk
    for path in paths:
        folder, _, name = path.rpartition("/")
        if (number := numbers.get(folder)) is None:
            number = numbers[folder] = len(numbers)
            told.append(_junk_above(folder))
            with_images.append(False)
        if words := told[number] or _junk(name):
            junk[words] += 1
            above.append(-1)
            continue
        if not with_images[number]:
            with_images[number] = holds_images((name,))
        above.append(number)
    named = [folder for folder, holds in zip(numbers, with_images, strict=True) if holds]
    classes = ClassFolders(named, names)
    described = [classes.describe(folder) for folder in numbers]
    codes = np.frombuffer(above, np.int32)
    is_outside = np.array([folder is None for folder in described], np.bool_)
    where = (codes >= 0) & is_outside[codes] if described else np.zeros(0, np.bool_)
    data = _place_files(paths, np.where(where, np.int32(-1), codes), described)
    return Sorted(data, paths.take(np.flatnonzero(where)), dict(junk))


def _place_files(
    paths: Texts, above: NDArray[np.int32], folders: Sequence[Folder | None]
) -> Placed:
    """The files in some of the folders; `above` is -1 for the others."""
    is_in = above >= 0
    if not is_in.all():
        paths, above = paths.take(np.flatnonzero(is_in)), above[is_in]
    has_files = np.zeros(len(folders), np.bool_)
    has_files[above] = True
    new = np.cumsum(has_files, dtype=np.int32) - np.int32(1)
    kept = [folders[number] for number in np.flatnonzero(has_files).tolist()]
    return Placed(paths, new[above], tuple(folder for folder in kept if folder is not None))


def check_folders(found: Collection[Folder], source: str) -> None:
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
                f"called {', '.join(SPLIT_NAMES)}, and the layout is {LAYOUT}; {BY_TABLE}"
            )
        inside = {folded(name) for name in folder.inside.split("/")}
        is_usual = folded(folder.class_folder) in usual
        if inside & usual and not is_usual:
            raise SourceError(
                f"unknown class folder {folder.class_folder!r} in {source} ({folder.path}/): "
                "class folders are directly in a split folder if there are any, and beside each "
                f"other; {BY_TABLE}"
            )
        if inside & (usual if is_usual else classes - {folded(folder.class_folder)}):
            raise SourceError(
                f"a class folder is inside another in {source} ({folder.path}/): move its images "
                f"to one of them; {BY_TABLE}"
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
                    f"{name!r}; leave one; {BY_TABLE}"
                )


def without_copies(files: Placed, source: str, find_unlike: FindUnlike) -> tuple[Placed, list[str]]:
    """The files of the one tree, without those in copies of it inside, and notes.

    Raises `SourceError` where there are other trees, also one whose files have the same names and
    are no copies.
    """
    tops = {folder.above for folder in files.folders}
    top, *nested = sorted(tops, key=lambda above: (above.count("/"), above))
    own = files.take(files.where(functools.partial(_is_below, above=top)))
    notes = []
    for above in nested:
        copies = files.take(files.where(functools.partial(_is_below, above=above))).paths
        inside = (path.removeprefix(top) for path in own.paths)
        is_copy = all(path.removeprefix(above) in inside for path in copies)  # both sorted
        unlike = None
        if is_copy and above.startswith(top):
            originals = Texts.of(f"{top}{path.removeprefix(above)}" for path in copies)
            unlike = find_unlike(copies, originals)
        if not above.startswith(top) or not is_copy or unlike:
            words = f" ({' and '.join(unlike)} differ)" if unlike else ""
            raise SourceError(
                f"{source} holds several trees of images, in {_place(top)} and {_place(above)}"
                f"{words}; call them train, val and test if they are splits, else give one of them "
                f"as --source; {BY_TABLE}"
            )
        notes.append(
            f"{counted(len(copies), 'file', 'are')} left out, as a second copy of the tree, in "
            f"{_place(above)}"
        )
    return own, notes


def _is_below(folder: Folder, *, above: str) -> bool:
    return folder.above == above


def _place(folder: str) -> str:
    return repr(folder) if folder.strip("/") else "its top folder"


def check_outside(
    outside: Texts, classes: Sequence[Found], source: str, *, is_named: bool
) -> list[str]:
    """A note where images are outside of the class folders; `is_named` says that `labels.names`
    names the classes.

    Raises `SourceError` for many in other folders than those of masks and the like, and than a
    split folder itself: they may be a class, or the images of another site.
    """
    counts = Counter(path.rpartition("/")[0] for path in outside if _IMAGE.search(path))
    if not counts:
        return []
    found = counts.most_common()  # those of one count in the order of paths
    shown = ", ".join(f"{num} in {_place(f'{path}/')}" for path, num in found[:_SHOWN])
    if len(found) > _SHOWN:
        shown += f", and so on in {len(found)} folders"
    words = counted(sum(counts.values()), "image", "are")
    doubtful = {path: num for path, num in found if not _is_told(path)}
    num_doubtful, num_used = sum(doubtful.values()), sum(each.num_images for each in classes)
    is_large = num_doubtful > _LARGE_SHARE * (num_doubtful + num_used)
    if num_doubtful >= _MANY_OUTSIDE and is_large and not is_named:
        names = ", ".join(repr(each.name) for each in classes[:_SHOWN])
        raise SourceError(
            f"{words} outside of the class folders of {source} ({names}): {shown}; call their "
            "folders as these, move them away, or name all classes by --labels.names='A|B|…'; "
            f"{BY_TABLE}"
        )
    return [f"{words} not used, as outside of the class folders: {shown}"]


def _is_told(folder: str) -> bool:
    """Whether the name of a folder says why the images directly in it have no class."""
    return bool(DERIVED.search(folder)) or folder.rpartition("/")[2].lower() in SPLIT_NAMES


def found_classes(files: Placed) -> list[Found]:
    """The names of the class folders, in the order of their first files."""
    counts: Counter[str] = Counter()
    first: dict[str, Folder] = {}
    first_files = np.zeros(len(files.folders), np.int32)
    first_files[files.above[::-1]] = np.arange(len(files), dtype=np.int32)[::-1]
    num_files = files.counts()
    for number in np.argsort(first_files).tolist():
        folder = files.folders[number]
        counts[own := folded(folder.class_folder)] += num_files[number]
        first.setdefault(own, folder)
    return [
        Found(folder.class_folder, counts[own], f"{folder.class_path}/")
        for own, folder in first.items()
    ]


def without_derived(files: Placed) -> tuple[Placed, list[str]]:
    """Leave out masks, thumbnails and the like that lie beside images, with a note.

    They are recognized by a folder inside the class folder, or by a name such as `a_mask.png` next
    to `a.png`. Where there is nothing else, they are the images.
    """
    is_derived = files.where(lambda folder: DERIVED.search(folder.inside) is not None)
    is_derived[_beside_images(files.paths)] = True
    num_derived = int(is_derived.sum())
    if not 0 < num_derived < len(files):
        return files, []
    note = (
        f"{counted(num_derived, 'file', 'are')} left out, with a folder or name as of masks, "
        f"thumbnails or the like, such as {files.paths[int(is_derived.argmax())]}; a table "
        "(--labels FILE.csv) that names them takes them in"
    )
    return files.take(~is_derived), [note]


def _beside_images(paths: Texts) -> "array[int]":
    """The places of files such as `a_mask.png` or `aleftmask.png` next to `a.png`."""
    named = array("i")
    for place, path in enumerate(paths):
        if DERIVED.search(path, path.rfind("/") + 1):
            named.append(place)
    stems = TextIndex(paths, _stem) if named else ()
    found = array("i")
    for place in named:
        stem = _stem(paths[place])
        ends = [match.start() for match in re.finditer(r"[ _.-]", stem)]
        if _MASK_AT_END.search(stem):
            ends += range(stem.rfind("/") + 2, len(stem))
        if any(stem[:end] in stems for end in ends):
            found.append(place)
    return found


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def note_folders(files: Placed) -> list[str]:
    """A note where class folders hold several folders alike, such as images and crops of them.

    Folders of the same name in several places are kinds of images; others are patients. Numbers do
    not count: `study1` and `study2` are one kind.
    """
    counts = dict(zip(files.folders, files.counts(), strict=True))
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
