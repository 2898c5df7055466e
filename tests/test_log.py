"""The sign of life: lines and steps touch the file that XRAI_HEARTBEAT names."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

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


def test_a_heartbeat_that_can_not_be_written_is_refused_at_the_start_and_missing_later(
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


def test_text_from_outside_cannot_control_a_terminal() -> None:
    assert log.printable("a\x1b[31mb\nc\u202ed é") == "a\ufffd[31mb\ufffdc\ufffdd é"
