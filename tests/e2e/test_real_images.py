"""Learning on the real images, through the real commands."""

import json
from pathlib import Path

import pytest

from tests.training import run_module

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def test_ten_epochs_on_the_public_training_images_tell_pneumonia_from_normal(
    real_images: Path, tmp_path: Path
) -> None:
    done = run_module("xrai.preprocess", f"--source={real_images}", f"--dataset={tmp_path}/dataset")
    assert done.returncode == 0, done.stderr
    assert "5216 files found = 5216 written + 0 excluded" in done.stdout
    done = run_module("xrai.verify", f"--dataset={tmp_path}/dataset")
    assert done.returncode == 0, done.stdout
    done = run_module(
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "xrai.train",
        "--config=configs/quickstart.yaml",
        f"--dataset={tmp_path}/dataset",
        f"--artifacts={tmp_path}/submit",
        "--run_id=real",
        "--train.epochs=10",
    )
    assert done.returncode == 0, done.stderr
    for split, folder in (
        ("val", tmp_path / "submit/real/val"),
        ("test", tmp_path / "submit/real"),
    ):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["split"] == split and metrics["num_patients"] > 300  # held out by patient
        assert metrics["metrics"]["accuracy"]["value"] >= 0.92
        assert metrics["metrics"]["auroc"]["value"] >= 0.98
