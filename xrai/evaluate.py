"""Measure a finished run on a split of any data set: `python -m xrai.evaluate --run URI/ID --dataset URI`.

The threshold is the run's own, chosen on its validation images; nothing is fitted here. One process; the results go
into the run's folder under evaluate/, and the lines printed are those of training.
"""

import tempfile
from pathlib import Path

import torch

from xrai import config as configuration
from xrai.config import Flag
from xrai.dataset.loader import Loader
from xrai.errors import DatasetError, UserError, run_command
from xrai.learning.distributed import join
from xrai.learning.predictor import TrainedModel, load_model, predict_split
from xrai.log import setup_logging
from xrai.results.artifacts import RunFolder, format_metrics_lines
from xrai.results.record import record_scores
from xrai.store import open_store

FLAGS = (
    Flag("run", "", "the finished run, URI/ID: a folder or s3://bucket/prefix/ID"),
    Flag("dataset", "data/dataset", "the data set: a folder or s3://bucket/prefix", "XRAI_DATASET"),
    Flag("split", "test", "the split to measure: test, val or train"),
)


def main() -> None:
    """Read the command line, score the split, write and print the results."""
    config, flags = configuration.parse("evaluate", description="Measure a run on a data set.", flags=FLAGS)
    setup_logging()
    artifacts, _, run_id = flags["run"].rstrip("/").rpartition("/")
    if not run_id:
        raise UserError("--run is missing: give the address of a finished run, such as submit/20261123-031500-a1b2c3")
    loader = Loader(
        flags["dataset"], split=flags["split"], batch_size=config.evaluate.batch_size,
        cache_dir=config.cache.dir or None, cache_max_gib=config.cache.max_gib,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, join(timeout_s=config.train.timeout_s) as ranks:
        model = load_model(open_store(flags["run"]), folder=Path(folder))
        refuse_other_pixels(model, loader)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        network = model.network.to(ranks.device)
        predictions = predict_split(network, loader, ranks=ranks)
    run = RunFolder(artifacts or ".", run_id)
    folder_name = f"evaluate/{flags['split']}-{loader.index.fingerprint[:12]}"
    is_phantom = all(Path(source).name.startswith("phantom-") for source in loader.source)
    try:
        run.attach()
        run.write_text(f"{folder_name}/config.yaml", config.to_yaml())
        metrics = record_scores(
            run,
            split=flags["split"],
            labels=loader.labels,
            scores=predictions.probabilities[0],
            sources=loader.source.tolist(),
            patients=loader.patient.tolist(),
            subtypes=loader.subtype.tolist(),
            threshold=model.threshold,
            threshold_source="that of the run",
            classes=model.classes,
            num_bootstrap=config.evaluate.num_bootstrap,
            is_phantom=is_phantom,
            folder=folder_name,
        )
        run.flush_or_raise()
    finally:
        run.close()
    print("\n".join(format_metrics_lines(metrics, f"{run.address}/{folder_name}", is_phantom=is_phantom)))


def refuse_other_pixels(model: TrainedModel, loader: Loader) -> None:
    """Raise `DatasetError` where the data set's pictures were not made as the model's training pictures were."""
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


if __name__ == "__main__":
    run_command(main)
