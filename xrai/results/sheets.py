"""Sheets of images, and bars of how many there are of each class; drawn by Pillow.

Preprocessing thus needs no matplotlib, whose import takes longer than drawing. A PNG is written
whole or not at all, with the same bytes for the same input and version of Pillow.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw

from xrai.files import replacing
from xrai.log import printable
from xrai.results import style
from xrai.results.lettering import font, legible, short_names, shortened
from xrai.results.style import DPI

_MARGIN = 0.15  # left and right, inches
_HEAD = 0.75  # height of title and note, inches
_SIDE, _GAP = 224, 13  # of an image on a sheet, and between two, pixels
_COLUMNS = 6
_LONGEST_TITLE = 24  # letters
_COMPRESS_LEVEL = 3  # twice as fast as 6, and no larger for X-rays
_BAR, _BAR_STEP = 0.34, 0.55  # height of a bar, and from one to the next, inches
_ROW_STEP, _COLUMN = (
    0.215,
    1.9,
)  # from one class to the next, and from one split to the next, inches


def draw_sheet(
    images: Sequence[npt.NDArray[np.uint8]],
    titles: Sequence[str],
    path: Path,
    *,
    heading: str = "",
    note: str = "",
    marks: Sequence[str] = (),
) -> None:
    """Write a sheet of images, each (H, W) or (H, W, 3) uint8, with a short title under each.

    `marks`, one for each image, stand above the titles, in colour where they end in "wrong".
    Images are fitted to squares of 224 pixels: larger ones are averaged, smaller ones are shown
    pixel by pixel.
    """
    for name, texts in (("titles", titles), ("marks", marks or titles)):
        if len(images) != len(texts):
            raise ValueError(
                f"{len(images)} images and {len(texts)} {name} must be equal in number"
            )
    margin, head = round(_MARGIN * DPI), round(_HEAD * DPI)
    below = round((0.36 if marks else 0.24) * DPI)
    step = _SIDE + _GAP
    num_rows = max(1, math.ceil(len(images) / _COLUMNS))
    size = (2 * margin + _COLUMNS * step - _GAP, head + num_rows * (_SIDE + below))
    with _sheet(path, size, heading, note) as (sheet, draw):
        for number, (pixels, title) in enumerate(zip(images, titles, strict=True)):
            row, column = divmod(number, _COLUMNS)
            left, top = margin + column * step, head + row * (_SIDE + below)
            image = Image.fromarray(pixels)
            width, height = (max(1, round(_SIDE / max(image.size) * side)) for side in image.size)
            shown = image.resize((width, height), Image.Resampling.BOX)
            sheet.paste(shown, (left + (_SIDE - width) // 2, top + (_SIDE - height) // 2))
            middle, line = left + _SIDE / 2, top + _SIDE + 0.085 * DPI
            if marks:
                colour = style.PNEUMONIA if marks[number].endswith("wrong") else style.INK
                draw.text((middle, line), marks[number], colour, font(7), anchor="mm")
                line += 0.12 * DPI
            text = printable(title)
            text = shortened(text, _LONGEST_TITLE)
            draw.text((middle, line), text, style.MUTED, font(6.5), anchor="mm")


def draw_class_counts(
    counts: Mapping[str, Mapping[str, int]],
    path: Path,
    *,
    heading: str = "",
    note: str = "",
    num_images: Mapping[str, int] | None = None,
) -> None:
    """Write bars of how many images each split has of each class: {split: {class: number}}.

    Two classes share one bar for each split. More of them have a row each, and a column of bars for
    each split; so do findings, of which an image may show several: `num_images` by split says so.
    """
    classes = list(dict.fromkeys(name for split in counts.values() for name in split))
    noun = "class" if num_images is None else "finding"
    shown = dict(zip(classes, legible(tuple(classes), noun), strict=True))
    counts = {
        split: {shown[name]: num for name, num in own.items()} for split, own in counts.items()
    }
    classes = list(shown.values())
    totals = {split: sum(by_class.values()) for split, by_class in counts.items()}
    totals |= num_images or {}
    note = " · ".join(filter(None, [f"{sum(totals.values()):,} images", note]))
    if num_images is None and len(classes) <= 2:
        size = (round(7.2 * DPI), round((_HEAD + 0.25 + _BAR_STEP * max(1, len(counts))) * DPI))
        with _sheet(path, size, heading, note) as (_, draw):
            _draw_shared_bars(draw, counts, classes, totals, width=size[0])
        return
    width = 1.75 + _COLUMN * len(counts) + _MARGIN
    size = (round(width * DPI), round((_HEAD + 0.5 + _ROW_STEP * len(classes)) * DPI))
    with _sheet(path, size, heading, note) as (_, draw):
        _draw_rows(draw, counts, classes, totals)


def _draw_shared_bars(
    draw: ImageDraw.ImageDraw,
    counts: Mapping[str, Mapping[str, int]],
    classes: Sequence[str],
    totals: Mapping[str, int],
    *,
    width: int,
) -> None:
    """One bar for each split, cut by class."""
    colours = dict(zip(classes, [style.NORMAL, style.PNEUMONIA], strict=False))
    labels_end = round(0.65 * DPI)
    pixels = 4.9 * DPI / max([1, *totals.values()])  # an image
    for row, (split, by_class) in enumerate(counts.items()):
        middle = (_HEAD + 0.1 + _BAR_STEP * (row + 0.5)) * DPI
        draw.text((labels_end - 8, middle), split, style.INK, font(9.5), anchor="rm")
        bar, num_left = round(_BAR * DPI / 2), 0
        for name in classes:
            num = by_class.get(name, 0)
            left, right = (labels_end + round(at * pixels) for at in (num_left, num_left + num))
            if right > left:
                box = (left, round(middle) - bar, right - 1, round(middle) + bar - 1)
                draw.rectangle(box, fill=_lighter(colours[name]))
            if right - left > 0.4 * DPI:
                place = ((left + right) / 2, middle)
                draw.text(place, f"{num:,}", style.PAPER, font(9), anchor="mm")
            num_left += num
        share = by_class.get(classes[-1], 0) / totals[split] if totals[split] else 0.0
        text = f"{totals[split]:,} · {100 * share:.0f} % {classes[-1]}"
        end = labels_end + round(num_left * pixels) + 10
        draw.text((end, middle), text, style.MUTED, font(8.5), anchor="lm")
    legend_end = width - _MARGIN * DPI
    for name in reversed(classes):
        place, legend = (legend_end, style.TITLE_DOWN * DPI), f"■ {name}"
        draw.text(place, legend, colours[name], font(9.5), anchor="rm")
        legend_end -= draw.textlength(legend, font(9.5)) + 0.15 * DPI


def _draw_rows(
    draw: ImageDraw.ImageDraw,
    counts: Mapping[str, Mapping[str, int]],
    classes: Sequence[str],
    totals: Mapping[str, int],
) -> None:
    """A row for each class, with a bar for each split: as long as its share of the split's images,
    and with its number.
    """
    shares = {
        split: {name: num / totals[split] if totals[split] else 0.0 for name, num in own.items()}
        for split, own in counts.items()
    }
    largest = max([share for own in shares.values() for share in own.values()], default=0) or 1
    names_end = 1.65 * DPI
    for column, split in enumerate(counts):
        left = (1.75 + _COLUMN * column) * DPI
        head = (left, (_HEAD + 0.12) * DPI)
        draw.text(head, f"{split} · {totals[split]:,}", style.INK, font(9.5), anchor="lm")
        for row, name in enumerate(classes):
            middle = (_HEAD + 0.32 + _ROW_STEP * (row + 0.5)) * DPI
            share = shares[split].get(name, 0.0)
            end = left + round(_COLUMN * 0.48 * DPI * share / largest)
            if end > left:
                half = 0.3 * _ROW_STEP * DPI
                box = (round(left), round(middle - half), round(end), round(middle + half))
                draw.rectangle(box, fill=_lighter(style.CURVE))
            text = f"{counts[split].get(name, 0):,} · {_percent(share)}"
            draw.text((end + 6, middle), text, style.MUTED, font(8), anchor="lm")
    for row, name in enumerate(short_names(classes, _LONGEST_TITLE)):
        middle = (_HEAD + 0.32 + _ROW_STEP * (row + 0.5)) * DPI
        text = _fitted(printable(name), names_end - _MARGIN * DPI)
        draw.text((names_end, middle), text, style.INK, font(9), anchor="rm")


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.{1 if 0 < share < 0.1 else 0}f} %"


def _fitted(text: str, width: float) -> str:
    """The text, its middle left out where it is wider than `width` pixels."""
    length = len(text)
    while length > 1 and font(9).getlength(shortened(text, length)) > width:
        length -= 1
    return shortened(text, length)


def _lighter(colour: str) -> tuple[int, ...]:
    """A colour at an opacity of 85 % on paper."""
    return tuple(round(0.85 * level + 0.15 * 255) for level in ImageColor.getrgb(colour))


@contextmanager
def _sheet(
    path: Path, size: tuple[int, int], heading: str, note: str
) -> Iterator[tuple[Image.Image, ImageDraw.ImageDraw]]:
    """A sheet with its heading, written to `path` when the block ends without an error."""
    sheet = Image.new("RGB", size, style.PAPER)
    draw, left = ImageDraw.Draw(sheet), _MARGIN * DPI
    bold = font(style.TITLE_SIZE, name="DejaVuSans-Bold")
    draw.text((left, style.TITLE_DOWN * DPI), heading, style.INK, bold, anchor="lm")
    small = font(style.NOTE_SIZE)
    draw.text((left, style.NOTE_DOWN * DPI), note, style.MUTED, small, anchor="lm")
    yield sheet, draw
    with replacing(path) as file:
        sheet.save(file, "png", compress_level=_COMPRESS_LEVEL)
