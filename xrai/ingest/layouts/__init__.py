"""Tables of public data sets, read as they are downloaded: `--labels.layout=NAME`.

Each module reads one: its file names, columns, splits and patients, and what its uncertain labels,
views and readers come to. All of them give a `LabelTable`, which is checked as any other.
"""

from collections.abc import Callable, Mapping
from typing import Final

from xrai.config import Labels
from xrai.ingest.labels import LabelTable, read_labels
from xrai.ingest.layouts import chexpert, covidx, nih, rsna, vindr
from xrai.ingest.layouts.tables import Tables
from xrai.ingest.sources import Source

READERS: Final[Mapping[str, Callable[[Tables, Labels], LabelTable]]] = {
    "nih": nih.read,
    "chexpert": chexpert.read,
    "rsna": rsna.read,
    "vindr": vindr.read,
    "covidx": covidx.read,
}


def read_table(uri: str, source: Source, config: Labels) -> LabelTable | None:
    """The table that `--labels` names; of a layout also a folder of its tables, or, where it names
    none, those in the source. None: the classes are folders. Raises `SourceError`.
    """
    if config.layout:
        return READERS[config.layout](Tables(uri, source, layout=config.layout), config)
    return read_labels(uri, config) if uri else None
