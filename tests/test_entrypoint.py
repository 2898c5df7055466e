"""docker/entrypoint, with stand-ins for the programs that it starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xrai.ingest.patients import PatientKey

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that write down how they were started."""
    for name in ("python", "torchrun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\necho "{name} $*"\n')
        program.chmod(0o755)
    return tmp_path


def enter(
    programs: Path, *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REPOSITORY / "docker/entrypoint"), *arguments],
        env={"PATH": f"{programs}:{os.environ['PATH']}", **environment},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("word", ["preprocess", "train", "phantom", "an-unknown-word"])
def test_words_go_to_the_package_with_their_arguments(programs: Path, word: str) -> None:
    assert enter(programs, word, "--a=b c", "d").stdout == f"python -m xrai {word} --a=b c d\n"


def test_other_words_start_what_they_name(programs: Path) -> None:
    assert enter(programs, "wait", "--config=c.yaml").stdout == (
        "python -m wait_for_dataset --config=c.yaml\n"
    )
    assert enter(programs, "python", "-c", "1").stdout == "python -c 1\n"
    assert enter(
        programs, "tensorboard", "--reload_interval=5", XRAI_ARTIFACTS="s3://b/runs"
    ).stdout == (
        "python -m serve_tensorboard --logdir s3://b/runs --host 0.0.0.0 --port 6006 "
        "--reload_interval=5\n"
    )


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/"])
def test_a_whole_bucket_is_refused_where_tensorboard_would_show_nothing(
    programs: Path, address: str
) -> None:
    done = enter(programs, "tensorboard", XRAI_ARTIFACTS=address)
    assert done.returncode == 2 and "must be s3://bucket/prefix" in done.stderr and not done.stdout


def test_help_is_that_of_the_package_and_of_the_containers_own_words(programs: Path) -> None:
    said = enter(programs, "--help").stdout
    assert said.startswith("python -m xrai --help\n") and "tensorboard   shows" in said
    assert enter(programs).stdout == said


def test_it_is_alive_from_its_start_and_while_the_file_is_young(
    programs: Path, tmp_path: Path
) -> None:
    heartbeat = tmp_path / "heartbeat"
    name = {"XRAI_HEARTBEAT": str(heartbeat)}
    assert enter(programs, "healthy", **name).returncode == 1  # there is no such file
    enter(programs, "verify", **name)
    assert enter(programs, "healthy", **name).returncode == 0
    os.utime(heartbeat, (1e9, 1e9))
    assert enter(programs, "healthy", **name).returncode == 1
    assert (
        enter(programs, "healthy", XRAI_HEARTBEAT_MAX_AGE_S="99999999999", **name).returncode == 0
    )


def test_waiting_for_a_time_that_is_none_is_refused_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "docker/wait_for_dataset.py"],
        env={**os.environ, "XRAI_DATASET": "/nowhere", "XRAI_WAIT_S": "soon"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "xrai: error: XRAI_WAIT_S = 'soon' is not allowed: it takes a number of seconds above 0\n"
    )


def test_a_mistake_in_the_config_ends_the_wait_before_it_begins(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("train: {epoch: 3}\n")
    done = subprocess.run(
        [sys.executable, REPOSITORY / "docker/wait_for_dataset.py", f"--config={config}"],
        env={**os.environ, "XRAI_DATASET": "/nowhere"},  # it would be waited for
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("xrai: error: ") and "train.epoch" in line


def test_a_key_of_patients_is_kept_and_put_back_as_the_docs_say(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs/running.md").read_text().replace("\\\n", "")
    found = re.findall(r"run --rm -T --no-deps preprocess (bash -C?c) +'(.*)'", text)
    preprocess = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]["preprocess"]
    assert preprocess["environment"]["XDG_CONFIG_HOME"] == "/cache"  # for xrai/patient.key
    assert "keys:/cache" in preprocess["volumes"]
    cache = tmp_path / "cache"
    cache.mkdir()

    def call(number: int, given: str = "") -> tuple[bool, str]:
        words, script = found[number]
        script = script.replace("/cache", str(cache))
        done = enter(programs, *words.split(), script, stdin=given)
        return done.returncode == 0, done.stdout + done.stderr

    keep, put_back, remove = range(3)
    assert call(put_back, "a key of 16 bytes\n") == (True, "")
    key = cache / "xrai/patient.key"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(cache))
    assert PatientKey().path == key and PatientKey(may_make=False).hash("1", group="p")
    assert key.stat().st_mode & 0o077 == 0
    assert call(keep) == (True, "a key of 16 bytes\n")
    was_put, said = call(put_back, "another key, as long")
    assert not was_put and "cannot overwrite existing file" in said
    assert key.read_text() == "a key of 16 bytes\n"
    assert call(remove) == (True, "") and call(put_back, "another key, as long") == (True, "")
