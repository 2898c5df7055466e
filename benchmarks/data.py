"""The images that benchmarks measure on: the public data set where it is at hand, else
phantoms.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from xrai.phantom import make_phantoms

T = TypeVar("T")

PUBLIC = "chest_xray"  # 5,216 JPEG files
FULL_SIZE = "chest_xray_originals"  # images as they came from the scanner


def find_public(name: str) -> str:
    """The folder `name` of the one that XRAI_TEST_DATA names, or "" where there is none."""
    path = Path(os.environ.get("XRAI_TEST_DATA", "")) / name
    return str(path) if os.environ.get("XRAI_TEST_DATA") and path.is_dir() else ""


def source_or_phantoms(source: str, folder: Path, *, num_phantoms: int) -> tuple[str, str]:
    """The source to measure on, and in words what it is: the one given, or phantoms drawn into
    `folder`.
    """
    if source:
        return source, Path(source).name
    make_phantoms(folder, num_images=num_phantoms)
    return str(folder), f"{num_phantoms} phantoms"


def spread(items: Sequence[T], number: int) -> list[T]:
    """`number` of the items, evenly spread; all of them for 0."""
    step = len(items) / number if 0 < number < len(items) else 1
    return [items[int(k * step)] for k in range(int(len(items) / step))]


def copy_some(source: Path, folder: Path, *, num_images: int) -> Path:
    """`folder`, with copies of `num_images` of the source's image files, evenly spread, in the same
    folders; the source itself for 0.
    """
    if num_images == 0:
        return source
    suffixes = (".jpg", ".jpeg", ".png")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes)
    for path in spread(found, num_images):
        place = folder / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return folder
