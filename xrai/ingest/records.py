"""The rows of tables as people write them: CSV of any separator, with their lines for messages."""

import csv
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Final

from xrai.errors import NotFoundError, SourceError, TooLargeError
from xrai.log import counted
from xrai.store import open_parent

MAX_BYTES: Final = 1 << 28  # of a table

_DELIMITERS = ",;\t"
_MAX_CELL = 60  # characters of a cell that a message shows
_MAX_FAULTS = 10  # that one message lists
_EXCEL_MARK = re.compile(r'"?sep=([^\r\n])"?[;,\t ]*(?:\r\n|\r|\n)', re.IGNORECASE)
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")

Fault = tuple[str, str]  # where, such as "line 7", and what is wrong


def read_text(uri: str, *, wanted: str) -> tuple[str, str]:
    """Name and text of the file `--labels`, at a path or s3:// address; `wanted` says what it is
    to be. Raises `SourceError` where there is none or it is not UTF-8.
    """
    store, name = open_parent(uri)
    if not name:
        raise SourceError(f"--labels {uri!r} is not a file; it takes {wanted}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"the name {name!r} of --labels is not UTF-8; rename it") from None
    try:
        data = store.read(name, max_bytes=MAX_BYTES)
    except TooLargeError as error:
        raise SourceError(f"--labels is no table: {error}") from error
    except NotFoundError:
        raise SourceError(f"there is no file --labels {uri}; it takes {wanted}") from None
    return name, decode(data, name=name)


def decode(data: bytes, *, name: str) -> str:
    """The text of a table, without its byte order mark. Raises `SourceError`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{name} is not UTF-8 (byte {error.start}); save it as 'CSV UTF-8' and give it again"
        ) from error


def read_records(
    text: str,
    *,
    name: str,
    required: Sequence[str],
    told: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of all rows that are not empty; the first is the header.

    Cells are separated by commas, semicolons or tabs, or as a first line `sep=` says. Raises
    `SourceError` where the text is not CSV, or the header lacks `required` (in lower case); the
    message names `told`, the columns that are needed and others.
    """
    excel = _EXCEL_MARK.match(text)  # which Excel obeys and does not show
    text = text[excel.end() :] if excel else text
    lines = text[: max(text.find("\n"), 0) or None].splitlines()
    first = lines[0] if lines and not text.isspace() else ""
    marks = _DELIMITERS + (excel[1] if excel else "")
    columns = {mark: [cell.strip(' "').lower() for cell in first.split(mark)] for mark in marks}
    fitting = [mark for mark, own in columns.items() if set(own).issuperset(required)]
    if not fitting:
        most = max(columns.values(), key=len)
        raise SourceError(explain_header(name, first, most, *(told or (required, ()))))
    num_before = 1 if excel else 0
    line = num_before + 1
    try:
        # A space before a quote is no part of a cell; others may be, as in names of files
        mark = re.escape(fitting[0])
        has_spaces = ' "' in text and re.search(rf'(?m)(?:^|{mark}) +"', text) is not None
        reader = csv.reader(
            _lines(text), delimiter=fitting[0], strict=True, skipinitialspace=has_spaces
        )
        for record in reader:
            if any(cell.strip() for cell in record):
                yield line, record
            line = num_before + reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{name}, line {line}, is not CSV: {error}") from error


def _lines(text: str) -> Iterator[str]:
    """The lines with their ends: `io.StringIO` takes four bytes a character."""
    return (match[0] for match in _LINE.finditer(text))


def explain_header(
    name: str,
    first: str,
    columns: Sequence[str],
    required: Sequence[str],
    optional: Sequence[str] = (),
) -> str:
    """What a table's first line lacks, and which of its columns may be meant."""
    missing = [column for column in required if column not in columns]
    near = [(column, difflib.get_close_matches(column, columns, n=1)) for column in missing]
    hints = [f"; is {shown(found[0])} meant as {column}?" for column, found in near if found]
    also = f"; optional are {', '.join(optional)}" if optional else ""
    return (
        f"the first line of {name} has no columns {' and '.join(required)}, separated by commas, "
        f"semicolons or tabs, but {shown(first)}{''.join(hints)}{also}"
    )


def refuse(faults: Sequence[Fault], *, name: str) -> None:
    """Raise `SourceError` that lists faults, if there are any."""
    if not faults:
        return
    told = "; ".join(f"{place}: {words}" for place, words in faults[:_MAX_FAULTS])
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    num_lines = len({place for place, _ in faults})
    raise SourceError(f"{counted(num_lines, 'row')} of {name} cannot be used: {told}{more}")


def shown(text: str) -> str:
    """A text of a table as messages show it."""
    return repr(text if len(text) <= _MAX_CELL else text[:_MAX_CELL] + "…")
