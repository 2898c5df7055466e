"""How plots and tables write names: the font, and names that it lacks or that are too long."""

import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from functools import cache

from PIL import ImageFont

from xrai.log import get_logger
from xrai.results.style import DPI

_SIZE = 9.0  # points, at which characters are looked at
_logger = get_logger(__name__)


@cache
def font(points: float, *, name: str = "DejaVuSans") -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib: drawings do not depend on the machine's fonts."""
    matplotlib = importlib.metadata.distribution("matplotlib")
    path = matplotlib.locate_file(f"matplotlib/mpl-data/fonts/ttf/{name}.ttf")
    basic = ImageFont.Layout.BASIC
    return ImageFont.truetype(str(path), points * DPI / 72, layout_engine=basic)


@cache
def legible(names: tuple[str, ...], noun: str) -> tuple[str, ...]:
    """The names as plots show them: a name with a character that the font lacks, such as a Chinese
    one, becomes its noun and number, "class 3", with a warning the first time.
    """
    found = tuple(
        name if all(map(_is_in_font, name)) else f"{noun} {number}"
        for number, name in enumerate(names, start=1)
    )
    if replaced := [f"{new} is {old}" for new, old in zip(found, names, strict=True) if new != old]:
        _logger.warning("plots show names that their font lacks by number: %s", ", ".join(replaced))
    return found


@cache
def _is_in_font(character: str) -> bool:
    shown, missing = (font(_SIZE).getmask(each) for each in (character, "\uffff"))
    return (shown.size, bytes(shown)) != (missing.size, bytes(missing))


def shortened(text: str, length: int) -> str:
    """The text, its middle left out where it is longer than `length` characters."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def short_names(names: Sequence[str], length: int) -> list[str]:
    """Names of at most `length` characters, each with its number where two would look alike."""
    found = [shortened(name, length) for name in names]
    times = Counter(found)
    return [
        short if times[short] == 1 else f"{shortened(name, length - len(f' {number}'))} {number}"
        for number, (short, name) in enumerate(zip(found, names, strict=True), start=1)
    ]
