"""Checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint is two files: `step-000001234.pt` (tensors and plain values, read with
weights_only=True) and `step-000001234.json`, written after it, with its hash, size and score: no
JSON, no checkpoint. `latest.json` names the newest one and is written last. Randomness needs no
saving: order and augmentation are functions of (seed, epoch, image) and the network draws nothing,
so the position in the epoch is the whole state of all generators.
"""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xrai.errors import CorruptError, NotFoundError, RunError
from xrai.log import get_logger
from xrai.store import Store

FOLDER = "checkpoints"
SCHEMA_VERSION = 1
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """The commit mark of one checkpoint, as its JSON file holds it."""

    schema_version: int
    file: str
    step: int
    epoch: int
    score: float | None  # of the validation that it was saved after; None between validations
    size_bytes: int
    sha256: str


class CheckpointFolder:
    """The checkpoints of one run: written to a local folder, announced for upload, read back from
    the store.

    `folder` is the run's local folder. `publish` is called with names relative to it of files to
    upload, `remove` with names to delete; both return at once. `store` is the run's place in the
    artifact store (for a run on a local folder, that folder itself).
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

    def save(self, state: dict[str, Any], *, step: int, epoch: int, score: float | None) -> None:
        """Write a checkpoint and its commit mark, each whole or not at all, and drop those that
        are not to be kept.
        """
        name = f"{FOLDER}/step-{step:09d}.pt"
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        digest, size_bytes = _sha256(temporary), temporary.stat().st_size
        temporary.replace(path)
        score = score if score is None or math.isfinite(score) else None
        entry = Entry(SCHEMA_VERSION, name, step, epoch, score, size_bytes, digest)
        mark = _mark_name(entry)
        _write_whole(self._folder / mark, json.dumps(asdict(entry), indent=1).encode())
        _write_whole(
            self._folder / FOLDER / "latest.json", json.dumps(asdict(entry), indent=1).encode()
        )
        self._publish([name, mark, f"{FOLDER}/latest.json"])
        self._entries = [*(other for other in self._entries if other.step != step), entry]
        self._prune()

    def newest(self) -> tuple[Entry, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None; damaged ones are dropped with a
        warning each.
        """
        self._entries = sorted(self._listed(), key=lambda entry: entry.step)
        for entry in reversed(self._entries):
            state = self._readable(entry)
            if state is not None:
                return entry, state
            self._entries.remove(entry)
            self._delete(entry)
        return None

    def best(self) -> tuple[Entry, dict[str, Any]] | None:
        """The checkpoint with the best score that can be read (of equal ones the first), or
        None.
        """
        scored = [entry for entry in self._entries if entry.score is not None]
        for entry in sorted(scored, key=_by_score):
            state = self._readable(entry)
            if state is not None:
                return entry, state
        return None

    def _listed(self) -> Iterator[Entry]:
        """The checkpoints in the store, and those that an earlier process left here before they
        were stored.
        """
        stored = {found.key for found in self._store.list(FOLDER + "/")}
        here = {f"{FOLDER}/{path.name}" for path in (self._folder / FOLDER).glob("step-*.json")}
        for key in sorted(stored | here):
            if not key.endswith(".json") or key.endswith("/latest.json"):
                continue
            try:
                content = (
                    self._store.read(key) if key in stored else (self._folder / key).read_bytes()
                )
                entry = Entry(**json.loads(content))
                if _mark_name(entry) != key:
                    raise ValueError(f"it speaks of {entry.file!r}")
                yield entry
            except (ValueError, TypeError, UnicodeDecodeError) as error:
                _logger.warning(
                    "checkpoint mark %s in %s is damaged and skipped: %s",
                    key,
                    self._store.uri,
                    error,
                )

    def _readable(self, entry: Entry) -> dict[str, Any] | None:
        """The state of a checkpoint, or None with a warning where its bytes are not those that
        were saved.
        """
        try:
            return read_state(self._store, entry.file, sha256=entry.sha256, folder=self._folder)
        except (CorruptError, NotFoundError) as error:
            _logger.warning("checkpoint %s is skipped: %s", entry.file, error)
            return None

    def _prune(self) -> None:
        newest = sorted(self._entries, key=lambda entry: entry.step)[-self._keep_last :]
        best = sorted((entry for entry in self._entries if entry.score is not None), key=_by_score)[
            : self._keep_best
        ]
        for entry in [
            entry for entry in self._entries if entry not in newest and entry not in best
        ]:
            self._entries.remove(entry)
            self._delete(entry)

    def _delete(self, entry: Entry) -> None:
        for name in (
            _mark_name(entry),
            entry.file,
        ):  # the mark first: what has no mark is no checkpoint
            (self._folder / name).unlink(missing_ok=True)
            self._remove([name])


def read_state(store: Store, key: str, *, sha256: str | None, folder: Path) -> dict[str, Any]:
    """Tensors and plain values that `torch.save` wrote, from a store, checked against a hash where
    one is known.

    A remote object is first copied into `folder`. Nothing but tensors and plain containers is ever
    unpickled. Raises `CorruptError` where the bytes are not what was saved, `NotFoundError` where
    there is no such object.
    """
    path = store.local_path(key)
    if path is None:
        path = folder / key
        if not path.exists() or (sha256 is not None and _sha256(path) != sha256):
            path.parent.mkdir(parents=True, exist_ok=True)
            store.download(key, path)
    if not path.exists():
        raise NotFoundError(f"there is no {key} in {store.uri}")
    if sha256 is not None and _sha256(path) != sha256:
        raise CorruptError(
            f"{key} in {store.uri} does not have the hash {sha256[:12]}… that it was saved with"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise CorruptError(
            f"{key} in {store.uri} is no file of weights: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict):
        raise CorruptError(
            f"{key} in {store.uri} holds {type(state).__name__}, not the state of a model"
        )
    return state


def refuse_other_run(saved: dict[str, Any], current: dict[str, Any], *, name: str) -> None:
    """Raise `RunError` naming the first fact in which a checkpoint's run is another than the
    current one.
    """
    for fact, value in current.items():
        if saved.get(fact) != value:
            raise RunError(
                f"checkpoint {name} was saved with {fact} = {saved.get(fact)!r}, this run has {value!r}: give another "
                "--run_id to start anew, with --init_from to take the weights alone"
            )


def _mark_name(entry: Entry) -> str:
    return f"{FOLDER}/step-{entry.step:09d}.json"


def _by_score(entry: Entry) -> tuple[float, int]:
    assert entry.score is not None
    return -entry.score, entry.step


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
