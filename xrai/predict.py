"""Classify X-rays with a finished run: `python -m xrai.predict --run URI/ID PATH... [--out DIR]`.

A PATH is a JPEG, PNG or DICOM file, a folder of them, a quoted pattern, or any other source that
`xrai.preprocess` reads. Each file is one row of the table, in the order given: normal, pneumonia
(or what else the run tells apart), or review with the reason. The table is printed; with --out it
is also written, as predictions.csv and predictions.json, with each readable image next to its heat
maps in overlays/. Of a DICOM file, only the image is shown or kept. The exit status is 2 if no file
could be read.
"""

import csv
import io
import re
import textwrap
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from xrai import __version__
from xrai.command import PRIOR, RUNS, Flag, parse, run_command
from xrai.config import Images
from xrai.errors import RunError, UserError
from xrai.ingest.find import File, find_files
from xrai.labels import NO_FINDING, REVIEW, LabelSpec
from xrai.learning.predictor import TrainedModel, describe_calls
from xrai.log import printable, progress, setup_logging
from xrai.pipeline import (
    Explained,
    Pipeline,
    Prediction,
    load_pipeline,
    other_pixels,
    outputs_of_run,
)
from xrai.results.folder import Place, own_place
from xrai.results.lettering import legible, short_names, shortened
from xrai.results.panel import Heat, draw_panel
from xrai.store import Store, open_store
from xrai.tables import to_csv, to_json

FLAGS = (
    RUNS,
    PRIOR,
    Flag("out", "", "folder or s3://… for the table and the overlays; empty: print only"),
    Flag("no_overlays", False, "with --out: write the table alone, no overlays", type=bool),
    Flag(
        "paths",
        [],
        "JPEG, PNG or DICOM files, folders, zips, s3://bucket/prefix, or patterns of them",
        nargs="*",
    ),
)
NOTE = "No medical device: for research, not for diagnosis."
SCHEMA_VERSION = 2
_SHOWN = 50  # rows that are printed if files hold all of them
_SIDE = 512  # of the image in an overlay, pixels
_NUM_DRAWING = 32  # overlays that wait to be drawn or stored, at most
_TABLE, _JSON = "predictions.csv", "predictions.json"
_EARLIER = "config.yaml"  # earlier versions wrote it
_COLUMNS_OF_TWO = ("path", "probability", "threshold", "decision", "reason", "model")
_COLUMNS = ("path", "decision", "reason", "model")  # of more classes or of findings, with theirs
# Before the name of a class or finding, in a column's name
_PROBABILITY, _PRIOR = "probability_", "prior_"
_PRIOR_SOURCE, _DISAGREEMENT = "source_of_prior", "disagreement"
_HIGHEST, _CALLED_FIRST = "highest probabilities", "called, then most probable"
_NAMED = 3  # of a row's classes or findings, in the table for people
_NAME_WIDTH = 20  # characters of a name in that table
_OVERLAY = re.compile(r"overlays/\d{5,}(-[A-Za-z0-9_-]+)?\.png")


def main() -> None:
    """Read the command line, classify, print and write the table."""
    parsed = parse("predict", description="Classify X-rays with a finished run.", flags=FLAGS)
    config, flags, given = parsed
    setup_logging()
    runs = parsed.runs
    files = find_files(flags["paths"])
    refuse_inside(flags["out"], flags["paths"])
    pipeline = load_pipeline(*runs, prior=flags["prior"] or None)
    fitted = [fit_to_run(config.images, model, given=given) for model in pipeline.models]
    pipeline.max_pixels = min(images.max_pixels for images in fitted)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
        pipeline.num_threads = config.train.threads
    if not flags["out"]:
        rows, _ = classify(pipeline, files, None)
        lines = format_table(rows, pipeline.model, out=None)
    else:
        with own_place(flags["out"], is_own=is_own, is_mark=is_mark) as out:
            rows, overlays = classify(pipeline, files, None if flags["no_overlays"] else out)
            out.lease.confirm()
            remove_others(out.store, set(overlays.values()))
            write_table(out, rows, pipeline, overlays=overlays)
        lines = format_table(rows, pipeline.model, out=out.store, num_overlays=len(overlays))
    print("\n".join(lines), flush=True)
    if not any(row.is_readable for row in rows):
        raise UserError(
            f"none of the {len(rows)} files could be read as an image: {rows[0].path} "
            f"{rows[0].reason}"
        )


def classify(
    pipeline: Pipeline, files: Sequence[File], out: Place | None
) -> tuple[list[Prediction], dict[int, str]]:
    """The rows of files, and the names of the overlays drawn into `out`, by the place of their
    row.
    """
    rows: list[Prediction] = []
    overlays: dict[int, str] = {}
    with progress("predict", total=len(files), unit="images") as bar, Drawing(out) as drawing:
        for explained in pipeline.classify(files, explain_side=_SIDE if drawing.is_on else None):
            rows.append(explained.prediction)
            if name := drawing.draw(explained, number=len(rows)):
                overlays[len(rows) - 1] = name
            bar.update()
    return rows, overlays


def refuse_inside(out: str, paths: Sequence[str]) -> None:
    """Raise `UserError` where --out is inside a folder to classify: the next call would classify
    its overlays, too.
    """
    place = open_store(out).local_path(_TABLE) if out else None
    for path in paths:
        if place and Path(path).is_dir() and place.resolve().is_relative_to(Path(path).resolve()):
            raise UserError(
                f"--out {out} is inside {path}, which is classified: name another folder"
            )


def fit_to_run(images: Images, model: TrainedModel, *, given: Set[str]) -> Images:
    """How files become pixels for this run: as in its training, but with a given max_pixels.

    Raises `RunError` if the user gave another size or fit than the run's.
    """
    for key, value, own in other_pixels(model, images):
        if f"images.{key}" in given:
            raise RunError(
                f"images.{key} = {value!r}, but run {model.run_id} was trained with {own!r}: "
                "leave the key out"
            )
    if "images.max_pixels" not in given:
        return model.images
    return replace(model.images, max_pixels=images.max_pixels)


# -------------------------------------------------------------------------------------------- table


def columns_of(
    labels: LabelSpec, prior: Iterable[str] = (), *, has_several_runs: bool = False
) -> tuple[str, ...]:
    """The columns of predictions.csv; `prior` names what rows state a share for."""
    shares = [f"{_PRIOR}{name}" for name in prior]
    source = [_PRIOR_SOURCE] if shares else []
    source += [_DISAGREEMENT] if has_several_runs else []
    if labels.task == "binary":
        *names, model = _COLUMNS_OF_TWO
        return (*names, *(["prior"] if shares else []), *source, model)
    *names, model = _COLUMNS
    probabilities = [f"{_PROBABILITY}{name}" for name in labels.classes]
    return (*names, *probabilities, *shares, *source, model)


def write_table(
    out: Place, rows: Sequence[Prediction], pipeline: Pipeline, *, overlays: dict[int, str]
) -> None:
    """Write predictions.csv, then predictions.json, which also states the runs and overlays."""
    first, labels = rows[0], pipeline.model.labels
    is_ensemble = len(pipeline.models) > 1
    columns = columns_of(labels, first.prior, has_several_runs=is_ensemble)
    table = to_csv(columns, [_cells(row, columns) for row in rows])
    keys = columns
    if labels.task != "binary":
        stated = (
            *(("prior", _PRIOR_SOURCE) if first.prior else ()),
            *((_DISAGREEMENT,) if is_ensemble else ()),
        )
        keys = (*_COLUMNS[:-1], "calls", "probabilities", *stated, "model")
    content = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "note": NOTE,
        **_describe_runs(pipeline),
        **_describe_prior(rows, pipeline),
        "num_files": len(rows),
        "num_review": sum(row.decision == REVIEW for row in rows),
        "num_unreadable": sum(not row.is_readable for row in rows),
        "predictions": [
            {**{key: _cell(row, key) for key in keys}, "overlay": overlays.get(number)}
            for number, row in enumerate(rows)
        ],
    }
    out.write(_TABLE, table.encode())
    out.write(_JSON, to_json(content).encode())


def _cells(row: Prediction, columns: Sequence[str]) -> dict[str, object]:
    """The cells of a row; without a probability where the file could not be read."""
    return {column: _cell(row, column) for column in columns}


def _cell(row: Prediction, column: str) -> object:
    if column == _PRIOR_SOURCE:
        return row.prior_source
    if column == "prior" and row.threshold is not None:  # of two classes
        return next(iter(row.prior.values()))
    for prefix, values in ((_PROBABILITY, row.probabilities), (_PRIOR, row.prior)):
        if column.startswith(prefix):
            return values.get(column.removeprefix(prefix))
    return getattr(row, column)


def _describe_runs(pipeline: Pipeline) -> dict[str, object]:
    """What predictions.json states of the run; of several runs, also of each in `runs`."""
    each = [
        {
            "run_id": model.run_id,
            "dataset_fingerprint": model.fingerprint,
            **describe_calls(model.labels, model.thresholds, model.temperatures),
            "image_size": model.image_size,
            "fit": model.fit,
        }
        for model in pipeline.models
    ]
    if len(each) == 1:
        return each[0]
    outputs = [output.unmoved for output in pipeline.outputs]
    thresholds = [output.threshold for output in outputs if output.threshold is not None]
    model = pipeline.model
    # of the mean of calibrated logits, whose temperature is 1
    calls = describe_calls(model.labels, thresholds, [1.0] * len(model.temperatures))
    return {"run_id": pipeline.run_id, **calls, "runs": each}


def _describe_prior(rows: Sequence[Prediction], pipeline: Pipeline) -> dict[str, object]:
    """What predictions.json states of a prior, in addition to the run's own thresholds."""
    shares = rows[0].prior
    if not shares:
        return {}
    own = dict(zip((output.name for output in pipeline.outputs), pipeline.priors, strict=True))
    return {
        "prior": {
            "shares": shares,
            "source": rows[0].prior_source,
            "thresholds": _limits(rows, pipeline.model),
            "shares_of_run": own,
        }
    }


def _limits(rows: Sequence[Prediction], model: TrainedModel) -> Mapping[str, float]:
    """The thresholds that hold for the rows, by class or finding; none for several classes."""
    own = {o.name: o.threshold for o in outputs_of_run(model) if o.threshold is not None}
    return next((row.thresholds for row in rows if row.thresholds), own)


def format_table(
    rows: Sequence[Prediction], model: TrainedModel, *, out: Store | None, num_overlays: int = 0
) -> list[str]:
    """The lines for people: the table, of which only the first rows if files hold all, and sums."""
    shown = rows if out is None else rows[:_SHOWN]
    paths = [printable(row.path) for row in shown]
    scores = [_scores(row) for row in shown]
    heading, side = ("probability", ">") if model.labels.task == "binary" else (_HIGHEST, "<")
    if model.labels.task == "multilabel" or (heading == _HIGHEST and rows[0].prior):
        heading = _CALLED_FIRST
    width = min(80, max(len(path) for path in ["file", *paths]))
    middle = max(len(text) for text in [heading, *scores])
    lines = [f"{'file':<{width}}  {heading:<{middle}}  decision"]
    for row, path, score in zip(shown, paths, scores, strict=True):
        reason = f": {printable(row.reason)}" if row.reason else ""
        lines.append(f"{path:<{width}}  {score:{side}{middle}}  {_decision(row)}{reason}")
    if len(shown) < len(rows):
        lines.append(f"... and {len(rows) - len(shown)} more in predictions.csv")
    lines += ["", *_sums(rows, model)]
    if out is not None:
        lines.append(f"table: {out.uri}/predictions.csv  {out.uri}/predictions.json")
    if out is not None and num_overlays:
        lines.append(
            f"overlays: {num_overlays} in {out.uri}/overlays/, numbered like the table's rows"
        )
    return [*lines, NOTE]


def _sums(rows: Sequence[Prediction], model: TrainedModel) -> list[str]:
    """How many files got which decision, and how it is made."""
    labels = model.labels
    counts = Counter(row.decision for row in rows)
    names = [*labels.spoken, REVIEW]
    if labels.task == "multilabel":
        counts["with findings"] = sum(bool(row.calls) for row in rows)
        names = ["with findings", NO_FINDING, REVIEW]
    sums = " + ".join(f"{counts[name]} {short(name, labels.classes)}" for name in names)
    num_unreadable = sum(not row.is_readable for row in rows)
    lines = [f"files: {len(rows)} = {sums}, {num_unreadable} of which could not be read"]
    moved, run_id = ", moved to the prior" if rows[0].prior else "", rows[0].model
    if labels.task == "binary":
        limit = f"{rows[0].threshold:.3f} up, the threshold of {run_id}{moved}"
        lines.append(f"{names[1]} is called from a probability of {limit}")
    elif labels.task == "multiclass":
        before = " before the prior" if moved else ""
        lines.append(f"the class of the highest probability{before} is called; run {run_id}")
    else:
        found = Counter(name for row in rows for name in row.calls).most_common()
        limits = _limits(rows, model).items()
        lines += [
            "findings: "
            + (", ".join(f"{num} {short(name, labels.classes)}" for name, num in found) or "none"),
            f"each is called from its threshold of {run_id}{moved} up: "
            + ", ".join(f"{short(name, labels.classes)} {limit:.3f}" for name, limit in limits),
        ]
    if moved:
        shares = ", ".join(
            f"{short(name, labels.spoken)} {share:.3f}" for name, share in rows[0].prior.items()
        )
        lines.append(f"prior: {shares}, {rows[0].prior_source}; it changes no call")
    apart = [row for row in rows if row.disagreement is not None]
    if apart:
        most = max(apart, key=lambda row: row.disagreement or 0.0)
        lines.append(
            f"probabilities of the runs are at most {most.disagreement:.3f} apart: "
            f"{printable(most.path)}"
        )
    wrap = textwrap.TextWrapper(100, subsequent_indent="  ", break_on_hyphens=False)
    return [part for line in lines for part in wrap.wrap(line)]


def _scores(row: Prediction) -> str:
    """The probability of a row, or some with their names: those called, then the highest ones."""
    if not row.is_readable or row.probability is not None:
        return "-" if row.probability is None else f"{row.probability:.3f}"
    shown = sorted(row.highest(), key=lambda name: name not in row.calls)[:_NAMED]
    names = tuple(row.probabilities)
    return ", ".join(f"{short(name, names)} {row.probabilities[name]:.3f}" for name in shown)


def _decision(row: Prediction) -> str:
    """The decision of a row, with the most probable findings alone if they are many."""
    names = tuple(row.probabilities)
    if len(row.calls) <= 1:
        return row.decision if row.probability is not None else short(row.decision, names)
    called = [name for name in row.highest() if name in row.calls]
    more = [f"{len(called) - _NAMED} more"] if len(called) > _NAMED else []
    return "|".join([*(short(name, names) for name in called[:_NAMED]), *more])


def short(name: str, names: tuple[str, ...] = ()) -> str:
    """A name for a column of the table, one that no other of the model's `names` has there."""
    return printable(_short_names(names).get(name, shortened(name, _NAME_WIDTH)))


@cache
def _short_names(names: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(names, short_names(names, _NAME_WIDTH), strict=True))


# ----------------------------------------------------------------------------------------- overlays


class Drawing:
    """Draws and stores overlays while classification goes on. Does nothing without a place."""

    def __init__(self, out: Place | None) -> None:
        self._out = out
        self._pool = ThreadPoolExecutor()
        self._waiting: deque[Future[None]] = deque()

    @property
    def is_on(self) -> bool:
        return self._out is not None

    def __enter__(self) -> "Drawing":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._settle(leave=0)

    def draw(self, explained: Explained, *, number: int) -> str | None:
        """Begin to draw the overlay of a row, counted from 1; its name, or None without one."""
        if self._out is None or not explained.heats:
            return None
        name = overlay_name(number, explained.prediction.path)
        self._waiting.append(self._pool.submit(self._store, self._out, name, explained))
        self._settle(leave=_NUM_DRAWING)
        return name

    @staticmethod
    def _store(out: Place, name: str, explained: Explained) -> None:
        out.write(name, draw_overlay(explained))

    def _settle(self, *, leave: int) -> None:
        """Wait for all but `leave` overlays, and raise their errors."""
        while len(self._waiting) > leave:
            self._waiting.popleft().result()


def overlay_name(number: int, path: str) -> str:
    """`overlays/00007-film.png`: the row's number, and what is safe anywhere of the file's name."""
    stem = path.replace("\\", "/").rpartition("/")[2].rpartition(".")
    kept = re.sub(r"[^A-Za-z0-9]+", "_", stem[0] or stem[2]).strip("_")[:60]
    return f"overlays/{number:05d}{'-' if kept else ''}{kept}.png"


def is_own(key: str) -> bool:
    """Whether a key is one that this command writes."""
    return key in (_TABLE, _JSON, _EARLIER) or _OVERLAY.fullmatch(key) is not None


def is_mark(out: Store, key: str) -> bool:
    """Whether a key tells that the place is this command's."""
    if key != _TABLE:
        return _OVERLAY.fullmatch(key) is not None
    try:
        text = out.read(key).decode(errors="replace")
        columns = next(csv.reader(io.StringIO(text, newline="")), [])
    except csv.Error:
        return False
    others = (_PROBABILITY, _PRIOR)
    kept = tuple(
        each
        for each in columns
        if not each.startswith(others) and each not in ("prior", _PRIOR_SOURCE, _DISAGREEMENT)
    )
    return kept in (_COLUMNS, _COLUMNS_OF_TWO)


def remove_others(out: Store, names: set[str]) -> None:
    """Remove the overlays of an earlier table, so none is mistaken for a row of this one, and the
    config of an earlier version.
    """
    out.delete(_EARLIER)
    for entry in list(out.list("overlays/")):
        if _OVERLAY.fullmatch(entry.key) and entry.key not in names:
            out.delete(entry.key)


def draw_overlay(explained: Explained) -> bytes:
    """A PNG of the image next to its heat maps. Below the threshold these fade in proportion to the
    probability, so that a normal image does not glow.
    """
    assert explained.image is not None
    row, heats = explained.prediction, []
    names = tuple(row.probabilities)
    noun = "finding" if row.probability is None and row.thresholds else "class"
    drawn = dict(zip(names, legible(names, noun), strict=True))
    row = replace(
        row,
        decision=drawn.get(row.decision, row.decision),
        calls=tuple(drawn.get(name, name) for name in row.calls),
        probabilities={drawn[name]: value for name, value in row.probabilities.items()},
        thresholds={drawn.get(name, name): value for name, value in row.thresholds.items()},
    )
    for full, heat in explained.heats.items():
        name = drawn[full]
        probability, threshold = row.probabilities[name], row.thresholds.get(name, 1.0)
        title = f"LayerCAM: evidence for {printable(name)}"
        if row.probability is None:
            title += f", {probability:.3f}"
        heats.append(Heat(heat, title, strength=min(1.0, probability / max(threshold, 1e-9))))
    verdict = f"{_decision(row)}: {_scores(row)}"
    if row.probability is not None:
        verdict = (
            f"{row.decision}, probability {row.probability:.3f}, threshold {row.threshold:.3f}"
        )
    return draw_panel(
        explained.image, heats, verdict=verdict, note=NOTE, has_thresholds=bool(row.thresholds)
    )


if __name__ == "__main__":
    run_command(main)
