"""The ward's page: templates, style, scripts and words, as routes of the server.

`xrai.serving.http` mounts `page_routes`. The page is static but for its language and its
colours; its scripts ask the HTTP interface for everything else. No script and no style is inline,
so that `CONTENT_SECURITY_POLICY` can forbid both.
"""

import functools
import hashlib
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from xrai.results import style

LANGUAGES: Final = {"en": "English", "fr": "Français"}
THEMES: Final = ("auto", "light", "dark")
LANGUAGE_COOKIE: Final = "xrai_language"
THEME_COOKIE: Final = "xrai_theme"
# The page's own files alone; blob: is for images that its scripts decode
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

_YEAR_S = 365 * 24 * 3600
_STYLE, _STYLE_SOURCE = "page.css", "page.css.jinja"
_ASSETS = ("js", "svg")  # suffixes of files that are served as they are


@dataclass(frozen=True)
class Asset:
    """A file that the page is made of."""

    data: bytes
    media_type: str
    etag: str


def page_routes() -> list[Route]:
    """The routes of the page: `/`, `/login` and `/page/NAME`. They hold no film and no name."""
    return [
        Route("/login", _login, methods=["GET"], include_in_schema=False),
        Route("/", _ward, methods=["GET"], include_in_schema=False),
        Route("/page/{name}", _asset, methods=["GET"], include_in_schema=False),
    ]


def render(template: str, request: Request, **values: object) -> HTMLResponse:
    """A page of a template, in the language and the colours that the request asks for."""
    language = language_of(request)
    theme = request.cookies.get(THEME_COOKIE, "")
    text = (
        _jinja()
        .get_template(template)
        .render(
            words=words_of(language),
            reasons=reasons_of(language),
            language=language,
            languages=LANGUAGES,
            theme=theme if theme in THEMES else THEMES[0],
            **values,
        )
    )
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Content-Language": language,
        "Vary": "Accept-Language, Cookie",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",  # with none, forms have no origin to check
    }
    return HTMLResponse(text, headers=headers)


def language_of(request: Request) -> str:
    """The language that was chosen on the page, else the first of Accept-Language that the page
    has, else English.
    """
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    if chosen in LANGUAGES:
        return chosen
    return preferred_language(request.headers.get("accept-language", ""))


def preferred_language(accepted: str) -> str:
    """The page's language that an Accept-Language header prefers (RFC 9110, 12.5.4)."""
    weights: dict[str, float] = {}
    for part in accepted.split(","):
        name, _, weight = part.partition(";")
        language = name.strip().lower().partition("-")[0]
        try:
            value = float(weight.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        if language in LANGUAGES and 0 < value <= 1:
            weights[language] = max(value, weights.get(language, 0))
    return max(weights, key=weights.__getitem__, default="en")


@functools.cache
def words_of(language: str) -> Mapping[str, str]:
    """The page's words in a language, by name."""
    found = yaml.safe_load(_source("words.yaml"))
    return {name: texts[language] for name, texts in found.items()}


@functools.cache
def reasons_of(language: str) -> list[tuple[str, str]]:
    """The server's messages, each with its translation; empty for English, which they are in."""
    found = yaml.safe_load(_source("reasons.yaml"))
    return [(texts["en"], texts[language]) for texts in found if language != "en"]


@functools.cache
def assets() -> Mapping[str, Asset]:
    """The files that the page is made of, by name."""
    folder = importlib.resources.files("xrai.serving").joinpath("page")
    found = {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if entry.name.rpartition(".")[2] in _ASSETS
    }
    found[_STYLE] = _jinja().get_template(_STYLE_SOURCE).render(style=style).encode()
    return {name: Asset(data, _media_type(name), _etag(data)) for name, data in found.items()}


async def _ward(request: Request) -> Response:
    if (language := request.query_params.get("lang")) not in LANGUAGES:
        return render("ward.html.jinja", request)
    rest = request.url.remove_query_params("lang")
    answer = RedirectResponse(f"/?{rest.query}" if rest.query else "/", status_code=303)
    answer.set_cookie(LANGUAGE_COOKIE, str(language), max_age=_YEAR_S, samesite="strict")
    return answer


async def _login(request: Request) -> Response:
    return render("login.html.jinja", request, is_wrong="wrong" in request.query_params)


async def _asset(request: Request) -> Response:
    asset = assets().get(request.path_params["name"])
    if asset is None:
        return Response(status_code=404)
    # checked at each use: a new version of the program must not meet old scripts
    headers = {"ETag": asset.etag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    if request.headers.get("if-none-match") == asset.etag:
        return Response(status_code=304, headers=headers)
    return Response(asset.data, media_type=asset.media_type, headers=headers)


@functools.cache
def _jinja() -> Environment:
    return Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(name: str) -> str:
    """A file of the page; the palette is the report's."""
    places = {"palette.jinja": importlib.resources.files("xrai.results")}
    folder = importlib.resources.files("xrai.serving").joinpath("page")
    return places.get(name, folder).joinpath(name).read_text(encoding="utf-8")


def _media_type(name: str) -> str:
    types = {"js": "text/javascript", "svg": "image/svg+xml", "css": "text/css"}
    return types[name.rpartition(".")[2]]


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
