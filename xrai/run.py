"""A training run's folder and all that goes into it: where data set, learning and results meet.

`xrai.train` makes one `Job` a rank. Rank 0's observes the loop, keeps the checkpoints and writes
every file of the run; the others' are empty shells.
"""

import functools
import json
import math
import time
from array import array
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import xrai
from xrai.config import Config
from xrai.dataset.loader import Loader, open_split
from xrai.dataset.manifest import parse_manifest
from xrai.dataset.shards import MANIFEST_KEY, DatasetIndex
from xrai.errors import RunError
from xrai.learning.batch import to_grey
from xrai.learning.checkpoint import CheckpointFolder, refuse_other_run
from xrai.learning.distributed import Ranks
from xrai.learning.explain import grad_cam
from xrai.learning.loop import EpochResult, resolve_precision
from xrai.learning.network import ResNet
from xrai.learning.predictor import MODEL_FILE, Predictions, TrainedModel, save_model
from xrai.learning.typicality import Typicality
from xrai.log import get_logger
from xrai.results.baselines import (
    MAX_IMAGES,
    MAX_TRAIN,
    Looks,
    border_features,
    geometry_features,
    measure_baselines,
)
from xrai.results.calibration import calibrated, choose_threshold, fit_temperature
from xrai.results.environment import describe_environment
from xrai.results.folder import SUMMARY, RunFolder
from xrai.results.metrics import auroc
from xrai.results.plots import draw_curves
from xrai.results.record import group_of, record_scores
from xrai.results.report import DatasetFacts, render_report
from xrai.results.summary import format_result_lines, make_summary
from xrai.store import open_store

_ROWS_AT_ONCE = 4096  # of a column of texts, where each is looked at once
_logger = get_logger(__name__)


class Job:
    """The run's folder and all that is written into it, on rank 0; an empty shell on the others."""

    def __init__(
        self,
        config: Config,
        dataset: str,
        run: RunFolder | None,
        loaders: dict[str, Loader],
        *,
        ranks: Ranks,
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
            raise RunError(
                f"run {self.run.address} exists and --resume is never: give another --run_id, or none"
            )
        found = self.checkpoints.newest()
        if found is None and resume == "must":
            raise RunError(
                f"{self.run.address} holds no checkpoint and --resume is must: look at --run_id, or use auto"
            )
        if found is not None:
            refuse_other_run(
                found[1]["facts"], facts_of(self.config, self.index), name=found[0].file
            )
        self.run.open()
        self.run.write_config(self.config.to_yaml())
        self.run.write_environment(self._environment())
        if found is None:
            self.run.resume_at(epoch=0, step=0)
            self.run.add_hyperparameters(self.config.to_mapping())
            return None
        entry, state = found
        self.run.resume_at(
            epoch=entry.epoch + 1, step=entry.step + 1
        )  # the first that are not done
        self.run.add_hyperparameters(self.config.to_mapping())
        _logger.info("going on after step %d, in epoch %d", entry.step, entry.epoch + 1)
        return state

    def after_epoch(self, result: EpochResult) -> float:
        """Show an epoch's results; its score is the AUROC on augmented validation images, which
        tracks other hospitals.

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
            # compute time over total time, as MLPerf Storage defines it; of the training part of
            # the epoch
            "accelerator_utilisation": seconds["compute"] / seconds["epoch"], "peak_memory_mib": result.peak_memory_mib,
            **{f"{stage}_s": seconds.get(stage) for stage in
               ("fetch", "verify", "assemble", "transfer", "compute", "eval", "epoch")},
        }  # fmt: skip
        self.run.add_precision_recall(
            result.step, "precision_recall/val", labels, calibrated(result.val.logits[0])
        )
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
            raise RunError(
                f"no checkpoint in {self.run.address} can be read, so there are no weights to measure"
            )
        entry, state = found
        return entry.epoch, state["average"]

    def conclude(
        self,
        network: ResNet,
        scored: dict[str, Predictions],
        shifted: Predictions,
        *,
        typicality: Typicality,
        best_epoch: int,
        began: float,
    ) -> list[str]:
        """Write model.pt and all results, summary.json last; return the lines to end with."""
        run, config, index = self.run, self.config, self.index
        labels = np.tile(self.loaders["val"].labels, len(shifted.logits))
        temperature = fit_temperature(labels, shifted.logits.ravel())
        threshold = choose_threshold(labels, calibrated(shifted.logits.ravel(), temperature))
        main_split = "test" if "test" in scored else "val"
        step = (
            run.history()[-1]["step"] + 1
        )  # past all epochs, so that an end that is repeated replaces this one
        known = read_looks(self._whole("train"), limit=MAX_TRAIN)
        measured = {
            split: record_split(
                run,
                self._whole(split),
                network,
                predictions,
                temperature=temperature,
                threshold=threshold,
                threshold_source="chosen on augmented validation images",
                num_bootstrap=config.evaluate.num_bootstrap,
                known=known,
                folder="" if split == main_split else split,
                step=step,
            )
            for split, predictions in scored.items()
        }
        trained = TrainedModel(
            network,
            config.model,
            config.images,
            index.classes,
            threshold,
            temperature,
            typicality,
            run.run_id,
            index.fingerprint,
        )
        save_model(run.path / MODEL_FILE, trained)
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
        dataset = describe_dataset(self._dataset, index, is_phantom=self.is_phantom)
        summary["trained_on"] = {
            "source": dataset.source, "image_size": dataset.image_size, "fit": dataset.fit, "splits": dataset.splits,
        }  # fmt: skip
        draw_curves(run.history(), run.path, best_epoch=best_epoch, is_phantom=self.is_phantom)
        page = render_report(
            run.path,
            metrics=measured[main_split],
            summary=summary,
            history=run.history(),
            dataset=dataset,
            config=config.to_mapping(),
            environment=self._environment(),
            version=xrai.__version__,
            others={split: found for split, found in measured.items() if split != main_split},
        )
        run.write_text("report.html", page)
        return format_result_lines(run.finish(summary), run.address)

    def _whole(self, split: str) -> Loader:
        """A loader of all images of a split, where the rank's own has a share of them."""
        return open_split(self.config, self._dataset, split)

    def _environment(self) -> dict[str, Any]:
        return {**describe_environment(), **describe_devices(self.config, self.ranks)}

    @functools.cached_property
    def is_phantom(self) -> bool:
        """Whether the validation images are drawn ones, which results must say."""
        return is_phantom(self.loaders["val"])


def record_split(
    run: RunFolder,
    loader: Loader,
    network: torch.nn.Module,
    predictions: Predictions,
    *,
    temperature: float,
    threshold: float,
    threshold_source: str,
    num_bootstrap: int,
    known: Looks | None,
    folder: str,
    step: int | None = None,
) -> dict[str, Any]:
    """Write all results of one split under `folder` of the run and return its metrics.

    `loader` is one of the whole split that does not shuffle; `known` is what the baselines learn
    from, images of the training split of the same data set, or None where there are none.
    """
    looks = read_looks(loader, limit=MAX_IMAGES)
    columns = loader.columns("labels", "source", "patient", "subtype")
    return record_scores(
        run,
        split=loader.split,
        labels=columns["labels"],
        logits=predictions.logits[0],
        temperature=temperature,
        atypicality=None if predictions.atypicality is None else predictions.atypicality[0],
        sources=columns["source"].tolist(),
        patients=columns["patient"].tolist(),
        subtypes=columns["subtype"].tolist(),
        threshold=threshold,
        threshold_source=threshold_source,
        classes=loader.index.classes,
        num_bootstrap=num_bootstrap,
        baselines=measure_baselines(known, looks, split=loader.split, num_bootstrap=num_bootstrap),
        is_phantom=is_phantom(loader),
        folder=folder,
        read_images=functools.partial(read_images, loader),
        explain=functools.partial(explain, network),
        step=step,
    )


def explain(network: torch.nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The heat maps (n, H, W) in [0, 1] of pictures (n, H, W)."""
    assert isinstance(network, ResNet)
    weight = next(network.parameters())
    grey = to_grey(
        np.ascontiguousarray(images[:, None]), weight.device, weight.dtype
    )  # (n, 1, H, W)
    heats: NDArray[np.float32] = grad_cam(network, grey).float().cpu().numpy()
    return heats


def read_looks(loader: Loader, *, limit: int) -> Looks:
    """What the baselines see of the first `limit` images of a split, which are a random sample of
    it.

    `loader` is one of the whole split that does not shuffle; rows stand in the order of their
    files' hashes.
    """
    batches = islice(loader.epoch(0), math.ceil(limit / loader.batch_size))
    border = [border_features(batch.images[:, 0]) for batch in batches]
    num = min(limit, loader.num_images)
    columns = loader.columns("labels", "patient", "width", "height", stop=num)
    return Looks(
        labels=columns["labels"],
        patients=columns["patient"].tolist(),
        geometry=geometry_features(columns["width"], columns["height"]),
        border=np.concatenate(border)[:num],
    )


def is_phantom(loader: Loader) -> bool:
    """Whether the images of a split are drawn ones, which results must say."""
    return all(
        Path(source).name.startswith("phantom-")
        for start in range(0, loader.num_images, _ROWS_AT_ONCE)
        for source in loader.columns("source", start=start, stop=start + _ROWS_AT_ONCE)["source"]
    )


def describe_dataset(dataset: str, index: DatasetIndex, *, is_phantom: bool) -> DatasetFacts:
    """What a report says of a data set, from its index and its manifest."""
    store = open_store(dataset)
    set_aside: Counter[str] = Counter()
    patients = {
        split: array("q") for split in index.splits
    }  # a hash an image, for names take ten times the memory
    groups: dict[str, Counter[str]] = {split: Counter() for split in index.splits}
    with store.as_file(MANIFEST_KEY) as path, path.open("rb") as lines:
        for row in parse_manifest(lines, where=store.uri):
            if row.reason:
                set_aside[row.reason] += 1
            elif row.split in patients:
                patients[row.split].append(hash(row.patient))
                groups[row.split][group_of(row.patient)] += 1
    return DatasetFacts(
        source=index.source,
        fingerprint=index.fingerprint,
        image_size=index.image_size,
        fit=index.config["images"]["fit"],
        splits={split: index.num_images_per_class(split) for split in index.splits},
        num_found=index.counts.num_found,
        set_aside=dict(set_aside),
        is_phantom=is_phantom,
        num_patients={
            split: len(np.unique(np.asarray(found))) for split, found in patients.items()
        },
        groups={split: dict(found) for split, found in groups.items()},
    )


def is_finished(run: RunFolder | None, *, resume: str) -> bool:
    """Whether the run has ended before; then its results are shown once more and nothing is
    done.
    """
    assert run is not None
    if run.store.size(SUMMARY) is None:
        return False
    if resume == "never":
        raise RunError(
            f"run {run.address} is finished and --resume is never: give another --run_id, or none"
        )
    _logger.info("run %s is finished; give another --run_id to train once more", run.address)
    print(
        "\n".join(format_result_lines(json.loads(run.store.read(SUMMARY)), run.address)), flush=True
    )
    return True


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


def describe_devices(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What environment.json says of ranks and devices."""
    return {
        "world_size": ranks.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(ranks.device)
        if ranks.device.type == "cuda"
        else "cpu",
        "precision": resolve_precision(config.train.precision, ranks.device),
    }


def read_images(loader: Loader, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The pictures (n, H, W) of some rows of a split, from a loader of one rank that does not
    shuffle.
    """
    batches = {
        step: next(loader.epoch(0, start=step))
        for step in set((rows // loader.batch_size).tolist())
    }
    return np.stack(
        [
            batches[row // loader.batch_size].images[row % loader.batch_size, 0]
            for row in rows.tolist()
        ]
    )
