"""Checkpoints: what a run needs to resume as if it had never stopped.

A checkpoint is two files: `step-000001234.pt` (tensors and plain values, read with
weights_only=True) and its commit mark `step-000001234.json`, written after it, with its hash, size
and score. A second checkpoint of the same step is `step-000001234_2`, so that a file is never
replaced under its mark. `latest.json` repeats the newest mark and is written last. Random state
needs no saving: order, augmentation and dropped paths are functions of (seed, epoch, image), so the
position in the epoch is the whole random state.
"""

import json
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xrai.errors import CorruptError, NotFoundError, RunError
from xrai.files import is_temporary, replacing, sha256_of, write_atomically
from xrai.log import get_logger
from xrai.store import Store
from xrai.tables import from_plain, load_json

FOLDER = "checkpoints"
_LATEST = f"{FOLDER}/latest.json"
_FILE = re.compile(rf"{FOLDER}/step-(\d{{9,}})(_2)?\.pt")
SCHEMA_VERSION = 1
NUM_TRANSFERS = 3  # attempts to fetch a file from a bucket undamaged
# What zipfile and torch raise on bytes that are not a file of weights
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,  # zipfile seeks to where a damaged header points
)
# What Python and torch raise on plain values and tensors that are not those that were saved
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """The commit mark of one checkpoint, as its JSON file holds it."""

    schema_version: int
    file: str
    step: int
    epoch: int
    score: float | None  # of the validation just before; None within an epoch
    size_bytes: int
    sha256: str
    facts: Mapping[str, Any] | None = None  # as in the checkpoint; None in earlier versions


class CheckpointFolder:
    """The checkpoints of one run: written to a local folder, uploaded, and read back.

    `folder` is the run's local folder and `store` its place in the artifact store (for a run on a
    local folder, that folder itself). `publish` is told the files to upload and `remove` those to
    delete, relative to `folder`; both return at once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: Store,
        publish: Callable[[Sequence[str]], None],
        remove: Callable[[Sequence[str]], None],
        keep_last: int,
        keep_best: int,
    ) -> None:
        self._folder, self._store = folder, store
        self._publish, self._remove = publish, remove
        self._keep_last, self._keep_best = keep_last, keep_best
        self._entries: list[Entry] = []
        self._unmarked: list[str] = []  # checkpoint files without a commit mark

    def save(self, state: dict[str, Any], *, step: int, epoch: int, score: float | None) -> None:
        """Write a checkpoint and its mark, each whole or not at all, and drop outdated ones."""
        earlier = [entry for entry in self._entries if entry.step == step]
        name = f"{FOLDER}/step-{step:09d}.pt"
        if name in [entry.file for entry in earlier]:
            name = name.removesuffix(".pt") + "_2.pt"
        path = self._folder / name
        write_state(path, state)
        score = score if score is None or math.isfinite(score) else None
        size_bytes = path.stat().st_size
        digest, facts = sha256_of(path), state.get("facts")
        entry = Entry(SCHEMA_VERSION, name, step, epoch, score, size_bytes, digest, facts)
        marks = [_mark_name(entry), _LATEST]
        for mark in marks:
            write_atomically(self._folder / mark, _mark_text(entry))
        self._publish([name, *marks])
        for other in earlier:
            self._entries.remove(other)
            self._delete(other)
        self._entries.append(entry)
        self._prune()

    def latest(self) -> Entry | None:
        """The mark of the newest checkpoint as stored, or None where none can be read. Changes
        nothing, so it may be called while another job writes the run.
        """
        try:
            entry: Entry = from_plain(Entry, load_json(self._store.read(_LATEST)))
        except (NotFoundError, ValueError):
            return None  # `newest` says what is damaged
        return entry

    def newest(self) -> tuple[Entry, dict[str, Any]] | None:
        """The newest readable checkpoint, or None if there never was one. Damaged ones are skipped
        with a warning, and removed once an older one has been read.

        Raises `RunError` if there are checkpoints but none can be read: to start anew would replace
        them.
        """
        for path in (self._folder / FOLDER).glob(".*"):
            if is_temporary(path.name):  # of a process that was killed while it saved
                path.unlink(missing_ok=True)
        num_marks = self._list()
        for place, entry in reversed(list(enumerate(self._entries))):
            state = self._readable(entry)
            if state is not None:
                for damaged in self._entries[place + 1 :]:
                    self._delete(damaged)
                del self._entries[place + 1 :]
                return entry, state
        if num_marks:
            raise RunError(
                f"none of the checkpoints of {self._store.uri} can be read ({num_marks} in all), "
                "so the run cannot be resumed and is left as it is: restore one of them, or start "
                "anew with another --run_id"
            )
        return None

    def remove_unmarked(self) -> None:
        """Remove files without a mark, as `newest` found them: of a process that was killed while
        it saved a checkpoint or removed one.
        """
        self._discard(self._unmarked)
        self._unmarked = []

    def best(self) -> tuple[Entry, dict[str, Any]] | None:
        """The readable checkpoint with the best score (of equal ones the first), or None."""
        for entry in self._by_score():
            state = self._readable(entry)
            if state is not None:
                return entry, state
        return None

    def _by_score(self) -> list[Entry]:
        """The checkpoints that have a score, best first."""
        scored = [entry for entry in self._entries if entry.score is not None]
        return sorted(scored, key=lambda entry: (-(entry.score or 0.0), entry.step))

    def _list(self) -> int:
        """Read all marks: those in the store, and those here that an earlier process did not
        upload. Damaged ones are skipped with a warning. Returns how many there are.
        """
        stored = {found.key for found in self._store.list(FOLDER + "/")}
        here = {f"{FOLDER}/{path.name}" for path in (self._folder / FOLDER).glob("step-*.json")}
        marks = sorted(key for key in stored | here if key.endswith(".json") and key != _LATEST)
        files = {key for key in stored if _FILE.fullmatch(key)}
        self._unmarked = sorted(files - {key.removesuffix(".json") + ".pt" for key in marks})
        self._entries = []
        for key in marks:
            try:
                is_stored = key in stored
                content = self._store.read(key) if is_stored else (self._folder / key).read_bytes()
                entry: Entry = from_plain(Entry, load_json(content))
                place = _FILE.fullmatch(entry.file)
                if _mark_name(entry) != key or place is None or int(place[1]) != entry.step:
                    raise ValueError(f"it belongs to {entry.file!r}")
                self._entries.append(entry)
            except ValueError as error:
                where = self._store.uri
                _logger.warning(
                    "checkpoint mark %s in %s is damaged and skipped: %s", key, where, error
                )
        return len(marks)

    def _readable(self, entry: Entry) -> dict[str, Any] | None:
        """The state of a checkpoint, or None with a warning if its bytes are not as saved."""
        path = self._store.local_path(entry.file)
        is_remote = path is None
        try:
            if path is None:  # in a bucket: the copy here may not have been uploaded yet
                path = self._folder / entry.file
                for _ in range(NUM_TRANSFERS):
                    if path.exists() and sha256_of(path) == entry.sha256:
                        break
                    self._store.download(entry.file, path)
            name = f"{entry.file} in {self._store.uri}"
            state = read_state(path, name=name, sha256=entry.sha256)
        except (CorruptError, NotFoundError) as error:
            _logger.warning("checkpoint %s is skipped: %s", entry.file, error)
            return None
        mark = self._folder / _mark_name(entry)
        if is_remote and not mark.exists():  # another machine's: the summary lists both files
            write_atomically(mark, _mark_text(entry))
        return state

    def _prune(self) -> None:
        newest = sorted(self._entries, key=lambda entry: entry.step)[-self._keep_last :]
        kept = newest + self._by_score()[: self._keep_best]
        for entry in [entry for entry in self._entries if entry not in kept]:
            self._entries.remove(entry)
            self._delete(entry)

    def _delete(self, entry: Entry) -> None:
        self._discard([_mark_name(entry), entry.file])  # the mark first: it makes the checkpoint

    def _discard(self, names: Sequence[str]) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
            self._remove([name])


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values for `read_state`, whole or not at all. Raises `OSError`."""
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # which torch hides behind its own error
                raise error.__context__ from None
            raise


def read_state(path: Path, *, name: str, sha256: str | None = None) -> dict[str, Any]:
    """Tensors and plain values that `torch.save` wrote, checked against a hash if one is known,
    else against the CRC-32 that the file holds of each tensor, which torch itself does not check.

    Nothing but tensors and plain containers is ever unpickled. `name` names the file in messages.
    Raises `CorruptError` if the bytes are not as saved, `NotFoundError` if there is no such file.
    """
    if not path.exists():
        raise NotFoundError(f"there is no {name}")
    if sha256 is not None and sha256_of(path) != sha256:
        raise CorruptError(f"{name} does not have the hash {sha256[:12]}… that it was saved with")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise CorruptError(f"{name} is damaged: its part {damaged} is not as it was saved")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        cause = (str(error) or "it is cut short").splitlines()[0]  # an EOFError has no text
        raise CorruptError(f"{name} is not a file of weights: {cause}") from error
    if not isinstance(state, dict):
        raise CorruptError(f"{name} holds {type(state).__name__}, not the state of a model")
    return state


def load_weights(model: nn.Module, weights: Any) -> None:
    """Give a model the weights of a checkpoint. Raises `CorruptError` if they are not finite, or of
    another network.
    """
    try:
        model.load_state_dict(weights)
    except MISFITS as error:
        cause = " ".join(str(error).split())
        raise CorruptError(
            f"a checkpoint does not hold the weights of this network: {cause}"
        ) from error
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CorruptError(f"a checkpoint holds weights that are not finite: {name}")


def refuse_other_run(saved: Any, current: dict[str, Any], *, name: str) -> None:
    """Raise `RunError` naming the first fact in which a checkpoint differs from this run,
    `CorruptError` if it holds no facts.
    """
    if not isinstance(saved, dict):
        raise CorruptError(f"checkpoint {name} does not say of which run it is")
    for fact, value in current.items():
        if fact not in saved:
            raise RunError(
                f"checkpoint {name} does not state its {fact}, so an earlier version of xrai made "
                "it: finish the run with that version, or give another --run_id to start anew"
            )
        if saved[fact] != value:
            raise RunError(
                f"checkpoint {name} was saved with {fact} = {saved[fact]!r}, this run has "
                f"{value!r}: give another --run_id to start anew, with --init_from to take the "
                "weights alone"
            )


def _mark_text(entry: Entry) -> bytes:
    return json.dumps(asdict(entry), indent=1).encode()


def _mark_name(entry: Entry) -> str:
    return entry.file.removesuffix(".pt") + ".json"
