import contextlib
import errno
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learning.fakes import DamagingStore
from xrai.errors import CorruptError, NotFoundError, RunError
from xrai.learning import checkpoint
from xrai.learning.checkpoint import CheckpointFolder, read_state, refuse_other_run
from xrai.store import open_store


class Recorder:
    """Stands for the run's folder: notes what is announced."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.removed: list[str] = []

    def publish(self, names: Sequence[str]) -> None:
        self.published.extend(names)

    def remove(self, names: Sequence[str]) -> None:
        self.removed.extend(names)


def open_folder(path: Path, recorder: Recorder | None = None, **keep: int) -> CheckpointFolder:
    recorder = recorder or Recorder()
    kept = {"keep_last": 2, "keep_best": 1, **keep}
    return CheckpointFolder(
        path, store=open_store(str(path)), publish=recorder.publish, remove=recorder.remove, **kept
    )


def state_of(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((300,), float(step))}, "progress": {"step": step}}


def steps_on_disk(path: Path) -> list[int]:
    return sorted(
        int(file.stem.partition("-")[2]) for file in (path / "checkpoints").glob("step-*.pt")
    )


def test_the_newest_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for step in (5, 10):
        folder.save(state_of(step), step=step, epoch=1, score=None)
    found = open_folder(tmp_path).newest()
    assert found is not None
    entry, state = found
    assert entry.step == 10 and state["progress"] == {"step": 10}
    assert torch.equal(state["model"]["weight"], torch.full((300,), 10.0))


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert open_folder(tmp_path).newest() is None and open_folder(tmp_path).best() is None


def test_the_last_ones_and_the_best_are_kept_and_nothing_else(tmp_path: Path) -> None:
    recorder = Recorder()
    folder = open_folder(tmp_path, recorder, keep_last=2, keep_best=2)
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: None, 5: 0.8, 6: 0.1, 7: float("nan")}
    for step, score in scores.items():
        folder.save(state_of(step), step=step, epoch=step, score=score)
    assert steps_on_disk(tmp_path) == [2, 5, 6, 7]
    assert sorted(recorder.removed) == sorted(
        f"checkpoints/step-{step:09d}.{kind}" for step in (1, 3, 4) for kind in ("json", "pt")
    )
    reopened = open_folder(tmp_path, keep_last=2, keep_best=2)
    assert reopened.newest() is not None
    best = reopened.best()
    assert best is not None and best[0].step == 2 and best[0].score == 0.9


def test_of_equal_scores_the_first_is_the_best(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, keep_last=5, keep_best=5)
    for step in (3, 4, 5):
        folder.save(state_of(step), step=step, epoch=step, score=0.5)
    best = folder.best()
    assert best is not None and best[0].step == 3


def test_files_are_announced_with_the_commit_mark_after_the_weights_and_latest_last(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    open_folder(tmp_path, recorder).save(state_of(4), step=4, epoch=0, score=None)
    assert recorder.published == [
        "checkpoints/step-000000004.pt",
        "checkpoints/step-000000004.json",
        "checkpoints/latest.json",
    ]
    latest = json.loads((tmp_path / "checkpoints/latest.json").read_text())
    assert latest["file"] == "checkpoints/step-000000004.pt" and latest["step"] == 4


@pytest.mark.parametrize("name", ["write_state", "write_atomically"])
def test_a_kill_between_two_saves_of_one_step_leaves_a_readable_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tmp_path)
    folder.save(state_of(5), step=5, epoch=0, score=None)
    write = getattr(checkpoint, name)

    def killed(*arguments: Any) -> None:
        if name == "write_state":
            write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save(state_of(5), step=5, epoch=1, score=0.5)
    reopened = open_folder(tmp_path)
    found = reopened.newest()
    assert found is not None and (found[0].epoch, found[0].score) == (0, None)
    reopened.remove_unmarked()
    recorder = Recorder()
    again = open_folder(tmp_path, recorder)
    assert again.newest() is not None
    again.save(state_of(5), step=5, epoch=1, score=0.5)
    assert recorder.published[0] == "checkpoints/step-000000005_2.pt"
    assert recorder.removed == [f"checkpoints/step-000000005.{kind}" for kind in ("json", "pt")]
    last = open_folder(tmp_path).newest()
    assert last is not None and (last[0].epoch, last[0].score) == (1, 0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_checkpoint_cut_short_is_skipped_with_a_warning_for_the_one_before(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_folder(tmp_path)
    for step in (5, 10):
        folder.save(state_of(step), step=step, epoch=1, score=None)
    newest = tmp_path / "checkpoints/step-000000010.pt"
    data = newest.read_bytes()
    newest.write_bytes(data[: int(len(data) * share)])
    found = open_folder(tmp_path).newest()
    assert found is not None and found[0].step == 5
    assert "step-000000010.pt is skipped" in caplog.text


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for step in (5, 10):
        folder.save(state_of(step), step=step, epoch=1, score=None)
    newest = tmp_path / "checkpoints/step-000000010.pt"
    data = bytearray(newest.read_bytes())
    digest = json.loads((tmp_path / "checkpoints/step-000000010.json").read_text())["sha256"]
    for position in range(0, len(data), len(data) // 9):
        damaged = data.copy()
        damaged[position] ^= 1
        newest.write_bytes(damaged)
        with pytest.raises(CorruptError, match="does not have the hash"):
            read_state(newest, name="the newest", sha256=digest)


def test_weights_without_their_mark_are_no_checkpoint_and_are_removed_on_request(
    tmp_path: Path,
) -> None:
    folder = open_folder(tmp_path)
    for step in (5, 10):
        folder.save(state_of(step), step=step, epoch=1, score=None)
    (tmp_path / "checkpoints/step-000000010.json").unlink()
    (tmp_path / "checkpoints/notes.pt").touch()
    recorder = Recorder()
    reopened = open_folder(tmp_path, recorder)
    found = reopened.newest()
    assert found is not None and found[0].step == 5
    assert steps_on_disk(tmp_path) == [5, 10] and not recorder.removed
    reopened.remove_unmarked()
    assert steps_on_disk(tmp_path) == [5]
    assert recorder.removed == ["checkpoints/step-000000010.pt"]
    assert (tmp_path / "checkpoints/notes.pt").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 10}', "\udcff"])
def test_a_damaged_mark_is_skipped_with_a_warning(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_folder(tmp_path)
    for step in (5, 10):
        folder.save(state_of(step), step=step, epoch=1, score=None)
    (tmp_path / "checkpoints/step-000000010.json").write_text(text, errors="surrogateescape")
    found = open_folder(tmp_path).newest()
    assert found is not None and found[0].step == 5
    assert "step-000000010.json" in caplog.text


@pytest.mark.parametrize("pattern", ["step-*.pt", "step-*.json"])
def test_a_run_of_which_no_checkpoint_can_be_read_is_not_begun_again(
    pattern: str, tmp_path: Path
) -> None:
    folder = open_folder(tmp_path)
    for step in (5, 10):
        folder.save(state_of(step), step=step, epoch=1, score=None)
    for path in (tmp_path / "checkpoints").glob(pattern):
        path.write_bytes(path.read_bytes()[:-9])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    recorder = Recorder()
    with pytest.raises(RunError, match=r"none of the checkpoints of .* can be read \(2 in all\)"):
        open_folder(tmp_path, recorder).newest()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert recorder.removed == []


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_checkpoint_that_arrives_damaged_is_fetched_again(
    num_damaged: int, tmp_path: Path
) -> None:
    writer = open_folder(tmp_path / "bucket")
    for step in (5, 10):
        writer.save(state_of(step), step=step, epoch=1, score=None)
    bucket = DamagingStore(tmp_path / "bucket", num_damaged=num_damaged)
    none = Recorder()
    folder = CheckpointFolder(
        tmp_path / "here",
        store=bucket,
        publish=none.publish,
        remove=none.remove,
        keep_last=2,
        keep_best=1,
    )
    found = folder.newest()
    assert found is not None and found[0].step == 10
    assert none.removed == [] and bucket.num_damaged == 0
    for name in (found[0].file, found[0].file.replace(".pt", ".json")):  # both are of the run here
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "bucket" / name).read_bytes()


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CorruptError):
        read_state(tmp_path / "model.pt", name="model.pt")
    torch.save({"model": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CorruptError):
        read_state(tmp_path / "model.pt", name="model.pt")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_state(tmp_path / "model.pt", name="model.pt")


def test_a_checkpoint_of_another_run_is_refused_by_the_fact_that_differs() -> None:
    with pytest.raises(
        RunError, match=r"step-1\.pt was saved with image size = 64, this run has 128"
    ):
        refuse_other_run(
            {"seed": 0, "image size": 64}, {"seed": 0, "image size": 128}, name="step-1.pt"
        )
    with pytest.raises(
        RunError, match=r"step-1\.pt does not state its task, so an earlier version"
    ):
        refuse_other_run({"seed": 0}, {"task": "binary", "seed": 0}, name="step-1.pt")
    refuse_other_run({"seed": 0}, {"seed": 0}, name="step-1.pt")


def test_a_full_disk_is_told_as_such_and_not_as_torch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "replacing", lambda path: contextlib.nullcontext(Full()))
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.write_state(tmp_path / "a.pt", {"weights": torch.zeros(1000)})
