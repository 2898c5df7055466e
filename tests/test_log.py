"""The sign of life, which is the file that XRAI_HEARTBEAT names; and standard streams that are
closed, full or of another encoding.
"""

import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xrai import log
from xrai.errors import ConfigError


@pytest.fixture(autouse=True)
def _keep_handlers() -> Iterator[None]:
    logger = logging.getLogger("xrai")
    kept, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = kept
    logger.setLevel(level)


@pytest.fixture
def heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "heartbeat"
    monkeypatch.setenv("XRAI_HEARTBEAT", str(path))
    return path


def make_old(path: Path) -> None:
    path.touch()
    os.utime(path, (1e9, 1e9))


def is_old(path: Path) -> bool:
    return path.stat().st_mtime == 1e9


def test_a_command_beats_when_it_begins(heartbeat: Path) -> None:
    log.setup_logging()
    assert heartbeat.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_beats_on_every_rank_on_a_terminal_and_elsewhere(
    heartbeat: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    log.setup_logging(rank=rank)
    for is_terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal)
        make_old(heartbeat)
        with log.progress("epoch", total=3, unit="steps") as bar:
            assert is_old(heartbeat)
            bar.update()
            assert not is_old(heartbeat)


def test_a_line_beats_a_second_after_the_last_beat(
    heartbeat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    log.setup_logging()
    make_old(heartbeat)
    log.get_logger("xrai.x").info("at once")
    assert is_old(heartbeat)
    now = 101.5
    log.get_logger("xrai.x").info("later")
    assert not is_old(heartbeat)


def test_many_steps_touch_the_file_once_a_second(
    heartbeat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, touched = 100.0, []
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(Path, "touch", lambda path: touched.append(now))
    with log.progress("epoch", total=None, unit="steps", closing_line=False) as bar:
        for _ in range(1000):
            bar.update()
            now += 0.01
    assert len(touched) == 10


def test_a_heartbeat_that_cannot_be_written_is_refused_at_the_start_and_missing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "missing" / "heartbeat"
    monkeypatch.setenv("XRAI_HEARTBEAT", str(path))
    with pytest.raises(
        ConfigError, match=r"XRAI_HEARTBEAT = .*missing/heartbeat cannot be written"
    ):
        log.setup_logging()
    with log.progress("epoch", total=1, unit="steps", closing_line=False) as bar:
        bar.update()
    assert not path.exists()


def test_without_a_name_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log.setup_logging()
    with log.progress("epoch", total=1, unit="steps") as bar:
        bar.update()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("done", "step_s", "line"),
    [
        (0, 2.5, "epoch: 4/64 steps in 10.0 s, 0.40 steps/s, 150 s left"),
        (51, 2.5, "epoch: 55/64 steps in 10.0 s, 0.40 steps/s, 22 s left"),
        (0, 0.5, "epoch: 20/64 steps in 10.0 s, 2.0 steps/s, 22 s left"),
        (4, 0.25, "epoch: 44/64 steps in 10.0 s, 4.0 steps/s, 5 s left"),
    ],
)
def test_progress_goes_on_where_an_earlier_process_ended(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    done: int,
    step_s: float,
    line: str,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    log.setup_logging()
    with (
        caplog.at_level("INFO", "xrai.progress"),
        log.progress("epoch", total=64, unit="steps", closing_line=False, done=done) as bar,
    ):
        while not caplog.messages:
            now += step_s
            bar.update()
    assert caplog.messages == [line]


def test_text_from_outside_cannot_control_a_terminal() -> None:
    assert log.printable("a\x1b[31mb\nc\u202ed é") == "a\ufffd[31mb\ufffdc\ufffdd é"


def test_a_log_line_is_one_line_whatever_a_file_is_called(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.setup_logging()
    log.get_logger("xrai.x").warning("%s is excluded", "a.png\n12:00:00 INFO all is well\x1b[1A")
    line = capsys.readouterr().err
    assert line.endswith("a.png\ufffd12:00:00 INFO all is well\ufffd[1A is excluded\n")


# ------------------------------------------------------------------------------ standard streams


def end_of(body: str, redirected: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """How a command with this body ends, its streams redirected as a shell does it."""
    script = (
        "import sys; from xrai.command import run_command; from xrai.log import progress\n"
        f"def body():\n    {body}\n"
        "run_command(body)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = ["sh", "-c", f'"$@" {redirected}', "sh", sys.executable, "-c", script]
    return subprocess.run(command, text=True, timeout=60, check=False, **pipes)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "93.1\u201396.2 \xe9 \ufffd"),
        ("latin-1", r"93.1\u201396.2 \xe9 \ufffd".replace(r"\xe9", "\xe9")),
        ("ascii", r"93.1\u201396.2 \xe9 \ufffd"),
    ],
)
def test_what_the_encoding_of_a_stream_lacks_is_written_as_its_escape(
    encoding: str, shown: str
) -> None:
    body = r"for file in (sys.stdout, sys.stderr): print('93.1\u201396.2 \xe9 \udcff', file=file)"
    strict = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    done = end_of(body, env=strict, encoding=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{shown}\n", f"{shown}\n")


@pytest.mark.parametrize(
    "redirected", ["1>&-", "2>&-", "1>&- 2>&-", "1</dev/null 2</dev/null", "2>/dev/full"]
)
def test_a_closed_stream_does_not_end_a_job(redirected: str, tmp_path: Path) -> None:
    loud = "for file in (sys.stdout, sys.stderr): print('x' * 10**5, file=file, flush=True)"
    body = f"{loud}\n    with progress('a', total=1, unit='b') as bar: bar.update()"
    done = end_of(f"{body}\n    open({str(tmp_path / 'done')!r}, 'x')", redirected)
    assert (done.returncode, (tmp_path / "done").exists()) == (0, True)


def test_a_reader_that_leaves_does_not_end_a_job() -> None:
    body = "print('x' * 10**5); print('y' * 10**5, file=sys.stderr)"
    reader, writer = os.pipe()
    os.close(reader)
    assert end_of(body, stdout=writer, stderr=writer).returncode == 0
    os.close(writer)
    terminal, other_end = pty.openpty()
    os.close(terminal)  # as a terminal does that is hung up
    bar = "with progress('a', total=1, unit='b') as bar: bar.update()"
    assert end_of(f"{bar}; {body}", stdout=other_end, stderr=other_end).returncode == 0
    os.close(other_end)


def test_a_full_disk_below_stdout_is_told_at_the_end(tmp_path: Path) -> None:
    body = f"print('x' * 10**5, flush=True); open({str(tmp_path / 'done')!r}, 'x')"
    done = end_of(body, "1>/dev/full")
    said = "xrai: error: stdout cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert (tmp_path / "done").exists()
    assert end_of("print('x'); sys.exit(0)", "1>/dev/full").returncode == 1


def test_a_stream_that_another_process_made_non_blocking_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(["sh", "-c", "sleep 0.2; wc -c"], stdin=reader, stdout=-1) as slow:
        assert end_of("print('x' * 10**6)", stdout=writer).returncode == 0
        os.close(writer), os.close(reader)
        assert slow.communicate()[0].split() == [b"1000001"]


def test_nothing_that_is_printed_controls_a_terminal() -> None:
    body = r"print('a\x1b]0;b\x07\tc\u202ed'); raise SystemExit(3)"
    done = end_of(body)
    assert (done.returncode, done.stdout) == (3, "a\ufffd]0;b\ufffd\tc\ufffdd\n")
    error = r"from xrai.errors import UserError; raise UserError('\x1b[2J\nno')"
    assert end_of(error).stderr == "xrai: error: \ufffd[2J no\n"
