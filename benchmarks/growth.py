"""What a data set of 1,000, 10,000 and 100,000 images costs: seconds and memory to make, to load
and to train on.

    python -m benchmarks.growth  # 1,000, 10,000 and 100,000 phantoms: some 25 minutes
    python -m benchmarks.growth --sizes 500 1000 2000 --rounds 1  # a trial

Time should grow as the number of images does, and memory hardly at all. Seconds are taken as a + b
n^p: what starting costs, a, cancels in the differences between three sizes, and p is their
exponent; 1 is linear. docs/scale.md takes it from here to 100 million.

The images are phantoms, each file another one. `NUM_DRAWN` are drawn (`xrai.phantom`), which takes
17 ms of one core each; the others are those again, turned, cut, exposed and grained in another way,
which takes 2 ms. All images from one drawing carry its patient's name, so they are in one split,
as a patient's images are; a large set has thus more images of each patient, not more patients.
Files are JPEG of 224 x 224 pixels, as those of the public copy.

Memory is counted over all processes together. `anonymous` is what the program holds for itself; it
leaves out pages of mapped files, which the system may drop at any time and which grow with what was
read, up to the size of the data set.
"""

import argparse
import csv
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import (
    OWN_PAGES,
    RESULTS,
    ROOT,
    Contender,
    Figure,
    Report,
    Run,
    run_in_turn,
    say,
    summarise,
    values_of,
    watch_memory,
)
from xrai.phantom import Phantom, draw_phantom, plan

SIZES = (1_000, 10_000, 100_000)
NUM_DRAWN = 4_000
MIN_SIZE = 200  # fewer hold too few patients for a val of both classes
SIDE = 224  # pixels of a file's image, as of the public copy
KINDS = ("preprocess", "load", "train")
WORDS: Mapping[str, str] = {
    "preprocess": "preprocess",
    "load": "an epoch of the loader",
    "train": "an epoch of training",
}
TITLES: Mapping[str, str] = {
    "preprocess": f"xrai.preprocess, {SIDE} px files to 64 px, the whole command",
    "load": "Loader, shuffled epochs of train in batches of 64, 64 px, warm",
    "train": "xrai.train, one epoch with the defaults, 64 px, one process of one thread",
}
NOTES: Mapping[str, str] = {
    "preprocess": "python -m xrai.preprocess --workers 2, files in the page cache",
    "load": "Loader(...).epoch in one process; the median epoch after the first",
    "train": "python -m xrai.train --train.epochs=1 --train.threads=1",
}
_MEMORY = (
    Figure("anonymous_mib", "its own memory, MiB", "lower"),
    Figure("peak_memory_mib", "with mapped files, MiB", "lower"),
)
FIGURES: Mapping[str, Sequence[Figure]] = {
    "preprocess": (
        Figure("seconds", "seconds", "lower", 1),
        Figure("images_per_s", "images/s"),
        *_MEMORY,
    ),
    "load": (
        Figure("seconds", "seconds an epoch", "lower", 4),
        Figure("images_per_s", "images/s"),
        Figure("first_batch_ms", "first batch, ms", "lower", 1),
        *_MEMORY,
    ),
    "train": (
        Figure("seconds", "seconds an epoch", "lower", 1),
        Figure("images_per_s", "images/s"),
        Figure("command_s", "seconds, whole command", "lower", 1),
        *_MEMORY,
    ),
}
MAX_BYTES_AN_IMAGE = 1024  # of memory: a quarter of the pixels of a stored image

_QUALITY = 85
_MAX_TURN_DEG, _MAX_CUT, _MAX_GAMMA = 6.0, 0.12, 0.25
_FILTER = Image.Resampling.BILINEAR
_LOAD_S = 5.0  # epochs are loaded for so long, and at least three of them


def main() -> None:
    """Draw the phantoms, measure, print, and write growth.json and growth.png."""
    parser = argparse.ArgumentParser(description="Seconds and memory by the number of images.")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=list(SIZES),
        help="numbers of images, at least three",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="preprocess makes what others need",
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder with room for twice the images, 2.5 GB by default"
    )
    parser.add_argument("--timeout_s", type=float, default=1800.0, help="of one run")
    flags = parser.parse_args()
    sizes = sorted(set(flags.sizes))
    if len(sizes) < 3 or sizes[0] < MIN_SIZE:
        raise SystemExit(f"--sizes takes three numbers or more, of at least {MIN_SIZE}")
    report = Report(
        "growth",
        settings={
            "sizes": sizes,
            "rounds": flags.rounds,
            "workers": flags.workers,
            "num_drawn": NUM_DRAWN,
            "side": SIDE,
        },
    )
    with tempfile.TemporaryDirectory(prefix="xrai-growth-", dir=flags.scratch) as folder:
        began = time.monotonic()
        prepare(Path(folder), sizes, num_workers=flags.workers)
        say(f"{max(sizes):,} phantoms in {time.monotonic() - began:.0f} s")
        runs: dict[str, list[Run]] = {}
        for kind in flags.kinds:
            contenders = [contender_of(kind, Path(folder), size, flags.workers) for size in sizes]
            runs[kind] = run_in_turn(contenders, rounds=flags.rounds, timeout_s=flags.timeout_s)
    for kind, found in runs.items():
        report.add_table(kind, TITLES[kind], found, figures=FIGURES[kind])
    growths: dict[str, Growth] = {}
    for kind, found in runs.items():
        try:
            growths[kind] = growth_of(found, kind, sizes)
        except ValueError as error:  # the table shows why; what was measured is kept
            say(f"{kind}: nothing to fit: {error}")
    for kind, growth in growths.items():
        report.demand(f"{kind}: exponent of seconds by images", growth.exponent, at_most=1.1)
        steps = f"{sizes[-2]:,} to {sizes[-1]:,} over {sizes[-3]:,} to {sizes[-2]:,}"
        report.demand(f"{kind}: seconds an image more, {steps}", growth.last_ratio, at_most=1.2)
        report.demand(
            f"{kind}: memory, bytes an image more",
            growth.bytes_an_image,
            at_most=MAX_BYTES_AN_IMAGE,
            digits=0,
        )
    report.save()
    draw(growths, RESULTS / "growth.png")


def prepare(folder: Path, sizes: Sequence[int], *, num_workers: int) -> None:
    """Folders `images-N`, each with the first N images (links to the same files)."""
    largest = folder / f"images-{max(sizes)}"
    make_pictures(largest, max(sizes), num_workers=num_workers)
    phantoms = list(islice(plan(0), min(max(sizes), NUM_DRAWN)))
    for size in sizes[:-1]:
        for number in range(size):
            phantom = phantoms[number % NUM_DRAWN]
            path = Path(phantom.label, name_of(phantom, number // NUM_DRAWN))
            (folder / f"images-{size}" / path.parent).mkdir(parents=True, exist_ok=True)
            os.link(largest / path, folder / f"images-{size}" / path)


def contender_of(kind: str, folder: Path, size: int, num_workers: int) -> Contender:
    dataset = str(folder / f"dataset-{size}")
    arguments: dict[str, dict[str, Any]] = {
        "preprocess": {
            "source": str(folder / f"images-{size}"),
            "dataset": dataset,
            "num_workers": num_workers,
        },
        "load": {"dataset": dataset},
        "train": {"dataset": dataset},
    }
    return Contender(
        f"{kind} {size:,}", f"benchmarks.growth:measure_{kind}", arguments[kind], note=NOTES[kind]
    )


# ----------------------------------------------------------------------------------------- phantoms


def make_pictures(folder: Path, num: int, *, num_drawn: int = NUM_DRAWN, num_workers: int) -> None:
    """Write images 0 to `num` - 1 to FOLDER/{NORMAL,PNEUMONIA}. An image is the same whatever
    `num`.

    Image i shows drawing i % `num_drawn` in its variation i // `num_drawn`; no drawing is shown
    as it was drawn.
    """
    for label in ("NORMAL", "PNEUMONIA"):
        (folder / label).mkdir(parents=True, exist_ok=True)
    phantoms = list(enumerate(islice(plan(0), min(num, num_drawn))))
    write = partial(_write_variations, folder, num, num_drawn)
    with ProcessPoolExecutor(num_workers) as pool:
        for _ in pool.map(write, phantoms, chunksize=8):
            pass


def _write_variations(
    folder: Path, num: int, num_drawn: int, numbered: tuple[int, Phantom]
) -> None:
    first, phantom = numbered
    film = np.rint(draw_phantom(0, phantom) * np.float32(255)).astype(np.uint8)  # (H, W)
    for number in range(first, num, num_drawn):
        picture = vary(film, np.random.default_rng([1, number]))
        path = folder / phantom.label / name_of(phantom, number // num_drawn)
        Image.fromarray(picture).save(path, "JPEG", quality=_QUALITY)


def name_of(phantom: Phantom, variation: int) -> str:
    """The file name of a variation: another image of the same patient, by the public data
    set's rules.
    """
    return f"{phantom.stem}{'-' if phantom.kind == 'normal' else '_'}{variation + 1:04d}.jpeg"


def vary(film: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """(SIDE, SIDE) uint8: an image (H, W) turned, cut to a part of it, exposed and grained as the
    generator says.
    """
    height, width = film.shape
    turn = math.radians(generator.uniform(-_MAX_TURN_DEG, _MAX_TURN_DEG))
    left, right = width * generator.uniform((0, 1 - _MAX_CUT), (_MAX_CUT, 1))
    top, bottom = height * generator.uniform((0, 1 - _MAX_CUT), (_MAX_CUT, 1))
    along, across = (
        math.cos(turn) / SIDE,
        math.sin(turn) / SIDE,
    )  # pixel (x, y) shows (a x + b y + c, d x + e y + f)
    a, b, d, e = (
        (right - left) * along,
        -(bottom - top) * across,
        (right - left) * across,
        (bottom - top) * along,
    )
    c, f = (left + right - (a + b) * SIDE) / 2, (top + bottom - (d + e) * SIDE) / 2
    picture = Image.fromarray(film).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, (a, b, c, d, e, f), _FILTER
    )
    levels = 255 * np.linspace(0, 1, 256) ** math.exp(generator.uniform(-_MAX_GAMMA, _MAX_GAMMA))
    exposed = np.asarray(picture.point(np.rint(levels).astype(int).tolist()))
    draws = np.frombuffer(generator.bytes(SIDE * SIDE), np.int8).reshape(
        SIDE, SIDE
    )  # uniform, -128 to 127
    grain = draws // np.int8(generator.integers(12, 100))
    return np.clip(exposed.astype(np.int16) + grain, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------- measuring


def measure_preprocess(
    *, scratch: Path, source: str, dataset: str, num_workers: int
) -> dict[str, float]:
    """`xrai.preprocess` from start to end. The data set stays, for `measure_load` and
    `measure_train`.
    """
    shutil.rmtree(dataset, ignore_errors=True)
    seconds, anonymous_mib = run_command(
        "xrai.preprocess",
        "--source",
        source,
        "--dataset",
        dataset,
        "--workers",
        str(num_workers),
        scratch=scratch,
    )
    return {
        "seconds": seconds,
        "anonymous_mib": anonymous_mib,
        "images_per_s": num_stored(dataset) / seconds,
    }


def measure_load(*, scratch: Path, dataset: str) -> dict[str, float]:
    """Shuffled epochs of the train split in batches of 64, each shard's hash checked in the
    first.
    """
    from xrai.dataset.loader import Loader, LoaderOptions

    with watch_memory(os.getpid(), pages=OWN_PAGES) as memory:
        began = time.perf_counter()
        options = LoaderOptions(cache_dir=scratch)
        loader = Loader(dataset, split="train", batch_size=64, shuffle=True, options=options)
        first: list[float] = []  # seconds to the first batch, by epoch
        epochs: list[float] = []
        while len(epochs) < 4 or sum(epochs) < _LOAD_S:
            started = time.perf_counter() if epochs else began
            for batch in loader.epoch(len(epochs)):
                if batch.step == 0:
                    first.append(time.perf_counter() - started)
            epochs.append(time.perf_counter() - started)
    seconds = float(np.median(epochs[1:]))
    return {
        "seconds": seconds,
        "images_per_s": loader.num_images / seconds,
        "first_epoch_s": epochs[0],
        "first_batch_ms": first[0] * 1e3,
        "anonymous_mib": memory.peak_mib,
    }


def measure_train(*, scratch: Path, dataset: str) -> dict[str, float]:
    """`xrai.train` for one epoch in one process, of one thread; `seconds` are those of the epoch
    alone.
    """
    command_s, anonymous_mib = run_command(
        "xrai.train",
        "--dataset",
        dataset,
        "--artifacts",
        str(scratch),
        "--run_id",
        "growth",
        "--train.epochs=1",
        "--train.threads=1",
        scratch=scratch,
    )
    with (scratch / "growth" / "history.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    seconds = float(row["epoch_s"])
    return {
        "seconds": seconds,
        "images_per_s": float(row["images_per_s"]),
        "command_s": command_s,
        "anonymous_mib": anonymous_mib,
    }


def num_stored(dataset: str) -> int:
    """Images of a data set."""
    from xrai.dataset.shards import read_index
    from xrai.store import open_store

    return read_index(open_store(dataset)).counts.num_written


def run_command(module: str, *options: str, scratch: Path) -> tuple[float, float]:
    """Seconds of a command of xrai, and the most memory that it and its children held for
    themselves, MiB.
    """
    with (scratch / "words").open("w+b") as words:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", module, *options], cwd=ROOT, stdout=words, stderr=words
        )
        with watch_memory(process.pid, pages=OWN_PAGES) as memory:
            status = process.wait()
        seconds = time.perf_counter() - began
        words.seek(0)
        if status:
            raise RuntimeError(
                f"{module} ended with {status}: {words.read()[-300:].decode(errors='replace')}"
            )
    return seconds, memory.peak_mib


# ------------------------------------------------------------------------------------------ growing


@dataclass(frozen=True)
class Growth:
    """How seconds and memory follow the number of images."""

    images: list[int]
    seconds: list[float]  # medians
    memory_mib: list[float]
    exponent: float  # p of a + b n^p through the three largest sizes
    last_ratio: float  # seconds an image more, of the last step between sizes over the step before
    bytes_an_image: float  # memory of the largest size less that of the smallest, by their images


def growth_of(runs: Sequence[Run], kind: str, sizes: Sequence[int]) -> Growth:
    """What the runs of a kind say. Raises `ValueError` where a size has none, or seconds do not
    rise.
    """

    def medians(key: str) -> list[float]:
        found = [list(values_of(runs, f"{kind} {size:,}", key).values()) for size in sizes]
        if not all(found):
            raise ValueError("no run of one of the sizes succeeded")
        return [summarise(values)["median"] for values in found]

    seconds, memory_mib = medians("seconds"), medians("anonymous_mib")
    before, last = (
        (seconds[k] - seconds[k - 1]) / (sizes[k] - sizes[k - 1])
        for k in (len(sizes) - 2, len(sizes) - 1)
    )
    return Growth(
        images=list(sizes),
        seconds=seconds,
        memory_mib=memory_mib,
        exponent=exponent_of(sizes[-3:], seconds[-3:]),
        last_ratio=last / before,
        bytes_an_image=(memory_mib[-1] - memory_mib[0]) * 2**20 / (sizes[-1] - sizes[0]),
    )


def exponent_of(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The p, from 0 to 4, of the curve a + b n^p through three points. Raises `ValueError` where
    they do not rise.
    """
    (small, middle, large), (first, second, third) = np.log(sizes), seconds
    if not first < second < third:
        raise ValueError(
            f"{first:g}, {second:g} and {third:g} s do not rise with the size: take larger sizes"
        )
    wanted = (third - second) / (second - first)
    low, high = 1e-6, 4.0
    while high - low > 1e-6:
        exponent = (low + high) / 2
        steps = (
            np.exp(exponent * (np.array([large, middle]) - small)) - 1
        )  # n^p over the smallest one's, less 1
        low, high = (
            (low, exponent) if (steps[0] - steps[1]) / steps[1] > wanted else (exponent, high)
        )
    return low


def draw(growths: Mapping[str, Growth], path: Path) -> None:
    """Seconds and memory over images, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for (kind, growth), colour in zip(
        growths.items(), ("#b5402a", "#2f6690", "#5b8c5a"), strict=False
    ):
        label = f"{WORDS[kind]}: exponent {growth.exponent:.2f}"
        left.loglog(growth.images, growth.seconds, "o-", color=colour, label=label)
        slope = (growth.seconds[-2] - growth.seconds[0]) / (growth.images[-2] - growth.images[0])
        linear = [growth.seconds[0] + slope * (size - growth.images[0]) for size in growth.images]
        left.loglog(growth.images, linear, "k:", linewidth=1)
        label = f"{WORDS[kind]}: {growth.bytes_an_image:,.0f} bytes an image"
        right.loglog(growth.images, growth.memory_mib, "o-", color=colour, label=label)
    left.set(title="Seconds (dotted: a start and so much an image)", xlabel="images")
    right.set(title="Memory of all processes, MiB, mapped files left out", xlabel="images")
    low, high = right.get_ylim()
    right.set_ylim(min(low, 50), max(high, 5000))
    for panel in (left, right):
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
