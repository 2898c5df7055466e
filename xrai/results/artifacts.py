"""The folder of one run, and its publication to the artifact store. Rank 0 alone uses it.

Everything is written to a local folder, each file whole or not at all. For an artifact store that
is a folder, that is the run's place itself; for a bucket, a thread copies files up, in the order in
which they were announced, and never blocks or ends the training: what fails is repeated, counted,
and repeated once more by `finish`, which stores summary.json last. No summary.json, no finished
run.

    RunFolder.check_writable(uri)
    run = RunFolder(uri, run_id)
    run.open()
    run.resume_at(epoch=3, step=219)  # where a checkpoint says so
    run.write_config(text); run.append_history(row); run.publish(["curves/loss.png"]); …
    run.finish(summary)
"""

import csv
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

import xrai
from xrai.config import all_keys
from xrai.errors import RunError, StoreAccessError, StoreError, UserError, XraiError
from xrai.log import get_logger
from xrai.results import events
from xrai.results.metrics import format_interval, format_value
from xrai.store import Store, check_key, open_store

SCHEMA_VERSION = 1
SUMMARY = "summary.json"
EVENTS = "tensorboard"

HISTORY_COLUMNS = (
    "epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc", "shifted_accuracy",
    "shifted_auroc", "lr", "grad_norm", "images_per_s", "data_wait_share", "accelerator_utilisation", "fetch_s",
    "verify_s", "assemble_s", "transfer_s", "compute_s", "eval_s", "epoch_s", "peak_memory_mib",
)  # fmt: skip
TENSORBOARD_TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/val",
    "shifted_accuracy": "accuracy/val_shifted",
    "val_auroc": "auroc/val",
    "shifted_auroc": "auroc/val_shifted",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "images_per_s": "throughput/images_per_s",
    "data_wait_share": "throughput/data_wait_share",
    "accelerator_utilisation": "throughput/accelerator_utilisation",
    "fetch_s": "time/fetch_s",
    "verify_s": "time/verify_s",
    "assemble_s": "time/assemble_s",
    "transfer_s": "time/transfer_s",
    "compute_s": "time/compute_s",
    "eval_s": "time/eval_s",
    "epoch_s": "time/epoch_s",
    "peak_memory_mib": "memory/peak_mib",
}
FINAL_TAGS = {name: f"final/{name}" for name in ("accuracy", "sensitivity", "specificity", "auroc")}
PREDICTION_COLUMNS = (
    "split", "source", "patient", "group", "subtype", "label", "score", "call", "atypicality", "decision",
)  # fmt: skip

_PACKAGES = (
    "torch",
    "numpy",
    "h5py",
    "pillow",
    "scikit-learn",
    "matplotlib",
    "tensorboard",
    "boto3",
    "pydicom",
)
_FETCHED_WHEN_NEEDED = ("checkpoints/",)  # large; the learning room fetches the one it wants
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_FINISH_ATTEMPTS = 4
_FINISH_TIMEOUT_S = 600.0
_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

_logger = get_logger(__name__)


def new_run_id(now: datetime) -> str:
    """A name that sorts by time and is not given twice: `20261123-031500-a1b2c3`."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def check_run_id(run_id: str) -> str:
    """`run_id` itself, if it can name a folder; raises `UserError` if it cannot."""
    if _RUN_ID.fullmatch(run_id) is None or ".." in run_id:
        raise UserError(
            f"--run_id {run_id!r} is not allowed: use up to 128 letters, digits, dots, dashes and underscores, "
            "the first no dot or dash, no '..'; or leave it out to get a new one"
        )
    return run_id


def describe_environment() -> dict[str, Any]:
    """What this machine and its software are, for environment.json; no names of people, hosts or
    keys.
    """
    versions = {"xrai": xrai.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "schema_version": SCHEMA_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packages": versions,
    }


def make_summary(
    metrics: Mapping[str, Any],
    *,
    run_id: str,
    status: str,
    epochs: int,
    best_epoch: int,
    fingerprint: str,
    duration_s: float,
    is_phantom: bool,
) -> dict[str, Any]:
    """What summary.json holds, but for `files`; each result is the one of `metrics` (the
    metrics.json dictionary).
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "status": status,
        **_main_results(metrics),
        "epochs": epochs,
        "best_epoch": best_epoch,
        "fingerprint": fingerprint,
        "is_phantom": is_phantom,
        "duration_s": round(duration_s, 3),
    }


def format_result_lines(summary: Mapping[str, Any], folder: str | Path) -> list[str]:
    """The last lines of a training: the results with their 95 % intervals and counts, and where
    the pictures are.
    """
    validation = summary.get("validation", {}) if summary["split"] != "val" else {}
    values = [f"{_title(name)} {format_value(name, value)}" for name, value in validation.items()]
    return [
        *_format_main_results(summary, is_phantom=summary["is_phantom"]),
        *([f"validation  {', '.join(values)}"] if values else []),
        *_format_side_results(summary),
        f"pictures    {folder}/curves/loss.png  {folder}/curves/accuracy.png  {folder}/plots/",
        f"report      {folder}/report.html",
    ]


def format_metrics_lines(
    metrics: Mapping[str, Any], folder: str | Path, *, is_phantom: bool = False
) -> list[str]:
    """The same lines for one split measured alone: from the metrics.json dictionary, with the
    folder of its files.
    """
    results = _main_results(metrics)
    return [
        *_format_main_results(results, is_phantom=is_phantom),
        *_format_side_results(results),
        f"pictures    {folder}/plots/",
        f"report      {folder}/report.html",
    ]


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a history.csv: epoch and step whole numbers, the rest numbers, None where a
    field is empty.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return _parse_history(file, where=str(path))


def safe_path(path: str) -> str:
    """The same relative path, such that no spreadsheet takes it for a formula.

    Names of files come from anywhere, and `=cmd|' /C …'!A0` at the head of a cell is run by a click
    (OWASP, CSV injection). `./` in front changes no path's meaning.
    """
    return f"./{path}" if path.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else path


def to_json(value: Any) -> str:
    """JSON text of plain values, arrays' scalars included; what is not finite becomes null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV text with a header; what is missing, None or not finite is an empty field. See
    `safe_path` for names.
    """
    buffer = io.StringIO(newline="")
    plain = [
        {key: "" if value is None else value for key, value in _plain(row).items()} for row in rows
    ]
    # csv quotes a carriage return only where it ends lines, and readers take a bare one for the end
    # of a line
    has_return = any(
        isinstance(value, str) and "\r" in value for row in plain for value in row.values()
    )
    quoting: Any = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n", quoting=quoting)
    writer.writeheader()
    writer.writerows(plain)
    return buffer.getvalue()


class RunFolder:
    """The folder of one run.

    `path` is the local folder; `address` is where people find the run; `store` is the run's own
    place in the artifact store. `work_dir` is where runs of a bucket are written first; by default
    a folder of the user's cache.
    """

    def __init__(self, artifacts_uri: str, run_id: str, *, work_dir: Path | None = None) -> None:
        self.run_id = check_run_id(run_id)
        self.address = f"{artifacts_uri.rstrip('/')}/{run_id}"
        self.store: Store = open_store(self.address)
        place = self.store.local_path(SUMMARY)
        self.is_remote = place is None
        if place is None:
            tag = hashlib.sha256(self.address.encode()).hexdigest()[:12]
            self.path = (work_dir or _default_work_dir()) / f"{run_id}-{tag}"
        else:
            self.path = place.parent
        self._publisher: _Publisher | None = None
        self._events: list[Event] = []
        self._next_segment = 0

    @staticmethod
    def check_writable(artifacts_uri: str, *, flag: str = "--artifacts") -> None:
        """Raise `UserError`, naming the flag, unless files can be written at the address.
        Nothing is left behind.
        """
        store = open_store(artifacts_uri)
        place = store.local_path("check")
        if place is None:
            name = f".write-check-{secrets.token_hex(6)}"
            store.write(name, b"")
            store.delete(name)
            return
        folder = place.parent
        existing = folder
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            cause = (
                "it is not a folder"
                if isinstance(error, NotADirectoryError)
                else (error.strerror or str(error))
            )
            where = "" if existing == folder else f" ({existing})"
            raise UserError(
                f"results cannot be written to {artifacts_uri}{where}: {cause}; name another folder or bucket with "
                f"{flag}, or mend its rights"
            ) from error

    def exists(self) -> bool:
        """Whether the artifact store, or this machine for it, holds anything of a run of this
        name.
        """
        return next(iter(self.store.list()), None) is not None or (
            self.is_remote and bool(self._names())
        )

    def open(self) -> None:
        """Make the local folder, bring down what the store holds of the run, and take back its
        summary.json.
        """
        self.attach()
        with self._explained(self.path):
            (self.path / SUMMARY).unlink(missing_ok=True)
        self.store.delete(SUMMARY)
        if self.is_remote:
            self._fetch()
        segments = [
            re.search(r"tfevents\.(\d+)", path.name)
            for path in (self.path / EVENTS).glob("*tfevents*")
        ]
        self._next_segment = 1 + max((int(found[1]) for found in segments if found), default=-1)

    def attach(self) -> None:
        """Make ready to add files to a run that exists, and leave all that it holds as it is."""
        with self._explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if self.is_remote and self._publisher is None:
            self._publisher = _Publisher(self.store, self.path)

    def resume_at(self, *, epoch: int, step: int) -> None:
        """Forget what was recorded at or past `epoch` in history.csv, and at or past `step` in
        TensorBoard.

        TensorBoard forgets the epochs that history.csv does, too, even if one of them ended before
        `step`.
        """
        self.truncate_history(epoch)
        if self._next_segment:
            last_kept = max((row["step"] for row in self.history()), default=-1)
            self._events.append(events.session_start(min(step, last_kept + 1)))

    # Files
    # -----------------------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the run, whole or not at all, and announce it. Returns its local path."""
        path = self.path / check_key(name)
        # not named after the file: TensorBoard reads all whose names hold "tfevents"
        temporary = path.with_name(f".{hashlib.sha256(name.encode()).hexdigest()[:12]}.tmp")
        with self._explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        self.publish([name])
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run in UTF-8."""
        return self.write(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Write plain values as JSON; what is not finite becomes null."""
        return self.write_text(name, to_json(value))

    def write_config(self, text: str) -> Path:
        """Write the resolved config, YAML, to config.yaml."""
        return self.write_text("config.yaml", text)

    def write_environment(self, environment: Mapping[str, Any]) -> Path:
        """Write environment.json: `describe_environment()` and what the caller knows of devices."""
        return self.write_json("environment.json", environment)

    def write_predictions(
        self, rows: Iterable[Mapping[str, Any]], name: str = "predictions.csv"
    ) -> Path:
        """Write one row an image, with `PREDICTION_COLUMNS`; numbers in full, so that metrics can
        be counted again.

        The paths under `source` cannot be taken for formulas: see `safe_path`.
        """
        safe = ({**row, "source": safe_path(str(row["source"]))} for row in rows)
        return self.write_text(name, to_csv(PREDICTION_COLUMNS, safe))

    def history(self) -> list[dict[str, Any]]:
        """The rows of history.csv so far."""
        path = self.path / "history.csv"
        return read_history(path) if path.exists() else []

    def append_history(self, row: Mapping[str, Any]) -> None:
        """Add an epoch to history.csv and to TensorBoard, and close its segment of events.

        `row` has keys of `HISTORY_COLUMNS`; one that is left out, None or not finite is an empty
        field.
        """
        unknown = set(row) - set(HISTORY_COLUMNS)
        if unknown:
            raise ValueError(
                f"{sorted(unknown)} are no columns of history.csv: {', '.join(HISTORY_COLUMNS)}"
            )
        self.write_text("history.csv", to_csv(HISTORY_COLUMNS, [*self.history(), row]))
        self.add_scalars(
            int(row["step"]), {tag: row.get(column) for column, tag in TENSORBOARD_TAGS.items()}
        )
        self.close_segment()

    def truncate_history(self, epoch: int) -> None:
        """Drop the rows of history.csv at or past `epoch`."""
        rows = self.history()
        kept = [row for row in rows if row["epoch"] < epoch]
        if len(kept) < len(rows):
            self.write_text("history.csv", to_csv(HISTORY_COLUMNS, kept))

    # TensorBoard
    # -----------------------------------------------------------------------------------------------------

    def add_scalars(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Keep scalars by tag for the next segment; those that are None or not finite are left
        out.
        """
        if values := list(events.finite_scalars(scalars)):
            self._events.append(events.summary(step, values))

    def add_picture(self, step: int, tag: str, path: Path) -> None:
        """Keep a PNG file for the next segment."""
        self._events.append(events.summary(step, [events.picture(tag, path.read_bytes())]))

    def add_precision_recall(
        self,
        step: int,
        tag: str,
        labels: npt.ArrayLike,
        scores: npt.ArrayLike,
        *,
        description: str = "",
    ) -> None:
        """Keep the precision-recall curve of labels (N,) and scores (N,) in [0, 1]; none where a
        class is missing.
        """
        if len(np.unique(np.asarray(labels))) == 2:
            curve = events.precision_recall(tag, labels, scores, description=description)
            self._events.append(events.summary(step, [curve]))

    def add_hyperparameters(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the resolved config for TensorBoard's table of runs, at once, so that it shows
        runs that go on.
        """
        followed = {
            TENSORBOARD_TAGS["shifted_auroc"]: "AUROC, augmented validation",
            "accuracy/val": "accuracy, val",
        }
        final = {
            tag: f"final {'AUROC' if name == 'auroc' else name}" for name, tag in FINAL_TAGS.items()
        }
        values = events.hyperparameters(
            config,
            group=self.run_id,
            metrics={**final, **followed},
            meanings={key.name: key.meaning for key in all_keys()},
        )
        self._events.append(events.summary(0, values))
        self.close_segment()

    def add_results(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the main results of the metrics.json dictionary, and that the run succeeded, for
        the next segment.
        """
        results = _main_results(metrics)
        self.add_scalars(step, {tag: results[name] for name, tag in FINAL_TAGS.items()})
        self._events.append(events.summary(step, [events.session_success()]))

    def close_segment(self) -> None:
        """Write the events kept so far as one closed file, so that a bucket gets each byte once.

        TensorBoard reads files in the order of their names, hence the number in front.
        """
        if not self._events:
            return
        buffer = io.BytesIO()
        records = RecordWriter(buffer)
        head = [events.file_version(self._events[0].wall_time)]
        if (
            self._next_segment == 0
        ):  # TensorBoard takes the first start for the run's own, and forgets nothing at it
            head.append(events.session_start(0))
        for event in [*head, *self._events]:
            records.write(event.SerializeToString())
        self.write(f"{EVENTS}/events.out.tfevents.{self._next_segment:06d}.xrai", buffer.getvalue())
        self._events.clear()
        self._next_segment += 1

    # Publication
    # -----------------------------------------------------------------------------------------------------

    def publish(self, names: Sequence[str]) -> None:
        """Announce files for the bucket, to be stored in this order, later. Returns at once."""
        if self._publisher is not None:
            self._publisher.announce([(name, True) for name in names])

    def remove(self, names: Sequence[str]) -> None:
        """Delete files of the run, here at once and in the bucket later."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        if self._publisher is not None:
            self._publisher.announce([(name, False) for name in names])

    @property
    def num_failed_uploads(self) -> int:
        """How many attempts to store a file have failed so far, those included that succeeded
        later.
        """
        return self._publisher.num_failures if self._publisher is not None else 0

    def flush_or_raise(self, *, timeout_s: float = _FINISH_TIMEOUT_S) -> None:
        """Wait until all that was announced is stored. Raises `StoreError` as `finish` does."""
        self.close_segment()
        if self._publisher is not None:
            self._drain_or_raise(timeout_s)

    def flush(self, *, timeout_s: float) -> bool:
        """Close the segment of events and wait for all that was announced; False after more than
        `timeout_s`.
        """
        self.close_segment()
        return self._publisher is None or self._publisher.drain(timeout_s=timeout_s)

    def finish(
        self, summary: Mapping[str, Any], *, timeout_s: float = _FINISH_TIMEOUT_S
    ) -> dict[str, Any]:
        """Store all files that are not stored yet, then summary.json with every file's SHA-256.
        Returns the summary.

        Raises `StoreError` naming the local folder when the bucket does not take them after several
        attempts.
        """
        self.close_segment()
        files = {name: _sha256(self.path / name) for name in self._names()}
        if self._publisher is not None:
            self._publisher.announce(
                [(name, True) for name, digest in files.items() if not self._has(name, digest)]
            )
            self._drain_or_raise(timeout_s)
        whole = {**summary, "num_failed_uploads": self.num_failed_uploads, "files": files}
        self.write_json(SUMMARY, whole)
        if self._publisher is not None:
            self._drain_or_raise(timeout_s)
            self._publisher.close()
        return whole

    def close(self) -> None:
        """Stop the thread without waiting for what is not stored yet, and say so; for a run that
        ends early.
        """
        if self._publisher is not None and not self._publisher.is_closed:
            self._publisher.close()
            if waiting := self._publisher.waiting():
                _logger.warning(
                    "%d files of run %s are not stored at %s (%s first); they are in %s: start again with the same "
                    "--run_id on this machine, or copy them from there",
                    len(waiting), self.run_id, self.address, waiting[0], self.path,
                )  # fmt: skip

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """Turn the operating system's refusal to write into one line."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{path} of run {self.run_id} cannot be written: {error.strerror or error}; free some space, mend the "
                "rights, or name another place with --artifacts, then start again with the same --run_id"
            ) from error

    def _has(self, name: str, digest: str) -> bool:
        return self._publisher is not None and self._publisher.stored.get(name) == digest

    def _drain_or_raise(self, timeout_s: float) -> None:
        assert self._publisher is not None
        if not self._publisher.drain(timeout_s=timeout_s, max_attempts=_FINISH_ATTEMPTS):
            waiting, cause = self._publisher.waiting(), self._publisher.last_error
            self._publisher.close()
            raise StoreError(
                f"{len(waiting)} files of run {self.run_id} could not be stored at {self.address}, {waiting[0]} first: "
                f"{cause or f'not done in {timeout_s:.0f} s'}; all results are in {self.path}: copy them from there, "
                "or start again with the same --run_id"
            )

    def _fetch(self) -> None:
        """Make this machine's files and the store's the same, from the one where the run got
        further.

        That is this machine where an earlier process ended before the store had everything.
        """
        stored = {found.key: found.size_bytes for found in self.store.list()}
        theirs = self.store.read("history.csv").decode() if "history.csv" in stored else ""
        is_ahead = len(self.history()) >= len(
            _parse_history(theirs.splitlines(), where=f"{self.address}/history.csv")
        )
        local = {name: (self.path / name).stat().st_size for name in self._names()}
        for name, size_bytes in stored.items():
            is_wanted = name not in local or (not is_ahead and local[name] != size_bytes)
            if is_wanted and not name.startswith(_FETCHED_WHEN_NEEDED):
                self.store.download(name, self.path / name)
        unknown = [name for name, size_bytes in local.items() if stored.get(name) != size_bytes]
        if is_ahead and unknown:
            _logger.info(
                "%d files of run %s that an earlier process left in %s are stored first", len(unknown), self.run_id,
                self.path,
            )  # fmt: skip
            self.publish(unknown)
        for name in () if is_ahead else unknown:
            if name not in stored and name.startswith(EVENTS):
                (self.path / name).unlink()

    def _names(self) -> list[str]:
        """The files of the run, in an order to store them, without summary.json and what is being
        written.

        A checkpoint's JSON file is its commit mark, and latest.json points to one: so they come
        last.
        """
        paths = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        names = (path.as_posix() for path in paths if not _is_temporary(path))
        return sorted(
            (name for name in names if name != SUMMARY),
            key=lambda name: (name.endswith(".json"), name.endswith("/latest.json"), name),
        )


class _Publisher:
    """Stores announced files in order, in a thread of its own. The first in line is tried until
    it works.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.num_failures = 0
        self.last_error: Exception | None = None
        self.stored: dict[str, str] = {}  # name -> SHA-256 of what the bucket got from here
        self._store, self._folder = store, folder
        self._line: dict[str, _Task] = {}
        self._attempts = 0  # failed ones since the last success or call to drain
        self._hurry = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="xrai-publisher", daemon=True)
        self._thread.start()

    def announce(self, tasks: Iterable[tuple[str, bool]]) -> None:
        """Put (name, whether to keep it) at the end of the line; a name that waits already moves
        there.
        """
        with self._changed:
            for name, keep in tasks:
                self._line.pop(name, None)
                self._line[name] = _Task(name, keep)
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will be stored."""
        return self._closed

    def drain(self, *, timeout_s: float, max_attempts: int | None = None) -> bool:
        """Wait for the line to empty; False when time is over, `max_attempts` failed in a row,
        or it was closed.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._attempts, self._hurry = 0, True
            self._changed.notify_all()
            while self._line:
                left_s = deadline - time.monotonic()
                gave_up = max_attempts is not None and self._attempts >= max_attempts
                if left_s <= 0 or gave_up or self._closed or not self._thread.is_alive():
                    return False
                self._changed.wait(min(left_s, 1.0))
            return True

    def waiting(self) -> list[str]:
        """The names that are not stored yet."""
        with self._changed:
            return list(self._line)

    def close(self) -> None:
        """End the thread after the transfer it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                task = next(iter(self._line.values()))
            try:
                digest = self._do(task)
            except (XraiError, OSError) as error:
                self._pause_after(task, error)
                continue
            with self._changed:
                if self._attempts:
                    _logger.info(
                        "%s is stored now; %d more files wait", task.name, len(self._line) - 1
                    )
                self._attempts = 0
                if digest is not None:
                    self.stored[task.name] = digest
                if self._line.get(task.name) is task:  # else it was announced once more meanwhile
                    del self._line[task.name]
                self._changed.notify_all()

    def _do(self, task: "_Task") -> str | None:
        if task.keep:
            path = self._folder / task.name
            return (
                self._store.upload(task.name, path) if path.exists() else None
            )  # gone since, as old checkpoints are
        self.stored.pop(task.name, None)
        try:
            self._store.delete(task.name)
        except StoreAccessError as error:  # a bucket may take files and let none be deleted
            _logger.warning("%s stays in the bucket: %s", task.name, error)
        return None

    def _pause_after(self, task: "_Task", error: Exception) -> None:
        with self._changed:
            self.num_failures += 1
            self.last_error = error
            self._attempts += 1
            if self._attempts == 1:
                _logger.warning(
                    "%s is not stored yet and will be tried again; the run goes on: %s",
                    task.name,
                    error,
                )
            self._hurry = False
            self._changed.notify_all()
            pause_s = min(_FIRST_PAUSE_S * 2 ** (self._attempts - 1), _LONGEST_PAUSE_S)
            self._changed.wait_for(lambda: self._closed or self._hurry, timeout=pause_s)


def _main_results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    entries = {
        name: metrics["metrics"][name]
        for name in ("accuracy", "sensitivity", "specificity", "auroc")
    }
    return {
        "split": metrics["split"],
        "num_images": metrics["num_images"],
        "num_patients": metrics["num_patients"],
        **{name: entry["value"] for name, entry in entries.items()},
        "intervals": {name: [entry["low"], entry["high"]] for name, entry in entries.items()},
        "counts": dict(metrics["counts"]),
        "threshold": metrics["threshold"],
        "threshold_source": metrics["threshold_source"],
        "temperature": metrics["calibration"]["temperature"],
        "review": {
            "num_images": metrics["abstention"]["num_review"],
            "share": metrics["abstention"]["share_review"],
            "accuracy_of_the_rest": metrics["abstention"]["metrics"]
            .get("accuracy", {})
            .get("value"),
        },
        "baselines": {
            name: {"auroc": entry["metrics"]["auroc"]["value"], "reason": entry["reason"]}
            for name, entry in metrics.get("baselines", {}).items()
        },
    }


def _format_side_results(results: Mapping[str, Any]) -> list[str]:
    """What is left to a person, and what shortcuts alone can do."""
    lines = []
    review = results.get("review") or {}  # a run of an earlier version has neither
    if review.get("num_images") is not None:
        rest = format_value("accuracy", review["accuracy_of_the_rest"])
        lines.append(
            f"review      {review['num_images']:,} of {results['num_images']:,} images are unlike the training images; "
            f"accuracy on the others {rest}"
        )
    if results.get("baselines"):
        geometry, border = (results["baselines"][name] for name in ("geometry", "border"))
        parts = [
            f"picture size alone {format_value('auroc', geometry['auroc'])}",
            f"outer border alone {format_value('auroc', border['auroc'])}",
        ]
        lines.append(f"shortcuts   AUROC of {', '.join(parts)}")
    return lines


def _title(name: str) -> str:
    return "AUROC" if name == "auroc" else name


def _format_main_results(results: Mapping[str, Any], *, is_phantom: bool) -> list[str]:
    tp, fp, tn, fn = (results["counts"][key] for key in ("tp", "fp", "tn", "fn"))
    details = {
        "accuracy": f"{tp + tn:,} of {tp + fp + tn + fn:,} images called right",
        "sensitivity": f"{tp:,} of {tp + fn:,} pneumonia images found",
        "specificity": f"{tn:,} of {tn + fp:,} normal images left alone",
        "auroc": f"threshold {results['threshold']:.3f}, {results['threshold_source']}",
    }
    lines = [
        f"{results['split']} split: {results['num_images']:,} images of {results['num_patients']:,} patients; 95 % "
        f"intervals in brackets{'; drawn phantoms, not patients' if is_phantom else ''}"
    ]
    for name, detail in details.items():
        interval = format_interval(name, *results["intervals"][name])
        number, shown = format_value(name, results[name]), f"({interval})" if interval else ""
        lines.append(f"{_title(name):<12}{number:>7}  {shown:<16}  {detail}")
    return lines


@dataclass(eq=False)
class _Task:
    name: str
    keep: bool  # store it, or delete it from the bucket


def _default_work_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "xrai" / "runs"


def _is_temporary(name: Path) -> bool:
    return name.suffix == ".tmp" or any(part.startswith(".") for part in name.parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse_history(lines: Iterable[str], *, where: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for fields in csv.DictReader(lines):
            row: dict[str, Any] = {
                key: float(text) if text else None for key, text in fields.items()
            }
            rows.append({**row, "epoch": int(fields["epoch"]), "step": int(fields["step"])})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{where} is not a history of xrai: {error}; remove it, or start a new run"
        ) from error
    return rows
