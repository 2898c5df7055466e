"""What rank 0 records of an epoch: history.csv, TensorBoard, the line of the log and the score."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.results.runs import read_events, server_reader
from xrai.config import Config
from xrai.labels import LabelSpec
from xrai.learning.loop import EpochResult
from xrai.learning.predictor import Predictions
from xrai.results.folder import RunFolder
from xrai.run import Job, calibrate

CLASSES = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
FINDINGS = LabelSpec("multilabel", ("Effusion", "Nodule", "Hernia"))
PAIR = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
NUM = 40


def make_job(folder: Path, spec: LabelSpec, labels: np.ndarray) -> Job:
    """A job whose data set is nothing but its validation labels."""
    run = RunFolder(str(folder), "r1")
    run.open()
    train = SimpleNamespace(index=SimpleNamespace(labels=spec))
    loaders: Any = {"train": train, "val": SimpleNamespace(labels=labels)}
    ranks: Any = None
    job = Job(Config(), "data", run, loaders, ranks=ranks)
    vars(job)["_is_phantom"] = False
    return job


def result_of(logits: np.ndarray, *, epoch: int = 0) -> EpochResult:
    """An epoch whose validation images have these logits (N, C), augmented ones their half."""
    return EpochResult(
        epoch=epoch,
        step=10 * (epoch + 1),
        train_loss=0.5,
        train_accuracy=0.6,
        val_loss=0.7,
        val=Predictions(logits[None], None),
        shifted=Predictions(logits[None] / 2, None),
        lr=0.1,
        grad_norm=1.0,
        images_per_s=9.0,
        data_wait_share=0.0,
        seconds={"compute": 1.0, "epoch": 2.0},
        peak_memory_mib=100.0,
    )


@pytest.mark.parametrize("spec", [CLASSES, FINDINGS], ids=lambda spec: spec.task)
def test_several_outputs_have_their_mean_the_worst_by_name_and_each_its_own_curves(
    tmp_path: Path, spec: LabelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 3, NUM)
    if spec.task == "multilabel":
        labels = generator.integers(-1, 2, (NUM, 3))
        labels[:, 2] = np.minimum(labels[:, 2], 0)  # nobody has a hernia
    wanted = spec.matrix(labels)
    logits = wanted * np.array([2.0, 0.3, 1.0]) + generator.normal(0, 1, (NUM, 3))
    job = make_job(tmp_path, spec, labels)
    with caplog.at_level(logging.INFO):
        score = job.after_epoch(result_of(logits))
    scores = logits
    if spec.task == "multiclass":
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = {
        name: roc_auc_score(own[own >= 0], column[own >= 0])
        for name, own, column in zip(spec.classes, wanted.T, scores.T, strict=True)
        if len(np.unique(own[own >= 0])) == 2
    }
    assert len(expected) == (3 if spec.task == "multiclass" else 2)
    worst = min(expected, key=lambda name: expected[name])
    (row,) = job.run.history()
    assert row.val_auroc == pytest.approx(np.mean(list(expected.values())))
    assert row.val_auroc_worst == pytest.approx(expected[worst])
    assert score == pytest.approx(row.shifted_auroc)
    assert f", worst {worst} {expected[worst]:.3f}, " in caplog.text
    events = read_events(job.run)
    assert {tag for tag in events if tag.startswith("auroc_by_class/")} == {
        f"auroc_by_class/{name}" for name in expected
    }
    assert events[f"auroc_by_class/{worst}"] == [(10, pytest.approx(expected[worst]))]
    curves = server_reader(job.run).Tags()["tensors"]
    assert {tag for tag in curves if tag.startswith("precision_recall/")} == {
        f"precision_recall/val/{name}" for name in expected
    }
    names = {path.name for path in (job.run.path / "curves").iterdir()}
    assert names == {"loss.png", "accuracy.png", "auroc.png"}


def test_two_classes_have_no_more_columns_tags_or_curves_than_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = np.arange(NUM) % 2
    job = make_job(tmp_path, PAIR, labels)
    with caplog.at_level(logging.INFO):
        job.after_epoch(result_of(labels[:, None] + np.linspace(-2, 2, NUM)[:, None]))
    assert "worst" not in (job.run.path / "history.csv").read_text() + caplog.text
    tags = server_reader(job.run).Tags()["tensors"]
    assert [tag for tag in tags if "recall" in tag or "class" in tag] == ["precision_recall/val"]
    names = {path.name for path in (job.run.path / "curves").iterdir()}
    assert names == {"loss.png", "accuracy.png"}


def test_curves_of_an_epoch_are_bounded_however_many_outputs_there_are(tmp_path: Path) -> None:
    spec = LabelSpec("multilabel", tuple(f"finding {number}" for number in range(60)))
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 2, (NUM, 60))
    job = make_job(tmp_path, spec, labels)
    job.after_epoch(result_of(generator.normal(0, 1, (NUM, 60))))
    tags = server_reader(job.run).Tags()["tensors"]
    assert sum(tag.startswith("precision_recall/") for tag in tags) == 20
    assert sum(tag.startswith("auroc_by_class/") for tag in tags) == 60
    assert sum(path.stat().st_size for path in job.run.path.glob("tensorboard/*")) < 100_000


@pytest.mark.parametrize(
    ("spec", "labels", "whose"),
    [
        (PAIR, [0, 1] * 20, ""),
        (CLASSES, [0, 1] * 20, ""),
        (FINDINGS, [[0, 1, -1], [1, 0, -1]] * 20, "Effusion: "),
    ],
)
def test_a_temperature_at_its_limit_is_told_in_the_log(
    caplog: pytest.LogCaptureFixture, spec: LabelSpec, labels: Any, whose: str
) -> None:
    logits = np.zeros((2, 40, spec.num_outputs))  # two copies, whose logits are the wrong way round
    logits[:, :, 0] = np.where(np.arange(40) % 2, -1.0, 1.0) * (-1 if spec is CLASSES else 1)
    temperatures, _ = calibrate(spec, np.array(labels), logits)
    assert temperatures[0] == pytest.approx(20)
    assert f"{whose}the temperature is at its upper limit, 20," in caplog.messages[0]
