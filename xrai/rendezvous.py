"""torchrun with a watchdog for the machine that hosts its rendezvous.

`xrai train` starts it in place of torchrun where `--rdzv_endpoint` names another machine:
`python -m xrai.rendezvous HOST:PORT TIMEOUT_S OPTIONS…`. torchrun's calls to the store at the
endpoint have no deadline. If that machine vanishes (power, network), they end when TCP gives up,
after 16 minutes, and until then SIGTERM is not handled either (seen with torch 2.13). So a thread
tries to connect to the machine now and then, and ends the process when it gets no answer for 40 s.
"""

import os
import runpy
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from xrai.command import run_command
from xrai.errors import UserError, XraiError
from xrai.log import get_logger, setup_logging

DEFAULT_PORT = 29400  # torchrun's for the backend c10d
_ASK_EVERY_S = 5.0
_ANSWER_WITHIN_S = 5.0  # for one attempt to connect
_SILENT_S = 40.0  # of the machine, before the process ends
_TELL_EVERY_S = 30.0
_logger = get_logger("xrai.rendezvous")


def main() -> None:
    """Wait until the endpoint answers, then become torchrun. Raises `XraiError` after TIMEOUT_S,
    and where the machines lose each other.
    """
    setup_logging()
    endpoint, timeout_s, *options = sys.argv[1:]
    try:
        meet(endpoint, options, timeout_s=float(timeout_s))
    except XraiError as error:
        leave_message(str(error))
        raise


def meet(endpoint: str, options: list[str], *, timeout_s: float) -> None:
    """Run torchrun with these options; if another machine hosts its store, watch that machine."""
    host, _, port = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", "")
    host = host.removeprefix("[").removesuffix("]")
    if port and not port.isdecimal():
        raise UserError(f"--rdzv_endpoint = {endpoint}: {port!r} is no port")
    if not is_here(host):
        number = int(port or DEFAULT_PORT)
        address = wait_for(host, number, timeout_s=timeout_s)
        watching = threading.Thread(target=watch, args=(host, address, number), daemon=True)
        watching.start()
    from xrai.learning.distributed import (  # here: it loads torch
        TORCHRUN_FAILURES,
        RanksFailed,
        explain_ranks,
        explain_torchrun,
    )

    _logger.info(
        "waiting for all machines of this training at %s, for up to %.0f s (join_timeout)",
        endpoint,
        timeout_s,
    )
    sys.argv = ["torchrun", *options]
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except RanksFailed as error:
        leave_message(explain_ranks(error))
        raise
    except TORCHRUN_FAILURES as error:
        raise XraiError(explain_torchrun(error, host=host)) from error


def leave_message(text: str) -> None:
    """Write why the process ends to the file that XRAI_TERMINATION_LOG names, if it names one.

    `kubectl describe pod` then shows this line, in place of the end of the log: a traceback, or C++
    frames of torch where its store is gone (seen with 2.13).
    """
    if path := os.environ.get("XRAI_TERMINATION_LOG"):
        try:
            Path(path).write_text(" ".join(text.split()) + "\n")
        except OSError as error:
            _logger.warning("XRAI_TERMINATION_LOG = %s: %s", path, error.strerror)


def is_here(host: str) -> bool:
    """Whether a host is this machine, so that torchrun hosts the store in this process.

    A machine knows its full name before DNS does; a socket can only be bound to its own addresses.
    """
    if host in (socket.gethostname(), socket.getfqdn()):
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_is_own(family, address) for family, _, _, _, address in found)


def _is_own(family: int, address: tuple[object, ...]) -> bool:
    with socket.socket(family) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def wait_for(host: str, port: int, *, timeout_s: float) -> str:
    """Wait until something listens at the endpoint, and return its address; the wait is logged.

    The name is resolved anew each time, since a pod that replaces another has another address.
    Raises `XraiError` after `timeout_s`.
    """
    began = time.monotonic()
    told = began - _TELL_EVERY_S / 2
    while True:
        try:
            with socket.create_connection((host, port), timeout=_ANSWER_WITHIN_S) as connection:
                address: str = connection.getpeername()[0]
                return address
        except OSError as error:
            cause = error.strerror or str(error)
        now = time.monotonic()
        if now - began > timeout_s:
            raise XraiError(
                f"waited {timeout_s:.0f} s (join_timeout) for rank 0's machine {host}, at whose "
                f"port {port} the machines of this training meet: {cause}"
            )
        if now - told >= _TELL_EVERY_S:
            _logger.info("waiting for rank 0's machine %s, port %d: %s", host, port, cause)
            told = now
        time.sleep(1.0)


def watch(host: str, address: str, port: int) -> NoReturn:
    """End the process when the machine has not answered for 40 s.

    It watches the address to which torchrun connected at the start: the name may lead to another
    machine by now. The ranks end with their parent, see `follow_parent`.
    """
    heard = time.monotonic()
    while True:
        time.sleep(_ASK_EVERY_S)
        try:
            with socket.create_connection((address, port), timeout=_ANSWER_WITHIN_S):
                heard = time.monotonic()
                continue
        except OSError as error:
            cause = error.strerror or str(error)
        if (silent_s := time.monotonic() - heard) > _SILENT_S:
            text = (
                f"rank 0's machine {host} ({address}, port {port}) has not answered for "
                f"{silent_s:.0f} s: {cause}; this process ends, and the training resumes when all "
                "machines have been started again"
            )
            leave_message(text)
            print(f"xrai: error: {text}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may hang in a call that nothing interrupts


if __name__ == "__main__":
    run_command(main)
