"""Hash the files of a source: the first pass over it, before the plan."""

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from xrai.dataset.manifest import Row
from xrai.dataset.rows import HASH_BYTES, Rows, TextsBuilder, is_file_patient
from xrai.errors import ImageError
from xrai.files import num_cores
from xrai.ingest.dicom import is_dicom, read_patient_id
from xrai.ingest.images import format_fault
from xrai.ingest.layout import group_of, may_be_number
from xrai.ingest.patients import PatientKey
from xrai.ingest.plan import Listing
from xrai.ingest.sources import Source, hash_of
from xrai.ingest.unfinished import Unfinished
from xrai.log import progress

_FILES_A_GROUP = 1024  # files whose hashes are stored together
_FILES_A_TASK = 8  # handing a single small file to a thread costs more than hashing it
_LARGE_BYTES = 1 << 16  # per file; several threads hash smaller ones more slowly than one does
_SLOW_S = 0.0005  # per file; one in the page cache takes a tenth of that
_MAX_THREADS = 8

# Of a file: SHA-256, hex, "" where it cannot be read; the reason why not, or why it is no image, as
# its first bytes tell; the patient
_Hashed = Sequence[str]


def hash_source(
    source: Source,
    listing: Listing,
    unfinished: Unfinished | None,
    number: int = 0,
    num_partitions: int = 1,
) -> Rows:
    """Rows of all data files, sorted by path, those that others have hashed and stored included.

    Partition `number` begins with its own groups of files and then hashes what is still missing: no
    process waits for another, and machines that run side by side read the source about once between
    them.
    """
    rows = listing.layout.rows
    own_first = sorted(
        range(-(-len(rows) // _FILES_A_GROUP)),
        key=lambda group: ((group - number) % num_partitions, group),
    )
    hashes = _Hashes(rows)
    with progress("hash", total=len(rows), unit="files") as bar:
        for group in own_first:
            start = group * _FILES_A_GROUP
            files = [*rows[start : start + _FILES_A_GROUP]]
            found = unfinished.hashes(group, num_files=len(files)) if unfinished else None
            if unfinished and found is not None:
                unfinished.check_key(listing.key)
                hashes.put(start, files, found)
                bar.update(len(found))
                continue
            hashed = hash_files(source, files, key=listing.key, on_done=bar.update)
            hashes.put(start, files, hashed)
            if unfinished:
                unfinished.claim_key(listing.key)
                unfinished.store_hashes(group, hashed)
    return hashes.finish()


class _Hashes:
    """Collects what hashing finds about rows, in any order."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._sha256 = np.zeros((len(rows), HASH_BYTES), np.uint8)
        self._is_hashed = np.zeros(len(rows), np.bool_)
        self._reasons: dict[int, str] = {}
        self._places, self._patients = array("i"), TextsBuilder()  # of other patients than listed

    def put(self, start: int, files: Sequence[Row], found: Sequence[_Hashed]) -> None:
        """Note what was found about the rows from `start` on."""
        texts = [sha256 or "0" * 2 * HASH_BYTES for sha256, _, _ in found]
        data = np.frombuffer(bytes.fromhex("".join(texts)), np.uint8)
        self._sha256[start : start + len(found)] = data.reshape(-1, HASH_BYTES)
        self._is_hashed[start : start + len(found)] = [bool(sha256) for sha256, _, _ in found]
        for place, (row, (_, reason, patient)) in enumerate(zip(files, found, strict=True), start):
            if reason:
                self._reasons[place] = reason
            if patient != row.patient:
                self._places.append(place)
                self._patients.append(patient)

    def finish(self) -> Rows:
        """The rows with hashes, reasons and patients."""
        reasons = dict(sorted(self._reasons.items()))
        rows = self._rows.with_(sha256=self._sha256, is_hashed=self._is_hashed, reasons=reasons)
        places = np.frombuffer(self._places, np.int32)
        return rows.with_patients(places, self._patients.finish())


def hash_files(
    source: Source, files: Iterable[Row], *, key: PatientKey, on_done: Callable[[int], object]
) -> list[_Hashed]:
    """The hash of each file, or the reason why it cannot be read, or both where it is no image; and
    its patient.

    Where neither name nor table gives the patient, or the name may be a number of the image, a
    DICOM file does, by its PatientID. Raises `SourceError` for such a file where pydicom is not
    installed.
    """
    sizes: list[int] = []  # bytes

    def hashed(file: tuple[str, str]) -> _Hashed:
        path, patient = file
        try:
            data = source.read(path)
        except ImageError as error:
            return "", str(error), patient
        fault = ""
        if isinstance(data, bytes):
            fault = format_fault(data)
            sizes.append(len(data))
            if is_dicom(data) and (is_file_patient(patient) or may_be_number(patient, path)):
                patient = _patient_in(data, patient, key)
        return hash_of(data), fault, patient

    pairs = [(row.path, row.patient) for row in files]
    began, began_busy = time.perf_counter(), time.thread_time()
    done = [hashed(pair) for pair in pairs[:_FILES_A_TASK]]
    took_s, busy_s = time.perf_counter() - began, time.thread_time() - began_busy
    on_done(len(done))
    rest = pairs[_FILES_A_TASK:]
    num_threads = source.num_parallel_reads
    if took_s > _SLOW_S * len(done) and took_s > 2 * busy_s:  # waits for a network or a slow disk
        num_threads = max(num_threads, _MAX_THREADS)
    elif num_threads == 1 and sum(sizes) > _LARGE_BYTES * len(sizes):  # hashing releases the GIL
        num_threads = min(num_cores(), _MAX_THREADS)
    tasks = [rest[start : start + _FILES_A_TASK] for start in range(0, len(rest), _FILES_A_TASK)]
    with ThreadPoolExecutor(num_threads) as pool:
        for found in pool.map(lambda task: [hashed(pair) for pair in task], tasks):
            done += found
            on_done(len(found))
    return done


def _patient_in(data: bytes, patient: str, key: PatientKey) -> str:
    """The key of a DICOM file's patient; `patient`, from its path, where the file names none."""
    identifier = read_patient_id(data)
    if not identifier:
        return patient
    return key.hash(identifier, group=group_of(patient) or "dicom")
