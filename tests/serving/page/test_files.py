"""The files that the page is made of: words, scripts, templates, and how they are served."""

import ast
import asyncio
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from starlette.applications import Starlette

import xrai
from xrai.ingest.greys import FLAT
from xrai.serving.page import (
    CONTENT_SECURITY_POLICY,
    LANGUAGES,
    assets,
    page_routes,
    preferred_language,
    reasons_of,
    words_of,
)

FOLDER = Path(__file__).parents[3] / "xrai/serving/page"
FORMS = ("one", "other")  # of numbers, in English and French


class Client:
    """Asks the page's routes, and keeps cookies."""

    def __init__(self) -> None:
        self.cookies = httpx2.Cookies()

    def get(self, address: str, **options: Any) -> httpx2.Response:
        """The answer to a GET request, after redirects unless an option says otherwise."""
        return asyncio.run(self._get(address, {"follow_redirects": True, **options}))

    async def _get(self, address: str, options: dict[str, Any]) -> httpx2.Response:
        transport = httpx2.ASGITransport(Starlette(routes=page_routes()))
        where = "http://127.0.0.1"
        async with httpx2.AsyncClient(
            transport=transport, base_url=where, cookies=self.cookies
        ) as client:
            answer = await client.get(address, **options)
            self.cookies = client.cookies
        return answer


@pytest.fixture
def client() -> Client:
    return Client()


def sources(*endings: str) -> dict[str, str]:
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in FOLDER.iterdir()
        if path.name.endswith(endings)
    }


def test_every_word_is_there_in_each_language_with_the_same_places_for_values() -> None:
    found = yaml.safe_load((FOLDER / "words.yaml").read_text(encoding="utf-8"))
    assert len(found) > 100
    for name, texts in found.items():
        assert {*texts} == {*LANGUAGES}, name
        assert all(texts.values()), name
        places = [sorted(re.findall(r"\{\w+\}", text)) for text in texts.values()]
        assert places[0] == places[1], name


def said_of_films() -> list[str]:
    """What `ImageError` and, of zip archives, `SourceError` say in the code, 7 for each value."""
    found = []
    root = Path(xrai.__file__).parent
    for path in (*root.glob("ingest/*.py"), root / "serving/uploads.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            node.targets[0].id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        } | {"FLAT": FLAT}
        zips = [node for node in tree.body if getattr(node, "name", "") == "ZipSource"]
        for kinds, trees in ((("ImageError", "OtherImageError"), [tree]), (("SourceError",), zips)):
            calls = (node for tree in trees for node in ast.walk(tree))
            for call in calls:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") in kinds:
                    (said,) = call.args
                    if isinstance(said, ast.Name):
                        found += [texts[said.id]] if said.id in texts else []
                    elif not isinstance(said, ast.Call):  # what something else says
                        found.append(sample(said))
    return found


def sample(text: ast.expr) -> str:
    """A text of the code, 7 for each value."""
    match text:
        case ast.Constant(value=str(words)):
            return words
        case ast.JoinedStr(values=parts):
            return "".join(map(sample, parts))
        case ast.FormattedValue(value=ast.IfExp(body=words)):
            return sample(words)
    return "7"


def pattern(said: str) -> str:
    return re.sub(r"\\{\w+\\}", ".+?", re.escape(said))


def test_every_reason_that_a_film_can_have_is_translated() -> None:
    said = said_of_films()
    assert len(said) > 40 and "shows one grey level throughout" in said
    known = [pattern(text) for text, _ in reasons_of("fr")]
    assert [text for text in said if not any(re.fullmatch(each, text) for each in known)] == []


def test_a_translation_has_the_values_of_what_it_translates() -> None:
    for said, text in reasons_of("fr"):
        given, used = (sorted(re.findall(r"\{\w+\}", each)) for each in (said, text))
        assert used == [each for each in given if each != "{said}"], said
    assert reasons_of("en") == []


def test_every_word_that_is_used_exists_and_every_other_one_is_gone() -> None:
    used = set()
    for text in sources(".js").values():
        used |= {*re.findall(r'"([a-z]+(?:_[a-z]+)*)"', text)}
    for text in sources(".jinja").values():
        used |= {*re.findall(r"words\.(\w+)", text)}
        used |= {f"help_{name}" for name in re.findall(r'"(\w+)"', text)}
        used |= {f"theme_{name}" for name in re.findall(r'"(\w+)"', text)}
    names = {re.sub(rf"_({'|'.join(FORMS)})$", "", name) for name in words_of("en")}
    assert {name for name in names - used if not name.startswith("name_")} == set()
    said = {
        name for text in sources(".js").values() for name in re.findall(r'\bsay\("(\w+)"', text)
    }
    said |= {
        name for text in sources(".jinja").values() for name in re.findall(r"words\.(\w+)", text)
    }
    assert said <= names and len(said) > 80


def test_nothing_comes_from_elsewhere_and_no_script_or_style_is_inline(client: Client) -> None:
    for name, text in sources(".js", ".jinja", ".svg").items():
        without_names = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        links = re.findall(r"^(?! *//).*?(https?://[^ )]*)", without_names, re.MULTILINE)
        assert links == [], name
    for page in (client.get("/").text, client.get("/login?wrong").text):
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page)
        for attributes in re.findall(r"<script([^>]*)>", page):
            assert " src=" in attributes or "application/json" in attributes
    assert "unsafe" not in CONTENT_SECURITY_POLICY


def test_the_page_has_its_policy_and_its_files_are_asked_for_each_time(client: Client) -> None:
    assert client.get("/").headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
    assert {"main.js", "page.css", "icons.svg", "favicon.svg"} <= {*assets()}
    for name in assets():
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200 and answer.headers["Cache-Control"] == "no-cache"
        again = client.get(f"/page/{name}", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/main.js").headers["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "path", ["/page/words.yaml", "/page/ward.html.jinja", "/page/..%2fpage.py", "/page/"]
)
def test_what_is_not_for_browsers_is_not_served(client: Client, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("fr", "fr"),
        ("fr-CA,fr;q=0.9,en;q=0.8", "fr"),
        ("en-US,en;q=0.9,fr;q=0.8", "en"),
        ("de,fr;q=0.5", "fr"),
        ("de", "en"),
        ("en;q=0.1, fr;q=0.9", "fr"),
        ("fr;q=0, en", "en"),
        ("fr;q=many", "en"),
        (";;,,q=", "en"),
    ],
)
def test_the_language_is_the_one_that_the_browser_prefers(accepted: str, language: str) -> None:
    assert preferred_language(accepted) == language


def test_a_language_that_was_chosen_stays_and_the_address_keeps_its_filters(client: Client) -> None:
    answer = client.get("/?review=yes&lang=fr&text=a%26b", follow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/?review=yes&text=a%26b")
    assert '<html lang="fr"' in client.get("/", headers={"Accept-Language": "en"}).text
    client.get("/?lang=en")
    assert '<html lang="en"' in client.get("/", headers={"Accept-Language": "fr"}).text


@pytest.mark.parametrize("value", ["de", '"><script>', ""])
def test_another_language_or_colour_is_as_if_none_was_asked_for(client: Client, value: str) -> None:
    page = client.get("/", params={"lang": value}).text
    assert '<html lang="en"' in page
    client.cookies.set("xrai_theme", value)
    client.cookies.set("xrai_language", value)
    assert '<html lang="en" data-theme="auto"' in client.get("/").text
