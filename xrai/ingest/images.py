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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from xrai.errors import ImageError
from xrai.ingest.dicom import is_dicom, open_radiograph
from xrai.ingest.greys import FLAT, distinct_values, grey_range

REDUCED_TOLERANCE: Final = 0.75  # mean absolute difference of one image, of 255 grey levels

_REDUCED_MARGIN = 2.0
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
    data: bytes | NDArray[np.uint8], *, size: int, fit: str, max_pixels: int
) -> NDArray[np.uint8]:
    """A JPEG, PNG or DICOM file, or an array (H, W) uint8, to (size, size) uint8; 0 is black.

    Colours become luma (ITU-R 601), transparency becomes black. Samples of 16 bits are divided by
    the range of the bits that they use (`xrai.ingest.greys`). Nothing else is stretched: stretching
    each image by its own contrast can strengthen shortcuts. EXIF orientation is applied. DICOM
    looks as a viewer first shows it (`xrai.ingest.dicom`), with square pixels. `fit`: "crop" keeps
    the middle of the long side, "squash" scales both sides to `size`, "pad" adds black.

    Raises `ImageError` with a short reason when the data is empty, cut short, damaged, of another
    format, shows one grey level throughout, or declares more than `max_pixels` pixels, which is
    checked before anything is decoded; `SourceError` for DICOM without pydicom.
    """
    return decode_sized(data, size=size, fit=fit, max_pixels=max_pixels)[0]


def decode_sized(
    data: bytes | NDArray[np.uint8], *, size: int, fit: str, max_pixels: int
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
        return _fitted(Image.fromarray(data), box, scaled, size=size), (width, height)
    if is_dicom(data):
        radiograph = open_radiograph(data)
        _check_num_pixels(radiograph.width, radiograph.height, max_pixels=max_pixels)
        box, scaled = _geometry(
            radiograph.width, radiograph.height * radiograph.aspect, size=size, fit=fit
        )
        left, top, right, bottom = box  # in square pixels
        stored = (left, top / radiograph.aspect, right, bottom / radiograph.aspect)
        grey = Image.fromarray(radiograph.to_grey())
        return _fitted(grey, stored, scaled, size=size), (radiograph.width, radiograph.height)
    with _open(data) as image:
        width, height = image.size
        _check_num_pixels(width, height, max_pixels=max_pixels)
        # Of the true size: a reduced image covers whole blocks, so up to 7 pixels more than exist
        box, scaled = _geometry(width, height, size=size, fit=fit)
        if isinstance(image, JpegImageFile):
            factor = _reduce_on_load(image, size=size, fit=fit)
            left, top, right, bottom = box
            box = (left / factor, top / factor, right / factor, bottom / factor)
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
        fitted = _fitted(_to_grey(image, data), box, scaled, size=size, turn=turn)
        return fitted, (height, width) if turn in _SWAPS_SIDES else (width, height)


@contextmanager
def _open(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open a file's header; errors of Pillow inside the block become `ImageError`.

    The readers are called by name: `Image.open` would apply Pillow's own limit of pixels, a global
    setting.
    """
    if not data:
        raise ImageError("is empty (0 bytes)")
    try:
        if data.startswith(b"\xff\xd8\xff"):
            image: ImageFile.ImageFile = JpegImageFile(io.BytesIO(data))
        elif data.startswith(b"\x89PNG\r\n\x1a\n"):
            image = PngImageFile(io.BytesIO(data))
        else:
            raise ImageError("is not a JPEG, PNG or DICOM file")
        with image:
            yield image
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"is cut short or damaged ({reason})") from error


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


def _to_grey(image: Image.Image, data: bytes) -> Image.Image:
    """Mode L, or F in grey levels 0 to 255 for samples of 16 bits, so that rounding comes last."""
    if image.mode == "L" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        samples = np.asarray(image)  # (H, W)
        values = distinct_values(samples)
        place = data.find(b"sBIT", 0, data.find(b"IDAT")) + 4
        claims = []
        if place >= 4:  # the standard asks to scale fewer bits up to 16; not everybody does
            bits = data[place]
            claims = [2.0**bits if values[-1] < 1 << bits else 65536.0]
        _, white = grey_range(values, claims)
        grey = samples.astype(np.float32) * np.float32(255 / white)
        return Image.fromarray(np.minimum(grey, np.float32(255)))
    if image.has_transparency_data:
        black, colours = Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA")
        if colours.getchannel("A").getbbox() is None:
            raise ImageError("is transparent throughout")
        return Image.alpha_composite(black, colours).convert("L")
    return image.convert("RGB").convert("L")


def _fitted(
    grey: Image.Image,
    box: _Box,
    scaled: tuple[int, int],
    *,
    size: int,
    turn: Image.Transpose | None = None,
) -> NDArray[np.uint8]:
    """Scale the box of an image, turn it, and add black up to the square: (size, size).

    Raises `ImageError` where all of the box is of one grey level.
    """
    fitted = grey.resize(scaled, _FILTER, box=box)
    if fitted.mode == "F":
        fitted = Image.fromarray(np.rint(np.asarray(fitted)).clip(0, 255).astype(np.uint8))
    darkest, brightest = fitted.getextrema()
    if darkest == brightest:
        raise ImageError(FLAT)
    if turn is not None:
        fitted = fitted.transpose(turn)
    if fitted.size != (size, size):
        square = Image.new("L", (size, size))
        square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
        fitted = square
    return np.asarray(fitted)
