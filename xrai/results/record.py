"""From the scores of one split to the files that show them. `xrai.train` and `xrai.evaluate`
call it on rank 0.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xrai.results.calibration import calibrated
from xrai.results.folder import RunFolder
from xrai.results.metrics import evaluate_scores
from xrai.results.plots import draw_plots, overlay
from xrai.results.review import REVIEW, needs_review
from xrai.results.sheets import draw_sheet

NUM_PICTURES = 12  # on a sheet


def record_scores(
    run: RunFolder,
    *,
    split: str,
    labels: NDArray[np.uint8],
    logits: NDArray[np.float64],
    temperature: float,
    sources: Sequence[str],
    patients: Sequence[str],
    subtypes: Sequence[str],
    threshold: float,
    threshold_source: str,
    classes: Sequence[str],
    num_bootstrap: int,
    is_phantom: bool,
    atypicality: NDArray[np.float64] | None = None,
    baselines: Mapping[str, Any] | None = None,
    folder: str = "",
    read_images: Callable[[NDArray[np.int64]], NDArray[np.uint8]] | None = None,
    explain: Callable[[NDArray[np.uint8]], NDArray[np.floating]] | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Write predictions.csv, metrics.json and plots/ of one split under `folder` of the run; return
    the metrics.

    All arrays are (N,); scores, the probabilities of the second class, are the logistic function of
    logit / `temperature`; `patients` are resampled by the bootstrap, and what stands before a key's
    colon is the image's source group; an `atypicality` above 1 leaves an image to a person.
    `baselines` are those of `measure_baselines`. With `read_images`, which gives the pictures (n,
    H, W) of n rows, plots/ also holds a sheet of examples and one of mistakes; with `explain`,
    which gives their heat maps (n, H, W) in [0, 1], the mistakes under these too. With `step` they,
    and the precision-recall curve, go to TensorBoard under that step too.
    """
    scores, uncalibrated = calibrated(logits, temperature), calibrated(logits)
    groups = [group_of(patient) for patient in patients]
    metrics = evaluate_scores(
        labels, scores, threshold=threshold, patients=patients, subtypes=subtypes, groups=groups, split=split,
        threshold_source=threshold_source, uncalibrated=uncalibrated, temperature=temperature, atypicality=atypicality,
        num_bootstrap=num_bootstrap,
    )  # fmt: skip
    metrics["baselines"] = dict(baselines or {})
    prefix = f"{folder}/" if folder else ""
    run.write_predictions(
        (
            {
                "split": split, "source": sources[row], "patient": patients[row], "group": groups[row],
                "subtype": subtypes[row], "label": classes[int(labels[row])], "score": float(scores[row]),
                "call": classes[int(scores[row] >= threshold)],
                "atypicality": None if atypicality is None else float(atypicality[row]),
                "decision": decide(
                    scores[row], threshold, None if atypicality is None else atypicality[row], classes=classes
                ),
            }
            for row in range(len(labels))
        ),
        name=f"{prefix}predictions.csv",
    )  # fmt: skip
    run.write_json(f"{prefix}metrics.json", metrics)
    plots = run.path / folder / "plots"
    draw_plots(
        labels, scores, metrics, run.path / folder, uncalibrated=uncalibrated, is_phantom=is_phantom
    )
    if step is not None:
        run.add_precision_recall(
            step, f"precision_recall/final_{split}", labels, scores,
            description=f"{split} split, the best epoch's weights",
        )  # fmt: skip
    if read_images is not None:
        drawn = _draw_sheets(
            plots, split=split, labels=labels, scores=scores, threshold=threshold, classes=classes,
            sources=sources, read_images=read_images, explain=explain,
            is_phantom=is_phantom,
        )  # fmt: skip
        if step is not None:
            for name in drawn:
                run.add_picture(step, f"predictions/{name}_{split}", plots / f"{name}.png")
    run.publish(sorted(_names(plots, run.path)))
    return metrics


def group_of(patient: str) -> str:
    """The source group of a patient key, the part before its colon; empty where the key states
    none.
    """
    group, colon, _ = patient.partition(":")
    return group if colon and group != "file" else ""


def decide(
    score: float, threshold: float, atypicality: float | None, *, classes: Sequence[str]
) -> str:
    """What to tell people of one image: `review` where it is unlike the training images, else
    its class.
    """
    if atypicality is not None and needs_review(float(atypicality)):
        return REVIEW
    return classes[int(score >= threshold)].lower()


def pick_examples(labels: NDArray[np.uint8], *, num: int = NUM_PICTURES) -> NDArray[np.int64]:
    """Up to `num` rows, as many of each class as there are: the first ones, which are a random
    sample of a split.
    """
    rank_in_class = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        rank_in_class[own] = np.arange(len(own))
    first = np.argsort(rank_in_class, kind="stable")[:num]
    return first[np.argsort(labels[first], kind="stable")].astype(np.int64)


def pick_mistakes(
    labels: NDArray[np.uint8],
    scores: NDArray[np.float64],
    *,
    threshold: float,
    num: int = NUM_PICTURES,
) -> NDArray[np.int64]:
    """Up to `num` rows: those that are called wrong first, and of these (and the others) the
    largest errors first.
    """
    is_right = (scores >= threshold) == labels.astype(bool)
    order = np.lexsort((-np.abs(labels - scores), is_right))
    return order[:num].astype(np.int64)


def _draw_sheets(
    plots: Path,
    *,
    split: str,
    labels: NDArray[np.uint8],
    scores: NDArray[np.float64],
    threshold: float,
    classes: Sequence[str],
    sources: Sequence[str],
    read_images: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
    explain: Callable[[NDArray[np.uint8]], NDArray[np.floating]] | None,
    is_phantom: bool,
) -> list[str]:
    """Write examples.png, mistakes.png and, where they can be explained, overlays.png; return
    their names.
    """
    is_right = (scores >= threshold) == labels
    note = f"label and score; {np.count_nonzero(~is_right):,} of {len(labels):,} called wrong at {threshold:.3f}"

    def draw(
        name: str,
        pictures: Sequence[NDArray[np.uint8]],
        titles: Sequence[str],
        marks: Sequence[str],
    ) -> None:
        heading = {
            "examples": f"Examples of the {split} split",
            "mistakes": f"The images of the {split} split that it got most wrong",
            "overlays": f"The images of the {split} split that it got most wrong, and their heat maps",
        }[name]
        ending = "; a heat map is no localiser" if name == "overlays" else ""
        draw_sheet(
            pictures, titles, plots / f"{name}.png", marks=marks, heading=heading, note=note + ending,
            is_phantom=is_phantom,
        )  # fmt: skip

    drawn = []
    for name, rows in (
        ("examples", pick_examples(labels)),
        ("mistakes", pick_mistakes(labels, scores, threshold=threshold)),
    ):
        pictures = read_images(rows)
        titles = [PurePosixPath(sources[row]).name for row in rows]
        marks = [
            f"{classes[int(labels[row])]}  {scores[row]:.3f}" + ("" if is_right[row] else "  wrong")
            for row in rows
        ]
        draw(name, list(pictures), titles, marks)
        drawn.append(name)
        if name == "mistakes" and explain is not None and len(rows):
            pairs = zip(pictures, explain(pictures), strict=True)
            shown = [each for image, heat in pairs for each in (image, overlay(image, heat))]
            blank = [""] * len(rows)
            draw(
                "overlays",
                shown,
                _alternate(titles, blank),
                _alternate(marks, ["heat map"] * len(rows)),
            )
            drawn.append("overlays")
    return drawn


def _alternate(first: Sequence[str], second: Sequence[str]) -> list[str]:
    return [each for pair in zip(first, second, strict=True) for each in pair]


def _names(folder: Path, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in folder.glob("*.png")]
