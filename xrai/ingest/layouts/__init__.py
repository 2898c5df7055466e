"""Tables of public data sets, read as they are downloaded: `--labels.layout=NAME`.

Each module reads one: its file names, columns, splits and patients, and how uncertain labels, views
and several readers are treated. All of them give a `LabelTable`, which is checked like any other.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.labels import WANTED, LabelTable, parse_labels
from xrai.ingest.layouts import chexpert, covidx, nih, rsna, vindr
from xrai.ingest.layouts.tables import Tables
from xrai.ingest.records import read_text
from xrai.ingest.sources import Source

READERS: Final[Mapping[str, Callable[[Tables, Labels], LabelTable]]] = {
    "nih": nih.read,
    "chexpert": chexpert.read,
    "rsna": rsna.read,
    "vindr": vindr.read,
    "covidx": covidx.read,
}
# How their tables begin
_FIRST_LINES: Final[Mapping[str, str]] = {
    "nih": r"image index\W+finding labels\b",
    "chexpert": r"path\W+sex\W+age\W+frontal/lateral\b",
    "rsna": r"patientid\W+(x\W+y\W+width\W+height\W+target|class)\b",
    "vindr": r"image_id\b.*\bno finding\b",
    "covidx": r"\S+ .*\S (positive|negative|normal|pneumonia|covid-19)( \S+)?$",
}


def read_table(uri: str, source: Source, config: Labels) -> LabelTable | None:
    """The table that `--labels` names; of a layout also a folder of its tables, or, where it names
    none, those in the source. None: the classes are folders. Raises `SourceError`.
    """
    if config.layout:
        return READERS[config.layout](Tables(uri, source, layout=config.layout), config)
    if not uri:
        return None
    name, text = read_text(uri, wanted=WANTED)
    hint = _layout_hint(text)
    try:
        table = parse_labels(text, name=name, config=config)
    except SourceError as error:
        raise SourceError(f"{error}{f'; {hint}' if hint else ''}") from error
    return replace(table, notes=(*table.notes, f"{name}: {hint}")) if hint else table


def _layout_hint(text: str) -> str:
    """What to say of a table that begins as that of a public data set; empty for any other."""
    first = text.lstrip().partition("\n")[0].strip().strip('"')
    found = (name for name, own in _FIRST_LINES.items() if re.match(own, first, re.IGNORECASE))
    layout = next(found, "")
    words = f"this looks like a table of {layout}, which --labels.layout={layout} reads as it is"
    return words if layout else ""
