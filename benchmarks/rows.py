"""What a row takes in `xrai.preprocess`: bytes per image of each stage, without pixels.

    python -m benchmarks.rows  # 100,000 and 1,000,000 rows, three rounds: some 15 minutes
    python -m benchmarks.rows --sizes 2000 10000 --rounds 1  # a trial

A source of phantoms' names that has no images: a file begins as a JPEG and holds its own path, so
that each has another hash, and four files in a row are of one patient. The stages are those of the
command, in one process: list, hash, plan, and commit from parts that were made up. What they hold
for themselves does not depend on pixels, so a million rows take minutes instead of hours.

`held` is the resident memory after a stage, `peak` the highest one during it (VmHWM of
/proc/self/status, reset before each stage). Bytes per image are differences between two sizes, so
that what starting takes cancels.
"""

import argparse
import gc
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.harness import Contender, Figure, Report, Run, run_in_turn, summarise, values_of
from xrai.ingest.listed import Files
from xrai.ingest.sources import Source
from xrai.phantom import plan as plan_phantoms

if TYPE_CHECKING:
    from xrai.ingest.plan import Plan
    from xrai.ingest.unfinished import Part

JPEG_START = b"\xff\xd8\xff"
SIZES = (100_000, 1_000_000)
STAGES: Final = ("list", "hash", "plan", "commit")
IMAGES_A_PATIENT = 4
MAX_BYTES_AN_IMAGE: Final = 2 * 2**30 / 10**7  # 10 million images in 2 GiB

_NUM_DRAWN = 4_000  # phantoms whose names the files carry
_HASH_BYTES = 32


class Named(Source):
    """Files that are nothing but their names."""

    name = "named"

    def __init__(self, num: int) -> None:
        self._num = num

    def files(self) -> Files:
        phantoms = list(itertools.islice(plan_phantoms(0), _NUM_DRAWN))
        return Files.of(
            (_path(number, phantoms[number // IMAGES_A_PATIENT % _NUM_DRAWN]), 8192)
            for number in range(self._num)
        )

    def read(self, path: str) -> bytes:
        return JPEG_START + path.encode()


def _path(number: int, phantom: Any) -> str:
    patient = number // IMAGES_A_PATIENT
    if phantom.kind == "normal":
        return f"NORMAL/phantom-IM-{patient:08d}-{number % IMAGES_A_PATIENT:04d}.jpeg"
    germ = "bacteria" if patient % 3 else "virus"
    return f"PNEUMONIA/phantom-person{patient:08d}_{germ}_{number % IMAGES_A_PATIENT:04d}.jpeg"


def main() -> None:
    """Measure, print, and write rows.json and rows.png."""
    parser = argparse.ArgumentParser(description="Bytes per image of each stage of preprocess.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout_s", type=float, default=3600.0, help="of one run")
    flags = parser.parse_args()
    sizes = sorted(set(flags.sizes))
    if len(sizes) < 2:
        raise SystemExit("--sizes takes two numbers or more")
    report = Report("rows", settings={"sizes": sizes, "rounds": flags.rounds})
    contenders = [
        Contender(f"{size:,} rows", "benchmarks.rows:measure", {"num": size}) for size in sizes
    ]
    runs = run_in_turn(contenders, rounds=flags.rounds, timeout_s=flags.timeout_s)
    figures = [
        Figure(f"{stage}_{kind}_mib", f"{stage}: {kind}, MiB", "lower")
        for kind in ("peak", "held")
        for stage in reversed(STAGES)  # the first one is drawn
    ]
    figures += [Figure(f"{stage}_cpu_s", f"{stage}: s", "lower", 1) for stage in STAGES]
    report.add_table("rows", "Rows without pixels, one process", runs, figures=figures)
    for stage in STAGES:
        report.demand(
            f"{stage}: memory at its peak, bytes an image more",
            bytes_an_image(runs, sizes, f"{stage}_peak_mib"),
            at_most=MAX_BYTES_AN_IMAGE,
            digits=0,
        )
    report.save()


def bytes_an_image(runs: Sequence[Run], sizes: Sequence[int], key: str) -> float:
    """How a figure in MiB grows from the smallest size to the largest, bytes per image."""
    small, large = (
        summarise([*values_of(runs, f"{size:,} rows", key).values()])["median"]
        for size in (sizes[0], sizes[-1])
    )
    return (large - small) * 2**20 / (sizes[-1] - sizes[0])


def measure(*, scratch: Path, num: int) -> dict[str, float]:
    """Run the stages once and take the memory and the processor time of each."""
    from xrai.config import Config
    from xrai.ingest.build import assemble
    from xrai.ingest.hashing import hash_source
    from xrai.ingest.leaks import perceptual_hash
    from xrai.ingest.plan import list_source, make_plan
    from xrai.store import open_store

    perceptual_hash(np.zeros((64, 64), np.uint8))  # what it loads is no memory of rows
    source, config, store = Named(num), Config(), open_store(str(scratch / "dataset"))
    figures: dict[str, float] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        began = time.process_time()
        found = work()
        figures[f"{name}_cpu_s"] = time.process_time() - began
        status = Path("/proc/self/status").read_text()
        figures[f"{name}_peak_mib"] = _mib(status, "VmHWM")
        figures[f"{name}_held_mib"] = _mib(status, "VmRSS")
        return found

    listing = stage("list", partial(list_source, source))
    rows = stage("hash", partial(hash_source, source, listing, None))
    plan = stage("plan", partial(make_plan, listing, rows, config))
    del listing, rows  # as xrai.preprocess does

    def commit() -> str:
        _, objects = assemble(plan, _parts_of(plan), store, lambda *_: {}, scratch)
        (manifest,) = objects.values()
        with manifest.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    digest = stage("commit", commit)
    print(f"plan {plan.sha256}, manifest {digest}, process {os.getpid()}")
    figures["manifest_sha256_head"] = float(int(digest[:12], 16))
    return figures


def _parts_of(plan: "Plan") -> "list[Part]":
    """Parts of a plan's shards as decoding would leave them, with hashes drawn at random."""
    from xrai.dataset.shards import ShardInfo
    from xrai.ingest.unfinished import Part

    generator = np.random.default_rng(0)
    parts = []
    for shard in plan.shards:
        counts = plan.labels.count(plan.rows.labels[shard.places])
        info = ShardInfo(shard.name, len(shard), 1, "0" * 64, *counts)
        hashes = bytearray(generator.bytes(len(shard) * _HASH_BYTES))
        parts.append(Part(plan.sha256, info, {}, [1] * 256, hashes, []))
    return parts


def _mib(status: str, name: str) -> float:
    match = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


if __name__ == "__main__":
    main()
