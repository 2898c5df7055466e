"""Measure a finished run on any split of any data set: `python -m xrai.evaluate --run URI/ID
--dataset URI`.

The threshold, the temperature and the limit of review are the run's own, chosen on its validation
images; nothing is fitted here but the two baselines, to the data set's own training split. One
process; the results of each split go into the run's folder under evaluate/, the same files as
training writes, and the lines printed are those of training.
"""

import json
from typing import Any

import torch
import yaml

import xrai
from xrai import config as configuration
from xrai.config import Flag
from xrai.dataset.loader import Loader, open_split
from xrai.errors import DatasetError, UserError, run_command
from xrai.learning.distributed import join
from xrai.learning.predictor import TrainedModel, load_model, predict_split
from xrai.log import get_logger, setup_logging
from xrai.results.baselines import MAX_TRAIN
from xrai.results.folder import SUMMARY, RunFolder
from xrai.results.report import render_report
from xrai.results.summary import format_metrics_lines
from xrai.run import describe_dataset, is_phantom, read_looks, record_split
from xrai.store import open_store

FLAGS = (
    Flag("run", "", "the finished run, URI/ID: a folder or s3://bucket/prefix/ID"),
    Flag("dataset", "data/dataset", "the data set: a folder or s3://bucket/prefix", "XRAI_DATASET"),
    Flag("split", "test", "the splits to measure, with commas between: test, val or train"),
)
_logger = get_logger("xrai.evaluate")


def main() -> None:
    """Read the command line, score each split, write and print the results."""
    config, flags = configuration.parse(
        "evaluate", description="Measure a run on a data set.", flags=FLAGS
    )
    setup_logging()
    artifacts, _, run_id = flags["run"].rstrip("/").rpartition("/")
    if not run_id:
        raise UserError(
            "--run is missing: give the address of a finished run, such as submit/20261123-031500-a1b2c3"
        )
    loaders = [
        open_split(config, flags["dataset"], split) for split in parse_splits(flags["split"])
    ]
    with join(timeout_s=config.train.timeout_s) as ranks:
        model = load_model(open_store(flags["run"]))
        refuse_other_pixels(model, loaders[0])
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        network = model.network.to(ranks.device)
        typicality = model.typicality.to(ranks.device)
        scored = [
            predict_split(network, loader, ranks=ranks, typicality=typicality) for loader in loaders
        ]
    index = loaders[0].index
    known = None
    if "train" in index.splits:
        known = read_looks(open_split(config, flags["dataset"], "train"), limit=MAX_TRAIN)
    run = RunFolder(artifacts or ".", run_id)
    try:
        run.attach()
        for loader, predictions in zip(loaders, scored, strict=True):
            folder_name = f"evaluate/{loader.split}-{index.fingerprint[:12]}"
            run.write_text(f"{folder_name}/config.yaml", config.to_yaml())
            metrics = record_split(
                run,
                loader,
                network,
                predictions,
                temperature=model.temperature,
                threshold=model.threshold,
                threshold_source="that of the run",
                num_bootstrap=config.evaluate.num_bootstrap,
                known=known,
                folder=folder_name,
            )
            write_report(run, folder_name, metrics, loader, dataset=flags["dataset"])
            lines = format_metrics_lines(
                metrics, f"{run.address}/{folder_name}", is_phantom=is_phantom(loader)
            )
            print("\n".join(lines), flush=True)
        run.flush_or_raise()
    finally:
        run.close()


def parse_splits(text: str) -> list[str]:
    """The splits that `--split` names, each once, in their order."""
    splits = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not splits:
        raise UserError(
            f"--split = {text!r} names no split: it takes test, val or train, with commas between"
        )
    return splits


def refuse_other_pixels(model: TrainedModel, loader: Loader) -> None:
    """Raise `DatasetError` where the data set's pictures were not made as the model's training
    pictures were.
    """
    stored = loader.index.config["images"]
    for key, own in (("size", model.image_size), ("fit", model.fit)):
        if stored[key] != own:
            raise DatasetError(
                f"run {model.run_id} was trained on pictures with images.{key} = {own!r}, this data set has "
                f"{stored[key]!r}: preprocess the source with --images.{key}={own}"
            )
    if tuple(loader.index.classes) != model.classes:
        raise DatasetError(
            f"run {model.run_id} knows the classes {', '.join(model.classes)}, this data set has "
            f"{', '.join(loader.index.classes)}"
        )


def write_report(
    run: RunFolder, folder: str, metrics: dict[str, Any], loader: Loader, *, dataset: str
) -> None:
    """Write report.html about these results beside them; it takes the training's facts from the
    run's own files.
    """
    if run.store.size(SUMMARY) is None:
        _logger.warning(
            "run %s holds no %s, its training has not ended: no report is written",
            run.address,
            SUMMARY,
        )
        return
    page = render_report(
        run.path / folder,
        metrics=metrics,
        summary=json.loads(run.store.read(SUMMARY)),
        history=[],
        dataset=describe_dataset(dataset, loader.index, is_phantom=is_phantom(loader)),
        config=yaml.safe_load(run.store.read("config.yaml")),
        environment=json.loads(run.store.read("environment.json")),
        version=xrai.__version__,
        is_evaluation=True,
    )
    run.write_text(f"{folder}/report.html", page)


if __name__ == "__main__":
    run_command(main)
