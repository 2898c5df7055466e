"""A finished run in one object: files, folders, buckets or arrays in, one row for each picture out.

`xrai.load` gives one to Python programs; `xrai.predict` is the same behind a command line. Pictures
are made by the function that made the training pictures. A picture that cannot be read, or that is
not of the kind that the model was trained on, is a row with the decision `review` and its reason,
never a missing row.
"""

import functools
import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from numpy.typing import NDArray

from xrai.errors import ImageError, UserError
from xrai.ingest.images import decode
from xrai.ingest.sources import FolderSource, Source, open_source
from xrai.learning.batch import to_grey
from xrai.learning.explain import grad_cam
from xrai.learning.network import fold_filters
from xrai.learning.predictor import TrainedModel, load_model
from xrai.log import get_logger
from xrai.results.calibration import calibrated
from xrai.results.review import REVIEW, needs_review
from xrai.store import open_store

BATCH_SIZE: Final = 64

_KINDS = "name JPEG, PNG or DICOM files or folders of them"
_WILDCARDS = frozenset("*?[")
_NUM_READERS = 4  # at least: reading waits more than it works
_logger = get_logger(__name__)


@dataclass(frozen=True)
class File:
    """One picture to classify: its name for people, and what gives its bytes or its pixels (H,
    W) uint8.
    """

    path: str
    read: Callable[[], bytes | NDArray[np.uint8]]


@dataclass(frozen=True)
class Prediction:
    """One row of the table."""

    path: str
    probability: float | None  # calibrated, of pneumonia; None where the file could not be read
    threshold: float  # on the same scale: pneumonia is called from it up
    decision: str  # normal, pneumonia or review
    reason: str  # why it asks for review, or ""
    model: str  # the run's id


@dataclass(frozen=True)
class Explained:
    """A row, and for a readable picture where the network found what speaks for pneumonia."""

    prediction: Prediction
    picture: NDArray[np.uint8] | None = None  # (side, side), fitted as the network's own
    heat: NDArray[np.float32] | None = None  # (size, size) in [0, 1]


class Pipeline:
    """A trained model with all that turns files into rows. Made by `load_pipeline`."""

    def __init__(
        self,
        model: TrainedModel,
        *,
        max_pixels: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.max_pixels = max_pixels or model.images.max_pixels
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = fold_filters(model.network).to(self._device)
        self._typicality = model.typicality.to(self._device)

    def predict(
        self, pictures: "str | Path | NDArray[np.uint8] | Iterable[str | Path | NDArray[np.uint8]]"
    ) -> list[Prediction]:
        """One row for each picture, in order.

        A picture is a path as in `find_files`, or an array of grey values (H, W) uint8, upright, 0
        black, whose row is named `array 1` and so on by its place. Raises `UserError` where a path
        is missing or holds no file.
        """
        listed = [pictures] if isinstance(pictures, str | Path | np.ndarray) else list(pictures)
        files: list[File] = []
        for number, picture in enumerate(listed, start=1):
            if isinstance(picture, np.ndarray):
                files.append(File(f"array {number}", functools.partial(_as_it_is, picture)))
            else:
                files += find_files([str(picture)])
        return [explained.prediction for explained in self.classify(files)]

    def classify(
        self, files: Iterable[File], *, explain_side: int | None = None
    ) -> Iterator[Explained]:
        """One row for each file, in order; with `explain_side`, each readable picture of that side
        and its heat map.

        Files are read and decoded by all cores, up to two batches ahead; memory does not grow.
        """
        rest = iter(files)
        first = list(islice(rest, 2))
        if len(first) == 1:  # threads would take longer to start than the picture to read
            yield from self._classify(
                [(file.path, self._read(file, explain_side)) for file in first], explain_side
            )
            return
        rest = chain(first, rest)
        waiting: deque[tuple[File, Future[_Pixels | str]]] = deque()
        pool = ThreadPoolExecutor(max(_NUM_READERS, len(os.sched_getaffinity(0))))
        try:
            while True:
                for file in islice(rest, 2 * BATCH_SIZE - len(waiting)):
                    waiting.append((file, pool.submit(self._read, file, explain_side)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(BATCH_SIZE, len(waiting)))]
                yield from self._classify(
                    [(file.path, found.result()) for file, found in batch], explain_side
                )
        finally:
            pool.shutdown(cancel_futures=True)  # after an error what waits need not be read

    def score(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities of pneumonia and atypicality, (n,) each, of fitted pictures (n, size,
        size).
        """
        with torch.inference_mode():
            logits, atypicality = self._typicality.atypicality(self._network, self._grey(pictures))
        scores = calibrated(logits.double().cpu().numpy(), self.model.temperature)
        return scores, atypicality.double().cpu().numpy()

    def explain(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Heat maps (n, size, size) in [0, 1] of fitted pictures (n, size, size); see
        `xrai.learning.explain`.
        """
        heat: NDArray[np.float32] = (
            grad_cam(self._network, self._grey(pictures)).float().cpu().numpy()
        )
        return heat

    def _grey(self, pictures: NDArray[np.uint8]) -> torch.Tensor:
        dtype = next(self._network.parameters()).dtype
        return to_grey(pictures[:, None], self._device, dtype).contiguous(
            memory_format=torch.channels_last
        )

    def _read(self, file: File, explain_side: int | None) -> "_Pixels | str":
        """The pixels, or the reason why there are none."""
        try:
            data = file.read()
            own = decode(
                data, size=self.model.image_size, fit=self.model.fit, max_pixels=self.max_pixels
            )
            if explain_side is None:
                return _Pixels(own, None)
            return _Pixels(
                own, decode(data, size=explain_side, fit=self.model.fit, max_pixels=self.max_pixels)
            )
        except ImageError as error:
            return str(error)

    def _classify(
        self, batch: "Sequence[tuple[str, _Pixels | str]]", explain_side: int | None
    ) -> Iterator[Explained]:
        model = self.model
        scores: Iterator[tuple[float, float]] = iter(())
        heat: Iterator[NDArray[np.float32]] = iter(())
        if readable := [found.own for _, found in batch if not isinstance(found, str)]:
            pictures = np.stack(readable)  # (n, size, size)
            scores = zip(*(column.tolist() for column in self.score(pictures)), strict=True)
            heat = iter(self.explain(pictures) if explain_side is not None else ())
        for path, found in batch:
            if isinstance(found, str):
                yield Explained(
                    Prediction(path, None, model.threshold, REVIEW, found, model.run_id)
                )
                continue
            probability, atypicality = next(scores)
            decision, reason = self._decide(probability, atypicality)
            row = Prediction(path, probability, model.threshold, decision, reason, model.run_id)
            yield Explained(row, found.shown, next(heat, None))

    def _decide(self, probability: float, atypicality: float) -> tuple[str, str]:
        """The decision and, for a review, its reason."""
        if needs_review(atypicality):
            return (
                REVIEW,
                f"does not look like the training images: atypicality {atypicality:.2f}, above the limit of 1",
            )
        return self.model.classes[int(probability >= self.model.threshold)].lower(), ""


@dataclass(frozen=True)
class _Pixels:
    own: NDArray[np.uint8]  # (size, size), what the network sees
    shown: NDArray[np.uint8] | None  # (side, side), the same for people


def load_pipeline(run: str, *, max_pixels: int | None = None) -> Pipeline:
    """The pipeline of the finished run at an address; `xrai.load` says more."""
    return Pipeline(load_model(open_store(run)), max_pixels=max_pixels)


# -------------------------------------------------------------------------------------------- files


def find_files(paths: Sequence[str]) -> list[File]:
    """The files that the paths name, each once, in the order given.

    A path is a file, a folder or zip or .npz with all that is in it, the same below s3://bucket, or
    a pattern of such with `*`, `?`, `[abc]`, or `**` for any number of folders; a file of that very
    name comes before the pattern. Hidden files inside folders are left out. Raises `UserError`
    where a path is missing or holds no file.
    """
    if not paths:
        raise UserError(f"no PATH given: {_KINDS}, as in `xrai.predict --run R films/`")
    found: dict[str, File] = {}
    num_hidden = 0
    for path in paths:
        inside = _find(path)
        shown = [file for file in inside if not file.is_hidden]
        num_hidden += len(inside) - len(shown)
        if not shown:
            raise UserError(f"{path} holds no files to classify; {_KINDS}")
        found.update({entry.file.path: entry.file for entry in shown})
    if num_hidden:
        _logger.info("%d hidden files (names that begin with a dot) are left out", num_hidden)
    return list(found.values())


@dataclass(frozen=True)
class _Found:
    file: File
    is_hidden: bool


def _find(path: str) -> list[_Found]:
    """What one path names. Raises `UserError` where there is nothing."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name {path!r} is not UTF-8; rename it") from None
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    if "://" in path:
        return _find_in_bucket(path)
    if not os.path.lexists(path) and _WILDCARDS & set(path):
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207, Path.glob takes no absolute one
        if not matches:
            raise UserError(f"no file matches {path}; {_KINDS}")
        return [found for match in matches for found in _find_on_disk(match, is_match=True)]
    return _find_on_disk(path)


def _find_on_disk(path: str, *, is_match: bool = False) -> list[_Found]:
    place = Path(path)
    if place.is_dir() or (place.is_file() and place.suffix.lower() in (".zip", ".npz")):
        return _all_of(open_source(path), path)
    if place.is_file() or (
        is_match and place.is_symlink()
    ):  # one that leads nowhere is a row that says so
        return [_Found(_file(FolderSource(place.parent), place.name, path), is_hidden=False)]
    if place.exists():
        raise UserError(f"{path} is neither a file nor a folder; {_KINDS}")
    raise UserError(f"there is no file or folder {path}; {_KINDS}")


def _find_in_bucket(uri: str) -> list[_Found]:
    """An object, a pattern of objects, or all below a prefix; with a prefix that a pattern
    matches, all below it.
    """
    parent, _, name = uri.rpartition("/")
    if name and parent.count("/") > 1 and open_store(parent).size(name) is not None:
        return [_Found(_file(open_source(parent), name, uri), is_hidden=False)]
    parts = uri.split("/")
    first = next((number for number, part in enumerate(parts) if _WILDCARDS & set(part)), None)
    if first is None:
        return _all_of(open_source(uri), uri)
    top, pattern = "/".join(parts[:first]), parts[first:]
    inside = _all_of(open_source(top), top)
    matches = [found for found in inside if _matches(found.file.path.split("/")[first:], pattern)]
    if not matches:
        raise UserError(f"no object matches {uri}; {_KINDS}")
    return matches


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether names of folders and a file, or the first of them, fit a pattern; `**` is any
    number of folders.
    """
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _all_of(source: Source, path: str) -> list[_Found]:
    """All files of a source of many; hidden are those below a name that begins with a dot."""
    return [
        _Found(
            _file(source, file.path, f"{path.rstrip('/')}/{file.path}"),
            is_hidden=any(part.startswith(".") for part in file.path.split("/")),
        )
        for file in source.files()
    ]


def _file(source: Source, key: str, path: str) -> File:
    return File(path, functools.partial(source.read, key))


def _as_it_is(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return picture
