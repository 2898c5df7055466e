import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.dataset.pictures import dicom_file, encoded, gradient, huge_png, png_chunk
from xrai.errors import ImageError
from xrai.ingest import images
from xrai.ingest.dicom import count_scans, max_scans
from xrai.ingest.images import REDUCED_TOLERANCE, decode, decode_sized
from xrai.phantom import draw_phantom, encode, plan

FITS = ("crop", "squash", "pad")


def decoded(
    data: bytes | NDArray[np.uint8], *, size: int = 32, fit: str = "crop"
) -> NDArray[np.uint8]:
    return decode(data, size=size, fit=fit, max_pixels=10_000_000)


def grey_png(**options: Any) -> bytes:
    return encoded(gradient(50, 40), **options)


# ----------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("width", "height"), [(50, 40), (40, 50), (16, 16), (2, 2), (300, 7), (2, 900)]
)
@pytest.mark.parametrize("size", [16, 33])
def test_any_shape_comes_out_as_the_square_of_8_bits(
    fit: str, width: int, height: int, size: int
) -> None:
    for data in (
        encoded(gradient(width, height)),
        encoded(gradient(width, height), "JPEG"),
        gradient(width, height),
    ):
        square = decoded(data, size=size, fit=fit)
        assert square.shape == (size, size)
        assert square.dtype == np.uint8


@pytest.mark.parametrize("fit", FITS)
def test_a_png_and_the_same_image_as_an_array_come_out_alike(fit: str) -> None:
    pixels = gradient(60, 40)
    np.testing.assert_array_equal(decoded(encoded(pixels), fit=fit), decoded(pixels, fit=fit))


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    pixels = gradient(32, 32)
    for fit in FITS:
        np.testing.assert_array_equal(decoded(pixels, fit=fit), pixels)


def test_crop_keeps_the_middle_squash_keeps_all_and_pad_adds_black() -> None:
    pixels = np.zeros((30, 90), np.uint8)
    pixels[:, :30], pixels[:, 30:60], pixels[:, 60:] = 50, 150, 250
    pixels[0, 45] = 151
    assert set(decoded(pixels, size=30, fit="crop").ravel()) == {150, 151}
    squashed = decoded(pixels, size=30, fit="squash")
    assert (squashed[:, 3], squashed[:, 15], squashed[:, 26])[1].tolist() == [150] * 30
    assert squashed[0, 3] == 50 and squashed[0, 26] == 250
    padded = decoded(pixels, size=30, fit="pad")
    assert not padded[:10].any() and not padded[20:].any()
    assert padded[15, 3] == 50 and padded[15, 26] == 250


def test_fine_stripes_are_averaged_and_not_turned_into_false_coarse_ones() -> None:
    stripes = np.zeros((400, 400), np.uint8)
    stripes[:, ::2] = 255
    assert decoded(stripes, size=30).std() < 2


COLOURS = {
    "red": ((255, 0, 0), 76),
    "green": ((0, 255, 0), 150),
    "blue": ((0, 0, 255), 29),
    "white": ((255,) * 3, 255),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_become_luma(name: str) -> None:
    colour, luma = COLOURS[name]
    picture = Image.new("RGB", (20, 20))
    picture.paste(colour, (0, 0, 20, 10))
    square = decoded(encoded(picture), size=20)
    assert np.abs(square[:10].astype(int) - luma).max() <= 1 and not square[10:].any()


def modes(size: tuple[int, int] = (40, 40)) -> Iterator[tuple[str, Image.Image, str]]:
    grey = Image.fromarray(gradient(*size))
    yield "1", grey.point(lambda value: 255 * (value > 100)).convert("1"), "PNG"
    for mode in ("L", "LA", "P", "RGB", "RGBA"):
        yield mode, grey.convert(mode), "PNG"
    for mode in ("L", "RGB", "CMYK"):
        yield mode, grey.convert(mode), "JPEG"
    yield "I;16", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"


@pytest.mark.parametrize(
    ("mode", "picture", "image_format"),
    [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in modes()],
)
def test_every_mode_gives_the_same_greys(
    mode: str, picture: Image.Image, image_format: str
) -> None:
    options = {"quality": 95} if image_format == "JPEG" else {}
    square = decoded(encoded(picture, image_format, **options), size=40)
    expected = np.asarray(picture.convert("L")) if mode == "1" else gradient(40, 40)
    tolerance = (
        6 if mode in ("P", "CMYK") or image_format == "JPEG" else 1
    )  # a palette of 256 colours; JPEG is lossy
    assert np.abs(square.astype(int) - expected.astype(int)).max() <= tolerance


def test_what_is_transparent_becomes_black() -> None:
    pixels = np.full((20, 20, 2), 200, np.uint8)
    pixels[:, :10, 1], pixels[:, 10:, 1] = 0, 255
    picture = Image.merge(
        "LA", [Image.fromarray(np.ascontiguousarray(pixels[:, :, k])) for k in (0, 1)]
    )
    square = decoded(encoded(picture), size=20)
    assert not square[:, :10].any()
    assert (square[:, 10:] == 200).all()


def test_a_grey_value_declared_transparent_becomes_black() -> None:
    picture = Image.fromarray(
        np.repeat(np.array([[50, 200]], np.uint8), 10, axis=1).repeat(20, axis=0)
    )
    square = decoded(encoded(picture, transparency=200), size=20)
    assert (square[:, :10] == 50).all()
    assert not square[:, 10:].any()


@pytest.mark.parametrize(
    ("largest", "significant_bits", "scale"),
    [
        (65535, None, 65535),
        (4096, None, 4100),
        (4095, None, 4095),
        (1000, None, 1023),
        (100, None, 255),
        (2100, 12, 4095),
        (33000, 12, 65535),
    ],
)
def test_16_bits_are_divided_by_the_range_that_they_are_of(
    largest: int, significant_bits: int | None, scale: int
) -> None:
    samples = np.linspace(0, largest, 32 * 32).astype(np.uint16).reshape(32, 32)
    file = encoded(Image.fromarray(samples))
    if significant_bits is not None:
        file = file[:33] + png_chunk(b"sBIT", bytes([significant_bits])) + file[33:]
    expected = samples.astype(np.float64) * 255 / scale
    assert np.abs(decoded(file, size=32) - expected).max() <= 0.51


def test_signed_samples_of_a_png_that_have_an_offset_are_shown_without_it() -> None:
    samples = np.linspace(0, 4000, 32 * 32).astype(np.uint16).reshape(32, 32)
    plain, shifted = (decoded(encoded(Image.fromarray(samples + add))) for add in (0, 32768))
    np.testing.assert_array_equal(plain, shifted)


def deep_colours(samples: NDArray[np.uint16]) -> bytes:
    """A PNG of 16-bit colours, (H, W, 2) with alpha, (H, W, 3) or (H, W, 4), which Pillow cannot
    write.
    """
    height, width, channels = samples.shape
    rows = np.zeros((height, 1 + width * channels * 2), np.uint8)  # a filter, then the samples
    rows[:, 1:] = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    colour_type = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours_are_read_where_they_use_16_bits_and_are_else_refused(channels: int) -> None:
    film = gradient(32, 32)
    for bits in (8, 12, 14, 16):
        samples = np.rint(film / 255 * (2**bits - 1)).astype(np.uint16)
        colours = np.repeat(samples[:, :, None], channels, axis=2)
        if channels != 3:
            colours[:, :, -1] = 65535
        if bits == 16:
            assert np.abs(decoded(deep_colours(colours)).astype(int) - film).max() <= 1
        else:
            with pytest.raises(ImageError, match="declares 16 bits and uses fewer"):
                decoded(deep_colours(colours))


def test_16_bits_are_not_clipped_to_white() -> None:
    samples = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    assert len(np.unique(decoded(encoded(Image.fromarray(samples)), size=32))) > 200


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_an_image_is_turned_upright_by_its_exif_orientation(
    orientation: int, image_format: str
) -> None:
    upright = Image.fromarray(gradient(48, 32))
    turns = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in turns[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for fit in FITS:
        square = decoded(encoded(stored, image_format, exif=exif), fit=fit)
        expected = decoded(encoded(upright, image_format), fit=fit)
        assert np.abs(square.astype(int) - expected.astype(int)).max() <= (
            8 if image_format == "JPEG" else 0
        )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_source_image_is_that_of_the_upright_one_however_it_is_decoded(
    orientation: int,
) -> None:
    stored = gradient(640, 401) if orientation < 5 else gradient(401, 640)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for data in (encoded(stored, "JPEG", exif=exif), encoded(stored, exif=exif)):
        for fit in FITS:
            square, size = decode_sized(data, size=16, fit=fit, max_pixels=10**6)
            assert size == (640, 401)
            np.testing.assert_array_equal(square, decode(data, size=16, fit=fit, max_pixels=10**6))
    assert decode_sized(stored, size=16, fit="crop", max_pixels=10**6)[1] == stored.shape[::-1]


def test_an_orientation_that_does_not_exist_is_no_reason_to_turn() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(decoded(grey_png(exif=exif)), decoded(grey_png()))


# ----------------------------------------------------------------------------- JPEG at reduced size


def full_size_films(num_images: int) -> list[bytes]:
    pictures = list(zip(range(num_images), plan(5), strict=False))
    return [
        encode(5, phantom, draw_phantom(5, phantom, full_size=True), image_format="jpeg")
        for _, phantom in pictures
    ]


def mean_difference(data: bytes, *, size: int, fit: str) -> float:
    """Between the JPEG decoded as we do, and in full and then fitted by the same filter; grey
    levels.
    """
    reduced = decoded(data, size=size, fit=fit)
    with Image.open(io.BytesIO(data)) as picture:
        full = decoded(np.asarray(picture.convert("L")), size=size, fit=fit)
    return float(np.abs(reduced.astype(int) - full.astype(int)).mean())


@pytest.mark.parametrize("fit", FITS)
def test_reduced_decoding_of_full_size_images_stays_within_the_stated_tolerance(fit: str) -> None:
    for data in FILMS:
        for size in (32, 64, 224):
            assert mean_difference(data, size=size, fit=fit) < REDUCED_TOLERANCE


FILMS = full_size_films(3)


def test_full_size_images_really_are_decoded_at_reduced_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafts = []
    original = images._reduce_on_load
    monkeypatch.setattr(
        images,
        "_reduce_on_load",
        lambda *args, **kwargs: drafts.append(original(*args, **kwargs)) or drafts[-1],
    )
    for data in FILMS:
        decoded(data, size=64)
    assert min(drafts) >= 4


def test_a_reduction_by_too_much_would_break_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_REDUCED_MARGIN", 0.25)
    assert max(mean_difference(data, size=224, fit="crop") for data in FILMS) > REDUCED_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 224])
def test_reduced_decoding_of_the_published_images_stays_within_the_stated_tolerance(
    real_originals: Path, size: int
) -> None:
    paths = sorted(real_originals.rglob("*.jpeg"))
    assert len(paths) == 300
    worst = max(mean_difference(path.read_bytes(), size=size, fit="crop") for path in paths)
    assert worst < REDUCED_TOLERANCE


# ------------------------------------------------------------------------------ memory and time


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("mode", "picture", "image_format"),
    [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in modes((190, 130))],
)
def test_a_large_image_is_converted_and_scaled_in_strips_to_the_same_greys(
    mode: str, picture: Image.Image, image_format: str, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(picture, image_format)
    whole = decoded(data, fit=fit)
    monkeypatch.setattr(images, "_WHOLE_PIXELS", 100)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 1000)  # 5 rows
    np.testing.assert_array_equal(decoded(data, fit=fit), whole)


def test_a_large_dicom_image_is_scaled_in_strips_to_the_same_greys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = gradient(190, 130).astype(np.uint16) * 257
    for data in (
        dicom_file(samples),
        dicom_file(samples, PatientOrientation=["H", "R"]),
        dicom_file(np.dstack([gradient(190, 130)] * 3), PhotometricInterpretation="RGB"),
    ):
        whole = decoded(data)
        with monkeypatch.context() as patch:
            patch.setattr(images, "_WHOLE_PIXELS", 100)
            patch.setattr(images, "_STRIP_PIXELS", 1000)
            np.testing.assert_array_equal(decoded(data), whole)


def large_files(side: int = 5000) -> Iterator[tuple[str, bytes]]:
    grey = np.tile((np.arange(side) % 256).astype(np.uint8), (side, 1))
    picture = Image.fromarray(grey)
    for mode in ("L", "LA", "RGB", "RGBA"):
        yield mode, encoded(picture.convert(mode), compress_level=1)
    yield "16", encoded(Image.fromarray(grey.astype(np.uint16) * 257), compress_level=1)
    yield "progressive", encoded(picture.convert("RGB"), "JPEG", progressive=True)
    yield "dicom", dicom_file(grey.astype(np.uint16) * 257)


MEASURE = """
import resource, sys
from contextlib import nullcontext
from pathlib import Path
from xrai.ingest.images import decode
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def decoded(data, holds):
    hold = lambda num_bytes: holds.append(num_bytes) or nullcontext()
    decode(data, size=64, fit="crop", max_pixels=10**8, hold=hold)
data, holds = Path(sys.argv[1]).read_bytes(), []
decoded(Path(sys.argv[2]).read_bytes(), [])  # imports what it needs
before = peak()
decoded(data, holds)
print(peak() - before, holds[0])
"""


@pytest.mark.ci
def test_what_decoding_takes_is_known_before_it_takes_it(tmp_path: Path) -> None:
    for (name, data), (_, small) in zip(large_files(), large_files(50), strict=True):
        (tmp_path / "large").write_bytes(data)
        (tmp_path / "small").write_bytes(small)
        told = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / "large", tmp_path / "small"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        taken, held = (int(number) for number in told)
        assert taken < held + (16 << 20), name
        assert held < 340_000_000, name  # of 25 million pixels; 16-bit PNG alone took 340 MB


def test_fewer_scans_of_a_large_jpeg_are_decoded() -> None:
    assert [max_scans(num) for num in (1, 24_000_000, 48_000_000, 100_000_000, 10**9)] == [
        *(50, 50, 25, 12, 12)
    ]


@given(st.lists(st.sampled_from([0xFF, 0xDA, 0]), max_size=40).map(bytes), st.integers(0, 45))
def test_scans_are_counted_wherever_they_begin(data: bytes, start: int) -> None:
    assert count_scans(data, start) == data.count(b"\xff\xda", start)


def test_a_jpeg_of_scans_for_minutes_is_refused() -> None:
    data = encoded(gradient(64, 64), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert decoded(data[:-2] + 30 * last + data[-2:]).shape == (32, 32)
    with pytest.raises(ImageError, match=r"is a JPEG of 200.. scans; at most 50 are decoded"):
        decoded(data[:-2] + 20_000 * last + data[-2:])


# ---------------------------------------------------------------------------------------- bad files


BAD = {
    "zero-byte": (b"", "is empty (0 bytes)"),
    "text": (b"patient notes", "is not a JPEG, PNG or DICOM file"),
    "gif": (encoded(gradient(9, 9), "GIF"), "is not a JPEG, PNG or DICOM file"),
    "tiff": (encoded(gradient(9, 9), "TIFF"), "is not a JPEG, PNG or DICOM file"),
    "jpeg signature alone": (b"\xff\xd8\xff", "is cut short or damaged"),
    "png signature alone": (b"\x89PNG\r\n\x1a\n", "is cut short or damaged"),
    "jpeg cut in half": (encoded(gradient(200, 200), "JPEG")[:1000], "is cut short or damaged"),
    "png cut in half": (encoded(gradient(200, 200))[:5000], "is cut short or damaged"),
    "huge": (
        huge_png(60_000, 60_000),
        "declares 60000 x 60000 pixels, more than images.max_pixels = 10000000",
    ),
    "no pixels": (huge_png(0, 5), "is cut short or damaged"),
    "less data than declared": (huge_png(300, 300), "is cut short or damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError) as caught:
        decoded(data)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


def test_a_file_that_declares_too_much_is_refused_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "_greys_of", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="more than"):
        decode(huge_png(20_000, 20_000), size=32, fit="crop", max_pixels=100_000_000)


def test_the_limit_of_pixels_is_ours_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(grey_png()).shape == (32, 32)


def test_a_png_with_a_bomb_of_text_is_excluded() -> None:
    data = grey_png()
    bomb = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    with pytest.raises(ImageError, match="cut short or damaged"):
        decoded(data[:33] + bomb + data[33:])


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8)],
)
def test_an_array_that_is_no_grey_image_is_refused(array: NDArray[np.uint8]) -> None:
    with pytest.raises(ImageError, match="not a grey image"):
        decoded(array)


def without_content() -> Iterator[tuple[str, bytes | NDArray[np.uint8], str]]:
    flat = "shows one grey level throughout"
    for level in (0, 90, 255):
        pixels = np.full((40, 60), level, np.uint8)
        yield f"array {level}", pixels, flat
        for image_format in ("PNG", "JPEG"):
            yield f"{image_format} {level}", encoded(pixels, image_format), flat
        deep = Image.fromarray(pixels.astype(np.uint16) * 257)
        yield f"16 bits {level}", encoded(deep), flat
    clear = Image.fromarray(gradient(60, 40)).convert("LA")
    clear.putalpha(0)
    yield "transparent", encoded(clear), "is transparent throughout"


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("data", "reason"), [pytest.param(*case, id=name) for name, *case in without_content()]
)
def test_an_image_without_content_is_refused(
    data: bytes | NDArray[np.uint8], reason: str, fit: str
) -> None:
    with pytest.raises(ImageError) as caught:
        decoded(data, fit=fit)
    assert str(caught.value) == reason


VALID = [
    encoded(gradient(60, 50), "JPEG"),
    encoded(gradient(60, 50), "JPEG", progressive=True),
    encoded(Image.fromarray(gradient(60, 50)).convert("RGB"), "JPEG"),
    grey_png(),
    encoded(Image.fromarray(gradient(30, 30)).convert("P")),
    encoded(Image.fromarray(gradient(30, 30).astype(np.uint16) * 257)),
]


@given(data=st.data())
def test_a_file_damaged_anywhere_gives_an_image_or_a_reason_and_nothing_else(
    data: st.DataObject,
) -> None:
    file = bytearray(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in (bytes(file), bytes(file[:cut])):
            try:
                assert decoded(found).shape == (32, 32)
            except ImageError as error:
                assert str(error) and "Error" not in str(error)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EOFError(), "is cut short or damaged"),
        (TypeError("'NoneType' object is not iterable"), "is cut short or damaged"),
        (OSError("image file is truncated"), "is cut short or damaged (image file is truncated)"),
    ],
)
def test_a_reason_names_no_class_of_python(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError) as caught:
        decoded(grey_png())
    assert str(caught.value) == reason
