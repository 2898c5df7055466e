"""A run's folder: whole files, history and events that resume, a bucket that fails, and one set
of numbers.
"""

import csv
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServerReader,
)
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.util.tensor_util import make_ndarray

from xrai.config import Config
from xrai.errors import ForbiddenError, RunError, StoreError, UnreachableError, UserError
from xrai.results import folder as folder_module
from xrai.results import publisher
from xrai.results.environment import describe_environment
from xrai.results.folder import FINAL_TAGS, RunFolder, check_run_id, new_run_id
from xrai.results.history import HISTORY_COLUMNS, TENSORBOARD_TAGS, read_history
from xrai.results.metrics import HEADLINES
from xrai.results.tables import safe_path, to_json
from xrai.results.tensorboard import count_calls
from xrai.results.types import Estimate
from xrai.store import FolderStore


def row(epoch: int, **values: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": epoch * 10,
        "train_loss": 1 / (epoch + 1),
        "val_accuracy": 0.5 + epoch / 100,
        **values,
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "submit"), "r1")
    folder.open()
    return folder


class Bucket(FolderStore):
    """A bucket that is a folder: it has no local path, notes what is stored, and fails when told
    to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.log: list[str] = []
        self.error: Callable[[str], Exception | None] = lambda key: None
        self.gate = threading.Event()
        self.gate.set()

    def local_path(self, key: str) -> Path | None:
        return None

    def upload(self, key: str, path: Path) -> str:
        self.gate.wait(20)
        if (error := self.error(key)) is not None:
            raise error
        self.log.append(key)
        return super().upload(key, path)

    def delete(self, key: str) -> None:
        super().delete(key)
        self.log.append(f"-{key}")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    found = Bucket(tmp_path / "bucket")
    monkeypatch.setattr(folder_module, "open_store", lambda uri: found)
    monkeypatch.setattr(publisher, "_FIRST_PAUSE_S", 0.01)
    return found


def remote_run(tmp_path: Path, work: str = "work") -> RunFolder:
    folder = RunFolder("s3://bucket/runs", "r1", work_dir=tmp_path / work)
    folder.open()
    return folder


# ----------------------------------------------------------------------------------- ids, addresses


def test_a_new_run_id_sorts_by_time_is_allowed_and_is_not_given_twice() -> None:
    now = datetime(2026, 11, 23, 3, 15, 0, tzinfo=UTC)
    ids = {new_run_id(now) for _ in range(50)}
    assert len(ids) == 50
    assert all(check_run_id(run_id).startswith("20261123-031500-") for run_id in ids)


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "a..b", "../x", "a/b", "/a", "-a", ".a", "a b", "a\n", "ä", "x" * 129]
)
def test_a_run_id_that_could_leave_its_folder_or_mislead_is_refused(run_id: str) -> None:
    with pytest.raises(UserError, match="--run_id"):
        check_run_id(run_id)


def test_a_place_that_can_not_be_written_is_refused_in_one_line_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    for address in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        Path("/proc/xrai"),
        Path("/dev/null/x"),
    ):
        with pytest.raises(UserError, match="results cannot be written to") as caught:
            RunFolder.check_writable(str(address))
        assert "\n" not in str(caught.value)
        assert "--artifacts" in str(caught.value)
    RunFolder.check_writable(str(tmp_path / "new" / "deep"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bucket_is_tried_with_an_object_that_is_taken_back(
    bucket: Bucket, tmp_path: Path
) -> None:
    RunFolder.check_writable("s3://bucket/runs")
    assert list(bucket.list()) == []
    assert bucket.log[0].startswith("-.write-check-")


# -------------------------------------------------------------------------------- files and history


def test_json_has_null_for_what_is_not_finite_and_plain_numbers_for_numpy_ones(
    run: RunFolder,
) -> None:
    path = run.write_json(
        "x.json",
        {"a": np.float32(0.5), "b": [math.nan, np.int64(3)], "c": {"d": math.inf}, "e": "ü"},
    )
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [None, 3], "c": {"d": None}, "e": "ü"}


def test_predictions_come_back_as_they_were_whatever_the_names(run: RunFolder) -> None:
    rows: list[dict[str, Any]] = [
        {
            "source": 'a,"b"\nc.png',
            "patient": "p1",
            "subtype": "",
            "label": 1,
            "score": 0.1 + 0.2,
            "call": 0,
        },
        {
            "source": "d.png",
            "patient": "p2",
            "subtype": "virus",
            "label": 0,
            "score": np.float32(0.3),
        },
    ]
    path = run.write_predictions(rows)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [entry["source"] for entry in found] == ['a,"b"\nc.png', "d.png"]
    assert float(found[0]["score"]) == 0.1 + 0.2
    assert np.float32(found[1]["score"]) == np.float32(0.3)
    assert found[1]["call"] == ""


@pytest.mark.parametrize(
    "name",
    [
        "=1+1.png",
        "+1.png",
        "-1.png",
        "@x/y.png",
        "\tx.png",
        "\r=x.png",
        "\n-x",
        "=cmd|' /C calc'!A0",
    ],
)
def test_no_cell_of_predictions_begins_as_a_formula_does_and_the_path_stays_the_same(
    run: RunFolder, name: str
) -> None:
    values = {
        "split": "val",
        "patient": "file:x",
        "subtype": "",
        "label": "NORMAL",
        "score": 0.5,
        "call": "NORMAL",
    }
    path = run.write_predictions(
        [{"source": name, **values}, {"source": "train/a=b.png", **values}]
    )
    with path.open(newline="") as file:
        hostile, plain = csv.DictReader(file)
    assert all(cell[:1] not in ("=", "+", "-", "@", "\t", "\r", "\n") for cell in hostile.values())
    assert Path("raw", hostile["source"]) == Path("raw", name)
    assert plain["source"] == "train/a=b.png"
    assert safe_path(safe_path(name)) == safe_path(name)


def test_history_keeps_the_declared_columns_and_comes_back_as_numbers(run: RunFolder) -> None:
    run.append_history(row(1, val_loss=math.nan, lr=None))
    run.append_history(row(2, val_loss=0.25))
    assert (run.path / "history.csv").read_text().splitlines()[0] == ",".join(HISTORY_COLUMNS)
    first, second = read_history(run.path / "history.csv")
    assert (first["epoch"], first["step"], first["train_loss"], first["val_loss"], first["lr"]) == (
        1,
        10,
        0.5,
        None,
        None,
    )
    assert second["val_loss"] == 0.25
    with pytest.raises(ValueError, match="no columns of history"):
        run.append_history({"epoch": 3, "step": 30, "accuracy": 1.0})


def test_resuming_drops_the_rows_at_or_past_the_epoch_and_no_row_stands_twice(
    run: RunFolder,
) -> None:
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    again = RunFolder(str(run.path.parent), "r1")
    again.open()
    again.resume_at(epoch=2, step=11)
    again.append_history(row(2, train_loss=9.0))
    assert [(entry["epoch"], entry["train_loss"]) for entry in again.history()] == [
        (1, 0.5),
        (2, 9.0),
    ]


def test_a_damaged_history_is_refused_by_name(run: RunFolder) -> None:
    (run.path / "history.csv").write_text("epoch,step\none,2\n")
    with pytest.raises(RunError, match=r"history\.csv is not a history"):
        run.history()


def test_a_writer_killed_at_any_moment_leaves_a_whole_history(tmp_path: Path) -> None:
    program = (
        "import sys; from xrai.results.folder import FINAL_TAGS, RunFolder\n"
        "run = RunFolder(sys.argv[1], 'r1'); run.open(); run.resume_at(epoch=0, step=0)\n"
        "for epoch in range(1, 10**6):\n"
        "    run.append_history({'epoch': epoch, 'step': epoch, 'train_loss': 0.5})\n"
        "    print(epoch, flush=True)\n"
    )
    for num_epochs in (1, 4, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "submit")], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(num_epochs):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)  # while it is busy with one of the next
        process.wait()
        process.stdout.close()
        run = RunFolder(str(tmp_path / "submit"), "r1")
        run.open()
        rows = run.history()
        assert len(rows) >= num_epochs
        assert [entry["epoch"] for entry in rows] == list(range(1, len(rows) + 1))
        assert len(read_events(run)["loss/train"]) in (len(rows), len(rows) - 1)


# -------------------------------------------------------------------------------------- TensorBoard


def read_events(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_every_scalar_of_the_history_back(run: RunFolder) -> None:
    full = {column: 0.25 for column in HISTORY_COLUMNS if column not in ("epoch", "step")}
    run.append_history({"epoch": 1, "step": 10, **full})
    run.append_history(row(2, val_loss=math.nan))
    found = read_events(run)
    assert set(found) == set(TENSORBOARD_TAGS.values())
    assert found["loss/train"] == [(10, 0.25), (20, pytest.approx(1 / 3))]
    assert found["loss/val"] == [(10, 0.25)]


def test_segments_are_closed_sort_by_number_and_each_is_readable_alone(run: RunFolder) -> None:
    for epoch in range(1, 13):
        run.append_history(row(epoch))
    names = sorted(path.name for path in (run.path / "tensorboard").iterdir())
    assert names == [f"events.out.tfevents.{number:06d}.xrai" for number in range(12)]
    assert [step for step, _ in read_events(run)["loss/train"]] == [
        10 * epoch for epoch in range(1, 13)
    ]
    for path in (run.path / "tensorboard").iterdir():
        alone = EventAccumulator(str(path))
        alone.Reload()
        assert len(alone.Scalars("loss/train")) == 1


def test_resuming_purges_what_tensorboard_had_past_the_step(run: RunFolder) -> None:
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    again = RunFolder(str(run.path.parent), "r1")
    again.open()
    again.resume_at(epoch=2, step=11)
    again.append_history(row(2, train_loss=9.0))
    again.append_history(row(3, train_loss=8.0))
    assert read_events(again)["loss/train"] == [(10, 0.5), (20, 9.0), (30, 8.0)]


def server_points(run: RunFolder, tag: str) -> list[tuple[int, float]]:
    """What the reader behind TensorBoard's server has of a scalar; the other one is for people's
    scripts.
    """
    events = ServerReader(str(run.path / "tensorboard"))
    events.Reload()
    return [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]


def test_the_first_resumption_and_each_later_one_purges_in_both_readers_of_tensorboard(
    run: RunFolder,
) -> None:
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    for value in (9.0, 8.0):
        run = RunFolder(str(run.path.parent), "r1")
        run.open()
        run.resume_at(epoch=2, step=11)
        run.append_history(row(2, train_loss=value))
        expected = [(10, 0.5), (20, value)]
        assert read_events(run)["loss/train"] == server_points(run, "loss/train") == expected


def test_an_epoch_done_twice_from_a_checkpoint_at_its_last_step_stands_once_in_tensorboard(
    run: RunFolder,
) -> None:
    for epoch in (1, 2):
        run.append_history(row(epoch))
    again = RunFolder(str(run.path.parent), "r1")
    again.open()
    again.resume_at(
        epoch=2, step=21
    )  # epoch 2 was trained up to step 20, and its end was not saved
    again.append_history(row(2, train_loss=9.0))
    assert server_points(again, "loss/train") == [(10, 0.5), (20, 9.0)]


def test_no_temporary_file_looks_like_events_to_tensorboard(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    replace = Path.replace

    def note(path: Path, target: Path) -> Path:
        seen.extend(found.name for found in path.parent.iterdir())
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    run.add_scalars(1, {"x": 1.0})
    run.close_segment()
    assert len(seen) == 1 and "tfevents" not in seen[0]


def test_hyperparameters_and_final_results_are_those_of_the_run(run: RunFolder) -> None:
    metrics = {name: Estimate(place / 10) for place, name in enumerate(HEADLINES)}
    config = Config().to_mapping()
    run.add_hyperparameters(config)
    run.append_history(row(1))
    run.add_results(11, metrics)
    run.finish({})
    events = ServerReader(str(run.path / "tensorboard"))
    events.Reload()
    content = events.PluginTagToContent("hparams")
    start = hparams_metadata.parse_session_start_info_plugin_data(
        content[hparams_metadata.SESSION_START_INFO_TAG]
    )
    assert start.group_name == "r1"
    flat = {
        f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()
    }
    assert {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    } == flat
    described = hparams_metadata.parse_experiment_plugin_data(
        content[hparams_metadata.EXPERIMENT_TAG]
    )
    assert {info.name for info in described.hparam_infos} == set(flat)
    assert {info.name.tag for info in described.metric_infos} >= set(FINAL_TAGS.values())
    assert hparams_metadata.parse_session_end_info_plugin_data(
        content[hparams_metadata.SESSION_END_INFO_TAG]
    ).status
    for name, tag in FINAL_TAGS.items():
        assert server_points(run, tag) == [(11, pytest.approx(metrics[name].value))]


@given(
    calls=st.lists(
        st.tuples(st.integers(0, 1), st.floats(0, 1) | st.integers(0, 10).map(lambda k: k / 10)),
        min_size=1,
        max_size=30,
    )
)
def test_the_precision_recall_curve_counts_as_scikit_learn_does(
    calls: list[tuple[int, float]],
) -> None:
    labels, scores = (np.array(column) for column in zip(*calls, strict=True))
    counted = count_calls(labels, scores, num_thresholds=11)
    for threshold, column in zip(np.linspace(0, 1, 11), counted.T, strict=True):
        tn, fp, fn, tp = confusion_matrix(labels, scores >= threshold, labels=[0, 1]).ravel()
        precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
        assert column == pytest.approx(np.array([tp, fp, tn, fn, precision, recall], np.float32))


def test_the_precision_recall_curve_of_one_class_is_left_out(run: RunFolder) -> None:
    run.add_precision_recall(1, "one", [1, 1], [0.2, 0.9])
    run.add_precision_recall(1, "both", [0, 1], [0.2, 0.9])
    run.close_segment()
    events = ServerReader(str(run.path / "tensorboard"))
    events.Reload()
    assert list(events.PluginTagToContent("pr_curves")) == ["both"]


def test_only_png_files_are_kept_as_images(run: RunFolder) -> None:
    (run.path / "no.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="no PNG"):
        run.add_picture(7, "x", run.path / "no.png")


# -------------------------------------------------------------------------------------- publication


def test_a_folder_store_holds_the_run_itself_and_summary_names_every_file(run: RunFolder) -> None:
    run.write_config("train: {}\n")
    run.append_history(row(1))
    (run.path / "leftover.tmp").write_text("half")
    summary = run.finish({"run_id": "r1"})
    assert json.loads((run.path / "summary.json").read_text()) == summary
    assert set(summary["files"]) == {
        "config.yaml",
        "history.csv",
        "tensorboard/events.out.tfevents.000000.xrai",
    }
    for name, digest in summary["files"].items():
        assert hashlib.sha256((run.path / name).read_bytes()).hexdigest() == digest
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]


def test_opening_a_finished_run_takes_its_summary_back(run: RunFolder) -> None:
    run.write_config("a: {}\n")
    run.finish({})
    again = RunFolder(str(run.path.parent), "r1")
    assert again.exists()
    again.open()
    assert not (run.path / "summary.json").exists()
    assert (run.path / "config.yaml").exists()
    assert not RunFolder(str(run.path.parent), "r2").exists()


def test_a_bucket_gets_everything_each_byte_once_and_the_summary_last(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    run.write_config("a: {}\n")
    for epoch in (1, 2):
        run.append_history(row(epoch))
    assert run.flush(timeout_s=10)
    (run.path / "plots").mkdir()
    (run.path / "plots/roc.png").write_bytes(b"png")  # never announced
    summary = run.finish({"run_id": "r1"})
    assert bucket.log[-1] == "summary.json"
    stored = {key: bucket.read(key) for key in (found.key for found in bucket.list())}
    assert set(stored) == {*summary["files"], "summary.json"}
    for name, digest in summary["files"].items():
        assert hashlib.sha256(stored[name]).hexdigest() == digest
    assert json.loads(stored["summary.json"]) == summary
    uploads = [key for key in bucket.log if not key.startswith("-")]
    assert uploads.count("config.yaml") == 1
    assert uploads.count("tensorboard/events.out.tfevents.000000.xrai") == 1
    assert summary["num_failed_uploads"] == 0


def test_a_bucket_that_hangs_or_fails_never_blocks_the_run(bucket: Bucket, tmp_path: Path) -> None:
    bucket.gate.clear()
    run = remote_run(tmp_path)
    began = time.monotonic()
    for epoch in range(1, 20):
        run.append_history(row(epoch))
        run.publish(["history.csv"])
    assert time.monotonic() - began < 5
    assert not run.flush(timeout_s=0.05)
    bucket.gate.set()
    assert run.flush(timeout_s=10)
    assert bucket.log.count("history.csv") <= 3  # what waited went up once, not nineteen times
    run.close()


def test_files_go_up_in_order_so_that_a_pointer_never_precedes_what_it_names(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    failures = iter(range(3))
    bucket.error = lambda key: (
        UnreachableError("no answer")
        if key == "a.pt" and next(failures, None) is not None
        else None
    )
    for name in ("a.pt", "a.json", "latest.json"):
        (run.path / name).write_text(name)
    run.publish(["a.pt", "a.json", "latest.json"])
    assert run.flush(timeout_s=10)
    assert [key for key in bucket.log if not key.startswith("-")] == [
        "a.pt",
        "a.json",
        "latest.json",
    ]
    assert run.num_failed_uploads == 3
    assert run.finish({})["num_failed_uploads"] == 3


def test_a_removed_file_leaves_the_bucket_after_it_came_and_one_that_is_gone_holds_nothing_up(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    bucket.gate.clear()
    (run.path / "old.pt").write_text("old")
    run.publish(["old.pt", "never.pt"])
    run.remove(["old.pt"])
    run.write_text("new.txt", "new")
    bucket.gate.set()
    assert run.flush(timeout_s=10)
    assert [found.key for found in bucket.list()] == ["new.txt"]
    assert not (run.path / "old.pt").exists()
    run.close()


def test_a_store_that_stays_away_at_the_end_is_an_error_that_says_where_the_results_are(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.error = lambda key: ForbiddenError(f"{key}: access denied")
    run = remote_run(tmp_path)
    run.write_config("a: {}\n")
    with pytest.raises(
        StoreError, match=r"1 files of run r1 .*config\.yaml first: .*access denied.*results are in"
    ) as caught:
        run.finish({})
    assert str(run.path) in str(caught.value)
    assert not (run.path / "summary.json").exists()
    assert list(bucket.list()) == []
    assert run.num_failed_uploads >= 4


def test_a_run_goes_on_from_the_bucket_on_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    run = remote_run(tmp_path)
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    run.write("checkpoints/step-1.pt", b"large")
    run.finish({})
    other = remote_run(tmp_path, work="elsewhere")
    assert not (other.path / "checkpoints").exists()
    assert bucket.size("summary.json") is None
    other.resume_at(epoch=3, step=21)
    other.append_history(row(3, train_loss=9.0))
    summary = other.finish({})
    assert [entry["train_loss"] for entry in other.history()] == [0.5, pytest.approx(1 / 3), 9.0]
    assert [step for step, _ in read_events(other)["loss/train"]] == [10, 20, 30]
    assert "tensorboard/events.out.tfevents.000003.xrai" in summary["files"]


def test_what_an_earlier_process_could_not_store_is_stored_first_and_marks_last(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    run.append_history(row(1))
    assert run.flush(timeout_s=10)
    bucket.error = lambda key: UnreachableError("no answer")
    run.append_history(row(2))
    for name in (
        "checkpoints/latest.json",
        "checkpoints/step-000000020.json",
        "checkpoints/step-000000020.pt",
    ):
        run.write_text(name, name)
    run.close()
    bucket.error = lambda key: None
    bucket.log.clear()
    again = remote_run(tmp_path)
    assert [entry["epoch"] for entry in again.history()] == [1, 2]
    assert again.flush(timeout_s=10)
    assert [key for key in bucket.log if not key.startswith("-")] == [
        "checkpoints/step-000000020.pt", "history.csv", "tensorboard/events.out.tfevents.000001.xrai",
        "checkpoints/step-000000020.json", "checkpoints/latest.json",
    ]  # fmt: skip
    again.close()


def test_what_this_machine_has_of_a_run_that_went_on_elsewhere_gives_way(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    run.append_history(row(1))
    assert run.flush(timeout_s=10)
    bucket.error = lambda key: UnreachableError("no answer")
    for _ in range(3):  # segments that the bucket never sees
        run.add_scalars(15, {"loss/train": 5.0})
        run.close_segment()
    run.close()
    bucket.error = lambda key: None
    other = remote_run(tmp_path, work="elsewhere")
    other.resume_at(epoch=2, step=11)
    for epoch in (2, 3):
        other.append_history(row(epoch))
    assert other.flush(timeout_s=10)
    other.close()
    back = remote_run(tmp_path)
    assert back.history() == other.history()
    back.resume_at(epoch=4, step=31)
    back.append_history(row(4))
    assert [step for step, _ in server_points(back, "loss/train")] == [10, 20, 30, 40]
    back.close()


def test_a_run_that_ends_early_says_what_is_not_stored_and_where_it_is(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.error = lambda key: UnreachableError("no answer")
    run = remote_run(tmp_path)
    run.write_config("a: {}\n")
    with caplog.at_level(logging.WARNING, logger="xrai"):
        assert not run.flush(timeout_s=0.1)
        run.close()
        run.close()
    said = [
        record.getMessage()
        for record in caplog.records
        if "are not stored at" in record.getMessage()
    ]
    assert len(said) == 1
    assert f"config.yaml first); they are in {run.path}: start again" in said[0]
    began = time.monotonic()
    assert not run.flush(timeout_s=20)
    assert time.monotonic() - began < 2, "nothing is waited for once it is closed"
    assert RunFolder("s3://bucket/runs", "r1", work_dir=tmp_path / "work").exists(), (
        "what is here counts"
    )


def test_files_are_added_to_a_finished_run_without_touching_what_it_holds(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    run.write_config("a: {}\n")
    run.finish({"run_id": "r1"})
    before = {found.key: bucket.read(found.key) for found in bucket.list()}
    other = RunFolder("s3://bucket/runs", "r1", work_dir=tmp_path / "elsewhere")
    other.attach()
    other.write_json("evaluate/test/metrics.json", {"a": 1})
    other.flush_or_raise(timeout_s=10)
    other.close()
    after = {found.key: bucket.read(found.key) for found in bucket.list()}
    assert after == {**before, "evaluate/test/metrics.json": b'{\n  "a": 1\n}\n'}
    bucket.error = lambda key: UnreachableError("no answer")
    third = RunFolder("s3://bucket/runs", "r1", work_dir=tmp_path / "third")
    third.attach()
    third.write_text("x", "x")
    with pytest.raises(StoreError, match="no answer"):
        third.flush_or_raise(timeout_s=10)


def test_runs_of_two_buckets_with_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    one, two = (RunFolder(f"s3://{name}/runs", "r1", work_dir=tmp_path) for name in ("one", "two"))
    assert one.path != two.path
    assert one.address == "s3://one/runs/r1"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's packages
def test_tensorboard_reads_a_run_from_a_bucket_as_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    s3 = server.ThreadedMotoServer(port=0, verbose=False)
    s3.start()
    try:
        endpoint = "http://{}:{}".format(*s3.get_host_and_port())
        for name in ("AWS_ENDPOINT_URL_S3", "S3_ENDPOINT"):  # the second is TensorBoard's own
            monkeypatch.setenv(name, endpoint)
        for name, value in (
            ("ACCESS_KEY_ID", "a"),
            ("SECRET_ACCESS_KEY", "b"),
            ("DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        RunFolder.check_writable("s3://bucket/runs")
        run = remote_run(tmp_path)
        for epoch in (1, 2, 3):
            run.append_history(row(epoch))
        run.finish({})
        events = EventAccumulator("s3://bucket/runs/r1/tensorboard")
        events.Reload()
        assert [event.step for event in events.Scalars("loss/train")] == [10, 20, 30]
        with pytest.raises(UserError, match="there is no bucket 'absent'"):
            RunFolder.check_writable("s3://absent/runs")
    finally:
        s3.stop()


# ------------------------------------------------------------------------------------- environment


def test_the_environment_names_no_host_user_or_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-value")
    text = to_json(describe_environment())
    assert "s3cret-value" not in text
    assert os.uname().nodename not in text
    assert "torch" in json.loads(text)["packages"]
