"""The watch over the machine at which the nodes of torchrun meet; tests/faults loses one."""

import os
import re
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from tests.distributed.ranks import free_port
from xrai import rendezvous
from xrai.errors import UserError, XraiError


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", socket.gethostname()])
def test_this_machine_is_known_by_its_names_and_addresses(host: str) -> None:
    if host == "::1":
        try:
            socket.create_server((host, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
    assert rendezvous.is_here(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])  # RFC 5737, RFC 6761
def test_another_machine_is_not_this_one(host: str) -> None:
    assert not rendezvous.is_here(host)


def test_a_listener_that_comes_late_is_waited_for_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_TELL_EVERY_S", 0.0)
    caplog.set_level("INFO", logger="xrai")
    port, listener = free_port(), socket.socket()

    def listen() -> None:
        listener.bind(("127.0.0.1", port))
        listener.listen()

    late = threading.Thread(target=listen)
    monkeypatch.setattr(time, "sleep", lambda seconds: None if late.ident else late.start())
    with listener:
        assert rendezvous.wait_for("localhost", port, timeout_s=60) == "127.0.0.1"
    assert f"waiting for rank 0's machine localhost, port {port}: " in caplog.text


def test_a_machine_that_never_comes_is_named() -> None:
    with pytest.raises(XraiError, match="for rank 0's machine localhost, at"):
        rendezvous.wait_for("localhost", free_port(), timeout_s=0)


def test_a_machine_that_no_longer_answers_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class EndedError(Exception):
        pass

    def end(status: int) -> None:
        raise EndedError(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(rendezvous, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(rendezvous, "_SILENT_S", 0.1)
    monkeypatch.setenv("XRAI_TERMINATION_LOG", str(tmp_path / "message"))
    with pytest.raises(EndedError, match="1"):
        rendezvous.watch("node0", "127.0.0.1", free_port())
    assert "rank 0's machine node0 (127.0.0.1, port " in capsys.readouterr().err
    assert (tmp_path / "message").read_text().startswith("rank 0's machine node0 (127.0.0.1, ")


# Two are raised without a word (torch 2.13)
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RendezvousTimeoutError(), "did not all come to node0 in time (join_timeout)"),
        (RendezvousClosedError(), "another machine has ended this training"),
        (RendezvousConnectionError("gone\nfor good"), "rank 0's machine node0, .* (gone): its own"),
        (DistNetworkError(), "has ended or cannot be reached (DistNetworkError)"),
        (SignalException("", signal.SIGTERM), "stopped by SIGTERM: "),
    ],
)
def test_what_ends_torchrun_is_one_line_in_the_log_and_for_the_pod(
    failure: Exception, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise failure

    message = tmp_path / "message"
    monkeypatch.setenv("XRAI_TERMINATION_LOG", str(message))
    monkeypatch.setattr(runpy, "run_module", fail)
    monkeypatch.setattr(rendezvous, "is_here", lambda host: True)
    monkeypatch.setattr(sys, "argv", ["rendezvous", "node0:29400", "9", "--nnodes=2"])
    pattern = re.escape(words).replace(re.escape(".*"), ".*")
    with pytest.raises(XraiError, match=pattern) as caught:
        rendezvous.main()
    assert message.read_text().splitlines() == [str(caught.value)]


def test_a_message_that_cannot_be_left_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XRAI_TERMINATION_LOG", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["rendezvous", "node0:http", "9"])
    with pytest.raises(UserError, match="is no port"):
        rendezvous.main()
    assert f"XRAI_TERMINATION_LOG = {tmp_path}: Is a directory" in caplog.text
