"""From the scores of one split to the files that show them. `xrai.train` and `xrai.evaluate` call it on rank 0."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xrai.results.artifacts import RunFolder
from xrai.results.metrics import evaluate_scores
from xrai.results.plots import draw_plots


def record_scores(
    run: RunFolder,
    *,
    split: str,
    labels: NDArray[np.uint8],
    scores: NDArray[np.float64],
    sources: Sequence[str],
    patients: Sequence[str],
    subtypes: Sequence[str],
    threshold: float,
    threshold_source: str,
    classes: Sequence[str],
    num_bootstrap: int,
    is_phantom: bool,
    folder: str = "",
) -> dict[str, Any]:
    """Write predictions.csv, metrics.json and plots/ of one split under `folder` of the run; return the metrics.

    All arrays are (N,); `scores` are probabilities of the second class; `patients` are the groups of the bootstrap.
    """
    metrics = evaluate_scores(
        labels, scores, threshold=threshold, groups=patients, subtypes=subtypes, split=split,
        threshold_source=threshold_source, num_bootstrap=num_bootstrap,
    )  # fmt: skip
    prefix = f"{folder}/" if folder else ""
    run.write_predictions(
        (
            {
                "split": split, "source": source, "patient": patient, "subtype": subtype,
                "label": classes[int(label)], "score": float(score), "call": classes[int(score >= threshold)],
            }
            for source, patient, subtype, label, score in zip(sources, patients, subtypes, labels, scores, strict=True)
        ),
        name=f"{prefix}predictions.csv",
    )  # fmt: skip
    run.write_json(f"{prefix}metrics.json", metrics)
    draw_plots(labels, scores, metrics, run.path / folder, is_phantom=is_phantom)
    run.publish(sorted(_names(run.path / folder / "plots", run.path)))
    return metrics


def _names(folder: Path, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in folder.glob("*.png")]
