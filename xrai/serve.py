"""Score films as they come, with a finished run: `python -m xrai.serve --run URI/ID`.

It serves a page, which lists the most urgent film first, and an HTTP interface
(docs/serve.md). Films are held in memory alone, for --lifetime_min minutes. An address that other
machines reach needs a token, in the environment variable XRAI_SERVE_TOKEN.
"""

import gc
import ipaddress
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from xrai.command import PRIOR, RUNS, Flag, parse, run_command
from xrai.errors import ConfigError, UserError
from xrai.log import Heartbeat, get_logger, setup_logging
from xrai.serving.dicom_flags import DICOM_FLAGS

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from xrai.serving.films import Worklist

TOKEN = "XRAI_SERVE_TOKEN"
FLAGS = (
    RUNS,
    PRIOR,
    Flag("host", "127.0.0.1", f"address to listen on; any but this machine's own needs {TOKEN}"),
    Flag("port", 8077, "port to listen on; 0: any that is free", type=int),
    Flag("lifetime_min", 720.0, "minutes after which a film leaves memory", type=float),
    Flag("max_films", 5000, "films in the list, at most", type=int),
    Flag("max_gib", 1.0, "memory for the files of films in the list, at most, GiB", type=float),
    Flag("max_body_mib", 256, "size of a request, at most, MiB", type=int),
    Flag("stop_s", 20, "seconds for requests to end after SIGTERM", type=int),
    Flag(
        "engine",
        "auto",
        "what scores films: auto (ONNX Runtime once it is ready, where all runs on CPUs) or torch",
    ),
    Flag(
        "trusted_proxies",
        "",
        "addresses or networks of proxies, joined by commas, whose X-Forwarded-For is believed, so "
        "that their clients count one by one; empty: none",
    ),
    *DICOM_FLAGS,
)
_ENGINES = ("auto", "torch")
_MIN_TOKEN = 16  # characters
_KEEP_ALIVE_S = 20
_MAX_CONNECTIONS = 512
_SWITCH_S = 0.0002  # a thread's turn in the interpreter, if others wait; Python's 5 ms add up
_BEAT_S = 10  # between signs of life
_MAX_REQUESTS, _MAX_REQUESTS_PER_CLIENT = 64, 16
_logger = get_logger("xrai.serve")


def main() -> None:
    """Read the command line, load the runs, and answer requests until the process is stopped."""
    parsed = parse("serve", description="Score films as they come.", flags=FLAGS)
    config, flags, _ = parsed
    setup_logging()
    runs = parsed.runs
    check_flags(flags)
    token = checked_token(flags["host"], os.environ.get(TOKEN, ""))
    proxies = read_proxies(flags["trusted_proxies"])
    try:
        import uvicorn

        from xrai.serving import dicom as dicom_side
        from xrai.serving.films import Worklist
        from xrai.serving.http import Limits, make_app
        from xrai.serving.logs import log_others
        from xrai.serving.models import load_models
        from xrai.serving.page import page_routes
        from xrai.serving.service import Service
    except ImportError as error:
        raise UserError(
            f"xrai serve needs {error.name}, which is not installed: pip install 'xrai[serve]'"
        ) from error
    check_secret(dicom_side.TOKEN, os.environ.get(dicom_side.TOKEN, ""))
    dicom = dicom_side.read_options(flags)
    log_others(sys.stderr)
    load = partial(load_models, prior=flags["prior"] or None)
    worklist = Worklist(
        max_films=flags["max_films"],
        max_bytes=int(flags["max_gib"] * 2**30),
        lifetime_s=flags["lifetime_min"] * 60,
    )
    with listen(flags["host"], flags["port"]) as server_socket:
        service = Service(
            *(load(runs), runs, load, worklist, config.train.threads),
            wants_graphs=flags["engine"] == "auto",
        )
        if dicom:
            dicom_side.DicomSide(dicom, service).start()
        body = flags["max_body_mib"] << 20
        limits = Limits(body, 2 * body, _MAX_REQUESTS, _MAX_REQUESTS_PER_CLIENT)
        app = make_app(service, token=token, limits=limits, pages=page_routes())
        settings = server_settings(
            app, proxies=proxies, stop_s=flags["stop_s"], beat=partial(_beat, worklist)
        )
        host, port = server_socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        gc.freeze()  # else each full collection goes through all of torch: 0.1 s
        sys.setswitchinterval(_SWITCH_S)
        run_id = service.models.pipeline.run_id
        _logger.info("run %s is served at http://%s:%d/", run_id, shown, port)
        uvicorn.Server(settings).run(sockets=[server_socket])


def server_settings(
    app: "ASGIApp", *, proxies: list[str], stop_s: int, beat: Callable[[], Awaitable[None]]
) -> "uvicorn.Config":
    """How uvicorn serves. `beat` is called every ten seconds."""
    import uvicorn

    from xrai.serving.connections import Connection

    return uvicorn.Config(
        app,
        http=Connection,
        access_log=False,  # it would name films
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=stop_s,
        limit_concurrency=_MAX_CONNECTIONS,
        callback_notify=beat,
        timeout_notify=_BEAT_S,
    )


async def _beat(worklist: "Worklist") -> None:
    """Forget films whose time is over, also where nobody asks for the list; touch the file of
    XRAI_HEARTBEAT, which a container's check looks at.
    """
    worklist.forget_expired()
    Heartbeat().beat()


def check_flags(flags: dict[str, Any]) -> None:
    """Raise `UserError` for a value that is none of those allowed."""
    if flags["engine"] not in _ENGINES:
        raise UserError(f"--engine = {flags['engine']!r} is not allowed: it is auto or torch")
    for name, lowest, highest in (
        ("port", 0, 65535),
        ("lifetime_min", 0.01, 7 * 24 * 60),
        ("max_films", 1, 1_000_000),
        ("max_gib", 0.001, 1024),
        ("max_body_mib", 1, 4096),
        ("stop_s", 0, 3600),
    ):
        if not lowest <= flags[name] <= highest:
            raise UserError(
                f"--{name} = {flags[name]} is not allowed: it is from {lowest} to {highest}"
            )


def checked_token(host: str, token: str) -> str:
    """The token; raises `UserError` where an address needs one, or it is too easily guessed."""
    from xrai.serving.guard import is_loopback

    if not token and not is_loopback(host):
        raise UserError(
            f"--host {host} is reached from other machines, and films would be open to them: set "
            f"{TOKEN}, such as to what `openssl rand -hex 24` prints, or listen on 127.0.0.1"
        )
    check_secret(TOKEN, token)
    if token and len(token) < _MIN_TOKEN:
        raise ConfigError(f"{TOKEN} must have {_MIN_TOKEN} printable ASCII characters or more")
    return token


def check_secret(name: str, secret: str) -> None:
    """Raise `ConfigError` where a secret of the environment cannot stand in an HTTP header."""
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(
            f"{name} holds a line break, a space or another character that is none of the "
            "printable ASCII characters: a token is one word"
        )


def read_proxies(text: str) -> list[str]:
    """The networks that a flag names, joined by commas. Raises `ConfigError`."""
    try:
        return [str(ipaddress.ip_network(part.strip())) for part in text.split(",") if part]
    except ValueError as error:
        raise ConfigError(
            f"--trusted_proxies = {text!r} is not allowed: {error}; give addresses or networks, "
            "such as 10.0.0.7 or 10.0.0.0/8, joined by commas"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` where the address cannot be had."""
    try:
        found = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
        # asyncio sets this on sockets that name their protocol, which those of create_server do
        # not; without it a client waits 40 ms for the second part of each answer
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}"
        ) from error


if __name__ == "__main__":
    run_command(main)
