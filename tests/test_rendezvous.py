"""The watch over the machine at which the nodes of torchrun meet; tests/faults loses one."""

import os
import socket
import threading
import time

import pytest

from tests.distributed.ranks import free_port
from xrai import rendezvous
from xrai.errors import XraiError


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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class EndedError(Exception):
        pass

    def end(status: int) -> None:
        raise EndedError(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(rendezvous, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(rendezvous, "_SILENT_S", 0.1)
    with pytest.raises(EndedError, match="1"):
        rendezvous.watch("node0", "127.0.0.1", free_port())
    assert "rank 0's machine node0 (127.0.0.1, port " in capsys.readouterr().err
