"""One image file to one square of grey levels. Preprocessing and prediction share `decode`, so they
cannot differ.

Filter: Pillow's antialiased triangle (BILINEAR). Unlike LANCZOS and BICUBIC it cannot overshoot at
the edges of lead markers, it is twice as fast, and it leaves the smallest trace of a JPEG decoded
at reduced size (below); BOX aliases.

JPEG at reduced size: libjpeg can leave out the fine DCT coefficients, though not the Huffman code
that they are in: of 300 full-size films of the public data set one takes 2.17 ms at an eighth of
the size, 2.65 ms in full (Pillow 13.0.0, one core of an AMD EPYC), and less is left to scale down.
`decode` asks for it only while both sides stay at least `_REDUCED_MARGIN` times what is needed, and
then antialiases. Each of those films, fitted, then differs from itself decoded in full by less than
`REDUCED_TOLERANCE` grey levels on average, at 32 to 224 pixels (tests/dataset/test_images.py): the
median film by 0.16, the worst, a grainy one at 224, by 0.56.
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

REDUCED_TOLERANCE: Final = 0.75  # mean absolute difference of one picture, grey levels of 255

_REDUCED_MARGIN = 2.0
_FILTER = Image.Resampling.BILINEAR
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what turns the stored picture upright (EXIF 2.32, tag 274)
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
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    struct.error,
    zlib.error,
)


def decode(
    data: bytes | NDArray[np.uint8], *, size: int, fit: str, max_pixels: int
) -> NDArray[np.uint8]:
    """The picture in a JPEG, PNG or DICOM file, or in an array (H, W) uint8: (size, size) uint8
    grey levels, 0 black.

    Colours become luma (ITU-R 601), what is transparent black. Samples of 16 bits are divided by
    the range that they are of: 4095 when the largest fits into 12 bits (scanners write them so),
    else 65535; nothing else is stretched, for stretching each image by its own contrast can
    strengthen shortcuts. EXIF orientation is applied. DICOM comes out as a viewer first shows it
    (`xrai.ingest.dicom`), its pixels as square ones. `fit`: "crop" cuts the middle of the long side
    away, "squash" scales both sides to `size`, "pad" adds black.

    Raises `ImageError` with a short reason when the data is empty, cut short, damaged, of another
    format, or declares more than `max_pixels` pixels, which is checked before anything is decoded;
    `SourceError` for DICOM without pydicom.
    """
    return decode_sized(data, size=size, fit=fit, max_pixels=max_pixels)[0]


def decode_sized(
    data: bytes | NDArray[np.uint8], *, size: int, fit: str, max_pixels: int
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """What `decode` gives, and (width, height) of the whole picture, upright and before it is
    fitted, in pixels.
    """
    if isinstance(data, np.ndarray):
        if data.ndim != 2 or data.dtype != np.uint8 or data.size == 0:
            raise ImageError(
                f"is an array of shape {data.shape} and type {data.dtype}, not a grey picture"
            )
        _check_num_pixels(data.shape[1], data.shape[0], max_pixels=max_pixels)
        height, width = data.shape
        return np.asarray(_fit(Image.fromarray(data), width, height, size=size, fit=fit)), (
            width,
            height,
        )
    if is_dicom(data):
        film = open_radiograph(data)
        _check_num_pixels(film.width, film.height, max_pixels=max_pixels)
        grey, true_height = Image.fromarray(film.to_grey()), film.height * film.aspect
        fitted = _fit(grey, film.width, true_height, size=size, fit=fit, factors=(1, film.aspect))
        return np.asarray(fitted), (film.width, film.height)
    with _open(data) as picture:
        width, height = picture.size
        _check_num_pixels(width, height, max_pixels=max_pixels)
        factor = (
            _reduce_on_load(picture, size=size, fit=fit)
            if isinstance(picture, JpegImageFile)
            else 1
        )
        picture.load()
        turn = _UPRIGHT.get(picture.getexif().get(_ORIENTATION_TAG, 1))
        fitted = _fit(
            _to_grey(picture),
            width,
            height,
            size=size,
            fit=fit,
            factors=(factor, factor),
            turn=turn,
        )
        return np.asarray(fitted), (height, width) if turn in _SWAPS_SIDES else (width, height)


@contextmanager
def _open(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open a file's header; errors of Pillow inside the block become `ImageError`.

    The readers are called by name: `Image.open` would compare with Pillow's own limit of pixels, a
    global setting.
    """
    if not data:
        raise ImageError("is empty (0 bytes)")
    try:
        if data.startswith(b"\xff\xd8\xff"):
            picture: ImageFile.ImageFile = JpegImageFile(io.BytesIO(data))
        elif data.startswith(b"\x89PNG\r\n\x1a\n"):
            picture = PngImageFile(io.BytesIO(data))
        else:
            raise ImageError("is not a JPEG, PNG or DICOM file")
        with picture:
            yield picture
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


def _geometry(
    width: float, height: float, *, size: int, fit: str
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """The box (left, top, right, bottom) of the picture that is kept, and the (width, height) it
    is scaled to.
    """
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side), (size, size)
    if fit == "squash":
        return (0, 0, width, height), (size, size)
    assert fit == "pad", fit
    scale = size / max(width, height)
    return (0, 0, width, height), (max(1, round(width * scale)), max(1, round(height * scale)))


def _reduce_on_load(picture: JpegImageFile, *, size: int, fit: str) -> int:
    """Let libjpeg decode the luma alone where it can, and a 1st, 2nd, 4th or 8th of the size,
    the factor returned.
    """
    width, height = picture.size
    (left, top, right, bottom), (scaled_width, scaled_height) = _geometry(
        width, height, size=size, fit=fit
    )
    room = min((right - left) / scaled_width, (bottom - top) / scaled_height) / _REDUCED_MARGIN
    factor = max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))
    mode = "L" if picture.mode in ("L", "RGB") else picture.mode
    picture.draft(mode, (max(1, width // factor), max(1, height // factor)))
    assert picture.size == (-(-width // factor), -(-height // factor))
    return factor


def _to_grey(picture: Image.Image) -> Image.Image:
    """Mode L, or F in grey levels 0 to 255 for samples of 16 bits, so that rounding comes last."""
    if picture.mode == "L" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        samples = np.asarray(picture).astype(np.float32)  # (H, W)
        largest = 4095 if samples.max() <= 4095 else 65535
        return Image.fromarray(samples * np.float32(255 / largest))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, picture.convert("RGBA")).convert("L")
    return picture.convert("RGB").convert("L")


def _fit(
    grey: Image.Image,
    width: float,
    height: float,
    *,
    size: int,
    fit: str,
    factors: tuple[float, float] = (1, 1),
    turn: Image.Transpose | None = None,
) -> Image.Image:
    """Fit a picture to the square; mode L. It is `factors` times smaller than (`width`, `height`),
    the true size.

    The box follows from the true size: a reduced picture covers whole blocks, so up to 7 pixels
    more than there are. `turn` comes before the black of "pad", so that a file stored turned comes
    out as an upright one.
    """
    (left, top, right, bottom), scaled = _geometry(width, height, size=size, fit=fit)
    box = (left / factors[0], top / factors[1], right / factors[0], bottom / factors[1])
    fitted = grey.resize(scaled, _FILTER, box=box)
    if fitted.mode == "F":
        fitted = Image.fromarray(np.rint(np.asarray(fitted)).clip(0, 255).astype(np.uint8))
    if turn is not None:
        fitted = fitted.transpose(turn)
    if fitted.size == (size, size):
        return fitted
    square = Image.new("L", (size, size))
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return square
