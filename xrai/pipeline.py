"""A finished run as one object: files, folders, buckets or arrays in, one row for each image out.

`xrai.load` gives one to Python programs; `xrai.predict` is the same as a command. Images are
preprocessed by the function that made the training images. An image that cannot be read, or is
unlike those that the model was trained on, is a row with the decision `review` and its reason,
never a missing row.
"""

import copy
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from xrai.config import Images
from xrai.errors import ImageError, RunError
from xrai.files import num_cores
from xrai.ingest.budget import MemoryBudget
from xrai.ingest.find import File, find_files
from xrai.ingest.images import decode
from xrai.labels import NO_FINDING, REVIEW
from xrai.learning.batch import to_grey
from xrai.learning.explain import grad_cam
from xrai.learning.predictor import MODEL_FILE, TrainedModel, load_model
from xrai.log import progress
from xrai.results.prior import ESTIMATE, Prior, Wanted, estimate_prior, move_outputs, read_prior
from xrai.results.summary import stated_hash
from xrai.results.types import Output, call_logits, calls_of, needs_review, outputs_of, score_logits
from xrai.store import open_store

BATCH_SIZE: Final = 64

_NUM_READERS = 4  # at least: reading waits more than it works
_NUM_HEATS = 3  # of an image, at most

Pixels = NDArray[np.uint8]
Heats = Mapping[str, NDArray[np.float32]]  # by class or finding, (size, size) in [0, 1]


@dataclass(frozen=True)
class Prediction:
    """One row of the table.

    `probability` and `threshold` are those of a model that tells two classes apart, else None;
    `probabilities`, `thresholds` and `calls` are there for every model. A row without
    `probabilities` is a file that could not be read.
    """

    path: str
    probability: float | None  # calibrated, of the class that is looked for, such as pneumonia
    threshold: float | None  # on the same scale: it is called from this probability up
    decision: str  # the class, the findings joined by "|" or "no finding"; or review
    reason: str  # why it asks for review, or ""
    model: str  # the run's id
    # Of each class or finding, calibrated; of two classes, of the one that is looked for
    probabilities: Mapping[str, float] = field(default_factory=dict, hash=False)
    # From which each is called; none where the class of the highest probability is
    thresholds: Mapping[str, float] = field(default_factory=dict, hash=False)
    calls: tuple[str, ...] = ()  # the class or the findings of the decision; none in a review
    # The shares that the probabilities are for, of two classes that of the one looked for; empty
    # unless a prior was asked for
    prior: Mapping[str, float] = field(default_factory=dict, hash=False)
    prior_source: str = ""  # given, or estimated from how many images

    @property
    def is_readable(self) -> bool:
        """Whether the file could be read, and so has probabilities."""
        return bool(self.probabilities)

    def highest(self, number: int | None = None) -> list[str]:
        """The names of the classes or findings, the most probable first; at most `number`."""
        return sorted(self.probabilities, key=self.probabilities.__getitem__, reverse=True)[:number]


@dataclass(frozen=True)
class Explained:
    """A row, and for a readable image heat maps of the evidence for what is called in it, or else
    for the class or finding of the highest probability.
    """

    prediction: Prediction
    image: Pixels | None = None  # (side, side), preprocessed like the network's own
    heats: Heats = field(default_factory=dict, hash=False)  # the most probable first, at most 3


@dataclass(frozen=True)
class _Read:
    """What reading a file gave."""

    path: str
    own: Pixels | None = None  # (size, size), what the network sees
    shown: Pixels | None = None  # (side, side), the same for people
    reason: str = ""  # why there are no pixels


class _Scores(NamedTuple):
    """What the model says of n images."""

    probabilities: NDArray[np.float64]  # (n, C)
    called: NDArray[np.bool_]  # (n, C)
    atypicality: NDArray[np.float64]  # (n,)


class Pipeline:
    """A trained model with all that turns files into rows. Made by `load_pipeline`."""

    def __init__(
        self,
        model: TrainedModel,
        *,
        max_pixels: int | None = None,
        device: torch.device | None = None,
        prior: Wanted | None = None,
    ) -> None:
        self.model = model
        self.max_pixels = max_pixels or model.images.max_pixels
        self.outputs = outputs_of_run(model)
        threshold = self.outputs[0].threshold if self._is_binary else None
        self._blank = Prediction("", None, threshold, REVIEW, "", model.run_id)
        self._budget = MemoryBudget(num_cores())
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = model.network.for_inference().to(self._device)
        self._typicality = model.typicality.to(self._device)
        self._estimates = prior == ESTIMATE
        if prior is not None:
            refuse_without_priors(model)
            if not self._estimates:
                self._move(read_prior(prior, self.outputs))

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
        side and its heat maps.

        All cores read and decode, up to two batches ahead; memory does not grow. Where the prior is
        to be estimated, all files are read and scored twice: first for it, then for their rows.
        """
        if self._estimates:
            files = list(files)
            yield from self._estimate(files).classify(files, explain_side=explain_side)
            return
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
        """Probabilities and atypicality, (n,), of preprocessed images (n, size, size).

        Probabilities are (n, C) for C classes or findings, and (n,) for two classes: of the one
        that is looked for.
        """
        probabilities, _, atypicality = self._score(images)
        return probabilities[:, 0] if self._is_binary else probabilities, atypicality

    def explain(self, images: Pixels, outputs: int | NDArray[np.int64] = 0) -> NDArray[np.float32]:
        """Heat maps (n, size, size) in [0, 1] of preprocessed images (n, size, size), for one
        output of the network or for one of each image, (n,); see `xrai.learning.explain`.
        """
        output = outputs if isinstance(outputs, int) else torch.from_numpy(outputs)
        heat: NDArray[np.float32] = (
            grad_cam(self._network, self._grey(images), output).float().cpu().numpy()
        )
        return heat

    def _score(self, images: Pixels) -> _Scores:
        with torch.inference_mode():
            found = self._typicality.atypicality(self._network, self._grey(images))
        logits, atypicality = (each.double().cpu().numpy() for each in found)
        called = call_logits(self.outputs, logits)
        return _Scores(score_logits(self.outputs, logits), called, atypicality)

    def _move(self, prior: Prior) -> None:
        self.outputs = move_outputs(self.outputs, self.model.priors, prior)
        threshold = self.outputs[0].threshold if self._is_binary else None
        self._blank = replace(
            self._blank, threshold=threshold, prior=prior.shares, prior_source=prior.source
        )

    def _estimate(self, files: Sequence[File]) -> "Pipeline":
        """The same pipeline at the prior of these files, those for review left out."""
        found = copy.copy(self)
        found._estimates = False
        scores = []
        with progress("estimate prior", total=len(files), unit="images") as bar:
            for row in (explained.prediction for explained in found.classify(files)):
                if row.decision != REVIEW:
                    scores.append(list(row.probabilities.values()))
                bar.update()
        found._move(estimate_prior(self.outputs, self.model.priors, np.array(scores)))
        return found

    @property
    def _is_binary(self) -> bool:
        return self.model.labels.task == "binary"

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
        found = [read.own for read in batch if read.own is not None]
        scored: Iterator[tuple[Prediction, Heats]] = iter(())
        if found:
            images = np.stack(found)  # (n, size, size)
            scores = self._score(images)
            heats = self._explain(images, scores) if explain_side is not None else [{}] * len(found)
            scored = zip(map(self._row, *scores), heats, strict=True)
        for read in batch:
            if read.own is None:
                yield Explained(replace(self._blank, path=read.path, reason=read.reason))
            else:
                row, heat = next(scored)
                yield Explained(replace(row, path=read.path), read.shown, heat)

    def _row(
        self, probabilities: NDArray[np.float64], called: NDArray[np.bool_], atypicality: float
    ) -> Prediction:
        """The row, still without a path, of an image with these scores, (C,) each."""
        names = [output.name for output in self.outputs]
        limits = {o.name: o.threshold for o in self.outputs if o.threshold is not None}
        row = replace(
            self._blank,
            probability=float(probabilities[0]) if self._is_binary else None,
            probabilities=dict(zip(names, probabilities.tolist(), strict=True)),
            thresholds=limits,
        )
        if needs_review(atypicality):
            reason = (
                f"does not look like the training images: atypicality {atypicality:.2f}, above the "
                "limit of 1"
            )
            return replace(row, reason=reason)
        calls = calls_of(self.outputs, called)
        return replace(row, decision="|".join(calls) or NO_FINDING, calls=calls)

    def _explain(self, images: Pixels, scores: _Scores) -> list[Heats]:
        """The heat maps of each image that `Explained` has."""
        # what is called first, then by probability
        ranked = np.argsort(-(scores.called + scores.probabilities), axis=1, kind="stable")
        num_maps = scores.called.sum(axis=1).clip(1, _NUM_HEATS)  # (n,)
        heats: list[Heats] = [{} for _ in images]
        for place in range(num_maps.max()):
            rows = np.flatnonzero(num_maps > place)
            outputs = ranked[rows, place]
            for row, output, heat in zip(
                rows, outputs, self.explain(images[rows], outputs), strict=True
            ):
                heats[row] = {**heats[row], self.outputs[output].name: heat}
        return heats


def load_pipeline(
    run: str, *, max_pixels: int | None = None, prior: Wanted | None = None
) -> Pipeline:
    """The pipeline of the finished run at an address; `xrai.load` says more."""
    return Pipeline(open_run(run), max_pixels=max_pixels, prior=prior)


def outputs_of_run(model: TrainedModel) -> tuple[Output, ...]:
    """The outputs of a run, as its training chose their temperatures and thresholds."""
    return outputs_of(model.labels, model.temperatures, model.thresholds, "that of the run")


def refuse_without_priors(model: TrainedModel) -> None:
    """Raise `RunError` where a run does not keep what its scores are calibrated at."""
    if not model.priors:
        raise RunError(
            f"run {model.run_id} does not keep the shares of images that its probabilities are "
            "calibrated at, as runs of this version of xrai do: train it again to use a prior"
        )


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
