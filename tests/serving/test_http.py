"""The HTTP interface: rows as predict gives them, limits, and who may ask."""

import asyncio
import io
import json
import logging
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

import xrai
from tests.dataset.pictures import dicom_file
from tests.models import phantoms, save_random_run, save_run
from tests.results.many import make_many
from tests.serving.conftest import LIMITS, add_summary, make_client, make_service
from xrai.ingest.images import decode_whole
from xrai.labels import LabelSpec, Task
from xrai.pipeline import Prediction
from xrai.results.summary import main_results
from xrai.serving import http
from xrai.serving.films import Film, FullError, Worklist
from xrai.serving.http import NOTE, Limits, card_json
from xrai.serving.models import OutputCard, _measured, load_models
from xrai.serving.service import Answers, Service

TOKEN = "0123456789abcdef"


def png(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def films() -> list[bytes]:
    """Phantoms as files, of several sizes."""
    return [png(film) for film in phantoms(6)[0]]


def post(client: TestClient, *files: tuple[str, bytes]) -> Any:
    answer = client.post("/v1/films", files=[("file", file) for file in files])
    assert answer.status_code == 201, answer.text
    return answer.json()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- rows


def test_a_film_is_answered_with_the_row_that_predict_gives(
    client: TestClient, films: list[bytes], run: Path, tmp_path: Path
) -> None:
    for number, data in enumerate(films):
        (tmp_path / f"{number}.png").write_bytes(data)
    expected = xrai.load(str(run)).predict(sorted(tmp_path.glob("*.png")))
    answer = post(client, *((f"{number}.png", data) for number, data in enumerate(films)))
    assert answer["note"] == NOTE and answer["refused"] == []
    assert len(answer["films"]) == len(expected) == 6
    for film, row in zip(answer["films"], expected, strict=True):
        assert film["probabilities"] == pytest.approx(dict(row.probabilities), abs=1e-6)
        assert (film["decision"], film["reason"]) == (row.decision, row.reason)
        assert (film["calls"], film["model"]) == (list(row.calls), row.model)
        assert film["thresholds"] == dict(row.thresholds)


def test_the_list_has_films_for_review_first_and_then_the_highest_score(
    client: TestClient, films: list[bytes]
) -> None:
    noise = png(np.random.default_rng(5).integers(0, 256, (90, 120), np.uint8))
    post(client, *((f"{number}.png", data) for number, data in enumerate(films)))
    post(client, ("noise.png", noise), ("notes.txt", b"no film"))
    listed = client.get("/v1/films").json()["films"]
    assert [film["name"] for film in listed[:2]] == ["notes.txt", "noise.png"]
    assert "is not a JPEG, PNG or DICOM file" in listed[0]["reason"]
    scores = [film["probabilities"]["pneumonia"] for film in listed if film["decision"] != "review"]
    assert len(scores) >= 4 and scores == sorted(scores, reverse=True)
    assert listed[-1]["is_positive"] is False and listed[2]["is_positive"] is True


def test_a_list_that_did_not_change_is_not_sent_again(
    client: TestClient, films: list[bytes]
) -> None:
    tag = client.get("/v1/films").headers["ETag"]
    assert client.get("/v1/films", headers={"If-None-Match": tag}).status_code == 304
    post(client, ("a.png", films[0]))
    again = client.get("/v1/films", headers={"If-None-Match": tag})
    assert again.status_code == 200 and again.headers["ETag"] != tag


@pytest.mark.parametrize("kind", ["image/png", "application/dicom", "application/zip"])
def test_one_film_may_be_the_body(client: TestClient, films: list[bytes], kind: str) -> None:
    bodies = {
        "image/png": films[0],
        "application/dicom": dicom_file(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80)),
        "application/zip": zipped({"more/a.png": films[0], ".hidden": b"", "__MACOSX/a": b""}),
    }
    answer = client.post("/v1/films", content=bodies[kind], headers={"Content-Type": kind})
    assert answer.status_code == 201
    (film,) = answer.json()["films"]
    assert film["probabilities"] and film["name"] in ("film", "more/a.png")


def test_films_of_a_zip_fail_each_by_itself(client: TestClient, films: list[bytes]) -> None:
    good, cut = films[0], films[1][:200]
    found = post(client, ("all.zip", zipped({"a.png": good, "b.png": cut, "c.txt": b"?"})))
    reasons = {film["name"]: film["reason"] for film in found["films"]}
    assert reasons["a.png"] == "" or "training images" in reasons["a.png"]
    assert "cut short or damaged" in reasons["b.png"] and "is not a JPEG" in reasons["c.txt"]


def test_an_archive_that_is_none_does_not_touch_the_films_beside_it(
    client: TestClient, films: list[bytes]
) -> None:
    unsafe = zipped({"../a.png": films[0]})
    found = post(client, ("a.png", films[0]), ("b.zip", b"PK\x03\x04 none"), ("c.zip", unsafe))
    reasons = [film["reason"] for film in found["films"]]
    assert "cannot be taken apart" not in reasons[0] and found["films"][0]["probabilities"]
    assert all("cannot be taken apart" in reason for reason in reasons[1:])
    assert "unsafe name" in reasons[2]
    nothing = zipped({".hidden": b"", "folder/": b""})
    found = post(client, ("a.png", films[0]), ("d.zip", nothing))
    assert found["films"][1]["name"] == "d.zip"
    assert found["films"][1]["reason"] == "is a zip archive without a file"


def test_the_table_has_a_row_a_film_and_no_formula(client: TestClient, films: list[bytes]) -> None:
    post(client, ("=cmd|' /C calc'!A0.png", films[0]), ("ü.png", films[1]))
    answer = client.get("/v1/films.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    header, *rows = answer.text.splitlines()
    assert "name,received,source,decision,reason,probability_pneumonia,model" in header
    assert len(rows) == 2 and not any(row.lstrip('"').startswith("=") for row in rows)


# ----------------------------------------------------------------------------------------- pictures


def test_pictures_of_a_film_have_its_own_shape(client: TestClient) -> None:
    pixels = np.asarray(Image.fromarray(phantoms(1)[0][0]).resize((300, 200)))
    (film,) = post(client, ("a.jpeg", png(pixels, "JPEG")))["films"]
    assert (film["width"], film["height"], film["window"]) == (300, 200, None)
    shapes = {}
    for name in ("image", "thumbnail.png", "heat.png?of=pneumonia"):
        answer = client.get(f"/v1/films/{film['id']}/{name}")
        assert answer.headers["content-type"] == "image/png", answer.text
        shapes[name] = np.asarray(Image.open(io.BytesIO(answer.content)))
    whole = decode_whole(png(pixels, "JPEG"), max_pixels=10**6)
    assert np.array_equal(shapes["image"], whole) and whole.shape == (200, 300)
    assert shapes["thumbnail.png"].shape == (160, 160)
    heat = shapes["heat.png?of=pneumonia"]
    assert heat.shape[2] == 4 and heat.shape[1] / heat.shape[0] == pytest.approx(1.5, abs=0.01)
    outside = (heat.shape[1] - heat.shape[0]) // 2 - 1  # what a crop cuts off has no evidence
    assert not heat[:, :outside, 3].any() and not heat[:, -outside:, 3].any()
    assert heat[..., 3].any()


def test_the_values_of_a_dicom_film_are_shown_by_its_own_window(client: TestClient) -> None:
    stored = np.random.default_rng(0).integers(100, 4000, (60, 80)).astype(np.uint16)
    data = dicom_file(stored, WindowCenter=2000, WindowWidth=3000, BitsStored=12)
    (film,) = post(client, ("a.dcm", data))["films"]
    answer = client.get(f"/v1/films/{film['id']}/image")
    values = np.asarray(Image.open(io.BytesIO(answer.content))).astype(np.float64)
    window = film["window"]
    assert values.max() > 255 and not window["is_inverse"]
    assert (window["centre"], window["width"]) == pytest.approx((2000, 3000), abs=1)
    value = window["slope"] * values + window["intercept"]
    shown = (value - (window["centre"] - 0.5)) / (window["width"] - 1) + 0.5
    expected = decode_whole(data, max_pixels=10**6)
    assert np.abs(shown.clip(0, 1) * 255 - expected).max() <= 1.5


def test_a_film_of_oblong_pixels_is_shown_and_explained_in_square_ones(client: TestClient) -> None:
    stored = np.random.default_rng(0).integers(0, 255, (60, 80)).astype(np.uint8)
    data = dicom_file(stored, PixelSpacing=[0.2, 0.1])  # each twice as high as wide
    (film,) = post(client, ("a.dcm", data))["films"]
    assert (film["width"], film["height"], film["window"]) == (80, 120, None)
    shapes = {
        name: Image.open(io.BytesIO(client.get(f"/v1/films/{film['id']}/{name}").content)).size
        for name in ("image", "heat.png")
    }
    assert shapes["image"] == (80, 120)
    assert shapes["heat.png"][1] / shapes["heat.png"][0] == pytest.approx(1.5, abs=0.01)


def test_what_has_no_picture_says_why(client: TestClient, films: list[bytes]) -> None:
    (film,) = post(client, ("a.txt", b"no film"))["films"]
    answer = client.get(f"/v1/films/{film['id']}/image")
    assert answer.status_code == 409 and "is not a JPEG" in answer.json()["detail"]
    (good,) = post(client, ("a.png", films[0]))["films"]
    answer = client.get(f"/v1/films/{good['id']}/heat.png?of=cough")
    assert answer.status_code == 404 and "of is one of pneumonia" in answer.json()["detail"]
    assert client.delete(f"/v1/films/{good['id']}").status_code == 204
    for method in (client.get, client.delete):
        assert method(f"/v1/films/{good['id']}").status_code == 404


# ------------------------------------------------------------------------------------------- limits


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(client: TestClient) -> None:
    large = b"x" * (LIMITS.max_body_bytes + 1)
    kind = {"Content-Type": "image/png"}
    stated = client.post("/v1/films", content=large, headers=kind)
    unstated = client.post("/v1/films", content=iter([large]), headers=kind)
    for answer in (stated, unstated):
        assert answer.status_code == 413 and "larger than 16 MiB" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"x", "text/plain", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=y", 400),
        (b"PK\x03\x04 no archive", "application/zip", 201),  # so is this
        (b"PK\x05\x06" + bytes(18), "application/zip", 201),  # a film that is none
    ],
)
def test_bodies_that_are_none_are_refused(
    client: TestClient, content: bytes, kind: str, status: int
) -> None:
    answer = client.post("/v1/films", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert client.get("/readyz").status_code == 200


def test_a_full_list_says_so_and_keeps_what_it_has(run: Path, films: list[bytes]) -> None:
    with make_client(make_service(run, max_films=2)) as client:
        found = post(client, *((f"{number}.png", data) for number, data in enumerate(films)))
        assert len(found["films"]) == 2 and len(found["refused"]) == 4
        assert "the list is full (2 films)" in found["refused"][0]["reason"]
        answer = client.post("/v1/films", files={"file": ("a.png", films[0])})
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "2"
        client.delete(f"/v1/films/{found['films'][0]['id']}")
        post(client, ("a.png", films[0]))


@contextmanager
def slowed(service: Service) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Films wait for the second event; the first one says that one does."""
    begun, release = threading.Event(), threading.Event()
    read = service.models.pipeline.read

    def slow(*arguments: object) -> object:
        begun.set()
        release.wait(20)
        return read(*arguments)  # type: ignore[arg-type]

    service.models.pipeline.read = slow  # type: ignore[method-assign,assignment]
    try:
        yield begun, release
    finally:
        release.set()


def test_one_client_and_all_together_have_limits(run: Path, films: list[bytes]) -> None:
    limits = Limits(1 << 24, 1 << 25, max_requests=2, max_requests_per_client=1)
    service = make_service(run)
    with slowed(service) as (begun, release), make_client(service, limits=limits) as client:
        first = threading.Thread(target=lambda: post(client, ("a.png", films[0])))
        first.start()
        assert begun.wait(20)
        answer = client.post("/v1/films", files={"file": ("b.png", films[1])})
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "2"
        assert client.get("/v1/films").status_code == 200  # the page goes on
        release.set()
        first.join()
        post(client, ("b.png", films[1]))


def test_the_list_says_how_many_films_wait(
    service: Service, films: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrai.serving.http._AT_ONCE", 1)  # others wait for it
    with slowed(service) as (begun, release), make_client(service) as client:
        idle = client.get("/v1/films")
        assert idle.json()["num_waiting"] == 0
        three = [(f"{number}.png", films[number]) for number in range(3)]
        first = threading.Thread(target=lambda: post(client, *three))
        first.start()
        assert begun.wait(20)
        busy = client.get("/v1/films", headers={"If-None-Match": idle.headers["ETag"]})
        assert busy.status_code == 200 and busy.json()["num_waiting"] == 3
        release.set()
        first.join()
        assert client.get("/v1/films").json()["num_waiting"] == 0


@pytest.mark.parametrize(
    ("lifetime_s", "words"), [(18, "18 s"), (90, "90 s"), (1800, "30 min"), (43200, "12 h")]
)
def test_a_full_list_says_when_films_leave_it(lifetime_s: float, words: str) -> None:
    worklist = Worklist(max_films=1, max_bytes=1, lifetime_s=lifetime_s)
    with worklist.reserve(1), pytest.raises(FullError, match=f"leave it {words} after"):
        worklist.reserve(1).__enter__()


def test_films_are_ranked_and_written_once_however_often_the_list_is_asked_for(
    run: Path, films: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_client(make_service(run)) as client:
        for number, data in enumerate(films[:3]):
            post(client, (f"{number}.png", data))
        first = client.get("/v1/films")
        with monkeypatch.context() as patched:
            work = mock.Mock()
            patched.setattr(Prediction, "highest", work)
            patched.setattr(http, "film_json", work)
            assert client.get("/v1/films").content == first.content
            assert not work.called
        for film in first.json()["films"]:
            said = client.get(f"/v1/films/{film['id']}").json()
            assert {name: said[name] for name in film} == film
            assert client.delete(f"/v1/films/{film['id']}").status_code == 204
        assert client.get("/v1/films").json()["films"] == []


def test_the_list_is_ranked_while_others_may_change_it(
    run: Path, films: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, is_locked = make_service(run), list[bool]()

    def urgency(film: Film) -> object:
        is_locked.append(service.worklist._lock.locked())
        return film.received

    with make_client(service) as client:
        post(client, ("a.png", films[0]))
        post(client, ("b.png", films[1]))
        monkeypatch.setattr(Film, "urgency", property(urgency))
        assert len(service.worklist.films()) == 2
    assert is_locked == [False, False]


def test_films_leave_memory_after_their_time(run: Path, films: list[bytes]) -> None:
    service = make_service(run, lifetime_s=60)
    now = [1.0e9]
    service.worklist._now = lambda: now[0]
    with make_client(service) as client:
        (film,) = post(client, ("a.png", films[0]))["films"]
        now[0] += 59
        assert client.get(f"/v1/films/{film['id']}").status_code == 200
        assert service.worklist.num_bytes == len(films[0])
        (other,) = post(client, ("b.png", films[1]))["films"]
        assert service.worklist.num_bytes == len(films[0]) + len(films[1])
        assert client.delete(f"/v1/films/{other['id']}").status_code == 204
        assert service.worklist.num_bytes == len(films[0])
        assert client.get("/v1/films").json()["films"] == [film]
        now[0] += 2
        assert client.get(f"/v1/films/{film['id']}").status_code == 404
        assert service.worklist.num_bytes == 0 and client.get("/v1/films").json()["films"] == []


# ----------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ({"Cookie": "xrai_session=wrong"}, 401),
        ({"Authorization": "Bearer \u00fc".encode("latin-1").decode("latin-1")}, 401),
    ],
)
def test_a_token_opens_the_server(run: Path, headers: dict[str, str], status: int) -> None:
    with make_client(make_service(run), token=TOKEN) as client:
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        assert client.get("/v1/films", headers=encoded).status_code == status
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert client.get("/metrics", headers=encoded).status_code == status


def test_a_browser_logs_in_once(run: Path) -> None:
    with make_client(make_service(run), token=TOKEN) as client:
        wrong = client.post("/login", data={"token": "wrong"}, follow_redirects=False)
        assert wrong.headers["location"] == "/login?wrong" and not wrong.cookies
        right = client.post("/login", data={"token": TOKEN}, follow_redirects=False)
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        assert client.get("/v1/films").status_code == 200
        client.post("/logout", follow_redirects=False)
        assert client.get("/v1/films").status_code == 401


def test_a_form_that_does_not_come_is_not_waited_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrai.serving.http._FORM_S", 0.1)
    monkeypatch.setattr("xrai.serving.uploads._DISCARD_S", 0.1)

    async def form(scope: Any, receive: Any, send: Any) -> None:
        async def silence() -> Any:
            await asyncio.sleep(30)

        await client.app(scope, silence, send)

    with make_client(make_service(run), token=TOKEN) as client:
        slow = TestClient(form, base_url="http://127.0.0.1")
        for path in ("/login", "/v1/reload"):
            answer = slow.post(
                path, data={"token": "x"}, headers={"Authorization": f"Bearer {TOKEN}"}
            )
            assert answer.status_code == 408 and "too slowly" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1"}, 201),
        ({"Origin": "http://other.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Host": "rebound.example"}, 421),
        ({"Host": "localhost:8077"}, 201),
        ({"Host": "["}, 421),
        ({"Host": "evil@localhost"}, 421),
        ({"Host": "evil:x@localhost:8077"}, 421),
        ({"Host": "localhost/evil"}, 421),
        ({"Host": "[::1%25evil]"}, 421),
        ({"Host": "LocalHost"}, 201),
        ({"Host": "[::1]:8077"}, 201),
    ],
)
def test_pages_of_other_sites_cannot_send_films(
    client: TestClient, films: list[bytes], headers: dict[str, str], status: int
) -> None:
    answer = client.post("/v1/films", files={"file": ("a.png", films[0])}, headers=headers)
    assert answer.status_code == status
    assert len(client.get("/v1/films").json()["films"]) == (status == 201)


def test_every_answer_keeps_browsers_to_the_server(client: TestClient) -> None:
    for path in ("/v1/films", "/nothing", "/v1/model"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


# ------------------------------------------------------------------------------------------- models


def test_another_run_is_taken_without_a_restart(
    tmp_path: Path, films: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    first = save_run(tmp_path, run_id="first", num_steps=5)
    save_run(tmp_path, run_id="second", num_steps=6)
    with make_client(make_service(first)) as client:
        (old,) = post(client, ("a.png", films[0]))["films"]
        answer = client.post("/v1/reload", json={"runs": ["second"]})
        assert answer.status_code == 200 and answer.json()["run"] == "second"
        (new,) = post(client, ("a.png", films[0]))["films"]
        assert (old["model"], new["model"]) == ("first", "second")
        assert client.get(f"/v1/films/{old['id']}/heat.png").status_code == 200
        for wrong, status in (
            ({"runs": ["third"]}, 409),
            ({"runs": ["../first"]}, 409),
            ({"runs": ["\0"]}, 409),
            ({"runs": 3}, 400),
            ([], 400),
        ):
            answer = client.post("/v1/reload", json=wrong)
            assert answer.status_code == status and str(tmp_path) not in answer.text
        (tmp_path / "second" / "model.pt").write_bytes(b"cut")
        answer = client.post("/v1/reload")
        assert answer.status_code == 409 and str(tmp_path) not in answer.text
        assert answer.json()["detail"].startswith("second cannot be loaded")
        assert str(tmp_path) in caplog.text  # whoever runs the server is told more
        assert client.get("/v1/model").json()["run"] == "second"
        post(client, ("a.png", films[0]))


def test_a_film_that_breaks_its_batch_does_not_touch_the_others(
    service: Service, films: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = service.models.pipeline
    classify = pipeline.classify_read

    def fails(batch: list[object], *rest: object) -> object:
        if any(read.path == "bad.png" for read in batch):  # type: ignore[attr-defined]
            raise RuntimeError("out of luck")
        return classify(batch, *rest)  # type: ignore[arg-type]

    pipeline.classify_read = fails  # type: ignore[method-assign,assignment]
    with make_client(service) as client:
        files = [("file", (name, films[0])) for name in ("a.png", "bad.png", "c.png")]
        answer = client.post("/v1/films", files=files).json()
        assert [film["name"] for film in answer["films"]] == ["a.png", "c.png"]
        assert [each["name"] for each in answer["refused"]] == ["bad.png"]
        assert "bad.png" not in caplog.text and "out of luck" not in caplog.text
        assert "RuntimeError in test_http.py" in caplog.text


@pytest.mark.parametrize(
    ("labels", "negative"),
    [
        (LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL")), "NORMAL"),
        (LabelSpec("multilabel", ("Healthy", "Mass", "Nodule")), "Healthy"),
        (LabelSpec("binary", ("ill", "healthy")), ""),  # healthy is what is looked for
    ],
)
def test_a_film_is_listed_by_its_most_probable_disease(
    tmp_path: Path, films: list[bytes], labels: LabelSpec, negative: str
) -> None:
    with make_client(make_service(save_random_run(tmp_path, labels))) as client:
        post(client, *((f"{number}.png", data) for number, data in enumerate(films)))
        post(client, ("none.txt", b"?"))
        unreadable, *listed = client.get("/v1/films").json()["films"]
    assert (unreadable["score"], unreadable["score_of"]) == (None, None)
    for film in listed:
        found = {k: p for k, p in film["probabilities"].items() if k != negative}
        assert found[film["score_of"]] == film["score"] == max(found.values())
    ranks = [(film["decision"] != "review", -film["score"]) for film in listed]
    assert ranks == sorted(ranks) and len(ranks) == 6


@pytest.mark.parametrize(("task", "num"), [("multilabel", 2), ("multiclass", 3)])
def test_a_prevalence_is_that_of_the_images_whose_label_is_known(task: Task, num: int) -> None:
    scores, results = make_many(task, num)
    main, output = main_results(results), results.outputs[0].output
    labels = scores.labels[:, 0]
    share = np.mean(labels[labels != -1])
    assert (labels == -1).any() == (task == "multilabel")
    assert _measured(output, main, 0).prevalence == pytest.approx(share)
    outputs = tuple(replace(each, num_negative=None) for each in main.outputs)
    earlier = _measured(output, replace(main, outputs=outputs), 0).prevalence
    assert earlier is None if task == "multilabel" else earlier == pytest.approx(share)


def test_the_card_of_a_run_has_the_figures_of_its_summary(tmp_path: Path) -> None:
    bare = save_run(tmp_path)
    without = load_models([str(bare)]).card()
    assert without.outputs == (OutputCard("pneumonia", 0.5),) and without.split is None
    summary = add_summary(bare)
    card = load_models([str(bare)]).card()
    (output,) = card.outputs
    assert (card.run, card.task, card.size, card.split) == ("tiny", "binary", (64,), "test")
    assert (output.sensitivity, output.auroc) == (summary["sensitivity"], summary["auroc"])
    counts = summary["counts"]
    num_positive = counts["tp"] + counts["fn"]
    assert output.prevalence == pytest.approx(num_positive / summary["num_images"])
    assert [*output.intervals["sensitivity"]] == summary["intervals"]["sensitivity"]
    assert card_json(card)["outputs"] == [asdict(output)]
    assert output.prior is None
    (moved,) = load_models([str(bare)], prior=0.05).card().outputs
    assert (moved.prior, moved.prevalence) == (0.05, output.prevalence)
    both = load_models([str(bare), str(save_run(tmp_path, run_id="other"))]).card()
    assert both.run == "tiny+other" and both.outputs[0].auroc is None


def test_a_part_that_ended_makes_the_server_unready(service: Service) -> None:
    runs = [True]
    service.parts["outbox_up"] = lambda: runs[0]
    with make_client(service) as client:
        assert client.get("/readyz").json()["outbox_up"] is True
        runs[0] = False
        answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "broken")
    assert answer.json()["outbox_up"] is False


# ------------------------------------------------------------------------------------------ privacy


def test_no_name_of_a_film_is_logged_or_counted(
    client: TestClient, films: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    post(client, ("Doe^Jane.png", films[0]), ("Doe^John.dcm", b"cut"))
    metrics = client.get("/metrics").text
    assert 'xrai_films_total{outcome="unreadable",source="upload"} 1.0' in metrics
    assert "Doe" not in metrics and "Doe" not in caplog.text


def test_hostile_names_are_kept_as_text(client: TestClient, films: list[bytes]) -> None:
    name = "../../etc/<img src=x onerror=alert(1)>\x1b[31m\u202e" + "a" * 400 + ".png"
    (film,) = post(client, (name, films[0]))["films"]
    assert len(film["name"]) <= 200 and "\x1b" not in film["name"]
    assert json.loads(client.get("/v1/films").text)["films"][0]["name"] == film["name"]


@pytest.mark.parametrize(
    "path", ["/v1/films", "/v1/model", "/openapi.json", "/v1/films.csv", "/metrics"]
)
def test_everything_that_is_listed_answers(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200
    assert path in client.get("/openapi.json").json()["paths"] or path == "/openapi.json"


def test_an_event_loop_is_woken_once_for_films_that_are_scored_together() -> None:
    async def answer() -> tuple[int, list[object]]:
        loop = asyncio.get_running_loop()
        answers, films = Answers(), [Future[Any]() for _ in range(5)]
        waiting = [asyncio.create_task(answers.get(film)) for film in films]
        await asyncio.sleep(0)
        wake = loop.call_soon_threadsafe
        with mock.patch.object(loop, "call_soon_threadsafe", wraps=wake) as woken:
            scorer = threading.Thread(target=finish, args=(films,))
            scorer.start()
            scorer.join()
            return woken.call_count, await asyncio.gather(*waiting)

    def finish(films: "list[Future[Any]]") -> None:
        for film in films[1:]:
            film.set_result("film")
        films[0].set_exception(FullError("full"))

    num_wakes, found = asyncio.run(answer())
    assert num_wakes == 1
    assert isinstance(found[0], FullError) and found[1:] == ["film"] * 4
