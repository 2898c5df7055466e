"""Which of a source's folders are its classes: any names, below split folders or side by side.

Where no folder is called NORMAL or PNEUMONIA, the classes are the topmost folders that stand side
by side.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xrai.dataset.shards import SPLITS
from xrai.labels import CLASSES, folded

SPLIT_NAMES: Final = {name: name for name in SPLITS} | {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}
# Words of names that files have which are made from images and lie next to them. Synology: @eaDir
_LETTERS: Final = r"[^\W\d_]*"
_DERIVED_WORDS: Final = (
    rf"(?!(?:un|non?|without)(?:mask|segment|annot)|damask){_LETTERS}?"
    r"(?:mask(?:s|e|en|ed|ing)?|masks?(?:image|img|file|data|png|left|right|lung)s?|overlays?"
    # Segmental and segmentectomy are none
    rf"|segment(?!al|a\u0308?r|är|air|ect){_LETTERS}|annota{_LETTERS})"
    rf"|heat.?map{_LETTERS}|thumb(?:s|nail{_LETTERS})?|previews?|@eadir"
)
_START, _END = r"(?:(?<![^\W\d_])|(?<=[a-z])(?=[A-Z]))", r"(?:(?![^\W\d_])|(?<=[a-z])(?=[A-Z]))"
DERIVED: Final = re.compile(f"{_START}(?i:{_DERIVED_WORDS}){_END}")

_USUAL = frozenset(folded(name) for name in CLASSES)
# Files that describe images; a folder of these alone is no class
_TEXTS = frozenset(
    [
        *("txt", "md", "rst", "log", "tex", "bib", "pdf", "doc", "docx", "odt"),
        *("csv", "tsv", "xls", "xlsx", "ods"),
        *("html", "htm", "json", "jsonl", "xml", "yaml", "yml", "toml", "ini", "cfg"),
        *("py", "ipynb", "sh"),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """A folder of images, as its path describes it."""

    path: str
    above: str  # "" or "chest_xray/"
    split: str  # "" where there is no split folder
    own: str  # split and class folder, as they are written: "Train/NORMAL", "NORMAL/Train"
    class_folder: str
    class_path: str  # the path that ends with the class folder
    inside: str  # the class folder: "" or "masks"


def holds_images(names: Collection[str]) -> bool:
    """Whether some file may be an image, going by the names; no suffix says nothing."""
    return any(name.rpartition(".")[2].lower() not in _TEXTS for name in names)


class ClassFolders:
    """Where the class folders of a source are.

    `folders` are the paths of all folders that hold files and may be images; `names` are those of
    `labels.names`, which are classes whatever they are called.
    """

    def __init__(self, folders: Collection[str], names: Collection[str] = ()) -> None:
        self._named = frozenset(map(folded, names))
        self._with_images = frozenset(folders)
        self._folders = [tuple(path.split("/")) if path else () for path in folders]
        self._is_above = self._find_order()
        pairs = [pair for parts in self._folders for pair in self._split_pairs(parts)]
        self.has_splits = bool(pairs)
        self._words = frozenset(
            folded(parts[class_at])
            for parts, _, class_at in pairs
            if not self._is_derived(parts[class_at])
        )
        self._parents = self._find_parents()
        self._beside = self._find_beside()

    def describe(self, path: str) -> Folder | None:
        """A folder of images; None for one that is in no class folder."""
        parts = tuple(path.split("/")) if path else ()
        for _, split_at, class_at in self._split_pairs(parts):
            if folded(parts[class_at]) in self._words | _USUAL:
                return _folder(path, parts, split_at, class_at)
        words = self._words if path in self._with_images else ()
        for k, name in enumerate(parts):
            own = folded(name)
            is_class = own in _USUAL or own in (words or self._beside.get(parts[:k], ()))
            if is_class and not any(map(_is_split, parts[:k])):
                return _folder(path, parts, None, k)
        return None

    def _is_derived(self, name: str) -> bool:
        return DERIVED.search(name) is not None and folded(name) not in self._named

    def _split_pairs(self, parts: Sequence[str]) -> Iterator[tuple[Sequence[str], int, int]]:
        """(parts, place of the split folder, place of the class folder) where a path has both."""
        for k, name in enumerate(parts):
            if not _is_split(name):
                continue
            if k and folded(parts[k - 1]) in _USUAL:
                yield parts, k, k - 1
            if k + 1 < len(parts) and folded(parts[k + 1]) in _USUAL:
                yield parts, k, k + 1
        for k, name in enumerate(parts):
            if not _is_split(name):
                continue
            if self._is_above and k and not _is_split(parts[k - 1]):
                yield parts, k, k - 1
            if not self._is_above and k + 1 < len(parts) and not _is_split(parts[k + 1]):
                yield parts, k, k + 1

    def _find_order(self) -> bool:
        """Whether the split folders are inside the class folders."""
        is_above = has_above = has_below = False
        for parts in self._folders:
            for k, name in enumerate(parts):
                if _is_split(name):
                    above = parts[k - 1] if k else ""
                    below = parts[k + 1] if k + 1 < len(parts) else ""
                    is_above |= folded(above) in _USUAL
                    has_above |= bool(above) and not below and not _is_split(above)
                    has_below |= bool(below) and not (self._is_derived(below) or _is_split(below))
        return is_above or (has_above and not has_below)

    def _find_parents(self) -> frozenset[Sequence[str]]:
        """Folders that contain class folders side by side, where there are no splits."""
        if self.has_splits:
            return frozenset()
        usual = [
            parts[: next(k for k, name in enumerate(parts) if folded(name) in _USUAL)]
            for parts in self._folders
            if any(folded(name) in _USUAL for name in parts)
        ]
        if usual:
            return frozenset(usual)
        top: tuple[str, ...] = ()
        while True:
            names = {parts[len(top)] for parts in self._folders if len(parts) > len(top)}
            own = {name for name in names if not self._is_derived(name)} or names
            if len(own) != 1:
                return frozenset([top]) if own else frozenset()
            top = (*top, *own)
            self._folders = [parts for parts in self._folders if parts[: len(top)] == top]

    def _find_beside(self) -> Mapping[Sequence[str], Collection[str]]:
        """Folder -> the folded names of the class folders in it, where there are no splits."""
        found: dict[Sequence[str], set[str]] = defaultdict(set)
        containers = {parent[:k] for parent in self._parents for k in range(len(parent) + 1)}
        for parts in self._folders:
            for k, name in enumerate(parts):
                is_beside = parts[:k] in self._parents and parts[: k + 1] not in containers
                if is_beside and not self._is_derived(name):
                    found[parts[:k]].add(folded(name))
        return found


def _is_split(name: str) -> bool:
    return name.lower() in SPLIT_NAMES


def _folder(path: str, parts: Sequence[str], split_at: int | None, class_at: int) -> Folder:
    first = class_at if split_at is None else min(split_at, class_at)
    stop = 1 + (class_at if split_at is None else max(split_at, class_at))
    return Folder(
        path=path,
        above="".join(f"{name}/" for name in parts[:first]),
        split="" if split_at is None else SPLIT_NAMES[parts[split_at].lower()],
        own="/".join(parts[first:stop]),
        class_folder=parts[class_at],
        class_path="/".join(parts[: class_at + 1]),
        inside="/".join(parts[stop:]),
    )
