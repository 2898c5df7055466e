"""history.csv keeps its columns, comes back as it was, and loses what is done again."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.results.runs import read_events, row
from xrai.errors import RunError
from xrai.results.folder import RunFolder
from xrai.results.history import parse_history

METRICS = {  # of an epoch: the column of history.csv, in order, and the tag in TensorBoard
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "val_loss": "loss/val",
    "val_accuracy": "accuracy/val",
    "val_auroc": "auroc/val",
    "shifted_accuracy": "accuracy/val_shifted",
    "shifted_auroc": "auroc/val_shifted",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "images_per_s": "throughput/images_per_s",
    "data_wait_share": "throughput/data_wait_share",
    "accelerator_utilisation": "throughput/accelerator_utilisation",
    "fetch_s": "time/fetch_s",
    "verify_s": "time/verify_s",
    "assemble_s": "time/assemble_s",
    "transfer_s": "time/transfer_s",
    "compute_s": "time/compute_s",
    "eval_s": "time/eval_s",
    "epoch_s": "time/epoch_s",
    "peak_memory_mib": "memory/peak_mib",
}


def test_history_has_one_column_for_each_metric_and_comes_back_as_it_was(run: RunFolder) -> None:
    rows = [row(1, val_loss=math.nan), row(2, val_loss=0.25, lr=1e-3)]
    for entry in rows:
        run.append_history(entry)
    header, first, _ = (run.path / "history.csv").read_text().splitlines()
    assert header.split(",") == ["epoch", "step", *METRICS]
    assert first.startswith("1,10,0.5,,,0.51,")
    assert parse_history((run.path / "history.csv").read_bytes(), where="r1") == rows
    assert math.isnan(rows[0].val_loss) and math.isnan(rows[0].lr)


def test_the_log_line_of_an_epoch_shows_what_a_person_follows() -> None:
    line = row(3, val_auroc=0.91234, data_wait_share=0.0123, images_per_s=1234.5).line()
    assert line.startswith(
        "epoch 3: loss 0.2500, val loss nan, val accuracy 0.5300, val AUROC 0.91"
    )
    assert "1234 images/s, 1.2% of the time waiting for data" in line
    assert "images/s" not in row(3).line()  # an epoch whose steps an earlier process did


def test_resuming_drops_the_rows_at_or_past_the_epoch_and_no_row_stands_twice(
    run: RunFolder,
) -> None:
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    again = RunFolder(str(run.path.parent), "r1")
    again.open()
    again.resume_at(epoch=2, step=11)
    again.append_history(row(2, train_loss=9.0))
    assert [(entry.epoch, entry.train_loss) for entry in again.history()] == [(1, 0.5), (2, 9.0)]


def test_the_worst_of_several_outputs_has_a_column_and_a_name_in_the_log(run: RunFolder) -> None:
    run.append_history(row(1))  # by a version that did not have the column, before a resume
    before = (run.path / "history.csv").read_text()
    assert "worst" not in before and "worst" not in row(1).line("VIRAL")
    second = row(2, val_auroc=0.93, val_auroc_worst=0.8671)
    run.append_history(second)
    lines = (run.path / "history.csv").read_text().splitlines()
    assert lines[0].replace(",val_auroc_worst", "") == before.splitlines()[0]
    assert [line.split(",")[6:8] for line in lines] == [
        ["val_auroc", "val_auroc_worst"],
        ["", ""],
        ["0.93", "0.8671"],
    ]
    assert run.history() == [row(1), second]
    assert "val AUROC 0.9300, worst VIRAL 0.867, augmented" in second.line("VIRAL")
    assert read_events(run)["auroc/val_worst"] == [(20, pytest.approx(0.8671))]


@pytest.mark.parametrize(
    "text",
    [
        "epoch,step\none,2\n",
        "epoch,step\n1\n",
        "step\n1\n",
        "epoch,step,loss\n1,2,3\n",
        "epoch,step\n1,2,3\n",
    ],
)
def test_a_damaged_history_is_refused_by_name(run: RunFolder, text: str) -> None:
    (run.path / "history.csv").write_text(text)
    with pytest.raises(RunError, match=r"history\.csv is not a history"):
        run.history()


@pytest.mark.ci
def test_a_writer_killed_at_any_moment_leaves_a_whole_history(tmp_path: Path) -> None:
    program = """
import os, sys
import torch.utils.tensorboard  # once, for all writers
from xrai.results.folder import RunFolder
from xrai.results.history import EpochRow
while sys.stdin.readline():
    if writer := os.fork():
        os.waitpid(writer, 0)
        print("killed", flush=True)
        continue
    print(os.getpid(), flush=True)
    run = RunFolder(sys.argv[1], "r1")
    run.open()
    run.resume_at(epoch=0, step=0)
    for epoch in range(1, 10**6):
        run.append_history(EpochRow(epoch=epoch, step=epoch, train_loss=0.5))
        print(epoch, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "submit")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        for num_epochs in (1, 4, 9):
            parent.stdin.write("next\n")
            writer = int(parent.stdout.readline())
            for _ in range(num_epochs):
                assert parent.stdout.readline()
            os.kill(writer, signal.SIGKILL)  # while it is busy with one of the next
            while parent.stdout.readline() != "killed\n":
                pass
            run = RunFolder(str(tmp_path / "submit"), "r1")
            rows = run.history()
            assert len(rows) >= num_epochs
            assert [entry.epoch for entry in rows] == list(range(1, len(rows) + 1))
            assert len(read_events(run)["loss/train"]) in (len(rows), len(rows) - 1)


def test_tensorboard_reads_every_metric_of_the_history_back(run: RunFolder) -> None:
    run.append_history(row(1, **{column: 0.25 for column in METRICS}))
    run.append_history(row(2, val_loss=math.nan))
    found = read_events(run)
    assert set(found) == set(METRICS.values())
    assert found["loss/train"] == [(10, 0.25), (20, pytest.approx(1 / 3))]
    assert found["loss/val"] == [(10, 0.25)]
