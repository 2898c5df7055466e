"""The ranks of a job: who they are, and the few things that they tell each other.

The one home of torch.distributed. Without torchrun a job is one rank. Gradients travel by the
device's own backend (nccl or gloo), decisions and small objects always by gloo on the CPU, so that
a decision never waits for the device. The CUDA and nccl paths have not been run yet.
"""

import gc
import os
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
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from xrai.errors import TrainingError, UserError, XraiError
from xrai.files import explaining_disk

T = TypeVar("T")

# "pair closure" is all that gloo says in a collective whose connection another rank's time-out has
# closed
_COLLECTIVE_WORDS = ("gloo", "NCCL", "ProcessGroup", "pair closure")

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
        """Rank 0's result of `work`, on every rank; so is an `XraiError` that it raises, or that
        `explaining_disk` makes of what it raises.
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
        """From now on wait at most so long for the other ranks."""
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
        """Who is behind, by the steps that the ranks have noted."""
        found = {}  # the step that each rank noted, and how many seconds ago
        try:
            for rank in range(self.world_size):
                if self._store.check([key := f"xrai/rank{rank}"]):
                    step, when = self._store.get(key).decode().split()
                    found[rank] = (int(step), time.time() - float(when))
        except (RuntimeError, dist.DistError):
            return "the job's store is gone, so at least the process that holds it has ended"
        silent = [
            f"rank {rank} has not begun" for rank in range(self.world_size) if rank not in found
        ]
        newest = max((step for step, _ in found.values()), default=0)
        behind = [
            f"rank {rank} was last heard of {age_s:.0f} s ago, after step {step}"
            for rank, (step, age_s) in found.items()
            if rank != self.rank and (step < newest or len(found) == self.world_size == 2)
        ]
        return ", ".join([*silent, *behind]) or "all of them have noted the same step"

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


@contextmanager
def join(*, timeout_s: float) -> Iterator[Ranks]:
    """Join the job that torchrun started (or be one process), and leave it at the end.

    `timeout_s` is how long one rank waits for another. On CUDA the process takes the device of its
    local rank. Raises `UserError` if there are more ranks on the machine than CUDA devices.
    """
    place = own_place()
    rank, world_size = place.rank, place.world_size
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if place.local_world_size > torch.cuda.device_count():
            raise UserError(
                f"{place.local_world_size} processes on this machine but "
                f"{torch.cuda.device_count()} CUDA devices: give torchrun --nproc_per_node at most "
                "the number of devices"
            )
        torch.cuda.set_device(place.local_rank)
        device = torch.device("cuda", place.local_rank)
    if world_size == 1 and not place.is_torchrun:
        yield Ranks(0, 1, 0, 1, device)
        return
    timeout = timedelta(seconds=timeout_s)
    is_cuda = device.type == "cuda"
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if is_cuda else None,
    )
    try:
        control = dist.new_group(backend="gloo", timeout=timeout) if is_cuda else dist.group.WORLD
        yield Ranks(*place[:4], device, control, store)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model, see below
        raise
    finally:
        gc.collect()  # frees DistributedDataParallel, which must go before its process group
        dist.destroy_process_group()
