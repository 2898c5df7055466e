"""The overlay of one prediction: an image, and beside it the same under its heat map."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xrai.results.plots import overlay

_NOTE = (
    "Brightest where evidence is strongest, fainter below the threshold. It shows what the model "
    "used, not disease."
)
_GAP, _ABOVE, _BELOW = 12, 40, 66  # pixels around the images


def draw_panel(
    image: NDArray[np.uint8],
    heat: NDArray[np.float32],
    *,
    verdict: str,
    note: str,
    strength: float,
    finding: str = "pneumonia",
) -> bytes:
    """A PNG of an image (side, side), its heat map in [0, 1] times `strength`, and a verdict; the
    heat map is that of `finding`.
    """
    titles = ("X-ray, the part that the model sees", f"Grad-CAM: evidence for {finding}")
    side = len(image)
    panel = Image.new("RGB", (2 * side + 3 * _GAP, side + _ABOVE + _BELOW), "#101318")
    draw = ImageDraw.Draw(panel)
    large, small = ImageFont.load_default(size=19), ImageFont.load_default(size=14)
    for number, pixels in enumerate((image, overlay(image, heat * strength))):
        left = _GAP + number * (side + _GAP)
        panel.paste(Image.fromarray(pixels), (left, _ABOVE))
        draw.text((left, _ABOVE / 2), titles[number], fill="#e4e7ec", font=large, anchor="lm")
    top = side + _ABOVE
    draw.text((_GAP, top + 21), verdict, fill="#ffffff", font=large, anchor="lm")
    draw.text((_GAP, top + 47), f"{_NOTE} {note}", fill="#9aa4b2", font=small, anchor="lm")
    buffer = io.BytesIO()
    panel.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
