"""What a GPU does, in one command that takes less than 8 minutes: the tests marked `gpu`, then the
speed of training.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --tiny    # each part in small, on a CPU, too: figures mean nothing

- The reference recipe (configs/pneumonia.yaml) from the start of the command to the report, on the
  public data set where XRAI_TEST_DATA says so, else on phantoms, of which 4,700 are trained on.
- configs/gpu.yaml on random pixels, by epochs in turn: `fit` with batches from the loader, `fit`
  with the same batches already in memory, and a bare loop over batches that are already on the
  device: the same network, precision, augmentation, clipping, optimizer and averaged weights, and
  nothing else. The weights are random. Without timm it is resnet18 of width 64.
- The share of an epoch in which Python waited for a batch. Python is ahead of the device, so the
  device waits less.
- The loader alone: images that reach the device in a second, where nobody uses them.

Without a CUDA device it says so in one line and ends with status 1. No figure of it is known yet.
"""

import argparse
import csv
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.data import PUBLIC, find_public, source_or_phantoms
from benchmarks.harness import ROOT, Contender, Figure, Report, Run, ratio, run_in_turn, say
from benchmarks.train import BARE, IN_MEMORY, LOADED, RATE, Alternating
from tests.dataset.small import write_dataset
from xrai.config import Config, build, read_file
from xrai.dataset.loader import Loader, open_split
from xrai.errors import UserError
from xrai.learning import optim
from xrai.learning.augment import augment, uniform
from xrai.learning.batch import DeviceBatch, as_grey, to_device
from xrai.learning.distributed import join
from xrai.learning.loop import EpochResult, Precision, Setup, fit
from xrai.learning.predictor import build_model
from xrai.train import label_counts, require_compiler

MIN_TESTS = 25
NUM_PHANTOMS = 5700
RECIPE, FEED = "configs/pneumonia.yaml", "loader alone"
WAIT = Figure("wait_percent", "% of the time waiting for a batch", better="lower", digits=2)
MEMORY = Figure("device_mib", "peak memory of the device, MiB", better="lower")
_SHARD_ROWS = 512
_LIMITS_S = {"tests": 210.0, "recipe": 100.0, "loop": 150.0, "feed": 60.0}

# Keys that make each part small enough for a CPU
TINY = {"images.size": 32, "train.global_batch_size": 8, "train.compile": False}
TINY_NETWORK = {"model.name": "resnet10", "model.width": 8}


def main() -> None:
    """Run the tests, measure, print the tables and save them."""
    parser = argparse.ArgumentParser(description="The tests marked gpu, and training on a GPU.")
    parser.add_argument(
        "--tiny", action="store_true", help="each part in small, on a CPU, too; nothing is saved"
    )
    tiny = parser.parse_args().tiny
    if not torch.cuda.is_available() and not tiny:
        raise SystemExit("benchmarks.gpu: no CUDA device here; --tiny shows that each part runs")
    began = time.monotonic()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    keys = keys_of_loop(tiny=tiny)
    changes = ", ".join(f"{key} = {value!r}" for key, value in keys.items())
    settings = {"device": name, "tiny": tiny, "changes to gpu.yaml": changes}
    report = Report("gpu", settings=settings)
    if not tiny:
        passed, failed = run_tests()
        report.demand("tests marked gpu that pass", passed, at_least=MIN_TESTS, digits=0)
        report.demand("tests marked gpu that fail or skip", failed, at_most=0, digits=0)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        runs = report_recipe(report, prepare_recipe(Path(folder), tiny=tiny), tiny=tiny)
        pixels = write_pixels(Path(folder) / "pixels", keys, tiny=tiny)
        runs += report_loop(report, pixels, keys, tiny=tiny)
    num_failed = sum(bool(run.failure) for run in runs)
    report.demand("parts that failed", num_failed, at_most=0, digits=0)
    report.demand("minutes of all this", (time.monotonic() - began) / 60, at_most=8, digits=1)
    if not tiny:
        report.save()
    missed = [demand["text"] for demand in report.demands if not demand["reached"]]
    if num_failed or (missed and not tiny):
        raise SystemExit(f"not reached: {'; '.join(missed)}")


def run_tests() -> tuple[int, int]:
    """How many tests marked gpu pass, and how many do not."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = Path(folder) / "tests.xml"
        command = ["pytest", "-q", "-n", "0", "-m", "gpu", "tests/gpu", f"--junitxml={found}"]
        try:
            subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, "XRAI_TEST_GPU": "1"},
                check=False,
                timeout=_LIMITS_S["tests"],
            )
        except subprocess.TimeoutExpired:
            say(f"the tests did not end within {_LIMITS_S['tests']:.0f} s")
        if not found.exists():
            return 0, 1
        cases = list(ElementTree.parse(found).iter("testcase"))
    passed = sum(len(case) == 0 or case[0].tag.startswith("system") for case in cases)
    return passed, len(cases) - passed


def keys_of_loop(*, tiny: bool) -> dict[str, Any]:
    """What is changed of configs/gpu.yaml here."""
    keys: dict[str, Any] = {"model.weights": "", "evaluate.shift_draws": 1}
    if tiny or importlib.util.find_spec("timm") is None:
        keys |= {"model.name": "resnet18", "model.width": 64, "model.drop_path": 0.0}
        keys |= {"optim.layer_decay": 1.0}
    if tiny:
        return keys | TINY | TINY_NETWORK
    try:
        require_compiler(torch.device("cuda"))
    except UserError as error:
        say(f"train.compile is off: {error}")
        keys["train.compile"] = False
    return keys


def prepare_recipe(folder: Path, *, tiny: bool) -> str:
    """The data set of the reference recipe, made by the command."""
    source, what = source_or_phantoms(
        "" if tiny else find_public(PUBLIC),
        folder / "source",
        num_phantoms=60 if tiny else NUM_PHANTOMS,
    )
    say(f"the recipe trains on {what}")
    options = [f"--source={source}", f"--dataset={folder / 'dataset'}", *size_of_recipe(tiny=tiny)]
    command = [sys.executable, "-m", "xrai.preprocess", "--config=pneumonia", *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return str(folder / "dataset")


def size_of_recipe(*, tiny: bool) -> list[str]:
    """The option that makes its images small."""
    return [f"--images.size={TINY['images.size']}"] if tiny else []


def write_pixels(folder: Path, keys: Mapping[str, Any], *, tiny: bool) -> str:
    """A data set of random pixels for gpu.yaml: their content takes no time."""
    counts = {"train": 64, "val": 16} if tiny else {"train": 6144, "val": 128}
    rows = {split: shards_of(num_images) for split, num_images in counts.items()}
    write_dataset(folder, rows, size=config_of("gpu", keys).images.size)
    return str(folder)


def shards_of(num_images: int) -> list[int]:
    """The rows of each shard."""
    starts = range(0, num_images, _SHARD_ROWS)
    return [min(_SHARD_ROWS, num_images - start) for start in starts]


def config_of(name: str, keys: Mapping[str, Any]) -> Config:
    """A config that comes with xrai, with some keys changed."""
    return build({**read_file(name), **keys})


# ------------------------------------------------------------------------------------------- recipe


def report_recipe(report: Report, dataset: str, *, tiny: bool) -> list[Run]:
    """Add the table of the reference recipe; returns its run."""
    contender = Contender(
        RECIPE, "benchmarks.gpu:measure_recipe", {"dataset": dataset, "tiny": tiny}
    )
    runs = run_in_turn([contender], rounds=1, timeout_s=_LIMITS_S["recipe"])
    figures = [
        Figure("wall_s", "start to report, s", better="lower", digits=1),
        Figure("train_s", "epochs without validation, s", better="lower", digits=1),
        MEMORY,
    ]
    report.add_table("recipe", "The reference recipe", runs, figures=figures)
    if runs[0].figures:
        seconds = runs[0].figures["wall_s"]
        report.demand("seconds of the reference recipe", seconds, at_most=60, digits=1)
    return runs


def measure_recipe(*, scratch: Path, dataset: str, tiny: bool) -> dict[str, float]:
    """The command that people run, in one process."""
    options = [f"--dataset={dataset}", f"--artifacts={scratch}", "--run_id=run"]
    if tiny:
        options += ["--model.width=8", "--train.epochs=2", "--train.global_batch_size=16"]
        options += size_of_recipe(tiny=tiny)
    command = [sys.executable, "-m", "xrai.train", "--config=pneumonia", *options]
    subprocess.run(command, cwd=ROOT, check=True)
    with (scratch / "run" / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    return {
        "train_s": sum(float(epoch["epoch_s"]) for epoch in history),
        MEMORY.key: max(float(epoch["peak_memory_mib"]) for epoch in history),
    }


# --------------------------------------------------------------------------------------------- loop


def report_loop(report: Report, dataset: str, keys: Mapping[str, Any], *, tiny: bool) -> list[Run]:
    """Add the tables of gpu.yaml and of the loader, and what is demanded; returns their runs."""
    arguments = {"dataset": dataset, "keys": dict(keys), "turns": 1 if tiny else 2}
    turns = run_in_turn(
        [Contender("epochs in turn", "benchmarks.gpu:measure_loop", arguments)],
        rounds=1,
        timeout_s=_LIMITS_S["loop"],
    )
    runs = split_kinds(turns[0])
    report.add_table("loop", "configs/gpu.yaml", runs, ours=IN_MEMORY, figures=[RATE, WAIT, MEMORY])
    feed = run_in_turn(
        [Contender(FEED, "benchmarks.gpu:measure_feed", {"dataset": dataset, "keys": dict(keys)})],
        rounds=1,
        timeout_s=_LIMITS_S["feed"],
    )
    report.add_table(
        "feed",
        "The loader alone, to the device",
        feed,
        figures=[RATE, Figure("gb_per_s", "GB/s", digits=2)],
    )
    for text, one in (("local cache", LOADED), ("memory", IN_MEMORY)):
        for run in runs:
            if run.contender == one and run.figures:
                value = run.figures[WAIT.key]
                report.demand(f"% of the time waiting, {text}", value, at_most=2)
    if all(run.figures for run in runs):
        overhead = 1 - ratio(runs, IN_MEMORY, BARE, RATE.key)["median"]
        report.demand("overhead of the loop over a bare one, %", 100 * overhead, at_most=3)
    return [*runs, *feed]


def split_kinds(turn: Run) -> list[Run]:
    """A run of each kind of epoch out of the one that took turns."""
    found = []
    for kind in (LOADED, IN_MEMORY, BARE):
        own = {
            key.partition("|")[2]: value
            for key, value in turn.figures.items()
            if key.startswith(f"{kind}|")
        }
        found.append(Run(kind, turn.round, own, turn.failure))
    return found


def measure_loop(
    *, scratch: Path, dataset: str, keys: dict[str, Any], turns: int
) -> dict[str, float]:
    """Median figures of each kind of epoch, named KIND|FIGURE; the first turn is warm-up."""
    config = config_of("gpu", {**keys, "train.epochs": 2 * (turns + 1)})
    loader, val = (
        open_split(config, dataset, of, shuffle=of == "train") for of in ("train", "val")
    )
    labels, counts = loader.index.labels, label_counts(loader.index)
    found: dict[str, list[float]] = {}
    with join(timeout_s=60) as ranks:
        split = Alternating(loader)
        bare = Bare(config, split, optim.make_objective(labels, counts, config.optim), ranks.device)

        def after_epoch(result: EpochResult) -> float:
            kind = LOADED if result.epoch % 2 == 0 else IN_MEMORY
            figures = {
                f"{kind}|{RATE.key}": result.images_per_s,
                f"{kind}|{WAIT.key}": 100 * result.data_wait_share,
                f"{kind}|{MEMORY.key}": result.peak_memory_mib,
                f"{BARE}|{RATE.key}": bare.epoch(result.epoch),
            }
            for key, value in figures.items():
                if result.epoch >= 2:
                    found.setdefault(key, []).append(value)
            return float("nan")

        torch.manual_seed(0)
        setup = Setup(
            config,
            ranks,
            split,
            val,
            labels=labels,
            counts=counts,
            val_labels=val.labels,
            after_epoch=after_epoch,
        )
        fit(build_model(config.model, labels.num_outputs, image_size=config.images.size), setup)
    return {key: statistics.median(values) for key, values in found.items()}


class Bare:
    """The same training, written down without anything around it."""

    def __init__(
        self, config: Config, split: Alternating, objective: optim.Objective, device: torch.device
    ) -> None:
        self._config, self._device = config, device
        self._precision = Precision(config.train, device)
        model = build_model(config.model, len(objective.prior), image_size=config.images.size)
        self._model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = torch.compile(self._model) if config.train.compile else self._model
        self._average = deepcopy(self._model).requires_grad_(False)
        self._optimizer = optim.make_optimizer(self._model, config.optim)
        self._objective = objective.to(device, torch.float32)
        self._batches = list(to_device(iter(split.batches), device))

    def epoch(self, epoch: int) -> float:
        """Images/s of an epoch."""
        self._model.train()
        began = time.perf_counter()
        for step, batch in enumerate(self._batches):
            self._step(batch, epoch, step)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        num_images = sum(len(batch.own_rows) for batch in self._batches)
        return num_images / (time.perf_counter() - began)

    def _step(self, batch: DeviceBatch, epoch: int, step: int) -> None:
        config, optimizer = self._config, self._optimizer
        images = augment(
            as_grey(batch.images, torch.float32),
            batch.rows,
            seed=0,
            epoch=epoch,
            strength=config.augment,
        ).contiguous(memory_format=torch.channels_last)
        if num_draws := self._model.num_draws:
            self._model.draw(uniform(batch.rows, num_draws, seed=2, epoch=epoch))
        with self._precision.autocast():
            logits = self._network(images)
        losses = optim.image_losses(logits.float(), batch.labels, self._objective)
        losses.mean().backward()
        optim.clip_gradients(self._model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        optim.update_average(self._average, self._model, step=step, decay=config.optim.ema_decay)


def measure_feed(*, scratch: Path, dataset: str, keys: dict[str, Any]) -> dict[str, float]:
    """Images/s and GB/s that reach the device; median of three epochs after one."""
    config = config_of("gpu", keys)
    loader: Loader = open_split(config, dataset, "train", shuffle=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    for epoch in range(4):
        began = time.perf_counter()
        num_images = sum(len(batch.own_rows) for batch in to_device(loader.epoch(epoch), device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        assert num_images == loader.num_images
    rate = loader.num_images / statistics.median(seconds[1:])
    return {RATE.key: rate, "gb_per_s": rate * loader.index.image_size**2 / 1e9}


if __name__ == "__main__":
    main()
