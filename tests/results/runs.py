"""Rows, a bucket that fails when told to, and both of TensorBoard's readers."""

import threading
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServerReader,
)
from tensorboard.util.tensor_util import make_ndarray

from xrai.results.folder import RunFolder
from xrai.results.history import EpochRow
from xrai.store import FolderStore


def row(epoch: int, **metrics: float) -> EpochRow:
    """An epoch of ten steps."""
    known = {"train_loss": 1 / (epoch + 1), "val_accuracy": 0.5 + epoch / 100}
    return EpochRow(epoch=epoch, step=epoch * 10, **{**known, **metrics})


class Bucket(FolderStore):
    """A bucket that is a folder without local paths; it logs uploads and fails when told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.log: list[str] = []
        self.error: Callable[[str], Exception | None] = lambda key: None
        self.started = threading.Event()  # an upload
        self.gate = threading.Event()
        self.gate.set()

    def local_path(self, key: str) -> Path | None:
        return None

    def upload(self, key: str, path: Path) -> str:
        self.started.set()
        assert self.gate.wait(200)
        if (error := self.error(key)) is not None:
            raise error
        self.log.append(key)
        return super().upload(key, path)

    def delete(self, key: str) -> None:
        super().delete(key)
        self.log.append(f"-{key}")


def remote_run(tmp_path: Path, work: str = "work") -> RunFolder:
    """An open run whose artifacts go to a bucket, on the machine `work`."""
    folder = RunFolder("s3://bucket/runs", "r1", work_dir=tmp_path / work)
    folder.open()
    return folder


def read_events(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """The scalars (step, value) by tag, from the reader that people use in scripts."""
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def server_reader(run: RunFolder) -> ServerReader:
    """The reader behind TensorBoard's server."""
    events = ServerReader(str(run.path / "tensorboard"))
    events.Reload()
    return events


def server_points(run: RunFolder, tag: str) -> list[tuple[int, float]]:
    """The points (step, value) of a scalar, from the reader behind TensorBoard's server."""
    events = server_reader(run).Tensors(tag)
    return [(event.step, float(make_ndarray(event.tensor_proto))) for event in events]
