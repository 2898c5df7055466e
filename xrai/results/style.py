"""How pictures of results look, whatever draws them: colours, scale, and how a PNG gets to its
place.

Colours are safe for colour-blind eyes (Okabe and Ito 2008), one meaning each, here and in the
report.
"""

from pathlib import Path
from typing import Final

INK, MUTED, RULE, PAPER = "#1b2330", "#667085", "#e4e7ec", "#ffffff"
NORMAL, PNEUMONIA = "#0072b2", "#d55e00"
TRAIN, VALIDATION, SHIFTED = "#6f7a8d", "#00876c", "#b5468b"
CURVE = "#3b4a8f"

DPI: Final = 160  # pixels an inch
TITLE_SIZE, SUBTITLE_SIZE = 13, 8.5  # points
TITLE_DOWN, SUBTITLE_DOWN = 0.33, 0.58  # from the upper edge to the middle of the line, inches

_PHANTOM_NOTE = "drawn phantoms, not patients"


def subtitle_of(text: str, *, is_phantom: bool) -> str:
    """The line under a picture's title."""
    return " · ".join(filter(None, [text, _PHANTOM_NOTE if is_phantom else ""]))


def write_picture(path: Path, data: bytes) -> None:
    """Write a picture whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
