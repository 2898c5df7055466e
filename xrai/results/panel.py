"""The overlay of one prediction: an image, and next to it the same image under its heat maps."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xrai.results.lettering import font
from xrai.results.plots import overlay

_TITLE = "X-ray, the part that the model sees"
_NOTE = (
    "Brightest where evidence is strongest, fainter {}. It shows what the model used, not disease."
)
_GAP, _ABOVE, _BELOW = 12, 40, 66  # pixels around the images

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Heat:
    """One heat map of the panel."""

    values: NDArray[np.float32]  # (h, w) in [0, 1]
    title: str
    strength: float  # of its colours, in [0, 1]


def draw_panel(
    image: NDArray[np.uint8],
    heats: Sequence[Heat],
    *,
    verdict: str,
    note: str,
    has_thresholds: bool = True,
) -> bytes:
    """A PNG of an image (side, side), the same under each heat map, and a verdict."""
    side = len(image)
    shown = [(_TITLE, image)]
    shown += [(heat.title, overlay(image, heat.values * heat.strength)) for heat in heats]
    width = len(shown) * (side + _GAP) + _GAP
    panel = Image.new("RGB", (width, side + _ABOVE + _BELOW), "#101318")
    draw = ImageDraw.Draw(panel)
    large: _Font = ImageFont.load_default(size=19)
    small = ImageFont.load_default(size=14)
    if not "".join([verdict, *(heat.title for heat in heats)]).isascii():
        large = font(8)  # of 18 pixels; Pillow's own lacks most letters that are not Latin
    for number, (title, pixels) in enumerate(shown):
        left = _GAP + number * (side + _GAP)
        panel.paste(Image.fromarray(pixels), (left, _ABOVE))
        title = _fitted(title, width=side, font=large)
        draw.text((left, _ABOVE / 2), title, fill="#e4e7ec", font=large, anchor="lm")
    top = side + _ABOVE
    verdict = _fitted(verdict, width=width - 2 * _GAP, font=large)
    draw.text((_GAP, top + 21), verdict, fill="#ffffff", font=large, anchor="lm")
    fades = "below the threshold" if has_thresholds else "where the class is less probable"
    note = f"{_NOTE.format(fades)} {note}"
    draw.text((_GAP, top + 47), note, fill="#9aa4b2", font=small, anchor="lm")
    buffer = io.BytesIO()
    panel.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _fitted(text: str, *, width: float, font: _Font) -> str:
    """A text, cut to a width in pixels."""
    length = len(text)
    cut = text
    while length > 0 and font.getlength(cut) > width:
        length -= 1
        cut = f"{text[:length]}…"
    return cut
