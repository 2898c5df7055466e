"""Small real trainings through the real commands, for the tests of train, evaluate and predict."""

import fcntl
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from tests.zygote import start
from xrai import command, preprocess
from xrai.phantom import make_phantoms

SMALL = [
    "--images.size=32",
    "--model.width=8",
    "--train.epochs=2",
    "--train.global_batch_size=16",
    "--train.precision=off",
    "--train.threads=1",
    "--evaluate.num_bootstrap=50",
]


class Command(Protocol):
    """A module such as `xrai.train`."""

    def main(self) -> None: ...


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Finished:
    """A run that was trained with the options SMALL. A test that changes it works on a copy."""

    phantoms: Path
    dataset: Path
    folder: Path
    stdout: str


def once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """A folder that `make` fills once for all xdist workers of this session; the others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own in that of the session
    folder = base / f"once-{name}"
    with (base / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def finished_run(tmp_path_factory: pytest.TempPathFactory, *, num_ranks: int) -> Finished:
    """The run of the fixtures `finished` and `finished_by_two`, on one data set."""
    made = once(tmp_path_factory, "dataset", make_dataset)
    launcher = TORCHRUN if num_ranks == 2 else []

    def train(folder: Path) -> None:
        options = [f"--dataset={made}/dataset", f"--artifacts={folder}/submit", "--run_id=whole"]
        done = run_module("xrai.train", *options, *SMALL, launcher=launcher)
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)

    folder = once(tmp_path_factory, f"run-{num_ranks}", train)
    return Finished(
        phantoms=made / "phantoms",
        dataset=made / "dataset",
        folder=folder / "submit" / "whole",
        stdout=(folder / "stdout").read_text(),
    )


def make_dataset(
    folder: Path, *, num_images: int = 80, seed: int = 0, options: tuple[str, ...] = ()
) -> Path:
    """A data set of phantoms in `folder`/dataset, 32 pixels wide."""
    make_phantoms(folder / "phantoms", num_images=num_images, seed=seed, workers=1)
    arguments = [
        f"--source={folder / 'phantoms'}",
        f"--dataset={folder / 'dataset'}",
        "--workers=1",
        "--images.size=32",
        "--splits.val_fraction=0.25",
    ]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["xrai.preprocess", *arguments, *options])
        preprocess.main()
    return folder / "dataset"


def run_module(module: str, *arguments: str, launcher: Sequence[str] = ()) -> Done:
    """`python -m MODULE ARGUMENTS` to its end."""
    process = start([*launcher, "-m", module, *arguments])
    try:
        stdout, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    return Done(process.returncode, stdout, stderr)


def call_main(
    module: Command, *arguments: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """A command in this process: its status, and the lines of stderr that begin with `xrai:`."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(module), *arguments])
        with pytest.raises(SystemExit) as caught:
            command.run_command(module.main)
    lines = capsys.readouterr().err.splitlines()
    assert isinstance(caught.value.code, int)
    return caught.value.code, [line for line in lines if line.startswith("xrai:")]
