"""A run's folder: ids, addresses, whole files, and what a finished run says of itself."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.results.runs import Bucket, row
from xrai.errors import InUseError, UserError
from xrai.results.folder import RunFolder, check_run_id, new_run_id


def test_a_new_run_id_sorts_by_time_is_allowed_and_is_unique() -> None:
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


def test_a_run_of_a_bucket_has_one_writer_until_it_is_closed(
    tmp_path: Path, bucket: Bucket
) -> None:
    one, other = (RunFolder("s3://bucket/runs", "r1", work_dir=tmp_path / n) for n in "ab")
    one.lock()
    one.open()
    with pytest.raises(InUseError):
        other.lock()
    one.close()
    assert [found.key for found in bucket.list()] == []
    other.lock()
    assert not other.exists()  # a lease is no run
    other.close()


def test_an_address_that_cannot_be_written_is_refused_in_one_line_and_nothing_is_left(
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


def test_a_bucket_is_tested_with_an_object_that_is_deleted_again(
    bucket: Bucket, tmp_path: Path
) -> None:
    RunFolder.check_writable("s3://bucket/runs")
    assert list(bucket.list()) == []
    assert bucket.log[0].startswith("-.write-check-")


def test_where_a_run_of_a_bucket_is_first_written_is_tested_as_well(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"written to .*/file/xrai/runs .*set XDG_CACHE_HOME"):
        RunFolder.check_writable("s3://bucket/runs")
    RunFolder.check_writable("s3://bucket/predictions", flag="--out")


def test_a_folder_store_holds_the_run_itself_and_summary_names_every_file(run: RunFolder) -> None:
    run.write_text("config.yaml", "train: {}\n")
    run.append_history(row(1))
    (run.path / "leftover.tmp").write_text("half")
    run.finish({"run_id": "r1"})
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["run_id"] == "r1"
    assert set(summary["files"]) == {
        "config.yaml",
        "history.csv",
        "tensorboard/events.out.tfevents.000000.xrai",
    }
    for name, digest in summary["files"].items():
        assert hashlib.sha256((run.path / name).read_bytes()).hexdigest() == digest
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]


def test_a_name_that_is_not_utf_8_does_not_end_a_run(run: RunFolder) -> None:
    assert run.write_text("report.html", "films of \udcff").read_bytes() == b"films of ?"


def test_opening_a_finished_run_withdraws_its_summary(run: RunFolder) -> None:
    run.write_text("config.yaml", "a: {}\n")
    run.finish({})
    again = RunFolder(str(run.path.parent), "r1")
    assert again.exists()
    again.open()
    assert not (run.path / "summary.json").exists()
    assert (run.path / "config.yaml").exists()
    assert not RunFolder(str(run.path.parent), "r2").exists()


def test_runs_of_two_buckets_with_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    one, two = (RunFolder(f"s3://{name}/runs", "r1", work_dir=tmp_path) for name in ("one", "two"))
    assert one.path != two.path
    assert one.address == "s3://one/runs/r1"
