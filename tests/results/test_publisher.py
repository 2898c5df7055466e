"""A bucket that hangs, fails, or comes back: what is uploaded, in which order, and what is said."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.results.runs import Bucket, read_events, remote_run, row, server_points
from xrai.errors import ForbiddenError, StoreError, UnreachableError, UserError
from xrai.results.folder import RunFolder
from xrai.results.publisher import Publisher


def test_a_bucket_gets_everything_each_byte_once_and_the_summary_last(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    run.write_text("config.yaml", "a: {}\n")
    for epoch in (1, 2):
        run.append_history(row(epoch))
    assert run.flush(timeout_s=10)
    (run.path / "plots").mkdir()
    (run.path / "plots/roc.png").write_bytes(b"png")  # never announced
    run.finish({"run_id": "r1"})
    assert bucket.log[-1] == "summary.json"
    stored = {key: bucket.read(key) for key in (found.key for found in bucket.list())}
    summary = json.loads(stored["summary.json"])
    assert set(stored) == {*summary["files"], "summary.json"}
    for name, digest in summary["files"].items():
        assert hashlib.sha256(stored[name]).hexdigest() == digest
    assert (run.path / "summary.json").read_bytes() == stored["summary.json"]
    uploads = [key for key in bucket.log if not key.startswith("-")]
    assert uploads.count("config.yaml") == 1
    assert uploads.count("tensorboard/events.out.tfevents.000000.xrai") == 1
    assert summary["num_failed_uploads"] == 0


def test_a_file_that_is_being_uploaded_when_the_run_finishes_is_uploaded_once(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = Publisher.drain

    def open_the_gate_and_drain(publisher: Publisher, **options: Any) -> bool:
        bucket.gate.set()
        return drain(publisher, **options)

    monkeypatch.setattr(Publisher, "drain", open_the_gate_and_drain)
    bucket.gate.clear()
    run = remote_run(tmp_path)
    run.write("model.pt", b"large")
    assert bucket.started.wait(60)
    run.finish({})
    assert bucket.log.count("model.pt") == 1


def test_a_bucket_that_hangs_or_fails_never_blocks_the_run(bucket: Bucket, tmp_path: Path) -> None:
    bucket.gate.clear()
    run = remote_run(tmp_path)
    for epoch in range(1, 20):
        run.append_history(row(epoch))
        run.publish(["history.csv"])
    assert bucket.log == ["-summary.json"]  # nothing is uploaded yet, and nothing waited for it
    assert not run.flush(timeout_s=0.05)
    bucket.gate.set()
    assert run.flush(timeout_s=10)
    assert bucket.log.count("history.csv") <= 3  # what waited went up once, not nineteen times
    run.close()


def test_a_warning_is_followed_by_an_all_clear_though_the_run_ends_in_between(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="xrai")
    bucket.error = lambda key: UnreachableError("no answer")
    run = remote_run(tmp_path)
    run.write_text("config.yaml", "a: {}\n")
    while "config.yaml is not stored yet" not in caplog.text:
        assert not run.flush(timeout_s=0.2)
    assert not run.flush(timeout_s=0)  # counts its attempts from 0
    bucket.error = lambda key: None
    assert run.flush(timeout_s=60)
    assert "config.yaml is stored now" in caplog.text
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
    run.finish({})
    assert json.loads(bucket.read("summary.json"))["num_failed_uploads"] == 3


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
    run.write_text("config.yaml", "a: {}\n")
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
    other.finish({})
    summary = json.loads(bucket.read("summary.json"))
    assert [entry.train_loss for entry in other.history()] == [0.5, pytest.approx(1 / 3), 9.0]
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
    assert [entry.epoch for entry in again.history()] == [1, 2]
    assert again.flush(timeout_s=10)
    assert [key for key in bucket.log if not key.startswith("-")] == [
        "checkpoints/step-000000020.pt",
        "history.csv",
        "tensorboard/events.out.tfevents.000001.xrai",
        "checkpoints/step-000000020.json",
        "checkpoints/latest.json",
    ]
    again.close()


def test_what_this_machine_has_of_a_run_that_went_on_elsewhere_gives_way(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    run.append_history(row(1))
    assert run.flush(timeout_s=10)
    bucket.error = lambda key: UnreachableError("no answer")
    for _ in range(3):  # segments that the bucket never sees
        run.events.add_scalars(15, {"loss/train": 5.0})
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
    run.write_text("config.yaml", "a: {}\n")
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
    assert not run.flush(timeout_s=3600)  # does not wait once it is closed
    assert RunFolder("s3://bucket/runs", "r1", work_dir=tmp_path / "work").exists(), (
        "what is here counts"
    )


def test_files_are_added_to_a_finished_run_without_touching_what_it_holds(
    bucket: Bucket, tmp_path: Path
) -> None:
    run = remote_run(tmp_path)
    run.write_text("config.yaml", "a: {}\n")
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
