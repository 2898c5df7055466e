"""The folder of one run, and its publication to the artifact store; used by rank 0 alone.

Everything is written to a local folder, each file whole or not at all. If the artifact store is a
folder, that is the run's place itself. If it is a bucket, a thread uploads the files in the order
in which they were published, and never blocks or ends the training. summary.json comes last: a run
without it is not finished.

    RunFolder.check_writable(uri)
    run = RunFolder(uri, run_id)
    run.open()
    run.resume_at(epoch=3, step=219)  # if there is a checkpoint
    run.write_text("config.yaml", text); run.append_history(row); run.publish(["curves/loss.png"])
    run.finish(summary)
"""

import hashlib
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from xrai.errors import StoreError, UserError
from xrai.files import cache_folder, open_regular, sha256_of, write_atomically
from xrai.log import get_logger
from xrai.results.history import TAGS, EpochRow, columns_of, parse_history
from xrai.results.publisher import Publisher
from xrai.results.tensorboard import Events
from xrai.store import (
    LEASE_KEY,
    Lease,
    Store,
    check_key,
    open_store,
    refuse_others_files,
    take_lease,
)
from xrai.tables import to_csv, to_json

SUMMARY = "summary.json"
EVENTS = "tensorboard"
HISTORY = "history.csv"
ENVIRONMENT = "environment.json"  # written when a training starts, and by nothing else

_FETCHED_WHEN_NEEDED = ("checkpoints/",)  # large; learning fetches the one that it needs
_FINISH_ATTEMPTS = 4
_FINISH_TIMEOUT_S = 600.0
_TEMPORARY = re.compile(r"(^|/)\.|\.tmp$")
_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SEGMENT = re.compile(r"events\.out\.tfevents\.(\d+)\.xrai")

_logger = get_logger(__name__)


def new_run_id(now: datetime) -> str:
    """A unique name that sorts by time: `20261123-031500-a1b2c3`."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def check_run_id(run_id: str) -> str:
    """`run_id` itself; raises `UserError` if it cannot name a folder."""
    if _RUN_ID.fullmatch(run_id) is None or ".." in run_id:
        raise UserError(
            f"--run_id {run_id!r} is not allowed: use up to 128 letters, digits, dots, dashes and "
            "underscores, not beginning with a dot or dash and without '..'; or leave it out to "
            "get a new one"
        )
    return run_id


class Place(NamedTuple):
    """An address that this process alone writes."""

    store: Store
    lease: Lease

    def write(self, key: str, data: bytes) -> None:
        """Write an object. Raises `InUseError` if another process has taken the place over."""
        self.lease.confirm()
        self.store.write(key, data)


@contextmanager
def own_place(
    address: str, *, is_own: Callable[[str], bool], is_mark: Callable[[Store, str], bool]
) -> Iterator[Place]:
    """The place that --out gives, for this process alone until the block ends.

    Raises `UserError` if it cannot be written or holds files of something else, see
    `refuse_others_files`, and `InUseError` where another process writes it.
    """
    RunFolder.check_writable(address, flag="--out")
    out = open_store(address)
    with take_lease(out) as lease:
        refuse_others_files(out, is_own=is_own, is_mark=is_mark, flag="--out")
        yield Place(out, lease)


class RunFolder:
    """The folder of one run.

    `path` is the local folder, `address` is where people find the run, `store` is the run's own
    place in the artifact store, and `events` collects what `close_segment` writes for TensorBoard.
    Runs of a bucket are first written to `work_dir`, by default in the user's cache.
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
        self.events = Events(run_id)
        self._publisher = Publisher(self.store, self.path)  # to a bucket; a folder needs none
        self._lease: Lease | None = None
        self._purge_step: int | None = None

    @staticmethod
    def check_writable(artifacts_uri: str, *, flag: str = "--artifacts") -> None:
        """Raise `UserError`, naming the flag, unless files can be written at the address; leaves
        nothing behind.
        """
        store = open_store(artifacts_uri)
        place = store.local_path("check")
        if place is None:
            name = f".write-check-{secrets.token_hex(6)}"
            store.delete(name)  # first: keys without this right would leave the object there
            store.write(name, b"")
            store.delete(name)
            if flag != "--artifacts":
                return
            place = cache_folder("runs", "check")  # a run is written here first
            advice = "set XDG_CACHE_HOME to another folder"
        else:
            advice = f"name another folder or bucket with {flag}"
        folder = existing = place.parent
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            is_file = isinstance(error, NotADirectoryError)
            cause = "it is not a folder" if is_file else (error.strerror or str(error))
            where = "" if existing == folder else f" ({existing})"
            shown = artifacts_uri if store.local_path("check") else folder
            raise UserError(
                f"results cannot be written to {shown}{where}: {cause}; {advice}, or change the "
                "permissions"
            ) from error

    def exists(self) -> bool:
        """Whether the artifact store, or this machine, holds any file of the run."""
        is_stored = any(found.key != LEASE_KEY for found in self.store.list())
        return is_stored or (self.is_remote and bool(self._names()))

    def lock(self) -> None:
        """Keep other jobs from writing the run until `close`. Raises `InUseError` where one does,
        and again in `publish` if one has taken the run over.
        """
        self._lease = take_lease(self.store)

    def open(self) -> None:
        """Create the local folder, fetch what the store holds, and withdraw summary.json."""
        self.attach()
        (self.path / SUMMARY).unlink(missing_ok=True)
        self.store.delete(SUMMARY)
        if self.is_remote:
            self._fetch()

    def attach(self) -> None:
        """Prepare to add files to an existing run, and leave all that it holds as it is."""
        self.path.mkdir(parents=True, exist_ok=True)

    def resume_at(self, *, epoch: int, step: int) -> None:
        """Forget the rows of history.csv from `epoch` on, and TensorBoard's events from `step` on.

        TensorBoard forgets the same epochs, even if one of them ended before `step`.
        """
        rows = self.history()
        kept = [row for row in rows if row.epoch < epoch]
        if len(kept) < len(rows):
            self.write_text(HISTORY, to_csv(columns_of(kept), kept))
        self._purge_step = min(step, max((row.step + 1 for row in kept), default=0))

    # Files
    # ----------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the run, whole or not at all, and publish it. Returns its local path."""
        path = self.path / check_key(name)
        write_atomically(path, data)
        self.publish([name])
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run; what UTF-8 cannot encode, as in file names, becomes "?"."""
        return self.write(name, text.encode(errors="replace"))

    def write_json(self, name: str, value: object) -> Path:
        """Write plain values as JSON; see `to_json`."""
        return self.write_text(name, to_json(value))

    def history(self) -> list[EpochRow]:
        """The rows of history.csv so far."""
        path = self.path / HISTORY
        if not path.exists():
            return []
        with open_regular(path) as file:
            return parse_history(file.read(), where=str(path))

    def append_history(self, row: EpochRow) -> None:
        """Add an epoch to history.csv and to TensorBoard."""
        rows = [*self.history(), row]
        self.write_text(HISTORY, to_csv(columns_of(rows), rows))
        metrics = {tag: getattr(row, column) for column, tag in TAGS.items()}
        self.events.add_scalars(row.step, metrics)
        self.close_segment()

    def close_segment(self) -> None:
        """Write the events collected so far to a file that never changes again.

        So a bucket gets each byte once. TensorBoard reads the files in the order of their numbers.
        """
        found = (_SEGMENT.fullmatch(path.name) for path in (self.path / EVENTS).glob("*.xrai"))
        number = max((int(segment[1]) + 1 for segment in found if segment), default=0)
        name = f"{EVENTS}/events.out.tfevents.{number:06d}.xrai"
        path = self.path / name
        # TensorBoard reads all files with "tfevents" in their name, temporary ones included
        hidden = path.with_name(f".{number:06d}")
        # TensorBoard's server purges nothing at a run's first session: the first file starts it
        data = self.events.take(purge_step=self._purge_step if number else 0)
        if data is None:
            return
        write_atomically(hidden, data)
        hidden.replace(path)
        self._purge_step = None
        self.publish([name])

    # Publication
    # ----------------------------------------------------------------------------------------------

    def publish(self, names: Sequence[str]) -> None:
        """Queue files for upload to the bucket, in this order. Returns at once."""
        if self._lease is not None:
            self._lease.confirm()
        if self.is_remote:
            self._publisher.announce(names, keep=True)

    def remove(self, names: Sequence[str]) -> None:
        """Delete files of the run, here at once and in the bucket later."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        if self.is_remote:
            self._publisher.announce(names, keep=False)

    @property
    def num_failed_uploads(self) -> int:
        """Failed attempts to upload a file, including those that succeeded later."""
        return self._publisher.num_failures

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all published files are stored; False after `timeout_s`."""
        self.close_segment()
        return self._publisher.drain(timeout_s=timeout_s)

    def flush_or_raise(self, *, timeout_s: float = _FINISH_TIMEOUT_S) -> None:
        """Wait until all published files are stored. Raises `StoreError` as `finish` does."""
        self.close_segment()
        is_done = self._publisher.drain(timeout_s=timeout_s, max_attempts=_FINISH_ATTEMPTS)
        if not is_done and (waiting := self._publisher.waiting()):
            cause = self._publisher.last_error
            self._publisher.close()
            raise StoreError(
                f"{len(waiting)} files of run {self.run_id} could not be stored at {self.address}, "
                f"{waiting[0]} first: {cause or f'not done in {timeout_s:.0f} s'}; all results are "
                f"in {self.path}: copy them from there, or start again with the same --run_id"
            )

    def finish(
        self, summary: Mapping[str, object], *, timeout_s: float = _FINISH_TIMEOUT_S
    ) -> None:
        """Store all files, then summary.json, which gets the SHA-256 of each.

        Raises `StoreError`, naming the local folder, if the bucket does not take them after
        several attempts.
        """
        self.flush_or_raise(timeout_s=timeout_s)  # so that nothing is uploaded twice
        hashes = {name: sha256_of(self.path / name) for name in self._names()}
        stored = self._publisher.stored
        self.publish([name for name, digest in hashes.items() if stored.get(name) != digest])
        self.flush_or_raise(timeout_s=timeout_s)
        whole = {**summary, "num_failed_uploads": self.num_failed_uploads, "files": hashes}
        self.write_json(SUMMARY, whole)
        self.flush_or_raise(timeout_s=timeout_s)
        self._publisher.close()

    def close(self) -> None:
        """Stop uploading and log what is not stored; for a run that ends early."""
        if not self._publisher.is_closed:
            self._publisher.close()
            if waiting := self._publisher.waiting():
                text = f"{len(waiting)} files of run {self.run_id} are not stored at {self.address}"
                _logger.warning(
                    f"{text} ({waiting[0]} first); they are in {self.path}: start again with the "
                    "same --run_id on this machine, or copy them from there"
                )
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _fetch(self) -> None:
        """Synchronise this machine's files and the store's, from the side with the longer history.

        This machine is ahead if an earlier process ended before everything was uploaded.
        """
        stored = {found.key: found.size_bytes for found in self.store.list()}
        stored.pop(LEASE_KEY, None)
        theirs = self.store.read(HISTORY) if HISTORY in stored else b""
        num_theirs = len(parse_history(theirs, where=f"{self.address}/{HISTORY}"))
        is_ahead = len(self.history()) >= num_theirs
        local = {name: (self.path / name).stat().st_size for name in self._names()}
        for name, size_bytes in stored.items():
            is_wanted = name not in local or (not is_ahead and local[name] != size_bytes)
            if is_wanted and not name.startswith(_FETCHED_WHEN_NEEDED):
                self.store.download(name, self.path / name)
        differing = [name for name, size_bytes in local.items() if stored.get(name) != size_bytes]
        if is_ahead and differing:
            text = f"{len(differing)} files of run {self.run_id} that an earlier process left"
            _logger.info(f"{text} in {self.path} are uploaded first")
            self.publish(differing)
        for name in () if is_ahead else differing:
            if name not in stored and name.startswith(EVENTS):
                (self.path / name).unlink()

    def _names(self) -> list[str]:
        """The finished files of the run but summary.json, in the order in which to store them.

        A checkpoint's JSON file is its commit mark, and latest.json points to one: so they come
        last.
        """
        paths = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        names = (path.as_posix() for path in paths)
        return sorted(
            (name for name in names if name != SUMMARY and not _TEMPORARY.search(name)),
            key=lambda name: (name.endswith(".json"), name.endswith("/latest.json"), name),
        )
