"""The ranks of a job: who they are, and the few things that they say to each other.

The one home of torch.distributed. Without torchrun a job is one rank and nothing is said. Two
process groups serve two purposes: gradients travel by the device's own backend (nccl or gloo),
decisions and small objects always by gloo on the CPU, so that a decision never waits for the
device. The CUDA and nccl paths have not been run yet. Ranks on one machine that compute on its
processors say what they say at each step in memory that they share (`xrai.learning.exchange`).
"""

import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from xrai.errors import TrainingError, UserError, XraiError
from xrai.learning.exchange import (
    GRADIENTS,
    WORDS,
    MissingRankError,
    Neighbours,
    SharedMean,
    create_memory,
)
from xrai.log import get_logger

T = TypeVar("T")

# "pair closure" is all that gloo says in a collective whose connection another one's timeout has
# closed
_COLLECTIVE_WORDS = ("gloo", "NCCL", "ProcessGroup", "pair closure")

_ONE_BUCKET_MIB = 1 << 20  # more than the gradients of any network here
_logger = get_logger(__name__)

record_failures = (
    record  # torchrun's: a rank's traceback goes to the file that TORCHELASTIC_ERROR_FILE names
)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job, and its device."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    _control: Any = None  # the gloo group of decisions
    _store: Any = None  # where each rank notes its last step, for the others' messages
    _near: Neighbours | None = (
        None  # all ranks, where they are on one machine and compute on its processors
    )

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest of all ranks' values: any rank can ask all to stop."""
        return self.find_largest(value)()

    def find_largest(self, value: int) -> Callable[[], int]:
        """Begin to find the largest of all ranks' values; call what it returns, on every rank,
        to wait for it.
        """
        if self.world_size == 1:
            return lambda: value
        if self._near is not None:
            return self._leave_word(value, self._near)
        tensor = torch.tensor(value, dtype=torch.int64)
        with self.explaining("to agree on going on"):
            under_way = dist.all_reduce(
                tensor, op=dist.ReduceOp.MAX, group=self._control, async_op=True
            )

        def wait() -> int:
            with self.explaining("to agree on going on"):
                under_way.wait()
            return int(tensor)

        return wait

    def _leave_word(self, value: int, near: Neighbours) -> Callable[[], int]:
        number = near.leave(value, purpose=WORDS)

        def wait() -> int:
            with self.explaining("to agree on going on"):
                return near.largest(number, purpose=WORDS)

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
        """Rank 0's result of `work`, on every rank; an `XraiError` that rank 0 meets is raised
        on every rank.
        """
        outcome: tuple[T | None, XraiError | None] = (None, None)
        if self.is_main:
            try:
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
        """Leave word that this rank has done `step` steps; should it go missing, the others can
        say since when.
        """
        if self._near is not None:
            self._near.note(step)
        elif self.world_size > 1:
            self._store.set(f"xrai/rank{self.rank}", f"{step} {time.time()}")

    def set_timeout(self, timeout_s: float) -> None:
        """From now on wait at most so long for the other ranks."""
        if self.world_size > 1:
            for group in {dist.group.WORLD, self._control}:
                group.set_timeout(timedelta(seconds=timeout_s))
        if self._near is not None:
            self._near.timeout_s = timeout_s

    @contextmanager
    def explaining(self, purpose: str = "to do their part") -> Iterator[None]:
        """Turns a collective's failure in the block into a `TrainingError` that names the ranks
        that are missing.
        """
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if self.world_size == 1 or not _is_collective(error):
                raise
            raise TrainingError(
                f"rank {self.rank} of {self.world_size} waited for the other ranks {purpose}: {self._missing()} "
                f"({str(error).splitlines()[0]}); if a rank failed by itself, its own error says why"
            ) from error

    def _missing(self) -> str:
        """Who is behind, by the words that the ranks have left."""
        try:
            found = self._notes()
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

    def _notes(self) -> dict[int, tuple[int, float]]:
        """The step that each rank has noted, and how many seconds ago."""
        if self._near is not None:
            return self._near.notes()
        found = {}
        for rank in range(self.world_size):
            if self._store.check([key := f"xrai/rank{rank}"]):
                step, when = self._store.get(key).decode().split()
                found[rank] = (int(step), time.time() - float(when))
        return found

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over ranks (DistributedDataParallel), or itself for
        one rank.

        Ranks on one machine that compute on its processors average them in shared memory, where
        that has room.
        """
        if self.world_size == 1:
            return model
        if self.device.type == "cuda":
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[self.device], gradient_as_bucket_view=True
            )
        mean = self._share_mean(model, self._near) if self._near is not None else None
        if mean is None:
            return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        wrapped = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, bucket_cap_mb=_ONE_BUCKET_MIB
        )
        wrapped.register_comm_hook(mean, _form_mean)
        return wrapped

    def _share_mean(self, model: nn.Module, near: Neighbours) -> SharedMean | None:
        """What averages the model's gradients in shared memory; None, on every rank, where there
        is no room for it.
        """
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        num_values, dtype = sum(weight.numel() for weight in weights), weights[0].dtype
        size = SharedMean.num_bytes(self.world_size, num_values, dtype)

        def meet() -> None:
            with self.explaining("to have computed their gradients"):
                near.largest(near.leave(0, purpose=GRADIENTS), purpose=GRADIENTS)

        def make(path: Path) -> SharedMean:
            return SharedMean(
                path,
                rank=self.rank,
                world_size=self.world_size,
                num_values=num_values,
                dtype=dtype,
                meet=meet,
            )

        mean = self._in_shared_memory(size, make)
        if mean is None and self.is_main:
            _logger.info(
                "gradients go through sockets: /dev/shm has no room for %.1f MiB", size / 2**20
            )
        return mean

    def _in_shared_memory(self, size: int, make: Callable[[Path], T]) -> T | None:
        """What each rank makes of one new file of `size` bytes; None, on every rank, where one
        of them cannot.
        """
        made = None
        with ExitStack() as stack:  # what is mapped stays when the file is gone
            created = create_memory(size) if self.is_main else None
            if created is not None:
                stack.enter_context(created)
            path: Path | None = self.from_main(None if created is None else Path(created.name))
            if path is not None:
                with suppress(OSError):
                    made = make(path)
            can_all = all(self.gather(made is not None))
        return made if can_all else None

    def synchronized(self, model: nn.Module, last: bool) -> Any:
        """A context for one backward pass: gradients are exchanged only in the last of an
        accumulation.
        """
        if last or self.world_size == 1:
            return nullcontext()
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        return model.no_sync()


class Place(NamedTuple):
    """A process's place in the job that torchrun, or another launcher, started it for."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    is_torchrun: bool = False


def own_place() -> Place:
    """The place that the environment states, if it states all of it; a stray RANK or WORLD_SIZE
    does not make a process a rank.
    """
    defaults = {
        "RANK": "",
        "WORLD_SIZE": "",
        "MASTER_PORT": "",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    texts = [os.environ.get(name, default) for name, default in defaults.items()]
    if "MASTER_ADDR" not in os.environ or not all(text.isdecimal() for text in texts):
        return Place()
    rank, world_size, _, local_rank, local_world_size = (int(text) for text in texts)
    if not (rank < world_size and local_rank < local_world_size):
        return Place()
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return Place(rank, world_size, local_rank, local_world_size, is_torchrun)


@contextmanager
def join(*, timeout_s: float) -> Iterator[Ranks]:
    """Join the job that torchrun started (or be one process), and leave it at the end.

    `timeout_s` is how long one rank waits for another. On CUDA the process takes the device of its
    local rank. Raises `UserError` where there are more ranks on the machine than CUDA devices.
    """
    place = own_place()
    rank, world_size = place.rank, place.world_size
    local_rank, local_world_size = place.local_rank, place.local_world_size
    device = _device(local_rank, local_world_size)
    if world_size == 1 and not place.is_torchrun:
        yield Ranks(0, 1, 0, 1, device)
        return
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        control = (
            dist.group.WORLD
            if backend == "gloo"
            else dist.new_group(backend="gloo", timeout=timeout)
        )
        ranks = Ranks(rank, world_size, local_rank, local_world_size, device, control, store)
        if device.type == "cpu" and local_world_size == world_size > 1:
            ranks = replace(ranks, _near=_find_neighbours(ranks, timeout_s=timeout_s))
        yield ranks
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model, see below
        raise
    finally:
        gc.collect()  # DistributedDataParallel is full of cycles, and must go before the process group does
        dist.destroy_process_group()


def _find_neighbours(ranks: Ranks, *, timeout_s: float) -> Neighbours | None:
    """None, on every rank, where one of them cannot share memory with the others or not see
    whether they are there.
    """

    def make(path: Path) -> Neighbours:
        return Neighbours(path, rank=ranks.rank, world_size=ranks.world_size, timeout_s=timeout_s)

    near = ranks._in_shared_memory(Neighbours.num_bytes(ranks.world_size), make)
    if near is None:
        return None
    return near if all(ranks.gather(all(map(near.is_there, range(ranks.world_size))))) else None


def _device(local_rank: int, local_world_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{local_world_size} processes on this machine but {torch.cuda.device_count()} CUDA devices: "
            "give torchrun --nproc_per_node at most the number of devices"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _form_mean(
    mean: SharedMean,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch says which annotation it wants, and hides the class
) -> torch.futures.Future[Tensor]:
    """What DistributedDataParallel calls for each of its buckets, in the same order on every
    rank.
    """
    mean.form(bucket.buffer(), is_last=bucket.is_last())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _is_collective(error: BaseException) -> bool:
    return isinstance(error, (dist.DistError, MissingRankError)) or any(
        words in str(error) for words in _COLLECTIVE_WORDS
    )
