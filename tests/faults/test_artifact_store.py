"""Runs whose artifacts go to a bucket: TensorBoard on it, another machine, and a bucket that
fails or stays away.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import zygote
from tests.faults.buckets import moto_server, new_bucket, use_endpoint
from tests.faults.proxy import Proxy
from tests.training import SMALL, Finished, make_dataset
from xrai.learning.predictor import load_model
from xrai.store import LEASE_KEY, Store, open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LISTED = {  # what a finished run holds
    "config.yaml",
    "environment.json",
    "history.csv",
    "curves/loss.png",
    "curves/accuracy.png",
    "checkpoints/latest.json",
    "model.pt",
    "metrics.json",
    "predictions.csv",
    "plots/roc.png",
    "plots/precision_recall.png",
    "plots/confusion.png",
    "plots/calibration.png",
    "plots/examples.png",
    "plots/mistakes.png",
    "val/plots/mistakes.png",
    "report.html",
    "summary.json",
    "tensorboard/events.out.tfevents.000000.xrai",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("artifact_store"), num_images=160)


@dataclass
class Training:
    process: zygote.Process
    log: Path

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        """Until it says so; a process that has ended will not."""
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)

    def ended(self) -> int:
        """The exit status."""
        return self.process.wait(400)

    def stopped(self) -> None:
        self.process.kill()
        self.process.wait(30)


@contextmanager
def training(
    dataset: Path, artifacts: str, *options: str, cache: Path, run_id: str = "r"
) -> Iterator[Training]:
    """`xrai.train` with empty figures, on a machine whose cache is the folder `cache`; killed at
    the end, if it still runs.
    """
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / f"{run_id}-{time.monotonic_ns()}.log"
    command = ["tests/undrawn.py", f"--dataset={dataset}", f"--artifacts={artifacts}"]
    command += [f"--run_id={run_id}", *SMALL, *options]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with log.open("w") as file:
        started = Training(zygote.start(command, environment=environment, output=file), log)
    try:
        yield started
    finally:
        started.stopped()


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float = 200) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come within {timeout_s} s")


def stored_step(store: Store) -> int:
    """The step of the newest checkpoint in a run's place, 0 where there is none."""
    marks = (
        re.fullmatch(r"checkpoints/step-(\d+)(?:_2)?\.json", found.key)
        for found in store.list("checkpoints/step-")
    )
    return max((int(mark[1]) for mark in marks if mark), default=0)


def history(store: Store) -> list[dict[str, str]]:
    if store.size("history.csv") is None:
        return []
    return list(csv.DictReader(io.StringIO(store.read("history.csv").decode())))


def check_whole(store: Store) -> dict[str, Any]:
    """Every file of the run is there, none half, and the summary names them all. Returns the
    summary.
    """
    summary: dict[str, Any] = json.loads(store.read("summary.json"))
    names = {found.key for found in store.list()}
    assert names == {*summary["files"], "summary.json"}
    assert names >= LISTED
    for name, digest in summary["files"].items():
        assert hashlib.sha256(store.read(name)).hexdigest() == digest, name
    return summary


class TensorBoard:
    """TensorBoard's own server on an address, as people start it."""

    def __init__(self, logdir: str, folder: Path) -> None:
        self._log = folder / "tensorboard.log"
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tensorboard.main",
                    "--logdir",
                    logdir,
                    "--port=0",
                    "--reload_interval=1",
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._url = ""

    def __enter__(self) -> "TensorBoard":
        said = wait_for(
            lambda: re.search(r"at (http://\S+)/ ", self._log.read_text()), "TensorBoard's address"
        )
        self._url = said[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)

    def get(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        request = urllib.request.Request(
            f"{self._url}/data/plugin/{path}?{urllib.parse.urlencode(query)}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            data: bytes = answer.read()
            return (
                json.loads(data)
                if answer.headers["Content-Type"].startswith("application/json")
                else data
            )

    def steps(self, tag: str) -> list[int]:
        """The steps of a scalar of run r, in the order in which TensorBoard has them; none where
        it has no such tag.
        """
        try:
            return [
                step for _, step, _ in self.get("scalars/scalars", run="r/tensorboard", tag=tag)
            ]
        except urllib.error.HTTPError as error:
            assert error.code in (400, 404)
            return []


def check_tensorboard(tensorboard: TensorBoard, store: Store) -> None:
    """It shows every epoch of a finished run once and in order, and what it has besides curves."""
    rows, summary = history(store), check_whole(store)
    steps = [int(row["step"]) for row in rows]
    wait_for(
        lambda: tensorboard.steps("final/accuracy") == [steps[-1] + 1],
        "the end of the run in TensorBoard",
    )
    points = tensorboard.get("scalars/scalars", run="r/tensorboard", tag="loss/train")
    assert [point[1] for point in points] == steps
    assert [point[2] for point in points] == pytest.approx(
        [float(row["train_loss"]) for row in rows], rel=1e-5
    )

    curves = tensorboard.get(
        "pr_curves/pr_curves", run="r/tensorboard", tag="precision_recall/val"
    )["r/tensorboard"]
    assert [curve["step"] for curve in curves] == steps
    for curve in curves:
        assert curve["recall"][0] == 1 and curve["true_positives"][0] > 0
    assert "precision_recall/final_test" in tensorboard.get("pr_curves/tags")["r/tensorboard"]

    assert set(tensorboard.get("images/tags")["r/tensorboard"]) == {
        f"predictions/{name}_{split}"
        for name in ("examples", "mistakes", "overlays")
        for split in ("val", "test")
    }
    (shown,) = tensorboard.get(
        "images/images", run="r/tensorboard", tag="predictions/mistakes_test", sample="0"
    )
    served = tensorboard.get(
        "images/individualImage", **dict(urllib.parse.parse_qsl(shown["query"]))
    )
    with (
        Image.open(io.BytesIO(served)) as image,
        Image.open(io.BytesIO(store.read("plots/mistakes.png"))) as stored,
    ):
        assert np.array_equal(np.asarray(image), np.asarray(stored.convert("RGB")))

    (group,) = tensorboard.get(
        "hparams/session_groups",
        {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 10},
    )["sessionGroups"]
    assert group["name"] == summary["run_id"]
    assert group["hparams"]["model.width"] == 8 and group["hparams"]["optim.name"] == "adamw"
    values = {entry["name"]["tag"]: entry["value"] for entry in group["metricValues"]}
    for name in ("accuracy", "sensitivity", "specificity", "auroc"):
        assert values[f"final/{name}"] == pytest.approx(summary[name], abs=1e-6)


@pytest.mark.ci
def test_tensorboard_shows_a_run_in_a_folder_with_its_images_curves_and_hyperparameters(
    finished: Finished, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "submit" / "r")
    store = open_store(str(tmp_path / "submit" / "r"))
    with TensorBoard(str(tmp_path / "submit"), tmp_path) as tensorboard:
        check_tensorboard(tensorboard, store)


@pytest.mark.s3
def test_a_run_killed_within_an_epoch_goes_on_from_the_bucket_on_another_machine_bit_for_bit(
    dataset: Path, tmp_path: Path, s3_bucket: str
) -> None:
    options = ("--train.epochs=3", "--train.global_batch_size=4", "--checkpoint.every=4")
    artifacts = f"s3://{s3_bucket}/runs"
    store = open_store(f"{artifacts}/r")
    with TensorBoard(artifacts, tmp_path) as tensorboard:
        with training(dataset, artifacts, *options, cache=tmp_path / "one") as first:
            rows = wait_for(lambda: history(store), "the first epoch")
            epoch_steps = int(rows[0]["step"])
            wait_for(
                lambda: stored_step(store) // epoch_steps and stored_step(store) % epoch_steps,
                "a later checkpoint",
            )
            first.process.send_signal(signal.SIGSTOP)
            rows = history(store)
            assert 1 <= len(rows) < 3 and store.size("summary.json") is None, (
                "it is in the middle of its work"
            )
            shown = wait_for(
                lambda: tensorboard.steps("loss/train"),
                "points in TensorBoard while the run goes on",
            )
            assert shown[: len(rows)] == [int(row["step"]) for row in rows][: len(shown)]
            first.stopped()  # kill -9
        with training(dataset, artifacts, *options, cache=tmp_path / "two") as second:
            assert second.ended() == 0, second.text()
        resumed = re.search(r"going on after step (\d+)", second.text())
        assert resumed and int(resumed[1]) % epoch_steps, "it went on from the middle of an epoch"
        rows = history(store)
        assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
        check_tensorboard(tensorboard, store)  # the server that saw the first machine's events, too
    with TensorBoard(artifacts, tmp_path) as tensorboard:
        check_tensorboard(tensorboard, store)

    with training(
        dataset, str(tmp_path / "submit"), *options, cache=tmp_path / "three"
    ) as undisturbed:
        assert undisturbed.ended() == 0, undisturbed.text()
    expected = open_store(str(tmp_path / "submit" / "r"))
    measured = [name for name in rows[0] if name.split("_")[0] in ("train", "val", "shifted")]
    for ours, theirs in zip(rows, history(expected), strict=True):
        assert {name: ours[name] for name in measured} == {name: theirs[name] for name in measured}
    one, other = (load_model(place).network.state_dict() for place in (store, expected))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert store.read("predictions.csv") == expected.read("predictions.csv")
    assert last_stored(s3_bucket) == "runs/r/summary.json"


def last_stored(bucket: str) -> str:
    """The key of the newest object of a bucket."""
    import boto3.session

    client = boto3.session.Session().client("s3")
    found = client.list_objects_v2(Bucket=bucket)["Contents"]
    client.close()
    newest = max(entry["LastModified"] for entry in found)
    names = {entry["Key"] for entry in found if entry["LastModified"] == newest}
    return "runs/r/summary.json" if "runs/r/summary.json" in names else names.pop()


RETRY_S = 1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, str]]:
    """A bucket's address behind a proxy that fails on request, for commands that try no request
    again after a second. A busy server's answer is waited for.
    """
    with moto_server() as url, new_bucket(url) as bucket, Proxy(url) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        monkeypatch.setenv("XRAI_S3_TIMEOUT_S", "120")
        monkeypatch.setenv("XRAI_S3_RETRY_S", str(RETRY_S))
        yield proxy, f"s3://{bucket}/runs"


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's packages
def test_a_bucket_that_hangs_refuses_and_loses_answers_does_not_hold_the_training_up(
    finished: Finished, tmp_path: Path, failing: tuple[Proxy, str]
) -> None:
    proxy, artifacts = failing
    dataset = finished.dataset
    store = open_store(f"{artifacts}/r")
    for name in ("config", "environment", "history", "tensorboard", "curves", "checkpoints"):
        proxy.fail("hang", method="PUT", path=f"/runs/r/{name}", times=1000)
    with training(dataset, artifacts, "--train.epochs=2", cache=tmp_path / "cache") as run:
        run.wait_for("training ends after epoch 2")
        assert [found.key for found in store.list()] == [LEASE_KEY]
        time.sleep(RETRY_S + 0.5)  # a fast training: the first upload must outlast its retries
        proxy.heal()
        proxy.fail("503", method="PUT", path="tensorboard", times=3)
        proxy.fail("lose", method="PUT", path="checkpoints", times=2)
        proxy.fail("reset", method="PUT", path="summary.json", times=1)
        assert run.ended() == 0, run.text()
    assert "config.yaml is not stored yet and will be tried again; the run goes on" in run.text()
    assert re.search(r"config\.yaml is stored now; \d+ more files wait", run.text())
    summary = check_whole(store)
    assert summary["num_failed_uploads"] >= 1
    assert proxy.count("summary.json", "PUT") == 2
    puts = [request.path for request in proxy.requests if request.method == "PUT"]
    assert (
        "summary.json" in [path for path in puts if LEASE_KEY not in path][-1]
    )  # renewed till then


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's packages
@pytest.mark.ci
def test_a_bucket_that_stays_away_is_one_line_and_a_later_start_finishes_the_upload(
    finished: Finished, tmp_path: Path, failing: tuple[Proxy, str]
) -> None:
    proxy, artifacts = failing
    dataset = finished.dataset
    with training(dataset, artifacts, "--train.epochs=2", cache=tmp_path / "cache") as run:
        run.wait_for("epoch 1:")
        proxy.vanish()
        assert run.ended() == 1, run.text()
    lines = [line for line in run.text().splitlines() if line.startswith("xrai: ")]
    assert len(lines) == 1 and "Traceback" not in run.text()
    said = re.fullmatch(
        r"xrai: error: \d+ files of run r could not be stored at s3://\S+/runs/r, "
        r".* all results are in (\S+): copy "
        r"them from there, or start again with the same --run_id",
        lines[0],
    )
    assert said, lines
    folder = Path(said[1])
    assert folder.is_relative_to(tmp_path / "cache")
    assert {"model.pt", "report.html", "history.csv"} <= {path.name for path in folder.iterdir()}
    assert "training ends after epoch 2" in run.text()
    weights = (folder / "model.pt").read_bytes()

    proxy.appear()
    store = open_store(f"{artifacts}/r")
    assert store.size("summary.json") is None
    with training(dataset, artifacts, "--train.epochs=2", cache=tmp_path / "cache") as again:
        assert again.ended() == 0, again.text()
    assert "epoch 2:" not in again.text(), "nothing is trained twice"
    check_whole(store)
    assert load_model(store).thresholds == pytest.approx(thresholds_of(weights, tmp_path))
    assert len(history(store)) == 2


def thresholds_of(model: bytes, folder: Path) -> list[float]:
    (folder / "model-before.pt").write_bytes(model)
    value = torch.load(folder / "model-before.pt", weights_only=True)["thresholds"]
    assert isinstance(value, list)
    return value
