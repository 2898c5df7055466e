"""docker/entrypoint, with stand-ins for the programs that it starts."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that write down how they were started; CHECK_STATUS is the exit
    status of a check.
    """
    for name in ("python", "torchrun", "tensorboard"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/bash\necho "{name} $*"\n[[ " $* " != *" --check "* ]] || exit "${{CHECK_STATUS:-0}}"\n'
        )
        program.chmod(0o755)
    return tmp_path


def enter(programs: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REPOSITORY / "docker/entrypoint"), *arguments],
        env={"PATH": f"{programs}:{os.environ['PATH']}", **environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("word", ["preprocess", "evaluate", "predict", "verify", "export"])
def test_a_command_is_started_with_its_arguments(programs: Path, word: str):
    assert enter(programs, word, "--a=b c", "d").stdout == f"python -m xrai.{word} --a=b c d\n"


def test_other_words_start_what_they_name(programs: Path):
    assert enter(programs, "phantom", "--out=x").stdout == "python -m xrai.phantom --out=x\n"
    assert enter(programs, "wait").stdout == "python -m wait_for_dataset\n"
    assert enter(programs, "python", "-c", "1").stdout == "python -c 1\n"
    assert enter(
        programs, "tensorboard", "--reload_interval=5", XRAI_ARTIFACTS="s3://b/runs"
    ).stdout == (
        "tensorboard --logdir s3://b/runs --host 0.0.0.0 --port 6006 --reload_interval=5\n"
    )


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/"])
def test_a_whole_bucket_is_refused_where_tensorboard_would_show_nothing(
    programs: Path, address: str
):
    done = enter(programs, "tensorboard", XRAI_ARTIFACTS=address)
    assert done.returncode == 2 and "must be s3://bucket/prefix" in done.stderr and not done.stdout


def test_training_without_flags_of_torchrun_is_one_process(programs: Path):
    assert (
        enter(programs, "train", "--train.epochs=3").stdout
        == "python -m xrai.train --train.epochs=3\n"
    )


def test_flags_of_torchrun_are_told_from_those_of_training_wherever_they_stand(programs: Path):
    own = ["--config=c.yaml", "--train.epochs=3", "--run_id", "x"]
    launch = [
        "--nnodes=2", "--nproc_per_node=4", "--rdzv_backend=c10d", "--rdzv-endpoint=a:29400", "--max_restarts=3",
        "--node_rank=1", "--master_addr=a", "--rdzv_conf=timeout=9", "--shutdown-timeout=60",
    ]  # fmt: skip
    said = enter(programs, "train", *own[:2], *launch, *own[2:]).stdout.splitlines()
    assert said == [
        f"python -m xrai.train --check {' '.join(own)}",
        f"torchrun {' '.join(launch)} -m xrai.train {' '.join(own)}",
    ]


def test_a_single_machine_is_found_without_a_network(programs: Path):
    said = enter(programs, "train", "--standalone", "--nproc_per_node=2", XRAI_PREFLIGHT="0").stdout
    assert said == "torchrun --standalone --local_addr=localhost --nproc_per_node=2 -m xrai.train\n"


def test_variables_of_torchrun_start_it_too(programs: Path):
    said = enter(programs, "train", PET_NNODES="2", XRAI_PREFLIGHT="0").stdout
    assert said == "torchrun -m xrai.train\n"


def test_a_check_needs_no_torchrun(programs: Path):
    said = enter(
        programs, "train", "--nproc_per_node=4", "--check", "--config=c", PET_NNODES="2"
    ).stdout
    assert said == "python -m xrai.train --check --config=c\n"


@pytest.mark.parametrize("status", [1, 2])
def test_a_check_that_fails_ends_it_with_its_own_status(programs: Path, status: int):
    done = enter(programs, "train", "--standalone", CHECK_STATUS=str(status))
    assert (done.returncode, done.stdout) == (status, "python -m xrai.train --check\n")


@pytest.mark.parametrize("flag", ["--nproc_per_node", "--nnodes", "--rdzv_endpoint"])
def test_a_flag_without_its_value_is_refused(programs: Path, flag: str):
    done = enter(programs, "train", flag, "2")
    assert done.returncode == 2 and f"write {flag}=VALUE" in done.stderr and not done.stdout


def test_an_unknown_word_is_refused_and_none_is_a_question(programs: Path):
    done = enter(programs, "trian")
    assert (
        done.returncode == 2 and "unknown word 'trian'; allowed: preprocess, train" in done.stderr
    )
    assert enter(programs).stdout == enter(programs, "--help").stdout
    assert enter(programs).stdout.startswith("What a container runs")


def test_it_is_alive_from_its_start_and_while_the_file_is_young(programs: Path, tmp_path: Path):
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
