"""Train a network: `torchrun --nproc_per_node=N -m xrai.train`, or `python -m xrai.train` for one process.

All ranks open the data set and run the loop; rank 0 alone owns the run's folder. A run of a name that exists goes on
from its newest checkpoint. In the end the best epoch's weights are measured on images that they have not seen.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import xrai
from xrai import config as configuration
from xrai.config import Config, Flag, Images
from xrai.dataset.loader import Loader
from xrai.dataset.manifest import read_manifest
from xrai.dataset.shards import DatasetIndex
from xrai.errors import ConfigError, DatasetError, RunError, UserError, run_command
from xrai.learning.checkpoint import CheckpointFolder, refuse_other_run
from xrai.learning.distributed import Ranks, join, record_failures
from xrai.learning.loop import (
    EpochResult,
    explaining_memory,
    fit,
    profile_steps,
    rank_batch_size,
    resolve_precision,
)
from xrai.learning.predictor import (
    MODEL_FILE,
    Predictions,
    build_model,
    load_model,
    predict_split,
    save_model,
)
from xrai.log import get_logger, setup_logging
from xrai.results.artifacts import (
    SUMMARY,
    RunFolder,
    describe_environment,
    format_result_lines,
    make_summary,
    new_run_id,
)
from xrai.results.metrics import auroc, choose_threshold, format_value
from xrai.results.plots import draw_curves
from xrai.results.record import record_scores
from xrai.results.report import DatasetFacts, render_report
from xrai.store import open_store

FLAGS = (
    Flag("dataset", "data/dataset", "the data set: a folder or s3://bucket/prefix", "XRAI_DATASET"),
    Flag("artifacts", "submit", "where runs are kept: a folder or s3://bucket/prefix", "XRAI_ARTIFACTS"),
    Flag("run_id", "", "name of the run; default: the time and a short hash", "XRAI_RUN_ID"),
    Flag(
        "resume", "auto", "auto: go on with a run of this name; must: refuse if there is none; never: if there is one"
    ),
    Flag("init_from", "", "take the first weights, and nothing else, from the finished run at this address, URI/ID"),
    Flag("check", False, "check config, data, devices, disk and permissions, and stop before training", type=bool),
)
_FLUSH_TIMEOUT_S = 20.0  # for the last uploads of a run that was asked to stop
_logger = get_logger("xrai.train")


def main() -> None:
    """Read the command line, join the job, and do this rank's part of it."""
    config, flags = configuration.parse("train", description="Train a network on a data set.", flags=FLAGS)
    if flags["resume"] not in ("auto", "must", "never"):
        raise ConfigError(f"--resume = {flags['resume']!r} is not allowed: it takes auto, must or never")
    profile_steps(config.train.profile)
    setup_logging(rank=int(os.environ.get("RANK", "0")))
    stop = StopRequest()
    with join(timeout_s=config.train.timeout_s) as ranks:
        torch.set_num_threads(config.train.threads or max(1, num_cores() // ranks.local_world_size))
        with ranks.explaining(), explaining_memory(config.train, world_size=ranks.world_size):
            train(config, flags, ranks=ranks, asked_to_stop=stop.is_set)


def train(config: Config, flags: dict[str, Any], *, ranks: Ranks, asked_to_stop: Callable[[], bool]) -> None:
    """One rank's part of the job, from the addresses to the last file. Raises `UserError` before any work."""
    began = time.monotonic()
    loaders = open_loaders(config, flags["dataset"], ranks=ranks)
    index = loaders["train"].index
    config = fit_to_dataset(config, index, ranks=ranks)
    ranks.on_main(lambda: RunFolder.check_writable(flags["artifacts"]))
    if flags["check"]:
        ranks.on_main(lambda: check_disk(config, index, flags))
        _logger.info("all checks passed: %s", describe(config, index, ranks=ranks))
        return

    run_id = flags["run_id"] or ranks.from_main(new_run_id(datetime.now(UTC)))
    run = RunFolder(flags["artifacts"], run_id) if ranks.is_main else None
    try:
        if ranks.on_main(lambda: is_finished(run, resume=flags["resume"])):
            return
        job = Job(config, flags["dataset"], run, loaders, ranks=ranks)
        resumed = ranks.on_main(lambda: job.open(resume=flags["resume"]))
        torch.manual_seed(config.train.seed)
        network = build_model(config.model)
        if flags["init_from"] and resumed is None:
            network.load_state_dict(ranks.on_main(lambda: first_weights(flags["init_from"], config)))
        _logger.info("run %s: %s", run_id, describe(config, index, ranks=ranks))
        fit(
            network,
            config,
            ranks=ranks,
            train=loaders["train"],
            val=loaders["val"],
            class_counts=class_counts(index),
            val_labels=loaders["val"].labels,
            name_of=lambda row: str(loaders["train"].source[row]),
            observer=job if ranks.is_main else None,
            checkpoints=job.checkpoints,
            facts=facts_of(config, index),
            resumed=resumed,
            asked_to_stop=asked_to_stop,
            profile_path=run.path / "profile.json" if run is not None else None,
        )
        best_epoch, weights = ranks.on_main(job.best)
        network = build_model(config.model)
        network.load_state_dict(weights)
        network.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        scored = {
            split: predict_split(network, loader, ranks=ranks) for split, loader in loaders.items() if split != "train"
        }
        shifted = predict_split(
            network, loaders["val"], ranks=ranks, shift=config.augment, draws=config.evaluate.shift_draws
        )
        if run is not None:
            lines = job.conclude(network, scored, shifted, best_epoch=best_epoch, began=began)
            print("\n".join(lines), flush=True)
    finally:
        if run is not None:
            run.flush(timeout_s=_FLUSH_TIMEOUT_S)
            run.close()


class Job:
    """The run's folder and all that is written into it, on rank 0; an empty shell on the others."""

    def __init__(
        self, config: Config, dataset: str, run: RunFolder | None, loaders: dict[str, Loader], *, ranks: Ranks
    ) -> None:
        self.config, self.loaders, self.ranks = config, loaders, ranks
        self.index: DatasetIndex = loaders["train"].index
        self._dataset = dataset
        self.checkpoints: CheckpointFolder | None = None
        self._run = run
        if run is not None:
            self.checkpoints = CheckpointFolder(
                run.path, store=run.store, publish=run.publish, remove=run.remove,
                keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best,
            )  # fmt: skip

    @property
    def run(self) -> RunFolder:
        """The folder; rank 0's alone."""
        assert self._run is not None, "rank 0 alone writes"
        return self._run

    def open(self, *, resume: str) -> dict[str, Any] | None:
        """Open the folder and return the newest checkpoint's state, or None to start anew."""
        assert self.checkpoints is not None
        existed = self.run.exists()
        if resume == "never" and existed:
            raise RunError(f"run {self.run.address} exists and --resume is never: give another --run_id, or none")
        found = self.checkpoints.newest()
        if found is None and resume == "must":
            raise RunError(
                f"{self.run.address} holds no checkpoint and --resume is must: look at --run_id, or use auto"
            )
        if found is not None:
            refuse_other_run(found[1]["facts"], facts_of(self.config, self.index), name=found[0].file)
        self.run.open()
        self.run.write_config(self.config.to_yaml())
        self.run.write_environment(self._environment())
        if found is None:
            self.run.resume_at(epoch=0, step=0)
            self.run.add_hyperparameters(self.config.to_mapping())
            return None
        entry, state = found
        self.run.resume_at(epoch=entry.epoch + 1, step=entry.step + 1)  # the first that are not done
        self.run.add_hyperparameters(self.config.to_mapping())
        _logger.info("going on after step %d, in epoch %d", entry.step, entry.epoch + 1)
        return state

    def after_epoch(self, result: EpochResult) -> float:
        """Show an epoch's results; its score is the AUROC on augmented validation images, which tracks other hospitals.

        Where that is undefined (one class alone) the score is the negative validation loss.
        """
        labels = self.loaders["val"].labels
        shifted_labels = np.tile(labels, len(result.shifted.logits))
        shifted_auroc = auroc(shifted_labels, result.shifted.logits.ravel())
        seconds = result.seconds
        row = {
            "epoch": result.epoch + 1, "step": result.step, "train_loss": result.train_loss,
            "train_accuracy": result.train_accuracy, "val_loss": result.val_loss,
            "val_accuracy": float(np.mean((result.val.logits[0] > 0) == labels)),
            "val_auroc": auroc(labels, result.val.logits[0]),
            "shifted_accuracy": float(np.mean((result.shifted.logits.ravel() > 0) == shifted_labels)),
            "shifted_auroc": shifted_auroc,
            "lr": result.learning_rate, "grad_norm": result.grad_norm, "images_per_s": result.images_per_s,
            "data_wait_share": result.data_wait_share,
            # compute time over total time, as MLPerf Storage defines it; of the training part of the epoch
            "accelerator_utilisation": seconds["compute"] / seconds["epoch"], "peak_memory_mib": result.peak_memory_mib,
            **{f"{stage}_s": seconds.get(stage) for stage in
               ("fetch", "verify", "assemble", "transfer", "compute", "eval", "epoch")},
        }  # fmt: skip
        self.run.add_precision_recall(result.step, "precision_recall/val", labels, result.val.probabilities[0])
        self.run.append_history(row)
        draw_curves(self.run.history(), self.run.path, is_phantom=self.is_phantom)
        self.run.publish(["curves/loss.png", "curves/accuracy.png"])
        _logger.info(
            "epoch %d: loss %.4f, val loss %.4f, val accuracy %.4f, val AUROC %.4f (augmented %.4f), %.0f images/s, "
            "%.1f %% waiting for data, peak memory %.0f MiB",
            result.epoch + 1, result.train_loss, result.val_loss, row["val_accuracy"], row["val_auroc"],
            row["shifted_auroc"], result.images_per_s, 100 * result.data_wait_share, result.peak_memory_mib,
        )  # fmt: skip
        return shifted_auroc if np.isfinite(shifted_auroc) else -result.val_loss

    def best(self) -> tuple[int, dict[str, torch.Tensor]]:
        """The epoch with the best score, counted from 1, and its averaged weights."""
        assert self.checkpoints is not None
        found = self.checkpoints.best() or self.checkpoints.newest()
        if found is None:
            raise RunError(f"no checkpoint in {self.run.address} can be read, so there are no weights to measure")
        entry, state = found
        return entry.epoch, state["average"]

    def conclude(
        self,
        network: torch.nn.Module,
        scored: dict[str, Predictions],
        shifted: Predictions,
        *,
        best_epoch: int,
        began: float,
    ) -> list[str]:
        """Write model.pt and all results, summary.json last; return the lines to end with."""
        run, config, index = self.run, self.config, self.index
        labels = self.loaders["val"].labels
        threshold = choose_threshold(np.tile(labels, len(shifted.logits)), shifted.probabilities.ravel())
        main_split = "test" if "test" in scored else "val"
        step = run.history()[-1]["step"] + 1  # past all epochs, so that an end that is repeated replaces this one
        measured = {
            split: record_scores(
                run,
                split=split,
                labels=self.loaders[split].labels,
                scores=predictions.probabilities[0],
                sources=self.loaders[split].source.tolist(),
                patients=self.loaders[split].patient.tolist(),
                subtypes=self.loaders[split].subtype.tolist(),
                threshold=threshold,
                threshold_source="chosen on augmented validation images",
                classes=index.classes,
                num_bootstrap=config.evaluate.num_bootstrap,
                is_phantom=self.is_phantom,
                folder="" if split == main_split else split,
                read_images=functools.partial(read_images, self._whole(split)),
                step=step,
            )
            for split, predictions in scored.items()
        }
        save_model(
            run.path / MODEL_FILE, network, config=config, classes=index.classes, threshold=threshold,
            run_id=run.run_id, fingerprint=index.fingerprint,
        )  # fmt: skip
        run.publish([MODEL_FILE])
        run.add_results(step, measured[main_split])
        summary = make_summary(
            measured[main_split],
            run_id=run.run_id,
            status="finished",
            epochs=len(run.history()),
            best_epoch=best_epoch,
            fingerprint=index.fingerprint,
            duration_s=time.monotonic() - began,
            is_phantom=self.is_phantom,
        )
        summary["validation"] = {
            name: measured["val"]["metrics"][name]["value"]
            for name in ("accuracy", "sensitivity", "specificity", "auroc")
        }
        draw_curves(run.history(), run.path, best_epoch=best_epoch, is_phantom=self.is_phantom)
        page = render_report(
            run.path,
            metrics=measured[main_split],
            summary=summary,
            history=run.history(),
            dataset=self.dataset_facts(),
            config=config.to_mapping(),
            environment=self._environment(),
            version=xrai.__version__,
        )
        run.write_text("report.html", page)
        lines = format_result_lines(run.finish(summary), run.address)
        if main_split != "val":
            values = ", ".join(f"{name} {format_value(name, value)}" for name, value in summary["validation"].items())
            lines.insert(-2, f"validation  {values}".replace("auroc", "AUROC"))
        return lines

    def _whole(self, split: str) -> Loader:
        """A loader of all images of a split, where the rank's own has a share of them."""
        return Loader(
            self._dataset, split=split, batch_size=self.config.evaluate.batch_size,
            cache_dir=self.config.cache.dir or None, cache_max_gib=self.config.cache.max_gib,
            timeout_s=self.config.train.timeout_s,
        )  # fmt: skip

    def _environment(self) -> dict[str, Any]:
        return {**describe_environment(), **describe_devices(self.config, self.ranks)}

    @property
    def is_phantom(self) -> bool:
        """Whether the validation images are drawn ones, which results must say."""
        return all(Path(source).name.startswith("phantom-") for source in self.loaders["val"].source)

    def dataset_facts(self) -> DatasetFacts:
        """What the report says of the data set."""
        index = self.index
        store = open_store(self._dataset)
        set_aside: dict[str, int] = {}
        for row in read_manifest(store.read("manifest.jsonl"), where=store.uri):
            if row.reason:
                set_aside[row.reason] = set_aside.get(row.reason, 0) + 1
        return DatasetFacts(
            source=index.source,
            fingerprint=index.fingerprint,
            image_size=index.image_size,
            fit=index.config["images"]["fit"],
            splits={split: index.num_images_per_class(split) for split in index.splits},
            num_found=index.counts.num_found,
            set_aside=set_aside,
            is_phantom=self.is_phantom,
        )


class StopRequest:
    """Set by the first SIGTERM or SIGINT; the second one of a kind ends the process as usual."""

    def __init__(self) -> None:
        self._asked = False
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._note)

    def is_set(self) -> bool:
        """Whether the process was asked to stop."""
        return self._asked

    def _note(self, kind: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(kind, signal.SIG_DFL)


def read_images(loader: Loader, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The pictures (n, H, W) of some rows of a split, from a loader of one rank that does not shuffle."""
    batches = {step: next(loader.epoch(0, start=step)) for step in set((rows // loader.batch_size).tolist())}
    return np.stack([batches[row // loader.batch_size].images[row % loader.batch_size, 0] for row in rows.tolist()])


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def open_loaders(config: Config, dataset: str, *, ranks: Ranks) -> dict[str, Loader]:
    """The loaders of train (shuffled), val, and test where the data set has one."""
    options: dict[str, Any] = {
        "rank": ranks.rank, "world_size": ranks.world_size, "window": config.loader.window,
        "prefetch": config.loader.prefetch, "threads": config.loader.threads, "cache_dir": config.cache.dir or None,
        "cache_max_gib": config.cache.max_gib, "timeout_s": config.train.timeout_s,
    }  # fmt: skip
    train = Loader(
        dataset,
        split="train",
        batch_size=config.train.global_batch_size,
        shuffle=True,
        seed=config.train.seed,
        **options,
    )
    held_out = [split for split in ("val", "test") if split == "val" or split in train.index.splits]
    return {
        "train": train,
        **{split: Loader(dataset, split=split, batch_size=config.evaluate.batch_size, **options) for split in held_out},
    }


def fit_to_dataset(config: Config, index: DatasetIndex, *, ranks: Ranks) -> Config:
    """The config with the data set's own `images` section. Raises `UserError` where they, or the ranks, do not fit."""
    stored = Images(**index.config["images"])
    for key, value in dataclasses.asdict(config.images).items():
        if value not in (getattr(Images(), key), getattr(stored, key)):
            raise DatasetError(
                f"images.{key} = {value!r}, but the data set was made with {getattr(stored, key)!r}: leave the key "
                "out, or run xrai.preprocess anew with it"
            )
    num_images = index.num_images("train")
    if num_images < ranks.world_size:
        raise UserError(
            f"{ranks.world_size} processes, but only {num_images} training images: each process needs one at least"
        )
    if min(class_counts(index)) == 0:
        raise DatasetError(f"the training split has {index.num_images_per_class('train')}: both classes are needed")
    rank_batch_size(config.train, world_size=ranks.world_size)
    return dataclasses.replace(config, images=stored)


def class_counts(index: DatasetIndex) -> tuple[int, int]:
    """Normal and pneumonia images of the training split."""
    normal, pneumonia = index.num_images_per_class("train").values()
    return normal, pneumonia


def facts_of(config: Config, index: DatasetIndex) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it."""
    return {
        "data set fingerprint": index.fingerprint,
        "image size": index.image_size,
        "model.name": config.model.name,
        "model.width": config.model.width,
        "optim.name": config.optim.name,
        "train.seed": config.train.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "loader.window": config.loader.window,
    }


def is_finished(run: RunFolder | None, *, resume: str) -> bool:
    """Whether the run has ended before; then its results are shown once more and nothing is done."""
    assert run is not None
    if run.store.size(SUMMARY) is None:
        return False
    if resume == "never":
        raise RunError(f"run {run.address} is finished and --resume is never: give another --run_id, or none")
    _logger.info("run %s is finished; give another --run_id to train once more", run.address)
    print("\n".join(format_result_lines(json.loads(run.store.read(SUMMARY)), run.address)), flush=True)
    return True


def first_weights(address: str, config: Config) -> dict[str, torch.Tensor]:
    """The weights of a finished run, for a network of this config."""
    with tempfile.TemporaryDirectory() as folder:
        trained = load_model(open_store(address), folder=Path(folder))
    weights = trained.network.state_dict()
    own = build_model(config.model).state_dict()
    for name, tensor in own.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise RunError(
                f"--init_from {address} holds another network: {name} does not fit model.name = {config.model.name}, "
                f"model.width = {config.model.width}"
            )
    return weights


def check_disk(config: Config, index: DatasetIndex, flags: dict[str, Any]) -> None:
    """Raise `UserError` where the disk has no room for the cache of a remote data set."""
    if open_store(flags["dataset"]).local_path("dataset.json") is not None:
        return
    needed = sum(shard.size_bytes for shards in index.splits.values() for shard in shards)
    if config.cache.max_gib:
        needed = min(needed, int(config.cache.max_gib * 2**30))
    folder = Path(config.cache.dir or Path.home())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the cache needs {needed / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free: set cache.dir to "
            "another disk, or cache.max_gib to a smaller size"
        )


def describe(config: Config, index: DatasetIndex, *, ranks: Ranks) -> str:
    """One line on what will be trained, on what, with what."""
    normal, pneumonia = class_counts(index)
    share = rank_batch_size(config.train, world_size=ranks.world_size)
    return (
        f"{config.model.name} on {normal + pneumonia} images ({normal} normal, {pneumonia} pneumonia) of "
        f"{index.image_size} x {index.image_size} pixels, {config.train.epochs} epochs, batches of "
        f"{config.train.global_batch_size} = {ranks.world_size} x {share}, "
        f"{resolve_precision(config.train.precision, ranks.device)} on {ranks.device.type}, "
        f"{torch.get_num_threads()} threads a rank"
    )


def describe_devices(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What environment.json says of ranks and devices."""
    return {
        "world_size": ranks.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        "precision": resolve_precision(config.train.precision, ranks.device),
    }


if __name__ == "__main__":
    run_command(record_failures(main))
