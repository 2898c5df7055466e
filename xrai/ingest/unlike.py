"""Images that a site wants to be sent to review: what `review.unlike` names, read by `xrai.train`.

Review is fitted to two thirds of their patients and tested on the others. A DICOM file states its
patient; else a file name as in the public data set or in NIH ChestX-ray14 does; else each file
counts as a patient of its own.
"""

import functools
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xrai.config import Images
from xrai.dataset.manifest import parse_manifest
from xrai.dataset.rows import is_file_patient
from xrai.dataset.shards import MANIFEST_KEY, DatasetIndex
from xrai.dataset.unlike import Unlike
from xrai.errors import ImageError, UserError
from xrai.files import num_cores
from xrai.ingest.budget import MemoryBudget
from xrai.ingest.dicom import is_dicom, read_patient_id
from xrai.ingest.find import File, find_files
from xrai.ingest.images import Hold, decode
from xrai.ingest.layout import file_patient, parse_name
from xrai.ingest.sources import hash_of
from xrai.log import counted, get_logger
from xrai.store import Store

_MAX_FILES = 512  # of more, every second is read, every third, and so on
_MIN_IMAGES, _MIN_PATIENTS = 10, 3
_NIH_NAME = re.compile(r"(\d{8})_\d{3}\.\w+")  # patient and number of the visit
_logger = get_logger(__name__)


@dataclass(frozen=True)
class _Image:
    sha256: str
    patient: str
    pixels: NDArray[np.uint8]  # (size, size)


def read_unlike(source: str, images: Images) -> Unlike:
    """The images at an address as `find_files` takes it, made square as the training images are;
    each once, and of many files a sample.

    Raises `UserError` if there is nothing, or fewer than 10 images of 3 patients can be read.
    """
    try:
        files = find_files([source])
    except UserError as error:
        raise type(error)(f"review.unlike: {error}") from error
    files = files[:: -(-len(files) // _MAX_FILES)]
    read = functools.partial(_read, images=images, hold=MemoryBudget(num_cores()).hold)
    with ThreadPoolExecutor(num_cores()) as pool:
        found = list(pool.map(read, files))
    distinct = {each.sha256: each for each in found if isinstance(each, _Image)}
    kept = [distinct[sha256] for sha256 in sorted(distinct)]
    patients = sorted({each.patient for each in kept}, key=_digest)
    if len(kept) < _MIN_IMAGES or len(patients) < _MIN_PATIENTS:
        reasons = [f"; {each}" for each in found if isinstance(each, str)]
        raise UserError(
            f"review.unlike = {source} holds {counted(len(kept), 'image')} of "
            f"{counted(len(patients), 'patient')} that can be read: at least {_MIN_IMAGES} of "
            f"{_MIN_PATIENTS} are needed{reasons[0] if reasons else ''}"
        )
    if num_unread := sum(isinstance(each, str) for each in found):
        text = "review.unlike: %d of %d files cannot be read and are left out"
        _logger.warning(text, num_unread, len(files))
    fitted = {*patients[: len(patients) * 2 // 3]}
    return Unlike(
        source,
        tuple(each.sha256 for each in kept),
        np.stack([each.pixels for each in kept])[:, None],
        np.array([each.patient in fitted for each in kept]),
        len(patients),
        sum(is_file_patient(each.patient) for each in kept),
    )


def refuse_shared(unlike: Unlike, store: Store, index: DatasetIndex) -> None:
    """Raise `UserError` where a file of `unlike` is also an image of the data set in `store`:
    training would treat it both as an image to classify and as one for review.
    """
    given, key = set(unlike.hashes), index.place + MANIFEST_KEY
    with store.as_file(key) as path, path.open("rb") as lines:
        rows = parse_manifest(lines, where=f"{store.uri}/{key}")
        shared = [row.path for row in rows if row.shard is not None and row.sha256 in given]
    if shared:
        raise UserError(
            f"review.unlike = {unlike.source} holds {counted(len(shared), 'image')} of the data "
            f"set {store.uri}, such as {shared[0]}: an image cannot be one to classify and one "
            "that is to go to review; remove it there, or from the data set"
        )


def _read(file: File, *, images: Images, hold: Hold) -> _Image | str:
    """An image, or why it cannot be read."""
    try:
        data = file.read()
        pixels = decode(
            data, size=images.size, fit=images.fit, max_pixels=images.max_pixels, hold=hold
        )
    except ImageError as error:
        return f"{file.path} {error}"
    return _Image(hash_of(data), _patient_of(file.path, data), pixels)


def _patient_of(path: str, data: bytes | NDArray[np.uint8]) -> str:
    """A key for an image's patient, which tells patients apart in memory and is never written."""
    if isinstance(data, bytes) and is_dicom(data) and (identifier := read_patient_id(data)):
        return f"dicom:{identifier}"
    name = path.rpartition("/")[2]
    if match := _NIH_NAME.fullmatch(name):
        return f"nih:{match[1]}"
    return parse_name(name)[0] or file_patient(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
