"""DICOM films, and peers that send and take them, for tests of the node."""

import io
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pynetdicom import AE, evt

from xrai.ingest.dicom import write_radiograph
from xrai.phantom import draw_phantom, encode, plan
from xrai.pipeline import Prediction
from xrai.serving.dicom_result import Device, Source
from xrai.serving.dimse import close_socket

PATIENT = "Zebra^Quagga"  # must never be seen in a log or an answer
DEVICE = Device("20261123-031500-a1b2c3", "0.1.0", ("ab" * 32,))
ROW = Prediction(
    path="film",
    probability=0.83,
    threshold=0.5,
    decision="PNEUMONIA",
    reason="",
    model=DEVICE.run_id,
    probabilities={"PNEUMONIA": 0.83},
    thresholds={"PNEUMONIA": 0.5},
    calls=("PNEUMONIA",),
)
_TAGS = {
    "SpecificCharacterSet": "ISO_IR 100",
    "PatientName": PATIENT,
    "PatientID": "Z-4711",
    "PatientBirthDate": "20200229",
    "PatientSex": "F",
    "AccessionNumber": "A1",
    "StudyDate": "20261127",
    "StudyTime": "101112",
    "Modality": "DX",
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsStored": 12,
}


def film(name: str = "film", **tags: Any) -> bytes:
    """A film of noise, 48 x 40 pixels; the same name makes the same file."""
    samples = np.random.default_rng(len(name)).integers(0, 4096, (48, 40)).astype(np.uint16)
    return write_radiograph(samples, _TAGS | tags, identity=["study", name])


def phantoms(number: int) -> list[bytes]:
    """Drawn films as modalities send them."""
    found = []
    for _, phantom in zip(range(number), plan(5), strict=False):
        data = encode(5, phantom, draw_phantom(5, phantom), image_format="dicom")
        found.append(changed(data, PatientName=PATIENT, PatientID="Z1", StudyDate="20261127"))
    return found


def read(data: bytes | Path) -> pydicom.Dataset:
    """A file, with all of its values."""
    return pydicom.dcmread(io.BytesIO(data) if isinstance(data, bytes) else data)


def changed(data: bytes, **tags: Any) -> bytes:
    """A file with other values; None takes a tag away."""
    dataset = read(data)
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    if "SOPInstanceUID" in tags:
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def source_of(**texts: str) -> Source:
    """The source of results, of a film that does not exist."""
    copied = dict.fromkeys(
        [
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber"),
            *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
        ],
        "",
    )
    return Source(
        str(uid.DigitalXRayImageStorageForPresentation), "1.2.3", "1.2.4", "1.2.5", copied | texts
    )


def film_of(report: pydicom.Dataset) -> str:
    """The UID of the film that a report is about."""
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (referred,) = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    return str(referred.ReferencedSOPInstanceUID)


@contextmanager
def association(
    port: int,
    *,
    host: str = "127.0.0.1",
    calling: str = "MODALITY",
    called: str = "XRAI",
    **options: Any,
) -> Iterator[Any]:
    """An association as a modality opens it, perhaps rejected."""
    client = AE(ae_title=calling)
    client.add_requested_context("1.2.840.10008.1.1")
    for kind in (
        *(uid.DigitalXRayImageStorageForPresentation, uid.ComputedRadiographyImageStorage),
        *(uid.SecondaryCaptureImageStorage, uid.CTImageStorage),
    ):
        client.add_requested_context(kind, [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
    client.acse_timeout = client.dimse_timeout = client.network_timeout = 60
    found = client.associate(host, port, ae_title=called, **options)
    try:
        yield found
    finally:
        if found.is_established:
            found.release()
        for thread in (found, found.dul):
            if thread.is_alive():
                thread.join(10)
        close_socket(found)


def send(port: int, data: bytes) -> tuple[int, str]:
    """Status and comment of the answer to one file."""
    with association(port) as opened:
        answer = opened.send_c_store(read(data))
        return answer.Status, str(answer.get("ErrorComment", ""))


@dataclass
class Archive:
    """A C-STORE SCP that keeps what it gets, and answers as it is told."""

    status: int = 0x0000
    stored: list[pydicom.Dataset] = field(default_factory=list)
    num_requests: int = 0
    statuses: Mapping[str, int] = field(default_factory=dict)  # by SOP Instance UID
    host: str = "127.0.0.1"
    port: int = 0

    def _store(self, event: evt.Event) -> int:
        self.num_requests += 1
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        status = self.statuses.get(dataset.SOPInstanceUID, self.status)
        if status == 0:
            self.stored.append(dataset)
        return status

    def handlers(self) -> list[evt.EventHandlerType]:
        """What is done with what comes."""
        return [(evt.EVT_C_STORE, self._store)]

    @contextmanager
    def running(self, tls: ssl.SSLContext | None = None) -> Iterator["Archive"]:
        """Listen, on the same port each time."""
        own = AE(ae_title="ARCHIVE")
        for kind in (uid.ComprehensiveSRStorage, uid.SecondaryCaptureImageStorage):
            own.add_supported_context(kind)
        server = own.start_server(
            (self.host, self.port), block=False, evt_handlers=self.handlers(), ssl_context=tls
        )
        assert server is not None
        self.port = int(server.server_address[1])
        try:
            yield self
        finally:
            server.shutdown()
            for each in server.active_associations:
                each.abort()
