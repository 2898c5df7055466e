"""The watch over the machine at which the nodes of torchrun meet; tests/faults loses one."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
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
    failure: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
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
    # until then torchrun says nothing
    assert "waiting for all machines of this training at node0:29400, for up to 9 s" in caplog.text


@pytest.mark.parametrize(
    ("exitcode", "data", "words"),
    [
        (-9, None, "rank 3 failed: Signal 9 (SIGKILL) received by PID 7"),
        (134, None, "rank 3 failed: exit status 134"),
        (1, "NCCL said so", "rank 3 failed: NCCL said so"),
        (1, {"message": "CorruptError: a shard", "extraInfo": {"timestamp": 1}}, "rank 3 failed: "),
    ],
)
def test_the_pod_of_a_rank_that_failed_for_good_says_of_what(
    exitcode: int, data: object, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, message = tmp_path / "error.json", tmp_path / "message"
    if data is not None:
        file.write_text(json.dumps({"message": data}))
    failed = ProcessFailure(local_rank=1, pid=7, exitcode=exitcode, error_file=str(file))

    def fail(*args: object, **options: object) -> None:
        raise ChildFailedError("xrai.train", {3: failed})

    monkeypatch.setenv("XRAI_TERMINATION_LOG", str(message))
    monkeypatch.setattr(runpy, "run_module", fail)
    monkeypatch.setattr(sys, "argv", ["rendezvous", "localhost:29400", "9"])
    with pytest.raises(ChildFailedError):  # whose words repeat the rank's traceback in the log
        rendezvous.main()
    (line,) = message.read_text().splitlines()
    assert line.startswith(words) and ("CorruptError: a shard" in line) == isinstance(data, dict)


@pytest.mark.ci
def test_a_machine_that_waited_for_others_in_vain_leaves_one_line(tmp_path: Path) -> None:
    message = tmp_path / "message"
    options = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=x", "--local_addr=127.0.0.1"]
    options += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_conf=join_timeout=2"]
    done = subprocess.run(
        [sys.executable, "-m", "xrai", "train", *options],
        env={**os.environ, "XRAI_PREFLIGHT": "0", "XRAI_TERMINATION_LOG": str(message)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "did not all come to 127.0.0.1 in time (join_timeout)" in message.read_text()


def test_a_message_that_cannot_be_left_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XRAI_TERMINATION_LOG", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["rendezvous", "node0:http", "9"])
    with pytest.raises(UserError, match="is no port"):
        rendezvous.main()
    assert f"XRAI_TERMINATION_LOG = {tmp_path}: Is a directory" in caplog.text
