"""Phantoms as files: PNG, JPEG or DICOM, in class folders laid out like the public data set or,
with findings, next to a table.

Folder, file and patient names say that they are phantoms.
"""

import functools
import importlib.util
import io
import math
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from xrai.errors import UserError
from xrai.files import explaining, is_temporary, num_cores, write_atomically
from xrai.ingest.dicom import write_radiograph
from xrai.labels import UNKNOWN, Task
from xrai.log import get_logger, progress
from xrai.phantom.anatomy import Array, Kind, Phantom, generator, plan
from xrai.phantom.draw import draw_phantom
from xrai.phantom.findings import FINDINGS, draw_labels, plan_findings
from xrai.tables import to_csv
from xrai.workers import map_ahead, start_pool

TASKS: tuple[Task, ...] = get_args(Task)
# Images that are needed; with fewer, a class of `plan` would have none
LEAST: Mapping[Task, int] = {"binary": 2, "multiclass": 4, "multilabel": 2}
SUFFIXES = {"png": ".png", "jpeg": ".jpeg", "dicom": ".dcm"}

_README_TITLE = "xrai chest phantoms, version 1"
_CLASSES: Mapping[Task, Mapping[Kind, str]] = {  # kind of phantom -> class folder
    "binary": {"normal": "NORMAL", "bacteria": "PNEUMONIA", "virus": "PNEUMONIA"},
    "multiclass": {"normal": "NORMAL", "bacteria": "BACTERIAL", "virus": "VIRAL"},
}
_COLUMNS = ("path", "label", "patient", "split", "subtype")  # of labels.csv
_IMAGE_FOLDERS = {
    "images",
    *(f"train/{name}" for classes in _CLASSES.values() for name in classes.values()),
}
_FINDING_COLUMNS = ("path", "patient", *FINDINGS)  # with findings
_DICOM_BITS = (12, 12, 14, 16)
_CHEST_MM = 350.0  # an image's width, for the spacing of pixels
_IMAGES_A_TASK = 8
_TASKS_AHEAD = 4  # for each worker
_logger = get_logger(__name__)


def encode(seed: int, phantom: Phantom, image: Array, *, image_format: str) -> bytes:
    """The bytes of a phantom's file: `png` (8 bit), `jpeg` (8 bit, quality 90) or `dicom` (12 to
    16 bit).
    """
    if image_format == "dicom":
        return _encode_dicom(seed, phantom, image)
    pixels = Image.fromarray(np.rint(image * np.float32(255)).astype(np.uint8))
    buffer = io.BytesIO()
    # PNG's level 6 would make noise 3 % smaller in four times the time
    pixels.save(buffer, image_format.upper(), quality=90, compress_level=1)
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


@dataclass(frozen=True)
class _Folder:
    """A folder of phantoms to make: which, and how its files are called."""

    out: Path
    task: Task
    num_images: int
    seed: int
    image_format: str
    full_size: bool

    def phantoms(self) -> Iterator[Phantom]:
        """The phantoms, in the order of drawing."""
        phantoms = plan_findings(self.seed) if self.task == "multilabel" else plan(self.seed)
        return islice(phantoms, self.num_images)

    def path(self, phantom: Phantom) -> str:
        """The path of a phantom's file, relative to `out`."""
        name = phantom.stem + SUFFIXES[self.image_format]
        if self.task == "multilabel":
            return f"images/{name}"
        return f"train/{_CLASSES[self.task][phantom.kind]}/{name}"

    def folders(self) -> tuple[str, ...]:
        """The folders that hold images."""
        if self.task == "multilabel":
            return ("images",)
        return tuple(f"train/{name}" for name in dict.fromkeys(_CLASSES[self.task].values()))

    @property
    def has_table(self) -> bool:
        """Whether labels.csv is written: for DICOM, to have the patients, and for findings."""
        return self.image_format == "dicom" or self.task == "multilabel"

    def table(self) -> bytes:
        """labels.csv."""
        if self.task == "multilabel":
            return to_csv(_FINDING_COLUMNS, map(self._finding_row, self.phantoms())).encode()
        return to_csv(_COLUMNS, map(self._class_row, self.phantoms())).encode()

    def _class_row(self, phantom: Phantom) -> dict[str, object]:
        has_subtype = self.task == "binary" and phantom.kind != "normal"
        return {
            "path": self.path(phantom),
            "label": _CLASSES[self.task][phantom.kind],
            "patient": phantom.patient_id,
            "subtype": phantom.kind if has_subtype else "",
        }

    def _finding_row(self, phantom: Phantom) -> dict[str, object]:
        labels = draw_labels(self.seed, phantom)
        known = zip(FINDINGS, labels, strict=True)
        return {
            "path": self.path(phantom),
            "patient": phantom.patient_id,
            **{name: "" if label == UNKNOWN else label for name, label in known},
        }


def _draw_files(phantoms: tuple[Phantom, ...], *, folder: _Folder) -> int:
    for phantom in phantoms:
        image = draw_phantom(folder.seed, phantom, full_size=folder.full_size)
        # not `write_atomically`, which syncs each file: README.txt, written last, says that all are
        # there
        path = folder.out / folder.path(phantom)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(encode(folder.seed, phantom, image, image_format=folder.image_format))
        temporary.replace(path)
    return len(phantoms)


def _is_ours(out: Path, path: Path) -> bool:
    """Whether a file in `out` can only come from an earlier call, finished or not."""
    if path.is_symlink() or not path.is_file():
        return False
    folder, name = path.parent.relative_to(out).as_posix(), path.name
    if folder in _IMAGE_FOLDERS:
        return name.startswith(("phantom-", ".phantom-"))
    if folder == "." and name in {"README.txt", "labels.csv"}:
        head = path.read_bytes()[:200].decode("utf-8", "replace")
        classes, findings = ",".join(_COLUMNS), ",".join(_FINDING_COLUMNS)
        tables = (f"{classes}\ntrain/NORMAL/phantom-", f"{findings}\nimages/phantom-")
        return head.startswith((f"{_README_TITLE}\n", *tables))
    return (
        folder == "." and name.startswith((".README.txt.", ".labels.csv.")) and is_temporary(name)
    )


def _clear(out: Path, folders: Iterable[str]) -> None:
    """Make an empty folder. Removes phantoms of an earlier call; refuses anything else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a new or empty folder")
    # links to folders are listed, not followed
    files = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in files:
        if not _is_ours(out, path):
            raise UserError(
                f"--out {out} holds {path.relative_to(out)}, which is no phantom; name a folder "
                "that is new or empty, or holds only phantoms, which are then replaced"
            )
    (out / "README.txt").unlink(missing_ok=True)  # first: the folder is now unfinished
    for path in files:
        path.unlink(missing_ok=True)
    for name in (*sorted(_IMAGE_FOLDERS), "train"):  # those of another task are not left empty
        if (out / name).is_dir() and not any((out / name).iterdir()):
            (out / name).rmdir()
    for name in folders:
        (out / name).mkdir(parents=True, exist_ok=True)


def _readme(folder: _Folder) -> str:
    if folder.task == "multilabel":
        layout = (
            "images/ and labels.csv, for xrai preprocess --labels: a column for each finding, 1 "
            "where it\nwas drawn, 0 where it was not, and empty in a fifth of cells, as if nobody "
            "had looked for it."
        )
    else:
        names = ",".join(name.removeprefix("train/") for name in folder.folders())
        layout = (
            f"train/{{{names}}}/; splits are carved from it by patient. The number behind IM- or\n"
            "person is the patient's, _bacteria_ and _virus_ the kind of pneumonia that was drawn."
        )
    return f"""{_README_TITLE}

These images are phantoms: drawn by a program (xrai phantom), not taken of any person.
They serve tests and demonstrations. A model trained on them knows nothing about patients.

images: {folder.num_images}
seed: {folder.seed}
format: {folder.image_format}
width: {"1,000 to 2,500" if folder.full_size else "160 to 320"} pixels

Layout: {layout}
This file is written last: without it the folder is unfinished.
"""


def make_phantoms(
    out: Path,
    *,
    num_images: int,
    task: Task = "binary",
    seed: int = 0,
    image_format: str = "png",
    full_size: bool = False,
    workers: int = 0,
) -> None:
    """Draw `num_images` phantoms into OUT and write OUT/README.txt last.

    `binary` draws into OUT/train/{NORMAL,PNEUMONIA}/, about 40 of 100 normal; `multiclass` draws
    the same images into {NORMAL,BACTERIAL,VIRAL}/; `multilabel` draws others, with six findings,
    into OUT/images/. The first N images of a seed are byte for byte the same whatever `num_images`
    and `workers` (0: all cores). DICOM files and findings come with OUT/labels.csv, for
    `xrai preprocess --labels`. Phantoms that OUT already holds are replaced.

    Raises `UserError` for a value out of range, a folder that holds anything else or cannot be
    written, or DICOM without pydicom; `StoreError` if writing fails later.
    """
    folder = _Folder(out, task, num_images, seed, image_format, full_size)
    _check(folder, workers)
    with explaining("written", f"--out {out}", hint="name a folder that can"):
        _clear(out, folder.folders())
    draw = functools.partial(_draw_files, folder=folder)
    phantoms = folder.phantoms()
    tasks = iter(lambda: tuple(islice(phantoms, _IMAGES_A_TASK)), ())
    workers = min(workers or num_cores(), math.ceil(num_images / _IMAGES_A_TASK))
    hint = "the folder has no README.txt and is unfinished: fix the cause and draw again"
    with (
        explaining("written", f"phantoms in {out}", hint=hint, is_address=False),
        progress("drawing phantoms", total=num_images, unit="images") as bar,
    ):
        if workers == 1:
            for num_done in map(draw, tasks):
                bar.update(num_done)
        else:
            with start_pool(workers, multiprocessing.get_context("spawn")) as pool:
                for num_done in map_ahead(pool, draw, tasks, num_ahead=_TASKS_AHEAD * workers):
                    bar.update(num_done)
        if folder.has_table:
            write_atomically(out / "labels.csv", folder.table())
        write_atomically(out / "README.txt", _readme(folder).encode())
    _logger.info("%d phantoms (drawn, no patients) are in %s", num_images, out)


def _check(folder: _Folder, workers: int) -> None:
    """Raise `UserError` for a value out of range."""
    if folder.task not in TASKS:
        raise UserError(f"--task {folder.task}: must be one of {', '.join(TASKS)}")
    if folder.num_images < (least := LEAST[folder.task]):
        each = "" if folder.task == "multilabel" else ", so that each class has one"
        raise UserError(
            f"--num-images {folder.num_images}: at least {least} are needed{each} (default: 600)"
        )
    if min(folder.seed, workers) < 0:
        name, value = ("seed", folder.seed) if folder.seed < 0 else ("workers", workers)
        raise UserError(f"--{name} {value}: must be 0 or more")
    if folder.image_format not in SUFFIXES:
        raise UserError(f"--format {folder.image_format}: must be one of {', '.join(SUFFIXES)}")
    if folder.image_format == "dicom" and importlib.util.find_spec("pydicom") is None:
        raise UserError(
            "--format dicom needs pydicom, which is missing; pip install 'xrai[dicom]', or use png "
            "or jpeg"
        )
