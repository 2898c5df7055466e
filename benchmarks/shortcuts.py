"""How much of the label shortcuts give away under each `images.fit`, on full-size images.

    python -m benchmarks.shortcuts --source data/chest_xray_originals

Patient-grouped, stratified cross-validation, repeated with several seeds. For each fit:
  geometry   AUROC of the source image's size alone, the same for all fits: what there is to leak
  border     AUROC of the outer fourteenth of each side of the stored image alone
  aspect     how well the stored image's 14 x 14 cells tell the source's aspect: what the fit lets
             through (R squared of a kernel regression of its logarithm; 0: not at all)
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from xrai.ingest.images import decode_sized
from xrai.ingest.layout import lay_out
from xrai.ingest.sources import open_source
from xrai.results.baselines import border_features, fit_svm, geometry_features

FITS = ("crop", "squash", "pad")
CELLS = 14

Floats = NDArray[np.float64]
Score = Callable[
    [NDArray[np.int64], NDArray[np.int64]], float
]  # of the rows to learn from and the rows to measure


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Shortcuts under each images.fit.")
    parser.add_argument(
        "--source", required=True, help="full-size films: whatever xrai.preprocess reads"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the stored picture, pixels")
    parser.add_argument("--folds", type=int, default=5, help="parts of the cross-validation")
    parser.add_argument(
        "--seeds", type=int, default=5, help="cross-validations, each with other parts"
    )
    flags = parser.parse_args()
    began = time.perf_counter()
    source = open_source(flags.source)
    entries = lay_out(source.files().paths, source=flags.source).rows
    labels = np.array([entry.label for entry in entries])
    patients = np.array([entry.patient for entry in entries])
    images: dict[str, NDArray[np.uint8]] = {}  # each (N, size, size)
    sizes = np.zeros((len(entries), 2), dtype=np.int64)

    def read(path: str) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        return decode_sized(source.read(path), size=flags.size, fit=fit, max_pixels=100_000_000)

    with ThreadPoolExecutor() as pool:
        for fit in FITS:
            decoded = list(pool.map(read, [entry.path for entry in entries]))
            images[fit] = np.stack([picture for picture, _ in decoded])
            sizes = np.array([size for _, size in decoded])
    geometry = geometry_features(sizes[:, 0], sizes[:, 1])
    print(
        f"{len(labels)} films ({(labels == 0).sum()} normal, {(labels == 1).sum()} pneumonia) of "
        f"{len(set(patients.tolist()))} patients, {flags.size} pixels; "
        f"{flags.folds} folds by patient, {flags.seeds} "
        f"seeds, mean and range over seeds"
    )
    print(f"{'fit':<8}{'geometry AUROC':>24}{'border AUROC':>24}{'aspect R squared':>24}")
    for fit in FITS:
        border, whole = border_features(images[fit]), cells(images[fit])
        scores: list[Score] = [
            lambda train, test: float(
                roc_auc_score(labels[test], fit_svm(geometry[train], labels[train])(geometry[test]))
            ),
            lambda train, test, border=border: float(  # type: ignore[misc]
                roc_auc_score(labels[test], fit_svm(border[train], labels[train])(border[test]))
            ),
            lambda train, test, whole=whole: explained(  # type: ignore[misc]
                whole[train], geometry[train, 2], whole[test], geometry[test, 2]
            ),
        ]
        found = [
            cross_validate(score, labels, patients, num_folds=flags.folds, seeds=flags.seeds)
            for score in scores
        ]
        print(f"{fit:<8}" + "".join(f"{describe(values):>24}" for values in found))
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, "
        f"scikit-learn {sklearn.__version__}, "
        f"{time.perf_counter() - began:.0f} s"
    )


def cells(images: NDArray[np.uint8]) -> Floats:
    """The mean of each of 14 x 14 cells, (N, 196), of images (N, H, W)."""
    edges = np.linspace(0, images.shape[1], CELLS + 1).round().astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(images.astype(np.float64), edges, axis=1), edges, axis=2)
    heights = np.diff([*edges, images.shape[1]])
    means: Floats = (sums / np.outer(heights, heights)).reshape(len(images), -1)
    return means


def explained(train: Floats, targets: Floats, others: Floats, truth: Floats) -> float:
    """R squared of a kernel regression of targets (n,) from train (n, F), on others (m, F) and
    their truth (m,).
    """
    scale = targets.std() or 1.0
    model = make_pipeline(StandardScaler(), SVR(C=3.0, gamma="auto", epsilon=0.05)).fit(
        train, targets / scale
    )
    return float(r2_score(truth / scale, model.predict(others)))


def cross_validate(
    score: Score,
    labels: NDArray[np.int64],
    patients: NDArray[np.str_],
    *,
    num_folds: int,
    seeds: int,
) -> list[float]:
    """The mean score over the folds, for each seed; no patient is in two folds."""
    means = []
    for seed in range(seeds):
        folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed).split(
            labels, labels, patients
        )
        means.append(statistics.mean(score(train, test) for train, test in folds))
    return means


def describe(values: list[float]) -> str:
    """Mean and range of a few numbers."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
