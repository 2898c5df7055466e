"""Pictures of data: sheets of images, and how many there are of each class. Drawn by Pillow, for no
plot is in them.

Preprocessing thus needs no matplotlib, whose import takes longer than drawing. The look and the
promise are those of `xrai.results.plots`: a PNG whole or not at all, the same bytes for the same
input and version of Pillow.
"""

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw, ImageFont

from xrai.results.style import (
    DPI,
    INK,
    MUTED,
    NORMAL,
    PAPER,
    PNEUMONIA,
    SHIFTED,
    SUBTITLE_DOWN,
    SUBTITLE_SIZE,
    TITLE_DOWN,
    TITLE_SIZE,
    TRAIN,
    VALIDATION,
    subtitle_of,
    write_picture,
)

_MARGIN = 0.15  # left and right, inches
_HEAD = 0.75  # height of title and subtitle, inches
_SIDE, _GAP = (
    224,
    13,
)  # of a picture on a sheet, and between two, pixels: what is stored at 224 is shown as it is
_LONGEST_TITLE = 24  # letters
_COMPRESS_LEVEL = 3  # twice as fast as 6, and no larger for films
_POINT: Final = DPI / 72  # pixels
_BAR, _BAR_STEP = 0.34, 0.55  # height of a bar, and from one to the next, inches


def draw_sheet(
    images: Sequence[npt.NDArray[np.uint8]],
    titles: Sequence[str],
    path: Path,
    *,
    marks: Sequence[str] = (),
    heading: str = "",
    note: str = "",
    columns: int = 6,
    is_phantom: bool = False,
) -> None:
    """Write a sheet of images, each (H, W) uint8 grey or (H, W, 3) uint8, with a short title under
    each.

    `marks`, if given, are as many short lines that stand above the titles in ink, in colour where
    they end in "wrong". Images are fitted to squares of 224 pixels: what is larger is averaged,
    what is smaller is shown pixel by pixel.
    """
    if len(images) != len(titles):
        raise ValueError(f"{len(images)} images and {len(titles)} titles must be equal in number")
    if marks and len(images) != len(marks):
        raise ValueError(f"{len(images)} images and {len(marks)} marks must be equal in number")
    margin, head, below = (
        round(_MARGIN * DPI),
        round(_HEAD * DPI),
        round((0.36 if marks else 0.24) * DPI),
    )
    step = _SIDE + _GAP
    size = (
        2 * margin + columns * step - _GAP,
        head + max(1, math.ceil(len(images) / columns)) * (_SIDE + below),
    )
    sheet, draw = _begin(size, heading, note, is_phantom=is_phantom)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, columns)
        left, top = margin + column * step, head + row * (_SIDE + below)
        picture = _fit(Image.fromarray(image))
        sheet.paste(
            picture, (left + (_SIDE - picture.width) // 2, top + (_SIDE - picture.height) // 2)
        )
        middle, line = left + _SIDE / 2, top + _SIDE + 0.085 * DPI
        if marks:
            colour = PNEUMONIA if marks[number].endswith("wrong") else INK
            draw.text((middle, line), marks[number], colour, _font(7), anchor="mm")
            line += 0.12 * DPI
        draw.text((middle, line), _shorten(title), MUTED, _font(6.5), anchor="mm")
    _save(sheet, path)


def draw_class_counts(
    counts: Mapping[str, Mapping[str, int]],
    path: Path,
    *,
    heading: str = "Images by split",
    is_phantom: bool = False,
) -> None:
    """Write one bar a split, cut by class; `counts` is {split: {class: number of images}},
    classes in their order.
    """
    classes = list(dict.fromkeys(name for split in counts.values() for name in split))
    colours = dict(zip(classes, [NORMAL, PNEUMONIA, VALIDATION, SHIFTED, TRAIN], strict=False))
    totals = {split: sum(by_class.values()) for split, by_class in counts.items()}
    size = (round(7.2 * DPI), round((_HEAD + 0.25 + _BAR_STEP * max(1, len(counts))) * DPI))
    sheet, draw = _begin(size, heading, f"{sum(totals.values()):,} images", is_phantom=is_phantom)
    font = _font(9.5)
    labels_end = round(0.65 * DPI)
    pixels = 4.9 * DPI / max([1, *totals.values()])  # an image
    for row, (split, by_class) in enumerate(counts.items()):
        middle = (_HEAD + 0.1 + _BAR_STEP * (row + 0.5)) * DPI
        draw.text((labels_end - 8, middle), split, INK, font, anchor="rm")
        number_left = 0
        for name in classes:
            number = by_class.get(name, 0)
            left, right = (
                labels_end + round(edge * pixels) for edge in (number_left, number_left + number)
            )
            if right > left:
                top, bottom = round(middle - _BAR * DPI / 2), round(middle + _BAR * DPI / 2)
                draw.rectangle((left, top, right - 1, bottom - 1), fill=_lighter(colours[name]))
            if right - left > 0.4 * DPI:
                draw.text(((left + right) / 2, middle), f"{number:,}", PAPER, _font(9), anchor="mm")
            number_left += number
        share = by_class.get(classes[-1], 0) / totals[split] if totals[split] else 0.0
        end = labels_end + round(number_left * pixels)
        text = f"{totals[split]:,} · {100 * share:.0f} % {classes[-1]}"
        draw.text((end + 10, middle), text, MUTED, _font(8.5), anchor="lm")
    legend_end = size[0] - _MARGIN * DPI
    for name in reversed(classes):
        legend = f"■ {name}"
        draw.text((legend_end, TITLE_DOWN * DPI), legend, colours[name], font, anchor="rm")
        legend_end -= draw.textlength(legend, font) + 0.15 * DPI
    _save(sheet, path)


def _begin(
    size: tuple[int, int], heading: str, note: str, *, is_phantom: bool
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN * DPI
    draw.text((left, TITLE_DOWN * DPI), heading, INK, _font(TITLE_SIZE, is_bold=True), anchor="lm")
    line = subtitle_of(note, is_phantom=is_phantom)
    draw.text((left, SUBTITLE_DOWN * DPI), line, MUTED, _font(SUBTITLE_SIZE), anchor="lm")
    return sheet, draw


def _save(sheet: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, format="png", compress_level=_COMPRESS_LEVEL)
    write_picture(path, buffer.getvalue())


def _fit(picture: Image.Image) -> Image.Image:
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def _shorten(title: str) -> str:
    plain = "".join(letter if letter.isprintable() else "?" for letter in title)
    return plain if len(plain) <= _LONGEST_TITLE else plain[:11] + "…" + plain[-12:]


def _lighter(colour: str) -> tuple[int, ...]:
    """As it looks on paper when 15 % of that shines through."""
    return tuple(round(0.85 * level + 0.15 * 255) for level in ImageColor.getrgb(colour))


@cache
def _font(points: float, *, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, so that pictures do not depend on the machine's
    fonts.
    """
    matplotlib = importlib.util.find_spec("matplotlib")
    assert matplotlib is not None
    assert matplotlib.submodule_search_locations is not None
    folder = Path(matplotlib.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    return ImageFont.truetype(folder / name, points * _POINT, layout_engine=ImageFont.Layout.BASIC)
