"""A DICOM file to grey levels: the one home of pydicom, imported when the first such file comes
(extra `dicom`).

`xrai.ingest.images` calls it, for preprocessing and prediction alike. A radiograph passes through
the stages of the standard (PS3.3 C.11): modality transformation, the first VOI LUT or window,
MONOCHROME1 or PresentationLUTShape INVERSE inverted; and it is turned as PatientOrientation says.
All in floating point: `images` rounds after scaling.

No header text gets into a message: reasons consist of words written here and of numbers. Only the
tags named below are read, and of the patient the ID alone, of which the data set keeps a hash.

Pillow unpacks JPEG and JPEG 2000, pydicom itself RLE. JPEG lossless and JPEG-LS need GDCM, which
ends the whole process on some damaged files (3.2.6, uncaught C++ exceptions); so it runs in a
process of its own, `python -m` this module.
"""

import atexit
import io
import logging
import math
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from xrai.errors import ImageError, OtherImageError, SourceError
from xrai.ingest.greys import FLAT, distinct_values, grey_range, num_levels
from xrai.log import ignore_warnings

if TYPE_CHECKING:
    from pydicom import Dataset

_TAG_NAMES = """
BitsAllocated BitsStored Columns HighBit ImagerPixelSpacing LargestImagePixelValue Modality
ModalityLUTSequence NumberOfFrames PatientOrientation PhotometricInterpretation PixelAspectRatio
PixelData PixelPaddingRangeLimit PixelPaddingValue PixelRepresentation PixelSpacing
PlanarConfiguration PresentationIntentType PresentationLUTShape RescaleIntercept RescaleSlope Rows
SamplesPerPixel VOILUTFunction VOILUTSequence ViewCodeSequence ViewPosition WindowCenter WindowWidth
"""
_TAGS = _TAG_NAMES.split()
# Modality (PS3.3 C.7.3.1.1.1) of what is never a chest radiograph
_OTHER_MODALITIES = frozenset(
    {"CT", "ECG", "ES", "GM", "IO", "MG", "MR", "NM", "OPT", "PT", "PX", "SM", "US", "XA", "XC"}
)
# Words of ViewPosition (PS3.3 C.8.7.1.1.7, and what devices write): "L LAT", "LAT_L", "LLAT"; "AP
# SUPINE". One who lies on a side (decubitus) is seen from the front
_SIDE_WORD = re.compile(
    r"[LR]{0,2}LAT(?:ER(?:O|AL\w*))?[LR]?|LL|RL|SEITLICH\w*|SEITE|PROFILE?|PERFIL"
)
_FRONT_WORD = re.compile(r"AP|PA|FRONTAL")
_LYING_WORD = re.compile(r"LLD|RLD|DECUB\w*")
# ViewCodeSequence (PS3.16 CID 4010): lateral, left lateral, right lateral; SNOMED CT, SNOMED-RT
_SIDE_VIEW_CODES = frozenset(
    {"399067008", "399173006", "399198007", "R-10232", "R-10236", "R-102CD"}
)
_MAX_INFLATED_BYTES = 1 << 29  # of a file that is deflated as a whole
# How a file without preamble begins: with a short element of group 2 or 8, in one of the encodings
_FIRST_ELEMENT = re.compile(
    rb"(?:[\x02\x08]\0.\0|\0[\x02\x08]\0.)(?:AE|CS|DA|DT|LO|OB|SH|TM|UI|UL)"
    rb"|[\x02\x08]\0.\0[\x02-\x40]\0\0\0",
    re.DOTALL,
)
_MAX_ASPECT = 8.0  # of a pixel
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
# Start of frame in JPEG and JPEG-LS; between these 0xC4, 0xC8 and 0xCC mean other things
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
# What pydicom and its decoders raise on damaged files, found by feeding them such files
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, MemoryError, struct.error, zlib.error),
)
_UNPACK_TIMEOUT_S = 60.0  # of one image in the other process: GDCM may also hang
_NO_RANGE = "is DICOM whose RescaleSlope or table leaves no range of values"

_START_OF_SCAN: Final = b"\xff\xda"
_MAX_SCANS, _USUAL_SCANS = 50, 12  # of a JPEG, and of what encoders write
_MAX_SCANNED = 1_200_000_000  # pixels over all scans: those of 12 scans of 100 million pixels
# Samples (h, W) or (h, W, 3) to what a viewer shows (h, W): 0 black to 255 white, not rounded
Levels = Callable[[NDArray[Any]], NDArray[np.float32]]


def count_scans(data: bytes, start: int = 0) -> int:
    """How many scans of a JPEG begin from a place on. `bytes.count` takes three times as long, and
    all other threads wait for it: 1.4 ms with 1.5 MB.
    """
    begins = np.frombuffer(_START_OF_SCAN, np.uint16)[0]
    return sum(
        int(
            np.count_nonzero(
                np.frombuffer(data, np.uint16, (len(data) - place) // 2, place) == begins
            )
        )
        for place in (start, start + 1)
        if len(data) - place >= 2
    )


def max_scans(num_pixels: int) -> int:
    """How many scans of a JPEG are decoded: fewer of a large one, whose scans take longer."""
    return min(_MAX_SCANS, max(_USUAL_SCANS, _MAX_SCANNED // max(1, num_pixels)))


def is_dicom(data: bytes) -> bool:
    """Whether a file's bytes are those of a DICOM file, with or without preamble."""
    return _start(data) is not None


def _start(data: bytes) -> int | None:
    """Where a DICOM file's first element is."""
    for place in (132, 4):
        if data[place - 4 : place] == b"DICM":
            return place
    return 0 if _FIRST_ELEMENT.match(data) else None


def versions() -> dict[str, str]:
    """Versions of what reads DICOM, empty where it is missing: others may give other pixels."""
    found = {}
    for package in ("pydicom", "python-gdcm"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def read_patient_id(data: bytes) -> str:
    """PatientID of a DICOM file, never to be shown; empty where it has none or is damaged.

    Raises `SourceError` where pydicom is not installed.
    """
    try:
        with _reading(), quiet():
            dataset = _read(data, ["PatientID"], stop_before_pixels=True)
            return str(_value(dataset, "PatientID") or "").strip()
    except ImageError:
        return ""


def has_unknown_view(data: bytes) -> bool:
    """Whether a DICOM file states a ViewPosition of which nothing is known.

    Raises what `read_texts` raises.
    """
    position = read_texts(data, ["ViewPosition"])["ViewPosition"]
    return bool(position) and not _view_of(position)


def transfer_syntaxes() -> list[str]:
    """UIDs of the encodings whose images are read with the packages installed here."""
    from pydicom import uid
    from pydicom.pixels.decoders.base import get_decoder

    known = [*uid.UncompressedTransferSyntaxes, uid.RLELossless]
    known += [*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes, *uid.JPEG2000TransferSyntaxes]
    found = []
    for syntax in known:
        with suppress(NotImplementedError):
            if get_decoder(syntax).is_available:
                found.append(str(syntax))
    return found


def read_texts(data: bytes, tags: Sequence[str]) -> dict[str, str]:
    """Some tags of a header as texts, for objects that refer to it, never to be shown or logged:
    several values joined by a backslash, empty where a tag is missing or damaged.

    Raises `ImageError` where the file is damaged, `SourceError` where pydicom is not installed.
    """
    with _reading(), quiet():
        dataset = _read(data, tags, stop_before_pixels=True)
        values = {name: _value(dataset, name) for name in tags}
        return {name: _text(value) for name, value in values.items()}


@dataclass(frozen=True)
class Radiograph:
    """A file whose header states one frontal image; its pixels are still packed."""

    width: int  # upright, pixels
    height: int
    aspect: float  # height of a pixel over its width, upright
    _data: bytes
    _dataset: "Dataset"
    _directions: tuple[str, str]  # of the patient, along a stored row and a stored column

    def unpack(self) -> tuple[NDArray[Any], Levels]:
        """Samples (H, W) or (H, W, 3), upright, and what makes levels of some of their rows.

        Raises `ImageError` when the pixels are damaged, or no installed package unpacks them.
        """
        with _reading("PixelData"):
            with quiet():
                samples, to_levels = _samples_and_levels(self._data, self._dataset)
            samples = _turned(samples, self._directions)
        assert samples.shape[:2] == (self.height, self.width)
        return samples, to_levels


@dataclass(frozen=True)
class Window:
    """How a viewer shows the values of a film: `slope` * stored + `intercept` through the linear
    window of PS3.3 C.11.2.1.2.1.
    """

    centre: float
    width: float
    slope: float
    intercept: float
    is_inverse: bool  # whether low values are white


def stored_values(radiograph: Radiograph) -> tuple[NDArray[np.uint16], Window] | None:
    """The stored samples (H, W), upright, the lowest of them 0, and the window that shows them as
    `Radiograph.unpack` does, within a level; None where no linear window does: colours, tables,
    curves, padding that is not at the dark end, pixels that are not square.

    Raises what `unpack` raises.
    """
    samples, to_levels = radiograph.unpack()
    lowest, highest = int(samples.min()), int(samples.max())
    if samples.ndim != 2 or abs(radiograph.aspect - 1) > 0.01 or highest - lowest >= 1 << 16:
        return None
    values = np.arange(lowest, highest + 1)
    levels = to_levels(values).astype(np.float64)
    if is_inverse := bool(levels[0] > levels[-1]):
        levels = 255 - levels
    (ramp,) = np.nonzero((levels > 0) & (levels < 255))
    if len(ramp) < 2:
        return None
    first, last = ramp[0], ramp[-1]
    rise = (levels[last] - levels[first]) / (last - first)  # levels a value
    start = levels[first] - rise * first
    places = np.arange(len(values))
    if rise <= 0 or np.abs(np.clip(start + rise * places, 0, 255) - levels).max() > 1:
        return None
    dataset = radiograph._dataset
    slope, intercept = 1.0, 0.0
    with suppress(ImageError):
        stated = (
            _rescale(dataset, f"Rescale{name}", own)
            for name, own in (("Slope", 1), ("Intercept", 0))
        )
        slope, intercept = stated
    if not slope > 0:
        slope, intercept = 1.0, 0.0
    intercept += slope * lowest
    window = Window(
        centre=slope * (0.5 - start / 255) * 255 / rise + intercept + 0.5,
        width=slope * 255 / rise + 1,
        slope=slope,
        intercept=intercept,
        is_inverse=is_inverse,
    )
    return (samples.astype(np.int32) - lowest).astype(np.uint16), window


def open_radiograph(data: bytes) -> Radiograph:
    """Read a DICOM file's header.

    Raises `ImageError` with a short reason when it is damaged, `OtherImageError` when it is no
    single frontal image of a chest, `SourceError` where pydicom is not installed.
    """
    with _reading(), quiet():
        dataset = _read_image(data)
        width, height = dataset.Columns, dataset.Rows
        if dataset.NumberOfFrames > 1:
            raise OtherImageError(
                f"is DICOM of {dataset.NumberOfFrames} frames; one image per file is read"
            )
        _refuse_other_kinds(dataset)
        directions = _directions(dataset)
        aspect = _aspect(dataset)
    if directions[0] in "HF":
        width, height, aspect = height, width, 1 / aspect
    return Radiograph(width, height, aspect, data, dataset, directions)


def write_radiograph(
    samples: NDArray[np.uint16], tags: Mapping[str, Any], *, identity: Sequence[str]
) -> bytes:
    """A DICOM file of a drawn radiograph of up to 16 bits, (H, W).

    `tags` are set by their keywords. `identity` names the image, and all but its last part the
    study, so that the same names give the same bytes.
    """
    import pydicom
    from pydicom import uid

    dataset = pydicom.Dataset()
    dataset.file_meta = meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = uid.generate_uid(entropy_srcs=["image", *identity])
    dataset.StudyInstanceUID = uid.generate_uid(entropy_srcs=["study", *identity[:-1]])
    dataset.SeriesInstanceUID = uid.generate_uid(entropy_srcs=["series", *identity[:-1]])
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.HighBit = 16, dataset.BitsStored - 1
    dataset.Rows, dataset.Columns = samples.shape
    dataset.PixelData = samples.astype("<u2").tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ headers


@contextmanager
def _reading(part: str = "its header") -> Iterator[None]:
    """Turn what pydicom raises in the block into an `ImageError` that names the file's part alone.

    Raises `SourceError` where pydicom is not installed.
    """
    try:
        from pydicom.errors import BytesLengthException
    except ImportError as error:
        raise SourceError(
            "reading DICOM needs pydicom, which is not installed: pip install 'xrai[dicom]'"
        ) from error
    try:
        yield
    except (*_DAMAGE, BytesLengthException):
        raise ImageError(f"is DICOM that is cut short or damaged ({part})") from None


class _Quiet(threading.local):
    """A filter of pydicom's logger that drops what threads log while they are quiet."""

    is_on = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record of the thread that asks is kept."""
        return not self.is_on


_quiet = _Quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress pydicom's warnings and log records of this thread: they quote header text.

    Other threads hear pydicom as ever, and may be quiet at the same time. Two filters, of warnings
    and of pydicom's logger, stay in the process; outside of such blocks they drop nothing.
    """
    logging.getLogger("pydicom").addFilter(_quiet)
    before, _quiet.is_on = _quiet.is_on, True
    try:
        with ignore_warnings(r"pydicom(\.|$)"):
            yield
    finally:
        _quiet.is_on = before


def _read(data: bytes, tags: Sequence[str], *, stop_before_pixels: bool = False) -> "Dataset":
    import pydicom
    from pydicom import uid

    start = _start(data) or 0
    file = io.BytesIO(data if start == 132 else data[start:])
    file.seek(start if start == 132 else 0)
    meta = pydicom.filereader.read_dataset(
        file,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, vr, length: tag.group != 2,
    )
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        unpacked = unpacker.decompress(file.read(), _MAX_INFLATED_BYTES + 1)
        if len(unpacked) > _MAX_INFLATED_BYTES:
            raise ImageError(f"is DICOM that unpacks to more than {_MAX_INFLATED_BYTES} bytes")
    file.seek(0)
    dataset = pydicom.dcmread(
        file, stop_before_pixels=stop_before_pixels, specific_tags=list(tags), force=True
    )
    if "TransferSyntaxUID" not in dataset.file_meta:  # pydicom has looked how it is encoded
        is_implicit, is_little_endian = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if is_little_endian else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = (
            uid.ImplicitVRLittleEndian if is_implicit else explicit
        )
    return dataset


def _read_image(data: bytes) -> "Dataset":
    """The header and the packed image, with what decoders need and the header may lack."""
    dataset = _read(data, _TAGS)
    if "PixelData" not in dataset:
        raise ImageError("is DICOM without an image (PixelData), or cut short before it")
    photometric = _code(dataset, "PhotometricInterpretation")
    if not photometric:
        raise ImageError("is DICOM whose PhotometricInterpretation is missing or damaged")
    allocated = _integer(dataset, "BitsAllocated")
    stored = _integer(dataset, "BitsStored", allocated)
    high = _integer(dataset, "HighBit", stored - 1)
    completed = {
        "Rows": _integer(dataset, "Rows"),
        "Columns": _integer(dataset, "Columns"),
        "NumberOfFrames": _integer(dataset, "NumberOfFrames", 1) or 1,
        "PhotometricInterpretation": photometric,
        "SamplesPerPixel": _integer(
            dataset, "SamplesPerPixel", 1 if photometric.startswith("MONO") else 3
        ),
        "PlanarConfiguration": _integer(dataset, "PlanarConfiguration", 0),
        "PixelRepresentation": int(_integer(dataset, "PixelRepresentation", 0) == 1),
        "BitsAllocated": allocated,
        "BitsStored": stored,
        "HighBit": high if 0 <= high < allocated else stored - 1,
    }
    for name, value in completed.items():
        setattr(dataset, name, value)
    return dataset


def _value(dataset: "Dataset", name: str) -> Any:
    """A tag's value; None where it is missing or cannot be read."""
    from pydicom.errors import BytesLengthException

    try:
        return dataset.get(name)
    except (*_DAMAGE, BytesLengthException):
        return None


def _text(value: Any) -> str:
    if value is None:
        return ""
    several = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    return "\\".join(str(each).strip() for each in several)


def _numbers(dataset: "Dataset", name: str) -> list[float]:
    """A tag's numbers; empty where it is missing or holds anything else."""
    value = _value(dataset, name)
    try:
        several = [value] if isinstance(value, str | int | float) else list(value)
        numbers = [float(number) for number in several]
    except (TypeError, ValueError):
        return []
    return numbers if all(math.isfinite(number) for number in numbers) else []


def _integer(dataset: "Dataset", name: str, default: int | None = None) -> int:
    numbers = _numbers(dataset, name)
    if not numbers and default is None:
        raise ImageError(f"is DICOM whose {name} is missing or damaged")
    return int(numbers[0]) if numbers else int(default or 0)


def _code(dataset: "Dataset", name: str, default: str = "") -> str:
    return str(_value(dataset, name) or default).strip().upper()


def _refuse_other_kinds(dataset: "Dataset") -> None:
    modality = _code(dataset, "Modality")
    if modality in _OTHER_MODALITIES:
        raise OtherImageError(f"is DICOM of modality {modality}; radiographs (CR, DX, RG) are read")
    if _code(dataset, "PresentationIntentType") == "FOR PROCESSING":
        raise OtherImageError(
            "is DICOM of raw detector data (FOR PROCESSING), not an image to look at"
        )
    if _view_of(_code(dataset, "ViewPosition")) == "side":
        raise OtherImageError("is DICOM of a chest from the side (ViewPosition)")
    views = _value(dataset, "ViewCodeSequence") or ()
    if any(_code(view, "CodeValue") in _SIDE_VIEW_CODES for view in views):
        raise OtherImageError("is DICOM of a chest from the side (ViewCodeSequence)")


def _view_of(position: str) -> str:
    """Whether a ViewPosition says "front" or "side"; "" where it is not known."""
    words = re.findall(r"[^\W\d_]+", position.upper())
    is_side, is_front, is_lying = (
        any(map(pattern.fullmatch, words)) for pattern in (_SIDE_WORD, _FRONT_WORD, _LYING_WORD)
    )
    if is_lying or is_side == is_front:
        return "front" if is_lying else ""
    return "side" if is_side else "front"


def _directions(dataset: "Dataset") -> tuple[str, str]:
    """Where rows and columns run to: L, R, H (head) or F (feet); upright if not stated."""
    stated = [str(text)[:1].upper() for text in _value(dataset, "PatientOrientation") or ()]
    if len(stated) != 2:
        return "L", "F"
    along_row, along_column = stated
    if {along_row, along_column} & {"A", "P"}:
        raise OtherImageError("is DICOM of a chest from the side (PatientOrientation)")
    known = ("LF", "LH", "RF", "RH", "FL", "FR", "HL", "HR")
    return (along_row, along_column) if along_row + along_column in known else ("L", "F")


def _aspect(dataset: "Dataset") -> float:
    """Height of a stored pixel over its width; 1 where nothing plausible is stated."""
    for name in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"):
        sides = _numbers(dataset, name)
        if len(sides) == 2 and min(sides) > 0 and max(sides) <= _MAX_ASPECT * min(sides):
            return sides[0] / sides[1]
    return 1.0


# ------------------------------------------------------------------------------------------- pixels


def _samples_and_levels(data: bytes, dataset: "Dataset") -> tuple[NDArray[Any], Levels]:
    """The stored samples, and how a viewer shows them."""
    from pydicom.uid import RLELossless

    photometric = dataset.PhotometricInterpretation
    is_grey = photometric in ("MONOCHROME1", "MONOCHROME2")
    if not is_grey and not photometric.startswith(("RGB", "YBR")):
        allowed = "MONOCHROME1, MONOCHROME2, RGB and YBR"
        raise ImageError(f"is DICOM whose PhotometricInterpretation is not one of {allowed}")
    allocated, stored, high = dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise ImageError(
            f"is DICOM of {stored} bits (BitsStored) in {allocated} (BitsAllocated); "
            "8 to 16 bits are read"
        )
    samples = _unpack(data, dataset)
    if samples.shape != (dataset.Rows, dataset.Columns) + (() if is_grey else (3,)):
        raise ImageError("is DICOM of other samples per pixel than PhotometricInterpretation says")
    sign_bits = dataset.PixelRepresentation
    if stored < 8 and int(samples.max()) >> (high + 1):
        # These are no overlays, which nobody puts above so few bits: the header is wrong
        stored, high = allocated, allocated - 1
    claims = [2.0 ** (bits - sign_bits) for bits in (stored, high + 1) if bits < allocated]
    least = 2.0 ** (stored - sign_bits if stored < 8 else 8)  # levels
    if not is_grey:
        white = grey_range(distinct_values(samples), claims, least=least)[1]
        scale = np.float32(255 / white)
        return samples, lambda rows: np.minimum(rows, white).astype(np.float32) @ _LUMA * scale
    syntax = dataset.file_meta.TransferSyntaxUID
    if high + 1 >= stored and (not syntax.is_encapsulated or syntax == RLELossless):
        is_beyond = int(samples.max()) >> (high + 1 - sign_bits)
        if is_beyond and not (samples & ((1 << (allocated - stored)) - 1)).any():
            high = allocated - 1  # at the upper end of their words, whatever HighBit says
        # The other bits may hold overlays
        samples = (samples << (allocated - 1 - high)) >> (allocated - stored)
    present = distinct_values(samples)
    lowest = int(present[0])
    # Each value is looked up once, not once per pixel
    values = np.arange(lowest, int(present[-1]) + 1, dtype=np.int32)
    image = present[~_padding(present, dataset)]
    if len(image) < 2:
        raise ImageError(FLAT)
    largest = _numbers(dataset, "LargestImagePixelValue")
    claims += [num_levels(number + 1) for number in largest if number > image[-1]]
    with np.errstate(over="ignore", invalid="ignore"):  # an odd RescaleSlope, refused below
        shown = _look_up(values, dataset, ends=grey_range(image, claims, least=least))
    if not np.isfinite(shown).all():
        raise ImageError(_NO_RANGE)
    if photometric == "MONOCHROME1" or _code(dataset, "PresentationLUTShape") == "INVERSE":
        shown = 1 - shown
    shown[_padding(values, dataset)] = 0
    levels = np.asarray(shown * 255, np.float32)
    return samples, lambda rows: np.take(levels, rows.astype(np.int32) - lowest)


def _unpack(data: bytes, dataset: "Dataset") -> NDArray[Any]:
    """Whole samples, (H, W) or (H, W, 3), colours as RGB."""
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import JPEGExtended12Bit, RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder: Any = get_decoder(syntax)  # pydicom 3.0 types its options wrongly
    except NotImplementedError:
        raise ImageError("is DICOM compressed in a way that no installed package unpacks") from None
    plugins = decoder.available_plugins
    is_12_bit = syntax == JPEGExtended12Bit and dataset.BitsStored > 8
    if syntax.is_encapsulated and (not plugins or is_12_bit):
        raise ImageError(
            f"is DICOM compressed as {syntax.name}, which no installed package unpacks"
        )
    if not syntax.is_encapsulated or syntax == RLELossless:
        return np.asarray(decoder.as_array(dataset, index=0, correct_unused_bits=False)[0])
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    allowed = max_scans(dataset.Columns * dataset.Rows)
    if count_scans(frame) > allowed:
        raise ImageError(f"is DICOM of a JPEG of more than {allowed} scans")
    if _size_in_frame(frame) != (dataset.Columns, dataset.Rows):
        raise ImageError("is DICOM whose compressed image is not of the size in its header")
    if "pillow" not in plugins:
        return _elsewhere.unpack(data)
    return np.asarray(decoder.as_array(dataset, index=0, decoding_plugin="pillow")[0])


def _size_in_frame(frame: bytes) -> tuple[int, int] | None:
    """(width, height) that a JPEG, JPEG-LS or JPEG 2000 stream declares, which decoders obey."""
    start = 0
    if frame.startswith(_JP2_SIGNATURE):  # boxes before the stream; pydicom 3.0.2 hangs on length 0
        start = len(_JP2_SIGNATURE)
        while (kind := frame[start + 4 : start + 8]) != b"jp2c":
            length = int.from_bytes(frame[start : start + 4], "big")
            if length < 8 or not kind:
                return None
            start += length
        start += 8
    if frame[start : start + 4] == b"\xff\x4f\xff\x51":  # SOC, SIZ: ISO/IEC 15444-1 A.5.1
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return right - left, bottom - top
    place = 2
    while frame.startswith(b"\xff\xd8") and place + 9 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack_from(">2H", frame, place + 5)
            return width, height
        length = int.from_bytes(frame[place + 2 : place + 4], "big")
        place += 1 if marker == 0xFF else 2 + max(2, length)
    return None


def _padding(samples: NDArray[Any], dataset: "Dataset") -> NDArray[np.bool_]:
    """Which samples are padding around the image: PS3.3 C.7.5.1.1.2."""
    first = _numbers(dataset, "PixelPaddingValue")[:1]
    if not first:
        return np.zeros(samples.shape, np.bool_)
    limits = first + _numbers(dataset, "PixelPaddingRangeLimit")[:1]
    return (samples >= min(limits)) & (samples <= max(limits))


def _look_up(
    samples: NDArray[np.int32], dataset: "Dataset", *, ends: tuple[float, float]
) -> NDArray[np.float32]:
    """Samples (N,) through modality transformation and VOI LUT or window: (N,), 0 to 1.

    Without LUT and window the range between the samples `ends` is shown.
    """
    values: NDArray[Any] = samples
    slope, intercept = (
        _rescale(dataset, "RescaleSlope", 1),
        _rescale(dataset, "RescaleIntercept", 0),
    )
    if _value(dataset, "ModalityLUTSequence"):
        values, white = _through_table(values, dataset, "ModalityLUTSequence")
        ends = (0, white)
    elif (slope, intercept) != (1, 0):
        values = samples * slope + intercept
        low, high = sorted(end * slope + intercept for end in ends)
        ends = (low, high)
    if _value(dataset, "VOILUTSequence"):
        looked_up, white = _through_table(np.rint(values), dataset, "VOILUTSequence")
        return np.asarray(looked_up / white, np.float32)
    values = np.asarray(values, np.float32)
    function = _code(dataset, "VOILUTFunction", "LINEAR")
    narrowest = 1 if function == "LINEAR" else 1e-6
    windows = zip(_numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth"), strict=False)
    for centre, width in windows:
        if width >= narrowest:
            return _window(values, centre, width, function)
    low, high = ends
    if not math.isfinite(high - low) or high <= low:
        raise ImageError(_NO_RANGE)
    shown = (values - np.float32(low)) / np.float32(high - low)
    return np.asarray(np.clip(shown, 0, 1), np.float32)


def _rescale(dataset: "Dataset", name: str, default: float) -> float:
    """RescaleSlope or RescaleIntercept, which a window cannot do without where they are stated."""
    numbers = _numbers(dataset, name)
    if not numbers and name in dataset and dataset.get_item(name).value:
        raise ImageError(f"is DICOM whose {name} is damaged")
    return numbers[0] if numbers else default


def _through_table(
    values: NDArray[Any], dataset: "Dataset", name: str
) -> tuple[NDArray[np.int32], float]:
    """Values (N,) through the first table of a sequence (PS3.3 C.11.1.1, C.11.2.1.1); its white.

    White is what the largest entry needs: many tables declare more bits. Entries of 8 bits stand in
    words of their own or in pairs.
    """
    item = dataset[name].value[0]
    descriptor, data = _numbers(item, "LUTDescriptor"), _value(item, "LUTData")
    if len(descriptor) != 3 or data is None:
        raise ImageError(f"is DICOM whose {name} is cut short or damaged")
    num_entries = int(descriptor[0]) % 65536 or 65536
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        words = np.frombuffer(data + b"\0" * (len(data) % 2), f"{order}u2")
    else:
        words = np.atleast_1d(np.asarray(data, np.int64))
    words = words.astype("<u2")
    entries = words if len(words) >= num_entries else words.view(np.uint8)
    if len(entries) < num_entries:
        raise ImageError(f"is DICOM whose {name} is cut short or damaged")
    entries = np.asarray(entries[:num_entries], np.int32)
    first = descriptor[1]
    if first >= 1 << 15 and first > values.max():  # a negative one, stored without its sign
        first -= 1 << 16
    num_used, bits = int(entries.max()) + 1, descriptor[2]
    white = num_levels(num_used, [2.0**bits] if 8 <= bits < 16 else []) - 1
    places = np.clip(values - first, 0, num_entries - 1).astype(np.int32)
    return np.take(entries, places), max(1.0, white)


def _window(
    values: NDArray[np.float32], centre: float, width: float, function: str
) -> NDArray[np.float32]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, scaled to 0 and 1."""
    if function == "LINEAR":
        if width == 1:
            return (values > centre - 0.5).astype(np.float32)
        shown = (values - np.float32(centre - 0.5)) / np.float32(width - 1) + np.float32(0.5)
    elif function == "LINEAR_EXACT":
        shown = (values - np.float32(centre)) / np.float32(width) + np.float32(0.5)
    elif function == "SIGMOID":
        steps = (values - np.float32(centre)) * np.float32(-4 / width)
        shown = 1 / (1 + np.exp(np.clip(steps, -80, 80)))  # beyond 80 float32 overflows
    else:
        raise ImageError(
            "is DICOM whose VOILUTFunction is not one of LINEAR, LINEAR_EXACT and SIGMOID"
        )
    return np.asarray(np.clip(shown, 0, 1), np.float32)


def _turned(stored: NDArray[Any], directions: tuple[str, str]) -> NDArray[Any]:
    """Rows to the patient's left, columns to the feet, as seen from the front. Contiguous."""
    along_row, along_column = directions
    if along_row in "HF":
        stored, along_row, along_column = stored.swapaxes(0, 1), along_column, along_row
    if along_row == "R":
        stored = stored[:, ::-1]
    if along_column == "H":
        stored = stored[::-1]
    return np.ascontiguousarray(stored)


# -------------------------------------------------------------------------------- the other process


class _Elsewhere:
    """A process that unpacks one file at a time and may die of it; started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._owner = 0

    def unpack(self, data: bytes) -> NDArray[Any]:
        """The samples of a file. Raises `ImageError` where unpacking fails or ends the process."""
        with self._lock:
            pipe = self._pipe
            if pipe is None or self._owner != os.getpid():  # a forked child needs its own
                pipe = self._start()
            try:
                pipe.send_bytes(data)
                answer = pipe.recv_bytes() if pipe.poll(_UNPACK_TIMEOUT_S) else b""
            except (EOFError, OSError):
                answer = b""
            except BaseException:  # interrupted: the next file must not get this one's answer
                self.end()
                raise
            if not answer:
                self.end()
                raise ImageError("is DICOM whose compressed image cannot be unpacked")
        if answer == _REFUSED:
            raise ImageError("is DICOM whose compressed image is cut short or damaged")
        samples: NDArray[Any] = np.load(io.BytesIO(answer), allow_pickle=False)
        return samples

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "xrai.ingest.dicom", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # GDCM prints there, unasked
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._pipe, self._owner = ours, os.getpid()
        atexit.register(self.end)
        return ours

    def end(self) -> None:
        """End the process, if it is ours."""
        if self._pipe is None or self._process is None or self._owner != os.getpid():
            return
        atexit.unregister(self.end)
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._pipe = self._process = None


_REFUSED = b"refused"
_elsewhere = _Elsewhere()


def _serve(pipe: Connection) -> None:
    """Unpack files until the other end closes the pipe."""
    from pydicom.pixels.utils import pixel_array

    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        answer = io.BytesIO()
        try:
            with _reading(), quiet():
                np.save(answer, pixel_array(_read_image(data), index=0), allow_pickle=False)
        except ImageError:
            pipe.send_bytes(_REFUSED)
        else:
            pipe.send_bytes(answer.getvalue())


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
