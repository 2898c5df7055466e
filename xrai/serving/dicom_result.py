"""A film's row as DICOM objects for the archive that the film came from: a structured report, and
the heat map as a secondary capture.

Both join the study of the film, each in a series of its own, and name the film as their source.
Their UIDs are derived from the film (its UIDs, its pixels as the models see them, and what is
copied of its header) and from the models: scoring a film again with the same models gives the same
UIDs, and a changed film gives new ones even if its own UID is unchanged. Of the patient, only the
attributes that every object of a study must state are copied. The one home of highdicom.
"""

import hashlib
import io
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from PIL import Image

from xrai.errors import ImageError
from xrai.ingest.dicom import quiet, read_texts
from xrai.labels import REVIEW, folded
from xrai.log import printable
from xrai.pipeline import Prediction

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept, MeasurementsAndQualitativeEvaluations
    from pydicom import Dataset

Kind = Literal["sr", "sc"]

NOTE: Final = "No medical device: for research, not for diagnosis."

_SCHEME = "99XRAI"
_MANUFACTURER = "xrai"
_NUMBERS: Mapping[Kind, int] = {"sr": 9700, "sc": 9701}  # of series, far from those of modalities
_DESCRIPTIONS: Mapping[Kind, str] = {"sr": "scores of a model", "sc": "heat maps of a model"}
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_COPIED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
# PN (PS3.5 6.2): three spellings of up to 64 characters and five components each
_SPELLING = r"(?![^=]{65})[^\\=^]*(\^[^\\=^]*){0,4}"
_NAME = f"{_SPELLING}(={_SPELLING}){{0,2}}"
_FORMS = {
    "PatientBirthDate": r"\d{8}",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{6}(\.\d{1,6})?|\d{4}|\d{2}",
    "PatientSex": "[MFO]",
    "PatientName": _NAME,
    "ReferringPhysicianName": _NAME,
    "PatientID": r"[^\\]{1,64}",
    "AccessionNumber": r"[^\\]{1,16}",
    "StudyID": r"[^\\]{1,16}",
}
_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+")
_NAMES_A_UID = uuid.UUID("a1f5f0f6-3d0e-5f6a-9d57-0c6c1f4a9b10")  # arbitrary, and never changed
# Names of classes and findings, folded, to the codes of PS3.16 (DCM, and SNOMED CT as SCT)
_FINDINGS = {
    "atelectasis": ("46621007", "SCT", "Atelectasis"),
    "bacterial": ("53084003", "SCT", "Bacterial pneumonia"),
    "bacterial pneumonia": ("53084003", "SCT", "Bacterial pneumonia"),
    "cardiomegaly": ("8186001", "SCT", "Cardiomegaly"),
    "consolidation": ("95436008", "SCT", "Lung consolidation"),
    "edema": ("19242006", "SCT", "Pulmonary edema"),
    "effusion": ("60046008", "SCT", "Pleural effusion"),
    "infiltrate": ("112121", "DCM", "Infiltrate"),
    "infiltration": ("112121", "DCM", "Infiltrate"),
    "mass": ("4147007", "SCT", "Mass"),
    "nodule": ("27925004", "SCT", "Nodule"),
    "normal": ("17621005", "SCT", "Normal"),
    "opacity": ("112001", "DCM", "Opacity"),
    "pleural effusion": ("60046008", "SCT", "Pleural effusion"),
    "pneumonia": ("233604007", "SCT", "Pneumonia"),
    "pneumothorax": ("36118008", "SCT", "Pneumothorax"),
    "pulmonary edema": ("19242006", "SCT", "Pulmonary edema"),
    "tuberculosis": ("154283005", "SCT", "Pulmonary tuberculosis"),
    "viral": ("75570004", "SCT", "Viral pneumonia"),
    "viral pneumonia": ("75570004", "SCT", "Viral pneumonia"),
}
_ABSENT = ("272519000", "SCT", "Absent")
_PRESENT = ("52101004", "SCT", "Present")
_INDETERMINATE = ("82334004", "SCT", "Indeterminate")


@dataclass(frozen=True)
class Source:
    """What a result copies from its film. Holds a patient's name: never logged."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    texts: Mapping[str, str]  # of patient and study, by DICOM keyword; "" where missing or invalid
    pixels: str = ""  # SHA-256 of what the models see of it


@dataclass(frozen=True)
class Device:
    """The models that scored a film, as the device that observed it."""

    run_id: str  # of several runs, their ids joined by "+"
    version: str  # of xrai
    model_sha256: tuple[str, ...]  # of the model.pt of each run
    prior: str = ""  # the shares that its probabilities hold for, where a prior was asked for

    @cached_property
    def key(self) -> str:
        """A text that identifies these models."""
        return "+".join(self.model_sha256) or self.run_id

    @property
    def uid(self) -> str:
        """UID of the device."""
        return _uid("device", self.key)


@dataclass(frozen=True)
class Result:
    """An object for the archive."""

    sop_instance_uid: str
    data: bytes  # a DICOM file


def read_source(data: bytes) -> Source:
    """What results need from a film's header.

    Raises `ImageError` where one of its UIDs is missing or invalid, or the file is damaged.
    """
    texts = read_texts(data, [*_IDENTITY, *_COPIED])
    for name in _IDENTITY:
        if len(texts[name]) > 64 or not _UID.fullmatch(texts[name]):
            raise ImageError(f"is DICOM whose {name} is missing or damaged")
    kept = {}
    for name in _COPIED:
        kept[name] = texts[name] if _is_valid(name, texts[name]) else ""
    return Source(
        texts["SOPClassUID"],
        texts["SOPInstanceUID"],
        texts["SeriesInstanceUID"],
        texts["StudyInstanceUID"],
        kept,
    )


def _is_valid(name: str, text: str) -> bool:
    """Whether a text is a valid value of this attribute."""
    if not re.fullmatch(_FORMS[name], text, re.ASCII) or not text.isprintable():
        return False
    try:
        if name.endswith("Date"):
            datetime.strptime(text, "%Y%m%d")
        elif name.endswith("Time"):
            datetime.strptime(text.partition(".")[0].ljust(6, "0"), "%H%M%S")
    except ValueError:
        return False
    return True


def result_uid(kind: Kind, source: Source, device: Device) -> str:
    """The SOP Instance UID of the result of a film and these models, at their prior."""
    film = [source.sop_instance_uid, source.series_instance_uid, source.study_instance_uid]
    film += [source.pixels, *(source.texts[name] for name in sorted(source.texts))]
    return _uid(kind, *film, device.key, device.prior)


def write_report(source: Source, row: Prediction, device: Device) -> Result:
    """A Comprehensive SR of template TID 1500: each class or finding with its probability,
    threshold and call, and the decision, or why the film is for review, in words.
    """
    from highdicom import coding_schemes, sr
    from pydicom.sr.coding import Code

    with quiet():
        evidence = _reference(source)
        observer = sr.ObserverContext(
            observer_type=sr.CodedConcept("121007", "DCM", "Device"),
            observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                uid=device.uid,
                name=_MANUFACTURER,
                manufacturer_name=_MANUFACTURER,
                model_name=device.run_id,
                serial_number=device.key,
            ),
        )
        content = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=observer),
            procedure_reported=Code("399208008", "SCT", "Plain chest X-ray"),
            imaging_measurements=[_group(name, row, source, device) for name in row.probabilities],
        )
        content[0].ContentSequence.extend(
            sr.TextContentItem(
                name=sr.CodedConcept("121106", "DCM", "Comment"),
                value=text,
                relationship_type=sr.RelationshipTypeValues.CONTAINS,
            )
            for text in _sentences(row, device)
        )
        scheme = coding_schemes.CodingSchemeIdentificationItem(
            _SCHEME, name="Labels of xrai", responsible_organization=_MANUFACTURER
        )
        report = sr.ComprehensiveSR(
            evidence=[evidence],
            content=content,
            is_complete=True,
            is_final=False,
            is_verified=False,
            coding_schemes=[scheme],
            **_head("sr", source, device),
        )
    return Result(str(report.SOPInstanceUID), _to_bytes(report))


def write_capture(source: Source, png: bytes, device: Device) -> Result:
    """A Secondary Capture of a PNG, such as the film next to its heat maps."""
    from highdicom.sc import SCImage
    from pydicom import Dataset

    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB"))
    with quiet():
        texts = source.texts
        capture = SCImage(
            pixel_array=pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "F"),
            study_instance_uid=source.study_instance_uid,
            patient_id=texts["PatientID"],
            patient_name=texts["PatientName"],
            patient_birth_date=texts["PatientBirthDate"],
            patient_sex=texts["PatientSex"],
            accession_number=texts["AccessionNumber"],
            study_id=texts["StudyID"],
            study_date=texts["StudyDate"],
            study_time=texts["StudyTime"],
            referring_physician_name=texts["ReferringPhysicianName"],
            **_head("sc", source, device),
        )
        reference = Dataset()
        reference.ReferencedSOPClassUID = source.sop_class_uid
        reference.ReferencedSOPInstanceUID = source.sop_instance_uid
        capture.SourceImageSequence = [reference]
        capture.DerivationDescription = f"LayerCAM heat maps of {_MANUFACTURER}. {NOTE}"
        capture.Laterality = ""  # of the whole chest
        capture.BurnedInAnnotation = "NO"  # words, but none that identify a patient
    return Result(str(capture.SOPInstanceUID), _to_bytes(capture))


# ------------------------------------------------------------------------------------------- parts


def _head(kind: Kind, source: Source, device: Device) -> dict[str, Any]:
    """The arguments that highdicom's classes share: the place of the result in the study, and the
    models as the device that made it.
    """
    return {
        "sop_instance_uid": result_uid(kind, source, device),
        "instance_number": 1,
        "series_instance_uid": _uid(f"{kind} series", source.study_instance_uid, device.key),
        "series_number": _NUMBERS[kind],
        "series_description": f"xrai: {_DESCRIPTIONS[kind]}, no medical device",
        "manufacturer": _MANUFACTURER,
        "manufacturer_model_name": _cut(device.run_id),
        "device_serial_number": _cut(device.key),
        "software_versions": _cut(device.version),
        "specific_character_set": "ISO_IR 192",
    }


def code_of(name: str) -> tuple[str, str, str]:
    """Value, scheme and meaning of the code of a class or finding: a standard one where there is
    one, else one of the private scheme 99XRAI.
    """
    if found := _FINDINGS.get(folded(name)):
        return found
    value = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")
    if not value or len(value) > 16 or not name.isascii():
        value = hashlib.sha256(name.encode()).hexdigest()[:16].upper()  # a code has 16 characters
    return value, _SCHEME, _cut(name)


def _group(
    name: str, row: Prediction, source: Source, device: Device
) -> "MeasurementsAndQualitativeEvaluations":
    """TID 1501: the measurements of one class or finding."""
    from highdicom import sr
    from pydicom.sr.coding import Code

    no_units = Code("1", "UCUM", "no units")
    measured = [(("122157", "DCM", "Probability"), row.probabilities[name])]
    if name in row.thresholds:
        measured.append((("122411", "DCM", "Threshold Value"), row.thresholds[name]))
    call = _PRESENT if name in row.calls else _ABSENT
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=_uid("finding", source.sop_instance_uid, device.key, name), identifier=_cut(name)
        ),
        finding_type=_concept(code_of(name)),
        algorithm_id=sr.AlgorithmIdentification(
            name=_MANUFACTURER,
            version=device.version,
            parameters=[f"run {device.run_id}", *(f"sha256 {sha}" for sha in device.model_sha256)],
        ),
        finding_sites=[sr.FindingSite(Code("39607008", "SCT", "Lung"))],
        measurements=[
            sr.Measurement(name=_concept(code), value=round(value, 6), unit=no_units)
            for code, value in measured
        ],
        qualitative_evaluations=[
            sr.QualitativeEvaluation(
                name=_concept(("CALL", _SCHEME, "Call of the model")),
                value=_concept(_INDETERMINATE if row.decision == REVIEW else call),
            )
        ],
        source_images=[
            sr.SourceImageForMeasurementGroup(source.sop_class_uid, source.sop_instance_uid)
        ],
    )


def _sentences(row: Prediction, device: Device) -> list[str]:
    """What the report says in words."""
    names = [f"run {device.run_id}, xrai {device.version}"]
    names += [f"sha256 of model.pt {sha}" for sha in device.model_sha256]
    first = (
        f"For review, no call is made: this film {printable(row.reason)}."
        if row.decision == REVIEW
        else f"Decision of the model: {printable(row.decision)}."
    )
    shares = ", ".join(f"{printable(name)} {share:.3f}" for name, share in row.prior.items())
    prior = [f"Probabilities are for these shares of films: {shares}."] if shares else []
    return [first, *prior, f"Model: {', '.join(names)}.", NOTE]


def _reference(source: Source) -> "Dataset":
    """The film as highdicom takes a source: its identifying attributes, without pixels."""
    from pydicom import Dataset

    film = Dataset()
    film.SpecificCharacterSet = "ISO_IR 192"
    film.SOPClassUID, film.SOPInstanceUID = source.sop_class_uid, source.sop_instance_uid
    film.SeriesInstanceUID = source.series_instance_uid
    film.StudyInstanceUID = source.study_instance_uid
    for name, text in source.texts.items():
        setattr(film, name, text)
    return film


def _concept(code: tuple[str, str, str]) -> "CodedConcept":
    from highdicom.sr import CodedConcept

    return CodedConcept(*code)


def _uid(*parts: str) -> str:
    """A UID under the root 2.25 (PS3.5 B.2), derived from some texts."""
    return f"2.25.{uuid.uuid5(_NAMES_A_UID, chr(0).join(parts)).int}"


def _cut(text: str) -> str:
    """The text, cut to the 64 characters of VR LO."""
    return printable(text).replace("\\", "/")[:64].strip()


def _to_bytes(dataset: "Dataset") -> bytes:
    buffer = io.BytesIO()
    with quiet():
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
