"""Classify X-rays with a finished run: `python -m xrai.predict --run URI/ID PATH... [--out DIR]`.

A PATH is a JPEG or PNG file, a folder of them, or any other source that `xrai.preprocess` reads. Each file is one row
of the table, in the order given; one that can not be read has its reason there instead of a probability. Pictures are
made by the function that made the training pictures. The table is printed; with --out it is also written, as
predictions.csv and predictions.json. The exit status is 2 where no file at all could be read.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import xrai
from xrai import config as configuration
from xrai.config import Flag, Images
from xrai.dataset.images import decode
from xrai.dataset.sources import FolderSource, Source, open_source
from xrai.errors import ImageError, RunError, UserError, run_command
from xrai.learning.distributed import join
from xrai.learning.predictor import TrainedModel, load_model, to_grey
from xrai.log import get_logger, progress, setup_logging
from xrai.results.artifacts import RunFolder, safe_path, to_csv, to_json
from xrai.store import Store, open_store

FLAGS = (
    Flag("run", "", "the finished run, URI/ID: a folder or s3://bucket/prefix/ID"),
    Flag("out", "", "folder or s3://bucket/prefix for predictions.csv and predictions.json; empty: print only"),
    Flag("paths", [], "JPEG and PNG files, folders of them, zips or s3://bucket/prefix", nargs="*"),
)
BATCH_SIZE = 64
SCHEMA_VERSION = 1
_SHOWN = 50  # rows that are printed where all of them are written to files
_logger = get_logger("xrai.predict")


@dataclass(frozen=True)
class File:
    """One file to classify: its name for people, and where its bytes are."""

    path: str
    source: Source
    key: str


@dataclass(frozen=True)
class Prediction:
    """One row of the table."""

    path: str
    probability: float | None  # of the second class, pneumonia; None where the file could not be read
    threshold: float
    call: str  # one of the run's classes, or "" where the file could not be read
    reason: str  # why it could not be read, or ""


def main() -> None:
    """Read the command line, classify, print and write the table."""
    config, flags = configuration.parse("predict", description="Classify X-rays with a finished run.", flags=FLAGS)
    setup_logging()
    if not flags["run"]:
        raise UserError("--run is missing: give the address of a finished run, such as submit/20261123-031500-a1b2c3")
    files = find_files(flags["paths"])
    with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
        model = load_model(open_store(flags["run"]), folder=Path(folder))
    images = fit_to_run(config.images, model)
    out = open_store(flags["out"]) if flags["out"] else None
    if out is not None:
        RunFolder.check_writable(flags["out"], flag="--out")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with join(timeout_s=config.train.timeout_s) as ranks, progress("predict", total=len(files), unit="images") as bar:
        rows = []
        for row in classify(model, files, images=images, device=ranks.device):
            rows.append(row)
            bar.update()
    if out is not None:
        write_table(out, rows, model)
    print("\n".join(format_table(rows, model, out=out)), flush=True)
    if all(row.reason for row in rows):
        raise UserError(f"none of the {len(rows)} files could be read as an image: {rows[0].path} {rows[0].reason}")


def find_files(paths: Sequence[str]) -> list[File]:
    """The files that the paths name, folders with all that is in them, each once, in the order given.

    Hidden files inside folders are left out. Raises `UserError` where a path is missing or holds no file.
    """
    if not paths:
        raise UserError("no PATH given: name JPEG or PNG files or folders of them, as in `xrai.predict --run R films/`")
    found: dict[str, File] = {}
    num_hidden = 0
    for path in paths:
        if _is_one_file(path):
            files = [File(path, FolderSource(Path(path).parent), Path(path).name)]
        else:
            inside = _inside(path)
            files = [file for file in inside if not any(part.startswith(".") for part in file.key.split("/"))]
            num_hidden += len(inside) - len(files)
        if not files:
            raise UserError(f"{path} holds no files to classify; JPEG and PNG files are needed")
        found.update({file.path: file for file in files})
    if num_hidden:
        _logger.info("%d hidden files (names that begin with a dot) are left out", num_hidden)
    return list(found.values())


def fit_to_run(images: Images, model: TrainedModel) -> Images:
    """How files become pixels for this run: as in its training, but `images.max_pixels` where the user gave one.

    Raises `RunError` where the user asked for another size or fit than the run's.
    """
    for key, own in (("size", model.image_size), ("fit", model.fit)):
        value = getattr(images, key)
        if value not in (own, getattr(Images(), key)):
            raise RunError(
                f"images.{key} = {value!r}, but run {model.run_id} was trained with {own!r}: leave the key out"
            )
    max_pixels = model.max_pixels if images.max_pixels == Images().max_pixels else images.max_pixels
    return Images(size=model.image_size, fit=model.fit, max_pixels=max_pixels)  # type: ignore[arg-type]


def classify(
    model: TrainedModel, files: Sequence[File], *, images: Images, device: torch.device
) -> Iterator[Prediction]:
    """One row for each file, in order. Files are decoded by all cores, a batch at a time; memory does not grow."""
    network = model.network.to(device)
    rest = iter(files)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        while batch := list(islice(rest, BATCH_SIZE)):
            pictures = list(pool.map(lambda file: _picture(file, images), batch))
            usable = [picture for picture in pictures if not isinstance(picture, str)]
            scores = iter(score(network, np.stack(usable)[:, None], device=device) if usable else ())
            for file, picture in zip(batch, pictures, strict=True):
                if isinstance(picture, str):
                    yield Prediction(file.path, None, model.threshold, "", picture)
                else:
                    probability = float(next(scores))
                    call = model.classes[int(probability >= model.threshold)]
                    yield Prediction(file.path, probability, model.threshold, call, "")


@torch.inference_mode()
def score(network: torch.nn.Module, images: NDArray[np.uint8], *, device: torch.device) -> NDArray[np.float64]:
    """Probabilities of pneumonia, (n,), of pictures (n, 1, H, W)."""
    dtype = next(network.parameters()).dtype
    logits: torch.Tensor = network(to_grey(images, device, dtype).contiguous(memory_format=torch.channels_last))
    probabilities: NDArray[np.float64] = torch.sigmoid(logits.double()).cpu().numpy()
    return probabilities


def write_table(out: Store, rows: Sequence[Prediction], model: TrainedModel) -> None:
    """Write predictions.csv, and predictions.json, which also says what classified."""
    cells = ({**asdict(row), "path": safe_path(row.path)} for row in rows)
    table = to_csv([field.name for field in fields(Prediction)], cells)
    content = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": xrai.__version__,
        "note": "No medical device: for research, not for diagnosis.",
        "run_id": model.run_id,
        "dataset_fingerprint": model.fingerprint,
        "classes": model.classes,
        "threshold": model.threshold,
        "image_size": model.image_size,
        "fit": model.fit,
        "num_files": len(rows),
        "num_unreadable": sum(bool(row.reason) for row in rows),
        "predictions": [asdict(row) for row in rows],
    }
    out.write("predictions.csv", table.encode())
    out.write("predictions.json", to_json(content).encode())


def format_table(rows: Sequence[Prediction], model: TrainedModel, *, out: Store | None) -> list[str]:
    """The lines for people: the table and what it sums up to. Where files hold all rows, only the first are shown."""
    shown = rows if out is None else rows[:_SHOWN]
    paths = [_printable(row.path) for row in shown]
    width = min(80, max(len(path) for path in ["file", *paths]))
    lines = [f"{'file':<{width}}  probability  call"]
    for row, path in zip(shown, paths, strict=True):
        if row.probability is None:
            lines.append(f"{path:<{width}}            -  none: {_printable(row.reason)}")
        else:
            lines.append(f"{path:<{width}}  {row.probability:11.3f}  {row.call}")
    if len(shown) < len(rows):
        lines.append(f"... and {len(rows) - len(shown)} more in predictions.csv")
    counts = [f"{sum(row.call == name for row in rows)} {name}" for name in model.classes]
    num_unreadable = sum(bool(row.reason) for row in rows)
    lines += [
        "",
        f"files: {len(rows)} = {' + '.join(counts)} + {num_unreadable} that could not be read",
        f"{model.classes[1]} is called from a probability of {model.threshold:.3f} up, the threshold of {model.run_id}",
    ]
    if out is not None:
        lines.append(f"table: {out.uri}/predictions.csv  {out.uri}/predictions.json")
    return [*lines, "No medical device: for research, not for diagnosis."]


def _is_one_file(path: str) -> bool:
    """Whether a path is one file to classify, not a source of many. Raises `UserError` where there is nothing."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name {path!r} is not UTF-8; rename it") from None
    if "://" in path:
        return False
    place = Path(path)
    if place.is_dir() or (place.is_file() and place.suffix.lower() in (".zip", ".npz")):
        return False
    if place.is_file():
        return True
    if place.exists():
        raise UserError(f"{path} is neither a file nor a folder; name JPEG or PNG files or folders of them")
    raise UserError(f"there is no file or folder {path}; name JPEG or PNG files or folders of them")


def _inside(path: str) -> list[File]:
    """All files of a folder or of another source of many."""
    source = open_source(path)
    return [File(f"{path.rstrip('/')}/{file.path}", source, file.path) for file in source.files()]


def _picture(file: File, images: Images) -> NDArray[np.uint8] | str:
    """The picture (H, W), or the reason why there is none."""
    try:
        return decode(file.source.read(file.key), size=images.size, fit=images.fit, max_pixels=images.max_pixels)
    except ImageError as error:
        return str(error)


def _printable(text: str) -> str:
    """Text from outside as one line that can not steer a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


if __name__ == "__main__":
    run_command(main)
