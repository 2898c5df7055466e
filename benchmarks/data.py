"""The images that benchmarks measure on: the public data set where it is at hand, else
phantoms.
"""

import os
from pathlib import Path

from xrai.phantom import make_phantoms

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
