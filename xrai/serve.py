"""Score films as they come, with a finished run: `python -m xrai.serve --run URI/ID`.

It serves a page, which lists the most urgent film first, and an HTTP interface
(docs/serve.md). Films are held in memory alone, for --lifetime_min minutes. An address that other
machines reach needs a token, in the environment variable XRAI_SERVE_TOKEN.
"""

import gc
import os
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from xrai.command import PRIOR, RUNS, Flag, parse, run_command
from xrai.errors import UserError
from xrai.log import Heartbeat, get_logger, setup_logging
from xrai.serving.dicom_flags import DICOM_FLAGS

if TYPE_CHECKING:
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
    *DICOM_FLAGS,
)
_MIN_TOKEN = 16  # characters
_KEEP_ALIVE_S = 20
_MAX_CONNECTIONS = 512
_SWITCH_S = 0.001  # that a thread waits for another one's Python code; Python's 5 ms add up
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
    try:
        import uvicorn

        from xrai.serving.connections import Connection
        from xrai.serving.dicom import DicomSide, read_options
        from xrai.serving.films import Worklist
        from xrai.serving.http import Limits, make_app
        from xrai.serving.models import load_models
        from xrai.serving.page import page_routes
        from xrai.serving.service import Service
    except ImportError as error:
        raise UserError(
            f"xrai serve needs {error.name}, which is not installed: pip install 'xrai[serve]'"
        ) from error
    dicom = read_options(flags)
    load = partial(load_models, prior=flags["prior"] or None)
    worklist = Worklist(
        max_films=flags["max_films"],
        max_bytes=int(flags["max_gib"] * 2**30),
        lifetime_s=flags["lifetime_min"] * 60,
    )
    with listen(flags["host"], flags["port"]) as server_socket:
        service = Service(load(runs), runs, load, worklist, config.train.threads)
        if dicom:
            DicomSide(dicom, service).start()
        body = flags["max_body_mib"] << 20
        limits = Limits(body, 2 * body, _MAX_REQUESTS, _MAX_REQUESTS_PER_CLIENT)
        app = make_app(service, token=token, limits=limits, pages=page_routes())
        settings = uvicorn.Config(
            app,
            http=Connection,
            access_log=False,  # which names films
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=flags["stop_s"],
            limit_concurrency=_MAX_CONNECTIONS,
            callback_notify=partial(_beat, worklist),
            timeout_notify=_BEAT_S,
        )
        host, port = server_socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        gc.freeze()  # else a collection looks through all of torch, which takes 0.1 s
        sys.setswitchinterval(_SWITCH_S)
        run_id = service.models.pipeline.run_id
        _logger.info("run %s is served at http://%s:%d/", run_id, shown, port)
        uvicorn.Server(settings).run(sockets=[server_socket])


async def _beat(worklist: "Worklist") -> None:
    """Forget films whose time is over, also where nobody asks for the list; touch the file of
    XRAI_HEARTBEAT, which a container's check looks at.
    """
    worklist.forget_expired()
    Heartbeat().beat()


def check_flags(flags: dict[str, Any]) -> None:
    """Raise `UserError` for a number that is none of those allowed."""
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
    if token and (len(token) < _MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(f"{TOKEN} must have {_MIN_TOKEN} printable ASCII characters or more")
    return token


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
