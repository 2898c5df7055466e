"""TensorBoard's events, collected in memory and written as one closed file by torch's writer.

The writer takes a second to import, so it is imported when the first file is written.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xrai.config import all_keys
from xrai.files import explaining, temporary_folder
from xrai.results.history import TITLES
from xrai.results.metrics import HEADLINES
from xrai.results.types import Estimate

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FINAL_TAGS = {name: f"final/{name}" for name in HEADLINES}


class Events:
    """Events of one run that wait to be written."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._waiting: list[Callable[[SummaryWriter], None]] = []

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add points by tag; those that are not finite are left out."""
        finite = {tag: value for tag, value in scalars.items() if math.isfinite(value)}

        def add(writer: SummaryWriter) -> None:
            for tag, value in finite.items():
                writer.add_scalar(tag, value, step)

        if finite:
            self._waiting.append(add)

    def add_image(self, step: int, tag: str, path: Path) -> None:
        """Add an image file."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
        self._waiting.append(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def add_precision_recall(
        self, step: int, tag: str, labels: npt.ArrayLike, scores: npt.ArrayLike
    ) -> None:
        """Add the curve of labels (N,) and scores (N,) in [0, 1]; none if a class is missing."""
        truth, found = np.asarray(labels), np.asarray(scores)
        if len(np.unique(truth)) == 2:
            self._waiting.append(lambda writer: writer.add_pr_curve(tag, truth, found, step))

    def add_chart(self, section: str, title: str, tags: str) -> None:
        """Add a chart of all scalars whose tag matches a pattern, below "Custom scalars"."""
        layout = {section: {title: ["Multiline", [tags]]}}
        self._waiting.append(lambda writer: writer.add_custom_scalars(layout))

    def add_hyperparameters(self, config: Mapping[str, Mapping[str, object]]) -> None:
        """Add the run with its config, as `section.key`, to TensorBoard's table of runs.

        `SummaryWriter.add_hparams` cannot: it writes a file of its own, reports success at once,
        and knows neither the run's name nor descriptions.
        """
        flat = {
            f"{section}.{key}": value if isinstance(value, int | float) else str(value)
            for section, keys in config.items()
            for key, value in keys.items()
        }

        def add(writer: SummaryWriter) -> None:
            from tensorboard.plugins.hparams.summary_v2 import hparams_pb

            _add_summary(writer, _experiment(flat), 0)
            _add_summary(writer, hparams_pb(flat, trial_id=self._run_id), 0)

        self._waiting.append(add)

    def add_results(self, step: int, metrics: Mapping[str, Estimate]) -> None:
        """Add the headline metrics, and that the run succeeded."""
        self.add_scalars(step, {tag: metrics[name].value for name, tag in FINAL_TAGS.items()})

        def add(writer: SummaryWriter) -> None:
            from tensorboard.plugins.hparams import api_pb2, metadata

            # torch's own has no time of the end
            end = {"status": api_pb2.STATUS_SUCCESS, "end_time_secs": time.time()}
            summary = _hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end)
            _add_summary(writer, summary, step)

        self._waiting.append(add)

    def take(self, *, purge_step: int | None) -> bytes | None:
        """Return the waiting events as an event file, and forget them; None if there are none.

        Readers of the file forget what files before it hold at or past `purge_step`.
        """
        if not self._waiting:
            return None
        from torch.utils.tensorboard import SummaryWriter

        hint = "free some space there, or set TMPDIR to another folder"
        with (
            explaining("written", tempfile.gettempdir(), hint=hint, is_address=False),
            temporary_folder() as folder,
        ):
            with SummaryWriter(folder, purge_step=purge_step) as writer:
                for add in self._waiting:
                    add(writer)
            (file,) = Path(folder).iterdir()
            data = file.read_bytes()
        self._waiting.clear()
        return data


def _add_summary(writer: SummaryWriter, summary: object, step: int) -> None:
    file_writer: Any = writer.file_writer  # annotated as None
    file_writer.add_summary(summary, step)


def _experiment(config: Mapping[str, int | float | str]) -> object:
    """The columns of TensorBoard's table of runs; TensorBoard has no public function for columns
    with a known type and an unknown range.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata

    types = {bool: "DATA_TYPE_BOOL", str: "DATA_TYPE_STRING"}
    meanings = {key.name: key.meaning for key in all_keys()}
    titles = {tag: f"final {name}" for name, tag in FINAL_TAGS.items()} | TITLES
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name,
                description=meanings.get(name, ""),
                type=types.get(type(value), "DATA_TYPE_FLOAT64"),
            )
            for name, value in config.items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title)
            for tag, title in titles.items()
        ],
    )
    return _hparams(metadata.EXPERIMENT_TAG, experiment=experiment)


def _hparams(tag: str, **message: object) -> object:
    """A message of TensorBoard's hparams plugin as a summary."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    content = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**message))
    return Summary(value=[Summary.Value(tag=tag, metadata=content, tensor=metadata.NULL_TENSOR)])
