"""A small real training through the real commands, for the tests of train, evaluate and predict."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xrai import command, preprocess
from xrai.phantom import make_phantoms

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    "--images.size=32", "--model.width=8", "--train.epochs=2", "--train.global_batch_size=16", "--train.precision=off",
    "--evaluate.num_bootstrap=50",
]  # fmt: skip


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
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["xrai.preprocess", *arguments, "--splits.val_fraction=0.25", *options]
        )
        preprocess.main()
    return folder / "dataset"


def run_module(
    module: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def call_main(
    module: object, *arguments: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """A command in this process: its exit status and the lines of stderr that begin with
    `xrai:`.
    """
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(module), *arguments])
        with pytest.raises(SystemExit) as caught:
            command.run_command(module.main)  # type: ignore[attr-defined]
    lines = capsys.readouterr().err.splitlines()
    assert isinstance(caught.value.code, int)
    return caught.value.code, [line for line in lines if line.startswith("xrai:")]
