"""The runs that a server scores films with: their models, and what their summaries say of them."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xrai.errors import RunError, UserError
from xrai.ingest.find import File
from xrai.learning.predictor import MODEL_FILE
from xrai.pipeline import Pipeline, load_pipeline
from xrai.results.folder import SUMMARY
from xrai.results.prior import ESTIMATE, Wanted
from xrai.results.summary import Summary, read_summary, stated_hash
from xrai.store import open_store

_NUM_WARMING = 3  # films that are scored before the first one that counts


@dataclass(frozen=True)
class Models:
    """Models that were loaded, checked and tried, and what is said of them."""

    pipeline: Pipeline
    summaries: Mapping[str, Summary]  # by run id; of runs that have one
    hashes: tuple[str, ...]  # SHA-256 of the model.pt of each run that states it

    def card(self) -> dict[str, object]:
        """What `GET /v1/model` says: outputs with threshold and, of a single run, how well they do
        on images held out.
        """
        pipeline = self.pipeline
        summary = next(iter(self.summaries.values()), None) if len(pipeline.models) == 1 else None
        main = summary.main if summary else None
        return {
            "run": pipeline.run_id,
            "task": pipeline.model.labels.task,
            "size": [size for size, _ in pipeline.squares],
            "trained_on": summary.training.trained_on.source if summary else None,
            "split": main.split if main else None,
            "num_images": main.num_images if main else None,
            "num_patients": main.num_patients if main else None,
            "is_phantom": main.is_phantom if main else None,
            "outputs": [
                {"name": output.name, "threshold": output.threshold, **_figures(summary, number)}
                for number, output in enumerate(pipeline.outputs)
            ],
        }


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


def _figures(summary: Summary | None, number: int) -> dict[str, object]:
    if summary is None:
        return {"sensitivity": None, "specificity": None, "auroc": None, "intervals": {}}
    main = summary.main
    found = main.outputs[number] if main.outputs else main
    counts = main.counts
    num_positive = main.outputs[number].num_positive if main.outputs else counts.num_positive
    return {
        "sensitivity": found.sensitivity,
        "specificity": found.specificity,
        "auroc": found.auroc,
        "intervals": {
            name: list(ends) for name, ends in found.intervals.items() if name != "accuracy"
        },
        "prevalence": num_positive / main.num_images if main.num_images else None,
    }
