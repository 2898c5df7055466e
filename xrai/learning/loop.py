"""The training loop, in full view: `fit`, `train_epoch`, `train_step`, `end_epoch`.

`fit` trains a network over all ranks and leaves the averaged weights of its best epoch in the
checkpoints. How an epoch's results are scored and shown is up to `Setup.after_epoch`, which the
command passes in.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xrai.config import Config, Train
from xrai.errors import ConfigError, CorruptError, StoppedError, TrainingError, UserError
from xrai.labels import LabelSpec
from xrai.learning import optim
from xrai.learning.augment import augment, uniform
from xrai.learning.batch import Batch, DeviceBatch, Loader, as_grey, to_device
from xrai.learning.checkpoint import MISFITS, CheckpointFolder, load_weights
from xrai.learning.distributed import Ranks
from xrai.learning.guard import Guard
from xrai.learning.network import Network
from xrai.learning.predictor import Predictions, predict_split
from xrai.log import get_logger, progress

_GO_ON, _STOP_LIMIT, _STOP_ASKED = 0, 1, 2  # the largest of all ranks' values counts
_AT_LIMIT = "a limit of the train section is reached"
_logger = get_logger(__name__)


@dataclass(frozen=True)
class EpochResult:
    """What `Setup.after_epoch` gets after each epoch; timings are those of rank 0."""

    epoch: int  # from 0
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val: Predictions
    shifted: Predictions
    lr: float
    grad_norm: float
    images_per_s: float
    data_wait_share: float
    seconds: dict[str, float]
    peak_memory_mib: float


@dataclass(frozen=True)
class Setup:
    """What a run hands to `fit`."""

    config: Config
    ranks: Ranks
    train: Loader
    val: Loader
    labels: LabelSpec
    counts: optim.Counts  # of the training split
    val_labels: NDArray[np.integer]  # (N,) or (N, C)
    name_of: Callable[[int], str] = str  # names a training image in messages
    # on rank 0 only: shows the results, and returns the epoch's score, larger is better (NaN: none)
    after_epoch: Callable[[EpochResult], float] | None = None
    checkpoints: CheckpointFolder | None = None  # rank 0 only
    facts: dict[str, Any] = field(default_factory=dict)  # constant over a run, saved with it
    resumed: dict[str, Any] | None = None  # the checkpoint to resume from, on every rank
    asked_to_stop: Callable[[], bool] = lambda: False
    profile_path: Path | None = None  # where to write the profile of `train.profile`


@dataclass
class Progress:
    """Where training stands: everything in a checkpoint that is not a tensor."""

    epoch: int = 0
    batch: int = 0  # the next one of the epoch
    step: int = 0  # of the whole run
    best_score: float = float("-inf")
    best_epoch: int = -1
    epochs_without_better: int = 0
    # sums over this rank's images since the epoch began, as `Training.settle` found them
    loss_sum: float = 0.0
    num_correct: int = 0  # labels
    num_known: int = 0
    num_seen: int = 0  # images
    train_s: float = 0.0  # over all epochs
    lr: float = 0.0  # of the last step
    grad_norm: float = math.nan  # of the last step, as `Training.settle` found it


def fit(model: Network, setup: Setup) -> Progress:
    """Train `model` in place; the best epoch's averaged weights end up in the checkpoints.

    Raises `StoppedError` after saving if any rank was asked to stop, and `TrainingError` if a loss
    or gradient is not finite, with the weights as they were before that step.
    """
    config, ranks = setup.config, setup.ranks
    rank_batch_size(config.train, world_size=ranks.world_size)
    training = Training(model, setup)
    done = training.done
    profiler = Profiler(config.train.profile, setup.profile_path)
    first_step = done.step
    while not (reason := _end_reason(config.train, done)):
        stop = ranks.largest(training.limit(done.step))
        if stop and done.batch == 0:
            reason = _AT_LIMIT
            break
        clock = Clock(ranks.device)
        if not stop:
            stop = train_epoch(training, clock, profiler, first_step=first_step)
        end_epoch(training, clock)
        if ranks.largest(int(setup.asked_to_stop())):
            raise _stopped(done, setup.train.num_batches)
        if stop:
            reason = _AT_LIMIT
            break
    profiler.end(done.step)
    _logger.info("training ends after epoch %d, step %d: %s", done.epoch, done.step, reason)
    return done


def train_epoch(
    training: "Training", clock: "Clock", profiler: "Profiler", *, first_step: int
) -> int:
    """The steps of an epoch that are not done yet; returns `_STOP_LIMIT` where a limit ended it.

    `first_step` is the number of steps done before this process. Raises `StoppedError`, see `fit`.
    """
    setup, done = training.setup, training.done
    config, ranks = setup.config, setup.ranks
    training.model.train()
    with progress(
        f"epoch {done.epoch + 1}/{config.train.epochs}",
        total=setup.train.num_batches,
        unit="steps",
        closing_line=False,
        done=done.batch,
    ) as bar:
        batches = clock.waits(setup.train.epoch(done.epoch, start=done.batch))
        for batch in to_device(batches, ranks.device, timed=clock.transfers):
            clock.num_images += batch.num_global
            profiler.before_step(done.step + 1)
            stop = train_step(training, batch, clock)
            profiler.after_step(done.step)
            if done.step == first_step + 1:
                ranks.set_timeout(config.train.step_timeout_s)
            bar.update()
            if stop == _STOP_ASKED:
                training.save(None)
                raise _stopped(done, setup.train.num_batches)
            if stop:
                return stop
            if done.step % config.train.log_every == 0:
                training.settle()
            if config.checkpoint.every and done.step % config.checkpoint.every == 0:
                training.save(None)
    return _GO_ON


class Training:
    """A training under way: what its steps change, and how that is saved and restored."""

    def __init__(self, model: Network, setup: Setup) -> None:
        config, ranks = setup.config, setup.ranks
        self.setup = setup
        self.precision = Precision(config.train, ranks.device)
        self.model = model
        model.to(  # type: ignore[call-overload]
            device=ranks.device, dtype=self.precision.weights, memory_format=torch.channels_last
        )
        self.average = deepcopy(model).requires_grad_(False)
        heads = model.head_prefixes()
        self.body = [p for name, p in model.named_parameters() if not name.startswith(heads)]
        self.optimizer = optim.make_optimizer(model, config.optim)
        self.guard = Guard(ranks, precision=self.precision.name, dtype=self.precision.weights)
        self.done = done = Progress()
        if setup.resumed is not None:
            self._restore(setup.resumed)
            done = self.done
        # On the device: the norm of the last step's gradient, and what `Progress` sums up
        self._norm = torch.full_like(self.guard.factor, done.grad_norm)
        sums = [done.loss_sum, done.num_correct, done.num_known]
        self._sums = torch.tensor(sums, dtype=torch.float64, device=ranks.device)
        self._wrap()
        self.objective = optim.make_objective(setup.labels, setup.counts, config.optim)
        on_device = self.objective.to(ranks.device, self.precision.weights)
        self.losses = partial(optim.image_losses, objective=on_device)
        self.task = setup.labels.task
        self.num_steps = config.train.epochs * setup.train.num_batches
        self._started = time.monotonic() - self.done.train_s

    def _wrap(self) -> None:
        """Wrap the model for the ranks: in the first epochs only the head may have gradients."""
        config, ranks = self.setup.config.train, self.setup.ranks
        for parameter in self.body:
            parameter.requires_grad_(self.done.epoch >= config.freeze_epochs)
        self.wrapped = ranks.wrap(self.model)
        self.network = torch.compile(self.wrapped) if config.compile else self.wrapped

    def stop_reason(self) -> int:
        """Why this rank would stop after the step under way."""
        return _STOP_ASKED if self.setup.asked_to_stop() else self.limit(self.done.step + 1)

    def limit(self, step: int) -> int:
        """`_STOP_LIMIT` where a limit ends training at `step`; one step is always trained."""
        config = self.setup.config.train
        elapsed_s = time.monotonic() - self._started
        is_late = 0 < config.max_minutes * 60 <= elapsed_s
        return _STOP_LIMIT if step and (is_late or 0 < config.max_steps <= step) else _GO_ON

    def judge(self, batch: DeviceBatch, losses: Tensor, logits: Tensor, norm: Tensor) -> Tensor:
        """Sum up a step and have the guard judge it, on the device; returns whether to skip it."""
        num_correct, num_known = optim.count_right(logits, batch.labels, self.task)
        self._sums += torch.stack([losses.double().sum(), num_correct.double(), num_known.double()])
        self._norm, done = norm, self.done
        place = f"step {done.step + 1} (epoch {done.epoch + 1}, batch {done.batch + 1})"
        return self.guard.judge(place, batch.own_rows, losses, norm)

    def settle(self) -> None:
        """Wait for the device, and fetch the sums and the norm of the steps so far. Nowhere else in
        a training step does Python wait.

        Raises `TrainingError` naming the images of a step that the guard refused.
        """
        done, small = self.done, torch.stack([self.guard.factor, self._norm]).double()
        factor, done.grad_norm, *sums = torch.cat([small, self._sums]).tolist()
        if math.isnan(factor):
            self.guard.refuse(self.setup.name_of)
        self.guard.forget()
        done.loss_sum, done.num_correct, done.num_known = sums[0], int(sums[1]), int(sums[2])

    def begin_epoch(self) -> None:
        """Begin the next epoch: nothing is summed up yet."""
        done = self.done
        done.epoch, done.batch = done.epoch + 1, 0
        done.loss_sum, done.num_correct, done.num_known, done.num_seen = 0.0, 0, 0, 0
        self._sums.zero_()
        if done.epoch == self.setup.config.train.freeze_epochs > 0:
            self._wrap()

    def save(self, score: float | None) -> None:
        """Save a checkpoint; called on every rank, for each has sums of its own."""
        self.settle()
        optim.copy_statistics(self.average, self.model)
        done = self.done
        done.train_s = time.monotonic() - self._started
        sums = self.setup.ranks.gather(own_sums(done))

        def write() -> None:
            if self.setup.checkpoints is None:
                return
            state = {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.scaler.state_dict(),
                "progress": asdict(done),
                "sums": sums,
                "facts": self.setup.facts,
            }
            self.setup.checkpoints.save(state, step=done.step, epoch=done.epoch, score=score)

        self.setup.ranks.on_main(write)

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises `CorruptError` if it holds something else."""
        load_weights(self.model, state.get("model"))
        load_weights(self.average, state.get("average"))
        try:
            optim.restore(self.optimizer, state["optimizer"])
            if self.precision.name == "fp16" and state["scaler"]:
                self.precision.scaler.load_state_dict(state["scaler"])
            self.done = done = Progress(**state["progress"])
            self._restore_sums(state["sums"])
            values = vars(done).items()
            is_kind = all(type(value) is type(getattr(Progress, name)) for name, value in values)
            if not is_kind or min(done.epoch, done.batch, done.step, done.best_epoch + 1) < 0:
                raise ValueError(f"{done}")
        except MISFITS as error:
            raise CorruptError(
                f"a checkpoint does not hold the state of a training: {error!r}"
            ) from error

    def _restore_sums(self, sums: list[list[float]]) -> None:
        done, ranks = self.done, self.setup.ranks
        if len(sums) != ranks.world_size:  # another world size: rank 0 takes over all sums
            total = [math.fsum(column) for column in zip(*sums, strict=True)]
            sums = [total] + [[0.0] * len(total)] * (ranks.world_size - 1)
        done.loss_sum, *counts = sums[ranks.rank]
        done.num_correct, done.num_known, done.num_seen = map(int, counts)


def own_sums(done: Progress) -> list[float]:
    """What this rank has summed up since the epoch began."""
    return [done.loss_sum, done.num_correct, done.num_known, done.num_seen]


def train_step(training: Training, batch: DeviceBatch, clock: "Clock") -> int:
    """One step on a global batch, of which `batch` is this rank's share; returns why to stop.

    Nothing here waits for the device: its numbers stay there until `Training.settle`.
    """
    config, ranks, done = training.setup.config, training.setup.ranks, training.done
    precision, optimizer = training.precision, training.optimizer
    num_steps = training.num_steps
    done.lr = optim.learning_rate(done.step, num_steps=num_steps, config=config.optim)
    for group in optimizer.param_groups:
        group["lr"] = done.lr * group["scale"]

    # Gradients of the mean loss over the global batch, in parts to save memory
    losses: list[Tensor] = []
    logits: list[Tensor] = []
    stop_of_all: Callable[[], int] = int  # int() is _GO_ON; the last part replaces it
    # As many on every rank, and none is empty: batch statistics of no image are not defined
    num_parts = min(config.train.accumulation_steps, max(1, batch.num_global // ranks.world_size))
    cuts = [len(batch.rows) * part // num_parts for part in range(num_parts + 1)]
    for part, (low, high) in enumerate(pairwise(cuts), start=1):
        with clock.transfers():
            images = as_grey(batch.images[low:high], precision.weights)
        images = _draw_changes(training, images, batch.rows[low:high])
        is_last = part == num_parts
        with ranks.synchronized(training.wrapped, last=is_last):
            with precision.autocast():
                part_logits = training.network(images)  # (b, C)
            part_losses = training.losses(part_logits.to(precision.weights), batch.labels[low:high])
            # DistributedDataParallel divides the sum over ranks by their number; undo that
            mean = part_losses.sum() * (ranks.world_size / batch.num_global)
            if is_last:  # ranks agree on stopping while they compute the gradients
                stop_of_all = ranks.find_largest(training.stop_reason())
            precision.scaler.scale(mean * training.guard.factor).backward()
        losses.append(part_losses.detach())
        logits.append(part_logits.detach())

    precision.scaler.unscale_(optimizer)
    norm = optim.clip_gradients(training.model.parameters(), config.optim.clip_norm)
    is_bad = training.judge(batch, torch.cat(losses), torch.cat(logits), norm)
    optim.step(optimizer, precision.scaler, is_bad)
    optimizer.zero_grad(set_to_none=True)
    decay = config.optim.ema_decay
    optim.update_average(training.average, training.model, step=done.step, decay=decay)
    done.num_seen += len(batch.rows)
    done.step, done.batch = done.step + 1, done.batch + 1
    ranks.note(done.step)
    return stop_of_all()


def _draw_changes(training: Training, images: Tensor, rows: Tensor) -> Tensor:
    """Augment grey values (b, 1, H, W), and draw which paths the network drops of these rows."""
    config, epoch = training.setup.config, training.done.epoch
    images = augment(
        images, rows, seed=config.train.seed, epoch=epoch, strength=config.augment
    ).contiguous(memory_format=torch.channels_last)
    if num_draws := training.model.num_draws:
        training.model.draw(uniform(rows, num_draws, seed=config.train.seed + 2, epoch=epoch))
    return images


def end_epoch(training: Training, clock: "Clock") -> None:
    """Validate the averaged weights, have rank 0 show and score them, and save a checkpoint."""
    setup, done = training.setup, training.done
    config, ranks = setup.config, setup.ranks
    training.settle()
    optim.copy_statistics(training.average, training.model)
    epoch_s = clock.elapsed_s()
    sums = ranks.sum(torch.tensor(own_sums(done), dtype=torch.float64))
    loss_sum, num_correct, num_known, num_seen = sums.tolist()
    predict = partial(predict_split, training.average, setup.val, ranks=ranks)
    val = predict()
    shifted = predict(shift=config.augment, draws=config.evaluate.shift_draws)
    eval_s = clock.elapsed_s() - epoch_s
    logits, labels = torch.from_numpy(val.logits[0]), torch.from_numpy(setup.val_labels)
    val_losses = optim.image_losses(logits, labels, training.objective.plain())

    def show() -> float:
        assert setup.after_epoch is not None  # on rank 0
        result = EpochResult(
            epoch=done.epoch,
            step=done.step,
            train_loss=loss_sum / max(num_seen, 1),
            train_accuracy=num_correct / max(num_known, 1),
            val_loss=float(val_losses.mean()),
            val=val,
            shifted=shifted,
            lr=done.lr,
            grad_norm=done.grad_norm,
            # not known where an earlier process did all of its steps
            images_per_s=clock.num_images / epoch_s if clock.num_images else math.nan,
            data_wait_share=clock.wait_s / epoch_s,
            seconds={**setup.train.timings(), **clock.seconds(epoch_s), "eval": eval_s},
            peak_memory_mib=clock.peak_memory_mib(),
        )
        return setup.after_epoch(result)

    score = ranks.on_main(show)
    if score > done.best_score:
        done.best_score, done.best_epoch, done.epochs_without_better = score, done.epoch, 0
    else:
        done.epochs_without_better += 1
    training.begin_epoch()
    training.save(score)


def rank_batch_size(config: Train, *, world_size: int) -> int:
    """Images per rank in a step. Raises `UserError` if the ranks do not divide the batch."""
    size = config.global_batch_size
    if size % world_size or size // world_size < config.accumulation_steps:
        unit = world_size * config.accumulation_steps
        lower, upper = size // unit * unit, -(-size // unit) * unit
        nearest = " or ".join(str(value) for value in sorted({lower, upper}) if value > 0)
        raise UserError(
            f"train.global_batch_size = {size} cannot be shared by {world_size} ranks in parts of "
            f"train.accumulation_steps = {config.accumulation_steps}: the nearest that can is "
            f"{nearest}"
        )
    return size // world_size


class Precision:
    """Which numbers the network computes in, and the scaler that fp16 needs."""

    def __init__(self, config: Train, device: torch.device) -> None:
        self.name = resolve_precision(config.precision, device)
        self.weights = torch.float64 if self.name == "fp64" else torch.float32  # of losses, too
        self._device = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> torch.autocast:
        """A context in which the forward pass runs in the lower precision."""
        lower = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self._device, dtype=lower, enabled=self.name in ("fp16", "bf16"))


def resolve_precision(name: str, device: torch.device) -> str:
    """What `auto` means on a device: bf16 where it is native, else fp16 on CUDA, fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_tile") else "off"


class Clock:
    """Where the time of an epoch goes, on this rank."""

    def __init__(self, device: torch.device) -> None:
        self.num_images = 0  # of all ranks
        self.wait_s = self._transfer_s = 0.0
        self._began = time.monotonic()
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def elapsed_s(self) -> float:
        """Seconds since the epoch began."""
        return time.monotonic() - self._began

    def waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; adds up the time spent waiting for each."""
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
        self._transfer_s += time.monotonic() - began

    def seconds(self, epoch_s: float) -> dict[str, float]:
        """The parts of an epoch of `epoch_s` seconds."""
        compute_s = epoch_s - self.wait_s - self._transfer_s
        return {"transfer": self._transfer_s, "compute": compute_s, "epoch": epoch_s}

    def peak_memory_mib(self) -> float:
        """On CUDA the device's peak in this epoch, else the process's peak since its start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB


class Profiler:
    """Records the steps that `train.profile` names as a Chrome trace, which Perfetto shows."""

    def __init__(self, steps: str, path: Path | None) -> None:
        self._path = path
        self._first, self._last = profile_steps(steps) if path is not None else (0, 0)
        self._running: torch.profiler.profile | None = None
        self._has_written = False

    def before_step(self, step: int) -> None:
        """Start if `step`, counted from 1, is the first to record."""
        if self._first <= step <= self._last and self._running is None:
            self._running = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._running.start()

    def after_step(self, step: int) -> None:
        """Write the trace if `step` was the last to record."""
        if self._running is not None and step == self._last:
            self._write(step)

    def end(self, step: int) -> None:
        """Write the trace if the training ends at `step`, before the last to record; warn where
        this process recorded nothing.
        """
        if self._running is not None:
            self._write(step)
        elif self._last and not self._has_written:
            _logger.warning(
                "no step of train.profile = %d:%d was recorded: this process ends after step %d",
                *(self._first, self._last, step),
            )

    def _write(self, step: int) -> None:
        assert self._running is not None
        self._running.stop()
        self._running.export_chrome_trace(str(self._path))
        self._running, self._has_written = None, True
        _logger.info("steps up to %d are profiled in %s", step, self._path)


def profile_steps(text: str) -> tuple[int, int]:
    """First and last step of `train.profile`, (0, 0) for none. Raises `ConfigError` unless A:B."""
    if not text:
        return 0, 0
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(
            f"train.profile = {text!r} is not allowed: it takes steps A:B, counted from 1, such as "
            "10:20"
        )
    return int(first), int(last)


@contextmanager
def explaining_memory(config: Train, *, world_size: int) -> Iterator[None]:
    """Turns CUDA's out-of-memory error into a `TrainingError` that says what to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = config.global_batch_size // world_size
        parts = 2 * config.accumulation_steps
        raise TrainingError(
            f"out of memory on the device with {share // config.accumulation_steps} images at a "
            f"time: try --train.accumulation_steps={parts} ({max(1, share // parts)} at a time, "
            "the same result but for batch statistics), or a smaller train.global_batch_size, "
            "model.width or images.size"
        ) from error


def _end_reason(config: Train, done: Progress) -> str:
    """Why there is no further epoch, apart from limits; empty if there is one."""
    if done.epoch >= config.epochs:
        return f"all {config.epochs} epochs are done"
    if 0 < config.patience <= done.epochs_without_better:
        return f"no better validation score for {done.epochs_without_better} epochs"
    return ""


def _stopped(done: Progress, num_batches: int) -> StoppedError:
    return StoppedError(
        f"stopped as asked after step {done.step} (epoch {done.epoch + 1}, {done.batch} of "
        f"{num_batches} batches): the state is saved, start again with the same --run_id to resume"
    )
