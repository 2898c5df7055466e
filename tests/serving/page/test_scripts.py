"""The page's scripts, one at a time, beside what others compute."""

import base64
import io
import json
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

READ = """async (text) => {
  const { readPng } = await import("/page/png.js");
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  try {
    const { width, height, bits, pixels } = await readPng(bytes.buffer);
    return { width, height, bits, pixels: [...pixels] };
  } catch (error) {
    return { error: error.message };
  }
}"""
TABLE = """async ([bits, own, window, isInverted]) => {
  const { greyTable } = await import("/page/window.js");
  return [...greyTable(bits, own, window, isInverted)];
}"""
VALUES = """async ([rates, prevalence]) => {
  const { predictiveValues } = await import("/page/reading.js");
  return predictiveValues(rates, prevalence);
}"""


@pytest.fixture(scope="module")
def page(browser: Browser, server: str) -> Iterator[Page]:
    """A page from which the scripts can be imported."""
    page = browser.new_page()
    page.goto(f"{server}/")
    yield page
    page.close()


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + checksum


def png(rows: bytes, width: int, height: int, *, bits: int, colour: int = 0) -> bytes:
    """A PNG file with these filtered rows, in two parts."""
    sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = sizes + bytes([bits, colour, 0, 0, 0])
    packed = zlib.compress(rows)
    parts = (chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", packed[:20]), chunk(b"IDAT", packed[20:]))
    signature = b"\x89PNG\r\n\x1a\n"
    return b"".join([signature, chunk(b"IHDR", header), *parts, chunk(b"IEND", b"")])


def read(page: Page, data: bytes) -> dict[str, object]:
    found: dict[str, object] = page.evaluate(READ, base64.b64encode(data).decode())
    return found


@pytest.mark.parametrize("bits", [8, 16])
def test_every_filter_of_png_is_read_as_pillow_reads_it(page: Page, bits: int) -> None:
    size, (height, width) = bits // 8, (25, 17)
    coded = np.random.default_rng(bits).integers(0, 256, (height, 1 + width * size), np.uint8)
    coded[:, 0] = np.arange(height) % 5
    data = png(coded.tobytes(), width, height, bits=bits)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    found = read(page, data)
    assert (found["width"], found["height"], found["bits"]) == (width, height, bits)
    assert found["pixels"] == pixels.ravel().tolist()
    assert len(np.unique(pixels)) > 150


def test_a_file_of_pillow_is_read_with_all_its_16_bits(page: Page) -> None:
    noise = np.random.default_rng(16).integers(0, 2**16, (23, 31), np.uint16)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert read(page, file.getvalue())["pixels"] == noise.ravel().tolist()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GIF89a, more or less", "no PNG"),
        (png(bytes(4 * 7), 2, 4, bits=8, colour=2), "not grey"),
        (png(bytes(10), 4, 4, bits=8), "cut off"),
        (png(b"\x09abcd", 4, 1, bits=8), "filter 9"),
    ],
)
def test_what_is_no_grey_png_is_refused_in_words(page: Page, data: bytes, words: str) -> None:
    assert words in str(read(page, data)["error"])


@pytest.mark.parametrize(
    ("centre", "width", "slope", "intercept", "is_inverse", "is_inverted"),
    [
        (2000, 3000, 1, 0, False, False),
        (-600.5, 1500, 2, -1024, True, False),
        (100, 1, 1, 0, False, True),
        (32767.5, 65536, 1, 0, True, True),
    ],
)
def test_a_window_gives_the_greys_of_pydicom(
    page: Page,
    centre: float,
    width: float,
    slope: float,
    intercept: float,
    is_inverse: bool,
    is_inverted: bool,
) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (the extra `dicom`)")
    stored = np.arange(65536, dtype=np.float64)
    header = pydicom.Dataset()
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsStored, header.PixelRepresentation = 16, 0
    header.WindowCenter, header.WindowWidth = centre, width
    values = stored * slope + intercept
    # its greys lie between 0 and 65535
    expected = pydicom.pixels.apply_windowing(values, header) / 65535 * 255
    if is_inverse != is_inverted:
        expected = 255 - expected
    own = {"slope": slope, "intercept": intercept, "isInverse": is_inverse}
    window = {"centre": centre, "width": width}
    table = np.array(page.evaluate(TABLE, [16, own, window, is_inverted]))
    np.testing.assert_allclose(table & 255, expected, atol=0.502)
    assert (table >> 24 == 255).all() and (table & 255 == table >> 16 & 255).all()


def test_8_bits_without_a_window_are_shown_as_they_are(page: Page) -> None:
    own = {"slope": 1, "intercept": 0, "isInverse": False}
    table = page.evaluate(TABLE, [8, own, {"centre": 128, "width": 256}, False])
    assert [each & 255 for each in table] == list(range(256))


@pytest.mark.parametrize("prevalence", [0.001, 0.1, 0.62])
def test_predictive_values_are_those_of_counts(page: Page, prevalence: float) -> None:
    sensitivity, specificity, num = 0.94, 0.87, 1_000_000
    sick, well = num * prevalence, num * (1 - prevalence)
    tp, tn = sick * sensitivity, well * specificity
    expected = {"ppv": tp / (tp + well - tn), "npv": tn / (tn + sick - tp)}
    rates = {"sensitivity": sensitivity, "specificity": specificity}
    assert page.evaluate(VALUES, [rates, prevalence]) == pytest.approx(expected)


def test_predictive_values_that_are_undefined_are_none(page: Page) -> None:
    never = {"sensitivity": 0, "specificity": 1}
    assert json.dumps(page.evaluate(VALUES, [never, 0.5])) == '{"ppv": null, "npv": 0.5}'


REASON = """async (film) => {
  const { reasonSentence, reasonWords } = await import("/page/words.js");
  return [reasonWords(film.reason), reasonSentence(film)];
}"""


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            "does not look like the training images: atypicality 2.31, above the limit of 1",
            "ne ressemble pas aux images d'entraînement : atypicité 2,31, au-dessus de la limite "
            "de 1",
        ),
        (
            "cannot be taken apart: $&.zip is encrypted (a.png); unpack it and give the folder as "
            "--source",
            "ne peut pas être ouvert : $&.zip est chiffré (a.png) ; décompressez-le et envoyez les "
            "fichiers",
        ),
        ("declares 0 x 30000 pixels", "déclare 0 × 30\u202f000 pixels"),
    ],
)
def test_what_the_server_says_is_said_in_french(
    browser: Browser, server: str, said: str, text: str
) -> None:
    page = browser.new_page(locale="fr-FR")
    page.goto(f"{server}/")
    words, sentence = page.evaluate(REASON, {"reason": said})
    assert words == {"text": text, "language": "fr"}
    assert sentence == {"text": f"Il {text}.", "language": "fr"}
    words, _ = page.evaluate(REASON, {"reason": "is something new"})
    assert words == {"text": "is something new", "language": "en"}
    page.close()


def test_in_english_reasons_are_as_the_server_says_them(page: Page) -> None:
    _, sentence = page.evaluate(REASON, {"reason": "is empty (0 bytes)"})
    assert sentence == {"text": "It is empty (0 bytes).", "language": "en"}
