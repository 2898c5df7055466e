"""One epoch of timm's resnet18 by each of the field's trainers, set up as its documentation
recommends.

`benchmarks.epoch` starts this module once for each run, alone or under torchrun:

    python -m benchmarks.trainers NAME JOB FILE

All peers train the same network with the same optimizer, batch size and precision, and keep the
network's and the images' memory in the layout channels_last, which each documentation recommends
for CPUs. The clock starts when everything is imported and the network is built, before the data is
opened, and stops after the last step. How each peer is set up:

    lightning    `Trainer` on CPUs with litData's `StreamingDataset` and `StreamingDataLoader`; the
                 gray levels as torch tensors, as `benchmarks.peers` writes them
    monai        `CacheDataset` of all images after the transforms that are not random, one part for
                 each process (`partition_dataset`); MONAI's `ThreadDataLoader` without worker
                 processes, as its guide to fast training recommends, else its `DataLoader`
    timm         `create_dataset`, `create_loader`, `create_optimizer_v2` and `create_scheduler_v2`
                 with the defaults of its script train.py, and a loop as there: the script itself is
                 not part of the package
    torchvision  `ImageFolder`, transforms version 2 and `DataLoader` in a plain loop

The peers are imported inside the functions: none of them is needed to import this module.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from xrai.config import Config
from xrai.files import num_cores
from xrai.learning.loop import Precision

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as everywhere
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05


@dataclass(frozen=True)
class Job:
    """What a peer trains on, and how."""

    files: str  # a folder of images in folders of classes
    chunks: str  # the same images as litData has them
    processes: int
    workers: int  # of the data loader, for each process
    augmented: bool
    batch_size: int = 64  # over all processes

    @property
    def share(self) -> int:
        """Images of one process in a step."""
        return self.batch_size // self.processes


@dataclass(frozen=True)
class Epoch:
    """What one process saw of an epoch."""

    seconds: float
    num_images: int
    loss: float  # mean over steps


Train = Callable[[nn.Module, Job], Epoch]


def main(name: str, job_text: str, told: str) -> None:
    """One process's part of an epoch; the first one writes the figures of all."""
    job = Job(**json.loads(job_text))
    torch.set_num_threads(max(1, num_cores() // job.processes))
    if job.processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    train = TRAINERS[name]
    epoch = gather(train(build_network(), job))
    if not dist.is_initialized() or dist.get_rank() == 0:
        figures = {
            "images_per_s": epoch.num_images / epoch.seconds,
            "epoch_s": epoch.seconds,
            "loss": epoch.loss,
        }
        Path(told).write_text(json.dumps(figures))
    if dist.is_initialized():
        gc.collect()  # frees DistributedDataParallel, which must go before its process group
        dist.destroy_process_group()


def build_network() -> nn.Module:
    """timm's resnet18 with fresh weights."""
    import timm

    network: nn.Module = timm.create_model("resnet18", num_classes=2)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def gather(own: Epoch) -> Epoch:
    """The epoch of all processes together: it lasts as long as the slowest one's."""
    if not dist.is_initialized():
        return own
    longest, sums = torch.tensor(own.seconds), torch.tensor([own.num_images, own.loss])
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    num_images, losses = sums.tolist()
    return Epoch(float(longest), int(num_images), losses / dist.get_world_size())


# ------------------------------------------------------------------------------------- shared parts


def run_loop(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    began: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> Epoch:
    """The plain loop of the peers' examples over (B, 3, H, W) normalized images and labels (B,);
    `began` is when the clock started.
    """
    wrapped = network
    if dist.is_initialized():
        wrapped = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    precision = Precision(Config().train, torch.device("cpu"))
    network.train()
    num_images, losses = 0, []
    for step, (images, labels) in enumerate(batches):
        images = images.contiguous(memory_format=torch.channels_last)
        with precision.autocast():
            logits = wrapped(images)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_images += len(images)
        losses.append(loss.detach())
        after_step(step + 1)
    return Epoch(time.perf_counter() - began, num_images, float(torch.stack(losses).mean()))


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )


def sampler_of(dataset: Any) -> Any:
    """This process's share of a data set in random order; None if there is one process."""
    if not dist.is_initialized():
        return None
    return torch.utils.data.DistributedSampler(dataset)


def crop_and_flip() -> list[Any]:
    """The random changes of torchvision's reference script for classification."""
    from torchvision.transforms import v2

    return [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()]


def normalize(grey: Tensor) -> Tensor:
    """Gray levels (B, H, W) uint8 to normalized (B, 3, H, W)."""
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    scaled = grey[:, None].float() / 255
    return (scaled - mean[:, None, None]) / deviation[:, None, None]


# ---------------------------------------------------------------------------------------- the peers


def train_torchvision(network: nn.Module, job: Job) -> Epoch:
    """torchvision's `ImageFolder` in a plain loop."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    began = time.perf_counter()
    changes = crop_and_flip() if job.augmented else []
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
    dataset = ImageFolder(job.files, v2.Compose([v2.PILToTensor(), *changes, *scaled]))
    sampler = sampler_of(dataset)
    loader = DataLoader(
        dataset,
        batch_size=job.share,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=job.workers,
    )
    return run_loop(network, loader, make_optimizer(network), began=began)


def train_timm(network: nn.Module, job: Job) -> Epoch:
    """timm's loader, optimizer and schedule in a loop like that of its script."""
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    began = time.perf_counter()
    loader = create_loader(
        create_dataset("", root=job.files, is_training=True),
        input_size=(3, SIDE, SIDE),
        batch_size=job.share,
        is_training=True,
        no_aug=not job.augmented,
        interpolation="random" if job.augmented else "bilinear",
        mean=MEAN,
        std=DEVIATION,
        num_workers=job.workers,
        distributed=job.processes > 1,
        device=torch.device("cpu"),
    )
    optimizer = create_optimizer_v2(
        network, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    return run_loop(network, loader, optimizer, began=began, after_step=schedule.step_update)


def train_monai(network: nn.Module, job: Job) -> Epoch:
    """MONAI's `CacheDataset`; filling the cache is part of the epoch."""
    from monai.data import CacheDataset, DataLoader, ThreadDataLoader, partition_dataset
    from monai.transforms import Compose

    began = time.perf_counter()
    items = list_items(Path(job.files))
    if dist.is_initialized():
        parts = partition_dataset(
            items, num_partitions=job.processes, shuffle=True, even_divisible=True
        )
        items = parts[dist.get_rank()]
    random = monai_changes() if job.augmented else []
    dataset = CacheDataset(
        items,
        Compose([*monai_reading(), *random]),
        num_workers=torch.get_num_threads(),
        progress=False,
        copy_cache=False,  # no transform changes an image in place
    )
    kind = DataLoader if job.workers else ThreadDataLoader
    loader = kind(dataset, batch_size=job.share, shuffle=True, num_workers=job.workers)
    batches = ((batch["image"], batch["label"]) for batch in loader)
    return run_loop(network, batches, make_optimizer(network), began=began)


def list_items(folder: Path) -> list[dict[str, Any]]:
    """MONAI's list of images and labels, from folders of classes in alphabetical order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [
        {"image": str(path), "label": label}
        for label, place in enumerate(classes)
        for path in sorted(place.iterdir())
    ]


def monai_reading() -> list[Any]:
    """The transforms that are not random: a file to a normalized tensor without metadata."""
    from monai.transforms import (
        EnsureChannelFirstd,
        EnsureTyped,
        LoadImaged,
        NormalizeIntensityd,
        ScaleIntensityRanged,
    )

    return [
        LoadImaged("image", reader="PILReader", image_only=True),
        EnsureChannelFirstd("image"),
        ScaleIntensityRanged("image", 0, 255, 0, 1),
        NormalizeIntensityd("image", MEAN, DEVIATION, channel_wise=True),
        EnsureTyped("image", dtype=torch.float32, track_meta=False),
    ]


def monai_changes() -> list[Any]:
    """The random changes of MONAI's tutorial on classification, MedNIST."""
    from math import pi

    from monai.transforms import RandFlipd, RandRotated, RandZoomd

    return [
        RandRotated("image", range_x=pi / 12, prob=0.5, keep_size=True),
        RandFlipd("image", prob=0.5, spatial_axis=0),
        RandZoomd("image", prob=0.5, min_zoom=0.9, max_zoom=1.1),
    ]


def train_lightning(network: nn.Module, job: Job) -> Epoch:
    """Lightning's `Trainer` with litData.

    The clock stands still between opening the data and `on_fit_start`, while the trainer sets
    itself up.
    """
    import lightning
    import litdata
    from lightning.pytorch.strategies import DDPStrategy

    began = time.perf_counter()
    os.environ.setdefault("GLOBAL_RANK", os.environ.get("RANK", "0"))
    changes = partial(change_item, crop_and_flip()) if job.augmented else None
    dataset = litdata.StreamingDataset(job.chunks, shuffle=True, transform=changes)
    loader = litdata.StreamingDataLoader(dataset, batch_size=job.share, num_workers=job.workers)
    opened_s = time.perf_counter() - began
    module = lightning_module(network)
    precision = Precision(Config().train, torch.device("cpu")).name
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=job.processes,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if job.processes > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=1,
        use_distributed_sampler=False,  # litData divides the data itself
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    losses = torch.stack(module.losses)
    return Epoch(opened_s + module.ended - module.began, module.num_images, float(losses.mean()))


def change_item(changes: list[Any], item: dict[str, Any]) -> dict[str, Any]:
    """litData's item, its gray levels (H, W) changed at random."""
    image = item["image"][None]
    for change in changes:
        image = change(image)
    return {**item, "image": image[0]}


def lightning_module(network: nn.Module) -> Any:
    """The training step as a `LightningModule`, which notes when an epoch begins and ends."""
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.began = self.ended = 0.0
            self.num_images = 0
            self.losses: list[Tensor] = []

        def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
            images = normalize(batch["image"]).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(self.network(images), batch["label"])
            self.num_images += len(images)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.network)

        def on_fit_start(self) -> None:
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.ended = time.perf_counter()

    return Module()


TRAINERS: dict[str, Train] = {
    "lightning": train_lightning,
    "monai": train_monai,
    "timm": train_timm,
    "torchvision": train_torchvision,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
