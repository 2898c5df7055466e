"""One epoch of training from stored images: xrai beside what the field trains with.

    python -m benchmarks.epoch  # needs XRAI_TEST_DATA, or draws phantoms
    python -m benchmarks.epoch --images 512 --rounds 1  # a quick try

All train timm's resnet18 on the same RGB JPEG files at 224 px, with batches of 64 over all
processes, AdamW, bfloat16 where the processor has it, and all cores of the machine. The figure is
the time from opening the files or shards to the end of the epoch's last step; starting up, writing
shards once before, validation and results are not in it. Imports are done before the clock starts.

    xrai         `xrai train`; its data set as `xrai preprocess` wrote it
    the others   as `benchmarks.trainers` says

The numbers of processes, threads and workers of the loader are those with which each was fastest on
`--trial_images` images just before.

Two reports. For the first one nobody augments. For the second one everybody does in its own way:
xrai each image by an affine resampling, gamma, contrast, blur and noise, the others as their
documentation does, which is a crop or rotation and a flip. Batch statistics are of all processes in
xrai, and of each process in the others, which have no synchronization on CPUs.
"""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from benchmarks import peers
from benchmarks.data import PUBLIC, copy_some, find_public, source_or_phantoms
from benchmarks.harness import (
    ROOT,
    Contender,
    Figure,
    Report,
    Run,
    best_of,
    ratio,
    run_in_turn,
    say,
    values_of,
)
from benchmarks.trainers import SIDE, Job
from xrai.config import Augment, all_keys
from xrai.files import num_cores

RATE = Figure("images_per_s", "images/s", digits=1)
FIGURES = (
    RATE,
    Figure("epoch_s", "s an epoch", "lower", 1),
    Figure("loss", "mean loss", "lower", 2),
    Figure("peak_memory_mib", "peak memory, MiB", "lower"),
)
PARTS = {"plain": "without augmentation", "augmented": "each with its own augmentation"}
NAMES = {
    "lightning": "Lightning with litData",
    "monai": "MONAI, CacheDataset",
    "timm": "timm, its loader and loop",
    "torchvision": "torchvision, plain loop",
}
CHANGES = {
    "lightning": "random resized crop and flip of each image",
    "monai": "rotation, flip and zoom, each of half of the images",
    "timm": "random resized crop, flip and color jitter of each image",
    "torchvision": "random resized crop and flip of each image",
}
OURS = "xrai"
TRAINING = (
    *("--model.name=timm/resnet18", "--train.epochs=1", "--train.global_batch_size=64"),
    *("--evaluate.shift_draws=1", "--evaluate.num_bootstrap=10"),  # results are not measured
)
Mode = tuple[int, int]  # processes, workers of each one's loader
MODES: tuple[Mode, ...] = ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
TIMEOUT_S = 3600.0
SAMPLE_S = 2.0  # between two looks at the memory of several GiB, which cost processor time


def main() -> None:
    """Prepare the data, find how each peer is fastest, measure and save."""
    parser = argparse.ArgumentParser(description="One epoch of training beside the peers.")
    parser.add_argument(
        "--source", default=find_public(PUBLIC), help="folder of images in folders of classes"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=0, help="how many are used; 0: all")
    parser.add_argument(
        "--trial_images", type=int, default=512, help="of the runs that find the fastest set-up"
    )
    parser.add_argument("--trials", type=int, default=1, help="such runs of each set-up")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=list(NAMES))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        source, described = source_or_phantoms(
            flags.source, folder / "phantoms", num_phantoms=flags.images or 5216
        )
        whole, few = folder / "whole", folder / "few"
        num_images = prepare(Path(source), whole, num_images=flags.images)
        prepare(Path(source), few, num_images=flags.trial_images)
        settings = {
            "images": f"{num_images} of {described}",
            "size": SIDE,
            "batch_size": 64,
            "rounds": flags.rounds,
            "trial_images": flags.trial_images,
            "trials": flags.trials,
        }
        for part in flags.parts:
            modes = {
                name: find_fastest(name, few, part, trials=flags.trials)
                for name in (OURS, *flags.peers)
            }
            report = Report(f"epoch_{part}", settings=settings)
            measure_part(report, whole, part, modes, rounds=flags.rounds)
            report.save()


# ---------------------------------------------------------------------------------------- preparing


def prepare(source: Path, folder: Path, *, num_images: int) -> int:
    """Write the training images as each contender reads them: `xrai`, `files` and `litdata`. The
    number of images.
    """
    from xrai.dataset.loader import Loader

    say(f"preparing {folder.name}")
    used = copy_some(source, folder / "source", num_images=num_images)
    val_fraction = max(0.01, 32 / (num_images or 5216))
    run(
        *("xrai.preprocess", "--source", str(used), "--dataset", str(folder / "xrai")),
        *(f"--images.size={SIDE}", f"--shards.rows={peers.SHARD_ROWS}"),
        *("--splits.test_fraction=0", f"--splits.val_fraction={val_fraction}"),
    )
    loader = Loader(str(folder / "xrai"), split="train", batch_size=64)
    sources = loader.columns("source")["source"]
    classes, paths = loader.index.classes, []
    for number, (label, path) in enumerate(zip(loader.labels, sources, strict=True)):
        place = folder / "files" / classes[label] / f"{number:07d}{Path(path).suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to((used / path).resolve(strict=True))
        paths.append(str(place))
    # in the order of rows, which is random, so that each chunk is a sample
    peers.write_litdata(read_grey, paths, folder / "litdata", num_workers=1)
    return loader.num_images


def read_grey(path: str) -> tuple[NDArray[np.uint8], int]:
    """Gray levels (H, W) and the label of a file in a folder of its class, for litData's writer."""
    place = Path(path)
    classes = sorted(folder.name for folder in place.parent.parent.iterdir())
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((SIDE, SIDE))), classes.index(place.parent.name)


# ---------------------------------------------------------------------------------------- comparing


def find_fastest(trainer: str, folder: Path, part: str, *, trials: int) -> Mode:
    """The processes and workers with which xrai or a peer was fastest on the trial's images."""
    able = [mode for mode in MODES if mode[0] <= num_cores()]
    if trainer == OURS:  # its loader has threads, not workers
        able = [mode for mode in able if mode[1] == 0]
    modes = {describe_mode(trainer, mode): mode for mode in able}
    contenders = [
        make_contender(trainer, folder, part, mode, name=name) for name, mode in modes.items()
    ]
    say(f"trying {trainer}, {PARTS[part]}")
    runs = run_in_turn(contenders, rounds=trials, timeout_s=TIMEOUT_S, sample_s=SAMPLE_S)
    names = [name for name in modes if values_of(runs, name, RATE.key)]
    if not names:
        raise SystemExit(f"{trainer} failed in every set-up: {runs[-1].failure}")
    return modes[best_of(runs, names, RATE)]


def describe_mode(trainer: str, mode: Mode) -> str:
    """How a trainer shares the cores, in words."""
    processes, workers = mode
    text = f"processes {processes}, threads of each {max(1, num_cores() // processes)}"
    return text if trainer == OURS else f"{text}, loader workers of each {workers}"


def make_contender(
    trainer: str, folder: Path, part: str, mode: Mode, *, name: str, note: str = ""
) -> Contender:
    """xrai or a peer, with what it trains on in a folder that `prepare` filled."""
    augmented = part == "augmented"
    if trainer == OURS:
        flags = [] if augmented else augmentation_off()
        own = {"dataset": str(folder / "xrai"), "flags": flags, "processes": mode[0]}
        return Contender(name, "benchmarks.epoch:measure_xrai", own, note)
    job = Job(str(folder / "files"), str(folder / "litdata"), *mode, augmented=augmented)
    arguments = {"peer": trainer, "job": asdict(job)}
    return Contender(name, "benchmarks.epoch:measure_peer", arguments, note)


def augmentation_off() -> list[str]:
    """The flags that turn every augmentation off."""
    names = [key.name for key in all_keys() if key.name.startswith("augment.")]
    assert len(names) == len(asdict(Augment()))
    return [f"--{name}=0" for name in names]


def measure_part(
    report: Report, folder: Path, part: str, modes: Mapping[str, Mode], *, rounds: int
) -> None:
    """Measure all in turn, and add a table and the demand to be ahead of each peer."""
    contenders = []
    for trainer, mode in modes.items():
        note = describe_mode(trainer, mode)
        if part == "augmented" and trainer in CHANGES:
            note += f", {CHANGES[trainer]}"
        name = NAMES.get(trainer, trainer)
        contenders.append(make_contender(trainer, folder, part, mode, name=name, note=note))
    runs = run_in_turn(contenders, rounds=rounds, timeout_s=TIMEOUT_S, sample_s=SAMPLE_S)
    report.add_table(part, f"One epoch, {PARTS[part]}", runs, ours=OURS, figures=FIGURES)
    demand_each(report, part, runs, [NAMES[trainer] for trainer in modes if trainer in NAMES])


def demand_each(report: Report, part: str, runs: Sequence[Run], names: Sequence[str]) -> None:
    """Demand that xrai is ahead of each of these that has succeeded in a round of xrai's."""
    for name in names:
        if not set(values_of(runs, OURS, RATE.key)) & set(values_of(runs, name, RATE.key)):
            say(f"{name} has no round to compare")
            continue
        times = ratio(runs, OURS, name, RATE.key)["median"]
        report.demand(f"{PARTS[part]}: images/s over {name}", times, at_least=1)


# ---------------------------------------------------------------------------------------- measuring


def measure_xrai(
    *, scratch: Path, dataset: str, flags: list[str], processes: int
) -> dict[str, float]:
    """An epoch of the command, which is ended then, and the time that opening its data set takes,
    measured apart.
    """
    from xrai.dataset.loader import Loader

    began = time.perf_counter()
    loader = Loader(dataset, split="train", batch_size=64, shuffle=True)
    opened_s = time.perf_counter() - began
    command = (
        *(sys.executable, "-m", "xrai", "train", f"--nproc_per_node={processes}"),
        *("--dataset", dataset, "--artifacts", str(scratch), "--run_id", "run"),
        *(*TRAINING, *flags),
    )
    with subprocess.Popen(command, cwd=ROOT) as process:
        history = scratch / "run" / "history.csv"
        while not (rows := read_rows(history)) and process.poll() is None:
            time.sleep(1.0)
        if rows:  # the results that follow take longer than the epoch, and are not measured
            end_all(process.pid)
    if not rows:
        raise RuntimeError(f"xrai train ended with {process.returncode} before its first epoch")
    (row,) = rows
    epoch_s = opened_s + float(row["epoch_s"])
    return {
        "images_per_s": loader.num_images / epoch_s,
        "epoch_s": epoch_s,
        "loss": float(row["train_loss"]),
    }


def read_rows(history: Path) -> list[dict[str, str]]:
    """The epochs that a run has written so far."""
    if not history.exists():
        return []
    with history.open(newline="") as file:
        return list(csv.DictReader(file))


def end_all(pid: int) -> None:
    """Kill a process and all those that it started."""
    process = psutil.Process(pid)
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def measure_peer(*, scratch: Path, peer: str, job: dict[str, Any]) -> dict[str, float]:
    """An epoch of a peer in its own processes."""
    told, processes = scratch / "told.json", job["processes"]
    ranks = ("torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m")
    run(
        *(ranks if processes > 1 else ()),
        *("benchmarks.trainers", peer, json.dumps(job), str(told)),
        OMP_NUM_THREADS=str(max(1, num_cores() // processes)),
    )
    figures: dict[str, float] = json.loads(told.read_text())
    return figures


def run(*module: str, **env: str) -> None:
    """Run a module. Raises `RuntimeError` with the end of what it said if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{module[:3]} ended with {done.returncode}: {done.stdout[-2000:]}")


if __name__ == "__main__":
    main()
