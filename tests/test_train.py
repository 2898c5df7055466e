"""The training command as people use it: on a real (small) data set, through its real command
line.
"""

import csv
import hashlib
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.ranks import run_ranks
from tests.training import SMALL, Finished, call_main, make_dataset, run_module
from tests.undrawn import leave_figures_empty
from tests.zygote import RANK
from xrai import evaluate, preprocess, run, train
from xrai.config import Config, Model, Train
from xrai.dataset.loader import Loader
from xrai.dataset.shards import DatasetIndex, ShardInfo, read_index
from xrai.errors import DatasetError, RunError, UserError
from xrai.files import sha256_of
from xrai.labels import LabelSpec, Task
from xrai.learning.distributed import Place, Ranks
from xrai.learning.predictor import build_model, load_model
from xrai.phantom import make_phantoms
from xrai.results.calibration import calibrated
from xrai.results.folder import RunFolder
from xrai.store import open_store, take_lease

RANK_0_ONLY = {"matplotlib", "sklearn", "tensorboard", "jinja2"}
NAME_PACKAGES = """
import json, sys
from xrai import train
train.main()
packages = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(packages | {"xrai.run"} & set(sys.modules))))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(finished: Finished) -> Path:
    return finished.dataset


@pytest.fixture(autouse=True)
def keep_signal_handlers() -> Iterator[None]:
    kinds = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(kind) for kind in kinds]
    yield
    for kind, handler in zip(kinds, handlers, strict=True):
        signal.signal(kind, handler)


@pytest.fixture
def no_conclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of this test draw nothing, and are not measured at their end."""
    leave_figures_empty(monkeypatch.setattr)
    monkeypatch.setattr(run.Job, "conclude", lambda *_, **__: [])


def call(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    return call_main(train, *arguments, capsys=capsys)


def test_a_run_leaves_everything_that_the_readme_lists(finished: Finished) -> None:
    folder = finished.folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "history.csv",
        "curves/loss.png",
        "curves/accuracy.png",
        "model.pt",
        "metrics.json",
        "predictions.csv",
        "plots/roc.png",
        "plots/precision_recall.png",
        "plots/confusion.png",
        "plots/calibration.png",
        "report.html",
        "summary.json",
        "checkpoints/latest.json",
        "val/metrics.json",
    }
    assert any(name.startswith("tensorboard/") for name in names)
    lines = finished.stdout.splitlines()
    for word in ("accuracy", "sensitivity", "specificity", "plots"):
        assert any(line.startswith(word) for line in lines[-10:])
    assert "phantoms, not patients" in finished.stdout


def test_the_summary_names_every_file_with_its_hash(finished: Finished) -> None:
    folder = finished.folder
    summary = json.loads((folder / "summary.json").read_text())
    for name, digest in summary["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert {"model.pt", "metrics.json", "report.html", "history.csv"} <= set(summary["files"])


def test_metrics_are_those_of_the_predictions_by_scikit_learn(
    finished: Finished, dataset: Path
) -> None:
    folder = finished.folder
    for split, place in (("test", folder), ("val", folder / "val")):
        metrics = json.loads((place / "metrics.json").read_text())
        with (place / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        loader = Loader(str(dataset), split=split, batch_size=8)
        assert [row["source"] for row in rows] == loader.columns("source")[
            "source"
        ].tolist()  # every image once
        labels = [int(row["label"] == "PNEUMONIA") for row in rows]
        assert labels == loader.labels.tolist()
        scores = np.array([float(row["score"]) for row in rows])
        calls = scores >= metrics["threshold"]
        assert [row["call"] == "PNEUMONIA" for row in rows] == calls.tolist()
        assert metrics["metrics"]["accuracy"]["value"] == pytest.approx(
            accuracy_score(labels, calls)
        )
        assert metrics["metrics"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, scores))


def test_tensorboards_own_reader_finds_the_curves(finished: Finished) -> None:
    folder = finished.folder
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    with (folder / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in history] == [1, 2]
    for tag, column in (
        ("loss/train", "train_loss"),
        ("loss/val", "val_loss"),
        ("accuracy/val", "val_accuracy"),
        ("auroc/val", "val_auroc"),
        ("optim/lr", "lr"),
        ("throughput/images_per_s", "images_per_s"),
        ("throughput/data_wait_share", "data_wait_share"),
    ):
        points = events.Scalars(tag)
        assert [point.step for point in points] == [int(row["step"]) for row in history]
        assert [point.value for point in points] == pytest.approx(
            [float(row[column]) for row in history], rel=1e-5
        )


def test_the_model_file_alone_gives_the_same_scores(
    finished: Finished, dataset: Path, tmp_path: Path
) -> None:
    folder = finished.folder
    model = load_model(open_store(str(folder)))
    assert (model.image_size, model.fit, model.labels.classes) == (
        32,
        "crop",
        ("NORMAL", "PNEUMONIA"),
    )
    batch = next(Loader(str(dataset), split="test", batch_size=1000).epoch(0))
    with torch.inference_mode():
        logits = model.network(torch.from_numpy(batch.images) / 255)[:, 0].double().numpy()
    scores = calibrated(logits, *model.temperatures)
    with (folder / "predictions.csv").open(newline="") as file:
        written = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx(np.array(written), abs=1e-5)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (model.thresholds, model.temperatures) == (
        (metrics["threshold"],),
        (metrics["calibration"]["temperature"],),
    )


def test_a_finished_run_started_again_shows_its_results_and_changes_nothing(
    finished: Finished, dataset: Path
) -> None:
    folder = finished.folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run_module(
        "xrai.train",
        f"--dataset={dataset}",
        f"--artifacts={folder.parent}",
        "--run_id=whole",
        *SMALL,
    )
    assert again.returncode == 0 and again.stdout == finished.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_one_and_two_processes_give_the_same_validation_numbers(
    finished: Finished, finished_by_two: Finished
) -> None:
    rows = []
    for folder in (finished.folder, finished_by_two.folder):
        with (folder / "history.csv").open(newline="") as file:
            rows.append(list(csv.DictReader(file)))
    for ours, theirs in zip(*rows, strict=True):
        for column in (
            "train_loss",
            "train_accuracy",
            "val_loss",
            "val_accuracy",
            "val_auroc",
            "shifted_auroc",
        ):
            assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=2e-4), column
    metrics = [
        json.loads((folder / "metrics.json").read_text())
        for folder in (finished.folder, finished_by_two.folder)
    ]
    assert metrics[0]["counts"] == metrics[1]["counts"]


@pytest.mark.ci
@pytest.mark.distributed
def test_ranks_other_than_0_never_load_what_measures_and_draws(
    dataset: Path, tmp_path: Path
) -> None:
    options = [f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=light", *SMALL]
    program = ["-c", NAME_PACKAGES, *options, "--train.epochs=1"]
    loaded = run_ranks(program, world_size=2, preload=RANK)
    assert set(loaded[0]) >= {"torch", *RANK_0_ONLY}
    assert set(loaded[1]) >= {"torch"} and not set(loaded[1]) & {"xrai.run", *RANK_0_ONLY}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset={tmp}/nothing"], "holds no dataset.json"),
        (["--dataset={tmp}/folder"], "dataset.json cannot be read: it is not a regular file"),
        (["--artifacts={tmp}/file/below"], "results cannot be written to"),
        (["--images.size=48"], "images.size = 48, but the data set was made with 32"),
        (["--images.size=64"], "images.size = 64, but the data set was made with 32"),
        (["--config=pneumonia"], "images.size = 128, but the data set was made with 32"),
        (
            ["--train.global_batch_size=16", "--train.accumulation_steps=32"],
            "the nearest that can is 32",
        ),
        (["--run_id=../up"], "--run_id '../up' is not allowed"),
        (["--resume=perhaps"], "it takes auto, must, never or changed"),
        (["--resume=must", "--run_id=new"], "holds no checkpoint and --resume is must"),
        (["--optim.lrr=1"], "did you mean --optim.lr?"),
        (["--train.epochs=0"], "train.epochs = 0 is not allowed"),
        (["--init_from={tmp}/nothing"], "holds no model.pt"),
    ],
)
def test_a_mistake_is_one_clear_line_with_status_2_and_leaves_nothing(
    dataset: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    (tmp_path / "folder" / "dataset.json").mkdir(parents=True)
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    default = [
        f"--dataset={dataset}",
        f"--artifacts={tmp_path}/submit",
        "--model.width=8",
        "--train.epochs=1",
    ]
    status, lines = call(*default, *given, capsys=capsys)
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith("xrai: error: ") and message in lines[0]
    assert not list(tmp_path.glob("submit/*/checkpoints"))


def test_an_image_size_other_than_the_data_sets_is_taken_from_the_data_set_when_none_is_given(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = call(
        f"--dataset={dataset}", f"--artifacts={tmp_path}", "--check", capsys=capsys
    )
    assert (status, lines) == (0, []) and list(tmp_path.iterdir()) == []  # a dry run leaves nothing


def test_more_processes_than_images_are_refused(dataset: Path) -> None:
    index = Loader(str(dataset), split="train", batch_size=8).index
    with pytest.raises(UserError, match=r"1000 processes, but only \d+ training images"):
        train.fit_to_dataset(Config(), index, given=set(), num_ranks=1000)


def test_a_check_counts_the_ranks_of_the_training(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", *SMALL, "--check"]
    status, lines = call(*common, "--check_ranks=3", capsys=capsys)
    assert status == 2 and "train.global_batch_size = 16 cannot be shared by 3 ranks" in lines[0]
    assert call(*common, "--check_ranks=4", capsys=capsys)[0] == 0


def test_a_check_refuses_more_processes_than_gpus(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", *SMALL, "--check"]
    many, alone = "--check_local_ranks=3", Ranks(0, 1, 0, 1, torch.device("cpu"))
    assert call(*common, many, capsys=capsys)[0] == 0  # no GPU, no limit
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train, "join", lambda *, timeout_s: nullcontext(alone))
    status, lines = call(*common, many, capsys=capsys)
    assert status == 2 and "3 processes on this machine but 2 CUDA devices" in lines[0]
    assert call(*common, "--check_local_ranks=2", capsys=capsys)[0] == 0


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_check_refuses_a_config_that_the_run_does_not_go_on_with_and_changes_nothing(
    is_finished: bool,
    finished: Finished,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished.folder, folder)
    if not is_finished:
        (folder / "summary.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=whole", *SMALL]
    common.append("--check")
    assert call(*common, capsys=capsys)[0] == 0
    assert call(*common, "--train.threads=2", capsys=capsys)[0] == 0
    status, lines = call(*common, "--model.width=16", capsys=capsys)
    assert status == 2 and "width" in lines[0]
    status, lines = call(*common, "--optim.lr=0.5", capsys=capsys)
    assert status == 2 and "another config (optim.lr = 0.5, was 0.003)" in lines[0]
    longer, lines = call(*common, "--train.epochs=9", capsys=capsys)
    assert longer == (2 if is_finished else 0)
    status, lines = call(*common, "--resume=changed", "--model.width=16", capsys=capsys)
    assert status == 2  # its weights fit no other network
    other = make_dataset(tmp_path / "other", num_images=40, seed=5)
    status, lines = call(*common, f"--dataset={other}", capsys=capsys)
    assert status == 2 and ("fingerprint" in lines[0] or "on data set" in lines[0])
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_check_of_a_run_without_a_checkpoint_knows_must_and_never(
    dataset: Path, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--dataset={dataset}", *SMALL, "--check"]
    new = [*common, f"--artifacts={tmp_path}", "--run_id=new"]
    status, lines = call(*new, "--resume=must", capsys=capsys)
    assert status == 2 and "--resume is must" in lines[0]
    assert call(*new, capsys=capsys)[0] == 0 and list(tmp_path.iterdir()) == []
    known = [*common, f"--artifacts={finished.folder.parent}", "--run_id=whole"]
    status, lines = call(*known, "--resume=never", capsys=capsys)
    assert status == 2 and "--resume is never" in lines[0]


@pytest.mark.parametrize(
    ("split", "counts", "unknown", "words"),
    [
        ("train", (0, 9), (), "the training split has 0 images with A, of 30 for which"),
        ("val", (9, 0), (), "the validation split has 0 images with B, of 30 for which"),
        ("val", (9, 9), (0, 21), "the validation split has 9 images with B, of 9 for which"),
        ("train", (0, 9), (30, 0), "the training split has 0 images with A, of 0 for which"),
    ],
)
def test_a_class_or_finding_that_cannot_be_learned_or_measured_is_one_clear_line(
    split: str, counts: tuple[int, int], unknown: tuple[int, ...], words: str, dataset: Path
) -> None:
    index = read_index(open_store(str(dataset)))
    task: Task = "multilabel" if unknown else "multiclass"
    classes = ("A", "B") if unknown else ("A", "B", "C")

    def shard(num: tuple[int, int], num_unknown: tuple[int, ...]) -> ShardInfo:
        per_class = num if unknown else (*num, 30 - sum(num))
        return ShardInfo("x", 30, 9, "0" * 64, per_class, num_unknown)

    good = shard((9, 9), (0, 0) if unknown else ())
    splits = {"train": (good,), "val": (good,), split: (shard(counts, unknown),)}
    made = replace(index, task=task, classes=classes, splits=splits)
    with pytest.raises(DatasetError, match=words) as caught:
        train.refuse_one_sided(made)
    assert "\n" not in str(caught.value)
    train.refuse_one_sided(replace(made, splits={"train": (good,), "val": (good,)}))


@pytest.mark.parametrize(("split", "words"), [("train", "training"), ("val", "validation")])
def test_two_classes_are_needed_in_train_and_val(split: str, words: str, dataset: Path) -> None:
    index = read_index(open_store(str(dataset)))
    train.refuse_one_sided(index)
    bare = ShardInfo("x", 30, 9, "0" * 64, (0, 30))
    with pytest.raises(DatasetError, match=f"the {words} split has .*: both classes are needed"):
        train.refuse_one_sided(replace(index, splits={**index.splits, split: (bare,)}))


def test_a_run_of_another_data_set_is_not_gone_on_with(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished.folder
    other = make_dataset(tmp_path, num_images=40, seed=5, options=("--splits.test_fraction=0.1",))
    (tmp_path / "submit" / "other").mkdir(parents=True)
    (tmp_path / "submit" / "other" / "checkpoints").symlink_to(folder / "checkpoints")
    status, lines = call(
        f"--dataset={other}",
        f"--artifacts={tmp_path}/submit",
        "--run_id=other",
        "--model.width=8",
        capsys=capsys,
    )
    assert status == 2 and "was saved with data set fingerprint = " in lines[0]


def without_manifest(folder: Path, index: DatasetIndex) -> DatasetIndex:
    (folder / "manifest.jsonl").unlink()
    return index


def with_a_cut_manifest(folder: Path, index: DatasetIndex) -> DatasetIndex:
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_bytes(b"".join(lines[:-3]))
    return index


def with_a_changed_manifest(folder: Path, index: DatasetIndex) -> DatasetIndex:
    text = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_text(text.replace("train", "trian"))
    return index


def with_a_shard_listed_twice(folder: Path, index: DatasetIndex) -> DatasetIndex:
    train = index.splits["train"]
    return replace(index, splits={**index.splits, "train": (*train, train[0])}, fingerprint="")


def with_a_shard_of_two_splits(folder: Path, index: DatasetIndex) -> DatasetIndex:
    val = (*index.splits["val"], index.splits["train"][0])
    return replace(index, splits={**index.splits, "val": val}, fingerprint="")


def with_a_cut_shard(folder: Path, index: DatasetIndex) -> DatasetIndex:
    path = folder / index.splits["val"][0].name
    path.write_bytes(path.read_bytes()[:-1])
    return index


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_manifest, "manifest.jsonl is missing"),
        (with_a_cut_manifest, "manifest.jsonl is damaged: it has"),
        (with_a_changed_manifest, "manifest.jsonl is damaged: its bytes"),
        (with_a_shard_listed_twice, "is listed 2 times in dataset.json"),
        (with_a_shard_of_two_splits, "is listed 2 times in dataset.json"),
        (with_a_cut_shard, "is damaged: it has"),
    ],
)
def test_a_damaged_data_set_is_refused_before_training(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, DatasetIndex], DatasetIndex],
    words: str,
) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    index = damage(folder, read_index(open_store(str(folder))))
    (folder / "dataset.json").write_text(index.to_json())
    for more in ([], ["--check"]):
        options = [f"--dataset={folder}", f"--artifacts={tmp_path / 'runs'}", *SMALL, *more]
        status, lines = call(*options, capsys=capsys)
        assert status == 2 and len(lines) == 1
        assert words in lines[0] and "xrai verify lists all faults" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_check_finds_rows_of_the_manifest_that_break_the_rules(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    index = read_index(open_store(str(folder)))
    text = (folder / "manifest.jsonl").read_text().replace('"label": 1', '"label": 0', 1)
    (folder / "manifest.jsonl").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    objects = [
        replace(info, sha256=digest) if info.name == "manifest.jsonl" else info
        for info in index.objects
    ]
    (folder / "dataset.json").write_text(replace(index, objects=tuple(objects)).to_json())
    options = [f"--dataset={folder}", f"--artifacts={tmp_path / 'runs'}", *SMALL, "--check"]
    status, lines = call(*options, capsys=capsys)
    assert status == 2 and "does not list as many images of each shard and class" in lines[0]


def test_a_run_that_another_job_writes_is_refused_and_unchanged(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=r1", *SMALL]
    with take_lease(open_store(str(tmp_path / "r1"))):
        before = [path.name for path in (tmp_path / "r1").iterdir()]
        status, lines = call(*options, capsys=capsys)
        assert status == 2 and "r1 is being written by process" in lines[0]
        assert [path.name for path in (tmp_path / "r1").iterdir()] == before


def test_a_run_that_exists_is_not_begun_again_with_resume_never(
    finished: Finished, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished.folder
    status, lines = call(
        f"--dataset={dataset}",
        f"--artifacts={folder.parent}",
        "--run_id=whole",
        "--resume=never",
        *SMALL,
        capsys=capsys,
    )
    assert status == 2 and "--resume is never" in lines[0]


def test_a_finished_run_of_another_data_set_is_not_shown_for_this_one(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_dataset(tmp_path, num_images=40, seed=5, options=("--splits.test_fraction=0.1",))
    status, lines = call(
        f"--dataset={other}",
        f"--artifacts={finished.folder.parent}",
        "--run_id=whole",
        *SMALL,
        capsys=capsys,
    )
    assert status == 2 and "whole is finished, on data set " in lines[0]


@pytest.mark.parametrize("num_lines", [0, 1, 2])
def test_a_run_whose_history_lacks_epochs_of_its_checkpoint_is_not_resumed(
    num_lines: int,
    finished: Finished,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished.folder, folder)
    (folder / "summary.json").unlink()  # as if it had been killed before its end
    rows = (folder / "history.csv").read_text().splitlines(keepends=True)
    (folder / "history.csv").write_text("".join(rows[:num_lines]))
    config = (folder / "config.yaml").read_bytes()
    status, lines = call(
        f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=whole", *SMALL, capsys=capsys
    )
    num_epochs = max(0, num_lines - 1)
    assert status == 2
    assert f"history.csv has {num_epochs} epochs, but the checkpoint was made after 2" in lines[0]
    assert (folder / "config.yaml").read_bytes() == config


def test_a_finished_run_named_again_with_another_config_is_refused(
    finished: Finished, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished.folder
    common = [f"--dataset={dataset}", f"--artifacts={folder.parent}", "--run_id=whole", *SMALL]
    before = (folder / "config.yaml").read_bytes()
    status, lines = call(*common, "--optim.lr=0.5", "--train.threads=2", capsys=capsys)
    assert status == 2
    assert "is finished, with another config (optim.lr = 0.5, was 0.003)" in lines[0]
    assert (folder / "config.yaml").read_bytes() == before
    status, _ = call(*common, "--train.threads=2", "--cache.max_gib=3", capsys=capsys)
    assert status == 0


@pytest.mark.usefixtures("no_conclusion")
def test_a_changed_config_is_named_and_taken_only_when_told_so(
    finished: Finished, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished.folder, folder)
    (folder / "summary.json").unlink()  # as if it had been killed before its end
    before = (folder / "config.yaml").read_bytes()
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=whole", *SMALL]
    changes = ["--optim.lr=0.01", "--augment.blur=0.25"]
    status, lines = call(*common, *changes, "--train.max_steps=90", capsys=capsys)
    assert status == 2
    assert "augment.blur = 0.25, was 0.5, optim.lr = 0.01, was 0.003" in lines[0]
    assert "train.max_steps = 90, was 0" in lines[0] and "--resume=changed" in lines[0]
    assert (folder / "config.yaml").read_bytes() == before
    (folder / "config.yaml").write_text("optim: 3")
    status, lines = call(*common, capsys=capsys)
    assert status == 2 and "config.yaml is not the config of a run" in lines[0]
    (folder / "config.yaml").write_bytes(before.replace(b"  blur: 0.5\n", b""))  # an older one
    status, _ = call(*common, *changes, "--resume=changed", capsys=capsys)
    assert status == 0
    (kept,) = folder.glob("config-until-step-*.yaml")
    assert kept.read_bytes() == before.replace(b"  blur: 0.5\n", b"")
    assert "lr: 0.01" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("timm/resnet18", "auto", "frozen"),
        ("timm/resnet18", "sync", "sync"),
        ("resnet10", "auto", "auto"),
    ],
)
def test_statistics_are_frozen_in_a_run_that_begins_with_weights(
    name: str, given: Literal["auto", "sync"], expected: str
) -> None:
    config = replace(Config(), model=Model(name, batch_norm=given))
    assert train.as_begun_with_weights(config).model.batch_norm == expected


def test_tasks_of_slurm_that_would_each_train_alone_are_refused(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path / 'runs'}", *SMALL]
    status, lines = call(*common, capsys=capsys)
    assert status == 2 and "SLURM_NTASKS = 2, but WORLD_SIZE is not set" in lines[0]
    assert "torchrun" in lines[0] and not (tmp_path / "runs").exists()
    status, _ = call(*common, "--check", capsys=capsys)  # as xrai train does before torchrun
    assert status == 0


@pytest.mark.parametrize(
    ("device", "variable", "words"),
    [("cpu", "CXX", "a compiler for C++ (g++)"), ("cuda", "CC", "a compiler for C (gcc or clang)")],
)
def test_compiling_without_a_compiler_is_refused(
    device: str, variable: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=re.escape(words)):
        train.require_compiler(torch.device(device))
    own = tmp_path / "own"
    own.touch(mode=0o755)
    monkeypatch.setenv(variable, "own")
    train.require_compiler(torch.device(device))
    own.unlink()
    with pytest.raises(UserError, match=re.escape("(own), not found here: install one, name it")):
        train.require_compiler(torch.device(device))


def test_a_config_that_compiles_is_checked_before_any_work(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path / 'runs'}", *SMALL]
    status, lines = call(*common, "--train.compile=true", "--check", capsys=capsys)
    assert status == 2 and "(no-such-compiler), not found here" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_images_to_review_are_a_change_to_a_run_of_a_version_without_them(
    finished: Finished, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(finished.folder, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["review"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=old", *SMALL]
    status, _ = call(*common, capsys=capsys)
    assert status == 0
    images = tmp_path / "unlike"
    make_phantoms(images, num_images=12, workers=1)
    status, lines = call(*common, f"--review.unlike={images}", capsys=capsys)
    assert status == 2 and "review.unlike = " in lines[0] and "was ''" in lines[0]


@pytest.mark.usefixtures("no_conclusion")
def test_another_number_of_epochs_is_taken_and_the_earlier_config_kept(
    finished: Finished, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished.folder, folder)
    (folder / "summary.json").unlink()  # as if it had been killed before its end
    before = (folder / "config.yaml").read_bytes()
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=whole", *SMALL]
    status, _ = call(*common, "--train.epochs=3", capsys=capsys)
    assert status == 0
    (kept,) = folder.glob("config-until-step-*.yaml")
    assert kept.read_bytes() == before and "epochs: 3" in (folder / "config.yaml").read_text()
    assert len((folder / "history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("model", "is_free"),
    [
        (Model("resnet18"), True),
        (Model("timm/resnet18", batch_norm="frozen"), True),
        (Model("timm/resnet18", weights="pretrained"), True),
        (Model("timm/resnet18"), False),
        (Model("timm/resnet18", batch_norm="local"), False),
        (Model("of_a_package"), False),
    ],
)
def test_parts_of_a_batch_may_change_where_no_batch_statistics_depend_on_them(
    model: Model, is_free: bool, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path), "r1")
    folder.open()
    folder.write_text("config.yaml", Config(model=model).to_yaml())
    labels = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
    loaders: Any = {"train": SimpleNamespace(index=SimpleNamespace(labels=labels))}
    ranks: Any = None
    config = Config(model=model, train=Train(accumulation_steps=4))
    job = run.Job(config, "data", folder, loaders, ranks=ranks)
    words = r"began with another config \(train\.accumulation_steps = 4, was 1\)"
    with nullcontext() if is_free else pytest.raises(RunError, match=words):
        assert not job.check(resume="auto")
    assert not job.check(resume="changed")


def test_the_duration_of_a_resumed_run_includes_what_was_trained_before(
    finished: Finished,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_figures_empty(monkeypatch.setattr)
    folder = tmp_path / "whole"
    shutil.copytree(finished.folder, folder)
    (folder / "summary.json").unlink()  # as if it had been killed before its end
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert 0 < state["progress"]["train_s"] < 5000
    state["progress"]["train_s"] = 5000.0
    torch.save(state, newest)
    mark = newest.with_suffix(".json")
    facts = {"size_bytes": newest.stat().st_size, "sha256": sha256_of(newest)}
    mark.write_text(json.dumps(json.loads(mark.read_text()) | facts))
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", "--run_id=whole", *SMALL]
    status, _ = call(*common, capsys=capsys)
    assert status == 0
    assert json.loads((folder / "summary.json").read_text())["duration_s"] > 5000
    assert "2 epochs in 1 h 2" in (folder / "report.html").read_text()


def test_first_weights_of_a_deeper_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_model(Model(width=8), 1)
    deeper = {**network.state_dict(), "stage9.weight": torch.zeros(1)}
    spec = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
    run = SimpleNamespace(network=SimpleNamespace(state_dict=lambda: deeper), labels=spec)
    monkeypatch.setattr("xrai.pipeline.open_run", lambda address: run)
    with pytest.raises(RunError, match=r"holds another network: stage9\.weight does not fit"):
        train.first_weights("runs/deep", Config(model=Model(width=8)), network, spec)


def test_first_weights_come_from_a_finished_run_of_the_same_network_alone(
    finished: Finished,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_figures_empty(monkeypatch.setattr)
    folder = finished.folder
    common = [f"--dataset={dataset}", f"--artifacts={tmp_path}", f"--init_from={folder}"]
    status, lines = call(*common, "--model.width=16", capsys=capsys)
    assert status == 2 and "holds another network" in lines[0]
    status, lines = call(
        *common, "--run_id=warm", *SMALL, "--train.epochs=1", "--optim.lr=1e-9", capsys=capsys
    )
    assert (status, lines) == (0, [])
    warm, first = (load_model(open_store(str(place))) for place in (tmp_path / "warm", folder))
    for name, tensor in first.network.state_dict().items():
        assert torch.allclose(warm.network.state_dict()[name], tensor, atol=1e-5), name
    caplog.clear()
    again = [*common, "--run_id=warm", *SMALL, "--train.epochs=1", "--optim.lr=1e-9"]
    assert call(*again, capsys=capsys) == (0, [])
    assert "--init_from is not used: run warm is finished" in caplog.text
    (tmp_path / "warm" / "summary.json").unlink()
    assert call(*again, capsys=capsys) == (0, [])
    assert "--init_from is not used: run warm goes on with its own weights" in caplog.text


def label_anew(images: Path, folder: Path, labelling: str) -> list[str]:
    """The options of preprocess that give NORMAL and PNEUMONIA phantoms other labels."""
    if labelling == "subtype":
        return ["--labels.target=subtype"]
    paths = sorted(path.relative_to(images) for path in images.glob("train/*/*"))
    column, *words = {
        "renamed": ("label", "healthy", "TB"),
        "finding": ("Opacity", "0", "1"),
        "findings": ("Opacity,Clear", "0,1", "1,0"),
    }[labelling]
    rows = [f"{path.as_posix()},{words['PNEUMONIA' in path.parts]}" for path in paths]
    table = folder / "labels.csv"
    table.write_text("\n".join([f"path,{column}", *rows]))
    return [f"--labels={table}"]


@pytest.mark.parametrize(
    ("labelling", "fact", "words"),
    [
        ("renamed", "classes = ['NORMAL', 'PNEUMONIA']", "the classes healthy, TB"),
        ("subtype", "task = 'binary'", "the classes NORMAL, BACTERIAL, VIRAL"),
        ("finding", "task = 'binary'", "the findings Opacity"),
    ],
)
def test_the_same_images_with_other_labels_are_another_data_set(
    labelling: str,
    fact: str,
    words: str,
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other, folder = tmp_path / "dataset", finished.folder
    options = label_anew(finished.phantoms, tmp_path, labelling)
    options += [f"--source={finished.phantoms}", f"--dataset={other}", "--workers=1"]
    options += ["--images.size=32", "--splits.val_fraction=0.25"]
    assert call_main(preprocess, *options, capsys=capsys) == (0, [])
    (tmp_path / "submit" / "other").mkdir(parents=True)
    (tmp_path / "submit" / "other" / "checkpoints").symlink_to(folder / "checkpoints")
    common = [f"--dataset={other}", *SMALL]
    status, lines = call(*common, f"--artifacts={tmp_path}/submit", "--run_id=other", capsys=capsys)
    assert status == 2 and f"was saved with {fact}, this run has " in lines[0]
    status, lines = call(*common, f"--artifacts={folder.parent}", "--run_id=whole", capsys=capsys)
    assert status == 2 and "whole is finished, on data set " in lines[0]
    status, lines = call_main(
        evaluate, f"--run={folder}", f"--dataset={other}", "--split=val", capsys=capsys
    )
    text = "run whole was trained on the classes NORMAL, PNEUMONIA, this data set has"
    assert status == 2 and lines[0].startswith(f"xrai: error: {text} {words}: it lacks ")
    config = load_model(open_store(str(folder))).model
    labels = read_index(open_store(str(other))).labels
    network = build_model(config, labels.num_outputs)
    weights = train.first_weights(str(folder), Config(model=config), network, labels)
    first = load_model(open_store(str(folder))).network.state_dict()
    for name, own in network.state_dict().items():
        assert torch.equal(weights[name], own if name.startswith("head.") else first[name])
    assert "trained on the classes NORMAL, PNEUMONIA: its head is left out" in caplog.text


@pytest.mark.ci
@pytest.mark.parametrize(
    ("labelling", "names"), [("finding", ["Opacity"]), ("findings", ["Opacity", "Clear"])]
)
def test_one_finding_and_findings_that_are_all_known_are_trained_on_and_measured(
    labelling: str,
    names: list[str],
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = label_anew(finished.phantoms, tmp_path, labelling)
    options += [f"--source={finished.phantoms}", f"--dataset={tmp_path}/dataset", "--workers=1"]
    options += ["--images.size=32", "--splits.val_fraction=0.25"]
    assert call_main(preprocess, *options, capsys=capsys) == (0, [])
    options = [f"--dataset={tmp_path}/dataset", f"--artifacts={tmp_path}", "--run_id=small"]
    assert call(*options, *SMALL, "--train.epochs=1", capsys=capsys) == (0, [])
    with (tmp_path / "small" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((tmp_path / "small" / "metrics.json").read_text())
    assert [output["name"] for output in metrics["outputs"]] == names
    for name, output in zip(names, metrics["outputs"], strict=True):
        wanted = [name in row["label"].split("|") for row in rows]
        expected = roc_auc_score(wanted, [float(row[f"score_{name}"]) for row in rows])
        assert output["metrics"]["auroc"]["value"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.usefixtures("no_conclusion")
def test_a_data_set_of_version_1_gives_the_same_weights(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(finished.dataset, tmp_path / "dataset")
    index = read_index(open_store(str(old)))
    (old / "dataset.json").write_text(replace(index, schema_version=1).to_json())
    options = [f"--dataset={old}", f"--artifacts={tmp_path}", "--run_id=whole", *SMALL]
    assert call(*options, capsys=capsys) == (0, [])
    checkpoint = "checkpoints/step-000000006.pt"
    states = [
        torch.load(folder / checkpoint, weights_only=True)
        for folder in (finished.folder, tmp_path / "whole")
    ]
    for kind in ("model", "average"):
        for name, tensor in states[0][kind].items():
            assert torch.equal(states[1][kind][name], tensor), name


def test_evaluate_refuses_images_of_another_size(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished.folder
    other = make_dataset(tmp_path, num_images=40, options=("--images.size=48",))
    status, lines = call_main(
        evaluate, f"--run={folder}", f"--dataset={other}", "--split=val", capsys=capsys
    )
    assert status == 2 and "images.size = 32, this data set has 48" in lines[0]
    status, lines = call_main(evaluate, f"--dataset={other}", capsys=capsys)
    assert status == 2 and "--run is missing" in lines[0]
    status, lines = call_main(
        evaluate, f"--run={tmp_path}/none", f"--dataset={other}", "--split=val", capsys=capsys
    )
    assert status == 2 and "holds no model.pt" in lines[0]


@pytest.mark.parametrize(
    ("asked", "place", "threads"),
    [
        ("", Place(), 8),
        ("3", Place(), 3),
        ("1", Place(), 1),
        ("99", Place(), 8),
        ("2,1", Place(), 2),
        ("x", Place(), 8),
        ("0", Place(), 8),
        ("", Place(0, 2, 0, 2, is_torchrun=True), 4),
        ("1", Place(0, 2, 0, 2, is_torchrun=True), 4),
        ("3", Place(0, 2, 0, 2, is_torchrun=True), 3),
    ],
)
def test_threads_are_the_share_of_the_cores_or_fewer_where_openmp_may_use_fewer(
    asked: str, place: Place, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "num_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert train.default_threads(place) == threads
