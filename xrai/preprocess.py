"""Turn raw chest X-rays into a data set:

    python -m xrai.preprocess --source DIR|ZIP|NPZ|s3://… --dataset URI

JPEG, PNG and DICOM files. The label of each comes from its folder, or from the table that `--labels
FILE.csv` names: two classes or more, of any names, or findings.

It lists, hashes, plans, decodes on all cores, stores HDF5 shards, and commits with dataset.json.
Started again after a kill it goes on; started again on a finished data set of the same plan it says
so and does nothing. `--partition I/N` shares a large job among N processes, on as many machines as
you like, at once or one after another: whichever ends last commits. `--overwrite` makes the new
data set next to the old one, which stays intact until the new one is complete.
"""

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import NoReturn

from xrai.command import Flag, parse, run_command
from xrai.config import Config
from xrai.dataset import shards
from xrai.dataset.shards import INDEX_KEY, REPLACEMENT, DatasetIndex, read_index
from xrai.dataset.verify import find_faults_soon
from xrai.errors import (
    ConfigError,
    CorruptError,
    DatasetError,
    NotFoundError,
    SourceError,
    StoppedError,
)
from xrai.files import num_cores, scratch_folder
from xrai.ingest import address
from xrai.ingest.address import find_others, move_into_place, remove_others
from xrai.ingest.build import Builder
from xrai.ingest.card import make_report
from xrai.ingest.classes import split_names
from xrai.ingest.decode import start_workers_soon
from xrai.ingest.hashing import hash_source
from xrai.ingest.labels import LabelTable
from xrai.ingest.layouts import read_table
from xrai.ingest.patients import PatientKey
from xrai.ingest.plan import SHAPING_SECTIONS, Listing, Plan, list_source, make_plan, shaping_config
from xrai.ingest.sources import Source, open_source
from xrai.ingest.unfinished import Unfinished
from xrai.log import counted, get_logger, setup_logging
from xrai.results.sheets import draw_class_counts, draw_sheet
from xrai.store import (
    LEASE_KEY,
    Lease,
    Store,
    open_store,
    refuse_others_files,
    refuse_writer,
    take_lease,
)

FLAGS = (
    Flag("source", "data/chest_xray", "images: folder, .zip, .npz or s3://bucket", "XRAI_SOURCE"),
    Flag(
        "labels",
        "",
        "CSV file: path, label or findings, patient, split; else class folders",
        "XRAI_LABELS",
    ),
    Flag("dataset", "data/dataset", "the data set: folder or s3://bucket/prefix", "XRAI_DATASET"),
    Flag(
        "patient_key",
        "",
        "file with the key to hash patients' identifiers with; empty: patient.key in "
        "$XDG_CONFIG_HOME/xrai or ~/.config/xrai, made when it is first needed",
        "XRAI_PATIENT_KEY",
    ),
    Flag("workers", 0, "processes that decode; 0: one per core", type=int),
    Flag("partition", "0/1", "this process's share, I/N with I from 0 to N-1", "XRAI_PARTITION"),
    Flag("overwrite", False, "replace the data set, finished or not, that is there", type=bool),
)
_logger = get_logger("xrai.preprocess")


@dataclass(frozen=True)
class Share:
    """The share of the work that this process does, and with how many workers."""

    number: int
    num_partitions: int
    num_workers: int


def main() -> None:
    """Read the command line and make the data set."""
    config, flags, _ = parse(
        "preprocess", description="Turn raw X-rays into a data set.", flags=FLAGS
    )
    workers, overwrite = flags["workers"], flags["overwrite"]
    if not 0 <= workers <= 1024:
        raise ConfigError(
            f"--workers = {workers} is not allowed: it takes a whole number from 0 to 1024"
        )
    share = Share(*read_partition(flags["partition"]), workers or num_cores())
    setup_logging()
    signal.signal(signal.SIGTERM, _stop)
    scratch_folder()  # which clears what killed ones left
    if not flags["dataset"]:
        raise ConfigError("--dataset is empty; it takes a folder or s3://bucket/prefix")
    names = () if flags["labels"] else split_names(config.labels.names)
    source, store = open_source(flags["source"], names), open_store(flags["dataset"])
    if source.holds(store):
        raise ConfigError(
            f"--dataset {store.uri} is inside --source {flags['source']}, so that its files would "
            "be read as images; move one"
        )
    if overwrite and share.num_partitions > 1:
        raise ConfigError(
            "--overwrite and --partition exclude each other: each process would discard what the "
            "others made"
        )
    key = PatientKey(flags["patient_key"])
    own = store.local_path(INDEX_KEY)
    if flags["patient_key"] and own and key.path.resolve().is_relative_to(own.parent.resolve()):
        raise ConfigError(
            f"--patient_key {key.path} is inside --dataset {store.uri}, which others may get; keep "
            "it elsewhere"
        )
    table = read_table(flags["labels"], source, config.labels)
    preprocess(config, source, table, key, store, share, overwrite=overwrite)


@contextlib.contextmanager
def lock(store: Store, share: Share) -> Iterator[Lease]:
    """Keep others from writing at the address: each partition excludes its like and whole jobs.

    Raises `InUseError` where one writes.
    """
    is_whole = share.num_partitions == 1
    own = LEASE_KEY if is_whole else f".lease-{share.number}-of-{share.num_partitions}.json"
    try:
        with take_lease(store, own) as lease:
            for key in [entry.key for entry in store.list(".lease")] if is_whole else [LEASE_KEY]:
                if key != own:
                    refuse_writer(store, key)
            yield lease
    finally:
        if (path := store.local_path(own)) is not None:
            with contextlib.suppress(OSError):  # it is not empty
                path.parent.rmdir()


def preprocess(
    config: Config,
    source: Source,
    table: LabelTable | None,
    key: PatientKey,
    store: Store,
    share: Share,
    *,
    overwrite: bool,
) -> None:
    """Make a share of the data set, and commit if all shares are there; print the outcome."""
    began = time.monotonic()
    listing = list_source(source, table, key, config.labels)
    if not overwrite and is_finished(store):
        show_existing(config, source, listing, store)
        return
    if overwrite or store.size(INDEX_KEY) is None:
        refuse_others_files(store, is_own=address.is_own, is_mark=address.is_mark, flag="--dataset")
    with lock(store, share) as lease:
        old = read_old(store)
        if old is not None and not overwrite:
            remove_others(store, read_index(store))  # what a killed job left
            show_existing(config, source, listing, store)
            return
        unfinished = Unfinished(store, listing, shaping_config(config))
        if overwrite and not unfinished.is_claimed():
            discard_unfinished(store, old)
        unfinished.claim()
        try:
            if share.num_workers > 1:
                start_workers_soon()
            rows = hash_source(source, listing, unfinished, share.number, share.num_partitions)
            plan = make_plan(listing, rows, config)
            del listing, rows  # frees memory: the plan has its own rows
            tell(plan)
            place = "" if old is None else REPLACEMENT
            builder = Builder(
                plan,
                source,
                store,
                unfinished,
                num_workers=share.num_workers,
                place=place,
                confirm=lease.confirm,
            )
            builder.build(plan.shards[share.number :: share.num_partitions])
            report = partial(make_report, draw_sheet=draw_sheet, draw_counts=draw_class_counts)
            index = builder.commit(report, replaced=old)
        except SourceError:  # starting again would not help: leave nothing half-written
            if share.num_partitions == 1:
                discard_unfinished(store, old)
            raise
        if index is None:
            show_uncommitted(store, plan, share)
            return
        remove_others(store, index)
        if index.place:
            index = move_into_place(store, index)
        print("\n".join(describe(index, store, took_s=time.monotonic() - began)), flush=True)


def tell(plan: Plan) -> None:
    """Log what people should know of a plan."""
    for note in plan.notes:
        _logger.warning("%s", note)
    for fact in plan.facts:
        _logger.info("%s", fact)


def is_finished(store: Store) -> bool:
    """Whether the address holds a finished data set and nothing that a killed job left."""
    if store.size(INDEX_KEY) is None:
        return False
    index = read_index(store)
    return not index.place and not find_others(store, index)


def read_old(store: Store) -> bytes | None:
    """The `dataset.json` that is to be replaced, once its objects have their usual keys; None where
    there is none.
    """
    try:
        old = store.read(INDEX_KEY)
    except NotFoundError:
        return None
    with contextlib.suppress(CorruptError, DatasetError):  # then --overwrite has been given
        if (index := read_index(store)).place:
            move_into_place(store, index)
            return store.read(INDEX_KEY)
    return old


def discard_unfinished(store: Store, old: bytes | None) -> None:
    """Remove what was made so far, and nothing of the data set that is there."""
    remove_others(store, None, "" if old is None else REPLACEMENT)


def show_uncommitted(store: Store, plan: Plan, share: Share) -> None:
    """Print why this process did not commit. Raises `DatasetError` where something went wrong."""
    if store.size(INDEX_KEY) is not None and read_index(store).plan_sha256 == plan.sha256:
        index = read_index(store)
        remove_others(store, index)  # what this process stored after another one had committed
        print("\n".join(describe(index, store)), flush=True)
    elif share.num_partitions > 1:
        print(
            f"partition {share.number}/{share.num_partitions} is stored at {store.uri}; the last "
            "one to end commits",
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
    """Print the data set that is there. Raises `DatasetError` if it is of another plan."""
    index = read_index(store)
    if faults := find_faults_soon(store, index, with_rows=False):
        raise DatasetError(
            f"{store.uri} is damaged: {faults[0].key} {faults[0].words}; `xrai verify --repair` "
            "makes it whole, --overwrite makes it anew"
        )
    advice = "give another --dataset, or --overwrite to replace it"
    wanted, defaults = config.to_mapping(), Config().to_mapping()
    for section in SHAPING_SECTIONS:
        for name, value in wanted[section].items():
            found = index.config.get(section, {}).get(name, defaults[section][name])
            if found != value:
                raise DatasetError(
                    f"{store.uri} holds a data set of {section}.{name} = {_said(found)}, not "
                    f"{_said(value)}: {advice}"
                )
    plan = make_plan(listing, hash_source(source, listing, None), config)
    if index.plan_sha256 != plan.sha256:
        key = listing.key
        words = f", or patients hashed with another key than that in {key.path}" if key.id else ""
        raise DatasetError(
            f"{store.uri} holds a data set of other images or labels than those of {source.name}"
            f"{words}: {advice}"
        )
    _logger.info("the data set is there already, from the same images and config: nothing to do")
    print("\n".join(describe(index, store)), flush=True)


def _said(value: object) -> str:
    return "empty" if value == "" else str(value)


def describe(index: DatasetIndex, store: Store, *, took_s: float | None = None) -> list[str]:
    """The last lines: how many, of what, where."""
    counts = index.counts
    rate = f" in {took_s:.1f} s, {counts.num_found / took_s:.0f} images/s" if took_s else ""
    splits = []
    for split in index.splits:
        numbers = index.num_images_per_class(split).items()
        splits.append(f"{split} {' + '.join(f'{number} {name}' for name, number in numbers)}")
    return [
        f"{counted(counts.num_found, 'file')} found = {counts.num_written} written + "
        f"{counts.num_set_aside} excluded{rate}",
        "; ".join(splits),
        f"data set {index.fingerprint[:16]} is at {store.uri}; its card: "
        f"{store.uri}/{shards.REPORT_PREFIX}card.md",
    ]


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise StoppedError("stopped by SIGTERM; what is stored is kept, start again to go on")


if __name__ == "__main__":
    run_command(main)
