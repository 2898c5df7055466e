"""Small raw images for the tests of the writing side: files of every kind, good and bad, and
source folders.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


def gradient(width: int, height: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth picture (H, W) that differs from seed to seed."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    a, b, c = rng.uniform(0.5, 4, 3)
    waves = np.sin(a * x * 3 + seed) + np.cos(b * y * 3) + x * c
    levels: NDArray[np.uint8] = np.rint(
        (waves - waves.min()) / max(float(np.ptp(waves)), 1e-9) * 255
    ).astype(np.uint8)
    return levels


def encoded(
    pixels: NDArray[np.uint8] | Image.Image, image_format: str = "PNG", **options: object
) -> bytes:
    """The bytes of an image file."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture_file(
    seed: int, *, image_format: str = "PNG", width: int = 40, height: int = 30
) -> bytes:
    """A small valid image file that differs from seed to seed."""
    return encoded(gradient(width, height, seed=seed), image_format)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares `width` x `height` pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def public_names(num_normal: int, num_pneumonia: int) -> list[tuple[str, str]]:
    """(class, file name) pairs in the public data set's manner; every third patient has two
    images.
    """
    names = []
    for k in range(num_normal):
        names.append(("NORMAL", f"IM-{1000 + k - (k % 3 == 2):04d}-{k:04d}.png"))
    for k in range(num_pneumonia):
        germ = "bacteria" if k % 2 else "virus"
        names.append(("PNEUMONIA", f"person{500 + k - 2 * (k % 6 >= 4)}_{germ}_{k}.png"))
    return names


def source_files(
    num_normal: int = 20, num_pneumonia: int = 24, *, split: str = "train"
) -> dict[str, bytes]:
    """Path -> bytes of a small source in the public layout."""
    return {
        f"{split}/{label}/{name}": picture_file(k, width=30 + k % 20, height=40)
        for k, (label, name) in enumerate(public_names(num_normal, num_pneumonia))
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder, which is returned."""
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    """Pack files into a zip, in the order given."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def branch(folder: Path, *, num_levels: int = 27) -> None:
    """Folders f0, f1 and so on; each but the last holds two links to the next, so that there are
    2^27 paths to the file in the last one.
    """
    for level in range(num_levels):
        (folder / f"f{level}").mkdir(parents=True)
        for name in ("a", "b"):
            (folder / f"f{level}" / name).symlink_to(folder / f"f{level + 1}")
    (folder / f"f{num_levels}").mkdir()
    (folder / f"f{num_levels}" / "last.png").touch()


@contextmanager
def deep_folders(folder: Path, *, depth: int = 1200) -> Iterator[Path]:
    """The deepest of nested folders, which are gone after the block: `rmtree` would recurse."""
    places = [f"{folder}{'/d' * (level + 1)}" for level in range(depth)]
    for place in places:
        os.mkdir(place)  # noqa: PTH102, Path would parse it in quadratic time
    try:
        yield Path(places[-1])
    finally:
        for file in os.listdir(places[-1]):  # noqa: PTH208
            os.unlink(f"{places[-1]}/{file}")  # noqa: PTH108
        for place in reversed(places):
            os.rmdir(place)  # noqa: PTH106


def dicom_file(
    samples: NDArray[np.integer], *, leave_out: tuple[str, ...] = (), **tags: Any
) -> bytes:
    """A DICOM file of samples (H, W) or (H, W, 3) as they stand; `tags` are set after those that
    the samples need.
    """
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (the extra `dicom`)")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    bits = 8 * samples.itemsize
    values = {
        "SOPClassUID": dataset.file_meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": "1.2.3",
        "Modality": "DX",
        "PatientID": PATIENT_ID,
        "PatientName": PATIENT_NAME,
        "ImageComments": PATIENT_NAME,
        "Rows": samples.shape[0],
        "Columns": samples.shape[1],
        "SamplesPerPixel": 1 if samples.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if samples.ndim == 2 else "RGB",
        "PlanarConfiguration": 0,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": int(tags.get("BitsStored", bits)) - 1,
        "PixelRepresentation": int(np.issubdtype(samples.dtype, np.signedinteger)),
        "PixelData": np.ascontiguousarray(samples).tobytes() + b"\0" * (samples.nbytes % 2),
        **tags,
    }
    for name, value in values.items():
        if name not in leave_out:
            setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


PATIENT_NAME = "Zanzibar^Quentin"  # of no person; to be found nowhere but in the file
PATIENT_ID = "QZ-4711-X"
