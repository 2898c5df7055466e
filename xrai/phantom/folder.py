"""Phantoms as files: PNG, JPEG or DICOM, in a folder laid out like the public data set.

Folder, file and patient names say that they are phantoms.
"""

import importlib.util
import io
import math
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from xrai.errors import UserError, XraiError
from xrai.files import is_temporary, num_cores, replacing, write_atomically
from xrai.ingest.dicom import write_radiograph
from xrai.log import get_logger, progress
from xrai.phantom.anatomy import Array, Phantom, generator, plan
from xrai.phantom.draw import draw_phantom
from xrai.workers import start_pool

SUFFIXES = {"png": ".png", "jpeg": ".jpeg", "dicom": ".dcm"}

_README_TITLE = "xrai chest phantoms, version 1"
_LABELS_HEADER = "path,label,patient,split,subtype"
_DICOM_BITS = (12, 12, 14, 16)
_CHEST_MM = 350.0  # an image's width, for the spacing of pixels
_IMAGES_A_TASK = 8
_logger = get_logger(__name__)


def encode(seed: int, phantom: Phantom, image: Array, *, image_format: str) -> bytes:
    """The bytes of a phantom's file: `png` (8 bit), `jpeg` (8 bit, quality 90) or `dicom` (12 to
    16 bit).
    """
    if image_format == "dicom":
        return _encode_dicom(seed, phantom, image)
    pixels = Image.fromarray(np.rint(image * np.float32(255)).astype(np.uint8))
    buffer = io.BytesIO()
    if image_format == "jpeg":
        pixels.save(buffer, "JPEG", quality=90)
    else:  # level 6 would make noise 3 % smaller in four times the time
        pixels.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _encode_dicom(seed: int, phantom: Phantom, image: Array) -> bytes:
    """As a digital detector writes it for viewing: 12 to 16 bits, a window, a quarter inverted."""
    rng = generator(seed, 3, phantom.patient, phantom.image)
    bits = int(rng.choice(_DICOM_BITS))
    largest = 2**bits - 1
    black, white = (int(rng.uniform(low, high) * largest) for low, high in ((0, 0.07), (0.6, 1)))
    inverted = bool(rng.random() < 0.25)
    stored = np.rint(black + image * np.float32(white - black)).astype(np.uint16)
    center, width = (black + white + 1) / 2, white - black + 1
    if inverted:
        stored = largest - stored
        center = largest + 1 - center
    empty = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")
    tags = {
        "PatientID": phantom.patient_id,
        "PatientName": f"PHANTOM^{phantom.patient:06d}",
        **dict.fromkeys((*empty, "AccessionNumber", "ReferringPhysicianName"), ""),
        "Manufacturer": "xrai phantoms",
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "PatientOrientation": ["L", "F"],
        "PresentationIntentType": "FOR PRESENTATION",
        "SeriesNumber": 1,
        "InstanceNumber": phantom.image + 1,
        "ImageComments": "Procedurally drawn phantom: no patient",
        "PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2",
        "PresentationLUTShape": "INVERSE" if inverted else "IDENTITY",
        "ImagerPixelSpacing": [f"{_CHEST_MM / stored.shape[1]:.4f}"] * 2,
        "BitsStored": bits,
        "PixelIntensityRelationship": "LOG",
        "PixelIntensityRelationshipSign": 1 if inverted else -1,
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
        "RescaleType": "US",
        "WindowCenter": center,
        "WindowWidth": width,
        "VOILUTFunction": "LINEAR",
        "LossyImageCompression": "00",
    }
    identity = ["phantom", str(seed), str(phantom.patient), str(phantom.image)]
    return write_radiograph(stored, tags, identity=identity)


# ------------------------------------------------------------------------------------------ drawing


@dataclass(frozen=True)
class _Job:
    """What all images of one call share; sent to the workers."""

    out: Path
    seed: int
    image_format: str
    full_size: bool

    def path(self, phantom: Phantom) -> str:
        return f"train/{phantom.label}/{phantom.stem}{SUFFIXES[self.image_format]}"


def _draw_files(job: _Job, phantoms: tuple[Phantom, ...]) -> int:
    for phantom in phantoms:
        image = draw_phantom(job.seed, phantom, full_size=job.full_size)
        data = encode(job.seed, phantom, image, image_format=job.image_format)
        # not `write_atomically`: it syncs each file and looks through its folder, and README.txt,
        # written last, says that all are there
        path = job.out / job.path(phantom)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
    return len(phantoms)


def _draw_all(job: _Job, phantoms: Iterator[Phantom], *, workers: int) -> Iterator[int]:
    """Draw and write all images; yields how many more are done. Only a few tasks wait at a time."""
    tasks = iter(lambda: tuple(islice(phantoms, _IMAGES_A_TASK)), ())
    if workers == 1:
        for task in tasks:
            yield _draw_files(job, task)
        return
    waiting: deque[Future[int]] = deque()
    with start_pool(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_draw_files, job, task))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------- the folder


def _is_ours(out: Path, path: Path) -> bool:
    """Whether a file in `out` can only come from an earlier call, finished or not."""
    if path.is_symlink() or not path.is_file():
        return False
    folder, name = path.parent.relative_to(out).as_posix(), path.name
    if folder in {"train/NORMAL", "train/PNEUMONIA"}:
        return name.startswith(("phantom-", ".phantom-"))
    if folder == "." and name in {"README.txt", "labels.csv"}:
        head = path.read_bytes()[:200].decode("utf-8", "replace")
        return head.startswith((f"{_README_TITLE}\n", f"{_LABELS_HEADER}\ntrain/NORMAL/phantom-"))
    return (
        folder == "." and name.startswith((".README.txt.", ".labels.csv.")) and is_temporary(name)
    )


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder; links are not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (Path(place) / name for name in (*links, *names))


def _clear(out: Path) -> None:
    """Make an empty folder. Removes phantoms of an earlier call; refuses anything else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a new or empty folder")
    if out.is_dir():
        for path in _files(out):
            if not _is_ours(out, path):
                raise UserError(
                    f"--out {out} holds {path.relative_to(out)}, which is no phantom; name a "
                    "folder that is new or empty, or holds only phantoms, which are then replaced"
                )
        (out / "README.txt").unlink(missing_ok=True)  # first: the folder is now unfinished
        for path in _files(out):
            path.unlink()
    for label in ("NORMAL", "PNEUMONIA"):
        (out / "train" / label).mkdir(parents=True, exist_ok=True)


def _labels_csv(job: _Job, phantoms: Iterable[Phantom]) -> Iterator[bytes]:
    yield f"{_LABELS_HEADER}\n".encode()
    for phantom in phantoms:
        subtype = "" if phantom.kind == "normal" else phantom.kind
        line = f"{job.path(phantom)},{phantom.label},{phantom.patient_id},,{subtype}\n"
        yield line.encode()


def _readme(job: _Job, *, num_images: int) -> str:
    size = "1,000 to 2,500" if job.full_size else "160 to 320"
    return f"""{_README_TITLE}

These images are phantoms: drawn by a program (xrai phantom), not taken of any person.
They serve tests and demonstrations. A model trained on them knows nothing about patients.

images: {num_images}
seed: {job.seed}
format: {job.image_format}
width: {size} pixels

Layout: train/{{NORMAL,PNEUMONIA}}/; splits are carved from it by patient. The number behind IM- or
person is the patient's, _bacteria_ and _virus_ the kind of pneumonia that was drawn.
This file is written last: without it the folder is unfinished.
"""


def make_phantoms(
    out: Path,
    *,
    num_images: int,
    seed: int = 0,
    image_format: str = "png",
    full_size: bool = False,
    workers: int = 0,
) -> None:
    """Draw `num_images` phantoms into OUT/train/{NORMAL,PNEUMONIA}/ and write OUT/README.txt last.

    The first N images of a seed are byte for byte the same whatever `num_images` and `workers`
    (0: all cores). About 40 of 100 are normal. DICOM files come with OUT/labels.csv, for
    `xrai.preprocess --labels`. Phantoms that OUT already holds are replaced.

    Raises UserError for a value out of range, a folder that holds anything else or cannot be
    written, or DICOM without pydicom; XraiError if writing fails later.
    """
    if num_images < 2:
        raise UserError(
            f"--num-images {num_images}: at least 2 are needed, one of each class (default: 600)"
        )
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    if workers < 0:
        raise UserError(f"--workers {workers}: must be 0 (all cores) or more")
    if image_format not in SUFFIXES:
        raise UserError(f"--format {image_format}: must be one of {', '.join(SUFFIXES)}")
    if image_format == "dicom" and importlib.util.find_spec("pydicom") is None:
        raise UserError(
            "--format dicom needs pydicom, which is missing; pip install 'xrai[dicom]', or use png "
            "or jpeg"
        )
    out = Path(out)
    try:
        _clear(out)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); name a folder that can"
        ) from error
    job = _Job(out, seed, image_format, full_size)
    workers = min(workers or num_cores(), math.ceil(num_images / _IMAGES_A_TASK))
    try:
        with progress("drawing phantoms", total=num_images, unit="images") as bar:
            for num_done in _draw_all(job, islice(plan(seed), num_images), workers=workers):
                bar.update(num_done)
        if image_format == "dicom":
            with replacing(out / "labels.csv") as file:
                file.writelines(_labels_csv(job, islice(plan(seed), num_images)))
        write_atomically(out / "README.txt", _readme(job, num_images=num_images).encode())
    except OSError as error:
        raise XraiError(
            f"writing phantoms to {out} failed ({error.strerror}); the folder has no README.txt "
            "and is unfinished: fix the cause and run the same command again"
        ) from error
    _logger.info("%d phantoms (drawn, no patients) are in %s", num_images, out)
