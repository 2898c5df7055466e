"""What an address holds while a data set is made there, under keys that begin with "unfinished-".

A claim, which says what is being made; the id of the key that patients are hashed with, once one is
used; the hashes of the source's files; and a part for each shard, which says what the shard holds.
With these a killed job goes on from what is stored, and several machines can share the work. A
commit removes them. A data set that takes the place of another one is made under keys that begin
with "replacement/", until dataset.json lists these.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import PIL

from xrai import __version__
from xrai.dataset.shards import HDF5_VERSION, ShardInfo
from xrai.errors import AlreadyExistsError, CorruptError, DatasetError, NotFoundError
from xrai.ingest import dicom
from xrai.ingest.leaks import HASH_BYTES
from xrai.ingest.patients import PatientKey
from xrai.ingest.plan import Listing, Plan, PlannedShard
from xrai.log import get_logger
from xrai.store import Store

UNFINISHED: Final = "unfinished-"

_CLAIM = f"{UNFINISHED}claim.json"
_KEY_ID = f"{UNFINISHED}patient-key"
_UNFINISHED_KEY = re.compile(
    r"unfinished-(claim\.json|patient-key|hashes-\d{5,}|part-(train|val|test)-\d{5,}-of-\d{5,}\.h5)"
)
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """The result of one planned shard."""

    plan_sha256: str
    shard: ShardInfo | None  # None where every file of it was excluded
    reasons: dict[str, str]  # path -> why it was excluded
    histogram: list[int]  # pixels of each grey level, (256,)
    perceptual_hashes: bytearray  # of the shard's rows, one after the other; hex texts in JSON
    few_greys: list[str]  # paths of images with few grey levels
    unknown_views: list[str] = field(default_factory=list)  # whose ViewPosition is not known

    def to_json(self) -> bytes:
        data = self.perceptual_hashes
        starts = range(0, len(data), HASH_BYTES)
        hashes = [data[start : start + HASH_BYTES].hex() for start in starts]
        return (json.dumps({**asdict(self), "perceptual_hashes": hashes}) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Part":
        """Read one back. Raises `CorruptError` where it is not what was written."""
        try:
            mapping = json.loads(data)
            if mapping["shard"] is not None:
                for name in ("num_rows_per_class", "num_unknown_per_class"):
                    mapping["shard"][name] = tuple(mapping["shard"][name])
                mapping["shard"] = ShardInfo(**mapping["shard"])
            mapping["perceptual_hashes"] = bytearray.fromhex("".join(mapping["perceptual_hashes"]))
            return cls(**mapping)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"not the part of a data set: {error}") from error


class Unfinished:
    """The unfinished objects at an address. What is damaged counts as missing."""

    def __init__(self, store: Store, listing: Listing, config: dict[str, Any]) -> None:
        self._store, self._key, self._key_id = store, listing.key, ""
        versions = {"xrai": __version__, "pillow": PIL.__version__, "hdf5": HDF5_VERSION}
        claim = {
            "listing_sha256": listing.sha256,
            "source": listing.source,
            "config": config,
            "made_with": {**versions, **dicom.versions()},
        }
        if listing.key.id:  # a table names patients
            claim["patient_key"] = listing.key.id
        self._claim = json.dumps(claim, sort_keys=True).encode()

    def is_claimed(self) -> bool:
        """Whether the address holds the beginning of this very data set."""
        try:
            return self._store.read(_CLAIM) == self._claim
        except NotFoundError:
            return False

    def claim(self) -> None:
        """State at the address what is being made there. Raises `DatasetError` if it is in use."""
        try:
            self._store.write(_CLAIM, self._claim, only_if_absent=True)
        except AlreadyExistsError:
            try:
                found = self._store.read(_CLAIM)
            except NotFoundError:  # another process has just committed; this one will find the same
                return
            if found != self._claim:
                other = re.search(rb'"patient_key": "([0-9a-f]+)"', found)
                if other and self._key.id and other[1].decode() != self._key.id:
                    raise _other_key(self._store, other[1].decode(), self._key) from None
                raise DatasetError(
                    f"{self._store.uri} holds the beginning of a data set from another source, "
                    "config or version: finish that one, choose another --dataset, or discard it "
                    "with --overwrite"
                ) from None
            _logger.info("going on with the data set that was begun at %s", self._store.uri)

    def claim_key(self, key: PatientKey) -> None:
        """State which key patients are hashed with, if any is. Raises `DatasetError` if another job
        has used another one.
        """
        if key.id != self._key_id:
            with suppress(AlreadyExistsError):
                self._store.write(_KEY_ID, key.id.encode(), only_if_absent=True)
            self.check_key(key)

    def check_key(self, key: PatientKey) -> None:
        """Raise `DatasetError` if another job has used another key than this one, if it exists."""
        if self._key_id:
            return
        with suppress(NotFoundError):
            found = self._store.read(_KEY_ID).decode(errors="replace")
            if (own := key.existing_id()) not in ("", found):
                raise _other_key(self._store, found, key)
            self._key_id = own

    def hashes(self, group: int, *, num_files: int) -> list[list[str]] | None:
        """Stored (sha256, reason, patient) of a group of files."""
        try:
            found = json.loads(self._read(_hashes_key(group)) or b"")
            rows = [[str(text) for text in texts] for texts in found]
        except (ValueError, TypeError):
            return None
        return rows if [len(texts) for texts in rows] == [3] * num_files else None

    def store_hashes(self, group: int, found: Sequence[Sequence[str]]) -> None:
        self._write(_hashes_key(group), json.dumps(found).encode())

    def part(self, shard: PlannedShard, plan: Plan) -> Part | None:
        """The stored part of a shard, if it is of this plan."""
        try:
            part = Part.from_json(self._read(_part_key(shard)) or b"")
        except CorruptError:
            return None
        return part if part.plan_sha256 == plan.sha256 else None

    def store_part(self, shard: PlannedShard, part: Part) -> None:
        self._write(_part_key(shard), part.to_json())

    def drop_part(self, shard: PlannedShard) -> None:
        self._store.delete(_part_key(shard))

    def _write(self, key: str, data: bytes) -> None:
        self._store.write(key, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)

    def _read(self, key: str) -> bytes | None:
        """What `_write` stored; None where it is missing or damaged."""
        try:
            digest, _, data = self._store.read(key).partition(b"\n")
        except NotFoundError:
            return None
        return data if digest == hashlib.sha256(data).hexdigest().encode() else None


def _other_key(store: Store, found: str, key: PatientKey) -> DatasetError:
    return DatasetError(
        f"{store.uri} holds the beginning of a data set whose patients are hashed with the key "
        f"{found}; {key.path} holds another one, {key.id}: name the same file for all its jobs by "
        "--patient_key or XRAI_PATIENT_KEY, or discard it with --overwrite"
    )


def remove_unfinished(store: Store) -> None:
    """Remove all unfinished objects, the claim last."""
    keys = [entry.key for entry in store.list(UNFINISHED) if is_unfinished(entry.key)]
    for key in sorted(keys, key=lambda key: key == _CLAIM):
        store.delete(key)


def is_unfinished(key: str) -> bool:
    """Whether a key is that of an unfinished object."""
    return _UNFINISHED_KEY.fullmatch(key) is not None


def _hashes_key(group: int) -> str:
    return f"{UNFINISHED}hashes-{group:05d}"


def _part_key(shard: PlannedShard) -> str:
    return f"{UNFINISHED}part-{shard.name}"
