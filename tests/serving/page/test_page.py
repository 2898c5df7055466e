"""The page as a person uses it, in a real Chromium, with the server and a tiny model behind it."""

import base64
import functools
import io
import json
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Dialog, FilePayload, Page, Route, expect

from tests.dataset.pictures import dicom_file
from tests.models import phantoms, save_random_run, save_run
from tests.serving.conftest import add_summary, make_service
from tests.serving.page.conftest import Film, Ward, like, serve
from xrai.labels import LabelSpec, Task
from xrai.serving.films import Worklist
from xrai.serving.models import load_models
from xrai.serving.service import Service

pytestmark = pytest.mark.browser

DROP = """async (files) => {
  const transfer = new DataTransfer();
  for (const [name, text] of files) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name));
  }
  for (const kind of ["dragover", "drop"]) {
    const event = new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
  }
}"""
DROP_OF_A_FOLDER = """() => {
  const file = (name, read) => ({ isFile: true, name, file: read });
  DataTransferItem.prototype.webkitGetAsEntry = function () {
    const given = this.getAsFile();
    let rest = [
      file(".DS_Store", (done) => done(new File(["?"], ".DS_Store"))),
      file("locked.png", (_, fail) => fail(new DOMException("no", "NotReadableError"))),
      file(given.name, (done) => done(given)),
    ];
    const readEntries = (done) => { const some = rest; rest = []; done(some); };
    return { isFile: false, name: "films", createReader: () => ({ readEntries }) };
  };
}"""
GREY = """([x, y]) => {
  const canvas = document.getElementById("canvas");
  const { data } = canvas.getContext("2d").getImageData(x, y, 1, 1);
  return [...data];
}"""
COLOURS = """() => {
  const canvas = document.getElementById("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let num = 0;
  for (let i = 0; i < data.length; i += 4) {
    num += data[i] !== data[i + 1] || data[i] !== data[i + 2];
  }
  return num;
}"""
COUNT_ALERTS = """() => {
  window.numAlerts = 0;
  const count = (changes) => (window.numAlerts += changes.length);
  const seen = { childList: true, characterData: true, subtree: true };
  new MutationObserver(count).observe(document.getElementById("offline"), seen);
}"""
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def films(num: int) -> list[tuple[str, bytes]]:
    """Phantoms and an image of noise, which is for review."""
    drawn = [(f"{number:02}.png", png(film)) for number, film in enumerate(phantoms(num)[0])]
    noise = np.random.default_rng(5).integers(0, 256, (90, 120), np.uint8)
    return [*drawn, ("noise.png", png(noise))]


def probability(film: Film) -> float:
    """How probable a pneumonia is, as the server says it."""
    found = film["probabilities"]
    assert isinstance(found, dict)
    return float(found["pneumonia"])


def halves() -> bytes:
    """A film (300, 400) of greys 60 and 180, left and right."""
    pixels = np.full((300, 400), 60, np.uint8)
    pixels[:, 200:] = 180
    return png(pixels)


def files(named: list[tuple[str, bytes]]) -> list[FilePayload]:
    return [FilePayload(name=name, mimeType="", buffer=data) for name, data in named]


def filled(ward: Ward, num: int = 5, address: str = "/") -> Ward:
    """The page with phantoms and a film for review in its list."""
    for name, data in films(num):
        ward.send(name, data)
    ward.open(address)
    expect(ward.page.locator(".row").first).to_be_visible()
    return ward


def at(ward: Ward, x: float, y: float) -> list[int]:
    """The colour of the canvas at a share of its width and height, after the next frame."""
    ward.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    size = ward.page.evaluate(
        "() => { const c = document.getElementById('canvas'); return [c.width, c.height]; }"
    )
    found: list[int] = ward.page.evaluate(GREY, [int(x * size[0]), int(y * size[1])])
    return found


def open_first(ward: Ward) -> None:
    ward.page.locator(".row").first.click()
    expect(ward.page.locator("#stage-message")).to_be_hidden()
    expect(ward.page.locator("#stage-words")).not_to_be_empty()


def opened(ward: Ward, name: str = "halves.png", data: bytes | None = None) -> Ward:
    """The page with one film, opened."""
    ward.send(name, data or halves())
    ward.open()
    open_first(ward)
    return ward


# --------------------------------------------------------------------------------- films come in


def test_dropped_films_are_listed_with_review_first_and_then_by_score(ward: Ward) -> None:
    ward.open()
    expect(ward.page.locator("#empty")).to_be_visible()
    given = [(name, base64.b64encode(data).decode()) for name, data in films(5)]
    ward.page.evaluate(DROP, given)
    expect(ward.page.locator(".row")).to_have_count(6)
    expect(ward.page.locator("#uploads-words")).to_have_text("6 films added")
    rows = {str(film["name"]): film for film in ward.films()}
    listed = [rows[name] for name in ward.names()]
    ranks = [(row["decision"] != "review", -probability(row)) for row in listed]
    assert ranks == sorted(ranks)
    assert listed[0]["name"] == "noise.png"
    assert ward.page.locator("#live").inner_text() == "6 films added"


def test_a_dropped_folder_leaves_out_hidden_files_and_lists_what_cannot_be_read(ward: Ward) -> None:
    ward.open()
    ward.page.evaluate(DROP_OF_A_FOLDER)
    given = [(name, base64.b64encode(data).decode()) for name, data in films(0)]
    ward.page.evaluate(DROP, given)
    expect(ward.page.locator(".row")).to_have_count(1)
    expect(ward.page.locator("#uploads-files .failed")).to_have_count(1)
    expect(ward.page.locator("#uploads-files .failed")).to_contain_text("locked.png")
    expect(ward.page.locator("#uploads-files .failed")).to_contain_text("could not read it")


def test_a_zip_gives_a_row_for_each_film_and_a_file_that_is_none_a_row_with_its_reason(
    ward: Ward,
) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in films(2):
            archive.writestr(name, data)
    ward.open()
    ward.page.set_input_files("#files", files([("some.zip", file.getvalue()), ("none.png", b"?")]))
    expect(ward.page.locator(".row")).to_have_count(4)
    row = ward.page.locator(".row", has_text="none.png")
    expect(row).to_contain_text("not readable")
    ward.page.locator(".row", has_text="00.png").click()
    ward.page.keyboard.press("h")
    expect(ward.page.locator("#stage-heat")).not_to_be_empty()
    row.click()
    expect(ward.page.locator("#stage-heat")).to_be_empty()
    expect(ward.page.locator("#why")).to_contain_text("could not be read")
    assert ward.page.locator("#tools button:enabled").count() == 0


def test_a_busy_server_is_asked_again_when_it_says_and_a_refused_file_says_why(ward: Ward) -> None:
    posts: list[float] = []

    def answer(route: Route) -> None:
        if route.request.method != "POST":
            route.continue_()
            return
        posts.append(time.monotonic())
        if len(posts) == 1:
            route.fulfill(status=503, headers={"Retry-After": "2"}, body="{}")
        elif len(posts) == 2:
            route.fulfill(status=413, body="{}")
        else:
            route.continue_()

    ward.page.route("**/v1/films", answer)
    ward.open()
    ward.page.set_input_files("#files", files(films(0)))
    expect(ward.page.locator("#uploads-words")).to_contain_text("The server is busy")
    expect(ward.page.locator("#uploads-files .failed")).to_contain_text("too large")
    assert posts[1] - posts[0] >= 1.9
    assert ward.page.locator("#live").inner_text().startswith("noise.png: ")
    ward.page.set_input_files("#files", files(films(1)))
    expect(ward.page.locator(".row")).to_have_count(2)
    expect(ward.page.locator("#uploads-words")).to_have_text("2 of 3 files · 1 failed")
    ward.page.click("#uploads-close")
    expect(ward.page.locator("#uploads")).to_be_hidden()


@pytest.mark.parametrize("status", [401, 408])
def test_an_upload_after_the_sessions_end_or_too_slow_can_be_sent_again(
    ward: Ward, status: int
) -> None:
    posts: list[Route] = []

    def answer(route: Route) -> None:
        if route.request.method == "POST":
            posts.append(route)
        if len(posts) == 1 and route.request.method == "POST":
            route.fulfill(status=status, body="{}")
        else:
            route.continue_()

    ward.page.route("**/v1/films", answer)
    ward.open()
    ward.page.set_input_files("#files", files(films(0)))
    ward.page.locator("#uploads-files .failed button").click()
    expect(ward.page.locator(".row")).to_have_count(1)
    assert len(posts) == 2


@pytest.mark.parametrize("body", ["<p>Welcome to the network", "{}"])
def test_an_answer_of_another_server_fails_the_upload_with_a_reason(ward: Ward, body: str) -> None:
    def answer(route: Route) -> None:
        if route.request.method == "POST":
            route.fulfill(status=200, body=body)
        else:
            route.continue_()

    ward.page.route("**/v1/films", answer)
    ward.open()
    ward.page.set_input_files("#files", files(films(0)))
    row = ward.page.locator("#uploads-files .failed")
    expect(row).to_contain_text("not from an xrai server")
    expect(row.locator("button")).to_be_visible()


def test_at_most_three_files_are_sent_at_once(ward: Ward) -> None:
    waiting: list[Route] = []
    ward.page.route(
        "**/v1/films",
        lambda route: (
            waiting.append(route) if route.request.method == "POST" else route.continue_()
        ),
    )
    ward.open()
    ward.page.set_input_files("#files", files(films(7)))
    expect(ward.page.locator("#uploads-files .sending")).to_have_count(3)
    expect(ward.page.locator("#uploads-files .waiting")).to_have_count(5)
    for sent in range(8):
        expect(ward.page.locator("#uploads-files li")).to_have_count(8 - sent)
        assert len(waiting) - sent <= 3
        waiting[sent].continue_()
    expect(ward.page.locator(".row")).to_have_count(8)


# ------------------------------------------------------------------------------------- the list


def test_filters_choose_films_and_clear_brings_them_back(ward: Ward) -> None:
    page = filled(ward).page
    page.select_option("#filter-review", "yes")
    assert ward.names() == ["noise.png"]
    expect(page.locator("#count")).to_have_text("1 of 6 films · 1 for review")
    page.click("#clear")
    page.select_option("#filter-review", "no")
    expect(page.locator(".row")).to_have_count(5)
    page.fill("#filter-text", "03")
    assert ward.names() == ["03.png"]
    page.fill("#filter-text", "nowhere")
    expect(page.locator("#none")).to_be_visible()
    page.click("#clear")
    expect(page.locator(".row")).to_have_count(6)
    decision = str(next(film["decision"] for film in ward.films() if film["decision"] != "review"))
    page.select_option("#filter-decision", label=decision)
    listed = {str(film["name"]) for film in ward.films() if film["decision"] == decision}
    assert {*ward.names()} == listed


def test_the_keyboard_alone_goes_through_the_list_and_back(ward: Ward) -> None:
    page = filled(ward).page
    names = ward.names()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("j")
    expect(page.locator(".row[aria-selected=true] .name")).to_have_text(names[1])
    page.keyboard.press("Enter")
    expect(page.locator("#film-name")).to_have_text(names[1])
    expect(page.locator("#film-name")).to_be_focused()
    page.keyboard.press("j")
    expect(page.locator("#film-name")).to_have_text(names[2])
    expect(page.locator("#film-place")).to_have_text("3 of 6")
    page.keyboard.press("h")
    expect(page.locator("#heat")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("i")
    expect(page.locator("#invert")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    expect(page.locator("#film")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#film")).to_be_hidden()
    expect(page.locator("#rows")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".row[aria-selected=true] .name")).to_have_text(names[3])
    page.keyboard.press("/")
    page.keyboard.type("jjh")
    expect(page.locator("#filter-text")).to_have_value("jjh")


def test_single_keys_can_be_turned_off(ward: Ward) -> None:
    page = filled(ward, 1).page
    page.keyboard.press("?")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.locator(".row[aria-selected=true]").count() == 0


def test_a_reload_keeps_filters_film_window_zoom_heat_map_and_prevalence(ward: Ward) -> None:
    page = filled(ward).page
    page.select_option("#filter-review", "no")
    open_first(ward)
    for key in ("i", "h", "+"):
        page.keyboard.press(key)
    page.locator("#window-width").fill("100")
    page.locator("#prevalence").fill("20")
    name = page.locator("#film-name").inner_text()
    seen = {
        key: page.locator(key).inner_text()
        for key in ("#stage-words", "#count", "#ppv", "#prevalence-value", "#film-place")
    }
    assert "inverted" in seen["#stage-words"] and "W 100" in seen["#stage-words"]
    page.wait_for_function("() => JSON.parse(localStorage.xrai).view?.window.width === 100")
    page.reload()
    expect(page.locator("#film-name")).to_have_text(name)
    for key, text in seen.items():
        expect(page.locator(key)).to_have_text(text)
    expect(page.locator("#heat")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#filter-review")).to_have_value("no")
    page.go_back()
    expect(page.locator("#film")).to_be_hidden()


def test_the_window_of_a_film_is_not_kept_for_the_next_one(ward: Ward) -> None:
    ward.page.clock.install()
    page = filled(ward, 2, "/?review=no").page
    held: list[Route] = []
    second = page.locator(".row").nth(1)
    address = f"**/v1/films/{second.get_attribute('data-id')}/image"
    page.route(address, lambda route: held.append(route))
    with page.expect_request(address):  # ahead
        open_first(ward)
    now_ms = page.evaluate("Date.now()")
    page.clock.pause_at((now_ms + 1000) / 1000)  # in s
    page.locator("#window-width").fill("100")
    page.clock.run_for(100)  # the window is drawn, but not kept yet
    expect(page.locator("#stage-words")).to_contain_text("W 100")
    second.click()
    page.clock.run_for(1000)  # after all timers of both films
    name = page.locator("#film-name").inner_text()
    assert name == ward.names()[1]
    page.unroute(address)
    page.clock.resume()
    page.reload()
    expect(page.locator("#film-name")).to_have_text(name)
    expect(page.locator("#stage-words")).to_contain_text("W 256")


def test_a_film_that_another_sends_appears_and_a_deleted_one_goes(ward: Ward) -> None:
    page = filled(ward, 1).page
    ward.send("late.png", films(3)[2][1])
    expect(page.locator(".row", has_text="late.png")).to_be_visible()
    page.locator(".row", has_text="late.png").click()
    page.click("#delete")
    expect(page.locator("#confirm-name")).to_have_text("late.png")
    page.click("#confirm button[value=no]")
    assert len(ward.films()) == 3
    page.click("#delete")
    page.click("#confirm button[value=yes]")
    expect(page.locator(".row")).to_have_count(2)
    assert "late.png" not in [film["name"] for film in ward.films()]
    expect(page.locator("#film-name")).not_to_have_text("late.png")


@pytest.mark.parametrize(
    ("status", "words"), [(500, "could not be deleted"), (401, "session has ended")]
)
def test_a_failed_delete_is_shown(ward: Ward, status: int, words: str) -> None:
    page = opened(ward).page
    page.route("**/v1/films/*", lambda route: route.fulfill(status=status, body="{}"))
    page.click("#delete")
    page.click("#confirm button[value=yes]")
    expect(page.locator("#delete-failed")).to_contain_text(words)
    expect(page.locator("#delete-failed")).to_be_visible()


def test_a_film_that_another_deleted_counts_as_deleted(ward: Ward) -> None:
    page = opened(ward).page
    page.click("#delete")
    page.request.delete(f"{ward.url}/v1/films/{ward.films()[0]['id']}")
    page.click("#confirm button[value=yes]")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#film")).to_be_hidden()
    expect(page.locator("#live")).to_have_text("Film deleted")


def test_a_film_whose_image_failed_opens_with_another_click(ward: Ward) -> None:
    ward.send("halves.png", halves())
    ward.open()
    ward.page.route("**/image", lambda route: route.fulfill(status=500, body="{}"), times=1)
    ward.page.locator(".row").click()
    expect(ward.page.locator("#stage-message")).to_contain_text("500")
    open_first(ward)


def test_the_page_comes_up_although_the_first_request_for_the_model_failed(ward: Ward) -> None:
    ward.page.route("**/v1/model", lambda route: route.fulfill(status=503, body="{}"), times=1)
    ward.page.goto(ward.url)
    expect(ward.page.locator("#offline")).to_be_visible()
    expect(ward.page.locator("#empty")).to_be_visible()
    expect(ward.page.locator("#offline")).to_be_hidden()


def test_the_list_is_there_as_csv(ward: Ward) -> None:
    page = filled(ward, 2).page
    with page.expect_download() as download:
        page.click("#csv")
    text = Path(download.value.path()).read_text()
    assert all(name in text for name in ("00.png", "01.png", "noise.png"))


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=document.title='taken'>.png",
        "\"><script>document.title='taken'</script>.png",
        "{{ 7 * 7 }}%s${7*7}.png",
        "\u202egnp.exe.png",
    ],
)
def test_a_hostile_name_is_text(ward: Ward, name: str) -> None:
    page = opened(ward, name).page
    assert ward.names() == [ward.films()[0]["name"]]
    assert page.locator("#film-name").text_content() == ward.films()[0]["name"]
    assert page.locator("#rows img").count() == 1 and page.locator("#rows script").count() == 0
    assert page.title() == "Worklist – xrai"


# ------------------------------------------------------------------------------------ the viewer


def test_a_film_is_shown_in_its_own_greys_and_a_drag_sets_the_window(ward: Ward) -> None:
    page = opened(ward).page
    assert (at(ward, 0.3, 0.5), at(ward, 0.7, 0.5)) == ([60, 60, 60, 255], [180, 180, 180, 255])
    expect(page.locator("#stage-words")).to_contain_text("C 128 · W 256")
    box = page.locator("#canvas").bounding_box()
    assert box
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 250, box["y"] + 250, steps=4)
    page.mouse.up()
    centre, width = (
        float(page.locator(f"#window-{name}").input_value()) for name in ("centre", "width")
    )
    assert centre > 128 and width < 256
    expected = ((60 - (centre - 0.5)) / (width - 1) + 0.5) * 255
    assert at(ward, 0.3, 0.5)[0] == pytest.approx(expected, abs=1.5)
    page.click("#reset")
    expect(page.locator("#stage-words")).to_contain_text("C 128 · W 256")


def test_invert_turns_the_greys_around(ward: Ward) -> None:
    page = opened(ward).page
    page.click("#invert")
    assert (at(ward, 0.3, 0.5)[0], at(ward, 0.7, 0.5)[0]) == (195, 75)


def test_the_wheel_zooms_at_the_pointer_and_the_right_button_pans(ward: Ward) -> None:
    page = opened(ward).page
    box = page.locator("#canvas").bounding_box()
    assert box
    before = page.locator("#stage-words").inner_text()
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + box["height"] / 2)
    for _ in range(3):
        page.mouse.wheel(0, -240)
    expect(page.locator("#stage-words")).not_to_have_text(before)
    assert at(ward, 0.45, 0.5)[0] == 60  # held where it was; all around is the left half
    assert [at(ward, 0.02, 0.5)[0], at(ward, 0.98, 0.5)[0]] == [60, 180]
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 50)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 50, steps=3)
    page.mouse.up(button="right")
    assert at(ward, 0.45, 0.5)[0] == 180
    page.click("#actual")
    expect(page.locator("#stage-words")).to_contain_text("zoom 100%")
    page.keyboard.press("0")
    expect(page.locator("#stage-words")).to_have_text(before)


def test_the_heat_map_lies_over_the_film_only_while_it_is_on(ward: Ward) -> None:
    page = opened(ward, "one.png", films(1)[0][1]).page

    def colours() -> int:
        at(ward, 0, 0)  # after the next frame
        return int(page.evaluate(COLOURS))

    assert colours() == 0
    page.keyboard.press("h")
    expect(page.locator("#stage-heat")).to_contain_text("Heat map of pneumonia")
    assert colours() > 1000
    page.keyboard.press("h")
    expect(page.locator("#stage-heat")).to_be_empty()
    assert colours() == 0


def test_the_heat_map_of_another_finding_goes_before_the_next_one_comes(
    ward: Ward, tmp_path: Path
) -> None:
    service = make_service(save_random_run(tmp_path, LabelSpec("multilabel", ("Mass", "Nodule"))))
    with serve(service) as address:
        page = opened(Ward(ward.page, address), "one.png", films(1)[0][1]).page
        page.click("#outputs label:has-text('Mass')")
        page.keyboard.press("h")
        expect(page.locator("#stage-heat")).to_contain_text("Heat map of Mass")
        held: list[Route] = []
        page.route("**/heat.png?of=Nodule", lambda route: held.append(route))
        page.click("#outputs label:has-text('Nodule')")
        expect(page.locator("#stage-heat")).to_be_empty()
        at(ward, 0, 0)  # after the next frame
        assert page.evaluate(COLOURS) == 0
        held[0].fulfill(status=500, body="{}")
        expect(page.locator("#stage-heat")).not_to_be_empty()
        assert page.evaluate(COLOURS) == 0
        page.click("#outputs label:has-text('Mass')")
        page.click("#outputs label:has-text('Nodule')")
        page.click("#outputs label:has-text('Mass')")
        expect(page.locator("#stage-heat")).to_contain_text("Heat map of Mass")
        with page.expect_response("**/heat.png?of=Nodule"):
            held[1].continue_()
        at(ward, 0, 0)
        expect(page.locator("#stage-heat")).to_contain_text("Heat map of Mass")


def test_a_dicom_film_of_12_bits_opens_in_its_own_window_and_shows_what_8_bits_lose(
    ward: Ward,
) -> None:
    samples = np.full((300, 400), 1000, np.uint16)
    samples[:, 200:] = 1008  # half a grey level of 8 bits apart
    samples[:2], samples[-2:] = 0, 4095
    data = dicom_file(samples, BitsStored=12, WindowCenter=1004, WindowWidth=21)
    page = opened(ward, "film.dcm", data).page
    expect(page.locator("#stage-words")).to_contain_text("C 1,004 · W 21")
    expected = [round(255 * ((value - 1003.5) / 20 + 0.5)) for value in (1000, 1008)]
    assert [at(ward, 0.3, 0.5)[0], at(ward, 0.7, 0.5)[0]] == expected
    page.locator("#window-width").fill("4096")
    left, right = at(ward, 0.3, 0.5)[0], at(ward, 0.7, 0.5)[0]
    assert abs(left - right) <= 1


def test_the_numbers_are_the_servers_and_the_prevalence_moves_the_predictive_values(
    ward: Ward,
) -> None:
    page = opened(ward, "one.png", films(1)[0][1]).page
    (film,) = ward.films()
    share = probability(film)
    shown = page.locator("#outputs .percent").inner_text()
    assert float(re.sub(r"[^\d.]", "", shown)) == pytest.approx(100 * share, abs=0.6)
    before = page.locator("#ppv").inner_text()
    page.locator("#prevalence").fill("10")
    assert page.locator("#ppv").inner_text() != before
    page.click("#prevalence-reset")
    expect(page.locator("#ppv")).to_have_text(before)


def test_predictive_values_are_at_the_servers_prior_until_a_person_sets_another_prevalence(
    ward: Ward, tmp_path: Path
) -> None:
    run = save_run(tmp_path)
    add_summary(run)
    load = functools.partial(load_models, prior=0.95)  # beyond the slider's end
    worklist = Worklist(max_films=9, max_bytes=1 << 24, lifetime_s=60)
    with serve(Service(load([str(run)]), (str(run),), load, worklist)) as address:
        page = opened(Ward(ward.page, address), "one.png", films(1)[0][1]).page
        (said,) = page.request.get(f"{address}/v1/model").json()["outputs"]
        true_positive = 0.95 * said["sensitivity"]
        ppv = true_positive / (true_positive + 0.05 * (1 - said["specificity"]))
        expect(page.locator("#prevalence-value")).to_have_text("95%")
        expect(page.locator("#prevalence-usual")).to_have_text("as set for this server")
        shown = page.locator("#ppv").inner_text()
        assert float(shown.strip("%")) == pytest.approx(100 * ppv, abs=0.6)
        page.locator("#prevalence").fill("10")
        expect(page.locator("#prevalence-usual")).to_be_hidden()
        expect(page.locator("#ppv")).not_to_have_text(shown)
        page.click("#prevalence-reset:has-text('Back to 95%, as set for this server')")
        expect(page.locator("#ppv")).to_have_text(shown)
        page.close()  # before its server stops


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_every_class_or_finding_has_its_probability_and_its_heat_map(
    ward: Ward, tmp_path: Path, task: Task
) -> None:
    names = ("Effusion", "Mass", "<b>Nodule</b>")
    service = make_service(save_random_run(tmp_path, LabelSpec(task, names)))
    with serve(service) as address:
        other = Ward(ward.page, address)
        page = opened(other, "one.png", films(1)[0][1]).page
        (film,) = other.films()
        probabilities = film["probabilities"]
        assert isinstance(probabilities, dict)
        ranked = sorted(names, key=lambda name: -probabilities[name])
        assert page.locator("#outputs b").all_inner_texts() == ranked
        expect(page.locator("#outputs input:checked")).to_have_value(ranked[0])
        num_limits = 3 if task == "multilabel" else 0
        expect(page.locator("#outputs .limit")).to_have_count(num_limits)
        page.keyboard.press("h")
        for name in (*ranked, ranked[0]):
            expect(page.locator("#stage-heat")).to_contain_text(f"Heat map of {name}")
            page.keyboard.press("o")
        expect(page.locator("#meaning")).to_be_hidden()  # the run has no summary
        page.click("#open-card")
        expect(page.locator("#card tbody tr")).to_have_count(3)


def test_the_bar_of_a_row_is_the_probability_that_the_list_is_sorted_by(
    ward: Ward, tmp_path: Path
) -> None:
    names = ("NORMAL", "BACTERIAL", "VIRAL")
    service = make_service(save_random_run(tmp_path, LabelSpec("multiclass", names)))
    with serve(service) as address:
        other = Ward(ward.page, address)
        filled(other, 6)
        bars = ward.page.locator(".row .measure").all_inner_texts()
        said = [film for film in other.films() if film["score"] is not None]
        for film, bar in zip(said, bars, strict=True):
            name, share = bar.split()
            assert name == film["score_of"] != "NORMAL"
            assert float(share.strip("%")) == pytest.approx(
                100 * float(str(film["score"])), abs=0.6
            )


def answer_with(route: Route, **facts: Any) -> None:
    """Answer with the list as the server has it, but other facts of each film."""
    if "if-none-match" in route.request.headers:
        route.continue_()
        return
    answer = route.fetch()
    said = answer.json()
    for film in said["films"]:
        film.update(facts)
    route.fulfill(response=answer, json=said)


def test_films_of_another_run_are_shown_although_its_card_failed_once(ward: Ward) -> None:
    cards: list[Route] = []

    def card(route: Route) -> None:
        cards.append(route)
        if len(cards) == 2:
            route.fulfill(status=503, json={"detail": "the server is stopping"})
        else:
            route.continue_()

    ward.send("a.png", films(1)[0][1])
    ward.page.route("**/v1/model", card)
    ward.page.route("**/v1/films", lambda route: answer_with(route, model="another"))
    ward.page.goto(ward.url)
    expect(ward.page.locator("#offline")).to_be_visible()
    expect(ward.page.locator(".row")).to_have_count(1)
    expect(ward.page.locator("#offline")).to_be_hidden()
    assert len(cards) == 3


def test_a_list_that_cannot_be_read_is_asked_for_again(ward: Ward) -> None:
    lists: list[Route] = []

    def answer(route: Route) -> None:
        lists.append(route)
        if len(lists) == 1:
            whole = route.fetch()
            route.fulfill(response=whole, body=whole.text()[:-1])
        else:
            route.continue_()

    ward.send("a.png", films(1)[0][1])
    ward.page.route("**/v1/films", answer)
    ward.page.goto(ward.url)
    expect(ward.page.locator("#offline")).to_be_visible()
    expect(ward.page.locator(".row")).to_have_count(1)
    expect(ward.page.locator("#offline")).to_be_hidden()


def test_films_that_wait_are_counted_until_they_are_listed(ward: Ward, server: str) -> None:
    page, waits = ward.page, [2, 2, 0]

    def answer(route: Route) -> None:
        if route.request.method != "GET":
            route.continue_()
            return
        num = waits.pop(0) if len(waits) > 1 else waits[0]
        route.fulfill(json={"films": [], "num_waiting": num})

    page.route("**/v1/films", answer)
    page.goto(server)
    expect(page.locator("#count")).to_contain_text("2 being scored")
    expect(page.locator("#empty")).to_be_hidden()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#count")).to_be_hidden()


@pytest.mark.parametrize("prior", [{}, {"A": 0.1, "B": 0.8, "C": 0.1}], ids=["none", "prior"])
def test_the_verdict_has_the_probability_of_the_class_that_was_called(
    ward: Ward, tmp_path: Path, prior: dict[str, float]
) -> None:
    service = make_service(save_random_run(tmp_path, LabelSpec("multiclass", ("A", "B", "C"))))

    said = {"calls": ["A"], "decision": "A", "probabilities": {"A": 0.3, "B": 0.6}, "prior": prior}
    with serve(service) as address:
        other = Ward(ward.page, address)
        other.send("one.png", films(1)[0][1])
        ward.page.route("**/v1/films", lambda route: answer_with(route, **said))
        other.open()
        ward.page.locator(".row").click()
        expect(ward.page.locator("#verdict p")).to_have_text("A 30%")
        words = "called" if prior else "the most probable class"
        expect(ward.page.locator("#outputs label", has_text="A")).to_contain_text(words)


def test_the_card_is_that_of_a_run_that_came_back(ward: Ward) -> None:
    page, run = ward.page, {"card": ""}

    def card(route: Route) -> None:
        answer = route.fetch()
        said = answer.json()
        route.fulfill(response=answer, json=said | {"run": run["card"] or said["run"]})

    def listed(route: Route) -> None:
        headers = {
            key: value for key, value in route.request.headers.items() if key != "if-none-match"
        }
        answer = route.fetch(headers=headers)
        said = answer.json()
        for film in said["films"]:
            if film["name"] == "b.png":
                film["model"] = "another"
        route.fulfill(response=answer, json=said)

    def expect_card(text: str) -> None:
        page.click("#open-card")
        expect(page.locator("#card-body")).to_contain_text(text)
        page.keyboard.press("Escape")

    ward.send("a.png", films(1)[0][1])
    first = str(ward.films()[0]["model"])
    page.route("**/v1/model", card)
    page.route("**/v1/films", listed)
    ward.open()
    expect(page.locator(".row")).to_have_count(1)
    run["card"] = "another"
    ward.send("b.png", films(2)[1][1])
    expect(page.locator(".row")).to_have_count(2)
    expect_card("another")
    run["card"] = ""
    ward.send("c.png", films(3)[2][1])
    expect(page.locator(".row")).to_have_count(3)
    expect_card(first)


def test_the_image_of_the_next_film_is_asked_for_once(ward: Ward) -> None:
    page = filled(ward, 2, "/?review=no").page
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    address = f"{ward.url}/v1/films/{page.locator('.row').nth(1).get_attribute('data-id')}/image"
    with page.expect_response(address):
        open_first(ward)
    page.locator(".row").nth(1).click()
    expect(page.locator("#film-name")).to_have_text(ward.names()[1])
    expect(page.locator("#stage-message")).to_be_hidden()
    assert asked.count(address) == 1


@like(locale="fr-FR")
def test_runs_that_predict_together_say_how_far_they_differ(ward: Ward, tmp_path: Path) -> None:
    runs = [str(save_run(tmp_path, run_id=name, num_steps=n)) for name, n in (("a", 25), ("b", 9))]
    models = load_models(runs)
    worklist = Worklist(max_films=9, max_bytes=1 << 24, lifetime_s=60)
    with serve(Service(models, tuple(runs), load_models, worklist)) as address:
        other = Ward(ward.page, address)
        page = opened(other, "one.png", films(1)[0][1]).page
        expect(page.locator("#facts")).to_contain_text("Écart entre les entraînements")
        expect(page.locator("#facts")).to_contain_text("au plus")


def test_why_a_film_is_for_review_is_said_beside_it(ward: Ward) -> None:
    page = filled(ward, 1).page
    page.locator(".row", has_text="noise.png").click()
    expect(page.locator("#why")).to_contain_text("does not look like the training images")
    expect(page.locator("#why")).to_contain_text("as if there were no model")


def test_the_card_says_what_the_model_looks_for_and_how_well(ward: Ward) -> None:
    ward.open()
    ward.page.click("#open-card")
    model = json.loads(ward.page.request.get(f"{ward.url}/v1/model").text())
    card = ward.page.locator("#card")
    expect(card).to_contain_text("pneumonia")
    expect(card).to_contain_text("Sensitivity")
    expect(card).to_contain_text("Not a medical device")
    assert model


# ------------------------------------------------------------------------- everybody, everywhere


def sign_in(page: Page) -> None:
    page.fill("#token", "a token of the ward")
    page.click("button")
    expect(page.locator("#list")).to_be_visible()


def test_a_browser_without_the_session_signs_in_with_the_token(
    ward: Ward, tmp_path_factory: pytest.TempPathFactory
) -> None:
    service = make_service(save_run(tmp_path_factory.mktemp("token")))
    page = ward.page
    with serve(service, token="a token of the ward") as address:
        page.goto(address)
        expect(page.locator("h1")).to_have_text("Sign in")
        page.fill("#token", "another one, not right")
        page.click("button")
        expect(page.locator("[role=alert]")).to_contain_text("not right")
        sign_in(page)
        expect(page.locator("#empty")).to_be_visible()
        assert page.evaluate("document.cookie") == ""  # no script can read the session
        page.context.clear_cookies()
        expect(page.locator("h1")).to_have_text("Sign in")  # when it asks for the list


def test_the_sessions_end_is_said_once_and_uploads_wait_until_somebody_signs_in_again(
    ward: Ward, tmp_path_factory: pytest.TempPathFactory
) -> None:
    service = make_service(save_run(tmp_path_factory.mktemp("token")))
    page, held = ward.page, list[Route]()
    asked: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    def hold(route: Route) -> None:
        if route.request.method == "POST":
            held.append(route)
        else:
            route.continue_()

    page.on("dialog", dismiss)
    with serve(service, token="a token of the ward") as address:
        page.goto(address)
        sign_in(page)
        page.route("**/v1/films", hold)
        page.set_input_files("#files", files(films(0)))
        expect(page.locator("#uploads-files .sending")).to_have_count(1)
        page.evaluate(COUNT_ALERTS)
        page.context.clear_cookies()
        expect(page.locator("#offline")).to_contain_text("session has ended")
        num_alerts = page.evaluate("window.numAlerts")
        held.pop().continue_()
        row = page.locator("#uploads-files .failed")
        expect(row).to_have_count(1)
        for _ in range(2):
            with page.expect_response(lambda answer: answer.status == 401):
                pass
        assert page.evaluate("window.numAlerts") == num_alerts
        expect(row).to_have_count(1)
        with page.context.expect_page() as login:
            page.click("#offline a")
        sign_in(login.value)
        expect(page.locator("#offline")).to_be_hidden()
        page.unroute("**/v1/films")
        row.locator("button").click()
        expect(page.locator(".row")).to_have_count(1)
        page.close()  # before its server stops
    assert asked == []


def test_every_view_says_that_it_is_no_medical_device(ward: Ward) -> None:
    page = filled(ward, 1).page
    notice = page.locator("body > .notice")
    expect(notice).to_contain_text("Not a medical device")
    expect(notice).to_be_in_viewport()
    open_first(ward)
    expect(notice).to_be_in_viewport()


@like(locale="fr-FR")
def test_a_french_browser_gets_french_and_can_change_it(ward: Ward) -> None:
    page = filled(ward, 1).page
    expect(page.locator("html")).to_have_attribute("lang", "fr")
    expect(page.locator("h1")).to_have_text("Liste de travail")
    expect(page.locator("#count")).to_contain_text("clichés")
    page.select_option("#filter-review", "yes")
    page.locator(".row", has_text="noise.png").click()
    expect(page.locator("#why")).to_contain_text("Il ne ressemble pas aux images")
    expect(page.locator("body > .notice")).to_contain_text("N'est pas un dispositif médical")
    page.click("text=EN")
    expect(page.locator("h1")).to_have_text("Worklist")
    expect(page.locator("#film-name")).to_have_text("noise.png")  # and the filters stay
    expect(page.locator("#filter-review")).to_have_value("yes")


@like(color_scheme="dark")
def test_dark_is_the_systems_choice_or_the_persons(ward: Ward) -> None:
    ward.open()
    colour = "() => getComputedStyle(document.body).backgroundColor"
    assert ward.page.evaluate(colour) == "rgb(17, 20, 26)"
    ward.page.select_option("#theme", "light")
    assert ward.page.evaluate(colour) == "rgb(245, 247, 250)"
    ward.open()
    assert ward.page.evaluate(colour) == "rgb(245, 247, 250)"
    ward.page.select_option("#theme", "dark")
    assert ward.page.evaluate(colour) == "rgb(17, 20, 26)"


@like(**PHONE)
def test_on_a_phone_the_film_takes_the_page_and_nothing_is_cut_off(ward: Ward) -> None:
    page = filled(ward, 2).page
    width = "() => document.documentElement.scrollWidth"
    assert page.evaluate(width) == 390
    open_first(ward)
    expect(page.locator("#list")).to_be_hidden()
    assert page.evaluate(width) == 390
    box = page.locator("#canvas").bounding_box()
    assert box and box["width"] == 390 and box["height"] > 300
    page.click("#back")
    expect(page.locator("#list")).to_be_visible()


def faults(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:150]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize(
    "ward",
    [{}, {"color_scheme": "dark"}, {**PHONE, "locale": "fr-FR"}],
    indirect=True,
    ids=["light", "dark", "phone"],
)
def test_axe_finds_no_serious_fault_in_any_view(ward: Ward) -> None:
    page = ward.page
    ward.open()
    assert faults(page) == []  # without films
    filled(ward, 2)
    assert faults(page) == []
    for view in ("card", "help"):
        page.click(f"#open-{view}")
        assert faults(page) == [], view
        page.keyboard.press("Escape")
    page.locator(".row", has_text="noise.png").click()
    page.keyboard.press("h")
    expect(page.locator("#stage-heat")).not_to_be_empty()
    assert faults(page) == []
    page.click("#delete")
    assert faults(page) == []
    page.keyboard.press("Escape")
    page.click("#back")
    page.route("**/v1/films", lambda route: route.fulfill(status=413, body="{}"))
    page.set_input_files("#files", files(films(0)))
    expect(page.locator("#uploads-files .failed")).to_be_visible()
    assert faults(page) == []
    page.goto(f"{ward.url}/login?wrong")
    assert faults(page) == []
