"""Labels from a table: `--labels FILE.csv` gives the label of each file, in place of class folders.

Columns `path` and what the image shows: `label`, a class; `findings`, names joined by `|`; or a
column for each finding. `patient`, `split`, `subtype` and `group` where they are known, each filled
in every row or in none (except `subtype`). Every mistake in the table is found and named by its
line before any image is read. Patients are kept as keyed hashes, since tables may hold their names.
"""

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xrai.config import Labels
from xrai.dataset.rows import Names, NamesBuilder, PatientsBuilder, Rows, Texts
from xrai.dataset.shards import SPLITS
from xrai.errors import SourceError
from xrai.ingest import findings
from xrai.ingest.classes import (
    NAME_CLASSES,
    NAME_FINDINGS,
    Found,
    check_name,
    explain_classes,
    explain_findings,
    is_negative_word,
    make_spec,
    nearest_name,
    places_of,
    split_names,
)
from xrai.ingest.columns import OPTIONAL, refuse_misnamed
from xrai.ingest.folders import SPLIT_NAMES
from xrai.ingest.label_rows import LabelRow, LabelRows, LabelRowsBuilder, column_of, in_order
from xrai.ingest.layout import SUBTYPES, Layout, are_numbers, by_target, name_patient, refuse_faulty
from xrai.ingest.listed import TextIndex
from xrai.ingest.patients import PatientKey, loose_identifier, normal_identifier
from xrai.ingest.records import explain_header, read_records, read_text, refuse, shown
from xrai.labels import LabelSpec, folded
from xrai.log import counted, get_logger

_TOLD = (("path", "label"), OPTIONAL)  # columns that are needed and others, for messages
WANTED: Final = "a CSV file with the columns path and label, or path and findings"
_FROM_ROOT = re.compile(r"(\w+:)?[/\\]")  # "/films/a.png", "C:\films\a.png", "s3://films/a.png"
_GROUP = re.compile(r"[\w.-]{1,40}")
_SUBTYPE = re.compile(r"[\w .-]{1,40}")
_DEFAULTS = Labels()
_logger = get_logger(__name__)

_NUMBERED = (
    "one name such as IM-0001-0001 is in several folders: such names seem to number images, as in "
    "what DICOM viewers export, so each of these files counts as a patient of its own, but for "
    "those with a PatientID; if some are of one patient, add a column patient"
)


@dataclass(frozen=True)
class LabelTable:
    """The whole table; not yet compared with a source."""

    name: str  # for people
    labels: Sequence[LabelRow]
    findings: tuple[str, ...] = ()  # empty: its rows have a cell `label`, a class
    num_unused: int = 0  # images that it names and leaves out, such as lateral ones
    notes: tuple[str, ...] = ()  # what people should know, a sentence each
    tail_parts: int = 0  # of a path, from its end, that say which file is meant; 0: all of it
    classes: tuple[str, ...] = ()  # in order, where the layout knows them
    has_target: bool = False  # whether its labels are those of labels.target already


def read_labels(uri: str, config: Labels = _DEFAULTS) -> LabelTable:
    """Read a CSV file, at a path or s3:// address.

    UTF-8, with or without a byte order mark; commas, semicolons (as Excel writes them in many
    countries) or tabs between cells, also after a first line `sep=;`; columns in any order and
    case; unknown ones are skipped with a note. Raises `SourceError` where there is no such file or
    it is no such table.
    """
    name, text = read_text(uri, wanted=WANTED)
    return parse_labels(text, name=name, config=config)


def parse_labels(text: str, *, name: str, config: Labels = _DEFAULTS) -> LabelTable:
    """The rows of a table's text; `name` is for messages. Raises `SourceError` naming lines."""
    rows = read_records(text, name=name, required=("path",), told=_TOLD)
    _, header = next(rows)
    columns = [cell.strip().lower() for cell in header]
    known = {
        column: columns.index(column)
        for column in ("path", "label", findings.COLUMN, *OPTIONAL)
        if column in columns
    }
    twice = sorted(column for column in known if columns.count(column) > 1)
    if twice:
        raise SourceError(f"{name} has two columns {twice[0]!r}; leave one")
    if "label" in known and findings.COLUMN in known:
        raise SourceError(f"{name} has the columns label and findings; leave one")
    records = _Records(text, name)
    records.check(header)
    found: dict[str, int] = {}
    negative: dict[str, int] = {}
    if "label" not in known and findings.COLUMN not in known:
        mostly = findings.mostly_findings((cells for _, cells in records), len(header))
        found = findings.find_columns(header, mostly, config, name=name, known=known)
        if not found:
            first = next(line for line in text.splitlines() if "path" in line.lower())
            words = explain_header(name, first, columns, ("path", "label"), OPTIONAL)
            hints = findings.explain_unused(header, records, known.values())
            raise SourceError("; ".join([words, *islice(hints, 1)]))
        negative = findings.find_negative_columns(header, mostly, found)
    used = {*known.values(), *found.values(), *negative.values()}
    cells = (cells for _, cells in records)
    refuse_misnamed(header, cells, known=known, used=used, name=name)
    if unused := [shown(cell.strip()) for k, cell in enumerate(header) if k not in used]:
        words = counted(len(unused), "column", "are").removeprefix("1 ")
        _logger.info("%s: %s not used: %s", name, words, ", ".join(unused))
    labels = _read(records, known, (found, negative), config)
    if not labels:
        raise SourceError(f"{name} has no rows below its first line")
    if found:
        notes = () if config.names else findings.explain_unused(header, records, used)
        told = tuple(f"{name}: {note}" for note in notes)
        return LabelTable(name, labels, tuple(found), notes=told)
    if findings.COLUMN in known:
        return _with_names(labels, config, name=name)
    return LabelTable(name, labels)


@dataclass(frozen=True)
class _Records:
    """The rows of a table below its header, with their lines: read anew each time, not held."""

    text: str
    name: str

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        return islice(read_records(self.text, name=self.name, required=("path",)), 1, None)

    def check(self, header: Sequence[str]) -> None:
        """Raise `SourceError` that names the lines with more or fewer cells than the header."""
        faults = [
            (line, f"has {len(cells)} cells, the first line {len(header)}")
            for line, cells in self
            if len(cells) != len(header)
        ]
        _refuse_lines(faults, name=self.name)


def _spec_of(
    labels: Sequence[LabelRow], table: LabelTable, config: Labels
) -> tuple[LabelSpec, str, str]:
    """What the labels are, in words, too; and what to do about it, empty where it was chosen."""
    if table.findings:
        spec = LabelSpec("multilabel", table.findings)
        values = (
            labels.findings
            if isinstance(labels, LabelRows)
            else spec.array([label.findings for label in labels])
        )
        is_chosen = bool(config.names or config.layout)
        return spec, explain_findings(spec, values), "" if is_chosen else NAME_FINDINGS
    found = _found_classes(labels, table)
    own = replace(config, names=config.names or "|".join(table.classes))
    spec = make_spec(found, own, where=table.name)
    told = "" if spec.is_public else explain_classes(found, spec)
    return spec, told, "" if own.names else NAME_CLASSES


def _read(
    records: _Records,
    known: Mapping[str, int],
    columns: tuple[Mapping[str, int], Mapping[str, int]],
    config: Labels,
) -> LabelRows:
    """The rows in columns. `columns` are those of findings, and those of "No finding". Raises
    `SourceError` naming lines.
    """
    found, negative = columns
    policy = findings.policy_of(config)
    builder = LabelRowsBuilder(known, num_findings=len(found))
    faults = []
    for line, record in records:
        values: tuple[int, ...] = ()
        if found:
            values, fault = findings.values_of(record, found, policy, negative)
            if fault:
                faults.append((line, fault))
                continue
        cells = {column: record[k].strip() for column, k in known.items()}
        cells["path"] = record[known["path"]]
        builder.append(line, cells, values)
    _refuse_lines(faults, name=records.name)
    return builder.finish()


def lay_out_by_labels(
    paths: Iterable[str],
    table: LabelTable,
    *,
    source: str,
    key: PatientKey,
    config: Labels = _DEFAULTS,
) -> Layout:
    """The layout that a table gives to a source's paths; `source` names it in messages.

    Files that the table does not name are counted, but are not data. Paths may be written with
    backslashes, be those of another machine, or lack the first folders; see `_match`. Raises
    `SourceError` naming the lines of the table with a path that repeats, does not exist, fits
    several files or is outside of the source, a label that is unknown or doubtful (`make_spec`), an
    unknown split or subtype, a patient in two splits, or an empty cell.
    """
    files = paths if isinstance(paths, Texts) else Texts.of(sorted({*paths}))
    notes: tuple[str, ...] = ()
    if table.tail_parts:
        matched = _match_tails(table, files)
    else:
        matched, notes = _match(table, files, source=source)
    if config.missing == "skip":
        matched, skipped = _without_missing(matched, table=table, source=source)
        notes = (*notes, *skipped)
    _refuse_faulty_rows(matched, table=table, source=source, config=config)
    spec, told, hint = _spec_of(matched.labels, table, config)
    if told and hint:
        notes, told = (*notes, f"{told}: {hint}"), ""
    refuse_faulty(spec, source=source)
    has_numbers = False
    if any(column_of(matched.labels, "patient")):
        notes = (*notes, *_note_alike(matched.labels, name=table.name))
    else:
        apart = zip(*(column_of(matched.labels, name) for name in ("group", "split")), strict=True)
        paths = (path for _, path, _ in matched)
        if has_numbers := are_numbers(zip(apart, paths, strict=True)):
            notes = (*notes, _NUMBERED)
    rows = _rows(matched, spec, key, has_numbers=has_numbers)
    num_others = len(files) - len(rows)
    num_unused = min(table.num_unused, num_others)
    counts = {
        f"not named by {table.name}": num_others - num_unused,
        f"of views that {table.name} names and labels.views leaves out": num_unused,
    }
    not_data = {words: count for words, count in counts.items() if count}
    facts = (told,) if told else ()
    layout = Layout(rows, not_data, (*table.notes, *notes), spec, facts)
    return layout if table.has_target else by_target(layout, config, source=table.name)


def _with_names(labels: LabelRows, config: Labels, *, name: str) -> LabelTable:
    """A table with one column of names joined by `|`. Raises `SourceError` naming lines."""
    policy = findings.policy_of(config)
    column = labels.cells[findings.COLUMN]
    assert isinstance(column, Names)
    # The values are in the order of their codes
    _, first_rows, nums = np.unique(column.codes, return_index=True, return_counts=True)
    stated: list[dict[str, int]] = []  # by value
    found: dict[str, Found] = {}  # by folded name
    faults: list[tuple[int, str]] = []
    for code, cell in enumerate(column.values):
        if not cell and config.blank != "auto":
            stated.append({})
            continue
        said, fault = findings.split_cell(cell)
        stated.append(said)
        if fault:
            hint = "" if cell else ", or say by --labels.blank what an empty cell means"
            lines = labels.lines[column.codes == code].tolist()
            faults += [(line, fault + hint) for line in lines]
        for each in said:
            place = f"line {labels.lines[first_rows[code]]}"
            own = found.setdefault(folded(each), Found(each, 0, place))
            num_images = own.num_images + int(nums[code])
            found[folded(each)] = replace(own, num_images=num_images)
    _refuse_lines(sorted(faults), name=name)
    names = _names_of(found, config, name=name)
    places = {folded(each): place for place, each in enumerate(names)}
    values = np.array([findings.to_values(said, places, policy) for said in stated], np.int8)
    values[[not cell for cell in column.values]] = policy.blank
    left_out = findings.explain_left_out(found, names)
    notes = (f"{name}: {left_out}",) if left_out else ()
    return LabelTable(name, labels.with_findings(values[column.codes]), names, notes=notes)


def _names_of(found: Mapping[str, Found], config: Labels, *, name: str) -> tuple[str, ...]:
    """The findings of a table: those of `labels.names`, else the ones `found`. Raises
    `SourceError`.
    """
    wanted = split_names(config.names)
    for each in found.values():
        check_name(each.name, "multilabel", where=f"{name}, {each.place},")
    findings.refuse_doubtful(found, wanted, name=name)
    for one in wanted:
        if folded(one) not in found:
            own = (each.name for each in found.values())
            raise SourceError(
                f"{name} has no finding {one!r} of labels.names{nearest_name(one, own)}"
            )
    names = wanted or tuple(found[own].name for own in sorted(found))
    if not names:
        raise SourceError(f"{name} states no finding in its column findings")
    return names


@dataclass(frozen=True, eq=False)
class _Matched:
    """A table's rows and the files that they mean. Iterating gives rows, the path and its place."""

    labels: Sequence[LabelRow]
    files: Texts
    places: NDArray[np.int32]  # (N,), in `files`; -1 where there is no such file
    prefix: tuple[str, ...] | None = None  # the folders that whole paths begin with; None: unknown

    def __iter__(self) -> Iterator[tuple[LabelRow, str, int]]:
        for label, place in zip(self.labels, self.places.data, strict=True):
            yield label, label.cells["path"] if place < 0 else self.files[place], place

    def take(self, where: NDArray[np.bool_]) -> "_Matched":
        """The rows of a mask."""
        numbers = np.flatnonzero(where)
        labels = self.labels
        if isinstance(labels, LabelRows):
            labels = labels.take(numbers)
        else:
            labels = [labels[number] for number in numbers.tolist()]
        return replace(self, labels=labels, places=self.places[numbers])


def _found_classes(labels: Sequence[LabelRow], table: LabelTable) -> list[Found]:
    firsts: dict[str, int] = {}  # rows
    num_rows: Counter[str] = Counter()
    for number, name in enumerate(column_of(labels, "label")):
        num_rows[name] += 1
        firsts.setdefault(name, number)
    counts: Counter[str] = Counter()
    first: dict[str, LabelRow] = {}
    for name, number in firsts.items():
        counts[own := folded(name)] += num_rows[name]
        first.setdefault(own, labels[number])
    return [
        Found(
            label.cells["label"],
            counts[own],
            label.place if label.table else f"{table.name}, {label.place}",
        )
        for own, label in first.items()
    ]


def _match(table: LabelTable, files: Texts, *, source: str) -> tuple[_Matched, tuple[str, ...]]:
    """The table's rows with the files that they mean, and a note.

    A path that begins at a root, or with the source's name, is tried without its first folders,
    the same ones in all rows. Any other that is no file is the end of the path of one file. The
    case of letters, and how accents are composed, does not matter there.
    """
    exact = TextIndex(files)
    texts = column_of(table.labels, "path")
    places = np.fromiter((next(exact.places(t), -1) for t in texts), np.int32, len(table.labels))
    del exact
    if (places >= 0).all():
        return _Matched(table.labels, files, places), ()
    whole = TextIndex(files, _folded)
    by_end = functools.cache(lambda num: TextIndex(files, functools.partial(_end, num_parts=num)))
    own_name = _folded(source.rpartition("/")[2].removesuffix(".zip"))
    faults: list[tuple[str, str]] = []
    prefix: list[str] | None = None
    num_ends = 0
    for number in np.flatnonzero(places < 0):
        label = table.labels[int(number)]
        text = label.cells["path"]
        parts = _parts(text)
        if not parts or ".." in parts:
            continue
        has_root = _FROM_ROOT.match(text.strip()) is not None
        if has_root or (parts[0] == own_name and "/".join(parts) not in whole):
            cuts = range(len(parts)) if prefix is None else [len(prefix)]
            rests = ((cut, "/".join(parts[cut:])) for cut in cuts)
            cut, path = next(((cut, rest) for cut, rest in rests if rest in whole), (0, ""))
            fitting = [*whole.places(path)] if path and prefix in (None, parts[:cut]) else []
            prefix = parts[:cut] if fitting else prefix
        else:
            end = "/".join(parts)
            fitting = [*whole.places(end)]
            if not fitting:
                fitting = [*by_end(len(parts)).places(end)]
                num_ends += len(fitting) == 1
        if len(fitting) == 1:
            places[number] = fitting[0]
        elif fitting:
            faults.append((label.place, _explain_several(text, fitting, files)))
    refuse(faults, name=table.name)
    if num_ends:
        words = counted(num_ends, "path", "are")
        _logger.info("%s: %s matched by the end", table.name, words)
    if prefix is None:
        return _Matched(table.labels, files, places), ()
    note = f"the paths of {table.name} begin with {'/'.join(prefix)}/, taken as the source"
    return _Matched(table.labels, files, places, tuple(prefix)), (note,)


def _parts(path: str) -> list[str]:
    """The folders and the name of a path, folded."""
    return [part for part in re.split(r"[/\\]", _folded(path.strip())) if part not in ("", ".")]


def _is_outside(path: str, prefix: tuple[str, ...] | None) -> bool:
    """Whether a path leaves the source, whose whole paths begin with the folders `prefix`."""
    parts = _parts(path)
    if ".." in parts:
        return True
    is_inside = prefix is not None and tuple(parts[: len(prefix)]) == prefix
    return _FROM_ROOT.match(path.strip()) is not None and not is_inside


def _end(path: str, num_parts: int) -> str:
    return "/".join(_folded(path).split("/")[-num_parts:])


def _explain_several(text: str, fitting: Sequence[int], files: Texts) -> str:
    two = ", ".join(shown(files[place]) for place in fitting[:2])
    return f"{len(fitting)} files fit path {shown(text)}: {two}"


def _match_tails(table: LabelTable, files: Texts) -> _Matched:
    """The rows of a layout's table with the files that they mean: those whose paths end alike, with
    any suffix, and of several the one in a folder of the row's split.
    """
    whole = TextIndex(files, lambda path: tail_of(path, table.tail_parts))
    stems = TextIndex(files, lambda path: stem_of(tail_of(path, table.tail_parts)))
    faults: list[tuple[str, str]] = []
    places = np.full(len(table.labels), -1, np.int32)
    for number, label in enumerate(table.labels):
        text = label.cells["path"]
        tail = tail_of(text, table.tail_parts)
        fitting = sorted({*whole.places(tail), *stems.places(tail)})
        if not fitting and (stem := stem_of(tail)):
            fitting = sorted({*whole.places(stem), *stems.places(stem)})
        if len(fitting) > 1:
            split = _split_of(label.cells)
            inside = [
                place for place in fitting if split in map(_split_named, files[place].split("/"))
            ]
            fitting = inside or fitting
        if len(fitting) > 1:
            faults.append((label.place, _explain_several(text, fitting, files)))
        if fitting:
            places[number] = fitting[0]
    refuse(faults, name=table.name)
    return _Matched(table.labels, files, places)


def tail_of(path: str, num_parts: int) -> str:
    """The last parts of a path, folded, as `LabelTable.tail_parts` compares them."""
    return "/".join(re.split(r"[/\\]", _folded(path))[-num_parts:])


def stem_of(tail: str) -> str:
    """A tail without its suffix; "" for one that has none or nothing else, such as `.DS_Store`."""
    stem, _, suffix = tail.rpartition(".")
    return "" if "/" in suffix or stem.endswith("/") else stem


def _without_missing(
    matched: _Matched, *, table: LabelTable, source: str
) -> tuple[_Matched, Sequence[str]]:
    """The rows whose files are there, and a note. Raises `SourceError` where none is."""
    is_there = matched.places >= 0
    num_missing = len(is_there) - int(is_there.sum())
    if not is_there.any():
        words = f"{counted(num_missing, 'file')} that {table.name} names, none of which"
        raise SourceError(f"{words} is in {source}")
    if not num_missing:
        return matched, ()
    return matched.take(is_there), [
        f"{counted(num_missing, 'file')} that {table.name} names and {source} lacks: skipped, as "
        "labels.missing says"
    ]


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _refuse_faulty_rows(
    matched: _Matched, *, table: LabelTable, source: str, config: Labels
) -> None:
    """Raise `SourceError` naming the lines with mistakes."""
    filled = {column for column in OPTIONAL if any(column_of(matched.labels, column))}
    check = functools.partial(_faults, filled=filled, config=config)
    faults = []
    for number, (label, path, place) in enumerate(matched):
        told = [*check({**label.cells, "path": path})]
        if path.strip() and place < 0:
            is_outside = _is_outside(path, matched.prefix)
            leaves = f"path {shown(path)} leaves the source"
            told.append(leaves if is_outside else f"there is no file {shown(path)} in {source}")
        faults += [(number, label.place, words) for words in told]
    faults += _repeated(matched)
    faults += _in_two_splits(matched.labels)
    faults.sort(key=lambda fault: fault[0])
    refuse([(place, words) for _, place, words in faults], name=table.name)


def _faults(cells: Mapping[str, str], *, filled: Collection[str], config: Labels) -> Iterator[str]:
    label, split = cells.get("label", ""), cells.get("split")
    for column in ("path", "label", *OPTIONAL):
        must_be_filled = column in filled and column != "subtype"
        if column in ("path", "label"):
            must_be_filled = column in cells
        if must_be_filled and not cells[column].strip():
            yield f"{column} is empty"
    names = split_names(config.names) if config.names and label else ()
    if names and folded(label) not in map(folded, names):
        hint = nearest_name(label, names)
        yield f"unknown label {shown(label)}, allowed are {', '.join(names)}{hint}"
    if split and split.lower() not in SPLIT_NAMES:
        hint = nearest_name(split, SPLIT_NAMES)
        yield f"unknown split {shown(split)}, allowed are {', '.join(SPLITS)}{hint}"
    if cells.get("subtype") and is_negative_word(label):
        yield f"a subtype is given to an image of class {shown(label)}"
    for column, pattern in (("group", _GROUP), ("subtype", _SUBTYPE)):
        if cells.get(column) and not pattern.fullmatch(cells[column]):
            allowed = "1 to 40 letters, digits, dots, hyphens or underscores"
            yield f"{column} {shown(cells[column])} is not {allowed}"


def _repeated(matched: _Matched) -> Iterator[tuple[int, str, str]]:
    """Paths that appear twice."""
    labels, first = matched.labels, np.full(len(matched.files), -1, np.int32)  # rows
    missing: dict[str, int] = {}
    for number, place in enumerate(matched.places.data):
        if place < 0:
            before = missing.setdefault(labels[number].cells["path"], number)
        elif (before := int(first[place])) < 0:
            first[place] = before = number
        if before != number:
            label, other = labels[number], labels[before]
            own, others = (
                (folded(each.cells.get("label", "")), each.findings) for each in (label, other)
            )
            differs = "" if own == others else ", with another label"
            path = label.cells["path"] if place < 0 else matched.files[place]
            yield number, label.place, f"path {shown(path)} is in {other.place}, too{differs}"


def _in_two_splits(labels: Sequence[LabelRow]) -> Iterator[tuple[int, str, str]]:
    """Patients in two splits; they are not named."""
    numbers = {split: number for number, split in enumerate(("", *SPLITS))}
    hashes = np.zeros(len(labels), np.int64)
    splits = np.zeros(len(labels), np.int8)
    columns = (column_of(labels, column) for column in ("group", "patient", "split"))
    for number, (group, patient, text) in enumerate(zip(*columns, strict=True)):
        if patient and (split := _split_named(text)):
            hashes[number] = hash((group, normal_identifier(patient)))
            splits[number] = numbers[split]
    order = np.flatnonzero(splits)
    order = order[np.argsort(hashes[order], kind="stable")]
    is_other = splits[order[1:]] != splits[order[:-1]]
    doubtful = hashes[order[1:]][is_other & (hashes[order[1:]] == hashes[order[:-1]])]
    if not len(doubtful):
        return
    places: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for number in np.flatnonzero(np.isin(hashes, doubtful) & (splits > 0)).tolist():
        label = labels[number]
        split, own = _split_of(label.cells), places[_patient_of(label)]
        if split not in own and own:
            known, place = next(iter(own.items()))
            yield number, label.place, f"a patient in {split} who is in {known} in {place}"
        own.setdefault(split, label.place)


def _patient_of(row: LabelRow) -> tuple[str, str]:
    return row.cells.get("group", ""), normal_identifier(row.cells["patient"])


def _note_alike(labels: Sequence[LabelRow], *, name: str) -> Iterator[str]:
    """A sentence where patients differ only in ways that are likely mistakes; none is named."""
    nums = []
    for form in (normal_identifier, loose_identifier):
        pairs = zip(column_of(labels, "group"), column_of(labels, "patient"), strict=True)
        hashes = (hash((group, form(patient))) for group, patient in pairs)
        nums.append(len(np.unique(np.fromiter(hashes, np.int64, len(labels)))))
    if num_alike := nums[0] - nums[1]:
        yield (
            f"identifiers of patients in {name} differ only in case or in .0 at the end "
            f"({num_alike}), and count as different people: if they are not, write each in one way"
        )


def _refuse_lines(faults: Sequence[tuple[int, str]], *, name: str) -> None:
    refuse([(f"line {line}", words) for line, words in faults], name=name)


def _rows(matched: _Matched, spec: LabelSpec, key: PatientKey, *, has_numbers: bool) -> Rows:
    """The rows of a data set, sorted by path; `has_numbers` is that of `name_patient`."""
    classes = places_of(spec)
    order = np.argsort(matched.places, kind="stable").astype(np.int32)
    files = matched.files
    if len(order) != len(files):
        files = files.take(matched.places[order])
    values = spec.empty(len(order))
    patients, subtypes, splits = PatientsBuilder(), NamesBuilder(), NamesBuilder()
    ordered = in_order(matched.labels, order)
    for number, (path, row) in enumerate(zip(files, ordered, strict=True)):
        values[number] = row.findings or classes[folded(row.cells["label"])]
        patients.append(path, _patient_key(row, path, key, has_numbers=has_numbers))
        subtype = row.cells.get("subtype", "").lower()
        subtypes.append(SUBTYPES.get(subtype, subtype))
        splits.append(_split_of(row.cells) or "train")
    del ordered, order
    known = patients.finish(files, is_sorted=True)
    return Rows.unread(files, values, known, subtypes.finish(), splits.finish())


def _patient_key(row: LabelRow, path: str, key: PatientKey, *, has_numbers: bool) -> str:
    group = row.cells.get("group", "")
    if identifier := row.cells.get("patient"):
        return key.hash(identifier, group=group or "patient")
    return name_patient(path, group=group, has_numbers=has_numbers)


def _split_of(cells: Mapping[str, str]) -> str:
    return _split_named(cells.get("split", ""))


def _split_named(name: str) -> str:
    return SPLIT_NAMES.get(name.lower(), "")
