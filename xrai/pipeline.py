"""A finished run as one object: files, folders, buckets or arrays in, one row for each image out.

`xrai.load` gives one to Python programs; `xrai.predict` is the same as a command. Images are
preprocessed by the function that made the training images. An image that cannot be read, or is
unlike those that the model was trained on, is a row with the decision `review` and its reason,
never a missing row.
"""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from xrai.config import Images
from xrai.errors import ImageError
from xrai.files import num_cores
from xrai.ingest.budget import MemoryBudget
from xrai.ingest.find import File, find_files
from xrai.ingest.images import decode
from xrai.learning.batch import to_grey
from xrai.learning.explain import grad_cam
from xrai.learning.network import fold_filters
from xrai.learning.predictor import MODEL_FILE, TrainedModel, load_model
from xrai.results.calibration import calibrated
from xrai.results.summary import stated_hash
from xrai.results.types import REVIEW, needs_review
from xrai.store import open_store

BATCH_SIZE: Final = 64

_NUM_READERS = 4  # at least: reading waits more than it works

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """One row of the table."""

    path: str
    probability: float | None  # calibrated, of pneumonia; None if the file could not be read
    threshold: float  # on the same scale: pneumonia is called from this probability up
    decision: str  # normal, pneumonia or review
    reason: str  # why it asks for review, or ""
    model: str  # the run's id


@dataclass(frozen=True)
class Explained:
    """A row, and for a readable image the heat map of the evidence for pneumonia."""

    prediction: Prediction
    image: Pixels | None = None  # (side, side), preprocessed like the network's own
    heat: NDArray[np.float32] | None = None  # (size, size) in [0, 1]


@dataclass(frozen=True)
class _Read:
    """What reading a file gave."""

    path: str
    own: Pixels | None = None  # (size, size), what the network sees
    shown: Pixels | None = None  # (side, side), the same for people
    reason: str = ""  # why there are no pixels


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
        self._budget = MemoryBudget(num_cores())
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = fold_filters(model.network).to(self._device)
        self._typicality = model.typicality.to(self._device)

    def predict(
        self, images: "str | Path | Pixels | Iterable[str | Path | Pixels]"
    ) -> list[Prediction]:
        """One row for each image, in order.

        An image is a path as in `find_files`, or an array of grey values (H, W) uint8, upright, 0
        black, named `array 1` and so on by its place. Raises `UserError` if a path is missing or
        holds no file.
        """
        listed = [images] if isinstance(images, str | Path | np.ndarray) else list(images)
        files: list[File] = []
        for number, image in enumerate(listed, start=1):
            if isinstance(image, np.ndarray):
                files.append(File(f"array {number}", functools.partial(np.asarray, image)))
            else:
                files += find_files([str(image)])
        return [explained.prediction for explained in self.classify(files)]

    def classify(
        self, files: Iterable[File], *, explain_side: int | None = None
    ) -> Iterator[Explained]:
        """One row for each file, in order; with `explain_side`, also each readable image of that
        side and its heat map.

        All cores read and decode, up to two batches ahead; memory does not grow.
        """
        rest = iter(files)
        first = list(islice(rest, 2))
        if len(first) == 1:  # starting threads would take longer than reading one image
            yield from self._classify([self._read(first[0], explain_side)], explain_side)
            return
        rest = chain(first, rest)
        waiting: deque[Future[_Read]] = deque()
        pool = ThreadPoolExecutor(max(_NUM_READERS, num_cores()))
        try:
            while True:
                for file in islice(rest, 2 * BATCH_SIZE - len(waiting)):
                    waiting.append(pool.submit(self._read, file, explain_side))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(BATCH_SIZE, len(waiting)))]
                yield from self._classify([found.result() for found in batch], explain_side)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing more is read

    def score(self, images: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities of pneumonia and atypicality, (n,) each, of preprocessed images (n, size,
        size).
        """
        with torch.inference_mode():
            logits, atypicality = self._typicality.atypicality(self._network, self._grey(images))
        probabilities = calibrated(logits[:, 0].double().cpu().numpy(), self.model.temperatures[0])
        return probabilities, atypicality.double().cpu().numpy()

    def explain(self, images: Pixels) -> NDArray[np.float32]:
        """Heat maps (n, size, size) in [0, 1] of preprocessed images (n, size, size); see
        `xrai.learning.explain`.
        """
        heat: NDArray[np.float32] = (
            grad_cam(self._network, self._grey(images)).float().cpu().numpy()
        )
        return heat

    def _grey(self, images: Pixels) -> torch.Tensor:
        dtype = next(self._network.parameters()).dtype
        grey = to_grey(images[:, None], self._device, dtype)  # (n, 1, size, size)
        return grey.contiguous(memory_format=torch.channels_last)

    def _read(self, file: File, explain_side: int | None) -> _Read:
        to_square = functools.partial(
            decode, fit=self.model.fit, max_pixels=self.max_pixels, hold=self._budget.hold
        )
        try:
            data = file.read()
            own = to_square(data, size=self.model.image_size)
            shown = None if explain_side is None else to_square(data, size=explain_side)
            return _Read(file.path, own, shown)
        except ImageError as error:
            return _Read(file.path, reason=str(error))

    def _classify(self, batch: Sequence[_Read], explain_side: int | None) -> Iterator[Explained]:
        model = self.model
        scores: Iterator[tuple[float, float]] = iter(())
        heat: Iterator[NDArray[np.float32]] = iter(())
        if readable := [read.own for read in batch if read.own is not None]:
            images = np.stack(readable)  # (n, size, size)
            scores = zip(*(column.tolist() for column in self.score(images)), strict=True)
            heat = iter(self.explain(images) if explain_side is not None else ())
        for read in batch:
            probability, decision, reason = None, REVIEW, read.reason
            if read.own is not None:
                probability, atypicality = next(scores)
                decision, reason = self._decide(probability, atypicality)
            row = Prediction(
                read.path, probability, model.thresholds[0], decision, reason, model.run_id
            )
            yield Explained(row, read.shown, None if read.own is None else next(heat, None))

    def _decide(self, probability: float, atypicality: float) -> tuple[str, str]:
        """The decision and, for a review, its reason."""
        if needs_review(atypicality):
            return (
                REVIEW,
                f"does not look like the training images: atypicality {atypicality:.2f}, above the "
                "limit of 1",
            )
        return self.model.labels.classes[int(probability >= self.model.thresholds[0])].lower(), ""


def load_pipeline(run: str, *, max_pixels: int | None = None) -> Pipeline:
    """The pipeline of the finished run at an address; `xrai.load` says more."""
    return Pipeline(open_run(run), max_pixels=max_pixels)


def other_pixels(model: TrainedModel, images: Images) -> Iterator[tuple[str, object, object]]:
    """The keys of `images` that make other pixels of a file than the model was trained on: name,
    value, and the value of the training.
    """
    for key in ("size", "fit"):
        value, own = getattr(images, key), getattr(model.images, key)
        if value != own:
            yield key, value, own


def open_run(run: str) -> TrainedModel:
    """The model of the finished run at an address, checked against the hash in its summary."""
    store = open_store(run)
    return load_model(store, sha256=stated_hash(store, MODEL_FILE))
