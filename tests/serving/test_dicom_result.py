"""Results as DICOM objects: what they say, and that they are always the same objects."""

import io
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset

from tests.serving.dicoms import DEVICE, PATIENT, ROW, changed, film, read
from xrai.errors import ImageError
from xrai.labels import REVIEW
from xrai.serving.dicom_result import (
    _FINDINGS,
    NOTE,
    code_of,
    read_source,
    write_capture,
    write_report,
)

REVIEWED = replace(
    ROW,
    decision=REVIEW,
    reason="does not look like the training images: atypicality 1.40, above the limit of 1",
    calls=(),
)


def panel() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def items(dataset: Dataset) -> Iterator[Dataset]:
    """All content items of a report."""
    for item in dataset.get("ContentSequence", []):
        yield item
        yield from items(item)


def said(report: bytes, meaning: str) -> list[Any]:
    """What the items of a name hold."""
    found: list[Any] = []
    for item in items(read(report)):
        if item.get("ConceptNameCodeSequence", [Dataset()])[0].get("CodeMeaning") != meaning:
            continue
        if item.ValueType == "NUM":
            found.append(float(item.MeasuredValueSequence[0].NumericValue))
        elif item.ValueType == "CODE":
            code = item.ConceptCodeSequence[0]
            found.append((code.CodeValue, code.CodingSchemeDesignator))
        else:
            found.append(item.get("TextValue") or item.get("UID"))
    return found


def test_a_report_belongs_to_the_study_of_its_film() -> None:
    data = film()
    report, own = read(write_report(read_source(data), ROW, DEVICE).data), read(data)
    for name in ("StudyInstanceUID", "PatientName", "PatientID", "PatientSex", "AccessionNumber"):
        assert getattr(report, name) == getattr(own, name)
    assert report.SeriesInstanceUID != own.SeriesInstanceUID
    assert report.Modality == "SR"
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (referred,) = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert referred.ReferencedSOPInstanceUID == own.SOPInstanceUID
    assert (report.CompletionFlag, report.VerificationFlag) == ("COMPLETE", "UNVERIFIED")


def test_a_report_states_probability_threshold_call_and_model() -> None:
    report = write_report(read_source(film()), ROW, DEVICE).data
    assert said(report, "Finding") == [("233604007", "SCT")]
    assert said(report, "Probability") == [0.83]
    assert said(report, "Threshold Value") == [0.5]
    assert said(report, "Call of the model") == [("52101004", "SCT")]
    assert said(report, "Device Observer Model Name") == [DEVICE.run_id]
    assert said(report, "Device Observer UID") == [DEVICE.uid]
    assert f"sha256 {DEVICE.model_sha256[0]}" in said(report, "Algorithm Parameters")
    comments = said(report, "Comment")
    assert NOTE in comments
    assert any("Decision of the model: PNEUMONIA" in comment for comment in comments)


def test_a_film_for_review_has_its_reason_and_no_call() -> None:
    report = write_report(read_source(film()), REVIEWED, DEVICE).data
    assert said(report, "Call of the model") == [("82334004", "SCT")]
    assert any("atypicality 1.40" in comment for comment in said(report, "Comment"))


def test_findings_without_a_standard_code_get_a_private_one() -> None:
    names = {"Effusion": 0.9, "Fibrosis of everything": 0.1, "Überblähung": 0.2}
    row = replace(ROW, probabilities=names, thresholds={}, calls=("Effusion",), decision="Effusion")
    report = write_report(read_source(film()), row, DEVICE).data
    found = said(report, "Finding")
    assert found[0] == ("60046008", "SCT")
    assert [scheme for _, scheme in found[1:]] == ["99XRAI", "99XRAI"]
    assert len(set(found)) == 3 and all(len(value) <= 16 for value, _ in found)
    assert said(report, "Probability") == [0.9, 0.1, 0.2]
    (scheme,) = read(report).CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99XRAI"
    assert code_of("RARE_THING") == ("RARE_THING", "99XRAI", "RARE_THING")


def test_codes_that_pydicom_knows_have_its_meaning() -> None:
    from pydicom.sr._concepts_dict import concepts

    table: dict[str, dict[str, dict[str, tuple[str, object]]]] = concepts  # type: ignore[assignment]
    known = {
        (scheme, value): meaning.lower()
        for scheme in ("SCT", "DCM")
        for values in table[scheme].values()
        for value, (meaning, _) in values.items()
    }
    checked = 0
    for value, scheme, meaning in _FINDINGS.values():
        if (scheme, value) in known:
            assert known[scheme, value].startswith(meaning.lower())
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("kind", ["sr", "sc"])
def test_the_same_film_and_models_make_the_same_object_and_others_another(kind: str) -> None:
    def uid_of(data: bytes, device: Any = DEVICE, *, pixels: str = "") -> str:
        source = replace(read_source(data), pixels=pixels)
        if kind == "sr":
            return write_report(source, ROW, device).sop_instance_uid
        return write_capture(source, panel(), device).sop_instance_uid

    first = uid_of(film("a"))
    assert first == uid_of(film("a", BitsStored=13))
    assert first.startswith("2.25.") and len(first) <= 64
    others = {
        uid_of(film("b")),
        uid_of(film("a"), replace(DEVICE, model_sha256=("cd" * 32,))),
        uid_of(film("a"), replace(DEVICE, prior="pneumonia=0.9")),
        uid_of(changed(film("a"), PatientID="Z-4712")),
        uid_of(changed(film("a"), StudyInstanceUID="1.2.3")),
        uid_of(film("a"), pixels="ab"),
    }
    assert len(others - {first}) == 6


def test_a_capture_holds_the_image_and_names_its_source() -> None:
    data, png = film(), panel()
    capture = read(write_capture(read_source(data), png, DEVICE).data)
    with Image.open(io.BytesIO(png)) as image:
        np.testing.assert_array_equal(capture.pixel_array, np.asarray(image))
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == read(data).SOPInstanceUID
    assert capture.StudyInstanceUID == read(data).StudyInstanceUID
    assert capture.PatientName == PATIENT
    assert NOTE in capture.DerivationDescription
    assert capture.DerivationDescription.startswith("LayerCAM heat maps of")
    assert "no medical device" in capture.SeriesDescription


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ({"PatientName": "M\u00fcller^J\u00f6rg"}, {"PatientName": "M\u00fcller^J\u00f6rg"}),
        ({"PatientSex": "unknown"}, {"PatientSex": ""}),
        ({"PatientBirthDate": "2020.02.29"}, {"PatientBirthDate": ""}),
        ({"PatientBirthDate": "00000000"}, {"PatientBirthDate": ""}),
        ({"StudyDate": "20261399"}, {"StudyDate": ""}),
        ({"StudyTime": "250000"}, {"StudyTime": ""}),
        ({"StudyTime": "10:11"}, {"StudyTime": ""}),
        ({"PatientID": "x" * 80}, {"PatientID": ""}),
        ({"PatientName": "x" * 65}, {"PatientName": ""}),
        ({"PatientName": "^".join("abcdef")}, {"PatientName": ""}),
        ({"PatientName": "=".join("abcd")}, {"PatientName": ""}),
        ({"PatientName": "x" * 64 + "=y^z"}, {"PatientName": "x" * 64 + "=y^z"}),
        ({"PatientName": None, "StudyDate": None}, {"PatientName": "", "StudyDate": ""}),
    ],
)
def test_invalid_values_of_the_film_are_left_out(
    tags: dict[str, Any], kept: dict[str, str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = changed(film(), **tags)
    source = read_source(data)
    report = read(write_report(source, ROW, DEVICE).data)
    for name, value in kept.items():
        assert getattr(report, name) in (value, None)
        assert source.texts[name] == value


def test_a_film_without_its_uids_has_no_results() -> None:
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        with pytest.raises(ImageError, match=name):
            read_source(changed(film(), **{name: None}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad = changed(film(), StudyInstanceUID="1.2.x")
    with pytest.raises(ImageError, match="StudyInstanceUID"):
        read_source(bad)


def test_writing_results_leaves_the_filters_of_warnings_alone() -> None:
    source = read_source(film())  # which adds our filter
    before = list(warnings.filters)
    write_report(source, ROW, DEVICE)
    assert list(warnings.filters) == before
