"""What shortcuts alone achieve: two models that never see a lung, reported with every result.

`geometry` knows the size of the source image in pixels, `border` the outer fourteenth of each side
of the stored image, which is 16 of 224 pixels. If one of them tells the classes apart, a network
may do so in the same way, without any medicine. Called by `xrai.run` and benchmarks/shortcuts.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from xrai.labels import CLASSES, Labels, LabelSpec
from xrai.results.calibration import Floats
from xrai.results.measure import measure
from xrai.results.metrics import HEADLINES
from xrai.results.types import Baseline, Estimate, Scores, outputs_of

MAX_TRAIN = 5_000  # images that are learned from, so that a large split costs no more
MAX_IMAGES = 20_000  # images that are measured
BASELINES: Mapping[str, str] = {
    "geometry": "the size of the source image alone (width, height, aspect and area in pixels)",
    "border": "the outer border of the stored image alone (a fourteenth of each side)",
}
_BINARY = LabelSpec("binary", CLASSES)
_CELLS = 14  # a side; the border is the outermost one
Model = Callable[[Floats], Floats]  # features (m, F) to logits (m,)


@dataclass(frozen=True, eq=False)
class Looks:
    """What the baselines see of some images of a split."""

    labels: Labels  # (n,), or (n, C) of findings
    patients: Sequence[str]  # (n,)
    geometry: Floats  # (n, 4)
    border: Floats  # (n, 104)
    spec: LabelSpec = _BINARY

    @cached_property
    def models(self) -> dict[str, list[Model | None]]:
        """For each baseline a model of each output, fitted to these images by the labels that are
        known; none for an output without images of both labels.
        """
        labels = self.spec.matrix(self.labels)  # (n, C)
        known = [own >= 0 for own in labels.T]
        return {
            name: [
                fit_svm(getattr(self, name)[of], own[of]) if len(np.unique(own[of])) == 2 else None
                for own, of in zip(labels.T, known, strict=True)
            ]
            for name in BASELINES
            if not self.is_constant(name)
        }

    def is_constant(self, name: str) -> bool:
        """Whether all images look the same to a baseline."""
        return not np.ptp(getattr(self, name), axis=0).any()


def geometry_features(width: npt.ArrayLike, height: npt.ArrayLike) -> Floats:
    """Logarithms of width, height, aspect and area, (n, 4), of images of some size in pixels."""
    across, down = (
        np.log(np.maximum(np.asarray(side, dtype=np.float64), 1)) for side in (width, height)
    )
    return np.column_stack([across, down, across - down, across + down])


def border_features(images: npt.NDArray[np.uint8]) -> Floats:
    """Mean and standard deviation of the outer cells, (n, 104), of images (n, H, W) of 14 x 14."""
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


def fit_svm(train: Floats, labels: npt.ArrayLike) -> Model:
    """An SVM fitted to `train` (n, F) and `labels` (n,).

    Both classes weigh alike, and the decision is at 0; the logits are not calibrated. On the border
    of 3,965 training images at 64 pixels this kernel found most of what was tried (AUROC on 576
    held-out images .988, in 0.4 s of one core; logistic regression .950, random forest .975,
    boosted trees .984 in 7 s).
    """
    from sklearn.pipeline import make_pipeline  # a second to import
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = make_pipeline(StandardScaler(), SVC(C=3.0, gamma="auto", class_weight="balanced"))
    decide: Model = model.fit(train, labels).decision_function
    return decide


def measure_baselines(
    train: Looks | None, measured: Looks, *, split: str, num_bootstrap: int
) -> dict[str, Baseline]:
    """Each baseline, fitted to `train` and measured on `measured`, images of `split`."""
    found = {}
    no_texts = [""] * len(measured.labels)
    for name, meaning in BASELINES.items():
        logits, reason = _score(name, train, measured)
        metrics: Mapping[str, Estimate] = dict.fromkeys(HEADLINES, Estimate())
        if logits is not None:
            if split == "train":
                reason = "; ".join(filter(None, [reason, "it was fitted to these very images"]))
            spec = measured.spec
            num = 0 if spec.task == "multiclass" else spec.num_outputs
            scores = Scores(
                split=split,
                task=spec.task,
                classes=spec.classes,
                outputs=outputs_of(spec, [1.0] * max(num, 1), [0.5] * num, "fixed"),
                labels=spec.matrix(measured.labels),
                logits=logits,
                # without their source groups, each of which would be resampled for nothing
                patients=[f"file:{patient}" for patient in measured.patients],
                sources=no_texts,
                subtypes=no_texts,
            )
            headline = measure(scores, num_bootstrap=num_bootstrap).headline
            metrics = {key: headline[key] for key in HEADLINES}
        num_train = 0 if train is None else len(train.labels)
        found[name] = Baseline(meaning, num_train, len(measured.labels), metrics, reason)
    return found


def _score(name: str, train: Looks | None, measured: Looks) -> tuple[Floats | None, str]:
    """The logits (n, C) of a baseline, or None if it cannot be fitted, and a remark on them."""
    if train is None:
        return None, "the data set has no train split to fit it to"
    asked = getattr(measured, name)
    if all(len(np.unique(own[own >= 0])) < 2 for own in train.spec.matrix(train.labels).T):
        return None, "the training images are of one class"
    if train.is_constant(name):
        reason = "it is the same for all training images, so it carries no information"
        return np.zeros((len(asked), train.spec.num_outputs)), reason
    columns = [
        np.zeros(len(asked)) if model is None else model(asked) for model in train.models[name]
    ]
    return np.column_stack(columns), ""
