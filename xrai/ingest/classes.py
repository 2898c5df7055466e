"""From the names that folders and tables use to a `LabelSpec`, and what is doubtful about them.

Any name may be a class, so a name that is likely a mistake is refused: one that looks like another,
or that hardly any image has. `labels.names` says that such a name is meant.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.records import shown
from xrai.labels import CLASSES, LabelSpec, Task, find_twice, folded, name_fault
from xrai.labels import Labels as LabelArray
from xrai.log import counted

NEGATIVE_WORDS: Final = (
    *("normal", "no finding", "no findings", "negative", "healthy", "control", "controls"),
)
MAX_CLASSES: Final = 100  # more folders are patients, and more labels are texts

NAME_CLASSES: Final = (
    "if one is not meant as a class, move its images away or name the classes by "
    "--labels.names='A|B|…'"
)
NAME_FINDINGS: Final = "if one is not meant, name those to use by --labels.names='A|B|…'"

_SAY_SO = "if each is meant, name the classes by --labels.names='A|B|…'"
_FEW_IMAGES, _SMALL_SHARE = 10, 0.1  # the most that a class made by mistake has
_SIMILAR = 0.75  # ratio of difflib from which a rare name is taken for a misspelling
_SHOWN = 5  # names that one message lists
# What people append to the name of a folder that is a copy or a part of another one
_WORDS = (
    "old|new|copy|kopie|backup|bak|orig(?:inal)?|final|tmp|temp|extra|more|rest|aug(?:mented)?"
    "|cropped|resized"
)
_APPENDED = re.compile(rf"[\s_.-]*(?:[(\[](?:\d*|{_WORDS})[)\]]|\d+|\b(?:{_WORDS})\b)$")
# Names that differ in these alone are different grades or opposites, and no misspellings
_GRADES = re.compile(r"\d+|\b[ivx]+\b|\b[a-z]\b|positive|negative|left|right")
_NEGATIONS = ("ab", "un", "in", "im", "a", "non", "not", "no", "without", "absent")
# Folders whose names differ in their numbers alone and that begin so hold parts, not classes
_PARTS = re.compile(
    r"(?:images?|img|films?|parts?|folds?|batch(?:es)?|folders?|dirs?|sets?|subsets?|data|series"
    r"|study|studies|cases?|patients?|person|pat|p|s)[\s_.-]*\d+"
)


@dataclass(frozen=True)
class Found:
    """A name that labels use."""

    name: str  # as it is first written
    num_images: int
    place: str  # where it first is, for people: "line 7", "train/COVID/"


def is_negative_word(name: str) -> bool:
    """Whether a name says that nothing was found."""
    return re.sub(r"[\s_-]+", " ", folded(name)) in NEGATIVE_WORDS


def split_names(names: str) -> tuple[str, ...]:
    """The names of `labels.names`, joined by `|`. Raises `SourceError` where one stands twice."""
    found = tuple(name.strip() for name in names.split("|") if name.strip())
    for name in found:
        check_name(name, where="labels.names")
    refuse_twice(found, where="labels.names")
    return found


def check_name(name: str, task: Task = "multiclass", *, where: str) -> None:
    """Raise `SourceError` for a name that no class, or finding, may have."""
    if words := name_fault(name, task):
        raise SourceError(f"{where} has the name {shown(name)}, which {words}")


def refuse_twice(names: Sequence[str], *, where: str) -> None:
    """Raise `SourceError` where two names are the same, or differ in case alone."""
    if same := find_twice(names):
        raise SourceError(
            f"{where} has the name {same[1]!r} twice (first as {same[0]!r}; case does not matter); "
            "leave one"
        )


def make_spec(found: Sequence[Found], config: Labels, *, where: str) -> LabelSpec:
    """The classes of a data set whose labels use these names; `where` names the source.

    NORMAL and PNEUMONIA in any case, also one of them alone, are these two. Any others are kept as
    they are first written: the negative one first, then by name. Raises `SourceError` where there
    is one class alone, none of two is known as the negative one, a name is not in `labels.names`,
    or a name is doubtful.
    """
    names = split_names(config.names)
    if names:
        refuse_unknown(found, names, is_divided=config.target == "subtype")
    elif {folded(each.name) for each in found} <= {folded(name) for name in CLASSES}:
        names = CLASSES
    else:
        _refuse_doubtful(found, where=where)
        names = tuple(sorted((each.name.strip() for each in found), key=folded))
    for name in names:
        check_name(name, where=where)
    if {folded(name) for name in names} == {folded(name) for name in CLASSES}:
        names = CLASSES if not config.names else tuple(name.upper() for name in names)
    if len(names) < 2:
        raise SourceError(_explain_one_class(found, names, where=where))
    negative = _negative_of(names, config, where=where, is_ordered=bool(config.names))
    classes = tuple(sorted(names, key=lambda name: name != negative))
    return LabelSpec("binary" if len(classes) == 2 else "multiclass", classes)


def places_of(spec: LabelSpec) -> dict[str, int]:
    """Folded name -> place in the classes."""
    return {folded(name): place for place, name in enumerate(spec.classes)}


def refuse_unknown(
    found: Sequence[Found], names: Collection[str], *, is_divided: bool = False
) -> None:
    """Raise `SourceError` for the first name that is not among `names`; `is_divided` says that
    classes of subtypes are made of them.
    """
    meant = "; these are the labels from which labels.target makes subtypes" if is_divided else ""
    known = {folded(name): name for name in names}
    for each in found:
        if (own := folded(each.name)) not in known:
            raise SourceError(
                f"{each.place}: unknown label {each.name!r}, labels.names allows "
                f"{', '.join(names)}{nearest_name(own, names)}{meant}"
            )


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar valid one, unless that one means
    the opposite; empty where there is none.
    """
    known = {folded(each): each for each in valid if not _are_opposed(name, each)}
    near = difflib.get_close_matches(folded(name), known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def explain_classes(found: Sequence[Found], spec: LabelSpec) -> str:
    """Which classes were found."""
    num_images = {folded(each.name): each.num_images for each in found}
    told = (
        f"{name!r} ({counted(num_images.get(folded(name), 0), 'image')})" for name in spec.classes
    )
    return f"the classes are {', '.join(told)}"


def explain_findings(spec: LabelSpec, labels: LabelArray) -> str:
    """Which findings were found; `labels` (N, C) are those of all images."""
    told = (
        f"{name!r} ({counted(num, 'image')}{f', unknown in {unknown}' if unknown else ''})"
        for name, num, unknown in zip(spec.classes, *spec.count(labels), strict=True)
    )
    return f"the findings are {', '.join(told)}"


def _explain_one_class(found: Sequence[Found], names: Sequence[str], *, where: str) -> str:
    if not names:
        return f"{where} has no labels"
    return (
        f"{where} has one class alone, {names[0]!r} ({found[0].place}): it takes two or more, such "
        "as NORMAL and PNEUMONIA; images of one class to evaluate on need --labels.names='A|B' "
        "with all classes of the model"
    )


def _negative_of(
    names: Sequence[str], config: Labels, *, where: str, is_ordered: bool
) -> str | None:
    """The first class. None: there are three or more, of which none is called like a negative."""
    if config.negative:
        own = [name for name in names if folded(name) == folded(config.negative)]
        if not own:
            raise SourceError(
                f"labels.negative = {config.negative!r} is no class of {where}, which has "
                f"{', '.join(names)}{nearest_name(config.negative, names)}"
            )
        return own[0]
    if is_ordered:
        return names[0]
    negative = [name for name in names if is_negative_word(name)]
    if len(negative) > 1:
        raise SourceError(
            f"{where} has the classes {' and '.join(map(repr, negative))}, which mean the same: "
            "make them one, or say by --labels.negative which one is not looked for"
        )
    if not negative and len(names) == 2:
        raise SourceError(
            f"{where} has the classes {names[0]!r} and {names[1]!r}: say which one is not looked "
            f"for, by --labels.negative={_quoted(names[0])} or ={_quoted(names[1])}; it is known "
            "if one is called normal, no finding, negative, healthy or control"
        )
    return negative[0] if negative else None


def _refuse_doubtful(found: Sequence[Found], *, where: str) -> None:
    """Raise `SourceError` for a name that is likely a mistake."""
    if len(found) > MAX_CLASSES:
        shown = ", ".join(repr(each.name) for each in found[:_SHOWN])
        raise SourceError(
            f"{where} has {len(found)} classes, more than {MAX_CLASSES}, such as {shown}: if they "
            "are patients or parts, say by a table (--labels FILE.csv) what each image is"
        )
    if len(found) > 1 and all(_PARTS.fullmatch(folded(each.name)) for each in found):
        raise SourceError(
            f"{where} has the folders {found[0].name!r} and {found[1].name!r}, which look like "
            f"parts or patients and not like classes: say by a table (--labels FILE.csv) what each "
            f"image is; {_SAY_SO}"
        )
    for one, other in _alike(found):
        own = f"the class {other.name!r} ({other.place})"
        words = f"looks like a copy or a part of {own}"
        if separated(one.name) == separated(other.name):
            words = f"differs from {own} only in spaces, hyphens or underscores"
        raise SourceError(
            f"{one.place}: {one.name!r} {words}: make them one, or move it away; {_SAY_SO}"
        )
    largest = max(each.num_images for each in found)
    for each in found:
        few = each.num_images < _FEW_IMAGES
        if few and (near := _more_frequent_namesake(each, found)):
            raise SourceError(
                f"{each.place}: {each.name!r} has {counted(each.num_images, 'image')}; "
                f"did you mean {near}? {_SAY_SO}"
            )
        is_usual = folded(each.name) in map(folded, CLASSES)
        if few and not is_usual and each.num_images < _SMALL_SHARE * largest:
            raise SourceError(
                f"{each.place}: {each.name!r} would be a class of "
                f"{counted(each.num_images, 'image')} beside one of "
                f"{largest}: a misspelling, or a folder that is no class? {_SAY_SO}"
            )


def _alike(found: Sequence[Found]) -> Iterator[tuple[Found, Found]]:
    """Pairs of which the first is the second with `(1)`, `_old` or the like appended; or the two
    differ only in how their words are separated.
    """
    by_own: Mapping[str, Found] = {separated(each.name): each for each in found}
    seen: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        own = separated(each.name)
        if seen[own]:
            yield each, seen[own][0]
        seen[own].append(each)
        base = own
        while (shorter := _APPENDED.sub("", base)) != base and shorter:
            base = shorter
            if base in by_own:
                yield each, by_own[base]


def separated(name: str) -> str:
    """A name as it compares with others, however case and separators of its words differ."""
    return re.sub(r"[\s_-]+", " ", folded(name))


def _are_opposed(one: str, other: str) -> bool:
    """Whether two names differ in their grade, or one is the other with a negation in front."""
    first, second = sorted((separated(one), separated(other)), key=len)
    if first == second:
        return False
    if _GRADES.sub("#", first) == _GRADES.sub("#", second):
        return True
    front = second.removesuffix(first).strip(" ")
    return front in _NEGATIONS and second.endswith(first)


def _more_frequent_namesake(each: Found, found: Sequence[Found]) -> str:
    """The most similar name that more images have; "" where there is none."""
    usual = [folded(name) for name in CLASSES]
    others = {
        folded(other.name): other.name
        for other in found
        if other.num_images > each.num_images
        or (folded(other.name) in usual and folded(each.name) not in usual)
    }
    others = {own: name for own, name in others.items() if not _are_opposed(each.name, name)}
    others.pop(folded(each.name), None)
    near = difflib.get_close_matches(folded(each.name), others, n=1, cutoff=_SIMILAR)
    return others[near[0]] if near else ""


def _quoted(name: str) -> str:
    return f"'{name}'" if re.search(r"[^\w.-]", name) else name
