"""TensorBoard's messages from plain numbers and pictures. `xrai.results.folder` puts them into
event files.

Only the formats of TensorBoard's own plugins are used, so that its own server shows them; nothing
here writes a file.
"""

import math
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.pr_curve import metadata as pr_curve_metadata
from tensorboard.util.tensor_util import make_tensor_proto

NUM_THRESHOLDS = 201  # TensorBoard's own default: 0, 0.005, … 1

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_GREY_ALPHA_COLOURS = {
    0: 1,
    2: 3,
    3: 3,
    4: 2,
    6: 4,
}  # PNG colour type -> channels, as TensorBoard counts them


def file_version(wall_time: float) -> Event:
    """The first event of every file."""
    return Event(wall_time=wall_time, file_version="brain.Event:2")


def session_start(step: int) -> Event:
    """Tells readers to forget what they saw at or past `step`. They take the first one of a run
    for its beginning.
    """
    return Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))


def summary(step: int, values: Sequence[Summary.Value]) -> Event:
    """Values of one step."""
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


def scalar(tag: str, value: float) -> Summary.Value:
    """A point of a curve."""
    return Summary.Value(tag=tag, simple_value=float(value))


def picture(tag: str, png: bytes) -> Summary.Value:
    """A PNG file as an image."""
    if png[:8] != _PNG_HEAD:
        raise ValueError(f"{tag}: these {len(png)} bytes are no PNG file")
    width, height, _, colour_type = struct.unpack(">IIBB", png[16:26])
    return Summary.Value(
        tag=tag,
        image=Summary.Image(
            height=height,
            width=width,
            colorspace=_GREY_ALPHA_COLOURS[colour_type],
            encoded_image_string=png,
        ),
    )


def count_calls(
    labels: npt.ArrayLike, scores: npt.ArrayLike, num_thresholds: int = NUM_THRESHOLDS
) -> npt.NDArray[Any]:
    """What the PR-curve plugin shows, (6, num_thresholds) float32, for thresholds evenly spread
    over [0, 1].

    The rows are true positives, false positives, true negatives, false negatives, precision and
    recall. An image is called positive where its score is at least the threshold. A precision of
    nothing called is 0; the plugin drops it.
    """
    is_positive = np.asarray(labels).astype(bool)
    scores = np.asarray(scores, dtype=np.float64)
    thresholds = np.linspace(0, 1, num_thresholds)
    tp = np.sum(is_positive) - np.searchsorted(
        np.sort(scores[is_positive]), thresholds, side="left"
    )
    fp = np.sum(~is_positive) - np.searchsorted(
        np.sort(scores[~is_positive]), thresholds, side="left"
    )
    tn, fn = np.sum(~is_positive) - fp, np.sum(is_positive) - tp
    precision = tp / np.maximum(tp + fp, 1)
    recall = tp / np.maximum(tp + fn, 1)
    return np.stack([tp, fp, tn, fn, precision, recall]).astype(np.float32)


def precision_recall(
    tag: str, labels: npt.ArrayLike, scores: npt.ArrayLike, *, description: str = ""
) -> Summary.Value:
    """The precision-recall curve of labels (N,) of 0 and 1 and scores (N,) in [0, 1];
    `description` is Markdown.
    """
    return Summary.Value(
        tag=tag,
        tensor=make_tensor_proto(count_calls(labels, scores)),
        metadata=pr_curve_metadata.create_summary_metadata(tag, description, NUM_THRESHOLDS),
    )


def hyperparameters(
    config: Mapping[str, Mapping[str, Any]],
    *,
    group: str,
    metrics: Mapping[str, str],
    meanings: Mapping[str, str],
) -> list[Summary.Value]:
    """The start of a session of the hparams plugin: sections of plain values, each shown as
    `section.key`.

    `group` names the run, `metrics` gives the scalar tags to show beside the values and what to
    call them, `meanings` what a `section.key` is for.
    """
    flat = {
        f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()
    }
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name, description=meanings.get(name, ""), type=_hparam_type(value)
            )
            for name, value in flat.items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=name)
            for tag, name in metrics.items()
        ],
        time_created_secs=time.time(),
    )
    start = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=time.time())
    for name, value in flat.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    return [
        _hparams_value(hparams_metadata.EXPERIMENT_TAG, experiment=experiment),
        _hparams_value(hparams_metadata.SESSION_START_INFO_TAG, session_start_info=start),
    ]


def session_success() -> Summary.Value:
    """The end of a session of the hparams plugin that did all it was to do."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _hparams_value(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=end)


def finite_scalars(scalars: Mapping[str, float | None]) -> Iterable[Summary.Value]:
    """Points by tag; those that are None or not finite are left out."""
    return (
        scalar(tag, value)
        for tag, value in scalars.items()
        if value is not None and math.isfinite(value)
    )


def _hparams_value(tag: str, **content: Any) -> Summary.Value:
    data = plugin_data_pb2.HParamsPluginData(**content)
    return Summary.Value(
        tag=tag,
        metadata=hparams_metadata.create_summary_metadata(data),
        tensor=hparams_metadata.NULL_TENSOR,
    )


def _hparam_type(value: Any) -> int:
    if isinstance(value, bool):
        return int(api_pb2.DATA_TYPE_BOOL)
    return int(
        api_pb2.DATA_TYPE_FLOAT64 if isinstance(value, int | float) else api_pb2.DATA_TYPE_STRING
    )
