"""Labels from a table: `--labels FILE.csv` gives the label of each file, in place of class folders.

Columns `path` and what the image shows: `label`, a class; `findings`, names joined by `|`; or a
column for each finding. `patient`, `split`, `subtype` and `group` where they are known, each filled
in every row or in none (except `subtype`). Every mistake in the table is found and named by its
line before any image is read. Patients are kept as keyed hashes, since tables may hold their names.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from xrai.config import Labels
from xrai.dataset.manifest import Row
from xrai.dataset.rows import Rows
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
from xrai.ingest.folders import SPLIT_NAMES
from xrai.ingest.layout import SUBTYPES, Layout, by_target, file_patient, refuse_faulty
from xrai.ingest.patients import PatientKey
from xrai.ingest.records import explain_header, read_records, read_text, refuse, shown
from xrai.labels import Label, LabelSpec, folded
from xrai.log import counted, get_logger

OPTIONAL: Final[Sequence[str]] = ("patient", "split", "subtype", "group")

_TOLD = (("path", "label"), OPTIONAL)  # columns that are needed and others, for messages
WANTED: Final = "a CSV file with the columns path and label, or path and findings"
_FROM_ROOT = re.compile(r"(\w+:)?[/\\]")  # "/films/a.png", "C:\films\a.png", "s3://films/a.png"
_GROUP = re.compile(r"[\w.-]{1,40}")
_SUBTYPE = re.compile(r"[\w .-]{1,40}")
_DEFAULTS = Labels()
_logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One row of a table."""

    line: int
    cells: Mapping[str, str]  # of the known columns that the table has, as they are written there
    findings: tuple[int, ...] = ()  # in the order of the table's; equal ones share one tuple
    table: str = ""  # its name, where rows of several tables stand together

    @property
    def place(self) -> str:
        """For people: "line 7"."""
        return f"{self.table}, line {self.line}" if self.table else f"line {self.line}"


@dataclass(frozen=True)
class LabelTable:
    """The whole table; not yet compared with a source."""

    name: str  # for people
    labels: tuple[LabelRow, ...]
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
    records = list(rows)
    faults = [
        (line, f"has {len(record)} cells, the first line {len(header)}")
        for line, record in records
        if len(record) != len(header)
    ]
    _refuse_lines(faults, name=name)
    found: dict[str, int] = {}
    if "label" not in known and findings.COLUMN not in known:
        cells = [record for _, record in records]
        found = findings.find_columns(header, cells, config, name=name, known=known)
        if not found:
            first = next(line for line in text.splitlines() if "path" in line.lower())
            raise SourceError(
                explain_header(name, first, columns, required=("path", "label"), optional=OPTIONAL)
            )
    negative: dict[str, int] = {}
    if found:
        negative = findings.find_negative_columns(header, [cells for _, cells in records], found)
    used = {*known.values(), *found.values(), *negative.values()}
    if unused := [shown(cell.strip()) for k, cell in enumerate(header) if k not in used]:
        words = counted(len(unused), "column", "are").removeprefix("1 ")
        _logger.info("%s: %s not used: %s", name, words, ", ".join(unused))
    if not records:
        raise SourceError(f"{name} has no rows below its first line")
    cells_of = {
        line: {
            column: record[k] if column == "path" else record[k].strip()
            for column, k in known.items()
        }
        for line, record in records
    }
    if found:
        notes = () if config.names else findings.explain_unused(header, records, used)
        table = _with_columns(records, cells_of, (found, negative), config, name=name)
        return replace(table, notes=tuple(f"{name}: {note}" for note in notes))
    if findings.COLUMN in known:
        return _with_names(cells_of, config, name=name)
    return LabelTable(name, tuple(LabelRow(line, cells) for line, cells in cells_of.items()))


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
    held = set(paths)
    notes: tuple[str, ...] = ()
    if table.tail_parts:
        labels = _match_tails(table, held)
    else:
        labels, notes = _match(table, held, source=source)
    if config.missing == "skip":
        labels, skipped = _without_missing(labels, held, table=table, source=source)
        notes = (*notes, *skipped)
    filled = {column for column in OPTIONAL if any(label.cells.get(column) for label in labels)}
    faults = [
        (number, label.place, words)
        for number, label in enumerate(labels)
        for words in _faults(label.cells, filled, held, source=source, config=config)
    ]
    faults = sorted([*faults, *_repeated(labels)], key=lambda fault: fault[0])
    refuse([(place, words) for _, place, words in faults], name=table.name)
    if table.findings:
        spec = LabelSpec("multilabel", table.findings)
        told = explain_findings(spec, spec.array([label.findings for label in labels]))
        is_chosen = bool(config.names or config.layout)
    else:
        found = _found_classes(labels, table)
        own = replace(config, names=config.names or "|".join(table.classes))
        spec = make_spec(found, own, where=table.name)
        told = "" if spec.is_public else explain_classes(found, spec)
        is_chosen = bool(own.names)
    if told and not is_chosen:
        hint = NAME_FINDINGS if table.findings else NAME_CLASSES
        notes, told = (*notes, f"{told}: {hint}"), ""
    refuse_faulty(spec, source=source)
    places = places_of(spec)
    ordered = sorted(labels, key=lambda label: label.cells["path"])
    rows = Rows.of((_row(label, places, key) for label in ordered), spec)
    num_others = len(held) - len(rows)
    num_unused = min(table.num_unused, num_others)
    counts = {
        f"not named by {table.name}": num_others - num_unused,
        f"of views that {table.name} names and labels.views leaves out": num_unused,
    }
    not_data = {words: count for words, count in counts.items() if count}
    facts = (told,) if told else ()
    layout = Layout(rows, not_data, (*table.notes, *notes), spec, facts)
    return layout if table.has_target else by_target(layout, config, source=table.name)


def _with_columns(
    records: Sequence[tuple[int, Sequence[str]]],
    cells_of: Mapping[int, Mapping[str, str]],
    columns: tuple[Mapping[str, int], Mapping[str, int]],
    config: Labels,
    *,
    name: str,
) -> LabelTable:
    """A table with a column for each finding; `columns` are theirs, and those of "No finding".
    Raises `SourceError` naming lines.
    """
    policy = findings.policy_of(config)
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    faults, labels = [], []
    for line, record in records:
        values, fault = findings.values_of(record, columns[0], policy, columns[1])
        if fault:
            faults.append((line, fault))
        labels.append(LabelRow(line, cells_of[line], shared.setdefault(values, values)))
    _refuse_lines(faults, name=name)
    return LabelTable(name, tuple(labels), tuple(columns[0]))


def _with_names(
    cells_of: Mapping[int, Mapping[str, str]], config: Labels, *, name: str
) -> LabelTable:
    """A table with one column of names joined by `|`. Raises `SourceError` naming lines."""
    policy = findings.policy_of(config)
    stated: dict[int, dict[str, int]] = {}
    first: dict[str, tuple[str, int]] = {}  # folded finding -> as first written, line
    counts: Counter[str] = Counter()
    faults = []
    for line, cells in cells_of.items():
        cell = cells[findings.COLUMN]
        if not cell and config.blank != "auto":
            stated[line] = {}
            continue
        stated[line], fault = findings.split_cell(cell)
        if fault:
            hint = "" if cell else ", or say by --labels.blank what an empty cell means"
            faults.append((line, fault + hint))
        for each in stated[line]:
            first.setdefault(folded(each), (each, line))
            counts[folded(each)] += 1
    _refuse_lines(faults, name=name)
    names = split_names(config.names)
    if not names:
        names = tuple(each for _, (each, _) in sorted(first.items()))
    for written, line in first.values():
        check_name(written, "multilabel", where=f"{name}, line {line},")
    for each in names:
        if config.names and folded(each) not in first:
            own = (written for written, _ in first.values())
            raise SourceError(
                f"{name} has no finding {each!r} of labels.names{nearest_name(each, own)}"
            )
    if not names:
        raise SourceError(f"{name} states no finding in its column findings")
    places = {folded(each): place for place, each in enumerate(names)}
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    labels = []
    for line, said in stated.items():
        values = findings.to_values(said, places, policy)
        if not cells_of[line][findings.COLUMN]:
            values = (policy.blank,) * len(names)
        labels.append(LabelRow(line, cells_of[line], shared.setdefault(values, values)))
    return LabelTable(name, tuple(labels), names)


def _found_classes(labels: Sequence[LabelRow], table: LabelTable) -> list[Found]:
    counts: Counter[str] = Counter()
    first: dict[str, LabelRow] = {}
    for label in labels:
        counts[own := folded(label.cells["label"])] += 1
        first.setdefault(own, label)
    return [
        Found(
            label.cells["label"],
            counts[own],
            label.place if label.table else f"{table.name}, {label.place}",
        )
        for own, label in first.items()
    ]


def _match(
    table: LabelTable, held: Collection[str], *, source: str
) -> tuple[Sequence[LabelRow], tuple[str, ...]]:
    """The table's rows with the paths of the files that they mean, and a note.

    A path that begins at a root, or with the source's name, is tried without its first folders,
    the same ones in all rows. Any other that is no file is the end of the path of one file. The
    case of letters, and how accents are composed, does not matter there.
    """
    labels = table.labels
    texts = {label.cells["path"] for label in labels}.difference(held)
    files: dict[str, list[str]] = defaultdict(list)
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in held if texts else ():
        files[_folded(path)].append(path)
        by_name[_folded(path.rpartition("/")[2])].append(path)
    own_name = _folded(source.rpartition("/")[2].removesuffix(".zip"))
    found: dict[str, str] = {}
    faults: list[tuple[str, str]] = []
    prefix: list[str] | None = None
    num_ends = 0
    for label in labels:
        text = label.cells["path"]
        parts = [
            part for part in re.split(r"[/\\]", _folded(text.strip())) if part not in ("", ".")
        ]
        if text not in texts or text in found or not parts or ".." in parts:
            continue
        has_root = _FROM_ROOT.match(text.strip()) is not None
        if has_root or (parts[0] == own_name and "/".join(parts) not in files):
            cuts = range(len(parts)) if prefix is None else [len(prefix)]
            rests = ((cut, "/".join(parts[cut:])) for cut in cuts)
            cut, path = next(((cut, rest) for cut, rest in rests if rest in files), (0, ""))
            fitting = files[path] if path and prefix in (None, parts[:cut]) else []
            prefix = parts[:cut] if fitting else prefix
        else:
            end = "/".join(parts)
            named = by_name[parts[-1]]
            fitting = files.get(end) or [p for p in named if _folded(p).endswith(f"/{end}")]
            num_ends += end not in files
        if len(fitting) == 1:
            found[text] = fitting[0]
        elif fitting:
            two = ", ".join(map(shown, sorted(fitting)[:2]))
            faults.append((label.place, f"{len(fitting)} files fit path {shown(text)}: {two}"))
    refuse(faults, name=table.name)
    if num_ends:
        words = counted(num_ends, "path", "are")
        _logger.info("%s: %s matched by the end", table.name, words)
    note = f"the paths of {table.name} begin with {'/'.join(prefix or ())}/, taken as the source"
    if found:
        paths = ((label, found.get(path := label.cells["path"], path)) for label in labels)
        labels = tuple(replace(row, cells={**row.cells, "path": path}) for row, path in paths)
    return labels, (note,) if prefix is not None else ()


def _match_tails(table: LabelTable, held: Collection[str]) -> Sequence[LabelRow]:
    """The rows of a layout's table with the paths of the files that they mean: those whose paths
    end alike, with any suffix, and of several the one in a folder of the row's split.
    """
    files: dict[str, list[str]] = defaultdict(list)
    for path in sorted(held):
        tail = _tail(path, table.tail_parts)
        files[tail].append(path)
        files[tail.rpartition(".")[0]].append(path)
    faults: list[tuple[str, str]] = []
    labels = []
    for label in table.labels:
        text = label.cells["path"]
        tail = _tail(text, table.tail_parts)
        fitting = files.get(tail) or files.get(tail.rpartition(".")[0]) or []
        if len(fitting) > 1:
            split = _split_of(label.cells)
            inside = [path for path in fitting if split in map(_split_named, path.split("/"))]
            fitting = inside or fitting
        if len(fitting) > 1:
            two = ", ".join(map(shown, fitting[:2]))
            faults.append((label.place, f"{len(fitting)} files fit path {shown(text)}: {two}"))
        path = fitting[0] if fitting else text
        labels.append(replace(label, cells={**label.cells, "path": path}))
    refuse(faults, name=table.name)
    return labels


def _tail(path: str, num_parts: int) -> str:
    return "/".join(re.split(r"[/\\]", _folded(path))[-num_parts:])


def _without_missing(
    labels: Sequence[LabelRow], held: Collection[str], *, table: LabelTable, source: str
) -> tuple[Sequence[LabelRow], Sequence[str]]:
    """The rows whose files are there, and a note. Raises `SourceError` where none is."""
    kept = [label for label in labels if label.cells["path"] in held]
    num_missing = len(labels) - len(kept)
    if not kept:
        words = f"{counted(num_missing, 'file')} that {table.name} names, none of which"
        raise SourceError(f"{words} is in {source}")
    if not num_missing:
        return labels, ()
    return kept, [
        f"{counted(num_missing, 'file')} that {table.name} names and {source} lacks: skipped, as "
        "labels.missing says"
    ]


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _faults(
    cells: Mapping[str, str],
    filled: Collection[str],
    held: Collection[str],
    *,
    source: str,
    config: Labels,
) -> Iterator[str]:
    path, label, split = cells["path"], cells.get("label", ""), cells.get("split")
    for column in ("path", "label", *OPTIONAL):
        must_be_filled = column in filled and column != "subtype"
        if column in ("path", "label"):
            must_be_filled = column in cells
        if must_be_filled and not cells[column].strip():
            yield f"{column} is empty"
    if path.strip() and path not in held:
        if path.startswith(("/", "\\")) or ":" in path or ".." in re.split(r"[/\\]", path):
            yield f"path {shown(path)} leaves the source"
        else:
            yield f"there is no file {shown(path)} in {source}"
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


def _repeated(labels: Sequence[LabelRow]) -> Iterator[tuple[int, str, str]]:
    """Paths that appear twice, and patients in two splits; a patient is not named."""
    first: dict[str, LabelRow] = {}
    places: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for number, label in enumerate(labels):
        path = label.cells["path"]
        other = first.setdefault(path, label)
        if other is not label:
            own, others = (
                (folded(each.cells.get("label", "")), each.findings) for each in (label, other)
            )
            differs = "" if own == others else ", with another label"
            yield number, label.place, f"path {shown(path)} is in {other.place}, too{differs}"
        patient, split = label.cells.get("patient", ""), _split_of(label.cells)
        if patient and split:
            splits = places[label.cells.get("group", ""), patient]
            if split not in splits and splits:
                known, place = next(iter(splits.items()))
                words = f"a patient in {split} who is in {known} in {place}"
                yield number, label.place, words
            splits.setdefault(split, label.place)


def _refuse_lines(faults: Sequence[tuple[int, str]], *, name: str) -> None:
    refuse([(f"line {line}", words) for line, words in faults], name=name)


def _row(row: LabelRow, places: Mapping[str, int], key: PatientKey) -> Row:
    cells = row.cells
    subtype, group = cells.get("subtype", "").lower(), cells.get("group", "")
    patient = file_patient(cells["path"], group=group)
    if identifier := cells.get("patient"):
        patient = key.hash(identifier, group=group or "patient")
    label: Label = row.findings or places[folded(cells["label"])]
    return Row(
        path=cells["path"],
        sha256="",
        label=label,
        patient=patient,
        subtype=SUBTYPES.get(subtype, subtype),
        split=_split_of(cells) or "train",
    )


def _split_of(cells: Mapping[str, str]) -> str:
    return _split_named(cells.get("split", ""))


def _split_named(name: str) -> str:
    return SPLIT_NAMES.get(name.lower(), "")
