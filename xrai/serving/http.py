"""The HTTP interface: films in, rows out, and what the page shows of them.

docs/serve.md explains its use, openapi.yaml its requests and answers. Films and their names appear
in answers alone, never in a log or a metric.
"""

import asyncio
import functools
import importlib.resources
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from typing import Final
from weakref import WeakKeyDictionary

import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from xrai import __version__
from xrai.errors import XraiError
from xrai.ingest.find import File
from xrai.log import get_logger, place_of, printable
from xrai.serving.films import Film, FullError
from xrai.serving.guard import COOKIE, Guard, is_secret, session_of
from xrai.serving.models import Card
from xrai.serving.pictures import draw_heat, draw_thumbnail, draw_whole
from xrai.serving.scoring import ClosedError
from xrai.serving.service import Answers, Service
from xrai.serving.uploads import RequestError, Room, discard, received
from xrai.tables import to_csv

NOTE: Final = "No medical device: for research, not for diagnosis."
SCHEMA_VERSION: Final = 1

Endpoint = Callable[[Request], Awaitable[Response]]
_AT_ONCE = 32  # films of one request that are scored at the same time
_RETRY_S = {429: "2", 503: "2"}  # Retry-After, by status
_SESSION_S = 12 * 3600
_MAX_JSON_BYTES = 1 << 16
_FORM_S = 20.0  # for a form or a short body
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much a server accepts at a time."""

    max_body_bytes: int
    max_bytes_under_way: int  # in bodies of requests that are not answered yet
    max_requests: int  # with films, at the same time
    max_requests_per_client: int


def make_app(
    service: Service, *, token: str, limits: Limits, pages: list[Route] | None = None
) -> Starlette:
    """The server's ASGI application; `pages` are routes that are no part of the interface."""
    routes = _Routes(service, token, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    return Starlette(
        routes=[*routes.all(), *(pages or [])],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={
            HTTPException: _refused,
            RequestError: _refused_body,
            Exception: _failed,
        },
        lifespan=lifespan,
    )


class _Routes:
    """The routes of one server, and what they count."""

    def __init__(self, service: Service, token: str, limits: Limits) -> None:
        self._service, self._token, self._limits = service, token, limits
        self._room = Room(limits.max_bytes_under_way, limits.max_body_bytes)
        self._clients: Counter[str] = Counter()  # requests with films that are under way
        self._num_queued = 0  # films that wait for others of the same request
        self._texts: WeakKeyDictionary[Film, str] = WeakKeyDictionary()  # listed films as JSON
        self._answers = Answers()
        self._reloading = asyncio.Lock()

    def all(self) -> list[Route]:
        """Every route of the interface."""
        return [
            self._route("/v1/films", GET=self.list_films, POST=self.post_films),
            self._route("/v1/films.csv", GET=self.list_as_csv),
            self._route("/v1/films/{id}", GET=self.get_film, DELETE=self.delete_film),
            self._route("/v1/films/{id}/image", GET=self.get_image),
            self._route("/v1/films/{id}/thumbnail.png", GET=self.get_thumbnail),
            self._route("/v1/films/{id}/heat.png", GET=self.get_heat),
            self._route("/v1/model", GET=self.get_model),
            self._route("/v1/reload", POST=self.reload),
            self._route("/login", POST=self.login),
            self._route("/logout", POST=self.logout),
            self._route("/healthz", GET=self.is_alive),
            self._route("/readyz", GET=self.is_ready),
            self._route("/metrics", GET=self.metrics),
            self._route("/openapi.json", GET=self.openapi),
        ]

    def _route(self, path: str, **endpoints: Endpoint) -> Route:
        """A path with what answers each method, counted and timed."""
        metrics = self._service.metrics

        async def counted(request: Request) -> Response:
            began, status = time.monotonic(), 500
            method = "GET" if request.method == "HEAD" else request.method
            try:
                response = await endpoints[method](request)
                status = response.status_code
                return response
            except (HTTPException, RequestError) as error:
                status = error.status_code if isinstance(error, HTTPException) else error.status
                raise
            finally:
                metrics.requests.labels(path, method, str(status)).inc()
                metrics.seconds.labels(path).observe(time.monotonic() - began)

        return Route(path, counted, methods=[*endpoints])

    # --------------------------------------------------------------------------- films

    async def post_films(self, request: Request) -> Response:
        """Score the films of a request, and list them."""
        with self._admitted(request):
            async with received(request, self._room) as files:
                gate = asyncio.Semaphore(_AT_ONCE)
                if len(files) == 1:  # without a task of its own
                    found = [await self._add(files[0], gate)]
                else:
                    found = await asyncio.gather(*(self._add(file, gate) for file in files))
        films = [each for each in found if isinstance(each, Film)]
        refused = [
            {"name": file.path, "reason": _words_of(each)}
            for file, each in zip(files, found, strict=True)
            if isinstance(each, BaseException)
        ]
        if refused and not films:
            is_busy = any(isinstance(each, FullError | ClosedError) for each in found)
            raise RequestError(503 if is_busy else 500, refused[0]["reason"])
        return _json({"films": [film_json(film) for film in films], "refused": refused}, 201)

    async def _add(self, file: File, gate: asyncio.Semaphore) -> Film | BaseException:
        self._num_queued += 1
        try:
            await gate.acquire()
        finally:
            self._num_queued -= 1
        try:
            return await self._answers.get(self._service.add(file, source="upload"))
        except ClosedError as error:
            return error
        finally:
            gate.release()

    @contextmanager
    def _admitted(self, request: Request) -> Iterator[None]:
        """Count a request with films. Raises `RequestError` where there are too many."""
        client = request.client.host if request.client else ""
        if self._clients.total() >= self._limits.max_requests:
            raise RequestError(503, "too many requests are under way; try again")
        if self._clients[client] >= self._limits.max_requests_per_client:
            raise RequestError(429, "too many requests of yours are under way; try again")
        self._clients[client] += 1
        try:
            yield
        finally:
            self._clients[client] -= 1
            self._clients += Counter()  # forgets those at 0

    async def list_films(self, request: Request) -> Response:
        """All films, the most urgent first, and how many wait to be scored."""
        num_waiting = self._num_queued + self._service.scorer.num_waiting
        tag = f'"{self._service.worklist.version}-{num_waiting}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        films = ",".join(map(self._text_of, self._service.worklist.films()))
        head = _text({"schema_version": SCHEMA_VERSION, "note": NOTE, "num_waiting": num_waiting})
        text = f'{head[:-1]},"films":[{films}]}}'
        return Response(text, media_type="application/json", headers={"ETag": tag})

    def _text_of(self, film: Film) -> str:
        """A film as JSON, written once: with 5,000 films that takes half a second."""
        if (text := self._texts.get(film)) is None:
            text = self._texts[film] = _text(film_json(film))
        return text

    async def list_as_csv(self, request: Request) -> Response:
        """The list as a table."""
        films = self._service.worklist.films()
        outputs = self._service.models.pipeline.outputs
        names = dict.fromkeys(output.name for output in outputs)
        for film in films:  # an earlier run may have looked for others
            names |= dict.fromkeys(film.row.probabilities)
        columns = ["name", "received", "source", "decision", "reason"]
        columns += [f"probability_{name}" for name in names] + ["model"]
        rows = [
            {
                "name": film.name,
                "received": film.received.isoformat(timespec="seconds"),
                "source": film.source,
                "decision": film.row.decision,
                "reason": film.row.reason,
                "model": film.row.model,
                **{f"probability_{name}": p for name, p in film.row.probabilities.items()},
            }
            for film in films
        ]
        text = to_csv(columns, rows)
        headers = {"Content-Disposition": 'attachment; filename="films.csv"'}
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)

    async def get_film(self, request: Request) -> Response:
        """One film's row."""
        return _json(film_json(self._film(request)))

    async def delete_film(self, request: Request) -> Response:
        """Forget a film."""
        if not self._service.worklist.remove(request.path_params["id"]):
            raise HTTPException(404, "there is no such film, or not any more")
        return Response(status_code=204)

    async def get_image(self, request: Request) -> Response:
        """The film at its own resolution."""
        return await self._picture(draw_whole, self._readable(request))

    async def get_thumbnail(self, request: Request) -> Response:
        """The film, small."""
        return await self._picture(draw_thumbnail, self._readable(request))

    async def get_heat(self, request: Request) -> Response:
        """A heat map of the evidence for a class or finding."""
        film = self._readable(request)
        names = [output.name for output in film.pipeline.outputs]
        name = request.query_params.get("of", film.row.highest(1)[0])
        if name not in names:
            raise HTTPException(404, f"of is one of {', '.join(names)}")
        scorer = self._service.scorer
        heat = await asyncio.wrap_future(scorer.explain(film.pipeline, film.data, name))
        return await self._picture(functools.partial(draw_heat, heat), film)

    def _film(self, request: Request) -> Film:
        film = self._service.worklist.get(request.path_params["id"])
        if film is None:
            raise HTTPException(404, "there is no such film, or not any more")
        return film

    def _readable(self, request: Request) -> Film:
        film = self._film(request)
        if not film.row.is_readable:
            raise HTTPException(409, f"the film has no image: it {film.row.reason}")
        return film

    async def _picture(self, draw: Callable[[Film], bytes], film: Film) -> Response:
        drawn = await asyncio.wrap_future(self._service.scorer.in_background(draw, film))
        return Response(drawn, media_type="image/png")

    # -------------------------------------------------------------------------- models

    async def get_model(self, request: Request) -> Response:
        """What is known of the models."""
        return _json(card_json(self._service.models.card()))

    async def reload(self, request: Request) -> Response:
        """Load the runs again, or other runs from the same place."""
        async with _in_time():
            body = await request.body() if _is_short(request) else b"too long"
        try:
            given = json.loads(body or b"{}")
            names = given.get("runs", [])
            if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
                raise ValueError("no list of names")
        except (ValueError, AttributeError, RecursionError):
            raise HTTPException(400, 'send nothing, or {"runs": ["ID"]}') from None
        async with self._reloading:
            try:
                models = await asyncio.to_thread(self._service.reload, names)
            except XraiError as error:
                raise HTTPException(409, printable(str(error))) from None
        return _json(card_json(models.card()))

    # ------------------------------------------------------------------------- session

    async def login(self, request: Request) -> Response:
        """Give a browser that knows the token its cookie."""
        if not _is_short(request):
            raise RequestError(413, "the form is too long")
        async with _in_time(), request.form(max_files=0, max_fields=4) as form:
            given = str(form.get("token", ""))
        if not self._token or not is_secret(given, self._token):
            await asyncio.sleep(1)
            return RedirectResponse("/login?wrong", status_code=303)
        response = RedirectResponse("/", status_code=303)
        # TLS may end at a proxy: only the browser's origin tells
        is_https = request.headers.get("origin", "").startswith("https://")
        response.set_cookie(
            COOKIE,
            session_of(self._token),
            max_age=_SESSION_S,
            httponly=True,
            samesite="strict",
            secure=is_https,
        )
        return response

    async def logout(self, request: Request) -> Response:
        """Delete the browser's cookie."""
        response = RedirectResponse("/login", status_code=303)
        response.delete_cookie(COOKIE)
        return response

    # ------------------------------------------------------------------------- machine

    async def is_alive(self, request: Request) -> Response:
        """Whether the process answers."""
        return _json({"status": "alive"})

    async def is_ready(self, request: Request) -> Response:
        """Whether films can be scored: the models are loaded, checked and tried."""
        parts = {name: is_running() for name, is_running in self._service.parts.items()}
        said = {"run": self._service.models.pipeline.run_id, **parts}
        if not self._service.scorer.is_running:
            return _json({"status": "stopping", **said}, 503)
        if not all(parts.values()):
            return _json({"status": "broken", **said}, 503)
        return _json({"status": "ready", **said})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        text = self._service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """What this interface takes and answers."""
        return JSONResponse(_openapi())


def film_json(film: Film) -> dict[str, object]:
    """A film as JSON: the row that `xrai predict` gives, and what the page shows."""
    row = film.row
    width, height = film.size or (None, None)
    window = film.window
    return {
        "id": film.id,
        "name": film.name,
        "source": film.source,
        "received": film.received.isoformat(timespec="milliseconds"),
        "expires": film.expires.isoformat(timespec="milliseconds"),
        "decision": row.decision,
        "reason": row.reason,
        "is_positive": film.is_positive,
        "score": film.score,
        "score_of": film.score_of,
        "calls": list(row.calls),
        "probabilities": dict(row.probabilities),
        "thresholds": dict(row.thresholds),
        "prior": dict(row.prior),
        "disagreement": row.disagreement,
        "model": row.model,
        "width": width,
        "height": height,
        "window": asdict(window) if window else None,
    }


def card_json(card: Card) -> dict[str, object]:
    """A model's card as JSON."""
    return {**asdict(card), "outputs": [asdict(output) for output in card.outputs]}


@functools.cache
def _openapi() -> dict[str, object]:
    text = importlib.resources.files("xrai.serving").joinpath("openapi.yaml").read_text("utf-8")
    found: dict[str, object] = yaml.safe_load(text)
    return found | {"info": {**found["info"], "version": __version__}}  # type: ignore[dict-item]


def _text(content: dict[str, object]) -> str:
    """As `JSONResponse` writes it."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _json(content: dict[str, object], status: int = 200) -> JSONResponse:
    return JSONResponse({"schema_version": SCHEMA_VERSION, "note": NOTE, **content}, status)


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """The time for a short body. Raises `RequestError` if it is late, or the client leaves."""
    try:
        async with asyncio.timeout(_FORM_S):
            yield
    except TimeoutError:
        raise RequestError(408, "the body comes too slowly") from None
    except ClientDisconnect:
        raise RequestError(400, "the client left before its body was whole") from None


def _is_short(request: Request) -> bool:
    stated = request.headers.get("content-length", "0")
    return (
        stated.isdecimal()
        and int(stated) <= _MAX_JSON_BYTES
        and "transfer-encoding" not in request.headers
    )


def _words_of(error: BaseException) -> str:
    if isinstance(error, XraiError):
        return printable(str(error))
    _logger.error("a film could not be scored: %s", place_of(error))
    return "the film could not be scored: the server failed"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


async def _refused_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    await discard(request)
    headers = {"Connection": "close"}  # more of the body may follow
    if error.status in _RETRY_S:
        headers["Retry-After"] = _RETRY_S[error.status]
    return JSONResponse({"detail": str(error)}, error.status, headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "the server failed; its log says how"}, 500)
