"""Finished runs as one object: files, folders, buckets or arrays in, one row for each image out.

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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from xrai.config import Images
from xrai.errors import ImageError, RunError
from xrai.files import num_cores
from xrai.ingest.budget import MemoryBudget
from xrai.ingest.find import File, find_files
from xrai.ingest.images import decode_sized, ratio_of, shown_box
from xrai.labels import NO_FINDING, REVIEW, LabelSpec, folded
from xrai.learning import engine
from xrai.learning.batch import to_grey
from xrai.learning.explain import laid_over, layer_cam
from xrai.learning.network import num_products
from xrai.learning.predictor import MODEL_FILE, TrainedModel, load_model
from xrai.learning.tracing import Look, trace
from xrai.log import progress
from xrai.results.ensemble import disagreement, mean_outputs, mean_priors, scaled_logits
from xrai.results.prior import ESTIMATE, Prior, Wanted, estimate_prior, move_outputs, read_prior
from xrai.results.summary import stated_hash
from xrai.results.types import Output, call_logits, calls_of, needs_review, outputs_of, score_logits
from xrai.store import open_store

BATCH_SIZE: Final = 64

_NUM_READERS = 4  # at least: reading waits more than it works
_NUM_HEATS = 3  # of an image, at most
# Scorings after which a trace has saved about as much as it costs; see docs/decisions/0010-speed.md
_TRACED_AFTER = 50
# Multiplications an image, up to which one thread scores as fast as all others decode small files
_SMALL_NETWORK = 12_000_000

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
    model: str  # the run's id; of several runs, their ids joined by "+"
    # Calibrated, by class or finding; for two classes, that of the one that is looked for
    probabilities: Mapping[str, float] = field(default_factory=dict, hash=False)
    # The probability from which each is called; empty where the most probable class is called
    thresholds: Mapping[str, float] = field(default_factory=dict, hash=False)
    calls: tuple[str, ...] = ()  # the class or the findings of the decision; none in a review
    # The shares that the probabilities hold for, by class or finding; for two classes, that of the
    # one that is looked for. Empty unless a prior was asked for
    prior: Mapping[str, float] = field(default_factory=dict, hash=False)
    prior_source: str = ""  # given, or estimated from how many images
    # The largest difference between the probabilities of several runs; None for a single run
    disagreement: float | None = None

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
class Read:
    """What reading a file gave."""

    path: str
    # (size, size), what the networks see: one for each of `Pipeline.squares`
    own: tuple[Pixels, ...] | None = None
    shown: Pixels | None = None  # (side, side), the same for people
    reason: str = ""  # why there are no pixels
    size: tuple[int, int] | None = None  # (width, height) of the whole image, upright, pixels
    ratio: float = 1.0  # of its width to its height; known only where the runs' fits differ


class _Scores(NamedTuple):
    """What the runs say of n images."""

    probabilities: NDArray[np.float64]  # (n, C)
    called: NDArray[np.bool_]  # (n, C)
    atypicality: NDArray[np.float64]  # (n,)
    disagreement: Sequence[float | None]  # n; None of one run


class _Member:
    """A run of a pipeline, with its outputs in the order of the pipeline's."""

    def __init__(self, model: TrainedModel, labels: LabelSpec, device: torch.device) -> None:
        self._model = model
        self.outputs = outputs_of_run(model)
        self.square = (model.image_size, model.fit)
        self._columns = np.arange(1)
        if labels.task != "binary":
            places = [folded(name) for name in model.labels.classes]
            self._columns = np.array([places.index(folded(name)) for name in labels.classes])
        self._network = model.network.for_inference().to(device)
        self._typicality = model.typicality.to(device)
        self._device = device
        self._look: Look = functools.partial(self._typicality.atypicality, self._network)
        self._num_scorings = 0
        self.is_parallel = False  # see `Pipeline.is_parallel`
        self.outputs = tuple(self.outputs[column] for column in self._columns)
        self.priors = tuple(model.priors[column] for column in self._columns if model.priors)

    def score(self, images: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Calibrated logits (n, C) and atypicality (n,) of images (n, size, size)."""
        self._num_scorings += 1
        if self._num_scorings == _TRACED_AFTER and self._device.type == "cpu":
            self.trace()
        with torch.inference_mode():
            found = self._look(self._grey(images))
        logits, atypicality = (each.double().cpu().numpy() for each in found)
        return scaled_logits(self.outputs, logits[:, self._columns]), atypicality

    def trace(self) -> None:
        """See `Pipeline.trace`."""
        self._num_scorings = _TRACED_AFTER
        traced = trace(self._network, self._typicality, self._made_up())
        self._look = traced or self._look
        self.is_parallel = traced is not None and self._device.type == "cpu"

    def pack(self) -> bytes:
        """See `Pipeline.pack`."""
        return engine.pack(self._model)

    def look_by(self, graph: bytes) -> Look | None:
        """What scores by a graph; None where it gives other results."""
        return engine.run_graph(graph, self._network, self._typicality, self._made_up())

    def look_with(self, look: Look) -> None:
        """Score by a graph from now on."""
        self._num_scorings = _TRACED_AFTER
        self._look, self.is_parallel = look, True

    def _made_up(self) -> torch.Tensor:
        size = self.square[0]
        return self._grey(np.random.default_rng(0).integers(0, 256, (8, size, size), np.uint8))

    @property
    def is_on_cpu(self) -> bool:
        """Whether the network runs on a CPU."""
        return self._device.type == "cpu"

    @property
    def is_small(self) -> bool:
        """Whether the network takes at most `_SMALL_NETWORK` multiplications an image."""
        if sum(each.numel() for each in self._network.parameters()) > _SMALL_NETWORK:
            return False  # nearly all weights are used at least once
        blank = np.zeros((1, self.square[0], self.square[0]), np.uint8)
        return num_products(self._network, self._grey(blank)) <= _SMALL_NETWORK

    def explain(self, images: Pixels, outputs: int | NDArray[np.int64]) -> torch.Tensor:
        """Heat maps (n, size, size) in [0, 1], for one output or for one of each image, (n,)."""
        own = torch.from_numpy(np.broadcast_to(self._columns[outputs], len(images)).copy())
        return layer_cam(self._network, self._grey(images), own).float().cpu()

    def _grey(self, images: Pixels) -> torch.Tensor:
        dtype = next(self._network.parameters()).dtype
        grey = to_grey(images[:, None], self._device, dtype)  # (n, 1, size, size)
        return grey.contiguous(memory_format=torch.channels_last)


class Pipeline:
    """Trained models with all that turns files into rows. Made by `load_pipeline`.

    Of several models the calibrated logits are averaged; an image is for review if it is for any.
    """

    def __init__(
        self,
        model: TrainedModel,
        *more: TrainedModel,
        max_pixels: int | None = None,
        device: torch.device | None = None,
        prior: Wanted | None = None,
    ) -> None:
        models = (model, *more)
        refuse_other_labels(models)
        self.models = models
        self.model = model  # whose order of classes or findings all rows have
        self.max_pixels = max_pixels or min(each.images.max_pixels for each in models)
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._members = [_Member(each, model.labels, device) for each in models]
        # Size in pixels and fit of the preprocessed images, each once
        self.squares = tuple(dict.fromkeys(member.square for member in self._members))
        self.outputs = mean_outputs([member.outputs for member in self._members])
        self.priors = mean_priors(
            [member.priors for member in self._members],
            is_multiclass=model.labels.task == "multiclass",
        )
        self.is_small = all(member.is_small for member in self._members)
        # Threads of torch while files are scored; 0: as many as torch has
        self.num_threads = int(self.is_small)
        threshold = self.outputs[0].threshold if self._is_binary else None
        self.run_id = "+".join(each.run_id for each in models)
        self._blank = Prediction("", None, threshold, REVIEW, "", self.run_id)
        self._budget = MemoryBudget(num_cores())
        self._estimates = prior == ESTIMATE
        if prior is not None:
            for each in models:
                refuse_without_priors(each)
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
            yield from self.classify_read([self.read(first[0], explain_side)], explain_side)
            return
        rest = chain(first, rest)
        waiting: deque[Future[Read]] = deque()
        pool = ThreadPoolExecutor(max(_NUM_READERS, num_cores()))
        try:
            while True:
                for file in islice(rest, 2 * BATCH_SIZE - len(waiting)):
                    waiting.append(pool.submit(self.read, file, explain_side))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(BATCH_SIZE, len(waiting)))]
                yield from self.classify_read([found.result() for found in batch], explain_side)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing more is read

    def score(
        self, images: Pixels | Sequence[Pixels]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities and atypicality, (n,), of preprocessed images (n, size, size); of runs that
        differ in size or fit, one array for each of `squares`.

        Probabilities are (n, C) for C classes or findings, and (n,) for two classes: of the one
        that is looked for. The atypicality is the highest of the runs'.
        """
        found = self._score([images] if isinstance(images, np.ndarray) else images)
        probabilities = found.probabilities
        return probabilities[:, 0] if self._is_binary else probabilities, found.atypicality

    def trace(self) -> None:
        """From now on, score by a trace that runs without Python, where it gives the same: for a
        server, whose threads would otherwise wait for each other. On a CPU this happens by itself
        once much has been scored.
        """
        for member in self._members:
            member.trace()

    @property
    def is_on_cpu(self) -> bool:
        """Whether all networks run on a CPU."""
        return all(member.is_on_cpu for member in self._members)

    def pack(self) -> list[bytes]:
        """What `xrai.learning.engine` needs to write the graph of each run."""
        return [member.pack() for member in self._members]

    def use_graphs(self, graphs: Sequence[bytes]) -> bool:
        """From now on, score by these graphs, one for each run, if they give the same results; says
        whether they do. Other threads may be scoring meanwhile.
        """
        pairs = zip(self._members, graphs, strict=True)
        looks = [(member, member.look_by(graph)) for member, graph in pairs]
        if any(look is None for _, look in looks):
            return False
        for member, look in looks:
            assert look is not None
            member.look_with(look)
        return True

    @property
    def is_parallel(self) -> bool:
        """Whether several threads may call `classify_read` at once: all networks run on a CPU and
        without Python.
        """
        return all(member.is_parallel for member in self._members)

    def explain(
        self,
        images: Pixels | Sequence[Pixels],
        outputs: int | NDArray[np.int64] = 0,
        *,
        ratios: Sequence[float] = (),
    ) -> NDArray[np.float32]:
        """Heat maps (n, size, size) in [0, 1] of preprocessed images as `score` takes them, for one
        output or for one of each image, (n,): the mean of the runs', as the first run's squares
        show the images.

        `ratios` of width to height of the whole images, (n,), are needed where the runs' fits
        differ, because their squares then show different parts of an image. `xrai.learning.explain`
        says what the maps show.
        """
        given = [images] if isinstance(images, np.ndarray) else images
        assert ratios or not self.needs_ratios, "squares of several fits cannot be compared"
        (size, fit), maps = self._members[0].square, []
        for member in self._members:
            found = member.explain(given[self.squares.index(member.square)], outputs)
            if member.square[1] != fit:
                boxes, onto = (_boxes(ratios, fit=each) for each in (member.square[1], fit))
                found = laid_over(found, boxes, onto=onto, size=size)
            elif member.square[0] != size:
                found = functional.interpolate(found[:, None], (size, size), mode="bilinear")[:, 0]
            maps.append(found)
        heat: NDArray[np.float32] = torch.stack(maps).mean(dim=0).numpy()
        return heat

    @property
    def needs_ratios(self) -> bool:
        """Whether `explain` needs the ratios of width to height of the whole images."""
        return len({fit for _, fit in self.squares}) > 1

    def _score(self, images: Sequence[Pixels]) -> _Scores:
        found = [
            member.score(images[self.squares.index(member.square)]) for member in self._members
        ]
        logits, atypicality = (np.stack(each) for each in zip(*found, strict=True))
        mean = logits.mean(axis=0)  # (n, C)
        apart: Sequence[float | None] = [None] * len(mean)
        if len(found) > 1:
            of_each = np.stack([score_logits(self.outputs, own) for own in logits])
            apart = disagreement(of_each).tolist()
        called = call_logits(self.outputs, mean)
        probabilities = score_logits(self.outputs, mean)
        return _Scores(probabilities, called, atypicality.max(axis=0), apart)

    def _move(self, prior: Prior) -> None:
        self.outputs = move_outputs(self.outputs, self.priors, prior)
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
        found._move(estimate_prior(self.outputs, self.priors, np.array(scores)))
        return found

    @property
    def _is_binary(self) -> bool:
        return self.model.labels.task == "binary"

    def read(self, file: File, explain_side: int | None = None) -> Read:
        """Read and decode a file, as `classify` does. Several threads may do so at once."""
        to_square = functools.partial(
            decode_sized, max_pixels=self.max_pixels, hold=self._budget.hold
        )
        try:
            data = file.read()
            found = [to_square(data, size=size, fit=fit) for size, fit in self.squares]
            side, fit = explain_side, self.model.fit
            shown = None if side is None else to_square(data, size=side, fit=fit)[0]
            ratio = 1.0 if side is None or not self.needs_ratios else ratio_of(data)
            own = tuple(pixels for pixels, _ in found)
            return Read(file.path, own, shown, size=found[0][1], ratio=ratio)
        except ImageError as error:
            return Read(file.path, reason=str(error))

    def classify_read(
        self, batch: Sequence[Read], explain_side: int | None = None
    ) -> Iterator[Explained]:
        """One row for each file that `read` gave, in order. One thread at a time, unless
        `is_parallel`.
        """
        found = [read.own for read in batch if read.own is not None]
        scored: Iterator[tuple[Prediction, Heats]] = iter(())
        if found:
            images = [np.stack(each) for each in zip(*found, strict=True)]  # (n, size, size) each
            ratios = [read.ratio for read in batch if read.own is not None]
            heats: list[Heats] = [{} for _ in found]
            with _threads(self.num_threads):
                scores = self._score(images)
                if explain_side is not None:
                    heats = self._explain(images, ratios, scores)
            scored = zip(map(self._row, *scores), heats, strict=True)
        for read in batch:
            if read.own is None:
                yield Explained(replace(self._blank, path=read.path, reason=read.reason))
            else:
                row, heat = next(scored)
                yield Explained(replace(row, path=read.path), read.shown, heat)

    def _row(
        self,
        probabilities: NDArray[np.float64],
        called: NDArray[np.bool_],
        atypicality: float,
        apart: float | None = None,
    ) -> Prediction:
        """The row, still without a path, of an image with these scores, (C,) each."""
        names = [output.name for output in self.outputs]
        limits = {o.name: o.threshold for o in self.outputs if o.threshold is not None}
        row = replace(
            self._blank,
            probability=float(probabilities[0]) if self._is_binary else None,
            probabilities=dict(zip(names, probabilities.tolist(), strict=True)),
            thresholds=limits,
            disagreement=apart,
        )
        if needs_review(atypicality):
            reason = (
                f"does not look like the training images: atypicality {atypicality:.2f}, above the "
                "limit of 1"
            )
            return replace(row, reason=reason)
        calls = calls_of(self.outputs, called)
        return replace(row, decision="|".join(calls) or NO_FINDING, calls=calls)

    def _explain(
        self, images: Sequence[Pixels], ratios: Sequence[float], scores: _Scores
    ) -> list[Heats]:
        """The heat maps of each image that `Explained` has."""
        # what is called first, then by probability
        ranked = np.argsort(-(scores.called + scores.probabilities), axis=1, kind="stable")
        num_maps = scores.called.sum(axis=1).clip(1, _NUM_HEATS)  # (n,)
        heats: list[Heats] = [{} for _ in num_maps]
        for place in range(num_maps.max()):
            rows = np.flatnonzero(num_maps > place)
            outputs = ranked[rows, place]
            own = [ratios[row] for row in rows.tolist()]
            maps = self.explain([each[rows] for each in images], outputs, ratios=own)
            for row, output, heat in zip(rows, outputs, maps, strict=True):
                heats[row] = {**heats[row], self.outputs[output].name: heat}
        return heats


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let the calling thread's operations of torch use so many threads; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _boxes(ratios: Sequence[float], *, fit: str) -> torch.Tensor:
    """What the squares of images show of them, (n, 4) float64."""
    return torch.tensor([shown_box(ratio, fit=fit) for ratio in ratios], dtype=torch.float64)


def load_pipeline(
    run: str, *more: str, max_pixels: int | None = None, prior: Wanted | None = None
) -> Pipeline:
    """The pipeline of the finished runs at these addresses; `xrai.load` says more."""
    return Pipeline(open_run(run), *map(open_run, more), max_pixels=max_pixels, prior=prior)


def refuse_other_labels(models: Sequence[TrainedModel]) -> None:
    """Raise `RunError` where a run looks for others than the first; order and case do not matter,
    except for two classes, of which the second is looked for.
    """
    first = models[0]
    for model in models[1:]:
        if not first.labels.reads(model.labels):
            raise RunError(
                f"run {first.run_id} was trained on {first.labels}, run {model.run_id} on "
                f"{model.labels}: only runs of the same names can predict together"
            )


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
