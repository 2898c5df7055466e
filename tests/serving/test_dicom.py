"""Films by C-STORE through a whole server: scored, listed, and answered to an archive."""

import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from tests.serving.conftest import make_client, make_service
from tests.serving.dicoms import Archive, changed, film, phantoms, read, send
from tests.serving.test_dicom_result import said
from tests.serving.test_outbox import wait_until_empty
from xrai import serve
from xrai.command import parse
from xrai.errors import ConfigError, InUseError, UserError
from xrai.serving.dicom import DicomSide, read_options
from xrai.serving.dicom_flags import DICOM_FLAGS
from xrai.serving.outbox import Outbox
from xrai.serving.service import Service

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def flags(**given: Any) -> dict[str, Any]:
    """The flags of the DICOM side, most of them as they are without a word."""
    return parse("serve", [], description="", flags=DICOM_FLAGS).flags | given


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def dicom_side(service: Service, *, port: int = 0, **given: Any) -> Iterator[tuple[DicomSide, int]]:
    """The DICOM side of a server on a port, 0: any free one."""
    port = port or free_port()
    options = read_options(flags(dicom_port=port, **given))
    assert options is not None
    side = DicomSide(options, service)
    side.start()
    try:
        yield side, port
    finally:
        service.close()


def test_a_server_whose_results_nobody_sends_is_not_ready(service: Service, tmp_path: Path) -> None:
    given = {"pacs": "127.0.0.1:1:ARCHIVE", "outbox": str(tmp_path / "outbox")}
    options = read_options(flags(dicom_port=free_port(), **given))
    assert options is not None
    side = DicomSide(options, service)
    assert not service.parts["outbox_up"]()
    assert "xrai_outbox_up 0.0" in service.metrics.text().decode()
    side.start()
    try:
        assert service.parts["outbox_up"]()
        assert "xrai_outbox_up 1.0" in service.metrics.text().decode()
    finally:
        service.close()
    assert not service.parts["outbox_up"]()


def test_a_film_is_scored_listed_and_answered_to_the_archive(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = phantoms(2)
    with Archive().running() as archive, caplog.at_level(logging.DEBUG):
        pacs = f"127.0.0.1:{archive.port}:ARCHIVE"
        with dicom_side(service, pacs=pacs, outbox=str(tmp_path / "outbox"), result="both") as (
            side,
            port,
        ):
            assert send(port, first) == (0, "")
            assert send(port, second) == (0, "")
            assert send(port, second) == (0, "")  # a sender that did not hear the answer
            assert side._outbox is not None
            wait_until_empty(side._outbox)
            text = service.metrics.text().decode()
    films = service.worklist.films()
    assert [film.source for film in films] == ["DICOM", "DICOM"]
    assert len(archive.stored) == 4
    by_uid = {listed.name: listed for listed in films}
    for result in archive.stored:
        assert result.PatientName == "Zebra^Quagga"
        assert result.StudyInstanceUID in {read(data).StudyInstanceUID for data in (first, second)}
        if result.Modality == "SR":
            uid = (
                result.CurrentRequestedProcedureEvidenceSequence[0]
                .ReferencedSeriesSequence[0]
                .ReferencedSOPSequence[0]
                .ReferencedSOPInstanceUID
            )
            measured = str(by_uid[uid].row.probability)[:6]
            assert measured in str(result)
        else:
            assert result.Rows > 500 and result.SamplesPerPixel == 3
            assert result.pixel_array.std() > 10
    for line in (
        'xrai_dicom_objects_total{outcome="scored"} 3.0',
        "xrai_outbox_sent_total 4.0",
        "xrai_outbox_pending 0.0",
        'xrai_films_total{outcome="scored",source="DICOM"}',
    ):
        assert line in text
    assert "Zebra" not in caplog.text


def test_the_report_names_the_model_by_the_hash_of_its_file(
    service: Service, run: Path, tmp_path: Path
) -> None:
    from xrai.results.summary import stated_hash
    from xrai.store import open_store

    with dicom_side(service, pacs="127.0.0.1:1:ARCHIVE", outbox=str(tmp_path / "outbox")) as (
        _,
        port,
    ):
        assert send(port, phantoms(1)[0])[0] == 0
    outbox = Outbox(tmp_path / "outbox")
    (path,) = outbox.pending()
    outbox.close()
    parameters = said(path.read_bytes(), "Algorithm Parameters")
    assert f"run {service.models.pipeline.run_id}" in parameters
    stated = stated_hash(open_store(str(run)), "model.pt")
    assert stated is None or f"sha256 {stated}" in parameters


def test_a_film_that_was_changed_under_its_uid_has_a_result_of_its_own(
    service: Service, tmp_path: Path
) -> None:
    first, other = phantoms(2)
    pixels = changed(first, Rows=read(other).Rows, Columns=read(other).Columns)
    pixels = changed(pixels, PixelData=read(other).PixelData)
    sent = [first, pixels, changed(first, PatientID="Z2"), changed(first, InstitutionName="Ward")]
    with dicom_side(service, pacs="127.0.0.1:1:ARCHIVE", outbox=str(tmp_path / "outbox")) as (
        _,
        port,
    ):
        for data in [*sent, *sent]:
            assert send(port, data)[0] == 0
    outbox = Outbox(tmp_path / "outbox")
    results = [read(path) for path in outbox.pending()]
    outbox.close()
    # nothing that a result says depends on the institution
    assert len(results) == len({result.SOPInstanceUID for result in results}) == 3
    assert sorted(result.PatientID for result in results) == ["Z1", "Z1", "Z2"]


def test_what_is_still_being_sent_keeps_the_outbox_locked(service: Service, tmp_path: Path) -> None:
    options = read_options(
        flags(dicom_port=free_port(), pacs="127.0.0.1:1:B", outbox=str(tmp_path / "outbox"))
    )
    assert options is not None
    side = DicomSide(options, service)
    assert side._delivery is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side._delivery, "stop", lambda: False)
        side.stop()
    with pytest.raises(InUseError):
        Outbox(tmp_path / "outbox")
    side.stop()
    Outbox(tmp_path / "outbox").close()


def test_what_cannot_be_scored_is_answered_and_not_listed(service: Service) -> None:
    data = phantoms(1)[0]
    with dicom_side(service) as (_, port):
        status, comment = send(port, changed(data, PixelData=b"\0\1"))
        assert (status, bool(comment)) == (0xC000, True)
        assert send(port, film(BodyPartExamined="HAND"))[0] == 0xB006
    assert service.worklist.films() == []


def test_a_film_of_another_part_is_refused_by_the_node_and_scored_where_a_person_chose_it(
    service: Service, tmp_path: Path
) -> None:
    data = changed(phantoms(1)[0], BodyPartExamined="HAND")
    (tmp_path / "film.dcm").write_bytes(data)
    (expected,) = service.models.pipeline.predict(tmp_path / "film.dcm")
    with make_client(service) as client, dicom_side(service) as (_, port):
        assert send(port, data)[0] == 0xB006
        headers = {"Content-Type": "application/dicom"}
        (row,) = client.post("/v1/films", content=data, headers=headers).json()["films"]
    assert row["decision"] == expected.decision
    assert row["probabilities"] == pytest.approx(dict(expected.probabilities), abs=1e-5)


def test_a_repeated_film_is_found_without_ranking_the_list(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(run)
    (film,) = phantoms(1)
    monkeypatch.setattr(service.worklist, "films", mock.Mock(side_effect=AssertionError))
    with dicom_side(service) as (_, port):
        assert [send(port, film)[0] for _ in range(2)] == [0, 0]
    assert len(service.worklist) == 1


def test_a_full_list_asks_the_sender_to_try_again(run: Path) -> None:
    service = make_service(run, max_films=1)
    first, second = phantoms(2)
    with dicom_side(service) as (_, port):
        assert send(port, first)[0] == 0
        assert send(port, second)[0] == 0xA700
        service.worklist.remove(service.worklist.films()[0].id)
        assert send(port, second)[0] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pacs": "a:1:B"}, "--dicom_port"),
        ({"dicom_port": 4242, "pacs": "a:1:B"}, "--outbox"),
        ({"dicom_port": 4242, "outbox": "out"}, "--pacs"),
        ({"dicom_port": 70000}, "70000"),
        ({"dicom_port": 4242, "dicom_host": "0.0.0.0"}, "--dicom_allow"),
        ({"dicom_port": 4242, "dicom_cert": "c.pem"}, "--dicom_key"),
        ({"dicom_port": 4242, "dicom_aet": "A" * 17}, "--dicom_aet"),
        ({"dicom_port": 4242, "dicom_max_mib": 0}, "--dicom_max_mib"),
        ({"dicom_port": 4242, "result": "pdf"}, "sr, sc, both"),
        ({"dicom_port": 4242, "pacs": "a:1:B", "outbox": "o", "pacs_ca": "no.pem"}, r"no\.pem"),
    ],
)
def test_options_that_do_not_fit_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(flags(**given))


def test_the_compose_file_adds_a_node_to_the_service(repository: Path) -> None:
    given = {"XRAI_DICOM_ALLOW": "CR1,DX2", "XRAI_PACS": "pacs.example.org:104:ARCHIVE"}

    def service(name: str) -> dict[str, Any]:
        """As Compose reads it: `${NAME:-default}`, and `${NAME:?why}` of what must be given."""
        text = (repository / name).read_text()
        filled = re.sub(
            r"\$\{(\w+):([-?])([^}]*)\}",
            lambda found: given[found[1]] if found[2] == "?" else found[3],
            text,
        )
        loaded: dict[str, Any] = yaml.safe_load(filled)["services"]["serve"]
        return loaded

    own, added = service("compose.yaml"), service("docker/compose.dicom.yaml")
    word, *arguments = own["command"]
    assert added["command"][: len(own["command"])] == own["command"]
    word, *arguments = added["command"]
    options = read_options(parse(word, arguments, description="", flags=serve.FLAGS).flags)
    assert options is not None and options.pacs is not None and options.outbox is not None
    assert options.node.callers == {"CR1", "DX2"}
    assert options.pacs.name == given["XRAI_PACS"]
    (port,), (volume,) = added["ports"], added["volumes"]
    assert port == f"127.0.0.1:11112:{options.node.port}"
    docker = (repository / "docker" / "Dockerfile").read_text()
    working_directory = Path(re.findall(r"^WORKDIR (\S+)", docker, re.M)[-1])
    assert Path(volume.partition(":")[2]) in (working_directory / options.outbox).parents


def test_without_a_port_there_is_no_node() -> None:
    assert read_options(flags()) is None


def test_an_outbox_that_cannot_be_written_is_one_line(service: Service, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = read_options(
        flags(dicom_port=4242, pacs="127.0.0.1:1:B", outbox=str(tmp_path / "file" / "outbox"))
    )
    assert options is not None
    with pytest.raises(UserError, match="--outbox"):
        DicomSide(options, service)
    service.close()
