"""From stored images to batches: xrai beside its peers and the limit, from a warm local cache and
cold from S3.

    python -m benchmarks.load  # needs XRAI_TEST_DATA, or draws phantoms
    python -m benchmarks.load --rounds 1 --parts warm

An S3 server that runs on the same machine disturbs what is measured warm: stop it, or begin with
`--parts warm two`. All read the same images of 224 pixels, in shards of 1,024 (51 MB), shuffled,
and give batches of 64 as torch tensors (64, 1, 224, 224) uint8 with their labels. Imports are done
before a clock starts.

    warm   one consumer: images/s after the first epoch has begun and for `--seconds` and 300
           batches at least, and the time from making the loader to its first batch. `numpy` is the
           limit: rows in random order, gathered from one mapped array. Peers read with no worker
           process and with two.
    two    two consumers at once, each with its half of a global batch of 128, as two ranks of a
           job: the sum of their rates. Peers as they were best alone, in this run or in the last
           one that had `warm`.
    cold   an empty cache, an S3 server at AWS_ENDPOINT_URL (with the AWS_* keys), as it is and with
           20 ms for each round trip: see benchmarks/latency.py. Both ways lead through its relay,
           which counts what came. Left out where AWS_ENDPOINT_URL is not set.

Memory counts the pages of mapped files while they are resident, which is all of the images for xrai
and litdata.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import peers
from benchmarks.data import PUBLIC, find_public, source_or_phantoms
from benchmarks.harness import (
    RESULTS,
    ROOT,
    Contender,
    Figure,
    Report,
    best_of,
    ratio,
    run_in_turn,
    say,
    values_of,
)
from benchmarks.latency import Relay, read_counts

SIZE, BATCH_SIZE = 224, 64
BUCKET = "xrai-benchmark-load"
LATENCY_S = 0.02
PARTS = ("warm", "two", "cold")
MODULES = {
    "xrai": ("torch", "xrai.dataset.loader", "boto3"),
    "numpy": ("torch",),
    "streaming": ("streaming", "boto3"),
    "litdata": ("litdata",),
    "webdataset": ("torch", "webdataset"),
    "h5py": ("torch", "h5py", "boto3"),
    "files": ("torchvision.datasets", "torchvision.transforms"),
}
NOTES = {
    "xrai": "Loader with its defaults",
    "numpy": "images[rows] from one mapped array, rows permuted: the limit",
    "streaming": "raw arrays in MDS, static shape, no compression; "
    "batch_size told to the data set, as its docs ask",
    "litdata": "torch tensors, which it maps without a copy (its default for local folders); "
    "StreamingDataLoader",
    "webdataset": ".ten tensors, shards shuffled and a buffer of 1,000, batched in the pipeline, "
    "as its docs say",
    "h5py": "contiguous images; opened lazily in __getitem__, an image at a time, DataLoader",
    "files": "torchvision's ImageFolder over JPEG files of the same size, DataLoader",
}
RATE = Figure("images_per_s", "images/s")
FIRST = Figure("first_batch_s", "first batch, s", "lower", 3)
MEMORY = Figure("peak_memory_mib", "memory, MiB", "lower")


def main() -> None:
    """Prepare the data, measure and save: load_warm, load_two and load_cold."""
    parser = argparse.ArgumentParser(description="Loading beside the peers.")
    parser.add_argument(
        "--source", default=find_public(PUBLIC), help="folder of images in folders of classes"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a warm run, at least")
    parser.add_argument("--batches", type=int, default=300, help="batches of a warm run, at least")
    parser.add_argument(
        "--phantoms", type=int, default=5216, help="how many are drawn where there is no source"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        source, described = source_or_phantoms(
            flags.source, folder / "phantoms", num_phantoms=flags.phantoms
        )
        num_images = prepare(Path(source), folder)
        settings = {
            "source": described,
            "images": num_images,
            "size": SIZE,
            "batch_size": BATCH_SIZE,
            "shard_rows": peers.SHARD_ROWS,
            "shard_mib": SIZE * SIZE * peers.SHARD_ROWS / 2**20,
            "rounds": flags.rounds,
        }
        warm_flags = {"batch_size": BATCH_SIZE, "seconds": flags.seconds, "batches": flags.batches}
        if "warm" in flags.parts:
            report = Report("load_warm", settings={**settings, "seconds": flags.seconds})
            compare_warm(report, folder, warm_flags, rounds=flags.rounds)
            report.save()
        if "two" in flags.parts:
            best = read_best(RESULTS / "load_warm.json")  # of this run, or of the last that had it
            report = Report("load_two", settings={**settings, "seconds": flags.seconds})
            compare_two(report, folder, warm_flags, best, rounds=flags.rounds)
            report.save()
        if "cold" in flags.parts:
            if os.environ.get("AWS_ENDPOINT_URL"):
                report = Report("load_cold", settings={**settings, "latency_s": LATENCY_S})
                compare_cold(report, folder, rounds=flags.rounds)
                report.save()
            else:
                say("cold is left out: AWS_ENDPOINT_URL names no S3 server")


# ---------------------------------------------------------------------------------------- preparing


def prepare(source: Path, folder: Path) -> int:
    """Write the training split of a data set in every format, each into its folder. The number
    of images.
    """
    from xrai.dataset.loader import Loader

    say("preparing the data")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "xrai.preprocess",
            "--source",
            str(source),
            "--dataset",
            str(folder / "xrai"),
            f"--images.size={SIZE}",
            f"--shards.rows={peers.SHARD_ROWS}",
            "--splits.test_fraction=0",
            "--splits.val_fraction=0.01",
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    loader = Loader(str(folder / "xrai"), split="train", batch_size=BATCH_SIZE)
    arrays = folder / "numpy"
    arrays.mkdir()
    np.save(
        arrays / "images.npy", np.concatenate([batch.images[:, 0] for batch in loader.epoch(0)])
    )
    np.save(arrays / "labels.npy", loader.labels)
    for name, write in peers.WRITERS.items():
        rows = [
            str(row) for row in range(loader.num_images)
        ]  # in hash order, so that shards are random samples
        write(partial(read_row, str(arrays)), rows, folder / name, num_workers=1)
    sources = loader.columns("source")["source"]
    for number, (label, path) in enumerate(zip(loader.labels, sources, strict=True)):
        place = folder / "files" / loader.index.classes[label] / f"{number:07d}{Path(path).suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to((source / path).resolve(strict=True))
    return loader.num_images


def read_row(folder: str, row: str) -> tuple[NDArray[np.uint8], int]:
    """Pixels and label of one row, for the peers' writers."""
    images = np.load(f"{folder}/images.npy", mmap_mode="r")
    return np.array(images[int(row)]), int(np.load(f"{folder}/labels.npy", mmap_mode="r")[int(row)])


# ---------------------------------------------------------------------------------------- comparing


def compare_warm(report: Report, folder: Path, flags: Mapping[str, Any], *, rounds: int) -> None:
    """Measure one consumer."""
    contenders = [_warm("xrai", folder, 0, flags), _warm("numpy", folder, 0, flags)]
    contenders += [
        _warm(name, folder, workers, flags) for name in peers.READERS for workers in (0, 2)
    ]
    runs = run_in_turn(contenders, rounds=rounds)
    report.add_table(
        "warm", "From a warm cache, one consumer", runs, figures=[RATE, FIRST, MEMORY], ours="xrai"
    )
    names = [
        contender.name for contender in contenders[2:] if values_of(runs, contender.name, RATE.key)
    ]
    best = best_of(runs, names, RATE)
    report.demand(
        f"warm: images/s, times the best peer ({best})",
        ratio(runs, "xrai", best, RATE.key)["median"],
        at_least=5,
    )
    report.demand(
        "warm: images/s, share of numpy's own copy",
        ratio(runs, "xrai", "numpy", RATE.key)["median"],
        at_least=0.5,
    )


def _warm(
    name: str, folder: Path, workers: int, flags: Mapping[str, Any], call: str = "measure_warm"
) -> Contender:
    shown = name if name in ("xrai", "numpy") else f"{name}, {workers} workers"
    arguments = {"reader": name, "address": str(folder / name), "num_workers": workers, **flags}
    return Contender(shown, f"benchmarks.load:{call}", arguments, NOTES[name])


def read_best(path: Path) -> dict[str, int]:
    """The number of workers with which each peer was fastest, by the results of `warm`; 0 where
    a peer has none.
    """
    (table,) = json.loads(path.read_text())["tables"]
    rates = {
        row["contender"]: row["figures"].get(RATE.key, {"median": 0.0})["median"]
        for row in table["rows"]
    }
    return {
        name: max((0, 2), key=lambda workers: rates.get(f"{name}, {workers} workers", 0.0))
        for name in peers.READERS
    }


def compare_two(
    report: Report, folder: Path, flags: Mapping[str, Any], best: Mapping[str, int], *, rounds: int
) -> None:
    """Measure two consumers at once."""
    contenders = [_warm("xrai", folder, 0, flags, "measure_two")]
    contenders += [
        _warm(name, folder, workers, flags, "measure_two") for name, workers in best.items()
    ]
    runs = run_in_turn(contenders, rounds=rounds)
    report.add_table(
        "two",
        "From a warm cache, two consumers at once, sum",
        runs,
        figures=[RATE, FIRST, MEMORY],
        ours="xrai",
    )
    names = [
        contender.name for contender in contenders[1:] if values_of(runs, contender.name, RATE.key)
    ]
    found = best_of(runs, names, RATE)
    report.demand(
        f"two consumers: images/s, times the best peer ({found})",
        ratio(runs, "xrai", found, RATE.key)["median"],
        at_least=5,
    )


def compare_cold(report: Report, folder: Path, *, rounds: int) -> None:
    """Measure the first epoch from a bucket, through relays without and with a latency."""
    upload(folder)
    for latency_s, key, words in (
        (0.0, "loopback", "loopback"),
        (LATENCY_S, "latency", "20 ms a round trip"),
    ):
        with Relay(os.environ["AWS_ENDPOINT_URL"], latency_s=latency_s) as relay:
            contenders = _cold(folder, relay)
            runs = run_in_turn(contenders, rounds=rounds)
        figures = [
            RATE,
            FIRST,
            Figure("first_batch_shards", "came by then, shards", "lower", 2),
            Figure("requests", "requests", "lower"),
            MEMORY,
        ]
        report.add_table(
            f"cold_{key}",
            f"The first epoch from S3, empty cache, {words}",
            runs,
            figures=figures,
            ours="xrai",
        )
        names = [
            contender.name
            for contender in contenders[1:]
            if values_of(runs, contender.name, RATE.key)
        ]
        best = best_of(runs, names, RATE)
        report.demand(
            f"cold, {words}: images/s, times the best peer ({best})",
            ratio(runs, "xrai", best, RATE.key)["median"],
            at_least=1,
        )
        report.demand(
            f"cold, {words}: shards that had come when the first batch was there, index included",
            max(values_of(runs, "xrai", "first_batch_shards").values()),
            at_most=1.05,
        )


def _cold(folder: Path, relay: Relay) -> list[Contender]:
    env = {"AWS_ENDPOINT_URL": relay.url, "S3_ENDPOINT_URL": relay.url}
    addresses = {name: f"s3://{BUCKET}/{name}" for name in ("xrai", "streaming", "litdata", "h5py")}
    commands = "\n".join(
        f"pipe:curl -s -f '{url}'" for url in presign(folder / "webdataset", relay.url)
    )

    def contender(name: str, shown: str, note: str, **more: Any) -> Contender:
        arguments = {
            "reader": name,
            "address": addresses.get(name, commands),
            "num_workers": 0,
            "batch_size": BATCH_SIZE,
            "counts": relay.counts,
            "shard_bytes": shard_bytes(folder / name),
            **more,
        }
        return Contender(shown, "benchmarks.load:measure_cold", arguments, note, env)

    curl = "pipe:curl on presigned addresses, for want of the aws command that its docs pipe from"
    return [
        contender("xrai", "xrai", NOTES["xrai"]),
        # with two workers both took ten times as long here for the first epoch, or failed
        contender("streaming", "streaming", "remote=s3://, S3_ENDPOINT_URL; no worker processes"),
        contender("litdata", "litdata", "s3://, storage_options endpoint_url; no worker processes"),
        contender(
            "webdataset",
            "webdataset, streamed",
            f"{curl}; nothing is kept for a second epoch",
            cached=False,
        ),
        contender("webdataset", "webdataset, cached", f"{curl}; cache_dir"),
        contender("h5py", "h5py, downloaded", "boto3's download_file of the one file, then opened"),
    ]


def shard_bytes(folder: Path) -> int:
    """Size of the largest file of a format in a folder: a whole shard."""
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _client(endpoint: str) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=endpoint, region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    )


def upload(folder: Path) -> None:
    """Put what is measured cold into the bucket, which is made, or emptied first."""
    say("uploading")
    client = _client(os.environ["AWS_ENDPOINT_URL"])
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])
    for name in ("xrai", "streaming", "litdata", "webdataset", "h5py"):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                client.upload_file(str(path), BUCKET, path.relative_to(folder).as_posix())


def presign(folder: Path, endpoint: str) -> list[str]:
    """Addresses of the objects of a folder, good for some hours."""
    client = _client(endpoint)
    return [
        client.generate_presigned_url(
            "get_object",
            Params={"Bucket": BUCKET, "Key": f"{folder.name}/{path.name}"},
            ExpiresIn=6 * 3600,
        )
        for path in sorted(folder.glob("*.tar"))
    ]


# ---------------------------------------------------------------------------------------- measuring


def measure_warm(
    *,
    scratch: Path,
    reader: str,
    address: str,
    num_workers: int,
    batch_size: int,
    seconds: float,
    batches: int,
) -> dict[str, float]:
    """Images/s and the time to the first batch, one consumer."""
    _import(reader)
    began = time.perf_counter()
    loader = open_batches(reader, address, batch_size=batch_size, num_workers=num_workers)
    epoch = iter(loader)
    next(epoch)
    first_s = time.perf_counter() - began
    return {
        "images_per_s": rate_of(epoch, loader, seconds=seconds, batches=batches),
        "first_batch_s": first_s,
    }


def rate_of(epoch: Iterator[Any], loader: Iterable[Any], *, seconds: float, batches: int) -> float:
    """Images/s over the rest of an epoch and as many more as fill `seconds` and `batches`."""
    num_images = num_batches = 0
    began = time.perf_counter()
    while True:
        for images, _ in epoch:
            num_images += len(images)
            num_batches += 1
            elapsed_s = time.perf_counter() - began
            if elapsed_s >= seconds and num_batches >= batches:
                return num_images / elapsed_s
        epoch = iter(loader)


def measure_two(
    *,
    scratch: Path,
    reader: str,
    address: str,
    num_workers: int,
    batch_size: int,
    seconds: float,
    batches: int,
) -> dict[str, float]:
    """The sum of the images/s of two consumers, and the later of their first batches."""
    context = get_context("spawn")
    barrier, told, go_on = (
        context.Barrier(2, timeout=300),
        context.SimpleQueue(),
        context.Value("b", 1),
    )
    consumers = [
        context.Process(
            target=_consume,
            args=(
                rank,
                reader,
                address,
                num_workers,
                batch_size,
                seconds,
                batches,
                barrier,
                go_on,
                told,
            ),
        )
        for rank in (0, 1)
    ]
    for consumer in consumers:
        consumer.start()
    for consumer in consumers:
        consumer.join()
    if any(consumer.exitcode for consumer in consumers):
        raise RuntimeError(
            f"the consumers ended with {[consumer.exitcode for consumer in consumers]}"
        )
    found = [told.get() for _ in consumers]
    return {
        "images_per_s": sum(rate for rate, _ in found),
        "first_batch_s": max(first_s for _, first_s in found),
    }


def _consume(
    rank: int,
    reader: str,
    address: str,
    num_workers: int,
    batch_size: int,
    seconds: float,
    batches: int,
    barrier: Any,
    go_on: Any,
    told: Any,
) -> None:
    """One of two consumers. Both stop after the same epoch: some peers wait for each other
    between epochs.
    """
    _import(reader)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"})
    barrier.wait()
    began = time.perf_counter()
    loader = open_batches(
        reader, address, batch_size=batch_size, num_workers=num_workers, rank=rank, world_size=2
    )
    num_images = num_batches = 0
    first_s = 0.0
    for number, _ in enumerate(iter(lambda: go_on.value, 0)):
        for images, _ in loader:
            first_s = first_s or time.perf_counter() - began
            num_images += len(images)
            num_batches += 1
        barrier.wait()
        if number == 0:  # not counted
            began, num_images, num_batches = time.perf_counter(), 0, 0
        elif rank == 0 and time.perf_counter() - began >= seconds and num_batches >= batches:
            go_on.value = 0
        barrier.wait()
    told.put((num_images / (time.perf_counter() - began), first_s))


def measure_cold(
    *,
    scratch: Path,
    reader: str,
    address: str,
    num_workers: int,
    batch_size: int,
    counts: str,
    shard_bytes: int,
    cached: bool = True,
) -> dict[str, float]:
    """Images/s of the first epoch, the time to its first batch, and what had come from the
    server by then.
    """
    _import(reader)
    before = read_counts(counts)
    began = time.perf_counter()
    cache = scratch / "cache" if cached else None
    if cache is not None:
        cache.mkdir()  # webdataset does not make it
    if reader == "h5py":
        address = _download(address, scratch)
        loader = open_batches(reader, address, batch_size=batch_size, num_workers=num_workers)
    else:
        loader = open_batches(
            reader, address, batch_size=batch_size, num_workers=num_workers, cache=cache
        )
    epoch = iter(loader)
    num_images = len(next(epoch)[0])
    by_then = read_counts(counts)
    first_s = time.perf_counter() - began
    num_images += sum(len(images) for images, _ in epoch)
    epoch_s = time.perf_counter() - began
    return {
        "images_per_s": num_images / epoch_s,
        "first_batch_s": first_s,
        "first_batch_shards": (by_then.num_bytes - before.num_bytes) / shard_bytes,
        "requests": read_counts(counts).num_requests - before.num_requests,
    }


def _download(address: str, folder: Path) -> str:
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    _client(os.environ["AWS_ENDPOINT_URL"]).download_file(
        bucket, f"{prefix}/images.h5", str(folder / "images.h5")
    )
    return str(folder)


def _import(reader: str) -> None:
    for module in MODULES[reader]:
        importlib.import_module(module)


def open_batches(
    reader: str,
    address: str,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    **more: Any,
) -> Iterable[tuple[Any, Any]]:
    """A loader, to be iterated an epoch a time: pairs of images (B, 1, H, W) uint8 and labels
    (B,), torch tensors.
    """
    if reader == "xrai":
        return XraiBatches(
            address,
            batch_size=batch_size * world_size,
            rank=rank,
            world_size=world_size,
            cache=more.get("cache"),
        )
    if reader == "numpy":
        return NumpyBatches(address, batch_size=batch_size)
    read = peers.READERS[reader]
    if more.get("cache") is None:
        more.pop("cache", None)
    return read(
        address,
        batch_size=batch_size,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        **more,
    )


class XraiBatches:
    """Our loader's batches as tensors."""

    def __init__(
        self, address: str, *, batch_size: int, rank: int, world_size: int, cache: Path | None
    ) -> None:
        from xrai.dataset.loader import Loader, LoaderOptions

        self._loader = Loader(
            address,
            split="train",
            batch_size=batch_size,
            shuffle=True,
            rank=rank,
            world_size=world_size,
            options=LoaderOptions(cache_dir=cache),
        )

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        import torch

        for batch in self._loader:
            yield torch.from_numpy(batch.images), torch.from_numpy(batch.labels)


class NumpyBatches:
    """The limit: numpy's own gather from one mapped array."""

    def __init__(self, folder: str, *, batch_size: int) -> None:
        self._images = np.load(f"{folder}/images.npy", mmap_mode="r").view(np.ndarray)  # (N, H, W)
        self._labels = np.load(f"{folder}/labels.npy")
        self._generator = np.random.default_rng(0)
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        import torch

        order = self._generator.permutation(len(self._labels))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            yield (
                torch.from_numpy(self._images[rows][:, None]),
                torch.from_numpy(self._labels[rows]),
            )


if __name__ == "__main__":
    main()
