"""Check a data set: `xrai verify --dataset URI [--repair --source S [--labels FILE]]`.

Checks every hash, count and split rule and the fingerprint. The exit status is 0 if all hold, else
1, with a line for each fault. `--repair` makes damaged objects anew, bit for bit, from the source
that the data set was made from.
"""

from collections.abc import Collection, Sequence
from functools import partial

from xrai import config as configuration
from xrai.command import Flag, parse, run_command
from xrai.config import Config
from xrai.dataset.shards import REPLACEMENT, DatasetIndex, read_index
from xrai.dataset.verify import Fault, find_faults
from xrai.errors import CorruptError, DatasetError
from xrai.files import num_cores
from xrai.ingest.card import make_report
from xrai.ingest.classes import split_names
from xrai.ingest.hashing import hash_source
from xrai.ingest.layouts import read_table
from xrai.ingest.patients import PatientKey
from xrai.ingest.plan import Listing, list_source, make_plan
from xrai.ingest.repair import repair
from xrai.ingest.sources import Source, open_source
from xrai.ingest.unfinished import UNFINISHED
from xrai.log import setup_logging
from xrai.results.sheets import draw_class_counts, draw_sheet
from xrai.store import Store, open_store, take_lease

FLAGS = (
    Flag("dataset", "data/dataset", "the data set: a folder or s3://bucket/prefix", "XRAI_DATASET"),
    Flag("repair", False, "make damaged objects anew from --source", type=bool),
    Flag(
        "source",
        "data/chest_xray",
        "for --repair: the raw images it was made from",
        "XRAI_SOURCE",
        only_with="repair",
    ),
    Flag(
        "labels",
        "",
        "for --repair: the CSV file of labels it was made with",
        "XRAI_LABELS",
        only_with="repair",
    ),
    Flag(
        "patient_key",
        "",
        "for --repair: the key of patients, as of preprocess",
        "XRAI_PATIENT_KEY",
        only_with="repair",
    ),
)


def main() -> None:
    """Read the command line, check, and repair if asked."""
    flags = parse("verify", description="Check a data set.", flags=FLAGS).flags
    setup_logging()
    store = open_store(flags["dataset"])
    index = read_index(store)
    faults = verify(store, index)
    keys = find_repairable(index, faults)
    if keys and flags["repair"]:
        config = configuration.from_mapping(index.config, where=f"in {store.uri}/dataset.json")
        names = () if flags["labels"] else split_names(config.labels.names)
        source = open_source(flags["source"], names)
        table = read_table(flags["labels"], source, config.labels)
        key = PatientKey(flags["patient_key"], may_make=False)
        listing = list_source(source, table, key, config.labels)
        with take_lease(store):
            if read_index(store) != index:
                raise DatasetError(f"{store.uri} holds another data set now: start again")
            repair_from(store, index, keys, source=source, listing=listing, config=config)
        faults = verify(store, index)
    if faults:
        number = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise CorruptError(
            f"{store.uri} has {number}, as listed{_advice(index, faults, tried=flags['repair'])}"
        )
    counts = index.counts
    print(
        f"{store.uri} is whole: {counts.num_written} images, data set {index.fingerprint[:16]}",
        flush=True,
    )


def verify(store: Store, index: DatasetIndex) -> list[Fault]:
    """Find and print all faults."""
    faults = find_faults(store, index)
    for fault in faults:
        print(f"{fault.key} {fault.words}", flush=True)
    listed = {info.name for info in index.all_objects()}
    for entry in store.list():
        if entry.key.startswith((UNFINISHED, REPLACEMENT)) and entry.key not in listed:
            words = "is left over from preprocess (no fault; the next preprocess removes it)"
            print(f"{entry.key} {words}", flush=True)
    return faults


def find_repairable(index: DatasetIndex, faults: Sequence[Fault]) -> set[str]:
    """The objects with a fault that can be made anew from the source."""
    return {fault.key for fault in faults} & {info.name for info in index.all_objects()}


def repair_from(
    store: Store,
    index: DatasetIndex,
    keys: Collection[str],
    *,
    source: Source,
    listing: Listing,
    config: Config,
) -> None:
    """Make these objects anew, with the config that the data set states."""
    plan = make_plan(listing, hash_source(source, listing, None), config)

    report = partial(make_report, draw_sheet=draw_sheet, draw_counts=draw_class_counts)
    repair(store, index, keys, plan=plan, source=source, report=report, num_workers=num_cores())
    for key in sorted(keys):
        print(f"{key} is made anew", flush=True)


def _advice(index: DatasetIndex, faults: Sequence[Fault], *, tried: bool) -> str:
    if not find_repairable(index, faults):
        return "; none is a damaged object, which is what --repair makes anew" if tried else ""
    if tried:
        return "; `xrai preprocess --overwrite` makes the data set anew"
    return "; --repair --source S makes damaged objects anew from the data set's raw images"


if __name__ == "__main__":
    run_command(main)
