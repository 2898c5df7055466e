"""One image file to one square of grey levels. Preprocessing and prediction share `decode`, so they
cannot differ.

Filter: Pillow's antialiased triangle (BILINEAR). Unlike LANCZOS and BICUBIC it cannot overshoot at
the edges of lead markers, it is twice as fast, and it suffers least from a JPEG decoded at reduced
size (below); BOX aliases.

JPEG at reduced size: libjpeg can skip the fine DCT coefficients, though not their Huffman code: of
300 full-size images of the public data set one takes 2.17 ms at an eighth of the size, 2.65 ms in
full (Pillow 13.0.0, one core of an AMD EPYC), and less is left to scale down. `decode` asks for it
only while both sides stay at least `_REDUCED_MARGIN` times what is needed, and then antialiases.
Each of these images, fitted, then differs from itself decoded in full by less than
`REDUCED_TOLERANCE` grey levels on average, at 32 to 224 pixels (tests/ingest/test_images.py): the
median image by 0.16, the worst, a grainy one at 224, by 0.56.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from xrai.errors import ImageError
from xrai.ingest.dicom import count_scans, is_dicom, max_scans, open_radiograph
from xrai.ingest.greys import FLAT, distinct_values, grey_range, num_levels

REDUCED_TOLERANCE: Final = 0.75  # mean absolute difference of one image, of 255 grey levels

Hold = Callable[[int], AbstractContextManager[None]]  # takes bytes of a budget of memory

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # how files begin
_WHOLE = "whole"  # a fit of `decode_whole` alone
_REDUCED_MARGIN = 2.0
_WHOLE_PIXELS = 1 << 24  # of an image that is converted and scaled as a whole
_STRIP_PIXELS = 1 << 20  # of a larger one that are converted and scaled at a time
_STRIP_BYTES = 12  # a pixel, for the copies on that way
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # a pixel of Pillow's modes, else 4
_DICOM_BYTES = 8  # a pixel, for all that pydicom and its decoders hold at once
_FILTER = Image.Resampling.BILINEAR
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what turns the stored image upright (EXIF 2.32, tag 274)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}
# What Pillow's readers raise on damaged files, found by feeding them such files
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError),
    *(struct.error, zlib.error),
)


def decode(
    data: bytes | NDArray[np.uint8],
    *,
    size: int,
    fit: str,
    max_pixels: int,
    hold: Hold = lambda num_bytes: nullcontext(),
) -> NDArray[np.uint8]:
    """A JPEG, PNG or DICOM file, or an array (H, W) uint8, to (size, size) uint8; 0 is black.

    Colours become luma (ITU-R 601), transparency becomes black. Samples of 16 bits are divided by
    the range of the bits that they use (`xrai.ingest.greys`). Nothing else is stretched: stretching
    each image by its own contrast can strengthen shortcuts. EXIF orientation is applied. DICOM
    looks as a viewer first shows it (`xrai.ingest.dicom`), with square pixels. `fit`: "crop" keeps
    the middle of the long side, "squash" scales both sides to `size`, "pad" adds black. `hold` is
    entered with the number of bytes that decoding takes, before it takes them.

    Raises `ImageError` with a short reason when the data is empty, cut short, damaged, of another
    format, shows one grey level throughout, or declares more than `max_pixels` pixels, which is
    checked before anything is decoded; `SourceError` for DICOM without pydicom.
    """
    return decode_sized(data, size=size, fit=fit, max_pixels=max_pixels, hold=hold)[0]


def decode_whole(
    data: bytes, *, max_pixels: int, hold: Hold = lambda num_bytes: nullcontext()
) -> NDArray[np.uint8]:
    """A JPEG, PNG or DICOM file as `decode` sees it, whole and at its own resolution: (H, W) uint8,
    with square pixels. Raises what `decode` raises.
    """
    return decode_sized(data, size=0, fit=_WHOLE, max_pixels=max_pixels, hold=hold)[0]


def decode_sized(
    data: bytes | NDArray[np.uint8],
    *,
    size: int,
    fit: str,
    max_pixels: int,
    hold: Hold = lambda num_bytes: nullcontext(),
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """`decode`, and (width, height) of the whole image, upright, before it is fitted, in pixels."""
    if isinstance(data, np.ndarray):
        if data.ndim != 2 or data.dtype != np.uint8 or data.size == 0:
            raise ImageError(
                f"is an array of shape {data.shape} and type {data.dtype}, not a grey image"
            )
        height, width = data.shape
        _check_num_pixels(width, height, max_pixels=max_pixels)
        box, scaled = _geometry(width, height, size=size, fit=fit)
        grey = Image.fromarray(data).resize(scaled, _FILTER, box=box)
        return _fitted(grey, size=size), (width, height)
    if is_dicom(data):
        radiograph = open_radiograph(data)
        width, height, aspect = radiograph.width, radiograph.height, radiograph.aspect
        _check_num_pixels(width, height, max_pixels=max_pixels)
        (left, top, right, bottom), scaled = _geometry(width, height * aspect, size=size, fit=fit)
        box = (left, top / aspect, right, bottom / aspect)  # above in square pixels
        strip_bytes = width * _num_rows((width, height)) * _STRIP_BYTES
        with hold(len(data) + width * height * _DICOM_BYTES + strip_bytes):
            samples, to_levels = radiograph.unpack()
            grey = _scaled(
                lambda upper, lower: Image.fromarray(to_levels(samples[upper:lower])),
                *((width, height), box, scaled),
            )
        return _fitted(grey, size=size), (width, height)
    with _open(data) as image:
        width, height = image.size
        _check_num_pixels(width, height, max_pixels=max_pixels)
        # Of the true size: a reduced image covers whole blocks, so up to 7 pixels more than exist
        box, scaled = _geometry(width, height, size=size, fit=fit)
        num_bytes = len(data)
        if isinstance(image, JpegImageFile):
            num_bytes += _check_scans(image, data)
            factor = _reduce_on_load(image, size=size, fit=fit)
            left, top, right, bottom = box
            box = (left / factor, top / factor, right / factor, bottom / factor)
        num_pixels = image.width * image.height
        num_bytes += num_pixels * _BYTES.get(image.mode, 4)
        num_bytes += image.width * _num_rows(image.size) * _STRIP_BYTES
        with hold(num_bytes):
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
            grey = _scaled(_greys_of(image, data), image.size, box, scaled)
        fitted = _fitted(grey, size=size, turn=turn)
        return fitted, (height, width) if turn in _SWAPS_SIDES else (width, height)


def format_fault(data: bytes) -> str:
    """Why a file is no image, by its first bytes alone; empty where it may be one."""
    if not data:
        return "is empty (0 bytes)"
    is_known = data.startswith((_JPEG, _PNG)) or is_dicom(data)
    return "" if is_known else "is not a JPEG, PNG or DICOM file"


def ratio_of(data: bytes | NDArray[np.uint8]) -> float:
    """The width of a whole image that `decode` takes, upright, for a height of 1. Raises
    `ImageError`.
    """
    if isinstance(data, np.ndarray):
        height, width = data.shape
        return float(width / height)
    if is_dicom(data):
        radiograph = open_radiograph(data)
        return radiograph.width / (radiograph.height * radiograph.aspect)
    with _open(data) as image:
        width, height = image.size
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    return height / width if turn in _SWAPS_SIDES else width / height


def shown_box(ratio: float, *, fit: str) -> "_Box":
    """Which part of an image of height 1 and width `ratio` the square of `decode` shows: (left,
    top, right, bottom), of fit "pad" with the black around it.
    """
    if fit == "squash":
        return (0.0, 0.0, ratio, 1.0)
    side = min(ratio, 1.0) if fit == "crop" else max(ratio, 1.0)
    left, top = (ratio - side) / 2, (1 - side) / 2
    return (left, top, left + side, top + side)


@contextmanager
def _open(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open a file's header; errors of Pillow inside the block become `ImageError`.

    The readers are called by name: `Image.open` would apply Pillow's own limit of pixels, a global
    setting.
    """
    if words := format_fault(data):
        raise ImageError(words)
    try:
        if data.startswith(_JPEG):
            image: ImageFile.ImageFile = JpegImageFile(io.BytesIO(data))
            # Else the decoder gets 64 KiB at a time, and takes the interpreter's lock for each
            image.decodermaxblock = len(data)
        else:
            image = PngImageFile(io.BytesIO(data))
        with image:
            yield image
    except _DECODER_ERRORS as error:
        said = " ".join(str(error).split())
        is_plain = said and isinstance(error, OSError | SyntaxError | ValueError)  # not of Python
        raise ImageError(f"is cut short or damaged{f' ({said})' if is_plain else ''}") from error


def _check_num_pixels(width: int, height: int, *, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"declares {width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"declares {width} x {height} pixels, more than images.max_pixels = {max_pixels}"
        )


_Box = tuple[float, float, float, float]  # (left, top, right, bottom)


def _geometry(width: float, height: float, *, size: int, fit: str) -> tuple[_Box, tuple[int, int]]:
    """The box of the image that is kept, and the (width, height) it is scaled to."""
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side), (size, size)
    if fit == "squash":
        return (0, 0, width, height), (size, size)
    if fit == _WHOLE:
        return (0, 0, width, height), (max(1, round(width)), max(1, round(height)))
    assert fit == "pad", fit
    scale = size / max(width, height)
    return (0, 0, width, height), (max(1, round(width * scale)), max(1, round(height * scale)))


def _reduce_on_load(image: JpegImageFile, *, size: int, fit: str) -> int:
    """Let libjpeg decode luma alone where it can, at 1/1, 1/2, 1/4 or 1/8 of the size.

    Returns 1, 2, 4 or 8.
    """
    width, height = image.size
    (left, top, right, bottom), scaled = _geometry(width, height, size=size, fit=fit)
    room = min((right - left) / scaled[0], (bottom - top) / scaled[1]) / _REDUCED_MARGIN
    factor = max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))
    mode = "L" if image.mode in ("L", "RGB") else image.mode
    image.draft(mode, (max(1, width // factor), max(1, height // factor)))
    assert image.size == (-(-width // factor), -(-height // factor))
    return factor


def _check_scans(image: JpegImageFile, data: bytes) -> int:
    """Refuse a JPEG of so many scans that decoding takes minutes. Returns the number of bytes that
    libjpeg holds for the coefficients of several ones.
    """
    assert image.fp is not None
    num_scans = 1 + count_scans(data, image.fp.tell())  # now behind the first one
    if num_scans > (allowed := max_scans(image.width * image.height)):
        raise ImageError(f"is a JPEG of {num_scans} scans; at most {allowed} are decoded")
    return 2 * image.layers * image.width * image.height if num_scans > 1 else 0


_Rows = Callable[[int, int], Image.Image]  # some rows of an image, in mode L or F


def _greys_of(image: Image.Image, data: bytes) -> _Rows:
    """Rows as luma, or in grey levels 0 to 255 for samples of 16 bits, so that rounding comes
    last.
    """

    def rows(upper: int, lower: int) -> Image.Image:
        whole = (upper, lower) == (0, image.height)
        return image if whole else image.crop((0, upper, image.width, lower))

    if image.mode == "L" and "transparency" not in image.info:
        return rows
    if not image.mode.startswith("I"):
        if image.has_transparency_data and not any(
            rows(*strip).convert("RGBA").getchannel("A").getbbox() for strip in _strips(image.size)
        ):
            raise ImageError("is transparent throughout")
        if isinstance(image, PngImageFile) and data[24] == 16:  # bits, of which Pillow keeps 8
            brightest = int(np.max(image.getextrema()[:3]))
            if num_levels(256 * (brightest + 1)) < 1 << 16:
                raise ImageError(
                    "is a colour PNG that declares 16 bits and uses fewer; save it in grey levels"
                )
        return lambda upper, lower: _to_luma(rows(upper, lower))
    values = np.unique(
        np.concatenate([distinct_values(np.asarray(rows(*strip))) for strip in _strips(image.size)])
    )
    place = data.find(b"sBIT", 0, data.find(b"IDAT")) + 4
    claims = []
    if place >= 4:  # the standard asks to scale fewer bits up to 16; not everybody does
        bits = data[place]
        claims = [2.0**bits if values[-1] < 1 << bits else 65536.0]
    black, white = grey_range(values, claims)

    def to_levels(upper: int, lower: int) -> Image.Image:
        grey = np.asarray(rows(upper, lower)).astype(np.float32) - np.float32(black)
        grey *= np.float32(255 / (white - black))
        return Image.fromarray(np.clip(grey, 0, 255, out=grey))

    return to_levels


def _to_luma(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("L")
    return image.convert("RGB").convert("L")


def _num_rows(size: tuple[int, int]) -> int:
    """How many rows of an image are converted and scaled at a time."""
    width, height = size
    is_large = width * height > _WHOLE_PIXELS
    return min(height, max(1, _STRIP_PIXELS // width)) if is_large else height


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(upper, lower) of the rows that are converted one after the other."""
    num_rows = _num_rows(size)
    for upper in range(0, size[1], num_rows):
        yield upper, min(size[1], upper + num_rows)


def _scaled(rows: _Rows, size: tuple[int, int], box: _Box, scaled: tuple[int, int]) -> Image.Image:
    """Scale the box of an image. A large one is scaled strip by strip, first all rows and then the
    columns, as `Image.resize` does it, unless the image is so high that columns come first there.
    """
    first, *others = _strips(size)
    if not others:
        return rows(*first).resize(scaled, _FILTER, box=box)
    left, top, right, bottom = box
    narrow = None
    for upper, lower in (first, *others):
        num_rows = lower - upper
        strip = rows(upper, lower).resize(
            (scaled[0], num_rows), _FILTER, box=(left, 0, right, num_rows)
        )
        narrow = narrow or Image.new(strip.mode, (scaled[0], size[1]))
        narrow.paste(strip, (0, upper))
    assert narrow is not None
    return narrow.resize(scaled, _FILTER, box=(0, top, scaled[0], bottom))


def _fitted(
    fitted: Image.Image, *, size: int, turn: Image.Transpose | None = None
) -> NDArray[np.uint8]:
    """Round, turn, and add black up to the square: (size, size); of size 0, none.

    Raises `ImageError` where all is of one grey level.
    """
    levels = np.asarray(fitted)
    if fitted.mode == "F":
        levels = np.rint(levels).clip(0, 255).astype(np.uint8)
    if levels.min() == levels.max():
        raise ImageError(FLAT)
    if turn is not None:
        levels = np.asarray(Image.fromarray(levels).transpose(turn))
    if not size or levels.shape == (size, size):
        return levels
    height, width = levels.shape
    left, top = (size - width) // 2, (size - height) // 2
    square = np.zeros((size, size), np.uint8)
    square[top : top + height, left : left + width] = levels
    return square
