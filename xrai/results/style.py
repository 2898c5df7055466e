"""How drawn images look, whatever draws them: colours, sizes, heading.

Colours are safe for colour-blind eyes (Okabe and Ito 2008), with one meaning each, here and in the
report.
"""

from typing import Final

INK, MUTED, RULE, PAPER = "#1b2330", "#667085", "#e4e7ec", "#ffffff"
NORMAL, PNEUMONIA = "#0072b2", "#d55e00"
TRAIN, VALIDATION, SHIFTED = "#6f7a8d", "#00876c", "#b5468b"
CURVE = "#3b4a8f"

DPI: Final = 160  # pixels an inch
TITLE_SIZE, NOTE_SIZE = 13, 8.5  # points
TITLE_DOWN, NOTE_DOWN = 0.33, 0.58  # from the upper edge to the middle of the line, inches


def note_line(*parts: str, is_phantom: bool) -> str:
    """The line under a title; that of phantoms says so."""
    return " · ".join(filter(None, [*parts, "drawn phantoms, not patients" * is_phantom]))
