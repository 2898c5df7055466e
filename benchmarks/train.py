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
alone. Once with half of the recipe's batch a rank, as a job of two ranks has it, and once with the
whole of it, as where the batch grows with the ranks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.data import PUBLIC, find_public, source_or_phantoms
from benchmarks.harness import ROOT, Contender, Figure, Report, Run, ratio, run_in_turn
from xrai.config import Config
from xrai.dataset.loader import Batch, Loader
from xrai.learning import optim
from xrai.learning.augment import augment
from xrai.learning.distributed import join
from xrai.learning.loop import EpochResult, Precision, Setup, fit
from xrai.learning.network import ResNet
from xrai.learning.predictor import build_model
from xrai.train import label_counts

RATE = Figure("images_per_s", "images/s")
NUM_PHANTOMS = 3000


def main() -> None:
    """Measure, print the tables and save them."""
    parser = argparse.ArgumentParser(
        description="The training loop beside a bare one; two ranks beside two processes."
    )
    parser.add_argument(
        "--source", default=find_public(PUBLIC), help="images to train on; phantoms if not given"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="epochs of each kind in a round")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the single process"
    )
    parser.add_argument(
        "--as-rank", nargs=4, metavar=("DATASET", "BATCH", "TURNS", "FILE"), help=argparse.SUPPRESS
    )
    flags = parser.parse_args()
    if flags.as_rank:
        place, batch_size, turns_told, told = flags.as_rank
        return train_rank(place, int(batch_size), int(turns_told), Path(told))
    batch = Config().train.global_batch_size
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source, what = source_or_phantoms(
            flags.source, Path(folder) / "source", num_phantoms=NUM_PHANTOMS
        )
        dataset = str(Path(folder) / "dataset")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "xrai.preprocess",
                "--source",
                source,
                "--dataset",
                dataset,
                f"--images.size={flags.size}",
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        arguments = {"dataset": dataset, "turns": flags.turns, "threads": flags.threads}
        turns = run_in_turn(
            [Contender("epochs in turn", "benchmarks.train:measure_turns", arguments)],
            rounds=flags.rounds,
        )
        ranks = {
            size: run_in_turn(
                [
                    Contender(
                        name,
                        "benchmarks.train:measure_ranks",
                        {
                            "dataset": dataset,
                            "kind": kind,
                            "batch_size": size,
                            "turns": flags.turns,
                        },
                    )
                    for kind, name in KINDS.items()
                ],
                rounds=flags.rounds,
            )
            for size in (batch // 2, batch)
        }
    report = Report(
        "train",
        settings={
            "images": what,
            "size": flags.size,
            "batch_size": batch,
            "rounds": flags.rounds,
            "epochs_of_each_kind_in_a_round": flags.turns,
            "threads": flags.threads,
        },
    )
    loops = split_turns(turns)
    report.add_table(
        "loop",
        f"One process of {flags.threads} threads, {flags.size} pixels",
        loops,
        ours=LOADED,
        figures=[RATE, Figure("utilisation", "accelerator utilisation", digits=4)],
    )
    for size, runs in ranks.items():
        title = f"Ranks of one thread, {size} images a rank"
        report.add_table(f"ranks-{size}", title, runs, ours=KINDS["ranks"], figures=[RATE])
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
    for size, runs in ranks.items():
        both = ratio(runs, KINDS["ranks"], KINDS["apart"], RATE.key)["median"]
        text = f"two ranks over two independent processes, {size} images a rank"
        report.demand(text, both, at_least=0.95, digits=3)
    report.save()


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
    "apart": "two independent processes",
    "one": "one process alone",
}


def measure_ranks(
    *, scratch: Path, dataset: str, kind: str, batch_size: int, turns: int
) -> dict[str, float]:
    """Images/s of all processes of a kind together; each has one thread and takes `batch_size`
    images a step.
    """

    def command(number: int) -> list[str]:
        told = scratch / f"{number}.json"
        return ["benchmarks.train", "--as-rank", dataset, str(batch_size), str(turns), str(told)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if kind == "ranks":
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "-m",
            *command(0),
        ]
        commands = [launch]
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
    return {RATE.key: sum(rates)}


class Rates:
    """An observer that keeps the rate of each epoch."""

    def __init__(self) -> None:
        self.images_per_s: list[float] = []

    def after_epoch(self, result: EpochResult) -> float:
        """Note the epoch."""
        self.images_per_s.append(result.images_per_s)
        return float("nan")


def train_rank(dataset: str, batch_size: int, turns: int, told: Path) -> None:
    """One rank, or one process by itself, of `batch_size` images a step; rank 0 tells the rate."""
    torch.set_num_threads(1)
    with join(timeout_s=60) as ranks:
        size = batch_size * ranks.world_size
        config = replace(
            Config(), train=replace(Config().train, epochs=turns + 1, global_batch_size=size)
        )
        config = replace(config, evaluate=replace(config.evaluate, shift_draws=1))
        options: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
        loader = Loader(dataset, split="train", batch_size=size, shuffle=True, **options)
        val = Loader(dataset, split="val", batch_size=config.evaluate.batch_size, **options)
        torch.manual_seed(0)
        observer = Rates()
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
            rate = statistics.median(observer.images_per_s[1:])  # the first epoch is warm-up
            told.write_text(json.dumps({"images_per_s": rate}))


if __name__ == "__main__":
    main()
