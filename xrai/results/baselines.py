"""What shortcuts alone can do: two models that never see a lung, measured beside every result.

`geometry` knows the size of the source picture in pixels, `border` the outer fourteenth of each
side of the stored picture, which is 16 of 224 pixels. Where one of them tells the classes apart, so
may a network, without any medicine. Called by `xrai.train` and `xrai.evaluate` with arrays, and by
benchmarks/shortcuts.py; metrics.json holds the numbers under `baselines`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xrai.results.calibration import calibrated
from xrai.results.metrics import evaluate_scores

MAX_TRAIN, MAX_IMAGES = (
    5_000,
    20_000,
)  # images that are learned from, and measured, so that a large split costs no more
BASELINES: Mapping[str, str] = {
    "geometry": "the size of the source picture alone: width, height, aspect and area in pixels",
    "border": "the outer border of the stored picture alone: a fourteenth of each side",
}
_METRICS = ("accuracy", "sensitivity", "specificity", "auroc")
_UNDEFINED: Mapping[str, Any] = {"value": math.nan, "low": math.nan, "high": math.nan, "method": ""}
_CELLS = 14  # a side; the border is the outermost one

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Looks:
    """What the baselines see of some images of a split."""

    labels: npt.NDArray[np.uint8]  # (n,)
    patients: Sequence[str]  # (n,)
    geometry: Floats  # (n, 4)
    border: Floats  # (n, 104)


def geometry_features(width: npt.ArrayLike, height: npt.ArrayLike) -> Floats:
    """Logarithms of width, height, aspect and area (n, 4) of pictures of `width` and `height`
    (n,) pixels.
    """
    across, down = (
        np.log(np.maximum(np.asarray(side, dtype=np.float64), 1)) for side in (width, height)
    )
    return np.column_stack([across, down, across - down, across + down])


def border_features(images: npt.NDArray[np.uint8]) -> Floats:
    """The mean and standard deviation of each outer cell, (n, 104), of images (n, H, W) cut into
    14 x 14 cells.
    """
    rows, columns = (
        np.linspace(0, side, _CELLS + 1).round().astype(int) for side in images.shape[1:]
    )
    features = []
    for row in range(_CELLS):
        inner = row not in (0, _CELLS - 1)
        for column in (0, _CELLS - 1) if inner else range(_CELLS):
            cell = images[:, rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
            cell = cell.reshape(len(images), -1).astype(np.float32)  # (n, pixels of the cell)
            features += [cell.mean(axis=1), cell.std(axis=1)]
    return np.column_stack(features).astype(np.float64)


def fit_and_score(train: Floats, labels: npt.ArrayLike, others: Floats) -> Floats:
    """Scores (m,) in [0, 1] of `others` (m, F) by a support vector machine fitted to `train` (n,
    F), `labels` (n,).

    Both classes weigh alike and 0.5 is its own threshold; a score is no probability. On the border
    of 3,965 training films at 64 pixels this kernel found most of what was tried (AUROC on 576
    held-out films .988, in 0.4 s of one core; logistic regression .950, random forest .975, boosted
    trees .984 in 7 s).
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = make_pipeline(StandardScaler(), SVC(C=3.0, gamma="auto", class_weight="balanced"))
    return calibrated(model.fit(train, labels).decision_function(others))


def measure_baselines(
    train: Looks | None, measured: Looks, *, split: str, num_bootstrap: int
) -> dict[str, Any]:
    """The `baselines` of metrics.json: each one fitted to `train` and measured on `measured`,
    images of `split`.

    A reason says why there is no number (no training images, or none of a class), or what a number
    is worth.
    """
    found: dict[str, Any] = {}
    for name, meaning in BASELINES.items():
        reason = ""
        metrics: dict[str, Any] = {key: dict(_UNDEFINED) for key in _METRICS}
        if train is None:
            reason = "the data set has no train split to fit it to"
        elif len(np.unique(train.labels)) < 2:
            reason = "the training images are of one class"
        else:
            known, asked = getattr(train, name), getattr(measured, name)
            if np.ptp(known, axis=0).max(initial=0) == 0:
                reason = "it is the same for all training images, so it tells nothing"
                scores = np.full(len(asked), 0.5)
            else:
                scores = fit_and_score(known, train.labels, asked)
            if split == "train":
                reason = "; ".join(filter(None, [reason, "it was fitted to these very images"]))
            metrics = evaluate_scores(
                measured.labels, scores, threshold=0.5, patients=measured.patients,
                subtypes=[""] * len(scores), split=split, threshold_source="fixed", num_bootstrap=num_bootstrap,
            )["metrics"]  # fmt: skip
        found[name] = {
            "meaning": meaning,
            "num_train": 0 if train is None else len(train.labels),
            "num_images": len(measured.labels),
            "metrics": {key: metrics[key] for key in _METRICS},
            "reason": reason,
        }
    return found
