"""Runs as they are stored: `xrai runs` lists them, `xrai runs ID` shows the results of one, and
`xrai runs ID --out DIR` copies its files to DIR/ID.

What is copied of a finished run is checked against the hashes in its summary. Checkpoints stay
where they are unless `--checkpoints` asks for them.
"""

from pathlib import Path

from xrai.command import Flag, parse, run_command
from xrai.errors import CorruptError, RunError, StoreError, UserError
from xrai.files import explaining, sha256_of
from xrai.log import counted, get_logger, printable, progress, setup_logging
from xrai.results.folder import ENVIRONMENT, HISTORY, SUMMARY, check_run_id
from xrai.results.history import parse_history
from xrai.results.metrics import format_value
from xrai.results.summary import Summary, read_summary, result_lines, stated_hashes
from xrai.store import LEASE_KEY, Store, disk_path, open_store

FLAGS = (
    Flag("runs", [], "IDs of runs; none: list all", nargs="*"),
    Flag("artifacts", "submit", "where runs are: a folder or s3://bucket/prefix", "XRAI_ARTIFACTS"),
    Flag("out", "", "copy the runs' files to folders of their names in this one"),
    Flag("checkpoints", False, "copy checkpoints, too", type=bool),
)
_CHECKPOINTS = "checkpoints/"
_MARK = f"/{ENVIRONMENT}"  # in the folder of a run, from its start on
_logger = get_logger("xrai.runs")


def main() -> None:
    """Read the command line; list, show or copy runs."""
    flags = parse("runs", description="List, show or fetch runs.", flags=FLAGS).flags
    setup_logging()
    artifacts, run_ids = flags["artifacts"].rstrip("/"), [*map(check_run_id, flags["runs"])]
    if not run_ids:
        if flags["out"]:
            raise UserError("--out needs the ID of a run; xrai runs lists them")
        print("\n".join(list_runs(artifacts)), flush=True)
    for run_id in run_ids:
        store = open_store(f"{artifacts}/{run_id}")
        if flags["out"]:
            folder = disk_path(flags["out"], flag="--out") / run_id
            number = fetch(store, folder, with_checkpoints=flags["checkpoints"])
            _logger.info("%s of %s: %s", counted(number, "file"), store.uri, folder)
            store = open_store(str(folder))
        print("\n".join(describe(store)), flush=True)


def list_runs(artifacts: str) -> list[str]:
    """A line for each run, sorted by ID, with its state, or why that cannot be read.

    Raises `RunError` where there is no run.
    """
    store = open_store(artifacts)
    keys = {entry.key for entry in store.list() if entry.key.count("/") == 1}
    names = sorted(key.removesuffix(_MARK) for key in keys if key.endswith(_MARK))
    if not names:
        raise RunError(f"there is no run at {store.uri}: --artifacts says where runs are")
    return [f"{printable(name)}  {_state_or_fault(f'{artifacts}/{name}')}" for name in names]


def describe(store: Store) -> list[str]:
    """The results of a finished run, or how far it is. Raises `RunError` where there is no run."""
    _refuse_others(store)
    if (summary := _summary(store)) is None:
        return [f"{store.uri}: {_state(store)}"]
    return result_lines(summary.main, store.uri, validation=summary.validation)


def fetch(store: Store, folder: Path, *, with_checkpoints: bool = False) -> int:
    """Copy a run's files; how many. Files that are here already, with the right hash, stay.

    The summary, by which the others are checked, comes last. Raises `RunError` where there is no
    run, `UserError` where the folder is the run's own, `CorruptError` if a file is not what the
    summary lists; that file is not kept.
    """
    _refuse_others(store)
    keys = [entry.key for entry in store.list() if entry.key != LEASE_KEY]
    place = store.local_path(SUMMARY)
    if place is not None and place.parent.resolve() == folder.resolve():
        raise UserError(f"{folder} is the run itself: name another folder by --out")
    hashes = stated_hashes(store) or {}
    wanted = [key for key in keys if with_checkpoints or not key.startswith(_CHECKPOINTS)]
    wanted.sort(key=lambda key: key == SUMMARY)
    with explaining("written", str(folder)):
        (folder / SUMMARY).unlink(missing_ok=True)
    with progress("fetch", total=len(wanted), unit="files") as bar:
        for key in wanted:
            path, expected = folder / key, hashes.get(key)
            if expected is None or not path.is_file() or sha256_of(path) != expected:
                _fetch_one(store, key, path, sha256=expected)
            bar.update()
    return len(wanted)


def _refuse_others(store: Store) -> None:
    """Raise `RunError` where an address is not a run's, which has `ENVIRONMENT` from its start."""
    if store.size(ENVIRONMENT) is None:
        raise RunError(
            f"there is no run at {store.uri}, where {ENVIRONMENT} would be; xrai runs lists those "
            "there are"
        )


def _fetch_one(store: Store, key: str, path: Path, *, sha256: str | None) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        arrived = store.download(key, part)
        if sha256 is not None and arrived != sha256:
            raise CorruptError(
                f"{store.uri}/{key} is not what {SUMMARY} lists: its hash is {arrived[:12]}…, not "
                f"{sha256[:12]}…"
            )
        with explaining("written", str(path)):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _summary(store: Store) -> Summary | None:
    if store.size(SUMMARY) is None:
        return None
    return read_summary(store.read(SUMMARY), where=f"{store.uri}/{SUMMARY}")


def _state_or_fault(address: str) -> str:
    try:
        return _state(open_store(address))
    except (RunError, StoreError) as error:
        return printable(" ".join(str(error).split()))


def _state(store: Store) -> str:
    if (summary := _summary(store)) is not None:
        main = summary.main
        return (
            f"finished after {counted(summary.training.epochs, 'epoch')}: AUROC "
            f"{format_value('auroc', main.auroc)} on {main.split}"
        )
    if store.size(HISTORY) is not None:
        rows = parse_history(store.read(HISTORY), where=f"{store.uri}/{HISTORY}")
        return f"not finished, {counted(len(rows), 'epoch')} done"
    return "not finished, in its first epoch"


if __name__ == "__main__":
    run_command(main)
