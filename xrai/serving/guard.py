"""Access control: a token, the page's own origin, and headers that make browsers enforce it."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from xrai.serving.uploads import discard

COOKIE: Final = "xrai_session"
_OPEN = ("/healthz", "/readyz", "/login", "/openapi.json")  # to everybody; they hold no film
_OPEN_BELOW = "/page/"
# A name or an address, and perhaps a port (RFC 9110, 7.2); nothing else, such as a user's name
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::[0-9]*)?", re.IGNORECASE)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """ASGI middleware in front of all routes. With an empty token, whoever reaches the address may
    ask, and the address must be this machine's own.
    """

    app: ASGIApp
    token: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", ()))
                names = {name for name, _ in own}
                message["headers"] = own + [each for each in _RAW_HEADERS if each[0] not in names]
            await send(message)

        refusal = self._refusal(HTTPConnection(scope))
        if refusal is not None:
            await discard(Request(scope, receive))
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        headers, method = request.headers, request.scope["method"]
        if not self.token and not _is_loopback_address(headers.get("host", "")):
            # else another site could point a host name of its own here (DNS rebinding)
            return _refuse(421, "this server answers to localhost alone")
        if method not in ("GET", "HEAD", "OPTIONS") and not _is_own_origin(headers):
            return _refuse(403, "the request comes from a page of another site")
        path = request.scope["path"]
        if not self.token or path in _OPEN or path.startswith(_OPEN_BELOW):
            return None
        if self.knows(request):
            return None
        if path == "/" and method == "GET":
            return RedirectResponse("/login", status_code=303)
        return _refuse(
            401, "give the token as Authorization: Bearer …", {"WWW-Authenticate": "Bearer"}
        )

    def knows(self, request: HTTPConnection) -> bool:
        """Whether a request carries the token, or the cookie of a browser that gave it."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and is_secret(given.strip(), self.token):
            return True
        return is_secret(request.cookies.get(COOKIE, ""), session_of(self.token))


def session_of(token: str) -> str:
    """The cookie of browsers that gave the token."""
    return hmac.new(token.encode(), b"session of the page", hashlib.sha256).hexdigest()


def is_secret(given: str, expected: str) -> bool:
    """Whether a token or cookie is the right one, compared in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


@lru_cache(16)
def _is_loopback_address(host: str) -> bool:
    """Whether the header `Host` names this machine, with or without a port."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].lower())


def _is_own_origin(headers: Headers) -> bool:
    """Whether a request that changes something comes from the page, or from no page at all."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        return False


def _refuse(status: int, words: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": words}, status, headers)
