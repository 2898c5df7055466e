"""Rates of the loader alone, beside a plain gather from one array in memory. The numbers stand in docs/decisions/0004.

    python benchmarks/loading.py                          # random pixels in a temporary folder, 64 and 224 pixels
    python benchmarks/loading.py --dataset s3://b/set     # a data set of one's own, cold (an empty cache) and warm

Each figure is the median of `--runs` runs, with the smallest and the largest; the kinds of run take turns.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.loader import Loader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.dataset.small import write_dataset

NUM_ROWS, SHARD_ROWS, BATCH_SIZE = 5216, 1024, 64


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description="Rates of the loader.")
    parser.add_argument("--dataset", help="address of a data set; made up if not given")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a run, at least")
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind")
    flags = parser.parse_args()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {versions}")
    if flags.dataset:
        with tempfile.TemporaryDirectory() as cache:
            measure_cold(flags.dataset, Path(cache), num_runs=flags.runs)
            measure(flags.dataset, seconds=flags.seconds, num_runs=flags.runs, cache=Path(cache) / "warm")
        return
    for size in (64, 224):
        with tempfile.TemporaryDirectory() as folder:
            rows = [min(SHARD_ROWS, NUM_ROWS - start) for start in range(0, NUM_ROWS, SHARD_ROWS)]
            write_dataset(Path(folder), {"train": rows}, size=size)
            measure(folder, seconds=flags.seconds, num_runs=flags.runs, cache=None)


def measure(address: str, *, seconds: float, num_runs: int, cache: Path | None) -> None:
    loaders = {
        "shuffled": Loader(address, split="train", batch_size=BATCH_SIZE, shuffle=True, cache_dir=cache),
        "in order": Loader(address, split="train", batch_size=BATCH_SIZE, cache_dir=cache),
    }
    images = np.concatenate([batch.images for batch in loaders["in order"].epoch(0)])
    kinds: dict[str, Callable[[], Iterator[int]]] = {
        **{name: lambda loader=loader: batches_of(loader) for name, loader in loaders.items()},  # type: ignore[misc]
        "gather in memory": lambda: gathers_of(images),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(num_runs):
        for name, kind in kinds.items():
            rates[name].append(rate_of(kind(), seconds))
    print(
        f"{len(images)} images of {images.shape[2]} pixels, batches of {BATCH_SIZE}, {num_runs} runs of {seconds:g} s"
    )
    for name, found in rates.items():
        print(f"  {name:>18}: {statistics.median(found):>9,.0f} img/s ({min(found):,.0f} to {max(found):,.0f})")


def measure_cold(address: str, folder: Path, *, num_runs: int) -> None:
    """Seconds to the first batch and to the end of an epoch, from an empty cache."""
    first, whole = [], []
    for run in range(num_runs):
        started = time.perf_counter()
        loader = Loader(address, split="train", batch_size=BATCH_SIZE, shuffle=True, cache_dir=folder / str(run))
        for batch in loader.epoch(0):
            if batch.step == 0:
                first.append(time.perf_counter() - started)
        whole.append(time.perf_counter() - started)
    print(f"from an empty cache, {num_runs} runs: first batch after {statistics.median(first):.2f} s, "
          f"{loader.num_images / statistics.median(whole):,.0f} img/s in the first epoch")  # fmt: skip


def batches_of(loader: Loader) -> Iterator[int]:
    for epoch in range(1_000_000):
        for batch in loader.epoch(epoch):
            yield len(batch.rows)


def gathers_of(images: NDArray[np.uint8]) -> Iterator[int]:
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order), BATCH_SIZE):
            yield len(images[order[start : start + BATCH_SIZE]])


def rate_of(batches: Iterator[int], seconds: float) -> float:
    """Images a second, over at least `seconds` and 300 batches, the first batch left out."""
    next(batches)
    num_images = num_batches = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or num_batches < 300:
        num_images += next(batches)
        num_batches += 1
    return num_images / elapsed


if __name__ == "__main__":
    main()
