"""From the scores of one split to the files that show them. `xrai.train` and `xrai.evaluate` call it on rank 0."""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xrai.results.artifacts import RunFolder
from xrai.results.metrics import evaluate_scores
from xrai.results.plots import draw_plots, draw_sheet

NUM_PICTURES = 12  # on a sheet


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
    read_images: Callable[[NDArray[np.int64]], NDArray[np.uint8]] | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Write predictions.csv, metrics.json and plots/ of one split under `folder` of the run; return the metrics.

    All arrays are (N,); `scores` are probabilities of the second class; `patients` are the groups of the bootstrap.
    With `read_images`, which gives the pictures (n, H, W) of n rows, plots/ also holds a sheet of examples and one of
    mistakes. With `step` they, and the precision-recall curve, go to TensorBoard under that step too.
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
    plots = run.path / folder / "plots"
    draw_plots(labels, scores, metrics, run.path / folder, is_phantom=is_phantom)
    if step is not None:
        run.add_precision_recall(
            step, f"precision_recall/final_{split}", labels, scores,
            description=f"{split} split, the best epoch's weights",
        )  # fmt: skip
    if read_images is not None:
        sheets = {
            "examples": (pick_examples(labels), f"Examples of the {split} split"),
            "mistakes": (
                pick_mistakes(labels, scores, threshold=threshold),
                f"The images of the {split} split that it got most wrong",
            ),
        }
        num_wrong = int(np.count_nonzero((scores >= threshold) != labels))
        note = f"label and score; {num_wrong:,} of {len(labels):,} called wrong at threshold {threshold:.3f}"
        for name, (rows, heading) in sheets.items():
            draw_sheet(
                list(read_images(rows)),
                [PurePosixPath(sources[row]).name for row in rows],
                plots / f"{name}.png",
                marks=[
                    f"{classes[int(labels[row])]}  {scores[row]:.3f}"
                    + ("" if (scores[row] >= threshold) == labels[row] else "  wrong")
                    for row in rows
                ],
                heading=heading,
                note=note,
                is_phantom=is_phantom,
            )
            if step is not None:
                run.add_picture(step, f"predictions/{name}_{split}", plots / f"{name}.png")
    run.publish(sorted(_names(plots, run.path)))
    return metrics


def pick_examples(labels: NDArray[np.uint8], *, num: int = NUM_PICTURES) -> NDArray[np.int64]:
    """Up to `num` rows, as many of each class as there are: the first ones, which are a random sample of a split."""
    rank_in_class = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        rank_in_class[own] = np.arange(len(own))
    first = np.argsort(rank_in_class, kind="stable")[:num]
    return first[np.argsort(labels[first], kind="stable")].astype(np.int64)


def pick_mistakes(
    labels: NDArray[np.uint8], scores: NDArray[np.float64], *, threshold: float, num: int = NUM_PICTURES
) -> NDArray[np.int64]:
    """Up to `num` rows: those that are called wrong first, and of these (and the others) the largest errors first."""
    is_right = (scores >= threshold) == labels.astype(bool)
    order = np.lexsort((-np.abs(labels - scores), is_right))
    return order[:num].astype(np.int64)


def _names(folder: Path, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in folder.glob("*.png")]
