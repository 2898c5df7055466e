"""Black and white of an image that does not state them: DICOM without a window, and PNG of 16 bits.
Words of 16 bits often hold fewer, and headers rarely say how many.

The range is the power of two that holds the image's values, as of a detector with that many bits;
no image is stretched to its own contrast. It is a continuous function of the largest value: one
that passes a power of two by little raises it by little (docs/decisions/0020-grey-range.md).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

FLAT: Final = "shows one grey level throughout"
FEW_GREYS: Final = 48  # of 256; real images of 16 x 16 pixels use 65 or more, of 64 x 64 127

_STEEPNESS = 5  # the range has doubled where the values pass a power of two by a fifth
_TYPICAL = 0.95  # the share of the occurring values that is not burned-in text or a border
_MIN_LEVELS = 256  # what fits into 8 bits is shown as 8 bits are


def with_few_greys(paths: Iterable[str], images: Iterable[NDArray[np.uint8]]) -> list[str]:
    """The paths of images (H, W) with fewer than `FEW_GREYS` grey levels."""
    numbers = (np.count_nonzero(np.bincount(image.ravel(), minlength=256)) for image in images)
    return [path for path, number in zip(paths, numbers, strict=True) if number < FEW_GREYS]


def distinct_values(samples: NDArray[np.integer]) -> NDArray[np.int64]:
    """The values that occur in samples (H, ...) of up to 16 bits, sorted."""
    seen = np.zeros(1 << 16, np.bool_)
    for row in samples:  # indexed by all of them at once, numpy would copy them as int64
        seen[row] = True  # negative ones count from the end
    found = np.flatnonzero(seen)
    return np.sort(np.where(found > np.iinfo(samples.dtype).max, found - (1 << 16), found))


def num_levels(
    num_used: float, claims: Sequence[float] = (), *, num_typical: float | None = None
) -> float:
    """Levels of a range of which the first `num_used` occur, all but outliers in `num_typical`.

    A power of two or, where little more than one occurs, less than the next. Numbers of levels that
    the file claims are believed where half of them occur, and increasingly from two fifths on.
    """
    needed = num_typical or num_used
    base = 2.0 ** (math.frexp(needed)[1] - 1)
    levels = base * (1 + min(1, _STEEPNESS * (needed / base - 1)))
    for claim in claims:
        trust = min(1, max(0, 10 * num_used / claim - 4))
        levels = max(levels, levels + trust * (claim - levels))
    return levels


def grey_range(
    values: NDArray[np.int64], claims: Sequence[float] = (), *, least: float = _MIN_LEVELS
) -> tuple[float, float]:
    """Black and white of an image with these distinct values, sorted.

    Black is 0, the negative end, or 32768 where all values are above it: signed samples with an
    offset. Values far beyond all others, such as burned-in text or a border, are clipped. The range
    has at least `least` levels: fewer than 256 where the file states fewer than 8 bits.
    """
    offset = min(1, max(0, float(values[0]) / 4096 - 7))  # gradually, from 28672 on
    if offset:
        black, white = _range_from_zero(values, claims, least)
        raised = 32768 + _range_from_zero(values - 32768, (), least)[1]
        return black + offset * (32768 - black), white + offset * (raised - white)
    return _range_from_zero(values, claims, least)


def _range_from_zero(
    values: NDArray[np.int64], claims: Sequence[float], least: float
) -> tuple[float, float]:
    last = len(values) - 1
    largest, typical = max(0.0, float(values[-1])), float(values[int(_TYPICAL * last)])
    needed = max(least, _without_outliers(largest, typical) + 1)
    white = num_levels(largest + 1, claims, num_typical=needed) - 1
    if values[0] >= 0:
        return 0.0, white
    lowest, typical = -float(values[0]), -float(values[last - int(_TYPICAL * last)])
    needed = _without_outliers(lowest, typical)
    return -num_levels(lowest, claims, num_typical=needed), white


def _without_outliers(extreme: float, typical: float) -> float:
    """The extreme value; from twice the typical one on it moves gradually to the typical value, and
    is that from four times on.
    """
    typical = max(1.0, typical)
    outlying = min(1, max(0, extreme / typical / 2 - 1))
    return extreme + outlying * (typical - extreme)
