"""The runs that a server scores films with: their models, and what their summaries say of them."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from xrai.errors import RunError, UserError
from xrai.ingest.find import File
from xrai.labels import Task
from xrai.learning.predictor import MODEL_FILE
from xrai.pipeline import Pipeline, load_pipeline
from xrai.results.folder import SUMMARY
from xrai.results.prior import ESTIMATE, Wanted
from xrai.results.summary import MainResults, Summary, read_summary, stated_hash
from xrai.results.types import Output
from xrai.store import open_store

_NUM_WARMING = 3  # films that are scored before the first one that counts


@dataclass(frozen=True)
class OutputCard:
    """What is known of a class or finding; None where nothing is."""

    name: str
    threshold: float | None  # None where the class of the highest probability is called
    sensitivity: float | None = None
    specificity: float | None = None
    auroc: float | None = None
    intervals: Mapping[str, Sequence[float | None]] = field(default_factory=dict, hash=False)
    prevalence: float | None = None  # in the images that these figures are of
    prior: float | None = None  # the share that probabilities hold for, where a prior was given


@dataclass(frozen=True)
class Card:
    """What is known of models: what they look for and, of a single run with a summary, how well
    they do on images held out.
    """

    run: str
    task: Task
    size: tuple[int, ...]  # side of the square images that the networks see, pixels
    outputs: tuple[OutputCard, ...]
    trained_on: str | None = None
    split: str | None = None  # of the images held out
    num_images: int | None = None
    num_patients: int | None = None
    is_phantom: bool | None = None


@dataclass(frozen=True)
class Models:
    """Models that were loaded, checked and tried, and what is said of them."""

    pipeline: Pipeline
    summaries: Mapping[str, Summary]  # by run id; of runs that have one
    hashes: tuple[str, ...]  # SHA-256 of the model.pt of each run that states it

    def card(self) -> Card:
        """The card of these models."""
        pipeline = self.pipeline
        outputs = pipeline.outputs
        card = Card(
            pipeline.run_id,
            pipeline.model.labels.task,
            tuple(size for size, _ in pipeline.squares),
            tuple(
                OutputCard(output.name, output.threshold, prior=_prior(output))
                for output in outputs
            ),
        )
        summary = next(iter(self.summaries.values()), None) if len(pipeline.models) == 1 else None
        if summary is None:
            return card
        main = summary.main
        return replace(
            card,
            outputs=tuple(_measured(output, main, number) for number, output in enumerate(outputs)),
            trained_on=summary.training.trained_on.source,
            split=main.split,
            num_images=main.num_images,
            num_patients=main.num_patients if main.has_patients else None,
            is_phantom=main.is_phantom,
        )


def load_models(runs: Sequence[str], *, prior: Wanted | None = None) -> Models:
    """The models of finished runs, tried on made-up films.

    Raises `UserError` where there is none, `RunError` or `CorruptError` where one is damaged.
    """
    if prior == ESTIMATE:
        raise UserError(
            "--prior = estimate needs all films at once, which a server does not have: give shares"
        )
    stated = (stated_hash(open_store(run), MODEL_FILE) for run in runs)
    hashes = tuple(filter(None, stated))
    pipeline = load_pipeline(*runs, prior=prior)
    pipeline.trace()
    summaries = {}
    for run, model in zip(runs, pipeline.models, strict=True):
        store = open_store(run)
        if store.size(SUMMARY) is not None:
            where = f"{run}/{SUMMARY}"
            summaries[model.run_id] = read_summary(store.read(SUMMARY), where=where)
    grey = np.random.default_rng(0).integers(0, 256, (_NUM_WARMING, 512, 512), np.uint8)
    files = [File("made up", functools.partial(np.asarray, film)) for film in grey]
    if not all(found.prediction.is_readable for found in pipeline.classify(files)):
        raise RunError(f"run {pipeline.run_id} scores no film")
    return Models(pipeline, summaries, hashes)


def _measured(output: Output, main: MainResults, number: int) -> OutputCard:
    found = main.outputs[number] if main.outputs else main
    counts = main.outputs[number] if main.outputs else main.counts
    num_known = None if counts.num_negative is None else counts.num_positive + counts.num_negative
    if num_known is None and main.task == "multiclass":
        num_known = main.num_images
    return OutputCard(
        output.name,
        output.threshold,
        sensitivity=found.sensitivity,
        specificity=found.specificity,
        auroc=found.auroc,
        intervals={name: ends for name, ends in found.intervals.items() if name != "accuracy"},
        prevalence=counts.num_positive / num_known if num_known else None,
        prior=_prior(output),
    )


def _prior(output: Output) -> float | None:
    return None if output.moved is None else output.moved.share
