import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.dataset.pictures import PATIENT_ID, PATIENT_NAME, dicom_file, encoded, gradient
from xrai.errors import ImageError, SourceError
from xrai.ingest import dicom
from xrai.ingest.images import decode, decode_sized
from xrai.phantom import draw_phantom, encode, plan

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (the extra `dicom`)")

JPEG_TOLERANCE = (
    2.0  # mean absolute difference of a film as DICOM and as JPEG of quality 90, grey levels
)
DEADLINE_S = 20.0  # only a hang reaches it
PNG_TOLERANCE = 1  # largest difference of a film as DICOM and as PNG of 8 bits, grey levels


def decoded(data: bytes, *, size: int = 32, fit: str = "squash") -> NDArray[np.uint8]:
    return decode(data, size=size, fit=fit, max_pixels=10_000_000)


def ramp(low: int, high: int, dtype: str = "<u2") -> NDArray[np.integer]:
    """(32, 32) samples from `low` to `high`."""
    return np.linspace(low, high, 32 * 32).round().astype(dtype).reshape(32, 32)


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decoded(data)
    return str(caught.value)


def assert_levels(data: bytes, expected: NDArray[np.floating], *, tolerance: float = 0.501) -> None:
    """The picture of a (32, 32) file is `expected`, in 0 to 1, to the rounding."""
    np.testing.assert_allclose(decoded(data), np.clip(expected, 0, 1) * 255, atol=tolerance)


# ----------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_phantom_as_dicom_agrees_with_the_same_phantom_as_png_and_jpeg(size: int) -> None:
    inverted = 0
    for _, phantom in zip(range(12), plan(3), strict=False):
        film = draw_phantom(3, phantom)
        files = {
            kind: encode(3, phantom, film, image_format=kind) for kind in ("dicom", "png", "jpeg")
        }
        inverted += b"MONOCHROME1" in files["dicom"]
        found = {
            kind: decode_sized(data, size=size, fit="crop", max_pixels=10**6)
            for kind, data in files.items()
        }
        levels = {kind: picture.astype(int) for kind, (picture, _) in found.items()}
        assert found["dicom"][1] == found["png"][1] == film.shape[::-1]
        assert np.abs(levels["dicom"] - levels["png"]).max() <= PNG_TOLERANCE
        assert np.abs(levels["dicom"] - levels["jpeg"]).mean() < JPEG_TOLERANCE
    assert 0 < inverted < 12


def test_samples_of_16_bits_are_kept_until_they_are_scaled() -> None:
    levels = np.full((64, 64), 100.4)
    levels[0], levels[-1] = 0, 255
    levels[1::2, 1::2] = 100.9  # on average 100.525; rounded first it would be 100.25
    stored = np.round(levels * 257).astype("<u2")
    assert set(decoded(dicom_file(stored), size=32)[2:-2, 2:-2].ravel()) == {101}


@pytest.mark.parametrize(
    ("stored", "tags", "shown"),
    [
        (ramp(0, 255, "u1"), {}, lambda x: x / 255),
        (ramp(0, 4095), {"BitsStored": 12}, lambda x: x / 4095),
        (ramp(0, 9000), {"BitsStored": 14}, lambda x: x / 16383),
        (ramp(0, 1000), {"BitsStored": 14}, lambda x: x / 1023),  # 14 bits declared, 10 used
        (ramp(0, 4096), {}, lambda x: x / 4100),
        (ramp(0, 63), {"BitsStored": 6}, lambda x: x / 63),
        (ramp(0, 40, "u1"), {"BitsStored": 6}, lambda x: x / 63),
        (ramp(0, 1), {"BitsStored": 1}, lambda x: x),
        (ramp(-32, 31, "<i2"), {"BitsStored": 6}, lambda x: (x + 32) / 63),
        (ramp(0, 4000), {"BitsStored": 5}, lambda x: x / 4095),  # so 5 bits cannot be true
        (ramp(0, 63), {}, lambda x: x / 255),
        (ramp(0, 2100), {"BitsStored": 12}, lambda x: x / 4095),
        (ramp(0, 2100), {"HighBit": 11}, lambda x: x / 4095),
        (ramp(0, 2100), {"LargestImagePixelValue": 4000}, lambda x: x / 4095),
        (ramp(0, 2000), {"LargestImagePixelValue": 65535}, lambda x: x / 2047),
        (ramp(32768, 32768 + 3000), {}, lambda x: (x - 32768) / 4095),  # signed, with an offset
        (ramp(-1000, 3000, "<i2"), {}, lambda x: (x + 1024) / (1024 + 4095)),
        (ramp(0, 65535), {}, lambda x: x / 65535),
        (ramp(0, 4000), {}, lambda x: x / 4095),  # 16 bits declared, 12 used
        (ramp(-32768, 32767, "<i2"), {}, lambda x: (x + 32768) / 65535),
        (ramp(-2048, 2047, "<i2"), {"BitsStored": 12}, lambda x: (x + 2048) / 4095),
        (
            ramp(0, 4095),
            {"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1"},
            lambda x: 1 - x / 4095,
        ),
        (
            ramp(0, 1023),
            {"BitsStored": 10, "RescaleSlope": -1, "RescaleIntercept": 1023},
            lambda x: 1 - x / 1023,
        ),
    ],
)
def test_without_a_window_the_range_of_the_bits_in_use_is_shown(
    stored: np.ndarray, tags: dict[str, Any], shown: Callable[[np.ndarray], np.ndarray]
) -> None:
    assert_levels(dicom_file(stored, **tags), shown(stored.astype(float)))


@pytest.mark.parametrize("bits", [8, 10, 13, 14, 15, 16])
def test_an_image_looks_the_same_whatever_part_of_16_bits_it_uses(bits: int) -> None:
    film = gradient(32, 32) / 255
    expected = decoded(dicom_file(np.rint(film * 4095).astype("<u2"), BitsStored=12)).astype(int)
    stored = np.rint(film * (2**bits - 1)).astype("<u2")
    colour = np.repeat(stored[:, :, None], 3, axis=2)
    files = [dicom_file(stored), encoded(Image.fromarray(stored)), dicom_file(colour)]
    if bits < 16:
        files.append(dicom_file(stored.astype("<i2")))
    for file in files:
        assert np.abs(decoded(file) - expected).max() <= 1


def test_one_bright_pixel_does_not_darken_an_image() -> None:
    stored = ramp(0, 4095)
    plain = decoded(dicom_file(stored)).astype(int)
    stored[-1, -1] = 65535
    for file in (dicom_file(stored), encoded(Image.fromarray(stored))):
        assert np.abs(decoded(file) - plain).max() <= 1


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("slope", [1, 2.5])
@pytest.mark.parametrize("dtype", ["<u2", "<i2"])
def test_a_window_is_applied_as_pydicom_does_it(function: str, slope: float, dtype: str) -> None:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    stored = ramp(0 if dtype == "<u2" else -2000, 2000, dtype)
    file = dicom_file(
        stored,
        BitsStored=12,
        WindowCenter=600,
        WindowWidth=900,
        VOILUTFunction=function,
        RescaleSlope=slope,
        RescaleIntercept=20,
    )
    dataset = pydicom.dcmread(io.BytesIO(file))
    windowed = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    low, high = (edge * slope + 20 for edge in ((0, 4095) if dtype == "<u2" else (-2048, 2047)))
    low, high = min(low, high), max(low, high)
    assert_levels(file, (windowed - low) / (high - low))


def test_of_several_windows_the_first_is_applied() -> None:
    stored = ramp(0, 4095)
    several = dicom_file(stored, BitsStored=12, WindowCenter=[1000, 3000], WindowWidth=[500, 100])
    one = dicom_file(stored, BitsStored=12, WindowCenter=1000, WindowWidth=500)
    np.testing.assert_array_equal(decoded(several), decoded(one))
    assert_levels(one, (stored - 999.5) / 499 + 0.5)


def test_a_negative_slope_comes_before_the_window() -> None:
    file = dicom_file(
        ramp(0, 4095),
        BitsStored=12,
        RescaleSlope=-1,
        RescaleIntercept=4095,
        WindowCenter=1000,
        WindowWidth=501,
    )
    assert_levels(file, (4095.0 - ramp(0, 4095) - 999.5) / 500 + 0.5)


def test_a_window_of_one_grey_level_is_a_step() -> None:
    file = dicom_file(ramp(0, 4095), BitsStored=12, WindowCenter=2000, WindowWidth=1)
    np.testing.assert_array_equal(decoded(file), 255 * (ramp(0, 4095) >= 2000))


def table(
    entries: list[int], *, first: int = 0, bits: int = 16, data: bytes | None = None
) -> list[object]:
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US" if data is None else "OW", entries if data is None else data)
    return [item]


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packing", ["US", "words", "pairs"])
def test_a_table_of_8_bits_gives_the_image_of_its_samples(
    sequence: str, order: str, packing: str
) -> None:
    entries = [place // 16 for place in range(4096)]
    pairs = np.array(entries, "u1").view("<u2").astype(f"{order}u2")
    data = {
        "US": None,
        "words": np.array(entries, f"{order}u2").tobytes(),
        "pairs": pairs.tobytes(),
    }
    tags: dict[str, Any] = {sequence: table(entries, bits=8, data=data[packing])}
    dataset = pydicom.dcmread(io.BytesIO(dicom_file(ramp(0, 4095), BitsStored=12, **tags)))
    if order == ">":
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        dataset.PixelData = ramp(0, 4095, ">u2").tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    assert_levels(buffer.getvalue(), ramp(0, 4095) / 4095.0, tolerance=1.01)


def test_a_table_whose_first_value_lost_its_sign_is_read() -> None:
    entries = list(range(4096))
    file = dicom_file(
        ramp(0, 4095),
        BitsStored=12,
        VOILUTSequence=table(entries, first=65536 - 1024),
        RescaleSlope=1,
        RescaleIntercept=-1024,
    )
    assert_levels(file, ramp(0, 4095) / 4095.0)


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_a_voi_table_takes_the_place_of_the_window_and_its_own_range_is_shown(top: int) -> None:
    entries = [round(top * (k / 1023) ** 2) for k in range(1024)]
    file = dicom_file(
        ramp(0, 1023),
        BitsStored=10,
        VOILUTSequence=table(entries),
        WindowCenter=[1, 2],
        WindowWidth=[1, 2],
    )
    assert_levels(
        file, (ramp(0, 1023) / 1023.0) ** 2, tolerance=1.01 if top == 255 else 0.54
    )  # entries are whole


def test_a_modality_table_comes_before_the_window() -> None:
    entries = [4095 - 4 * k for k in range(1024)]
    tags: dict[str, Any] = {"BitsStored": 10, "ModalityLUTSequence": table(entries)}
    assert_levels(dicom_file(ramp(0, 1023), **tags), (4095 - 4.0 * ramp(0, 1023)) / 4095)
    windowed = dicom_file(ramp(0, 1023), WindowCenter=2000, WindowWidth=1001, **tags)
    assert_levels(windowed, (4095 - 4.0 * ramp(0, 1023) - 1999.5) / 1000 + 0.5)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_around_an_image_is_black_and_does_not_change_its_range(photometric: str) -> None:
    stored = ramp(0, 4000)
    stored[:, :8], stored[:, 24:] = 65535, 65000
    tags: dict[str, Any] = {
        "PixelPaddingValue": 65535,
        "PixelPaddingRangeLimit": 65000,
        "PhotometricInterpretation": photometric,
    }
    square = decoded(dicom_file(stored, **tags))
    assert not square[:, :8].any() and not square[:, 24:].any()
    shown = stored[:, 8:24] / 4095.0
    shown = shown if photometric == "MONOCHROME2" else 1 - shown
    np.testing.assert_allclose(square[:, 8:24], shown * 255, atol=0.501)


@pytest.mark.parametrize(("shift", "high_bit"), [(0, 11), (4, 15)])
def test_bits_that_hold_no_sample_are_left_out(shift: int, high_bit: int) -> None:
    stored = ramp(0, 4095)
    other = np.uint16(0xF000 if shift == 0 else 0x000F)  # an overlay, say
    file = dicom_file((stored << shift) | other, BitsStored=12, HighBit=high_bit)
    assert_levels(file, stored / 4095.0)


@pytest.mark.parametrize("signed", [0, 1])
def test_samples_at_the_upper_end_of_their_words_are_found_there(signed: int) -> None:
    words = ramp(0, 4095) << 4
    file = dicom_file(words ^ (0x8000 * signed), BitsStored=12, PixelRepresentation=signed)
    assert_levels(file, ramp(0, 4095) / 4095.0)


def test_signed_samples_shorter_than_their_words_keep_their_sign() -> None:
    stored = ramp(-2048, 2047, "<i2")
    words = (stored.view("<u2") & 0x0FFF) | 0x5000
    file = dicom_file(words, BitsStored=12, PixelRepresentation=1)
    assert_levels(file, (stored + 2048.0) / 4095)


@pytest.mark.parametrize(
    ("photometric", "shape", "is_inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
    ],
)
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 4096}])
def test_an_inverse_presentation_is_inverted_once(
    photometric: str, shape: str, is_inverted: bool, window: dict[str, Any]
) -> None:
    stored = ramp(0, 4095)
    tags = {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape, **window}
    shown = stored / 4095.0
    assert_levels(dicom_file(stored, BitsStored=12, **tags), 1 - shown if is_inverted else shown)


COLOURS = {"RGB": (200, 30, 90), "YBR_FULL": (90, 120, 170)}


@pytest.mark.parametrize("photometric", COLOURS)
def test_colours_become_luma(photometric: str) -> None:
    colour = COLOURS[photometric]
    samples = np.zeros((32, 32, 3), np.uint8) + np.array(colour, np.uint8)
    samples[16:] = 128 if photometric == "YBR_FULL" else 0
    square = decoded(dicom_file(samples, PhotometricInterpretation=photometric))[:16]
    expected = 0.299 * 200 + 0.587 * 30 + 0.114 * 90 if photometric == "RGB" else 90
    assert np.abs(square.astype(int) - expected).max() <= 1.5


# --------------------------------------------------------------------------- orientation and aspect

UPRIGHT = gradient(48, 32)
TURNS = {
    ("L", "F"): UPRIGHT,
    ("R", "F"): UPRIGHT[:, ::-1],
    ("L", "H"): UPRIGHT[::-1],
    ("R", "H"): UPRIGHT[::-1, ::-1],
    ("F", "L"): UPRIGHT.T,
    ("F", "R"): UPRIGHT[:, ::-1].T,
    ("H", "L"): UPRIGHT[::-1].T,
    ("H", "R"): UPRIGHT[::-1, ::-1].T,
    ("LP", "FA"): UPRIGHT,
}


@pytest.mark.parametrize("directions", TURNS)
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_an_image_is_turned_upright_by_its_patient_orientation(
    directions: tuple[str, str], fit: str
) -> None:
    file = dicom_file(TURNS[directions], PatientOrientation=list(directions))
    square, size = decode_sized(file, size=32, fit=fit, max_pixels=10**6)
    assert size == (48, 32)
    assert np.abs(square.astype(int) - decoded(encoded(UPRIGHT), fit=fit)).max() <= 1


@pytest.mark.parametrize("stated", [None, "", ["L"], ["L", "L"], ["X", "Y"], ["", "F"]])
def test_an_orientation_that_says_nothing_is_no_reason_to_turn(stated: object) -> None:
    np.testing.assert_array_equal(
        decoded(dicom_file(UPRIGHT, PatientOrientation=stated)), decoded(dicom_file(UPRIGHT))
    )


@pytest.mark.parametrize("tags", [{"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.4, 0.2]}])
@pytest.mark.parametrize("directions", [("L", "F"), ("F", "L")])
def test_pixels_that_are_not_square_become_so(
    tags: dict[str, Any], directions: tuple[str, str]
) -> None:
    tall = np.repeat(
        gradient(40, 80), 2, axis=1
    )  # (80, 80), of which every second row is kept: pixels 2 high, 1 wide
    stored = tall[::2]  # (40, 80)
    if directions == ("F", "L"):
        stored, tags = stored.T, {name: value[::-1] for name, value in tags.items()}
    for fit in ("crop", "pad", "squash"):
        file = dicom_file(stored, PatientOrientation=list(directions), **tags)
        square, size = decode_sized(file, size=20, fit=fit, max_pixels=10**6)
        assert size == (80, 40)
        assert np.abs(square.astype(int) - decoded(encoded(tall), size=20, fit=fit)).mean() < 2, fit
    unknown = dicom_file(stored, PatientOrientation=list(directions), PixelSpacing=[0, 0])
    np.testing.assert_array_equal(
        decoded(unknown), decoded(dicom_file(stored, PatientOrientation=list(directions)))
    )
    padded = decode(
        dicom_file(stored, PatientOrientation=list(directions)),
        size=20,
        fit="pad",
        max_pixels=10**6,
    )
    assert not padded[:5].any()  # without the tag it would be wide


# --------------------------------------------------------------------------------------- compressed

FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def published(name: str, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    monkeypatch.setattr(dicom, "_OTHER_MODALITIES", frozenset())  # these are of MR and CT
    return decoded((FILES / name).read_bytes(), size=64)


@pytest.mark.parametrize(
    "name", ["RLE", "bigendian", "expb", "implicit", "padded", "jp2klossless", "jpeg_ls_lossless"]
)
def test_pydicoms_own_files_give_the_same_image_however_they_are_packed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "jpeg_ls_lossless":
        pytest.importorskip("gdcm", reason="python-gdcm is not installed (the extra `dicom`)")
    plain = published("MR_small.dcm", monkeypatch)
    assert plain.std() > 10
    np.testing.assert_array_equal(published(f"MR_small_{name}.dcm", monkeypatch), plain)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("SC_rgb_rle.dcm", 0),
        ("SC_rgb_rle_16bit.dcm", 1),
        ("SC_rgb_jpeg_gdcm.dcm", 0),
        ("SC_rgb_jpeg_dcmtk.dcm", 3),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 3),
        ("SC_ybr_full_422_uncompressed.dcm", 3),
        ("SC_rgb_jls_lossy_line.dcm", 3),
    ],
)
def test_pydicoms_own_colour_files_give_the_same_image(
    name: str, tolerance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_jls_lossy_line.dcm"):
        pytest.importorskip("gdcm", reason="python-gdcm is not installed (the extra `dicom`)")
    plain, packed = (
        published(file, monkeypatch).astype(int) for file in ("SC_rgb_gdcm_KY.dcm", name)
    )
    assert np.abs(plain - packed).mean() <= tolerance


def packed(stream: bytes, samples: NDArray[np.uint8], syntax: str, **tags: Any) -> bytes:
    """A DICOM file of a compressed stream."""
    from pydicom.encaps import encapsulate

    dataset = pydicom.dcmread(io.BytesIO(dicom_file(samples, **tags)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def test_a_jpeg_inside_dicom_is_the_image_of_the_jpeg() -> None:
    pixels = gradient(64, 64)
    jpeg = encoded(pixels, "JPEG", quality=90)
    file = packed(jpeg, pixels, pydicom.uid.JPEGBaseline8Bit)
    assert np.abs(decoded(file).astype(int) - decoded(jpeg)).max() <= 1


def test_a_jpeg_of_scans_for_minutes_inside_dicom_is_refused() -> None:
    pixels = gradient(64, 64)
    jpeg = encoded(pixels, "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    film = jpeg[:-2] + 20_000 * last + jpeg[-2:]
    with pytest.raises(ImageError, match="JPEG of more than 50 scans"):
        decoded(packed(film, pixels, pydicom.uid.JPEGBaseline8Bit))


def test_a_compressed_image_of_another_size_than_declared_is_not_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "pydicom.pixels.decoders.base.Decoder.as_array", lambda *_, **__: pytest.fail("unpacked")
    )
    huge = Image.new("L", (5000, 4000))
    for image_format, syntax in (
        ("JPEG", pydicom.uid.JPEGBaseline8Bit),
        ("JPEG2000", pydicom.uid.JPEG2000),
    ):
        file = packed(encoded(huge, image_format), gradient(16, 16), syntax)
        assert "is not of the size in its header" in refusal(file)


def test_boxes_that_never_end_before_a_jpeg_2000_stream_do_not_keep_the_reader() -> None:
    jp2 = bytearray(encoded(Image.fromarray(gradient(16, 16)), "JPEG2000", no_jp2=False))
    assert bytes(jp2[:12]) == dicom._JP2_SIGNATURE
    assert decoded(packed(bytes(jp2), gradient(16, 16), pydicom.uid.JPEG2000)).std() > 10
    jp2[12:16] = bytes(4)
    assert "is not of the size" in refusal(
        packed(bytes(jp2), gradient(16, 16), pydicom.uid.JPEG2000)
    )


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_a_compression_that_nothing_here_unpacks_is_named(name: str) -> None:
    reason = refusal(
        (FILES / name)
        .read_bytes()
        .replace(b"\x08\x00\x60\x00CS\x02\x00NM", b"\x08\x00\x60\x00CS\x02\x00DX")
    )
    assert (
        reason == "is DICOM compressed as JPEG Extended (Process 2 and 4), "
        "which no installed package unpacks"
    )


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[dicom._Elsewhere]:
    """A fresh other process for GDCM."""
    pytest.importorskip("gdcm", reason="python-gdcm is not installed (the extra `dicom`)")
    monkeypatch.setattr(dicom, "_OTHER_MODALITIES", frozenset())
    fresh = dicom._Elsewhere()
    monkeypatch.setattr(dicom, "_elsewhere", fresh)
    yield fresh
    fresh.end()


def test_a_file_that_kills_gdcm_is_excluded_and_the_next_is_read(
    elsewhere: dicom._Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (FILES / "SC_rgb_jpeg_gdcm.dcm").read_bytes()
    plain = decoded(good)
    first = elsewhere._process
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    assert refusal(good) == "is DICOM whose compressed image cannot be unpacked"
    np.testing.assert_array_equal(decoded(good), plain)
    second = elsewhere._process
    assert second is not None and second.pid != first.pid
    monkeypatch.setattr(dicom, "_UNPACK_TIMEOUT_S", 0.2)
    os.kill(second.pid, signal.SIGSTOP)  # it comes to no end
    assert refusal(good) == "is DICOM whose compressed image cannot be unpacked"


def test_an_interrupted_file_does_not_leave_its_image_to_the_next(
    elsewhere: dicom._Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (
        (FILES / name).read_bytes()
        for name in ("SC_rgb_jpeg_gdcm.dcm", "JPEGLSNearLossless_16.dcm")
    )
    plain = decoded(other)

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.connection.Connection.poll", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoded(one)
    np.testing.assert_array_equal(decoded(other), plain)


def test_the_process_of_gdcm_ends_with_its_owner(elsewhere: dicom._Elsewhere) -> None:
    code = (
        "import sys; from pathlib import Path; from xrai.ingest import dicom\n"
        f"dicom._elsewhere.unpack(Path({str(FILES / 'SC_rgb_jpeg_gdcm.dcm')!r}).read_bytes())\n"
        "print(dicom._elsewhere._process.pid, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdin is not None
    helper = Path("/proc") / owner.stdout.readline().strip()
    assert helper.exists()
    owner.kill()
    owner.wait()
    owner.stdout.close(), owner.stdin.close()
    deadline = time.monotonic() + 30
    while helper.exists() and "State:\tZ" not in (helper / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------- bad files

SMALL = gradient(20, 16)
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "two frames": (
        lambda: dicom_file(SMALL, NumberOfFrames=2, PixelData=SMALL.tobytes() * 2),
        "is DICOM of 2 frames; one image per file is read",
    ),
    "no pixels": (lambda: dicom_file(SMALL, leave_out=("PixelData",)), "is DICOM without an image"),
    "too few pixels": (
        lambda: dicom_file(SMALL, PixelData=bytes(100)),
        "is DICOM that is cut short or damaged (PixelData)",
    ),
    "no rows": (
        lambda: dicom_file(SMALL, leave_out=("Rows",)),
        "is DICOM whose Rows is missing or damaged",
    ),
    "zero rows": (lambda: dicom_file(SMALL, Rows=0), "declares 20 x 0 pixels"),
    "a bomb": (
        lambda: dicom_file(SMALL, Rows=60000, Columns=60000),
        "declares 60000 x 60000 pixels, more than",
    ),
    "32 bits": (lambda: dicom_file(SMALL.astype("<u4")), "is DICOM of 32 bits (BitsStored) in 32"),
    "more bits than there are": (
        lambda: dicom_file(SMALL, BitsStored=12),
        "is DICOM of 12 bits (BitsStored) in 8",
    ),
    "a palette": (
        lambda: dicom_file(SMALL, PhotometricInterpretation="PALETTE COLOR"),
        "is DICOM whose PhotometricInterpretation is not one of",
    ),
    "a slice": (
        lambda: dicom_file(SMALL, Modality="CT"),
        "is DICOM of modality CT; radiographs (CR, DX, RG) are read",
    ),
    "raw detector data": (
        lambda: dicom_file(SMALL, PresentationIntentType="FOR PROCESSING"),
        "is DICOM of raw detector data (FOR PROCESSING)",
    ),
    "a side view": (
        lambda: dicom_file(SMALL, ViewPosition="LL"),
        "is DICOM of a chest from the side (ViewPosition)",
    ),
    "an angiography": (
        lambda: dicom_file(SMALL, Modality="XA"),
        "is DICOM of modality XA; radiographs (CR, DX, RG) are read",
    ),
    "an orientation from the side": (
        lambda: dicom_file(SMALL, PatientOrientation=["P", "F"]),
        "is DICOM of a chest from the side (PatientOrientation)",
    ),
    "no photometric interpretation": (
        lambda: dicom_file(SMALL, leave_out=("PhotometricInterpretation",)),
        "is DICOM whose PhotometricInterpretation is missing or damaged",
    ),
    "a slope that is no number": (
        lambda: dicom_file(SMALL, RescaleSlope=7, RescaleIntercept=0).replace(b"7.0 ", b"x.0 "),
        "is DICOM whose RescaleSlope is damaged",
    ),
    "an unknown window": (
        lambda: dicom_file(SMALL, WindowCenter=100, WindowWidth=9, VOILUTFunction="CUBIC"),
        "is DICOM whose VOILUTFunction is not one of",
    ),
    "a table cut short": (
        lambda: dicom_file(SMALL, VOILUTSequence=table([1, 2, 3], data=b"12")),
        "is DICOM whose VOILUTSequence is cut short or damaged",
    ),
    "padding alone": (
        lambda: dicom_file(np.where(SMALL > 9, 255, 7).astype("u1"), PixelPaddingValue=255),
        "shows one grey level throughout",
    ),
    "no slope": (
        lambda: dicom_file(SMALL, RescaleSlope=0, RescaleIntercept=5),
        "is DICOM whose RescaleSlope or table",
    ),
    "a slope beyond all numbers": (
        lambda: dicom_file(SMALL, RescaleSlope="1e300", RescaleIntercept="1e300"),
        "is DICOM whose RescaleSlope or table",
    ),
    "a preamble alone": (
        lambda: bytes(128) + b"DICM",
        "is DICOM without an image (PixelData), or cut short before it",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_radiograph_is_refused_with_its_reason(name: str) -> None:
    make, reason = BAD[name]
    found = refusal(make())
    assert found.startswith(reason)
    assert "\n" not in found


def unneeded() -> Iterator[tuple[str, bytes]]:
    """12-bit films whose headers lack, or state badly, what can be done without."""
    samples = ramp(0, 4095)
    for name in ("HighBit", "BitsStored", "PixelRepresentation", "SamplesPerPixel", "Modality"):
        yield f"no {name}", dicom_file(samples, leave_out=(name,), BitsStored=12)
    bad: dict[str, Any] = {
        "HighBit": 20,
        "NumberOfFrames": "",
        "PixelSpacing": [0.14],
        "ImagerPixelSpacing": [-1, 1],
        "PixelAspectRatio": [1, 100],
        "RescaleSlope": "",
        "WindowWidth": 0,
    }
    for name, value in bad.items():
        tags = {name: value, "WindowCenter": 7} if name == "WindowWidth" else {name: value}
        yield f"{name} {value!r}", dicom_file(samples, BitsStored=12, **tags)
    yield "HighBit below BitsStored", dicom_file(samples, HighBit=11)
    spaced = dicom_file(samples, BitsStored=12, PixelSpacing=["0.143", "0.286"])
    yield "commas", spaced.replace(b"0.143\\0.286", b"0,143\\0,286")
    windowed = dicom_file(samples, BitsStored=12, WindowCenter=["7777", "9"], WindowWidth=[5, 6])
    yield "no number", windowed.replace(b"7777", b"Zanz")


@pytest.mark.parametrize(("name", "data"), list(unneeded()))
def test_an_image_is_read_without_what_is_not_needed(name: str, data: bytes) -> None:
    assert_levels(data, ramp(0, 4095) / 4095.0)


def test_where_the_first_window_has_no_width_the_next_one_is_applied() -> None:
    stored = ramp(0, 4095)
    file = dicom_file(stored, BitsStored=12, WindowCenter=[0, 1000], WindowWidth=[0, 500])
    assert_levels(file, (stored - 999.5) / 499 + 0.5)


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian"])
@pytest.mark.parametrize("kept", ["meta", "DICM and meta", "data set", "group length"])
def test_a_file_without_preamble_is_read(syntax: str, kept: str) -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom_file(ramp(0, 4095), BitsStored=12)))
    dataset.file_meta.TransferSyntaxUID = uid = getattr(pydicom.uid, syntax)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    starts = {"meta": 132, "DICM and meta": 128}
    data = data[starts.get(kept, data.index(b"\x08\x00\x16\x00")) :]
    if kept == "group length":
        vr = b"" if uid.is_implicit_VR else b"UL"
        length = (4).to_bytes(2 if vr else 4, "little")
        data = b"\x08\x00\x00\x00" + vr + length + (90).to_bytes(4, "little") + data
    assert dicom.read_patient_id(data) == PATIENT_ID
    assert_levels(data, ramp(0, 4095) / 4095.0)


@pytest.mark.parametrize(
    "data", [b"", b"\x08\x00", b"PK\x03\x04", b"\x02 pages", bytes(200), b"II*\0" * 9]
)
def test_what_is_no_dicom_is_not_taken_for_it(data: bytes) -> None:
    assert not dicom.is_dicom(data)


def test_a_file_that_declares_too_much_is_refused_before_anything_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dicom, "_samples_and_levels", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ImageError, match="more than"):
        decode(
            dicom_file(SMALL, Rows=20_000, Columns=20_000),
            size=32,
            fit="crop",
            max_pixels=100_000_000,
        )


def test_a_deflated_file_that_unpacks_to_too_much_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halves = np.repeat(np.array([0, 200], np.uint8), 1000)[None].repeat(2000, axis=0)
    dataset = pydicom.dcmread(io.BytesIO(dicom_file(halves)))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert len(buffer.getvalue()) < 20_000
    assert decoded(buffer.getvalue()).any()
    monkeypatch.setattr(dicom, "_MAX_INFLATED_BYTES", 1_000_000)
    assert refusal(buffer.getvalue()) == "is DICOM that unpacks to more than 1000000 bytes"


def test_without_pydicom_a_dicom_file_stops_the_work_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = dicom_file(SMALL)
    monkeypatch.setitem(sys.modules, "pydicom.errors", None)
    for read in (decoded, dicom.read_patient_id):
        with pytest.raises(SourceError, match=r"pip install 'xrai\[dicom\]'"):
            read(data)
    assert decoded(encoded(SMALL)).shape == (32, 32)  # other files need none


def test_pydicom_is_imported_by_the_first_dicom_file_alone() -> None:
    code = "import sys, xrai.ingest.build; assert not {'pydicom', 'gdcm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_patient_id_is_read_and_a_damaged_file_has_none() -> None:
    data = dicom_file(SMALL)
    assert dicom.read_patient_id(data) == PATIENT_ID
    assert dicom.read_patient_id(dicom_file(SMALL, leave_out=("PatientID",))) == ""
    assert dicom.read_patient_id(data[:150]) == ""


def damaged_files() -> list[bytes]:
    """Files of each way of packing, all small, to be damaged."""
    tall = gradient(40, 40)
    plain = dicom_file(
        tall.astype("<u2") * 16,
        BitsStored=12,
        WindowCenter=2000,
        WindowWidth=3000,
        PatientOrientation=["R", "F"],
        VOILUTSequence=table([k * 4 for k in range(64)]),
        ImagerPixelSpacing=[0.2, 0.1],
    )
    jpeg = packed(encoded(tall, "JPEG"), tall, pydicom.uid.JPEGBaseline8Bit)
    jp2 = packed(encoded(Image.fromarray(tall), "JPEG2000"), tall, pydicom.uid.JPEG2000)
    rle = pydicom.dcmread(io.BytesIO(dicom_file(tall)))
    rle.compress(pydicom.uid.RLELossless)
    buffer = io.BytesIO()
    rle.save_as(buffer)
    return [plain, jpeg, jp2, buffer.getvalue()]


DAMAGED = damaged_files()


def test_a_file_cut_short_anywhere_is_refused() -> None:
    for data in DAMAGED:
        assert decoded(data).std() > 10
        for cut in {
            *range(0, len(data) - 16, max(1, len(data) // 60)),
            len(data) - 100,
            len(data) - 16,
        }:
            with pytest.raises(ImageError):
                decoded(data[:cut])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_a_file_damaged_anywhere_gives_an_image_or_a_reason_without_the_patient(
    draw: st.DataObject, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    file = bytearray(draw.draw(st.sampled_from(DAMAGED)))
    end = draw.draw(st.sampled_from([1000, len(file)]))  # in the header as often as in the pixels
    for _ in range(draw.draw(st.integers(1, 8))):
        file[draw.draw(st.integers(132, min(end, len(file)) - 1))] = draw.draw(st.integers(0, 255))
    text = ""
    with warnings.catch_warnings(record=True) as told, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        try:
            assert decoded(bytes(file)).shape == (32, 32)
        except ImageError as error:
            text = str(error)
            assert text and "Error" not in text
    out = capfd.readouterr()
    said = " ".join(
        [text, caplog.text, out.out, out.err, *(str(warning.message) for warning in told)]
    )
    caplog.clear()
    for secret in (*PATIENT_NAME.split("^"), PATIENT_ID):
        assert secret not in said


def test_what_pydicom_warns_of_is_not_told(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    known = dicom_file(SMALL, SpecificCharacterSet="ISO_IR 100")
    data = known.replace(b"ISO_IR 100", b"Zanz_IR 99")
    assert b"Zanz" in data
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        decoded(data)
        assert not told and not caplog.text and not any(capfd.readouterr())
        str(pydicom.dcmread(io.BytesIO(data)).PatientName)
        assert "Zanz" in str(told[0].message) and "Zanz" in caplog.text  # pydicom itself tells it


def pydicom_state() -> tuple[object, ...]:
    logger = logging.getLogger("pydicom")
    return (
        list(warnings.filters),
        warnings.showwarning,
        list(logger.filters),
        list(logger.handlers),
        (logger.disabled, logger.level, logger.propagate),
    )


def test_reading_adds_one_filter_and_leaves_those_of_the_program_as_they_were() -> None:
    data = dicom_file(SMALL, WindowCenter=1000, WindowWidth=500).replace(b"1000", b"Zanz")
    own = list(warnings.filters)
    refusal(data)
    assert [each for each in warnings.filters if each in own] == own
    before = pydicom_state()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: refusal(data) if k % 2 else decoded(dicom_file(SMALL)), range(64)))
    assert pydicom_state() == before


def tell(words: str) -> None:
    """Warn and log as pydicom does."""
    warnings.warn_explicit(words, UserWarning, "values.py", 1, module="pydicom.values")
    logging.getLogger("pydicom").warning(words)


def test_another_thread_hears_pydicom_while_a_file_is_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with dicom.quiet():
            with dicom.quiet():
                tell("from the thread that reads")
            tell("from the thread that reads")
            other = threading.Thread(target=tell, args=("from another",))
            other.start()
            other.join()
        tell("after it")
    assert caplog.messages == ["from another", "after it"]
    assert [str(warning.message) for warning in told] == caplog.messages


def test_filters_that_the_program_adds_later_do_not_let_pydicom_be_heard() -> None:
    with warnings.catch_warnings(record=True) as told:
        for action in ("always", "default", "always", "default"):
            warnings.simplefilter(action)
            with dicom.quiet():
                tell("from the thread that reads")
        assert not told
        assert sum(each[3] is warnings.filters[0][3] for each in warnings.filters) == 1


def test_a_file_that_takes_long_to_unpack_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unpack, is_held, is_over = dicom._unpack, threading.Event(), threading.Event()

    def held(data: bytes, dataset: Any) -> NDArray[Any]:
        if not is_held.is_set():  # the first file
            is_held.set()
            assert is_over.wait(DEADLINE_S)
        return unpack(data, dataset)

    monkeypatch.setattr(dicom, "_unpack", held)
    data = dicom_file(SMALL)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(decoded, data)
        try:
            assert is_held.wait(DEADLINE_S)
            second = pool.submit(decoded, data).result(DEADLINE_S / 2)
            assert not first.done()
        finally:
            is_over.set()
        np.testing.assert_array_equal(first.result(), second)


def test_images_knows_dicom_by_its_contents_whatever_else_it_looks_like() -> None:
    data = bytearray(dicom_file(SMALL))
    data[:3] = b"\xff\xd8\xff"  # the preamble is anyone's
    assert dicom.is_dicom(bytes(data))
    np.testing.assert_array_equal(decoded(bytes(data)), decoded(dicom_file(SMALL)))


VIEWS = {
    "side": (
        *("LL", "RL", "LAT", "LATERAL", "L LAT", "LLAT", "LAT_L", "LAT R", "LATERAL ERECT"),
        *("SEITLICH", "PROFIL", "LATERO LATERAL"),
    ),
    "front": ("AP", "PA", "AP SUPINE", "PA_ERECT", "LLD", "RLD", "LAT DECUB", "FRONTAL", ""),
    "unknown": ("LLO", "RLO", "PA LAT", "YES", "BILATERAL", "PLATE", "3", "ALL"),
}


@pytest.mark.parametrize(
    ("kind", "position"), [(kind, position) for kind, all_ in VIEWS.items() for position in all_]
)
def test_view_position_says_front_side_or_nothing_known(kind: str, position: str) -> None:
    data = dicom_file(SMALL, ViewPosition=position)
    if kind == "side":
        assert refusal(data) == "is DICOM of a chest from the side (ViewPosition)"
    else:
        decoded(data)
        assert dicom.has_unknown_view(data) == (kind == "unknown")


def test_a_file_without_view_position_has_no_unknown_view() -> None:
    assert not dicom.has_unknown_view(dicom_file(SMALL))
