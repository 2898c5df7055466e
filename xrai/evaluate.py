"""Measure a finished run on any split of any data set: `python -m xrai.evaluate --run URI/ID
--dataset URI`.

Threshold, temperature and the limit of review are the run's own, chosen on its validation images;
only the two baselines are fitted here, to the data set's own training split. One process; the
results of each split go into the run's folder below evaluate/, the same files as training writes.
"""

import hashlib
import json
import operator
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch

from xrai.command import PRIOR, RUN, Flag, parse, run_command
from xrai.config import Config, Images, load_yaml
from xrai.dataset.loader import Loader, open_split
from xrai.errors import DatasetError, RunError, UserError
from xrai.labels import folded
from xrai.learning.distributed import join
from xrai.learning.predictor import Predictions, TrainedModel, predict_split
from xrai.log import get_logger, setup_logging
from xrai.measuring import Measuring, describe_dataset, read_looks
from xrai.pipeline import open_run, other_pixels, outputs_of_run, refuse_without_priors
from xrai.results.folder import SUMMARY, RunFolder
from xrai.results.prior import ESTIMATE, Prior, estimate_prior, move_outputs, read_prior
from xrai.results.report import Page, render_report
from xrai.results.summary import main_results, read_summary, result_lines
from xrai.results.types import Output, SplitResults, needs_review, score_logits, with_shares
from xrai.store import LEASE_KEY, take_lease
from xrai.tables import from_plain, load_json

FLAGS = (
    RUN,
    Flag("dataset", "data/dataset", "the data set: a folder or s3://bucket/prefix", "XRAI_DATASET"),
    PRIOR,
    Flag("split", "test", "the splits to measure, separated by commas: test, val or train"),
)
_logger = get_logger("xrai.evaluate")


def main() -> None:
    """Read the command line, score each split, write and print the results."""
    parsed = parse("evaluate", description="Measure a run on a data set.", flags=FLAGS)
    config, flags, _ = parsed
    setup_logging()
    artifacts, _, run_id = parsed.run.rpartition("/")
    dataset = flags["dataset"]
    loaders = [open_split(config, dataset, split) for split in parse_splits(flags["split"])]
    model = open_run(parsed.run)
    refuse_other_pixels(model, loaders[0])
    outputs, wanted = with_shares(outputs_of_run(model), model.priors), flags["prior"]
    if wanted:
        refuse_without_priors(model)
    given = read_prior(wanted, outputs) if wanted not in ("", ESTIMATE) else None
    run = RunFolder(artifacts or ".", run_id)
    suffix = prior_suffix(given) if wanted else ""
    folders = [f"evaluate/{one.split}-{one.index.fingerprint[:12]}{suffix}" for one in loaders]
    with closing(run), ExitStack() as leases:
        for folder in folders:  # other splits and data sets may be measured at the same time
            leases.enter_context(take_lease(run.store, f"{folder}/{LEASE_KEY}"))
        scored = score(model, loaders, config)
        run.attach()
        has_train = "train" in loaders[0].index.splits
        known = read_looks(open_split(config, dataset, "train")) if has_train else None
        num_bootstrap = config.evaluate.num_bootstrap
        measuring = Measuring(run, model.network, model.labels, outputs, num_bootstrap, known)
        config = config.shaped_by(loaders[0].index.config)
        for folder, loader, predictions in zip(folders, loaders, scored, strict=True):
            run.write_text(f"{folder}/config.yaml", config.to_yaml("preprocess", "evaluate"))
            prior = given or (find_prior(model, outputs, predictions) if wanted else None)
            at_prior = move_outputs(outputs, model.priors, prior) if prior else outputs
            measured = replace(measuring, outputs=at_prior)
            results = measured.record(loader, predictions, folder=folder)
            write_report(run, folder, results, loader, dataset=dataset)
            lines = result_lines(main_results(results), f"{run.address}/{folder}")
            if prior:
                lines.insert(1, f"prior       {prior}; it changes no call")
            print("\n".join(lines), flush=True)
        run.flush_or_raise()


def parse_splits(text: str) -> list[str]:
    """The splits that `--split` names, each once, in their order."""
    splits = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not splits:
        raise UserError(
            f"--split = {text!r} names no split: it takes test, val or train, separated by commas"
        )
    return splits


def prior_suffix(given: Prior | None) -> str:
    """What the names of folders end in: another one for each prior, that of the same shares for the
    same ones in another order; None is an estimated prior.
    """
    if given is None:
        return f"-prior-{ESTIMATE}"
    shares = json.dumps(given.shares, sort_keys=True)
    return f"-prior-{hashlib.sha256(shares.encode()).hexdigest()[:8]}"


def refuse_other_pixels(model: TrainedModel, loader: Loader) -> None:
    """Raise `DatasetError` where the images were not made as the model's training images were."""
    for key, stored, own in other_pixels(model, Images(**loader.index.config["images"])):
        raise DatasetError(
            f"run {model.run_id} was trained on images with images.{key} = {own!r}, this data "
            f"set has {stored!r}: preprocess the source with --images.{key}={own}"
        )
    own, found = model.labels, loader.index.labels
    if own.reads(found):
        return
    text = f"run {model.run_id} was trained on {own}, this data set has {found}"
    names = {folded(name) for name in found.classes}
    if lacking := [name for name in own.classes if folded(name) not in names]:
        raise DatasetError(f"{text}: it lacks {', '.join(lacking)}")
    raise DatasetError(
        f"{text}: preprocess its source with --labels.names='{'|'.join(own.classes)}'"
    )


def score(model: TrainedModel, loaders: list[Loader], config: Config) -> list[Predictions]:
    """The predictions of a model for each split."""
    with join(timeout_s=config.train.timeout_s) as ranks:
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        network = model.network.to(ranks.device)
        typicality = model.typicality.to(ranks.device)
        return [
            predict_split(network, loader, ranks=ranks, typicality=typicality) for loader in loaders
        ]


def find_prior(model: TrainedModel, outputs: tuple[Output, ...], predictions: Predictions) -> Prior:
    """The prior of a split, estimated without its labels from the images that are not for review.

    Raises `UserError` where these are too few.
    """
    logits = predictions.logits[0]
    if predictions.atypicality is not None:
        logits = logits[~needs_review(predictions.atypicality[0])]
    return estimate_prior(outputs, model.priors, score_logits(outputs, logits))


def read_facts(run: RunFolder) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The config and the environment of a run, with what its report shows of them."""
    try:
        config = load_yaml(run.store.read("config.yaml"), where=f"{run.address}/config.yaml")
        config = from_plain(Mapping[str, Mapping[str, Any]], config, "config")
        environment = from_plain(
            Mapping[str, Any], load_json(run.store.read("environment.json")), "environment"
        )
        packages = from_plain(Mapping[str, str], environment["packages"], "packages")
        for values, keys in (
            (config["model"], ("name", "width")),
            (config["train"], ("seed",)),
            (environment, ("processor", "num_cores", "memory_gib", "python")),
        ):
            operator.itemgetter(*keys)(values)
    except (ValueError, LookupError) as error:
        raise RunError(
            f"config.yaml and environment.json of {run.address} are not those of a run: {error!r}"
        ) from error
    return config, environment | {"packages": packages}


def write_report(
    run: RunFolder, folder: str, results: SplitResults, loader: Loader, *, dataset: str
) -> None:
    """Write report.html next to these results; facts of the training come from the run's files."""
    if run.store.size(SUMMARY) is None:
        _logger.warning(
            "run %s has no %s, so its training has not ended: no report is written",
            run.address,
            SUMMARY,
        )
        return
    summary = read_summary(run.store.read(SUMMARY), where=f"{run.address}/{SUMMARY}")
    config, environment = read_facts(run)
    page = Page(
        results,
        summary.training,
        describe_dataset(dataset, loader.index),
        config=config,
        environment=environment,
        is_evaluation=True,
    )
    run.write_text(f"{folder}/report.html", render_report(page, run.path / folder))


if __name__ == "__main__":
    run_command(main)
