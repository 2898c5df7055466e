"""Labels from a table: `--labels FILE.csv` gives the label of each file, in place of class folders.

Columns `path` and `label`; `patient`, `split`, `subtype` and `group` where they are known, each
filled in every row or in none (except `subtype`). Every mistake in the table is found and named by
its line before any image is read. Patients are kept as keyed hashes, since tables may hold their
names.
"""

import csv
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from xrai.dataset.manifest import CLASSES
from xrai.dataset.shards import SPLITS
from xrai.errors import NotFoundError, SourceError, TooLargeError
from xrai.ingest.layout import SPLIT_NAMES, SUBTYPES, Entry, Layout, file_patient
from xrai.ingest.patients import PatientKey
from xrai.log import get_logger
from xrai.store import open_store

REQUIRED: Final[Sequence[str]] = ("path", "label")
OPTIONAL: Final[Sequence[str]] = ("patient", "split", "subtype", "group")

_DELIMITERS = ",;\t"
_MAX_BYTES = 1 << 28
_MAX_CELL = 60  # characters of a cell that a message shows
_MAX_FAULTS = 10  # that one message lists
_EXCEL_MARK = re.compile(r'"?sep=([^\r\n])"?[;,\t ]*(?:\r\n|\r|\n)', re.IGNORECASE)
_FROM_ROOT = re.compile(r"(\w+:)?[/\\]")  # "/films/a.png", "C:\films\a.png", "s3://films/a.png"
_GROUP = re.compile(r"[\w.-]{1,40}")
_SUBTYPE = re.compile(r"[\w .-]{1,40}")
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Label:
    """One row of the table, as it is written there."""

    line: int
    cells: Mapping[str, str]  # of the known columns that the table has


@dataclass(frozen=True)
class LabelTable:
    """The whole table; not yet compared with a source."""

    name: str  # for people
    labels: tuple[Label, ...]


def read_labels(uri: str) -> LabelTable:
    """Read a CSV file, at a path or s3:// address.

    UTF-8, with or without a byte order mark; commas, semicolons (as Excel writes them in many
    countries) or tabs between cells, also after a first line `sep=;`; columns in any order and
    case; unknown ones are skipped with a note. Raises `SourceError` where there is no such file or
    it is no such table.
    """
    wanted = f"a CSV file with the columns {', '.join(REQUIRED)}"
    folder, _, name = uri.rpartition("/")
    if not name:
        raise SourceError(f"--labels {uri!r} is not a file; it takes {wanted}")
    try:
        store = open_store(folder or ("/" if uri.startswith("/") else "."))
        data = store.read(name, max_bytes=_MAX_BYTES)
    except TooLargeError as error:
        raise SourceError(f"--labels is no table: {error}") from error
    except NotFoundError:
        raise SourceError(f"there is no file --labels {uri}; it takes {wanted}") from None
    try:
        return parse_labels(data.decode("utf-8-sig"), name=name)
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{name} is not UTF-8 (byte {error.start}); save it as 'CSV UTF-8' and give it again"
        ) from error


def parse_labels(text: str, *, name: str) -> LabelTable:
    """The rows of a table's text; `name` is for messages. Raises `SourceError` naming lines."""
    records = _records(text, name=name)
    _, header = next(records, (0, []))
    columns = [cell.strip().lower() for cell in header]
    known = {
        column: columns.index(column) for column in (*REQUIRED, *OPTIONAL) if column in columns
    }
    twice = sorted(column for column in known if columns.count(column) > 1)
    if twice:
        raise SourceError(f"{name} has two columns {twice[0]!r}; leave one")
    unknown = [_shown(cell.strip()) for cell in header if cell.strip().lower() not in known]
    if unknown:
        _logger.info("%s: columns %s are not used", name, ", ".join(unknown))
    faults, labels = [], []
    for line, record in records:
        if len(record) != len(header):
            faults.append((line, f"has {len(record)} cells, the first line {len(header)}"))
        else:
            cells = {
                column: record[k] if column == "path" else record[k].strip()
                for column, k in known.items()
            }
            labels.append(Label(line, cells))
    _refuse(faults, name=name)
    if not labels:
        raise SourceError(f"{name} has no rows below its first line")
    return LabelTable(name, tuple(labels))


def lay_out_by_labels(
    paths: Iterable[str], table: LabelTable, *, source: str, key: PatientKey
) -> Layout:
    """The layout that a table gives to a source's paths; `source` names it in messages.

    Files that the table does not name are counted, but are not data. Paths may be written with
    backslashes, be those of another machine, or lack the first folders; see `_match`. Raises
    `SourceError` naming the lines of the table with a path that repeats, does not exist, fits
    several files or is outside of the source, an unknown label, split or subtype, a patient in two
    splits, or an empty cell.
    """
    held = set(paths)
    labels, notes = _match(table, held, source=source)
    filled = {column for column in OPTIONAL if any(label.cells.get(column) for label in labels)}
    faults = [
        (label.line, words)
        for label in labels
        for words in _faults(label.cells, filled, held, source=source)
    ]
    _refuse(sorted([*faults, *_repeated(labels)]), name=table.name)
    entries = tuple(
        sorted((_entry(label.cells, key) for label in labels), key=lambda entry: entry.path)
    )
    num_others = len(held) - len(entries)
    not_data = {f"not named by {table.name}": num_others} if num_others else {}
    return Layout(entries, not_data, notes)


def _match(
    table: LabelTable, held: Collection[str], *, source: str
) -> tuple[Sequence[Label], tuple[str, ...]]:
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
    faults: list[tuple[int, str]] = []
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
            shown = ", ".join(map(_shown, sorted(fitting)[:2]))
            faults.append((label.line, f"{len(fitting)} files fit path {_shown(text)}: {shown}"))
    _refuse(faults, name=table.name)
    if num_ends:
        _logger.info("%s: %d paths are matched by their ends", table.name, num_ends)
    note = f"the paths of {table.name} begin with {'/'.join(prefix or ())}/, taken as the source"
    if found:
        paths = ((label, found.get(path := label.cells["path"], path)) for label in labels)
        labels = tuple(replace(row, cells={**row.cells, "path": path}) for row, path in paths)
    return labels, (note,) if prefix is not None else ()


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _records(text: str, *, name: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of all rows that are not empty; the first is the header."""
    excel = _EXCEL_MARK.match(text)  # which Excel obeys and does not show
    text = text[excel.end() :] if excel else text
    first = text.splitlines()[0] if text.strip() else ""
    marks = _DELIMITERS + (excel[1] if excel else "")
    known = {mark: {cell.strip(' "').lower() for cell in first.split(mark)} for mark in marks}
    delimiter = next((mark for mark, columns in known.items() if columns.issuperset(REQUIRED)), "")
    if not delimiter:
        raise SourceError(
            f"the first line of {name} has no columns {' and '.join(REQUIRED)}, separated by "
            f"commas, semicolons or tabs, but {_shown(first)}; optional are {', '.join(OPTIONAL)}"
        )
    num_before = 1 if excel else 0
    line = num_before + 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for record in reader:
            if any(cell.strip() for cell in record):
                yield line, record
            line = num_before + reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{name}, line {line}, is not CSV: {error}") from error


def _faults(
    cells: Mapping[str, str], filled: Collection[str], held: Collection[str], *, source: str
) -> Iterator[str]:
    path, label, split = cells["path"], cells["label"], cells.get("split")
    for column in (*REQUIRED, *OPTIONAL):
        must_be_filled = column in REQUIRED or (column in filled and column != "subtype")
        if must_be_filled and not cells[column].strip():
            yield f"{column} is empty"
    if path.strip() and path not in held:
        if path.startswith(("/", "\\")) or ":" in path or ".." in re.split(r"[/\\]", path):
            yield f"path {_shown(path)} leaves the source"
        else:
            yield f"there is no file {_shown(path)} in {source}"
    if label and label.upper() not in CLASSES:
        yield f"unknown label {_shown(label)}, allowed are {' and '.join(CLASSES)}"
    if split and split.lower() not in SPLIT_NAMES:
        yield f"unknown split {_shown(split)}, allowed are {', '.join(SPLITS)}"
    if cells.get("subtype") and label.upper() == CLASSES[0]:
        yield f"a subtype is given to a {CLASSES[0]} image"
    for column, pattern in (("group", _GROUP), ("subtype", _SUBTYPE)):
        if cells.get(column) and not pattern.fullmatch(cells[column]):
            allowed = "1 to 40 letters, digits, dots, hyphens or underscores"
            yield f"{column} {_shown(cells[column])} is not {allowed}"


def _repeated(labels: Sequence[Label]) -> Iterator[tuple[int, str]]:
    """Paths that appear twice, and patients in two splits; a patient is not named."""
    lines: dict[str, int] = {}
    places: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for label in labels:
        path = label.cells["path"]
        first = lines.setdefault(path, label.line)
        if first != label.line:
            yield label.line, f"path {_shown(path)} is in line {first}, too"
        patient, split = label.cells.get("patient", ""), _split_of(label.cells)
        if patient and split:
            splits = places[label.cells.get("group", ""), patient]
            if split not in splits and splits:
                other, line = next(iter(splits.items()))
                yield label.line, f"a patient in {split} who is in {other} in line {line}"
            splits.setdefault(split, label.line)


def _refuse(faults: Sequence[tuple[int, str]], *, name: str) -> None:
    if not faults:
        return
    shown = "; ".join(f"line {line}: {words}" for line, words in faults[:_MAX_FAULTS])
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    num_lines = len({line for line, _ in faults})
    rows = "1 row" if num_lines == 1 else f"{num_lines} rows"
    raise SourceError(f"{rows} of {name} cannot be used: {shown}{more}")


def _entry(cells: Mapping[str, str], key: PatientKey) -> Entry:
    subtype, group = cells.get("subtype", "").lower(), cells.get("group", "")
    patient = file_patient(cells["path"], group=group)
    if identifier := cells.get("patient"):
        patient = key.hash(identifier, group=group or "patient")
    return Entry(
        path=cells["path"],
        split=_split_of(cells) or "train",
        label=CLASSES.index(cells["label"].upper()),
        patient=patient,
        subtype=SUBTYPES.get(subtype, subtype),
    )


def _split_of(cells: Mapping[str, str]) -> str:
    return SPLIT_NAMES.get(cells.get("split", "").lower(), "")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_CELL else text[:_MAX_CELL] + "…")
