"""The ranks of a job: who they are, and the few things that they tell each other.

The one home of torch.distributed. Without torchrun a job is one rank. Gradients travel by the
device's own backend (nccl or gloo), decisions and small objects always by gloo on the CPU, so that
a decision never waits for the device. The CUDA and nccl paths have not been run yet.
"""

import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.rendezvous import rendezvous

from xrai.errors import TrainingError, UserError, XraiError
from xrai.files import explaining_disk
from xrai.log import counted, get_logger

T = TypeVar("T")

# "pair closure" is all that gloo says in a collective whose connection another rank's time-out has
# closed
_COLLECTIVE_WORDS = ("gloo", "NCCL", "ProcessGroup", "pair closure")

_STORE_ANSWERS_WITHIN_S = 10.0
_CALL_EVERY_S = 5.0
_SILENT_S = 20.0  # without a sign of life, after which a rank is called silent
_TELL_EVERY_S = 60.0
_logger = get_logger(__name__)

# What ends torchrun itself, not a rank: its store, its nodes, or a signal
TORCHRUN_FAILURES = (RendezvousError, dist.DistError, SignalException)

record_failures = record  # torchrun's: writes a rank's traceback to TORCHELASTIC_ERROR_FILE


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job, and its device."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    _control: Any = None  # the gloo group for decisions
    _store: Any = None  # where each rank notes its last step, for the others' messages
    _roll: "RollCall | None" = None  # which ranks are alive; None: there is one rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest of all ranks' values: any rank can make all of them stop."""
        return self.find_largest(value)()

    def find_largest(self, value: int) -> Callable[[], int]:
        """Start finding the largest of all ranks' values; calling the result waits for it."""
        if self.world_size == 1:
            return lambda: value
        tensor = torch.tensor(value, dtype=torch.int64)
        with self.explaining("to agree whether to go on"):
            work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control, async_op=True)

        def wait() -> int:
            with self.explaining("to agree whether to go on"):
                work.wait()
            return int(tensor)

        return wait

    def is_any(self, flag: Tensor) -> Tensor:
        """Whether a flag, (), is true on any rank, as a tensor on the device: nothing waits."""
        if self.world_size == 1:
            return flag
        found = flag.float()
        with self.explaining("to say whether their losses are finite"):
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found > 0

    def sum(self, values: Tensor) -> Tensor:
        """The sums over ranks of a small float64 tensor on the CPU, the same on every rank."""
        if self.world_size == 1:
            return values
        values = values.clone()
        with self.explaining("to add up their sums"):
            dist.all_reduce(values, group=self._control)
        return values

    def from_main(self, value: T | None) -> T:
        """Rank 0's value, on every rank: rank 0 decides."""
        if self.world_size == 1:
            return value  # type: ignore[return-value]
        box = [value]
        with self.explaining("to hear from rank 0"):
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0's result of `work`, on every rank. Every rank also raises the `XraiError` that it
        raises, or that `explaining_disk` makes of an `OSError`.
        """
        outcome: tuple[T | None, XraiError | None] = (None, None)
        if self.is_main:
            try:
                with explaining_disk():
                    outcome = (work(), None)
            except XraiError as error:
                if self.world_size == 1:
                    raise
                outcome = (None, error)
        value, failure = self.from_main(outcome)
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """All ranks' values, in the order of ranks, on every rank. Values may differ in size."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.explaining("to collect what they have"):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def note(self, step: int) -> None:
        """Note that this rank has done `step` steps, for the others' messages should it vanish."""
        if self.world_size > 1:
            self._store.set(f"xrai/rank{self.rank}", f"{step} {time.time()}")

    def set_timeout(self, timeout_s: float) -> None:
        """From now on, wait at most this long for the other ranks."""
        if self.world_size > 1:
            for group in {dist.group.WORLD, self._control}:
                group.set_timeout(timedelta(seconds=timeout_s))

    @contextmanager
    def explaining(self, purpose: str = "to do their part") -> Iterator[None]:
        """Turns a failed collective in the block into a `TrainingError` that names the missing."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            is_collective = isinstance(error, dist.DistError) or any(
                words in str(error) for words in _COLLECTIVE_WORDS
            )
            if self.world_size == 1 or not is_collective:
                raise
            raise TrainingError(
                f"rank {self.rank} of {self.world_size} waited for the other ranks {purpose}: "
                f"{self._missing()} ({str(error).splitlines()[0]}); if a rank failed by itself, "
                "its own error says why"
            ) from error

    def _missing(self) -> str:
        """Which ranks are behind, by the steps that they have noted."""
        found = _answer(self._notes, within_s=_STORE_ANSWERS_WITHIN_S)
        if isinstance(found, str):
            return f"rank 0, whose machine has the job's store, is gone: {found}"
        silent = [
            f"rank {rank} has not begun" for rank in range(self.world_size) if rank not in found
        ]
        newest = max((step for step, _ in found.values()), default=0)
        behind = [
            f"rank {rank} was last heard of {age_s:.0f} s ago, after step {step}"
            for rank, (step, age_s) in found.items()
            if rank != self.rank and (step < newest or len(found) == self.world_size == 2)
        ]
        gone = [
            f"rank {rank} has been silent for {silent_s:.0f} s"
            for rank, silent_s in (self._roll.silent() if self._roll else {}).items()
        ]
        return ", ".join([*silent, *behind] or gone) or "all of them have noted the same step"

    def _notes(self) -> dict[int, tuple[int, float]]:
        """The step that each rank noted, and how many seconds ago; without those that have not."""
        found = {}
        for rank in range(self.world_size):
            if self._store.check([key := f"xrai/rank{rank}"]):
                step, when = self._store.get(key).decode().split()
                found[rank] = (int(step), time.time() - float(when))
        return found

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel, or itself if there is one rank."""
        if self.world_size == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True
        )

    def synchronized(self, model: nn.Module, last: bool) -> Any:
        """A context for one backward pass; only the last of an accumulation exchanges gradients."""
        if last or self.world_size == 1:
            return nullcontext()
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        return model.no_sync()


class RollCall:
    """Which ranks are alive while they wait for each other: each raises its count in the job's
    store every 5 s, and reads those of the others. A rank whose count stands still for 20 s is
    named in the log.

    Calls to the store have no deadline: if its machine vanishes, they hang until TCP gives up. So
    one thread makes the calls, on a connection of its own, and another one writes the log.
    """

    def __init__(self, store: Any, *, rank: int, world_size: int) -> None:
        self._store, self._rank = store.clone(), rank
        now = time.monotonic()
        self._counts = dict.fromkeys(range(world_size), b"")
        self._changed = dict.fromkeys(range(world_size), now)  # when each count last grew
        self._ended = threading.Event()
        for work in (self._call, self._tell):
            threading.Thread(target=work, daemon=True).start()

    def silent(self) -> dict[int, float]:
        """The ranks that have been silent for 20 s or more, and for how many seconds.

        It is rank 0 alone while its machine, which has the store, does not answer.
        """
        now = time.monotonic()
        silent = {rank: now - heard for rank, heard in self._changed.items()}
        if silent[self._rank] >= _SILENT_S:  # this rank's own count does not come back
            return {0: silent[self._rank]}
        return {rank: silent_s for rank, silent_s in silent.items() if silent_s >= _SILENT_S}

    def close(self) -> None:
        """Stop calling; what was heard stays."""
        self._ended.set()

    def _call(self) -> None:
        count = 0
        try:
            while not self._ended.wait(0 if count == 0 else _CALL_EVERY_S):
                count += 1
                self._store.set(f"xrai/alive{self._rank}", str(count))
                for rank, before in self._counts.items():
                    key = f"xrai/alive{rank}"
                    found = self._store.get(key) if before or self._store.check([key]) else b""
                    if found != before:
                        self._counts[rank], self._changed[rank] = found, time.monotonic()
        except (RuntimeError, dist.DistError):
            return  # the store has ended: the next collective fails, and says so

    def _tell(self) -> None:
        told = dict.fromkeys(self._counts, 0.0)
        while not self._ended.wait(_CALL_EVERY_S):
            for rank, silent_s in self.silent().items():
                if time.monotonic() - told[rank] >= _TELL_EVERY_S:
                    told[rank] = time.monotonic()
                    _logger.warning(
                        "waiting for rank %d, which has been silent for %.0f s", rank, silent_s
                    )


def _answer(ask: Callable[[], T], *, within_s: float) -> T | str:
    """The result of a call to the job's store, or a text that says why there is none in time.

    The call runs in a thread of its own, because it has no deadline and blocks signal handlers.
    """
    found: list[T | str] = []

    def call() -> None:
        try:
            found.append(ask())
        except (RuntimeError, dist.DistError) as error:
            found.append(str(error).splitlines()[0])

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(within_s)
    return found[0] if found else f"no answer within {within_s:.0f} s"


def summed(values: Tensor) -> Tensor:
    """The sums of a tensor over all ranks, on its device; gradients flow back to all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    found: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return found


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class Place(NamedTuple):
    """A process's place in the job that torchrun, or another launcher, started it for."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    is_torchrun: bool = False


def own_place() -> Place:
    """The place that the environment states, if it states all of it.

    A stray RANK or WORLD_SIZE does not make a process a rank.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    told = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **os.environ}
    texts = [told.get(name, "") for name in names]
    if "MASTER_ADDR" not in told or not all(text.isdecimal() for text in texts):
        return Place()
    rank, world_size, _, local_rank, local_world_size = map(int, texts)
    is_local_known = "LOCAL_WORLD_SIZE" in os.environ  # not every launcher states it
    if rank >= world_size or (is_local_known and local_rank >= local_world_size):
        return Place()
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return Place(rank, world_size, local_rank, local_world_size, is_torchrun)


RanksFailed = ChildFailedError  # torchrun raises it where a rank fails after --max_restarts


def explain_ranks(error: ChildFailedError) -> str:
    """Say in one line which rank of this machine failed first, and why."""
    rank, failure = error.get_first_failure()
    said: Any = failure.message  # what the rank's error file holds, or torch's words for a signal
    text = said["message"] if isinstance(said, dict) else said
    if failure.exitcode > 0 and failure.error_file == "<N/A>":
        text = f"exit status {failure.exitcode}"
    return f"rank {rank} failed: {text}"


def explain_torchrun(error: BaseException, *, host: str) -> str:
    """Say in one line why one of `TORCHRUN_FAILURES` ended torchrun, whose rendezvous is `host`."""
    if isinstance(error, SignalException):
        return (
            f"stopped by {signal.Signals(error.sigval).name}: ranks that saved their state say so "
            "above; start again with the same --run_id to resume"
        )
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"the machines of this training did not all come to {host} in time (join_timeout): one "
            "did not start, or has another --nnodes or --rdzv_id"
        )
    if isinstance(error, RendezvousClosedError):
        return "another machine has ended this training; its own last lines say why"
    cause = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"rank 0's machine {host}, at which the machines of this training meet, has ended or "
        f"cannot be reached ({cause}): its own last lines say why; this process ends, and the "
        "training resumes when all machines have been started again"
    )


def refuse_missing_devices(num_processes: int) -> None:
    """Raise `UserError` where so many processes of a machine would share its CUDA devices."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < num_devices < num_processes:
        raise UserError(
            f"{num_processes} processes on this machine but {counted(num_devices, 'CUDA device')}: "
            "give torchrun --nproc_per_node at most the number of devices"
        )


@contextmanager
def join(*, timeout_s: float, share_device: bool = False) -> Iterator[Ranks]:
    """Join the job that torchrun started (or be one process), and leave it at the end.

    `timeout_s` is how long one rank waits for another. On CUDA the process takes the device of its
    local rank; with `share_device`, for tests, all take the first one and communicate by gloo,
    since NCCL refuses two ranks on one device. Raises `UserError` if there are more ranks on the
    machine than CUDA devices.
    """
    place = own_place()
    rank, world_size = place.rank, place.world_size
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = 0 if share_device else place.local_rank
        if not share_device:
            refuse_missing_devices(place.local_world_size)
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    if world_size == 1 and not place.is_torchrun:
        yield Ranks(0, 1, 0, 1, device)
        return
    timeout = timedelta(seconds=timeout_s)
    has_nccl = device.type == "cuda" and not share_device
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    dist.init_process_group(
        "nccl" if has_nccl else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if has_nccl else None,
    )
    roll = None
    try:
        control = dist.new_group(backend="gloo", timeout=timeout) if has_nccl else dist.group.WORLD
        roll = RollCall(store, rank=rank, world_size=world_size) if world_size > 1 else None
        yield Ranks(*place[:4], device, control, store, roll)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # its frames hold the model, see below
        raise
    finally:
        if roll is not None:
            roll.close()
        gc.collect()  # frees DistributedDataParallel, which must go before its process group
        dist.destroy_process_group()
