"""Turn raw chest X-rays into a data set: `python -m xrai.preprocess --source DIR|ZIP|NPZ|s3://…
--dataset URI`.

JPEG, PNG and DICOM files. What each shows is said by its folder, or by the table that `--labels
FILE.csv` names.

It lists, hashes, plans, decodes with all cores, stores HDF5 shards, and commits with dataset.json.
Started again after a kill it goes on; started again on a finished data set of the same plan it says
so and does nothing. A large job is shared out by `--partition I/N`, one process a partition, on as
many machines as one likes, at once or one after the other: whichever ends last commits.
"""

import contextlib
import gc
import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence, Set
from types import FrameType
from typing import NoReturn

from xrai import config as configuration
from xrai.config import Config, Flag
from xrai.dataset.manifest import Row
from xrai.dataset.shards import (
    INDEX_KEY,
    MANIFEST_KEY,
    REPORT_PREFIX,
    DatasetIndex,
    is_shard_name,
    read_index,
)
from xrai.errors import ConfigError, DatasetError, SourceError, StoppedError, UserError, run_command
from xrai.ingest.build import (
    UNFINISHED,
    Builder,
    NearDuplicate,
    Unfinished,
    hash_source,
    start_workers_soon,
)
from xrai.ingest.card import REPORT_KEYS, make_report
from xrai.ingest.labels import read_labels
from xrai.ingest.plan import Listing, list_source, make_plan, shaping_config
from xrai.ingest.sources import Source, open_source
from xrai.log import get_logger, setup_logging
from xrai.results.sheets import draw_class_counts, draw_sheet
from xrai.store import Store, open_store

FLAGS = (
    Flag(
        "source",
        "data/chest_xray",
        "raw images: a folder, .zip, MedMNIST .npz or s3://bucket/prefix",
        "XRAI_SOURCE",
    ),
    Flag(
        "labels",
        "",
        "CSV file: path, label, and patient, split where known; empty: class folders",
        "XRAI_LABELS",
    ),
    Flag(
        "dataset",
        "data/dataset",
        "where the data set goes: a folder or s3://bucket/prefix",
        "XRAI_DATASET",
    ),
    Flag("workers", 0, "processes that decode; 0: one a core", type=int),
    Flag(
        "partition",
        "0/1",
        "the share that this process makes, I/N with I from 0 to N-1",
        "XRAI_PARTITION",
    ),
    Flag(
        "overwrite", False, "replace a data set, or the beginning of one, that is there", type=bool
    ),
)
# Rows of a large source are many and hold no cycles: to look through all of them for some took an
# eighth of the time. What is young is looked through as ever, for S3 clients leave cycles behind
_GC_THRESHOLDS = (10_000, 10, 1_000)
_logger = get_logger("xrai.preprocess")


def main() -> None:
    """Read the command line and make the data set."""
    config, flags = configuration.parse(
        "preprocess", description="Turn raw X-rays into a data set.", flags=FLAGS
    )
    if not 0 <= flags["workers"] <= 1024:
        raise ConfigError(
            f"--workers = {flags['workers']} is not allowed: it takes a whole number from 0 to 1024"
        )
    number, num_partitions = read_partition(flags["partition"])
    setup_logging()
    gc.set_threshold(*_GC_THRESHOLDS)
    signal.signal(signal.SIGTERM, _stop)
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.strerror}: shards are written there first; mount one, or name one by TMPDIR"
        ) from error
    if not flags["dataset"]:
        raise ConfigError("--dataset is empty; it takes a folder or s3://bucket/prefix")
    source, store = open_source(flags["source"]), open_store(flags["dataset"])
    if source.holds(store):
        raise ConfigError(
            f"--dataset {store.uri} is inside --source {flags['source']}, which would take up what is written; move one"
        )
    if flags["overwrite"] and num_partitions > 1:
        raise ConfigError(
            "--overwrite and --partition exclude each other: each would discard what the others made"
        )
    table = read_labels(flags["labels"]) if flags["labels"] else None
    if flags["overwrite"]:
        listing = list_source(source, table)
        if (
            store.size(INDEX_KEY) is not None
        ):  # a source that will be refused must not cost the data set that is there
            make_plan(listing, hash_source(source, listing, None), config)
        del listing
        remove_dataset(store)
    preprocess(
        config, source, list_source(source, table), store, num_workers=flags["workers"] or len(os.sched_getaffinity(0)),
        number=number, num_partitions=num_partitions,
    )  # fmt: skip


def preprocess(
    config: Config,
    source: Source,
    listing: Listing,
    store: Store,
    *,
    num_workers: int,
    number: int,
    num_partitions: int,
) -> None:
    """Hash, plan, build the shards of partition `number`, and commit if all are there; print
    what came of it.
    """
    began = time.monotonic()
    if store.size(INDEX_KEY) is not None:
        show_existing(config, source, listing, store)
        return
    unfinished = Unfinished(store, listing, shaping_config(config))
    unfinished.claim()
    try:
        if num_workers > 1:
            start_workers_soon()
        plan = make_plan(  # its rows take the place of those that were hashed, which are held nowhere else
            listing,
            hash_source(source, listing, unfinished, number=number, num_partitions=num_partitions),
            config,
        )
        del listing  # its entries: nobody else holds them
        for note in plan.notes:
            _logger.warning("%s", note)
        builder = Builder(plan, source, store, unfinished, num_workers=num_workers)
        builder.build(plan.shards[number::num_partitions])

        def report(
            index: DatasetIndex, rows: Sequence[Row], near: Sequence[NearDuplicate]
        ) -> dict[str, bytes]:
            return make_report(
                store,
                index,
                rows,
                near,
                notes=plan.notes,
                draw_sheet=draw_sheet,
                draw_counts=draw_class_counts,
            )

        index = builder.commit(report)
    except SourceError:  # starting again would not help: leave nothing half-written
        if store.size(INDEX_KEY) is None:
            remove_dataset(store)
        raise
    if index is not None:
        remove_leftovers(store, index)
        print("\n".join(describe(index, store, took_s=time.monotonic() - began)), flush=True)
    elif store.size(INDEX_KEY) is not None and read_index(store).plan_sha256 == plan.sha256:
        index = read_index(store)
        remove_leftovers(store, index)  # what this process stored after another one had committed
        print("\n".join(describe(index, store)), flush=True)
    elif num_partitions > 1:
        print(
            f"partition {number}/{num_partitions} is stored at {store.uri}; the last one to end commits",
            flush=True,
        )
    else:
        raise DatasetError(
            f"parts of the data set at {store.uri} were removed while it was made; start again"
        )


def read_partition(text: str) -> tuple[int, int]:
    """(I, N) of "I/N". Raises `ConfigError`."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, num_partitions = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 <= number < num_partitions:
        raise ConfigError(
            f"--partition = {text!r} is not allowed: it takes I/N with I from 0 to N-1, such as 0/4"
        )
    return number, num_partitions


def show_existing(config: Config, source: Source, listing: Listing, store: Store) -> None:
    """Print the data set that is there, if it is of the same plan; raise `DatasetError` if it is
    another.
    """
    index = read_index(store)
    advice = "give another --dataset, or --overwrite to replace it"
    wanted = shaping_config(config)
    for section, keys in wanted.items():
        for key, value in keys.items():
            there = index.config.get(section, {}).get(key)
            if there != value:
                raise DatasetError(
                    f"{store.uri} holds a data set of {section}.{key} = {there}, not {value}: {advice}"
                )
    plan = make_plan(listing, hash_source(source, listing, None), config)
    if index.plan_sha256 != plan.sha256:
        raise DatasetError(
            f"{store.uri} holds a data set of other images or labels than those of {source.name}: {advice}"
        )
    remove_leftovers(store, index)  # what a kill between the commit and its last step may have left
    _logger.info("the data set is there already, from the same images and config: nothing to do")
    print("\n".join(describe(index, store)), flush=True)


def remove_dataset(store: Store) -> None:
    """Remove a data set, or the beginning of one: first dataset.json, so that it is none any more,
    then all else.

    Only keys that xrai writes are touched.
    """
    store.delete(INDEX_KEY)
    _remove(store, keep=frozenset())
    folder = store.local_path(INDEX_KEY)
    if folder is not None:
        for empty in (folder.parent / REPORT_PREFIX, folder.parent):
            with contextlib.suppress(OSError):  # it is not empty, or was not there
                empty.rmdir()


def remove_leftovers(store: Store, index: DatasetIndex) -> None:
    """Remove what xrai has written beside a whole data set: work on it, or on one that it took
    the place of.
    """
    shards = {info.name for infos in index.splits.values() for info in infos}
    _remove(store, keep=shards | {info.name for info in index.objects})


def _remove(store: Store, *, keep: Set[str]) -> None:
    for key in [entry.key for entry in store.list()]:
        is_ours = (
            is_shard_name(key) or key.startswith(UNFINISHED) or key in (MANIFEST_KEY, *REPORT_KEYS)
        )
        if is_ours and key not in keep:
            store.delete(key)


def describe(index: DatasetIndex, store: Store, *, took_s: float | None = None) -> list[str]:
    """The last lines: how many, of what, where."""
    counts = index.counts
    splits = "; ".join(
        f"{split} {' + '.join(f'{number} {name}' for name, number in index.num_images_per_class(split).items())}"
        for split in index.splits
    )
    rate = f" in {took_s:.1f} s, {counts.num_found / took_s:.0f} images/s" if took_s else ""
    return [
        f"{counts.num_found} files found = {counts.num_written} written + {counts.num_set_aside} set aside{rate}",
        splits,
        f"data set {index.fingerprint[:16]} is at {store.uri}; its card: {store.uri}/{REPORT_PREFIX}card.md",
    ]


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise StoppedError("stopped by SIGTERM; what is stored is kept, start again to go on")


if __name__ == "__main__":
    run_command(main)
