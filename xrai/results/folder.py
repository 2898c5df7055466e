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

import hashlib
import io
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from xrai.config import all_keys
from xrai.errors import StoreError, UserError
from xrai.files import cache_folder, sha256_of
from xrai.log import get_logger
from xrai.results import tensorboard
from xrai.results.history import HISTORY_COLUMNS, TENSORBOARD_TAGS, parse_history, read_history
from xrai.results.metrics import HEADLINES
from xrai.results.publisher import Publisher
from xrai.results.tables import safe_path, to_csv, to_json
from xrai.results.types import Estimate
from xrai.store import Store, check_key, open_store

SUMMARY = "summary.json"
EVENTS = "tensorboard"
FINAL_TAGS = {name: f"final/{name}" for name in HEADLINES}

PREDICTION_COLUMNS = (
    "split", "source", "patient", "group", "subtype", "label", "score", "call", "atypicality", "decision",
)  # fmt: skip

_FETCHED_WHEN_NEEDED = ("checkpoints/",)  # large; the learning room fetches the one it wants
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
            self.path = (work_dir or cache_folder("runs")) / f"{run_id}-{tag}"
        else:
            self.path = place.parent
        self._publisher: Publisher | None = None
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
            self._publisher = Publisher(self.store, self.path)

    def resume_at(self, *, epoch: int, step: int) -> None:
        """Forget what was recorded at or past `epoch` in history.csv, and at or past `step` in
        TensorBoard.

        TensorBoard forgets the epochs that history.csv does, too, even if one of them ended before
        `step`.
        """
        self.truncate_history(epoch)
        if self._next_segment:
            last_kept = max((row["step"] for row in self.history()), default=-1)
            self._events.append(tensorboard.session_start(min(step, last_kept + 1)))

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
        if values := list(tensorboard.finite_scalars(scalars)):
            self._events.append(tensorboard.summary(step, values))

    def add_picture(self, step: int, tag: str, path: Path) -> None:
        """Keep a PNG file for the next segment."""
        self._events.append(
            tensorboard.summary(step, [tensorboard.picture(tag, path.read_bytes())])
        )

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
            curve = tensorboard.precision_recall(tag, labels, scores, description=description)
            self._events.append(tensorboard.summary(step, [curve]))

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
        values = tensorboard.hyperparameters(
            config,
            group=self.run_id,
            metrics={**final, **followed},
            meanings={key.name: key.meaning for key in all_keys()},
        )
        self._events.append(tensorboard.summary(0, values))
        self.close_segment()

    def add_results(self, step: int, metrics: Mapping[str, Estimate]) -> None:
        """Keep the headline metrics, and that the run succeeded, for the next segment."""
        self.add_scalars(step, {tag: metrics[name].value for name, tag in FINAL_TAGS.items()})
        self._events.append(tensorboard.summary(step, [tensorboard.session_success()]))

    def close_segment(self) -> None:
        """Write the events kept so far as one closed file, so that a bucket gets each byte once.

        TensorBoard reads files in the order of their names, hence the number in front.
        """
        if not self._events:
            return
        buffer = io.BytesIO()
        records = RecordWriter(buffer)
        head = [tensorboard.file_version(self._events[0].wall_time)]
        if (
            self._next_segment == 0
        ):  # TensorBoard takes the first start for the run's own, and forgets nothing at it
            head.append(tensorboard.session_start(0))
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
        hashes = {name: sha256_of(self.path / name) for name in self._names()}
        if self._publisher is not None:
            self._publisher.announce(
                [(name, True) for name, digest in hashes.items() if not self._has(name, digest)]
            )
            self._drain_or_raise(timeout_s)
        whole = {**summary, "num_failed_uploads": self.num_failed_uploads, "files": hashes}
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
            parse_history(theirs.splitlines(), where=f"{self.address}/history.csv")
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


def _is_temporary(name: Path) -> bool:
    return name.suffix == ".tmp" or any(part.startswith(".") for part in name.parts)
