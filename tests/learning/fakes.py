"""Training in memory for tests of the learning room: discs on noise, batched by the real
loader's rules.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xrai.config import Config, Model
from xrai.errors import StoppedError
from xrai.labels import LabelSpec, Task
from xrai.learning import loop, optim
from xrai.learning.checkpoint import CheckpointFolder
from xrai.learning.distributed import Ranks
from xrai.learning.network import Network
from xrai.learning.predictor import build_model
from xrai.learning.typicality import Typicality, fit_typicality
from xrai.store import open_store
from xrai.store.folder import FolderStore

DISC = LabelSpec("binary", ("NOISE", "DISC"))
SPECS: dict[Task, LabelSpec] = {
    "binary": DISC,
    "multiclass": LabelSpec("multiclass", ("NOISE", "FIRST", "SECOND")),
    "multilabel": LabelSpec("multilabel", ("DISC", "ODD", "KNOWN")),
}


@dataclass
class FakeBatch:
    images: NDArray[np.uint8]
    labels: NDArray[np.integer]  # (n,), or (n, C) findings
    rows: NDArray[np.int64]
    num_global: int


class FakeLoader:
    """Batches of arrays in memory: the same global batches for every world size."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.integer],
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.labels = images, labels
        self.num_images = len(labels)
        self.num_batches = -(-len(labels) // batch_size)
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._rank, self._world_size = rank, world_size

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[FakeBatch]:
        order = np.arange(self.num_images)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self.num_images)
        for number in range(start, self.num_batches):
            rows = order[number * self._batch_size : (number + 1) * self._batch_size]
            low, high = (len(rows) * (self._rank + side) // self._world_size for side in (0, 1))
            mine = rows[low:high].astype(np.int64)
            yield FakeBatch(self.images[mine][:, None], self.labels[mine], mine, len(rows))

    def timings(self) -> dict[str, float]:
        return {"fetch": 0.0, "verify": 0.0, "assemble": 0.0}


def make_discs(
    num_images: int, *, size: int = 32, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(N, size, size) uint8 pictures of noise, every other one with a bright disc, and labels
    (N,).
    """
    generator = np.random.default_rng(seed)
    images = generator.normal(90, 25, size=(num_images, size, size))
    labels = (np.arange(num_images) % 3 > 0).astype(np.uint8)
    y, x = np.mgrid[:size, :size]
    for image, label in zip(images, labels, strict=True):
        if label:
            centre_y, centre_x = generator.uniform(size * 0.3, size * 0.7, size=2)
            image[(y - centre_y) ** 2 + (x - centre_x) ** 2 < (size / 6) ** 2] += 70
    return images.clip(0, 255).astype(np.uint8), labels


def label_discs(labels: NDArray[np.uint8], task: Task) -> NDArray[np.integer]:
    """What a data set of discs (1) and noise (0) holds as labels, (N,) or (N, C). Discs are of two
    classes; of findings, two are unknown in every fifth image and all in every seventh.
    """
    number = np.arange(len(labels))
    if task == "multiclass":
        return (labels * (1 + number % 2)).astype(np.uint8)
    if task == "multilabel":
        odd, known = number % 2, number // 4 % 2
        findings = np.stack([labels, odd, known], axis=1).astype(np.int8)
        findings[number % 5 == 0, :2] = -1
        findings[number % 7 == 0] = -1
        return findings
    return labels


def count_discs(labels: NDArray[np.integer], task: Task) -> optim.Counts:
    """Of each output, the images that show it and those where it is known."""
    matrix = SPECS[task].matrix(labels)
    return tuple(zip((matrix == 1).sum(0).tolist(), (matrix >= 0).sum(0).tolist(), strict=True))


@dataclass
class Outcome:
    """What a training on discs came to, on this rank."""

    losses: list[float]  # of each global batch, summed over its images
    weights: dict[str, list[float]]  # of a large network, a checksum of each tensor
    results: list[loop.EpochResult]  # rank 0's, of the epochs since this process began
    stopped: bool


def train_discs(
    config: Config,
    *,
    ranks: Ranks,
    folder: Path | None = None,
    num_images: int = 150,
    num_val: int = 41,
    task: Task = "binary",
    stop_after: int | None = None,
    damage: Callable[[FakeLoader], None] | None = None,
    profile_path: Path | None = None,
) -> Outcome:
    """Train on discs in memory, going on from the newest checkpoint in `folder`.

    `stop_after` asks the process to stop after so many steps of its own; `damage` may change the
    training images.
    """
    images, discs = make_discs(num_images)
    val_images, val_discs = make_discs(num_val, seed=1)
    labels, val_labels = (label_discs(each, task) for each in (discs, val_discs))
    share: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
    train = FakeLoader(
        images,
        labels,
        batch_size=config.train.global_batch_size,
        shuffle=True,
        seed=config.train.seed,
        **share,
    )
    if damage is not None:
        damage(train)
    checkpoints, resumed = None, None
    if folder is not None:
        checkpoints = CheckpointFolder(
            folder,
            store=open_store(str(folder)),
            publish=lambda names: None,
            remove=lambda names: None,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )
        found = checkpoints.newest()
        resumed = found[1] if found else None
    torch.manual_seed(config.train.seed)
    network = build_model(config.model, SPECS[task].num_outputs, image_size=32)
    sums: list[torch.Tensor] = []
    ends = [0]  # of steps, in these sums
    results: list[loop.EpochResult] = []
    original, original_step = optim.image_losses, optim.step

    def recorded(logits: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        losses = original(logits, *arguments, **keywords)
        if losses.requires_grad:
            sums.append(losses.detach().double().sum())
        return losses

    def stepped(
        optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, is_bad: torch.Tensor
    ) -> None:
        original_step(optimizer, scaler, is_bad)
        ends.append(len(sums))

    def after_epoch(result: loop.EpochResult) -> float:
        results.append(result)
        return -result.val_loss

    def is_time_to_stop() -> bool:
        return stop_after is not None and len(sums) >= stop_after * config.train.accumulation_steps

    stopped = False
    optim.image_losses, optim.step = recorded, stepped
    try:
        setup = loop.Setup(
            config,
            ranks,
            train,
            FakeLoader(val_images, val_labels, batch_size=16, **share),
            labels=SPECS[task],
            counts=count_discs(labels, task),
            val_labels=val_labels,
            name_of=lambda row: f"disc-{row}",
            after_epoch=after_epoch if ranks.is_main else None,
            checkpoints=checkpoints if ranks.is_main else None,
            resumed=resumed,
            asked_to_stop=is_time_to_stop,
            profile_path=profile_path,
        )
        loop.fit(network, setup)
    except StoppedError:
        stopped = True
    finally:
        optim.image_losses, optim.step = original, original_step
    of_steps = [torch.stack(sums[begin:end]).sum() for begin, end in pairwise(ends)]
    per_step = torch.stack(of_steps).cpu() if of_steps else torch.empty(0, dtype=torch.float64)
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    is_large = sum(tensor.numel() for tensor in state.values()) > 1_000_000
    weights = {
        name: [float(zlib.crc32(tensor.contiguous().numpy().tobytes()))]
        if is_large
        else tensor.double().flatten().tolist()
        for name, tensor in state.items()
    }
    return Outcome(ranks.sum(per_step).tolist(), weights, results, stopped)


def poison(step: int, places: Sequence[int] = (4, 9)) -> Callable[[FakeLoader], None]:
    """A `damage` after which step `step`, from 1 and of the first epoch, has images without a
    finite loss.
    """

    def damage(loader: FakeLoader) -> None:
        original = loader.epoch

        def epoch(epoch: int, *, start: int = 0) -> Iterator[FakeBatch]:
            for position, batch in enumerate(original(epoch, start=start), start=start + 1):
                if (epoch, position) == (0, step):
                    batch.labels = batch.labels.astype(np.float32)
                    batch.labels[list(places)] = np.nan
                yield batch

        loader.epoch = epoch  # type: ignore[method-assign]

    return damage


class DamagingStore(FolderStore):
    """A store that is not on this machine, whose first transfers arrive damaged."""

    def __init__(self, folder: Path, *, num_damaged: int) -> None:
        super().__init__(folder)
        self.num_damaged = num_damaged

    def local_path(self, key: str) -> None:
        return None

    def download(self, key: str, path: Path) -> str:
        digest = super().download(key, path)
        if self.num_damaged:
            self.num_damaged -= 1
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        return digest


def fit_discs() -> tuple[Network, Typicality]:
    """A network of fresh weights, and its typicality on discs."""
    torch.manual_seed(3)
    network = build_model(Model(width=8), 1)
    train, val = (
        FakeLoader(*make_discs(number, seed=number), batch_size=32) for number in (60, 30)
    )
    alone = Ranks(0, 1, 0, 1, torch.device("cpu"))
    return network, fit_typicality(network, train, val, ranks=alone)
