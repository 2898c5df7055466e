"""What the training loop costs beside the network: waiting for data, the loop itself, and a second
rank.

    python -m benchmarks.train  # the public data set where XRAI_TEST_DATA says so, else phantoms
    python -m benchmarks.train --source DIR --rounds 5

One process takes turns by epochs, so that all see the same machine: an epoch of
`xrai.learning.loop.fit` with batches from the loader, an epoch of it with the same batches already
in memory, and before each of them an epoch of a bare loop over tensors in memory: the same network,
precision, batch size and augmentation, forward, backward, clipping, AdamW and the averaged weights,
and nothing else. `plain` is that loop without augmentation, clipping and averaging.

Accelerator utilisation is compute time over total time, as MLPerf Storage defines it; the share
that `fit` states is checked against the ratio of its rates with both kinds of batches.

Scaling: two ranks of one thread under torchrun, beside two processes of one thread that know
nothing of each other and run at the same time with a rank's batch size, and beside one such process
alone. The default network is measured once with half of the recipe's batch a rank, as a job of two
ranks has it, and once with the whole of it, as where the batch grows with the ranks; networks of 3
and 10 M parameters with half of it, on images of 128 px.

What an epoch loses: two ranks more note at each step when their own gradients are ready and when
the sum over ranks has come. A rank waits for the slower one from its own time to the later of both;
what follows is the exchange.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, not in its __all__
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from benchmarks.data import PUBLIC, copy_some, find_public, source_or_phantoms
from benchmarks.harness import ROOT, Contender, Figure, Report, Run, ratio, run_in_turn
from xrai.config import Config, Model
from xrai.dataset.loader import Batch, Loader
from xrai.learning import optim
from xrai.learning.augment import augment
from xrai.learning.distributed import Ranks, join
from xrai.learning.loop import EpochResult, Precision, Setup, fit
from xrai.learning.network import ResNet
from xrai.learning.predictor import build_model
from xrai.train import keep_freed_memory, label_counts

RATE = Figure("images_per_s", "images/s")
NUM_PHANTOMS = 3000


@dataclass(frozen=True)
class Scale:
    """A network with which ranks are measured, and on what."""

    words: str
    model: Model
    size: int  # side of the images; 0: as the flag says
    batches: tuple[int, ...]  # images of a rank in a step
    num_images: int  # of the source; 0: all of them


SCALES = {
    "0.3M": Scale("0.3 M parameters", Model(), 0, (32, 64), 0),
    "3M": Scale("3.0 M parameters, 128 pixels", Model(width=50), 128, (32,), 1280),
    "10M": Scale("10.1 M parameters, 128 pixels", Model("resnet18", 61), 128, (32,), 1280),
}
LOOP = "loop"  # the part without ranks
REPORTS = {"train": (LOOP, "0.3M"), "train_large": ("3M", "10M")}  # parts of each


def main() -> None:
    """Measure, print the tables and save them."""
    flags = read_flags()
    if flags.as_rank:
        return train_rank(RankJob(**json.loads(flags.as_rank)))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source, _ = source_or_phantoms(
            flags.source, Path(folder) / "source", num_phantoms=flags.images or NUM_PHANTOMS
        )
        make = partial(make_dataset, Path(source), Path(folder))
        for name, allowed in REPORTS.items():
            if parts := [part for part in allowed if part in flags.parts]:
                measure_parts(name, parts, make, flags)


def measure_parts(
    name: str, parts: Sequence[str], make: Callable[..., str], flags: argparse.Namespace
) -> None:
    """One report of parts with the same images; `make` makes their data set."""
    scale = SCALES["0.3M" if parts[0] == LOOP else parts[0]]
    num_images, size = flags.images or scale.num_images, scale.size or flags.size
    report = Report(
        name,
        settings={
            "images": f"{num_images or 'all'} of {Path(flags.source).name or 'phantoms'}",
            "size": size,
            "batch_size": Config().train.global_batch_size,
            "rounds": flags.rounds,
            "epochs_of_each_kind_in_a_round": flags.turns,
            "threads": flags.threads,
        },
    )
    dataset = make(num_images=num_images, size=size)
    for part in parts:
        if part == LOOP:
            measure_loop(report, dataset, flags)
        else:
            measure_scale(report, part, dataset, flags)
    report.save()


def read_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="The training loop beside a bare one; two ranks beside two processes."
    )
    parser.add_argument(
        "--source", default=find_public(PUBLIC), help="folder of images; phantoms if not given"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--images", type=int, default=0, help="how many are used, for a quick try")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="epochs of each kind in a round")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the single process"
    )
    parser.add_argument("--parts", nargs="+", choices=(LOOP, *SCALES), default=[LOOP, *SCALES])
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_dataset(source: Path, folder: Path, *, num_images: int, size: int) -> str:
    """The data set of some of the images in a size, made unless it is there."""
    dataset = folder / f"{num_images}-{size}"
    if not dataset.exists():
        used = copy_some(source, folder / f"some-{num_images}", num_images=num_images)
        subprocess.run(
            [
                *(sys.executable, "-m", "xrai.preprocess", "--source", str(used)),
                *("--dataset", str(dataset), f"--images.size={size}"),
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return str(dataset)


def measure_loop(report: Report, dataset: str, flags: argparse.Namespace) -> None:
    """The loop beside a bare one, in one process."""
    arguments = {"dataset": dataset, "turns": flags.turns, "threads": flags.threads}
    turns = run_in_turn(
        [Contender("epochs in turn", "benchmarks.train:measure_turns", arguments)],
        rounds=flags.rounds,
    )
    loops = split_turns(turns)
    report.add_table(
        LOOP,
        f"One process of {flags.threads} threads, {flags.size} pixels",
        loops,
        ours=LOADED,
        figures=[RATE, Figure("utilisation", "accelerator utilisation", digits=4)],
    )
    stated = statistics.median(
        run.figures["utilisation"] for run in loops if run.contender == LOADED
    )
    report.demand("accelerator utilisation, as the loop states it", stated, at_least=0.98, digits=4)
    report.demand(
        "rate with the loader over rate from memory",
        ratio(loops, LOADED, IN_MEMORY, RATE.key)["median"],
        at_least=0.98,
        digits=3,
    )
    overhead = 1 - ratio(loops, IN_MEMORY, BARE, RATE.key)["median"]
    report.demand("overhead of the loop over a bare one, %", 100 * overhead, at_most=3)


def measure_scale(report: Report, name: str, dataset: str, flags: argparse.Namespace) -> None:
    """Two ranks beside two processes, with one of `SCALES`."""
    scale = SCALES[name]
    for batch_size in scale.batches:
        job = RankJob(dataset, batch_size, flags.turns, asdict(scale.model))
        contenders = [
            Contender(words, "benchmarks.train:measure_ranks", {"kind": kind, "job": asdict(job)})
            for kind, words in KINDS.items()
        ]
        runs = run_in_turn(contenders, rounds=flags.rounds, timeout_s=1800)
        title = f"Ranks of one thread, {batch_size} images a rank, {scale.words}"
        table = f"ranks-{name}-{batch_size}"
        report.add_table(table, title, runs, ours=KINDS["ranks"], figures=[RATE, *LOSSES])
        both = ratio(runs, KINDS["ranks"], KINDS["apart"], RATE.key)["median"]
        text = (
            f"two ranks over two independent processes, {batch_size} images a rank, {scale.words}"
        )
        report.demand(text, both, at_least=0.95, digits=3)


# ----------------------------------------------------------------------------------- epochs in turn

LOADED, IN_MEMORY, BARE, PLAIN = "fit, loader", "fit, batches in memory", "bare loop", "plain loop"


class Alternating:
    """A training split whose even epochs come from the loader and whose odd ones are batches in
    memory.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.num_images, self.num_batches = loader.num_images, loader.num_batches
        self.batches = list(loader.epoch(0))

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        return (
            self._loader.epoch(epoch, start=start) if epoch % 2 == 0 else iter(self.batches[start:])
        )

    def timings(self) -> dict[str, float]:
        """The loader's."""
        return self._loader.timings()


class Between:
    """An observer that runs an epoch of the bare loop after each epoch of `fit`, and keeps all
    rates.
    """

    def __init__(self, batches: list[Batch], config: Config, objective: optim.Objective) -> None:
        self._batches, self._config, self._objective = batches, config, objective
        self.figures: dict[str, list[float]] = {}

    def after_epoch(self, result: EpochResult) -> float:
        """Note the epoch, and run the bare loops."""
        kind = LOADED if result.epoch % 2 == 0 else IN_MEMORY
        if result.epoch >= 2:  # the first two are warm-up
            self._note(kind, result.images_per_s)
            if kind == LOADED:
                self._note("utilisation", result.seconds["compute"] / result.seconds["epoch"])
        for name, plain in ((BARE, False), (PLAIN, True)):
            rate = bare_epoch(
                self._batches, self._config, self._objective, epoch=result.epoch, plain=plain
            )
            if result.epoch >= 2:
                self._note(name, rate)
        return float("nan")

    def _note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)


def measure_turns(*, scratch: Path, dataset: str, turns: int, threads: int) -> dict[str, float]:
    """Median images/s of each kind of epoch, and the utilisation that `fit` states."""
    torch.set_num_threads(threads)
    config = replace(Config(), train=replace(Config().train, epochs=2 * (turns + 1)))
    config = replace(config, evaluate=replace(config.evaluate, shift_draws=1))
    loader = Loader(dataset, split="train", batch_size=config.train.global_batch_size, shuffle=True)
    val = Loader(dataset, split="val", batch_size=config.evaluate.batch_size)
    labels = loader.index.labels
    counts = label_counts(loader.index)
    alternating = Alternating(loader)
    objective = optim.make_objective(labels, counts, config.optim)
    observer = Between(alternating.batches, config, objective)
    torch.manual_seed(0)
    with join(timeout_s=60) as ranks:
        setup = Setup(
            config,
            ranks,
            alternating,
            val,
            labels=labels,
            counts=counts,
            val_labels=val.labels,
            after_epoch=observer.after_epoch,
        )
        fit(build_model(config.model, labels.num_outputs), setup)
    return {name: statistics.median(values) for name, values in observer.figures.items()}


def bare_epoch(
    batches: list[Batch], config: Config, objective: optim.Objective, *, epoch: int, plain: bool
) -> float:
    """Images/s of the same training, written down without anything around it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = Precision(config.train, device)
    model: nn.Module = ResNet().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = deepcopy(model).requires_grad_(False)
    on_device = objective.to(device, torch.float32)
    optimizer = optim.make_optimizer(model, config.optim)
    pictures = [torch.from_numpy(batch.images).to(device) for batch in batches]
    labels = [torch.from_numpy(batch.labels).to(device) for batch in batches]
    rows = [torch.from_numpy(batch.rows).to(device) for batch in batches]
    began = time.perf_counter()
    for step in range(len(batches)):
        images = pictures[step].float() / 255
        if not plain:
            images = augment(images, rows[step], seed=0, epoch=epoch, strength=config.augment)
        images = images.contiguous(memory_format=torch.channels_last)
        with precision.autocast():
            logits = model(images)
        optim.image_losses(logits.float(), labels[step], on_device).mean().backward()
        if not plain:
            optim.clip_gradients(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not plain:
            optim.update_average(average, model, step=step, decay=config.optim.ema_decay)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return sum(map(len, rows)) / (time.perf_counter() - began)


def split_turns(runs: list[Run]) -> list[Run]:
    """A run of each kind of epoch out of each run that took turns."""
    found = []
    for run in runs:
        for name in (LOADED, IN_MEMORY, BARE, PLAIN):
            figures = {RATE.key: run.figures[name]} if name in run.figures else {}
            if name == LOADED and figures:
                figures["utilisation"] = run.figures["utilisation"]
            found.append(Run(name, run.round, figures, run.failure))
    return found


# -------------------------------------------------------------------------------------------- ranks

KINDS = {
    "ranks": "two ranks, torchrun",
    "noted": "two ranks, torchrun, waits noted",
    "apart": "two independent processes",
    "one": "one process alone",
}
LOSSES = (
    Figure("rank0_wait", "rank 0 waits for rank 1, % of an epoch", "lower", 1),
    Figure("rank1_wait", "rank 1 waits for rank 0, %", "lower", 1),
    Figure("exchange", "exchange, %", "lower", 1),
)


@dataclass(frozen=True)
class RankJob:
    """What a rank, or a process by itself, trains."""

    dataset: str
    batch_size: int  # of each rank
    turns: int  # epochs that count
    model: dict[str, Any]
    told: str = ""  # where the first rank writes its rate
    notes: str = ""  # folder for what each rank notes at its steps; empty: nothing is noted


def measure_ranks(*, scratch: Path, kind: str, job: dict[str, Any]) -> dict[str, float]:
    """Images/s of all processes of a kind together; each has one thread and takes `batch_size`
    images a step. For `noted`, what an epoch loses, too.
    """
    notes = scratch / "notes"
    notes.mkdir()

    def command(number: int) -> list[str]:
        own = {"told": str(scratch / f"{number}.json"), "notes": str(notes)}
        if kind != "noted":
            own["notes"] = ""
        return ["benchmarks.train", "--as-rank", json.dumps({**job, **own})]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]
    if kind in ("ranks", "noted"):
        commands = [[*launch, *command(0)]]
    else:
        commands = [
            [sys.executable, "-m", *command(number)]
            for number in range(2 if kind == "apart" else 1)
        ]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in commands]
    for process in processes:
        if process.wait():
            raise RuntimeError(f"{kind}: a process ended with {process.returncode}")
    rates = [
        json.loads(path.read_text())["images_per_s"] for path in sorted(scratch.glob("*.json"))
    ]
    steps = [json.loads(path.read_text()) for path in sorted(notes.glob("*.json"))]
    return {RATE.key: sum(rates), **(losses_of(steps[0], steps[1]) if steps else {})}


def losses_of(rank0: dict[str, list[float]], rank1: dict[str, list[float]]) -> dict[str, float]:
    """What epochs lost to waiting and to the exchange, in percent of their time.

    Each rank's notes are the times at which its gradients were `ready` and the sums had come
    (`done`), a number for each step, by one clock; and the seconds of the same epochs.
    """
    both = list(zip(rank0["ready"], rank1["ready"], strict=True))
    all_ready = [max(pair) for pair in both]
    waits = [sum(all_ready) - sum(pair[rank] for pair in both) for rank in (0, 1)]
    exchanges = [sum(rank["done"]) - sum(all_ready) for rank in (rank0, rank1)]
    percent = 100 / sum(rank0["epoch_s"])
    return {
        "rank0_wait": waits[0] * percent,
        "rank1_wait": waits[1] * percent,
        "exchange": statistics.mean(exchanges) * percent,
    }


class Exchange:
    """Notes when a rank's gradients of each step are ready, and when the sums have come."""

    def __init__(self) -> None:
        self.ready: list[float] = []
        self.done: list[float] = []

    def hook(self, group: Any, bucket: GradBucket) -> Future[Tensor]:
        """The usual exchange of a bucket; the last bucket of a step is noted."""
        if not bucket.is_last():
            return allreduce_hook(group, bucket)
        self.ready.append(time.monotonic())
        return allreduce_hook(group, bucket).then(self._note)

    def _note(self, future: Future[Tensor]) -> Tensor:
        self.done.append(time.monotonic())
        return future.value()


@dataclass(frozen=True)
class NotingRanks(Ranks):
    """Ranks whose exchange of gradients is noted."""

    exchange: Exchange = field(default_factory=Exchange)

    def wrap(self, model: nn.Module) -> nn.Module:
        """As `Ranks.wrap`, with the hook."""
        wrapped = super().wrap(model)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, self.exchange.hook)
        return wrapped


class Epochs:
    """An observer that keeps the rate and the seconds of each epoch."""

    def __init__(self) -> None:
        self.images_per_s: list[float] = []
        self.seconds: list[float] = []

    def after_epoch(self, result: EpochResult) -> float:
        """Note the epoch."""
        self.images_per_s.append(result.images_per_s)
        self.seconds.append(result.seconds["epoch"])
        return float("nan")


def train_rank(job: RankJob) -> None:
    """One rank, or one process by itself; rank 0 tells the rate. The first epoch is warm-up."""
    keep_freed_memory()
    torch.set_num_threads(1)
    with join(timeout_s=60) as own:
        ranks = NotingRanks(**vars(own)) if job.notes else own
        size = job.batch_size * ranks.world_size
        train = replace(Config().train, epochs=job.turns + 1, global_batch_size=size)
        config = replace(Config(), train=train, model=Model(**job.model))
        config = replace(config, evaluate=replace(config.evaluate, shift_draws=1))
        options: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
        loader = Loader(job.dataset, split="train", batch_size=size, shuffle=True, **options)
        val = Loader(job.dataset, split="val", batch_size=config.evaluate.batch_size, **options)
        torch.manual_seed(0)
        observer = Epochs()
        setup = Setup(
            config,
            ranks,
            loader,
            val,
            labels=loader.index.labels,
            counts=label_counts(loader.index),
            val_labels=val.labels,
            after_epoch=observer.after_epoch if ranks.is_main else None,
        )
        fit(build_model(config.model, loader.index.labels.num_outputs), setup)
        if ranks.is_main:
            rate = statistics.median(observer.images_per_s[1:])
            Path(job.told).write_text(json.dumps({"images_per_s": rate}))
        if isinstance(ranks, NotingRanks):
            counted = slice(loader.num_batches, None)
            exchange = ranks.exchange
            notes = {"ready": exchange.ready[counted], "done": exchange.done[counted]}
            text = json.dumps({**notes, "epoch_s": observer.seconds[1:]})
            (Path(job.notes) / f"{ranks.rank}.json").write_text(text)


if __name__ == "__main__":
    main()
