"""Scores a second from files and from arrays, and the time of one image, beside onnxruntime with
the same network.

    python -m benchmarks.predict  # a network trained for two epochs on phantoms: speed is the same
    python -m benchmarks.predict --run submit/ID --source DIR

`xrai.load(run).predict` against `export/model.onnx` of the same run in onnxruntime, which holds the
same preprocessing: files (read, decoded, fitted, scored), then images that are in memory and
fitted already, by 64 and one at a time. Files for onnxruntime are decoded by Pillow, by a pool of
threads as many as there are cores, as its users have to. Both answer with a probability and a score
of how unlike the training images an image is.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import xrai
from benchmarks.data import FULL_SIZE, PUBLIC, find_public, source_or_phantoms
from benchmarks.harness import ROOT, Contender, Figure, Report, ratio, run_in_turn

BATCH_SIZE = 64
XRAI, ONNX = "xrai", "onnxruntime"
RATE = Figure("images_per_s", "images/s")
LATENCY = Figure("one_ms", "one image, ms", better="lower", digits=2)
MEMORY = Figure("peak_memory_mib", "peak memory, MiB", better="lower")


def main() -> None:
    """Measure, print the tables and save them."""
    parser = argparse.ArgumentParser(description="Predictions a second, beside onnxruntime.")
    parser.add_argument(
        "--run", default="", help="a finished run; if not given, one is trained on phantoms"
    )
    parser.add_argument(
        "--source", default=find_public(PUBLIC), help="folder of JPEG files; phantoms if not given"
    )
    parser.add_argument(
        "--full_size", default=find_public(FULL_SIZE), help="folder of full-size JPEG files"
    )
    parser.add_argument("--files", type=int, default=1024, help="files of a folder that are used")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="length of a measurement, at least"
    )
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        run = flags.run or train_one(place)
        size = xrai.load(str(run)).model.image_size
        module("xrai.export", "--run", run, "--out", place / "export", "--formats", "onnx")
        report = Report(
            "predict",
            settings={
                "files": flags.files,
                "seconds": flags.seconds,
                "rounds": flags.rounds,
                "batch_size": BATCH_SIZE,
            },
        )
        for name, source in (("files", flags.source), ("full_size", flags.full_size)):
            found, what = source_or_phantoms(source, place / "source", num_phantoms=flags.files)
            if name == "full_size" and not source:
                print("no full-size files: give a folder by --full_size")
                continue
            paths = [str(path) for path in islice(sorted(Path(found).rglob("*.*g")), flags.files)]
            listed = place / f"{name}.txt"
            listed.write_text("\n".join(paths))
            arguments = {"listed": str(listed), "seconds": flags.seconds}
            runs = run_in_turn(
                [
                    Contender(
                        XRAI, "benchmarks.predict:measure_files", {**arguments, "run": str(run)}
                    ),
                    Contender(
                        ONNX,
                        "benchmarks.predict:measure_files_onnx",
                        {**arguments, "model": str(place / "export" / "model.onnx")},
                    ),
                ],
                rounds=flags.rounds,
            )
            report.add_table(
                name,
                f"Files of {what}, {len(paths)} of them",
                runs,
                ours=XRAI,
                figures=[RATE, LATENCY, MEMORY],
            )
            report.demand(
                f"{what}: images/s over onnxruntime's",
                ratio(runs, XRAI, ONNX, RATE.key)["median"],
                at_least=1,
            )
        arguments = {"seconds": flags.seconds}
        runs = run_in_turn(
            [
                Contender(
                    XRAI, "benchmarks.predict:measure_arrays", {**arguments, "run": str(run)}
                ),
                Contender(
                    ONNX,
                    "benchmarks.predict:measure_arrays_onnx",
                    {**arguments, "size": size, "model": str(place / "export" / "model.onnx")},
                ),
            ],
            rounds=flags.rounds,
        )
    report.add_table(
        "arrays",
        "Prepared images in memory, batches of 64",
        runs,
        ours=XRAI,
        figures=[RATE, LATENCY, MEMORY],
    )
    report.demand(
        "in memory: images/s over onnxruntime's",
        ratio(runs, XRAI, ONNX, RATE.key)["median"],
        at_least=1,
    )
    report.save()


def train_one(place: Path, config: str = "") -> Path:
    """A run of two epochs on phantoms, with the defaults or a configuration that xrai brings."""
    options = ("--config", config) if config else ()
    source, dataset = place / "phantoms", place / "dataset"
    module("xrai.phantom", "--num-images", "400", "--out", source)
    module("xrai.preprocess", "--source", source, "--dataset", dataset, *options)
    kept = ("--dataset", dataset, "--artifacts", place, "--run_id", "run")
    module("xrai.train", *kept, "--train.epochs=2", *options)
    return place / "run"


def module(name: str, *options: str | Path) -> None:
    """Run a command of xrai; what it says is shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", name, *map(str, options)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"{name} ended with {done.returncode}:\n{done.stdout}{done.stderr[-5000:]}"
        )


# --------------------------------------------------------------------------------------- contenders


def measure_files(*, scratch: Path, run: str, listed: str, seconds: float) -> dict[str, float]:
    """`xrai.load(run).predict` on a list of files."""
    pipeline = xrai.load(run)
    return time_files(
        lambda paths: len(pipeline.predict(paths)), Path(listed).read_text().split("\n"), seconds
    )


def measure_files_onnx(
    *, scratch: Path, model: str, listed: str, seconds: float
) -> dict[str, float]:
    """Pillow and onnxruntime on a list of files; images of one size would go together, but few
    share one.
    """
    session = open_session(model)
    name = session.get_inputs()[0].name
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def read(path: str) -> NDArray[np.uint8]:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L"))  # (H, W)

    def predict(paths: Sequence[str]) -> int:
        found = 0
        for start in range(0, len(paths), BATCH_SIZE):
            pictures = list(pool.map(read, paths[start : start + BATCH_SIZE]))
            if len({picture.shape for picture in pictures}) == 1:
                found += len(session.run(None, {name: np.stack(pictures)})[0])
            else:
                found += sum(
                    len(session.run(None, {name: picture[None]})[0]) for picture in pictures
                )
        return found

    return time_files(predict, Path(listed).read_text().split("\n"), seconds)


def measure_arrays(*, scratch: Path, run: str, seconds: float) -> dict[str, float]:
    """The network on images that are in memory."""
    pipeline = xrai.load(run)
    return time_arrays(pipeline.score, size=pipeline.model.image_size, seconds=seconds)


def measure_arrays_onnx(
    *, scratch: Path, model: str, size: int, seconds: float
) -> dict[str, float]:
    """The same in onnxruntime; the graph's own fitting has nothing to do but is there."""
    session = open_session(model)
    name = session.get_inputs()[0].name
    return time_arrays(
        lambda pictures: session.run(None, {name: pictures}), size=size, seconds=seconds
    )


def open_session(model: str) -> Any:
    """A session on as many threads as there are cores, onnxruntime's default."""
    import onnxruntime

    return onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())


def time_files(
    predict: Callable[[Sequence[str]], int], paths: Sequence[str], seconds: float
) -> dict[str, float]:
    """Rate over all files, again and again, and the median time of one file by itself."""
    assert predict(paths[:BATCH_SIZE]) == len(paths[:BATCH_SIZE])  # warm-up
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        count += predict(paths)
    return {
        RATE.key: count / elapsed,
        LATENCY.key: _median_ms(lambda k: predict([paths[k % len(paths)]])),
    }


def time_arrays(
    score: Callable[[NDArray[np.uint8]], object], *, size: int, seconds: float
) -> dict[str, float]:
    """Rate by batches, and the median time of one image by itself."""
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, size, size), np.uint8)
    for _ in range(5):
        score(pictures)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        score(pictures)
        count += len(pictures)
    return {
        RATE.key: count / elapsed,
        LATENCY.key: _median_ms(lambda k: score(pictures[k % BATCH_SIZE][None])),
    }


def _median_ms(work: Callable[[int], object], *, repeats: int = 100) -> float:
    times = []
    for k in range(repeats + 10):
        began = time.perf_counter()
        work(k)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[10:])


if __name__ == "__main__":
    main()
