"""Hash the files of a source: the first pass over it, before the plan."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from xrai.dataset.manifest import Row
from xrai.errors import ImageError
from xrai.files import num_cores
from xrai.ingest.dicom import is_dicom, read_patient_id
from xrai.ingest.layout import Entry, is_file_patient
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


def hash_source(
    source: Source,
    listing: Listing,
    unfinished: Unfinished | None,
    number: int = 0,
    num_partitions: int = 1,
) -> list[Row]:
    """Rows of all data files, sorted by path, those that others have hashed and stored included.

    Partition `number` begins with its own groups of files and then hashes what is still missing: no
    process waits for another, and machines that run side by side read the source about once between
    them.
    """
    entries = listing.layout.entries
    groups = [
        entries[start : start + _FILES_A_GROUP] for start in range(0, len(entries), _FILES_A_GROUP)
    ]
    own_first = sorted(
        range(len(groups)), key=lambda group: ((group - number) % num_partitions, group)
    )
    rows: dict[int, list[Row]] = {}
    with progress("hash", total=len(entries), unit="files") as bar:
        for group in own_first:
            files = groups[group]
            found = unfinished.hashes(group, num_files=len(files)) if unfinished else None
            if unfinished and found is not None:
                unfinished.check_key(listing.key)
                rows[group] = [
                    _row(entry, *texts) for entry, texts in zip(files, found, strict=True)
                ]
                bar.update(len(found))
                continue
            rows[group] = hash_files(source, files, key=listing.key, on_done=bar.update)
            if unfinished:
                unfinished.claim_key(listing.key)
                unfinished.store_hashes(
                    group, [(row.sha256, row.reason, row.patient) for row in rows[group]]
                )
    return [row for group in range(len(groups)) for row in rows[group]]


def hash_files(
    source: Source, entries: Sequence[Entry], *, key: PatientKey, on_done: Callable[[int], object]
) -> list[Row]:
    """One row per entry, with the hash of its file, or the reason why it cannot be read.

    Where neither name nor table gives the patient, a DICOM file does, by its PatientID. Raises
    `SourceError` for such a file where pydicom is not installed.
    """
    sizes: list[int] = []  # bytes

    def hashed(entry: Entry) -> Row:
        try:
            data = source.read(entry.path)
        except ImageError as error:
            return _row(entry, "", str(error), entry.patient)
        patient = entry.patient
        if isinstance(data, bytes):
            sizes.append(len(data))
            if is_file_patient(patient) and is_dicom(data):
                patient = _patient_in(data, patient, key)
        return _row(entry, hash_of(data), "", patient)

    began, began_busy = time.perf_counter(), time.thread_time()
    rows = [hashed(entry) for entry in entries[:_FILES_A_TASK]]
    took_s, busy_s = time.perf_counter() - began, time.thread_time() - began_busy
    on_done(len(rows))
    rest = entries[_FILES_A_TASK:]
    num_threads = source.num_parallel_reads
    if took_s > _SLOW_S * len(rows) and took_s > 2 * busy_s:  # waits for a network or a slow disk
        num_threads = max(num_threads, _MAX_THREADS)
    elif num_threads == 1 and sum(sizes) > _LARGE_BYTES * len(sizes):  # hashing releases the GIL
        num_threads = min(num_cores(), _MAX_THREADS)
    tasks = [rest[start : start + _FILES_A_TASK] for start in range(0, len(rest), _FILES_A_TASK)]
    with ThreadPoolExecutor(num_threads) as pool:
        for found in pool.map(lambda task: [hashed(entry) for entry in task], tasks):
            rows += found
            on_done(len(found))
    return rows


def _row(entry: Entry, sha256: str, reason: str, patient: str) -> Row:
    return Row(entry.path, sha256, entry.label, patient, entry.subtype, entry.split, reason=reason)


def _patient_in(data: bytes, patient: str, key: PatientKey) -> str:
    """The key of a DICOM file's patient; `patient`, from its path, where the file names none."""
    identifier = read_patient_id(data)
    if not identifier:
        return patient
    group = patient.partition(":")[0]
    return key.hash(identifier, group="dicom" if group == "file" else group)
