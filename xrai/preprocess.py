"""Turn raw chest X-rays into a data set: `python -m xrai.preprocess --source DIR|ZIP|NPZ|s3://… --dataset URI`.

It plans (lists, hashes, splits), decodes with all cores, stores HDF5 shards, and commits with dataset.json. Started
again after a kill it goes on; started again on a finished data set of the same plan it says so and does nothing.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xrai import config as configuration
from xrai.config import Config, Flag
from xrai.dataset.build import Builder, remove_parts
from xrai.dataset.card import is_phantom, write_card
from xrai.dataset.manifest import Row
from xrai.dataset.plan import Plan, make_plan
from xrai.dataset.shards import INDEX_KEY, REPORT_PREFIX, DatasetIndex, open_shard, read_index
from xrai.dataset.sources import open_source
from xrai.errors import ConfigError, DatasetError, run_command
from xrai.log import get_logger, setup_logging
from xrai.store import Store, open_store

FLAGS = (
    Flag("source", "data/chest_xray", "raw images: a folder, .zip, MedMNIST .npz or s3://bucket/prefix", "XRAI_SOURCE"),
    Flag("dataset", "data/dataset", "where the data set goes: a folder or s3://bucket/prefix", "XRAI_DATASET"),
    Flag("workers", 0, "processes that decode; 0: one a core", type=int),
    Flag("overwrite", False, "replace a data set that is there", type=bool),
)
_SAMPLES = 12  # pictures of each class on the data card
_logger = get_logger("xrai.preprocess")


def main() -> None:
    """Read the command line and make the data set."""
    config, flags = configuration.parse("preprocess", description="Turn raw X-rays into a data set.", flags=FLAGS)
    if not 0 <= flags["workers"] <= 1024:
        raise ConfigError(f"--workers = {flags['workers']} is not allowed: it takes a whole number from 0 to 1024")
    setup_logging()
    preprocess(config, flags)


def preprocess(config: Config, flags: dict[str, Any]) -> None:
    """Plan, build, commit; print where the data set is. Raises `UserError` before anything is written."""
    source = open_source(flags["source"])
    store = open_store(flags["dataset"])
    num_workers = flags["workers"] or len(os.sched_getaffinity(0))
    plan = make_plan(source, config)
    if store.size(INDEX_KEY) is not None:
        if flags["overwrite"]:
            remove_dataset(store)
        else:
            show_existing(store, plan)
            return
    elif flags["overwrite"]:
        remove_parts(store)
    builder = Builder(plan, source, store, config.images, num_workers=num_workers)
    builder.claim()
    builder.build(plan.shards)
    parts = builder.parts()
    if parts is None:
        raise DatasetError(f"parts of the data set at {store.uri} were removed while it was made; start again")
    builder.commit(parts, lambda index, rows: make_report(store, index, rows, notes=plan.notes))
    print("\n".join(describe(read_index(store), store)), flush=True)


def show_existing(store: Store, plan: Plan) -> None:
    """Print the data set that is there, if it is of the same plan; raise `DatasetError` if it is another."""
    index = read_index(store)
    if index.plan_sha256 != plan.sha256:
        raise DatasetError(
            f"{store.uri} holds another data set (of other images or another config): give another --dataset, or "
            "--overwrite to replace it"
        )
    remove_parts(store)  # what a kill between the commit and its last step may have left
    _logger.info("the data set is there already, from the same images and config: nothing to do")
    print("\n".join(describe(index, store)), flush=True)


def remove_dataset(store: Store) -> None:
    """Remove a data set: first dataset.json, so that it is none any more, then what it names."""
    index = read_index(store)
    store.delete(INDEX_KEY)
    remove_parts(store)
    names = [shard.name for shards in index.splits.values() for shard in shards]
    for name in [*names, *(entry.name for entry in index.objects)]:
        store.delete(name)


def make_report(store: Store, index: DatasetIndex, rows: Sequence[Row], *, notes: Sequence[str]) -> dict[str, bytes]:
    """The files of the data card by key: samples of each class, class counts, and the card itself."""
    from xrai.results.plots import draw_class_counts, draw_sheet  # a second to import, which workers need not spend

    phantom = is_phantom(rows)
    files: dict[str, bytes] = {}
    captions = []
    with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
        path = Path(folder) / "sheet.png"
        first = index.splits["train"][0]
        shard_path = store.local_path(first.name)
        if shard_path is None:
            shard_path = Path(folder) / "shard.h5"
            store.download(first.name, shard_path)
        shard = open_shard(shard_path)
        for label, name in enumerate(index.classes):
            chosen = [place for place, found in enumerate(shard.labels) if found == label][:_SAMPLES]
            if not chosen:
                continue
            titles = [shard.source[place].rpartition("/")[2] for place in chosen]
            caption = f"Samples of train: {name}"
            draw_sheet([shard.images[place] for place in chosen], titles, path, heading=caption, is_phantom=phantom)
            key = f"{REPORT_PREFIX}samples-{name.lower()}.png"
            files[key] = path.read_bytes()
            captions.append((caption, key.removeprefix(REPORT_PREFIX)))
        counts = {split: index.num_images_per_class(split) for split in index.splits}
        draw_class_counts(counts, path, heading="Images by split and class", is_phantom=phantom)
        files[f"{REPORT_PREFIX}class-counts.png"] = path.read_bytes()
        captions.append(("Images by split and class", "class-counts.png"))
    card = write_card(index, rows, notes=notes, sheets=captions)
    return {**files, f"{REPORT_PREFIX}card.md": card.encode()}


def describe(index: DatasetIndex, store: Store) -> list[str]:
    """The last lines: where, how many, of what."""
    counts = index.counts
    splits = "; ".join(
        f"{split} {' + '.join(f'{number} {name}' for name, number in index.num_images_per_class(split).items())}"
        for split in index.splits
    )
    return [
        f"{counts.num_found} files found = {counts.num_written} written + {counts.num_set_aside} set aside",
        splits,
        f"data set {index.fingerprint[:16]} is at {store.uri}; its card: {store.uri}/{REPORT_PREFIX}card.md",
    ]


if __name__ == "__main__":
    run_command(main)
