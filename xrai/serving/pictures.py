"""PNG images of a film for the page: at its own resolution, as a thumbnail, and as heat maps."""

import io
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xrai.ingest.dicom import is_dicom, open_radiograph, stored_values
from xrai.ingest.images import decode, decode_whole
from xrai.results.plots import heat_colors
from xrai.serving.films import Film

THUMBNAIL_SIDE: Final = 160  # pixels
_HEAT_SIDE = 512  # pixels, of the longer side


def draw_whole(film: Film) -> bytes:
    """The film at its own resolution: DICOM with a window as its stored values in 16 bits, other
    films as grey levels. Raises `ImageError` where it cannot be decoded.
    """
    if film.window is not None and is_dicom(film.data):
        found = stored_values(open_radiograph(film.data))
        if found is not None:
            return _png(found[0])
    return _png(decode_whole(film.data, max_pixels=film.pipeline.max_pixels))


def draw_thumbnail(film: Film) -> bytes:
    """The whole film, small, with black at its sides."""
    return _png(
        decode(film.data, size=THUMBNAIL_SIDE, fit="pad", max_pixels=film.pipeline.max_pixels)
    )


def draw_heat(heat: NDArray[np.float32], film: Film) -> bytes:
    """A heat map (size, size) in [0, 1] as colours in the proportions of the whole film,
    transparent where there is no evidence and outside of the square that the network sees.
    """
    assert film.size is not None
    width, height = film.size
    scale = _HEAT_SIDE / max(width, height)
    whole = (max(1, round(width * scale)), max(1, round(height * scale)))
    values = np.asarray(heat, np.float32)
    fit, bilinear = film.pipeline.model.fit, Image.Resampling.BILINEAR
    if fit == "pad":  # the network saw black at the sides, which the film does not have
        size = len(values)
        part = np.array(whole) * size / max(whole)
        left, top = (size - part) / 2
        box = (left, top, size - left, size - top)
        placed = Image.fromarray(values).resize(whole, bilinear, box=box)
    elif fit == "crop":
        side = min(whole)
        placed = Image.new("F", whole)
        middle = ((whole[0] - side) // 2, (whole[1] - side) // 2)
        placed.paste(Image.fromarray(values).resize((side, side), bilinear), middle)
    else:
        placed = Image.fromarray(values).resize(whole, bilinear)
    return _png(heat_colors(np.asarray(placed)))


def _png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
