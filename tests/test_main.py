"""The command `xrai`: its words, and how `xrai train` becomes torchrun."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.training import SMALL, Finished
from xrai import __main__ as program
from xrai import __version__

REPOSITORY = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` to its end."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_every_word_is_a_command_and_every_command_a_word() -> None:
    commands = {
        path.stem if path.stem != "__main__" else path.parent.name
        for path in [*REPOSITORY.glob("xrai/*.py"), *REPOSITORY.glob("xrai/*/__main__.py")]
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert commands - {"xrai", "rendezvous"} == program.WORDS.keys()  # the latter is torchrun's


def test_help_names_each_word_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['xrai']; from xrai.__main__ import main\n"
        "try: main()\nexcept SystemExit as ended: assert ended.code == 0\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    usage, loaded = done.stdout.rstrip().rsplit("\n", 1)
    assert all(f"  {word} " in usage for word in program.WORDS)
    assert not {"torch", "numpy", "yaml", "argparse"} & set(loaded.split())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trian", "unknown word 'trian'; did you mean train?"),
        ("zzz", "unknown word 'zzz'; allowed: preprocess, train"),
    ],
)
def test_an_unknown_word_is_refused(word: str, said: str) -> None:
    done = run_module("xrai", word)
    assert done.returncode == 2 and done.stderr.startswith(f"xrai: error: {said}")


def test_the_version_is_that_of_the_package() -> None:
    assert run_module("xrai", "--version").stdout == f"xrai {__version__}\n"


@pytest.mark.parametrize("word", ["verify", "phantom"])
def test_a_word_is_its_module(word: str) -> None:
    done, same = run_module("xrai", word, "--help"), run_module(f"xrai.{word}", "--help")
    assert done.stdout == same.stdout and done.stdout.startswith(f"usage: xrai {word} [-h]")
    assert (done.returncode, done.stderr) == (0, "")
    refused = run_module("xrai", word, "--zzz=1")
    assert refused.returncode == 2 and refused.stderr.startswith("xrai: error: ")


class StartedError(Exception):
    """What was started in place of this process."""


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The preflight checks that were run; each succeeds."""
    ran: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0)

    def execv(path: str, command: list[str]) -> None:
        raise StartedError(command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [name for name in os.environ if name.startswith(("PET_", "XRAI_"))]:
        monkeypatch.delenv(name)
    return ran


def launched(*arguments: str) -> list[str]:
    with pytest.raises(StartedError) as caught:
        program.launch(list(arguments))
    command = caught.value.args[0]
    if any("endpoint" in argument for argument in arguments):
        assert command[:3] == [sys.executable, "-m", "xrai.rendezvous"]
        return list(command[5:])
    assert command[:3] == TORCHRUN
    return list(command[3:])


def test_training_without_options_of_torchrun_stays_in_this_process(
    checks: list[list[str]],
) -> None:
    assert program.launch(["--train.epochs=3"]) == ["--train.epochs=3"] and not checks


def test_options_of_torchrun_are_told_from_those_of_training_wherever_they_stand(
    checks: list[list[str]],
) -> None:
    own = ["--config=c.yaml", "--train.epochs=3", "--run_id", "x"]
    options = [
        "--nnodes=2",
        "--nproc_per_node=4",
        "--rdzv_backend=c10d",
        "--rdzv-endpoint=a:29400",
        "--max_restarts=3",
        "--node_rank=1",
        "--master_addr=a",
        "--rdzv_conf=timeout=9",
        "--shutdown-timeout=60",
    ]
    assert launched(*own[:2], *options, *own[2:]) == [*options, "-m", "xrai.train", *own]
    ranks = ["--check_ranks=8", "--check_local_ranks=4"]
    assert checks == [[sys.executable, "-m", "xrai.train", *ranks, "--check", *own]]


@pytest.mark.parametrize(
    "options",
    [
        ["--standalone", "--nproc_per_node=2"],
        ["--nproc_per_node=2"],
        ["--nproc-per-node=2", "--nnodes=1"],
        ["--nnodes=1:1", "--max_restarts=3"],
    ],
)
def test_a_single_machine_is_found_without_its_name(
    options: list[str], checks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XRAI_PREFLIGHT", "0")
    expected = [*options, "--local_addr=localhost", "-m", "xrai.train"]
    assert launched(*options) == expected
    assert not checks


@pytest.mark.parametrize(
    "option",
    [
        "--nnodes=2",
        "--nnodes=1:4",
        "--node-rank=0",
        "--rdzv_endpoint=node0:29400",
        "--master_addr=10.0.0.1",
        "--local_addr=node1",
    ],
)
def test_a_job_that_says_where_its_machines_are_gets_no_other_address(
    option: str, checks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XRAI_PREFLIGHT", "0")
    assert launched(option) == [option, "-m", "xrai.train"]
    assert not checks


@pytest.mark.parametrize(
    ("conf", "timeout_s"), [("", "600"), ("--rdzv_conf=read_timeout=9,join_timeout=1800", "1800")]
)
def test_a_rendezvous_elsewhere_is_watched_and_waited_for_as_long_as_torchrun_waits(
    conf: str, timeout_s: str, checks: list[list[str]]
) -> None:
    options = ["--nnodes=2", "--rdzv-endpoint=node0:29401", *([conf] if conf else [])]
    with pytest.raises(StartedError) as caught:
        program.launch(options)
    started = [sys.executable, "-m", "xrai.rendezvous", "node0:29401", timeout_s, *options]
    assert caught.value.args[0] == [*started, "-m", "xrai.train"]
    assert len(checks) == 1


def test_variables_of_torchrun_are_read_as_its_options_are_which_win(
    checks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NNODES", "3")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "8")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "node0:29401")
    monkeypatch.setenv("PET_RDZV_CONF", "join_timeout=1800")
    with pytest.raises(StartedError) as caught:
        program.launch(["--nproc_per_node=2"])
    started = [sys.executable, "-m", "xrai.rendezvous", "node0:29401", "1800"]
    assert caught.value.args[0] == [*started, "--nproc_per_node=2", "-m", "xrai.train"]
    assert "--check_ranks=6" in checks[0]
    both = ["--check_ranks=24", "--check_local_ranks=8"]
    assert program.launch(["--check"]) == [*both, "--check"]


def test_a_training_on_one_machine_waits_for_no_endpoint(
    checks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "node0:29401")
    assert launched("--standalone") == ["--standalone", "-m", "xrai.train"]


@pytest.mark.ci
@pytest.mark.parametrize("has_flag", [True, False])
def test_training_by_two_processes_needs_no_host_name_that_resolves(
    has_flag: bool, finished: Finished, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root may give the machine another name, in a namespace of its own")
    flags = ["--standalone"] if has_flag else []
    command = [sys.executable, "-m", "xrai", "train", *flags, "--nproc_per_node=2"]
    command += ["--dataset", str(finished.dataset), "--artifacts", str(tmp_path), "--run_id=named"]
    script = 'hostname nosuch-host.example && exec "$@"'
    unnamed = ["unshare", "-u", "sh", "-c", script, "sh", *command, *SMALL]
    done = subprocess.run(unnamed, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_variables_of_torchrun_start_it_too(
    checks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "2")
    assert launched() == ["--local_addr=localhost", "-m", "xrai.train"]


def test_a_check_counts_the_ranks_that_torchrun_would_start(checks: list[list[str]]) -> None:
    options = ["--nnodes=3", "--nproc-per-node=4", "--check", "--config=c"]
    both = ["--check_ranks=12", "--check_local_ranks=4"]
    assert program.launch(options) == [*both, "--check", "--config=c"]
    for unknown in ("--nnodes=1:4", "--nproc_per_node=gpu"):
        assert program.launch([unknown, "--check"]) == ["--check"]
    options = ["--nnodes=1:4", "--nproc_per_node=2", "--check"]
    assert program.launch(options) == ["--check_local_ranks=2", "--check"]
    assert not checks


@pytest.mark.parametrize("option", ["--help", "--print_config"])
def test_what_does_not_train_needs_no_torchrun(checks: list[list[str]], option: str) -> None:
    assert program.launch(["--nproc_per_node=4", option, "--config=c"]) == [option, "--config=c"]
    assert not checks


@pytest.mark.parametrize(("status", "said"), [(1, 1), (2, 2), (-15, 143)])
def test_a_check_that_fails_ends_it_with_its_own_status(
    checks: list[list[str]], monkeypatch: pytest.MonkeyPatch, status: int, said: int
) -> None:
    def fail(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit) as caught:
        program.launch(["--standalone"])
    assert caught.value.code == said


@pytest.mark.parametrize("flag", ["--nproc_per_node", "--nnodes", "--rdzv_endpoint"])
def test_an_option_without_its_value_is_refused(
    checks: list[list[str]], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        program.launch([flag, "2"])
    assert caught.value.code == 2 and f"write {flag}=VALUE" in capsys.readouterr().err


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    folder = REPOSITORY / "xrai"
    packages = [path.parent for path in folder.rglob("__init__.py")]
    taken = {file for package in packages for glob in patterns for file in package.glob(glob)}
    others = {
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
    }
    assert others == taken and {"py.typed", "pneumonia.yaml"} <= {path.name for path in taken}


def test_several_processes_cannot_read_one_pipe() -> None:
    reader, writer = os.pipe()
    config = f"--config=/dev/fd/{reader}"
    done = subprocess.run(
        [sys.executable, "-m", "xrai", "train", "--nproc_per_node=2", config],
        pass_fds=[reader],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(reader), os.close(writer)
    assert done.returncode == 2 and "is a pipe, which only one process can read" in done.stderr
