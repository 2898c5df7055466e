"""The training loop, in full view.

`fit` trains a network over all ranks and leaves it with the averaged weights of its best epoch in
the checkpoints. What a step does stands here from top to bottom; what an epoch's figures mean and
where they are shown is the observer's business (the command passes one in).
"""

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xrai.config import Config, Train
from xrai.errors import ConfigError, StoppedError, TrainingError, UserError
from xrai.learning import optim
from xrai.learning.augment import augment
from xrai.learning.batch import Batch, Loader, to_grey
from xrai.learning.checkpoint import CheckpointFolder
from xrai.learning.distributed import Ranks
from xrai.learning.predictor import Predictions, predict_split
from xrai.log import get_logger, progress

_logger = get_logger(__name__)


class TrainLoader(Loader, Protocol):
    """A loader of the training split that can say where its time went."""

    def timings(self) -> dict[str, float]:
        """Seconds of the current epoch, by stage."""


@dataclass
class Progress:
    """Where training stands: all that is not a tensor, saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0  # the next one of the epoch
    step: int = 0  # of the whole run
    best_score: float = float("-inf")
    best_epoch: int = -1
    epochs_without_better: int = 0
    # sums over this rank's images since the epoch began
    loss_sum: float = 0.0
    num_correct: int = 0
    num_seen: int = 0
    train_s: float = 0.0  # over all epochs


@dataclass(frozen=True)
class EpochResult:
    """What an observer is told after each epoch, on every rank the same but for the timings,
    which are this rank's.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val: Predictions
    shifted: Predictions
    learning_rate: float
    grad_norm: float
    images_per_s: float
    data_wait_share: float
    seconds: dict[str, float]
    peak_memory_mib: float


class Observer(Protocol):
    """Who turns results into numbers and pictures. Called on rank 0 alone."""

    def after_epoch(self, result: EpochResult) -> float:
        """Show the epoch's results; return its score, larger is better (NaN counts as no score)."""


def fit(
    model: nn.Module,
    config: Config,
    *,
    ranks: Ranks,
    train: TrainLoader,
    val: Loader,
    class_counts: tuple[int, int],
    val_labels: NDArray[np.uint8],
    name_of: Callable[[int], str],
    observer: Observer | None,
    checkpoints: CheckpointFolder | None,
    facts: dict[str, Any],
    resumed: dict[str, Any] | None,
    asked_to_stop: Callable[[], bool],
    profile_path: Path | None = None,
) -> Progress:
    """Train `model` in place; on return the best epoch's averaged weights are in the checkpoints.

    `class_counts` are the normal and the pneumonia images of the training split; `val_labels` (N,)
    are the validation split's; `name_of` names an image of the training split in messages.
    `observer` and `checkpoints` are rank 0's and None elsewhere. `facts` must not change over a run
    and are saved with it; `resumed` is the state to go on from, the same on every rank. The profile
    that the config may ask for goes to `profile_path`.

    Raises `StoppedError` after saving when `asked_to_stop` on any rank, `TrainingError` when a loss
    or gradient is not finite, before any weight has changed.
    """
    rank_batch_size(config.train, world_size=ranks.world_size)
    precision = Precision(config.train, ranks.device)
    model.to(device=ranks.device, dtype=precision.weights, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = deepcopy(model).requires_grad_(False)
    optimizer = optim.make_optimizer(model, config.optim)
    done = Progress()
    if resumed is not None:
        done = _restore(resumed, model, average, optimizer, precision, ranks=ranks)
    wrapped = ranks.wrap(model)
    network = torch.compile(wrapped) if config.train.compile else wrapped
    num_steps = config.train.epochs * train.num_batches
    log_odds = config.optim.logit_adjustment * math.log(class_counts[1] / class_counts[0])
    weights = optim.class_weights(class_counts, config.optim.class_weighting)
    profiler = Profiler(config.train.profile, profile_path)
    started = time.monotonic() - done.train_s
    steps_here = 0  # done by this process

    def save(score: float | None) -> None:
        done.train_s = time.monotonic() - started
        # each rank's own sums, so that the same world size goes on exactly
        sums = ranks.gather([done.loss_sum, done.num_correct, done.num_seen])
        if checkpoints is not None:
            state = {
                "model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": precision.scaler.state_dict(), "progress": asdict(done), "sums": sums, "facts": facts,
            }  # fmt: skip
            checkpoints.save(state, step=done.step, epoch=done.epoch, score=score)

    while not (ended := _ended(config.train, done)):
        clock = Clock(ranks.device)
        model.train()
        grad_norm = float("nan")
        rate = 0.0
        stop = 0
        first_batch, epoch_began = done.batch, time.monotonic()
        name = f"epoch {done.epoch + 1}/{config.train.epochs}"
        with progress(name, total=train.num_batches, unit="steps", closing_line=False) as bar:
            for batch in clock.waits(train.epoch(done.epoch, start=done.batch)):
                profiler.before_step(done.step + 1)
                rate = optim.learning_rate(
                    done.step,
                    num_steps=num_steps,
                    peak=config.optim.lr,
                    warmup_fraction=config.optim.warmup_fraction,
                )
                optim.set_learning_rate(optimizer, rate)

                # Gradients of the mean loss over the global batch, in parts where memory is short
                losses, logits = [], []
                stop_of_all: Callable[[], int] | None = None
                parts = _parts(batch, config.train.accumulation_steps)
                for number, (pixels, part_labels, part_rows) in enumerate(parts):
                    with clock.transfers():
                        images = to_grey(pixels, ranks.device, precision.weights)  # (b, 1, H, W)
                        targets = torch.from_numpy(part_labels).to(ranks.device)  # (b,)
                        rows = torch.from_numpy(part_rows).to(ranks.device)  # (b,)
                    last = number == len(parts) - 1
                    images = augment(
                        images,
                        rows,
                        seed=config.train.seed,
                        epoch=done.epoch,
                        strength=config.augment,
                    ).contiguous(memory_format=torch.channels_last)
                    with ranks.synchronized(wrapped, last=last):
                        with precision.autocast():
                            part_logits = network(images)  # (b,)
                        part_losses = optim.image_losses(
                            part_logits.to(precision.losses), targets,
                            log_odds=log_odds, smoothing=config.optim.label_smoothing, weights=weights,
                        )  # fmt: skip
                        # DistributedDataParallel divides by the number of ranks, and the sum must
                        # not be
                        mean = part_losses.sum() * (ranks.world_size / batch.num_global)
                        if last:  # ranks agree on stopping while they compute the gradients
                            elapsed_s = time.monotonic() - started
                            stop = _stop_reason(
                                config.train, done.step + 1, asked_to_stop(), elapsed_s=elapsed_s
                            )
                            stop_of_all = ranks.find_largest(stop)
                        precision.scaler.scale(mean).backward()
                    losses.append(part_losses.detach())
                    logits.append(part_logits.detach())

                # The guard: all ranks hold the same gradients, so all come to the same verdict
                # before the step
                precision.scaler.unscale_(optimizer)
                grad_norm = float(optim.clip_gradients(model.parameters(), config.optim.clip_norm))
                batch_losses = torch.cat(losses)
                if not np.isfinite(grad_norm) and not precision.overflowed(ranks, batch_losses):
                    _refuse_not_finite(
                        batch, batch_losses, grad_norm, done, ranks=ranks, name_of=name_of
                    )
                precision.scaler.step(optimizer)
                precision.scaler.update()
                optimizer.zero_grad(set_to_none=True)
                optim.update_average(average, model, step=done.step, decay=config.optim.ema_decay)

                done.loss_sum += float(batch_losses.double().sum())
                done.num_correct += int(
                    np.count_nonzero((torch.cat(logits) > 0).cpu().numpy() == batch.labels)
                )
                done.num_seen += len(batch.labels)
                done.step += 1
                done.batch += 1
                bar.update()
                ranks.note(done.step)
                if steps_here == 0:
                    ranks.set_timeout(config.train.step_timeout_s)
                steps_here += 1
                profiler.after_step(done.step)
                assert stop_of_all is not None  # there is a last part
                stop = stop_of_all()
                if stop == _STOP_ASKED:
                    save(None)
                    raise _stopped(done, train.num_batches)
                if stop:
                    break
                if config.checkpoint.every and done.step % config.checkpoint.every == 0:
                    save(None)

        epoch_s = time.monotonic() - epoch_began
        loss_sum, num_correct, num_seen = ranks.sum(
            torch.tensor([done.loss_sum, done.num_correct, done.num_seen], dtype=torch.float64)
        ).tolist()
        eval_began = time.monotonic()
        predictions = predict_split(average, val, ranks=ranks)
        shifted = predict_split(
            average, val, ranks=ranks, shift=config.augment, draws=config.evaluate.shift_draws
        )
        eval_s = time.monotonic() - eval_began
        val_losses = optim.image_losses(
            torch.from_numpy(predictions.logits[0]),
            torch.from_numpy(val_labels),
            log_odds=log_odds,
            smoothing=0.0,
        )
        images_done = (done.batch - first_batch) * config.train.global_batch_size
        shown: float | None = None
        if observer is not None:
            shown = observer.after_epoch(
                EpochResult(
                    epoch=done.epoch,
                    step=done.step,
                    train_loss=loss_sum / max(num_seen, 1),
                    train_accuracy=num_correct / max(num_seen, 1),
                    val_loss=float(val_losses.mean()),
                    val=predictions,
                    shifted=shifted,
                    learning_rate=rate,
                    grad_norm=grad_norm,
                    images_per_s=images_done / epoch_s,
                    data_wait_share=clock.wait_s / epoch_s,
                    seconds={
                        **train.timings(), "wait": clock.wait_s, "transfer": clock.transfer_s,
                        "compute": epoch_s - clock.wait_s - clock.transfer_s, "eval": eval_s, "epoch": epoch_s,
                    },
                    peak_memory_mib=clock.peak_memory_mib(),
                )
            )  # fmt: skip
        score: float = ranks.from_main(shown)
        if score > done.best_score:
            done.best_score, done.best_epoch, done.epochs_without_better = score, done.epoch, 0
        else:
            done.epochs_without_better += 1
        done.epoch, done.batch = done.epoch + 1, 0
        done.loss_sum, done.num_correct, done.num_seen = 0.0, 0, 0
        save(score)
        if ranks.largest(int(asked_to_stop())):
            raise _stopped(done, train.num_batches)
        if stop:
            ended = "a limit of the train section is reached"
            break
    _logger.info("training ends after epoch %d, step %d: %s", done.epoch, done.step, ended)
    return done


def rank_batch_size(config: Train, *, world_size: int) -> int:
    """Images a rank and step. Raises `UserError`, naming sizes that would do, where ranks do not
    divide the batch.
    """
    size = config.global_batch_size
    if size % world_size or size // world_size < config.accumulation_steps:
        unit = world_size * config.accumulation_steps
        lower, upper = size // unit * unit, -(-size // unit) * unit
        nearest = " or ".join(str(value) for value in sorted({lower, upper}) if value > 0)
        raise UserError(
            f"train.global_batch_size = {size} cannot be shared by {world_size} ranks in parts of "
            f"train.accumulation_steps = {config.accumulation_steps}: the nearest that can is {nearest}"
        )
    return size // world_size


class Precision:
    """Which numbers the network computes in, and the scaler that fp16 needs."""

    def __init__(self, config: Train, device: torch.device) -> None:
        self.name = resolve_precision(config.precision, device)
        self.weights = torch.float64 if self.name == "fp64" else torch.float32
        self.losses = self.weights
        self._device = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> torch.autocast:
        """A context in which the forward pass runs in the lower precision."""
        lower = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self._device, dtype=lower, enabled=self.name in ("fp16", "bf16"))

    def overflowed(self, ranks: Ranks, losses: Tensor) -> bool:
        """Whether gradients that are not finite come from fp16's range alone: then the scaler
        skips the step.
        """
        if self.name != "fp16":
            return False
        return ranks.largest(int(not bool(torch.isfinite(losses).all()))) == 0


def resolve_precision(name: str, device: torch.device) -> str:
    """What `auto` means on a device: bf16 where it computes it natively, else fp16 on CUDA and
    fp32 on the CPU.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return (
        "bf16"
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else "off"
    )


class Clock:
    """Where the time of an epoch goes, on this rank."""

    def __init__(self, device: torch.device) -> None:
        self.wait_s = 0.0
        self.transfer_s = 0.0
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for each one added up."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.wait_s += time.monotonic() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def transfers(self) -> Iterator[None]:
        """Adds up the time of the block."""
        began = time.monotonic()
        yield
        self.transfer_s += time.monotonic() - began

    def peak_memory_mib(self) -> float:
        """Of the device since the epoch began on CUDA; of the process since its start on the
        CPU.
        """
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB


class Profiler:
    """Records the steps that `train.profile` names into a Chrome trace (chrome://tracing,
    Perfetto).
    """

    def __init__(self, steps: str, path: Path | None) -> None:
        self._path = path
        self._first, self._last = profile_steps(steps) if path is not None else (0, 0)
        self._running: torch.profiler.profile | None = None

    def before_step(self, step: int) -> None:
        """Begin where `step`, counted from 1, is the first to record."""
        if self._first and self._first <= step <= self._last and self._running is None:
            self._running = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._running.start()

    def after_step(self, step: int) -> None:
        """Write the trace where `step` was the last to record."""
        if self._running is not None and step >= self._last:
            assert self._path is not None
            self._running.stop()
            self._running.export_chrome_trace(str(self._path))
            self._running, self._first = None, 0
            _logger.info("steps up to %d are profiled in %s", step, self._path)


def profile_steps(text: str) -> tuple[int, int]:
    """The first and last step of `train.profile`; (0, 0) for none. Raises `ConfigError` where it
    is not A:B.
    """
    if not text:
        return 0, 0
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(
            f"train.profile = {text!r} is not allowed: it takes steps A:B, counted from 1, such as 10:20"
        )
    return int(first), int(last)


@contextmanager
def explaining_memory(config: Train, *, world_size: int) -> Iterator[None]:
    """Turns CUDA's lack of memory in the block into a `TrainingError` that says what to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        parts = 2 * config.accumulation_steps
        size = max(1, config.global_batch_size // world_size // parts)
        raise TrainingError(
            f"out of memory on the device with {config.global_batch_size // world_size // config.accumulation_steps} "
            f"images at a time: try --train.accumulation_steps={parts} ({size} at a time, the same result), or a "
            "smaller train.global_batch_size, model.width or images.size"
        ) from error


_STOP_LIMIT, _STOP_ASKED = 1, 2


def _ended(config: Train, done: Progress) -> str:
    """Why there is no further epoch; empty where there is one."""
    if done.epoch >= config.epochs:
        return f"all {config.epochs} epochs are done"
    if config.patience and done.epochs_without_better >= config.patience:
        return f"no better validation score for {done.epochs_without_better} epochs"
    return (
        "train.max_steps is reached" if config.max_steps and done.step >= config.max_steps else ""
    )


def _stop_reason(config: Train, step: int, asked: bool, *, elapsed_s: float) -> int:
    """Why to stop after step number `step`, from 1; 0 to go on. The largest of all ranks'
    reasons counts.
    """
    if asked:
        return _STOP_ASKED
    if config.max_steps and step >= config.max_steps:
        return _STOP_LIMIT
    return _STOP_LIMIT if config.max_minutes and elapsed_s >= config.max_minutes * 60 else 0


def _stopped(done: Progress, num_batches: int) -> StoppedError:
    return StoppedError(
        f"stopped as asked after step {done.step} (epoch {done.epoch + 1}, {done.batch} of {num_batches} batches): "
        "the state is saved, start again with the same --run_id to go on"
    )


def _parts(
    batch: Batch, num_parts: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]]:
    """This rank's share of a batch in nearly equal parts, the same number on every rank; a part
    may be empty.
    """
    cuts = [len(batch.rows) * part // num_parts for part in range(num_parts + 1)]
    return [
        (batch.images[low:high], batch.labels[low:high], batch.rows[low:high])
        for low, high in pairwise(cuts)
    ]


def _refuse_not_finite(
    batch: Batch,
    losses: Tensor,
    grad_norm: float,
    done: Progress,
    *,
    ranks: Ranks,
    name_of: Callable[[int], str],
) -> NoReturn:
    """Raise `TrainingError` naming the images whose loss is not finite, or else all of the
    batch.
    """
    bad = ~torch.isfinite(losses).cpu().numpy()
    found = [row for rows in ranks.gather(batch.rows[bad].tolist()) for row in rows]
    what = f"the loss of {len(found)} images is not finite"
    if not found:
        found = [row for rows in ranks.gather(batch.rows.tolist()) for row in rows]
        what = f"the gradient is not finite (norm {grad_norm}) though the losses are; its batch had {len(found)} images"
    shown = ", ".join(name_of(row) for row in found[:5]) + (", …" if len(found) > 5 else "")
    raise TrainingError(
        f"step {done.step + 1} (epoch {done.epoch + 1}, batch {done.batch + 1}): {what}: {shown}; the weights are as "
        "before the step. Look at these images; a lower optim.lr or optim.clip_norm, or train.precision=off, may help"
    )


def _restore(
    state: dict[str, Any], model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision,
    *, ranks: Ranks,
) -> Progress:  # fmt: skip
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    if precision.name == "fp16" and state["scaler"]:
        precision.scaler.load_state_dict(state["scaler"])
    done = Progress(**state["progress"])
    sums = state["sums"]
    if len(sums) != ranks.world_size:  # another world size: rank 0 takes over all sums
        total = [math.fsum(column) for column in zip(*sums, strict=True)]
        sums = [total] + [[0.0, 0.0, 0.0]] * (ranks.world_size - 1)
    loss_sum, num_correct, num_seen = sums[ranks.rank]
    done.loss_sum, done.num_correct, done.num_seen = loss_sum, int(num_correct), int(num_seen)
    return done
