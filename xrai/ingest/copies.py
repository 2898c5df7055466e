"""Whether files are copies of others, as in the public archive, which holds its tree twice.

`xrai.ingest.plan` compares them for `xrai.ingest.trees`, which knows names alone.
"""

from typing import Final

import numpy as np

from xrai.dataset.rows import Texts
from xrai.errors import ImageError
from xrai.ingest.listed import Files
from xrai.ingest.sources import Source, hash_of

NUM_READ: Final = 64  # pairs whose contents are compared: reading all would take as long as hashing


def find_unlike(
    source: Source, files: Files, copies: Texts, originals: Texts
) -> tuple[str, str] | None:
    """The paths of a copy and its original, place by place in `copies` and `originals` (both
    sorted), that differ: in size, or in their contents, which are read for `NUM_READ` pairs. None
    where all are alike. Files that cannot be read are taken to be alike.
    """
    differs = files.sizes_of(copies) != files.sizes_of(originals)
    if differs.any():
        place = int(differs.argmax())
        return copies[place], originals[place]
    for place in np.unique(np.linspace(0, len(copies) - 1, NUM_READ).astype(int)).tolist():
        pair = copies[place], originals[place]
        try:
            one, other = (hash_of(source.read(path)) for path in pair)
        except ImageError:
            continue
        if one != other:
            return pair
    return None
