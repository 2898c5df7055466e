"""From the scores of one split to the files that show them; `xrai.run` calls it on rank 0."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xrai.labels import NO_FINDING, REVIEW, LabelSpec
from xrai.results.calibration import Floats, explain_limit
from xrai.results.folder import RunFolder
from xrai.results.intervals import CONFIDENCE
from xrai.results.lettering import legible, shortened
from xrai.results.measure import measure
from xrai.results.metrics import auroc
from xrai.results.sheets import draw_sheet
from xrai.results.style import note_line
from xrai.results.types import (
    Abstention,
    Baseline,
    Estimate,
    Measured,
    Output,
    OutputResults,
    Scores,
    SplitResults,
    outputs_of,
)
from xrai.tables import to_csv

SCHEMA_VERSION = 2  # of metrics.json
NUM_SHOWN = 12  # images on a sheet
NUM_ERRORS = 3  # images of each class or finding on its own sheet
NUM_ERROR_SHEETS = 4  # sheets of several outputs in TensorBoard, the examples first
_FIGURES_OF_ALL = ("overview", "roc", "confusion")
PREDICTION_COLUMNS = (
    *("split", "source", "patient", "group", "subtype"),
    *("label", "score", "call", "atypicality", "decision"),
)


class SplitImages(Protocol):
    """Gives the images of a split, and what in them is evidence for an output."""

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]: ...  # (n, H, W)
    def explain(  # in [0, 1]
        self, images: NDArray[np.uint8], output: int = 0
    ) -> NDArray[np.floating]: ...


def record_scores(
    run: RunFolder,
    scores: Scores,
    *,
    num_bootstrap: int,
    baselines: Mapping[str, Baseline],
    folder: str = "",
    images: SplitImages | None = None,
    step: int | None = None,
) -> SplitResults:
    """Measure one split; write predictions.csv, metrics.json and plots/ below `folder` of the run.

    With `images`, plots/ also has sheets of examples and of mistakes, these with heat maps. With
    `step`, the sheets and the precision-recall curve go to TensorBoard, too.
    """
    from xrai.results.plots import draw_plots  # matplotlib: on rank 0 alone

    results = dataclasses.replace(
        measure(scores, num_bootstrap=num_bootstrap), baselines=dict(baselines)
    )
    prefix = f"{folder}/" if folder else ""
    table = to_csv(prediction_columns(scores), prediction_rows(scores))
    run.write_text(f"{prefix}predictions.csv", table)
    run.write_json(f"{prefix}metrics.json", metrics_json(results))
    plots = run.path / folder / "plots"
    shown = _legible(scores)
    outputs = [
        dataclasses.replace(found, output=output)
        for found, output in zip(results.outputs, shown.outputs, strict=True)
    ]
    draw_plots(shown, dataclasses.replace(results, outputs=tuple(outputs)), plots)
    sheets: list[str] = []
    if images is not None:
        draw = _draw_sheets if scores.task == "binary" else _draw_sheets_of_many
        sheets = draw(shown, images, plots)
    if step is not None:
        _add_events(run, scores, plots, sheets, step)
    run.publish(sorted(path.relative_to(run.path).as_posix() for path in plots.glob("*.png")))
    return results


def _legible(scores: Scores) -> Scores:
    """The same scores with names that plots can show."""
    noun = "finding" if scores.task == "multilabel" else "class"
    names = legible(scores.classes, noun)
    if names == scores.classes:
        return scores
    spec = LabelSpec(scores.task, names)
    num = 1 if scores.task == "multiclass" else len(scores.outputs)
    outputs = outputs_of(spec, [1.0] * num, [0.5] * num, "")
    renamed = [
        dataclasses.replace(own, name=new.name, opposite=new.opposite)
        for own, new in zip(scores.outputs, outputs, strict=True)
    ]
    return dataclasses.replace(scores, classes=names, outputs=tuple(renamed))


def _add_events(
    run: RunFolder, scores: Scores, plots: Path, sheets: Sequence[str], step: int
) -> None:
    """Add curves and figures of a split to TensorBoard: of several outputs, a curve for each, the
    figures that show all, and the sheets of no more than the first few.
    """
    is_one = scores.task == "binary"
    for column, output in enumerate(scores.outputs):
        found, tag = scores.labelled(column), f"precision_recall/final_{scores.split}"
        tag += "" if is_one else f"/{output.name}"
        run.events.add_precision_recall(step, tag, found.labels, found.scores)
    shown = list(sheets) if is_one else [*_FIGURES_OF_ALL, *sheets[:NUM_ERROR_SHEETS]]
    for name in shown:
        path, tag = plots / f"{name}.png", f"predictions/{name}_{scores.split}"
        run.events.add_image(step, tag, path)


def metrics_json(results: SplitResults) -> dict[str, object]:
    """The content of metrics.json; with several outputs, the results of each are in `outputs`.

    An undefined metric is NaN (null in the file) with its reason in `reasons` under its name; a
    missing interval has its reason under `NAME.interval`.
    """
    if results.task != "binary":
        return _several_json(results)
    whole = _output_json(results.main)
    later = {name: whole.pop(name) for name in ("abstention", "by_threshold", "by_prevalence")}
    return {
        "schema_version": SCHEMA_VERSION,
        "split": results.split,
        **{name: whole.pop(name) for name in ("num_images", "num_patients")},
        **_without_patient_json(results),
        **{name: whole.pop(name) for name in ("threshold", "threshold_source")},
        **whole,
        "num_groups": results.num_groups,
        **later,
        **_shared_json(results),
    }


def _several_json(results: SplitResults) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "split": results.split,
        "task": results.task,
        "num_images": results.num_images,
        "num_patients": results.num_patients,
        **_without_patient_json(results),
        "macro": results.macro,
        "macro_reasons": _reasons(results.macro),
        "left_out": results.left_out,
        "micro": results.micro,
        "micro_reasons": _reasons(results.micro),
        "confusion": results.confusion,
        "abstention": _abstention_json(results.abstention),
        "outputs": [{"name": each.output.name, **_output_json(each)} for each in results.outputs],
        "num_groups": results.num_groups,
        **_shared_json(results),
    }


def _without_patient_json(results: SplitResults) -> dict[str, object]:
    """How many of the images have an unknown patient, if any has."""
    num = results.num_without_patient
    return {"num_without_patient": num} if num else {}


def _shared_json(results: SplitResults) -> dict[str, object]:
    return {
        "bootstrap": {
            "num_resamples": results.num_bootstrap,
            "unit": "patient" if results.has_patients else "image",
            "confidence": CONFIDENCE,
            "seed": results.seed,
        },
        "baselines": results.baselines,
    }


def _output_json(found: OutputResults) -> dict[str, object]:
    is_binary = found.output.task == "binary"
    groups = {
        name: {
            "num_normal" if is_binary else "num_negative": each.num_negative,
            "num_pneumonia" if is_binary else "num_positive": each.num_positive,
            "against": each.against,
            **_measured(each.measured),
        }
        for name, each in found.groups.items()
    }
    return {
        **_measured(found.whole),
        "threshold": found.output.threshold,
        "threshold_source": found.output.threshold_source,
        **_prior_json(found.output),
        "calibration": {
            "temperature": found.output.temperature,
            **({} if found.output.share is None else {"share": found.output.share}),
            **({"warning": limit} if (limit := explain_limit(found.output.temperature)) else {}),
            "before": found.uncalibrated,
            "after": {name: found.whole.metrics[name] for name in found.uncalibrated},
        },
        "subtypes": {name: _measured(each) for name, each in found.subtypes.items()},
        "groups": groups,
        "abstention": _abstention_json(found.abstention),
        "by_threshold": found.by_threshold,
        "by_prevalence": found.by_prevalence,
    }


def _prior_json(output: Output) -> dict[str, object]:
    """The share that scores and threshold were moved to, if they were."""
    if (moved := output.moved) is None:
        return {}
    own = moved.before.threshold
    return {"prior": {"share": moved.share, "source": moved.source, "threshold_of_run": own}}


def _abstention_json(abstention: Abstention) -> dict[str, object]:
    curve: list[dict[str, object]] = [dict(vars(point)) for point in abstention.curve]
    for point in curve:
        if point["by_atypicality"] is None:
            del point["by_atypicality"]
    return {**vars(abstention), "curve": curve}


def _measured(measured: Measured) -> dict[str, object]:
    return {**vars(measured), "reasons": _reasons(measured.metrics)}


def _reasons(metrics: Mapping[str, Estimate]) -> dict[str, str]:
    return {
        name if each.is_undefined else f"{name}.interval": each.reason
        for name, each in metrics.items()
        if each.reason
    }


def prediction_columns(scores: Scores) -> tuple[str, ...]:
    """The columns of predictions.csv; several outputs have a score each."""
    if scores.task == "binary":
        return PREDICTION_COLUMNS
    at = PREDICTION_COLUMNS.index("score")
    names = (f"score_{output.name}" for output in scores.outputs)
    return (*PREDICTION_COLUMNS[:at], *names, *PREDICTION_COLUMNS[at + 1 :])


def prediction_rows(scores: Scores) -> Iterator[dict[str, object]]:
    """The rows of predictions.csv. Findings are joined by `|`; `NAME?` is an unknown one."""
    names, one = scores.classes, scores.task == "binary"
    spoken = dict(zip(names, LabelSpec(scores.task, names).spoken, strict=True))
    columns = ["score"] if one else [f"score_{output.name}" for output in scores.outputs]
    for row, source in enumerate(scores.sources):
        known, called = scores.labels[row].tolist(), scores.called[row].tolist()
        if one:
            label, call = names[known[0]], names[int(called[0])]
        else:
            pairs = list(zip(names, known, strict=True))
            label = "|".join(name + "?" * (flag < 0) for name, flag in pairs if flag)
            call = "|".join(name for name, flag in zip(names, called, strict=True) if flag)
        yield {
            "split": scores.split,
            "source": source,
            "patient": scores.patients[row],
            "group": scores.groups[row],
            "subtype": scores.subtypes[row],
            "label": label,
            **dict(zip(columns, scores.probabilities[row].tolist(), strict=True)),
            "call": call,
            "atypicality": None if scores.atypicality is None else float(scores.atypicality[row]),
            "decision": REVIEW if scores.in_review[row] else spoken.get(call, call) or NO_FINDING,
        }


def pick_examples(labels: NDArray[np.integer], *, num: int = NUM_SHOWN) -> NDArray[np.int64]:
    """The first rows of each class in turn, up to `num`; rows are in random order."""
    rank_in_class = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        rank_in_class[own] = np.arange(len(own))
    first = np.argsort(rank_in_class, kind="stable")[:num]
    return first[np.argsort(labels[first], kind="stable")].astype(np.int64)


def pick_mistakes(
    labels: NDArray[np.integer], scores: Floats, called: NDArray[np.bool_], *, num: int = NUM_SHOWN
) -> NDArray[np.int64]:
    """Up to `num` rows: wrong calls first, and the largest errors first within each kind."""
    is_right = called == labels.astype(bool)
    order = np.lexsort((-np.abs(labels - scores), is_right))
    return order[:num].astype(np.int64)


def _draw_sheets(scores: Scores, images: SplitImages, plots: Path) -> list[str]:
    """Write examples.png, mistakes.png and overlays.png; return their names."""
    from xrai.results.plots import overlay

    found, output = scores.labelled(), scores.outputs[0]
    is_wrong = (found.called != found.labels).tolist()
    num_wrong = f"{sum(is_wrong):,} of {len(is_wrong):,} misclassified"
    at = "" if output.threshold is None else f" at {output.threshold:.3f}"
    note = f"label and score; {num_wrong}{at}"
    worst = pick_mistakes(found.labels, found.scores, found.called)
    for name, heading, rows in (
        ("examples", f"Examples of the {scores.split} split", pick_examples(found.labels)),
        ("mistakes", f"The largest errors on the {scores.split} split", worst),
    ):
        pixels = images.read(found.rows[rows])
        titles = [PurePosixPath(scores.sources[row]).name for row in found.rows[rows]]
        marks = [
            f"{scores.classes[found.labels[row]]}  {found.scores[row]:.3f}"
            + "  wrong" * is_wrong[row]
            for row in rows
        ]
        line = note_line(note, is_phantom=scores.is_phantom)
        path = plots / f"{name}.png"
        draw_sheet(list(pixels), titles, path, heading=heading, note=line, marks=marks)
        if name == "mistakes":  # again, each next to its heat map
            pairs = zip(pixels, images.explain(pixels), strict=True)
            note += "; a heat map does not localise disease"
            draw_sheet(
                [each for image, heat in pairs for each in (image, overlay(image, heat))],
                [each for title in titles for each in (title, "")],
                plots / "overlays.png",
                heading=f"{heading}, with heat maps",
                note=note_line(note, is_phantom=scores.is_phantom),
                marks=[each for mark in marks for each in (mark, "heat map")],
            )
    return ["examples", "mistakes", "overlays"]


def _draw_sheets_of_many(scores: Scores, images: SplitImages, plots: Path) -> list[str]:
    """Write examples.png, and for each output overlays-NN.png: its largest errors, each next to the
    heat map of the evidence for it. Return their names, those of the lowest AUROC first.
    """
    from xrai.results.plots import overlay

    present = [
        np.flatnonzero(column == 1)[: math.ceil(NUM_SHOWN / len(scores.outputs))]
        for column in scores.labels.T
    ]
    examples = np.unique(np.concatenate(present))[:NUM_SHOWN]
    line = note_line(is_phantom=scores.is_phantom)
    draw_sheet(
        list(images.read(examples)),
        [_file_name(scores, row) for row in examples],
        plots / "examples.png",
        heading=f"Examples of the {scores.split} split",
        note=line,
        marks=[_names_of(scores, row) for row in examples],
    )
    aurocs: dict[str, float] = {}
    for column, output in enumerate(scores.outputs):
        found, name = scores.labelled(column), f"overlays-{column:02d}"
        worst = pick_mistakes(found.labels, found.scores, found.called, num=NUM_ERRORS)
        if not len(worst):
            continue
        pixels = images.read(found.rows[worst])
        pairs = zip(pixels, images.explain(pixels, column), strict=True)
        is_wrong = (found.called != found.labels).tolist()
        kind = {1: shortened(output.name, 18), 0: shortened(output.opposite, 18)}
        marks = [
            f"{kind[int(found.labels[row])]}  {found.scores[row]:.3f}" + "  wrong" * is_wrong[row]
            for row in worst
        ]
        titles = [_file_name(scores, row) for row in found.rows[worst]]
        note = f"{sum(is_wrong):,} of {len(is_wrong):,} misclassified; a heat map does not localise"
        draw_sheet(
            [each for image, heat in pairs for each in (image, overlay(image, heat))],
            [each for title in titles for each in (title, "")],
            plots / f"{name}.png",
            heading=f"{output.name}: the largest errors on the {scores.split} split",
            note=note_line(f"{note} disease", is_phantom=scores.is_phantom),
            marks=[each for mark in marks for each in (mark, "heat map")],
        )
        value = auroc(found.labels, found.scores)
        aurocs[name] = value if math.isfinite(value) else math.inf
    return ["examples", *sorted(aurocs, key=lambda name: aurocs[name])]


def _file_name(scores: Scores, row: int) -> str:
    return PurePosixPath(scores.sources[row]).name


def _names_of(scores: Scores, row: int) -> str:
    """The classes or findings that an image shows."""
    shown = np.flatnonzero(scores.labels[row] == 1).tolist()
    names = [scores.outputs[column].name for column in shown]
    return shortened(", ".join(names) or NO_FINDING, 26)
