"""A training run's folder and all that goes into it: where data set, learning and results meet.

`xrai.train` makes a `Job` on rank 0. It observes the loop, keeps the checkpoints and writes every
file of the run.
"""

import functools
import math
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xrai.config import OWN_NETWORKS, TIMM, Config, Model, load_yaml
from xrai.dataset.loader import Loader, open_split
from xrai.dataset.shards import DatasetIndex
from xrai.errors import RunError
from xrai.labels import UNKNOWN, LabelSpec
from xrai.learning.checkpoint import CheckpointFolder, refuse_other_run
from xrai.learning.distributed import Ranks
from xrai.learning.loop import EpochResult, resolve_precision
from xrai.learning.predictor import MODEL_FILE, Trained, TrainedModel, save_model
from xrai.learning.zoo import batch_norm
from xrai.log import get_logger
from xrai.results import types
from xrai.results.calibration import (
    calibrated,
    choose_threshold,
    explain_limit,
    fit_softmax_temperature,
    fit_temperature,
    softmax,
)
from xrai.results.environment import describe_environment
from xrai.results.folder import ENVIRONMENT, HISTORY, SUMMARY, RunFolder
from xrai.results.history import TAGS, EpochRow
from xrai.results.metrics import HEADLINES, auroc
from xrai.results.prior import shares_of
from xrai.results.summary import Summary, main_results, read_summary, result_lines
from xrai.results.tensorboard import FINAL_TAGS
from xrai.store import masked

_STAGES = ("fetch", "verify", "assemble", "transfer", "compute", "eval", "epoch")
_CONFIG = "config.yaml"
# Keys and sections that change how a training is carried out but not its result
_FREE = frozenset(
    {"cache", "checkpoint", "labels", "loader", "shards", "splits", "evaluate.batch_size"}
    | {"train.compile", "train.profile", "train.threads"}
    | {"train.log_every", "train.timeout_s", "train.step_timeout_s"}
)
_ADDED = {"review": ""}  # sections that earlier versions lack: the value that their runs had
_LIMITS = ("train.epochs", "train.max_steps", "train.max_minutes")  # may change while it trains
BY_CLASS = "auroc_by_class"  # of validation images: the tag in TensorBoard, before a name
_NUM_CURVES = 20  # of precision and recall in an epoch: each takes 3 KiB of TensorBoard's events
_ROWS_AT_ONCE = 4096  # of a text column, read in parts
_logger = get_logger(__name__)


class Job:
    """A run's folder and everything that is written into it. Made on rank 0 alone."""

    def __init__(
        self,
        config: Config,
        dataset: str,
        run: RunFolder,
        loaders: dict[str, Loader],
        *,
        ranks: Ranks,
    ) -> None:
        self.config, self.run, self.loaders, self.ranks = config, run, loaders, ranks
        self.index: DatasetIndex = loaders["train"].index
        self.labels = self.index.labels
        self._dataset = dataset
        self._curves_due = 0.0  # on the monotonic clock: no curves are drawn before
        self.checkpoints = CheckpointFolder(
            run.path,
            store=run.store,
            publish=run.publish,
            remove=run.remove,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that resumes from it."""
        return {
            "task": self.labels.task,
            "classes": list(self.labels.classes),
            "data set fingerprint": self.index.fingerprint,
            "image size": self.index.image_size,
            "model.name": self.config.model.name,
            "model.width": self.config.model.width,
            "optim.name": self.config.optim.name,
            "train.seed": self.config.train.seed,
            "train.global_batch_size": self.config.train.global_batch_size,
            "loader.window": self.config.loader.window,
        }

    def check(self, *, resume: str) -> bool:
        """Whether the run has ended. Raises what `is_finished` and `open` would, as far as the
        run's commit marks and config show.

        Changes nothing, so it may be called while another job writes the run.
        """
        if self._ended(resume=resume) is not None:
            _logger.info("run %s is finished; there is nothing to train", self.run.address)
            return True
        mark = self.checkpoints.latest()
        self._refuse_to_resume(resume, has_checkpoint=mark is not None)
        if mark is not None and mark.facts is not None:
            refuse_other_run(mark.facts, self.facts, name=mark.file)
        self._refuse_changed(resume)
        return False

    def is_finished(self, *, resume: str) -> bool:
        """Whether the run has ended before; then its results are printed again."""
        if (summary := self._ended(resume=resume)) is None:
            return False
        address = self.run.address
        _logger.info("run %s is finished; give another --run_id to train once more", address)
        lines = result_lines(summary.main, address, validation=summary.validation)
        print("\n".join(lines), flush=True)
        return True

    def _ended(self, *, resume: str) -> Summary | None:
        """The summary of a finished run, None before. Raises `RunError` if its config or data set
        was a different one.
        """
        address = self.run.address
        if self.run.store.size(SUMMARY) is None:
            return None
        if resume == "never":
            raise RunError(
                f"run {address} is finished and --resume is never: give another --run_id, or none"
            )
        if changed := self._changed():
            raise RunError(
                f"run {address} is finished, with another config ({', '.join(changed)}): give "
                "another --run_id to train with this one"
            )
        summary = read_summary(self.run.store.read(SUMMARY), where=f"{address}/{SUMMARY}")
        if summary.training.fingerprint != self.index.fingerprint:
            raise RunError(
                f"run {address} is finished, on data set {summary.training.fingerprint[:16]}, not "
                f"{self.index.fingerprint[:16]}: give another --run_id to train on this one"
            )
        return summary

    def open(self, *, resume: str) -> dict[str, Any] | None:
        """Open the folder and return the newest checkpoint's state, or None to start anew.

        A changed config is logged, and the earlier one is kept under the name of its last step.
        Raises `RunError` where more than the length of the training changed, unless `resume` is
        `changed`, `InUseError` where another job writes the run.
        """
        self.run.lock()
        if self.run.store.size(SUMMARY) is not None:
            raise RunError(f"another job has just finished run {self.run.address}: start again")
        found = self.checkpoints.newest()
        self._refuse_to_resume(resume, has_checkpoint=found is not None)
        if found is not None:
            refuse_other_run(found[1].get("facts"), self.facts, name=found[0].file)
        changed = self._refuse_changed(resume)
        self.run.open()
        if found is not None:
            self._refuse_incomplete_history(found[0].epoch)
        self.checkpoints.remove_unmarked()
        if changed:
            step = 0 if found is None else found[0].step
            _logger.warning("from step %d on with a changed config: %s", step, ", ".join(changed))
            earlier = self.run.store.read(_CONFIG).decode()
            self.run.write_text(f"config-until-step-{step:09d}.yaml", earlier)
        self.run.write_text(_CONFIG, self.config.to_yaml())
        self.run.write_json(ENVIRONMENT, self._environment())
        entry, state = found or (None, None)
        if entry is None:
            self.run.resume_at(epoch=0, step=0)
        else:  # at the first epoch and step that are not done
            self.run.resume_at(epoch=entry.epoch + 1, step=entry.step + 1)
            _logger.info("going on after step %d, in epoch %d", entry.step, entry.epoch + 1)
        self.run.events.add_hyperparameters(self.config.to_mapping())
        if self.labels.task != "binary":
            self.run.events.add_chart("AUROC by class", "validation", f"{BY_CLASS}/.*")
        self.run.close_segment()  # now, so that TensorBoard lists runs that are not finished
        return state

    def _refuse_to_resume(self, resume: str, *, has_checkpoint: bool) -> None:
        """Raise `RunError` where `--resume` does not allow what is there."""
        if resume == "never" and self.run.exists():
            raise RunError(
                f"run {self.run.address} exists and --resume is never: give another --run_id, or "
                "none"
            )
        if resume == "must" and not has_checkpoint:
            raise RunError(
                f"{self.run.address} holds no checkpoint and --resume is must: check --run_id, or "
                "use auto"
            )

    def _refuse_changed(self, resume: str) -> list[str]:
        """The changed keys, see `_changed`. Raises `RunError` where more than the length of the
        training changed, unless `resume` is `changed`.
        """
        changed = self._changed()
        if resume != "changed" and not all(text.startswith(_LIMITS) for text in changed):
            raise RunError(
                f"run {self.run.address} began with another config ({', '.join(changed)}): give "
                "the same values, or --resume=changed to go on with these, or another --run_id"
            )
        return changed

    def _changed(self) -> list[str]:
        """The keys, except the free ones, in which this config differs from that of the run. A key
        that an earlier version did not have counts as unchanged.
        """
        if self.run.store.size(_CONFIG) is None:
            return []
        where = f"{self.run.address}/{_CONFIG}"
        free = _free_keys(self.config.model)
        try:
            earlier = load_yaml(self.run.store.read(_CONFIG), where=where)
            return [
                f"{section}.{key} = {value!r}, was {was!r}"
                for section, keys in self.config.to_mapping().items()
                for key, value in keys.items()
                if not free & {section, f"{section}.{key}"}
                and (was := earlier.get(section, {}).get(key, _ADDED.get(section, value))) != value
            ]
        except AttributeError as error:
            raise RunError(f"{where} is not the config of a run: it is damaged") from error

    def _refuse_incomplete_history(self, num_epochs: int) -> None:
        """Raise `RunError` unless history.csv has the epochs that the checkpoint had done."""
        epochs = [row.epoch for row in self.run.history()]
        if epochs[:num_epochs] != list(range(1, num_epochs + 1)):
            raise RunError(
                f"{self.run.address}/{HISTORY} has {len(epochs)} epochs, but the checkpoint was "
                f"made after {num_epochs}: the file is damaged; restore it, or start anew with "
                "another --run_id"
            )

    def after_epoch(self, result: EpochResult) -> float:
        """Record an epoch; its score is the AUROC on augmented validation images, the mean over
        all outputs.

        That tracks the AUROC on other hospitals' images. Where it is undefined, as with one class
        alone, the score is the negative validation loss.
        """
        labels = self.loaders["val"].labels
        val_accuracy, val_aurocs = judge(self.labels, labels, result.val.logits)
        shifted_accuracy, shifted_aurocs = judge(self.labels, labels, result.shifted.logits)
        shifted_auroc = _mean_of_defined(shifted_aurocs)
        worst, lowest = self._add_by_class(result, val_aurocs)
        own = {name: value for name, value in vars(result).items() if name in TAGS}
        stages = {f"{stage}_s": result.seconds.get(stage, math.nan) for stage in _STAGES}
        row = EpochRow(
            epoch=result.epoch + 1,
            step=result.step,
            **own,
            **stages,
            val_accuracy=val_accuracy,
            val_auroc=_mean_of_defined(val_aurocs),
            val_auroc_worst=lowest,
            shifted_accuracy=shifted_accuracy,
            shifted_auroc=shifted_auroc,
            accelerator_utilisation=result.seconds["compute"] / result.seconds["epoch"],
        )
        self.run.append_history(row)
        self._draw_curves_now_and_then()
        _logger.info("%s", row.line(worst))
        return shifted_auroc if np.isfinite(shifted_auroc) else -result.val_loss

    def _add_by_class(self, result: EpochResult, aurocs: list[float]) -> tuple[str, float]:
        """Add precision and recall to TensorBoard, and of several outputs the AUROC of each.

        Returns the output with the lowest AUROC and its value, "" and NaN where there is one output
        alone. Only the first `_NUM_CURVES` outputs have curves.
        """
        spec, step, logits = self.labels, result.step, result.val.logits[0]
        wanted = spec.matrix(self.loaders["val"].labels)
        scores = softmax(logits) if spec.task == "multiclass" else calibrated(logits)
        names = ("",) if spec.task == "binary" else spec.classes
        for column, name in enumerate(names[:_NUM_CURVES]):
            known = wanted[:, column] != UNKNOWN
            tag = f"precision_recall/val/{name}" if name else "precision_recall/val"
            self.run.events.add_precision_recall(
                step, tag, wanted[known, column], scores[known, column]
            )
        if spec.task == "binary":
            return "", math.nan
        by_class = dict(zip(names, aurocs, strict=True))
        scalars = {f"{BY_CLASS}/{name}": value for name, value in by_class.items()}
        self.run.events.add_scalars(step, scalars)
        defined = [name for name, value in by_class.items() if math.isfinite(value)]
        worst = min(defined, key=lambda name: by_class[name], default="")
        return worst, by_class.get(worst, math.nan)

    def best(self) -> tuple[int, Any]:
        """The epoch with the best score, counted from 1, and its averaged weights."""
        found = self.checkpoints.best() or self.checkpoints.newest()
        if found is None:
            raise RunError(
                f"no checkpoint in {self.run.address} can be read, so there are no weights to "
                "measure"
            )
        entry, state = found
        return entry.epoch, state.get("average")

    def conclude(self, trained: Trained, *, began: float) -> list[str]:
        """Write model.pt and all results, summary.json last; return the lines to end with."""
        # plotting packages are loaded on rank 0 alone, and only now
        from xrai.measuring import describe_dataset
        from xrai.results.report import Page, render_report

        # temperature and threshold are chosen on augmented validation images
        labels, logits = self.loaders["val"].labels, trained.shifted.logits
        temperatures, thresholds = calibrate(self.labels, labels, logits)
        outputs = types.outputs_of(
            self.labels, temperatures, thresholds, "chosen on augmented validation images"
        )
        priors = find_priors(self.labels, labels, logits, outputs)
        results = self._measure(trained, types.with_shares(outputs, priors))
        main = results.pop("test" if "test" in results else "val")
        model = TrainedModel(
            trained.network,
            self.config.model,
            self.config.images,
            self.labels,
            temperatures,
            thresholds,
            trained.typicality,
            self.run.run_id,
            self.index.fingerprint,
            priors,
        )
        save_model(self.run.path / MODEL_FILE, model)
        self.run.publish([MODEL_FILE])
        data = describe_dataset(self._dataset, self.index)
        training = types.Training(
            run_id=self.run.run_id,
            status="finished",
            epochs=len(self.run.history()),
            best_epoch=trained.epoch,
            fingerprint=self.index.fingerprint,
            duration_s=time.monotonic() - began,
            trained_on=types.TrainedOn(data.source, data.image_size, data.fit, data.splits),
            unlike=_describe_unlike(trained),
        )
        val = results.get("val", main).headline
        validation = {name: val[name].value for name in HEADLINES}
        summary = Summary(training, main_results(main), validation)
        self._draw_curves(best_epoch=trained.epoch)
        page = Page(
            main,
            training,
            data,
            config=self.config.to_mapping(),
            environment=self._environment(),
            history=self.run.history(),
            others=list(results.values()),
        )
        self.run.write_text("report.html", render_report(page, self.run.path))
        self.run.finish(summary.to_mapping())
        return result_lines(summary.main, self.run.address, validation=summary.validation)

    def _measure(
        self, trained: Trained, outputs: tuple[types.Output, ...]
    ) -> dict[str, types.SplitResults]:
        """Write the results of each split that was scored; the main split's are on top."""
        from xrai.measuring import Measuring, read_looks

        # all images, where the rank's own loader has a share of them
        whole = functools.partial(open_split, self.config, self._dataset)
        step = self.run.history()[-1].step + 1  # after all epochs; the same when repeated
        num, known = self.config.evaluate.num_bootstrap, read_looks(whole("train"))
        measuring = Measuring(self.run, trained.network, self.labels, outputs, num, known)
        main = "test" if "test" in trained.scored else "val"
        results = {
            split: measuring.record(
                whole(split), found, folder="" if split == main else split, step=step
            )
            for split, found in trained.scored.items()
        }
        if self.labels.task != "binary":
            scalars = {
                f"{tag}/{found.output.name}": found.whole.metrics[name].value
                for found in results[main].outputs
                for name, tag in FINAL_TAGS.items()
            }
            self.run.events.add_scalars(step, scalars)
        self.run.events.add_results(step, results[main].headline)
        return results

    def _draw_curves_now_and_then(self) -> None:
        """Draw the curves, unless that would take more than a twentieth of the training's time."""
        began = time.monotonic()
        if began >= self._curves_due:
            self._draw_curves()
            ended = time.monotonic()
            self._curves_due = ended + 20 * (ended - began)

    def _draw_curves(self, *, best_epoch: int | None = None) -> None:
        from xrai.results.plots import draw_curves  # matplotlib, on rank 0 alone

        folder = self.run.path / "curves"
        names = draw_curves(
            self.run.history(),
            folder,
            task=self.labels.task,
            best_epoch=best_epoch,
            is_phantom=self._is_phantom,
        )
        self.run.publish([f"curves/{name}" for name in names])

    def _environment(self) -> dict[str, object]:
        """What this machine is, and what ranks and devices the run has."""
        device = self.ranks.device
        is_cuda = device.type == "cuda"
        return {
            **describe_environment(),
            "world_size": self.ranks.world_size,
            "threads_per_rank": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
            "precision": resolve_precision(self.config.train.precision, device),
        }

    @functools.cached_property
    def _is_phantom(self) -> bool:
        """Whether the validation images are drawn ones; their names are read some at a time."""
        loader = self.loaders["val"]
        starts = range(0, loader.num_images, _ROWS_AT_ONCE)
        parts = (loader.columns("source", start=at, stop=at + _ROWS_AT_ONCE) for at in starts)
        return types.are_phantoms(source for part in parts for source in part["source"])


def _free_keys(model: Model) -> frozenset[str]:
    """`_FREE`, with the parts of a batch where no batch statistics can depend on them."""
    is_timm = model.name.startswith(TIMM)
    is_free = model.name in OWN_NETWORKS or (is_timm and batch_norm(model) == "frozen")
    return _FREE | {"train.accumulation_steps"} if is_free else _FREE


def _describe_unlike(trained: Trained) -> types.UnlikeImages | None:
    """What the run states of the images that `review.unlike` named."""
    unlike = trained.unlike
    if unlike is None:
        return None
    return types.UnlikeImages(
        source=masked(unlike.source),
        sha256=unlike.sha256,
        num_images=len(unlike.images),
        num_patients=unlike.num_patients,
        num_held_out=int((~unlike.is_fitted).sum()),
        num_held_out_review=trained.num_unlike_review,
        num_without_patient=unlike.num_without_patient,
    )


def judge(
    spec: LabelSpec, labels: NDArray[np.integer], logits: NDArray[np.float64]
) -> tuple[float, list[float]]:
    """Accuracy, and the AUROC of each output, of logits (draws, N, C) on labels (N,) or (N, C), all
    draws together.

    Accuracy calls the class with the largest logit, or each output whose logit is above 0, and
    counts known labels. An AUROC is NaN where only one of the two labels occurs.
    """
    scores = logits.reshape(-1, spec.num_outputs)
    wanted = np.tile(spec.matrix(labels), (len(logits), 1))  # (draws x N, C)
    is_known = wanted != UNKNOWN
    if spec.task == "multiclass":
        is_right = np.take_along_axis(wanted, scores.argmax(axis=1)[:, None], axis=1) == 1
        scores = softmax(scores)
    else:
        is_right = ((scores > 0) == wanted)[is_known]
    columns = zip(wanted.T, scores.T, is_known.T, strict=True)
    aurocs = [auroc(wanted[known], own[known]) for wanted, own, known in columns]
    return float(np.mean(is_right)), aurocs


def _mean_of_defined(values: list[float]) -> float:
    """The mean of the values that are not NaN; NaN where all are."""
    defined = [value for value in values if math.isfinite(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def calibrate(
    spec: LabelSpec, labels: NDArray[np.integer], logits: NDArray[np.float64]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Temperatures and thresholds for logits (draws, N, C), from the known ones of labels (N,) or
    (N, C): one of each for two classes and for each finding, one temperature for several classes.
    A temperature at a limit gets a warning.

    Raises `XraiError` where two classes have images of one alone. A finding of which all known
    labels agree keeps temperature 1 and threshold 0.5, with a warning.
    """
    flat = logits.reshape(-1, spec.num_outputs)  # (draws x N, C)
    if spec.task == "multiclass":
        temperature = fit_softmax_temperature(
            np.tile(labels, len(logits)), flat, num_draws=len(logits)
        )
        _warn_of_limit(temperature)
        return (temperature,), ()
    temperatures, thresholds = [], []
    wanted = np.tile(spec.matrix(labels), (len(logits), 1))
    for name, column, own in zip(spec.classes[-spec.num_outputs :], wanted.T, flat.T, strict=True):
        known, scores = column[column != UNKNOWN], own[column != UNKNOWN]
        if spec.task == "multilabel" and len(np.unique(known)) < 2:
            _logger.warning("%s: no threshold can be chosen; it is 0.5", name)
            temperatures.append(1.0)
            thresholds.append(0.5)
            continue
        temperatures.append(fit_temperature(known, scores, num_draws=len(logits)))
        _warn_of_limit(temperatures[-1], name if spec.task == "multilabel" else "")
        thresholds.append(choose_threshold(known, calibrated(scores, temperatures[-1])))
    return tuple(temperatures), tuple(thresholds)


def _warn_of_limit(temperature: float, finding: str = "") -> None:
    if limit := explain_limit(temperature):
        _logger.warning("%s%s", f"{finding}: " if finding else "", limit)


def find_priors(
    spec: LabelSpec,
    labels: NDArray[np.integer],
    logits: NDArray[np.float64],
    outputs: tuple[types.Output, ...],
) -> tuple[float, ...]:
    """The shares of images at which the scores of logits (draws, N, C) are calibrated, from labels
    (N,) or (N, C): of each class or finding; for two classes, of the second one.

    They are neither the shares of these labels nor the equal ones that logit adjustment aims at,
    since only a temperature is fitted (docs/decisions/0026-prior.md).
    """
    wanted = np.tile(spec.matrix(labels), (len(logits), 1))  # (draws x N, C)
    scores = types.score_logits(outputs, logits.reshape(-1, spec.num_outputs))
    return tuple(shares_of(wanted, scores, is_multiclass=spec.task == "multiclass"))
